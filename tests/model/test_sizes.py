"""Parameter counts and forward costs are the published ones (method 3.1)."""

from collections.abc import Callable
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


def cost(work: Callable[[], object]) -> float:
    """Return GMAC: matrix products and attention."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_models(name: str) -> None:
    model = on_meta(name)
    encoder, decoder, everything, *_ = PUBLISHED[name]
    trained = [sum(p.numel() for p in part.parameters() if p.requires_grad) for part in (model.encoder, model.decoder)]
    assert [round(count / 1e6, 2) for count in trained] == [encoder, decoder]
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == everything


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "base" not in name else name for name in PUBLISHED]
)
def test_forward_costs_are_those_of_the_method_less_the_projection_of_removed_patches(name: str) -> None:
    model = on_meta(name)
    images = torch.empty(1, 3, 224, 224, device="meta")
    *_, masked, decoder, whole = PUBLISHED[name]
    # the official encoder projects all patches, then drops 75 %; ours never projects those
    removed = model.num_patches * 3 // 4
    spared = removed * model.encoder.embed_dim * 3 * model.patch**2 / 1e9
    decoding = cost(lambda: model.decoder.predict(model.decoder(*latent_of(model))))
    together = cost(lambda: model(images))
    assert decoding == pytest.approx(decoder, abs=0.006)
    assert together - decoding + spared == pytest.approx(masked, abs=0.006)
    assert cost(lambda: model.features(images)) == pytest.approx(whole, abs=0.006)


def latent_of(model: MaskedAutoencoder) -> tuple[torch.Tensor, torch.Tensor]:
    keep = model.num_patches // 4
    latent = torch.empty(1, model.encoder.num_prefix_tokens + keep, model.encoder.embed_dim, device="meta")
    return latent, torch.zeros(1, keep, dtype=torch.long, device="meta")


def test_training_predicts_only_what_enters_the_loss() -> None:
    model, images = on_meta("vit_base_patch16_224"), torch.empty(1, 3, 224, 224, device="meta")
    spared = cost(lambda: model(images)) - cost(lambda: model.loss(images))
    # the visible patches' predictions; of them and the class token all of the last block but keys and values
    assert spared * 1e9 == pytest.approx(49 * 512 * 768 + 50 * (10 * 512**2 + 2 * 197 * 512))
