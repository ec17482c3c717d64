"""Parameter counts and forward costs are the published ones (method 3.1)."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from maekit.model.mae import MaskedAutoencoder, create_model

# encoder, decoder (trainable), with fixed tables; GMAC encoder at 25 %, decoder, encoder on all patches
PUBLISHED = {
    "vit_base_patch16_224": (85.65, 26.01, 111.91, 4.41, 5.37, 17.56),
    "vit_large_patch16_224": (303.10, 26.14, 329.54, 15.38, 5.38, 61.55),
    "vit_huge_patch14_224": (630.44, 26.18, 657.07, 41.43, 7.13, 167.29),
}


def on_meta(name: str, **changes: Any) -> MaskedAutoencoder:
    with torch.device("meta"):
        return create_model(name, **changes)


def gmac(counter: FlopCounterMode, part: str) -> float:
    found = [sum(counts.values()) for name, counts in counter.get_flop_counts().items() if name == part]
    assert len(found) == 1, (part, list(counter.get_flop_counts()))
    return found[0] / 2e9


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_models(name: str) -> None:
    model = on_meta(name)
    encoder, decoder, everything, *_ = PUBLISHED[name]
    trained = [sum(p.numel() for p in part.parameters() if p.requires_grad) for part in (model.encoder, model.decoder)]
    assert [round(count / 1e6, 2) for count in trained] == [encoder, decoder]
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == everything


@pytest.mark.parametrize("name", PUBLISHED)
def test_forward_costs_are_those_of_the_method(name: str) -> None:
    model = on_meta(name)
    images = torch.empty(1, 3, 224, 224, device="meta")
    *_, masked, decoder, whole = PUBLISHED[name]
    with FlopCounterMode(display=False) as counter:
        model(images)
    total = counter.get_total_flops() / 2e9
    assert total == pytest.approx(masked + decoder, abs=0.02)
    with FlopCounterMode(display=False) as counter:
        model.features(images)
    assert counter.get_total_flops() / 2e9 == pytest.approx(whole, abs=0.02)
    with FlopCounterMode(display=False) as counter:
        model.decoder.predict(model.decoder(*latent_of(model)))
    assert counter.get_total_flops() / 2e9 == pytest.approx(decoder, abs=0.01)
    assert total - counter.get_total_flops() / 2e9 == pytest.approx(masked, abs=0.01)


def latent_of(model: MaskedAutoencoder) -> tuple[torch.Tensor, torch.Tensor]:
    keep = model.num_patches // 4
    latent = torch.empty(1, model.encoder.num_prefix_tokens + keep, model.encoder.embed_dim, device="meta")
    return latent, torch.zeros(1, keep, dtype=torch.long, device="meta")


def test_training_predicts_only_what_enters_the_loss() -> None:
    model, images = on_meta("vit_base_patch16_224"), torch.empty(1, 3, 224, 224, device="meta")
    with FlopCounterMode(display=False) as forward:
        model(images)
    with FlopCounterMode(display=False) as loss:
        model.loss(images)
    prediction = 2 * 512 * 768  # FLOP of one patch
    assert forward.get_total_flops() - loss.get_total_flops() == 49 * prediction
