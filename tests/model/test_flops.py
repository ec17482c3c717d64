"""Operations counted from shapes, against torch's counter of what really ran and against the paper's geometry."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maekit.errors import MaekitError
from maekit.model.flops import attention_flops, encoder_flops, flops, flops_of
from maekit.model.mae import MaskedAutoencoder, create_model

VITS = {"b": "vit_base_patch16_224", "l": "vit_large_patch16_224", "h": "vit_huge_patch14_224"}

# Forward pass of one image in 10^9 multiplications, measured on the authors' geometry: encoder at 25 %, decoder, the
# encoder on the full sequence.
GMACS = {"b": (4.41, 5.37, 17.56), "l": (15.38, 5.38, 61.55), "h": (41.43, 7.13, 167.29)}


def counted(model: MaskedAutoencoder, images: torch.Tensor, noise: torch.Tensor, ratio: float) -> tuple[int, int]:
    """Return what torch counts for the forward pass and for both; attention as products, so that it counts all."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = model.loss(images, noise, ratio)
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("vit", VITS)
def test_what_torch_counts_for_the_papers_models(vit: str) -> None:
    with torch.device("meta"):
        model = create_model(VITS[vit])
        forward, both = counted(model, torch.empty(2, 3, 224, 224), torch.empty(2, model.num_patches), 0.75)
    mine = flops(model, 0.75)
    assert (2 * mine.forward, 2 * mine.total) == (forward, both)


def test_what_torch_counts_for_every_kind_of_encoder(kind: str, build: Callable[..., MaskedAutoencoder]) -> None:
    model = build(kind)
    images = torch.rand(3, model.encoder.in_chans, *model.img_size)
    for ratio in (0.5, 0.75):
        forward, both = counted(model, images, torch.rand(3, model.num_patches), ratio)
        mine = flops(model, ratio)
        assert (3 * mine.forward, 3 * mine.total) == (forward, both)


VARIANTS: dict[str, dict[str, Any]] = {
    "mask token in the encoder": {"variant": {"encoder_mask_token": True}},
    "linear head": {"variant": {"encoder_mask_token": True}, "decoder_depth": 0},
    "denoising": {"variant": {"mask_kind": "none", "loss_on": "all", "add_noise": 0.3}},
    "denoising, linear head": {
        "variant": {"mask_kind": "none", "loss_on": "all", "add_noise": 0.3}, "decoder_depth": 0, "target": "pixel",
    },
    "cross": {"variant": {"decoder_kind": "cross"}},
    "cross, some": {"variant": {"decoder_kind": "cross", "decode_ratio": 0.25}},
    "some": {"variant": {"decode_ratio": 0.25, "positions": "learned"}},
    "loss on all": {"variant": {"loss_on": "all"}, "target": "low_pass"},
    "loss on visible, cross": {"variant": {"loss_on": "visible", "decoder_kind": "cross"}},
    "no class token": {"variant": {"class_tokens": 0}, "target": "hog"},
    "three class tokens, cross": {"variant": {"class_tokens": 3, "decoder_kind": "cross"}},
    "units, block": {"variant": {"mask_unit": 2, "mask_kind": "block"}},
    "one wide block": {"decoder_depth": 1, "decoder_dim": 32},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_what_torch_counts_for_every_departure(name: str, build: Callable[..., MaskedAutoencoder]) -> None:
    model = build(**VARIANTS[name])
    for ratio in (0.5, 0.75):
        forward, both = counted(model, torch.rand(2, 3, 32, 32), torch.rand(2, model.num_patches), ratio)
        mine = flops(model, ratio)
        assert (2 * mine.forward, 2 * mine.total) == (forward, both)


@pytest.mark.parametrize("name", VARIANTS)
def test_products_among_tokens_are_those_that_torch_counts(name: str, build: Callable[..., MaskedAutoencoder]) -> None:
    model = build(**VARIANTS[name])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.loss(torch.rand(2, 3, 32, 32), torch.rand(2, model.num_patches), 0.75).backward()
    both = counter.get_flop_counts()["Global"]
    assert 2 * attention_flops(model, 0.75) == both[torch.ops.aten.bmm]


def test_mask_tokens_in_the_encoder_of_vit_l_cost_3_22_times_as_much() -> None:
    # the paper says 3.3 (Table 1c); (61.55 + 5.38) / 20.76 by the figures above
    without = flops_of(name=VITS["l"], every_patch=True)
    with_it = flops_of(name=VITS["l"], every_patch=True, variant={"encoder_mask_token": True})
    assert round((with_it.encoder.forward + without.decoder.forward) / without.forward, 2) == 3.22
    # the projection between them has all places to bring over, too
    assert with_it.decoder.forward - without.decoder.forward == 2 * 147 * 1024 * 512
    assert round(with_it.forward / without.forward, 2) == 3.23


def test_more_decoded_than_removed_is_refused() -> None:
    with pytest.raises(MaekitError, match="E-CONFIG-DECODER"):
        flops_of(0.5, variant={"decode_ratio": 0.75})


@pytest.mark.parametrize(("vit", "expected"), GMACS.items())
def test_the_published_geometries(vit: str, expected: tuple[float, float, float]) -> None:
    with torch.device("meta"):
        model = create_model(VITS[vit])
    published = flops(model, 0.75, every_patch=True)
    found = (published.encoder.forward, published.decoder.forward, encoder_flops(model))
    assert [round(count / 2e9, 2) for count in found] == list(expected)


def test_a_block_by_hand() -> None:
    # 16 patches of 7 x 7, 4 kept and the class token: 5 tokens of 24; decoder: keys and values of 17 tokens of 16,
    # all else of the 12 removed ones
    spec: dict[str, Any] = {
        "name": "vit_tiny_patch16_224", "img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 24, "depth": 1,
        "num_heads": 3, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 4,
    }  # fmt: skip
    found = flops_of(0.75, **spec)
    embedding, block = 4 * 49 * 24, 12 * 24**2 * 5 + 2 * 5**2 * 24
    decoder = 5 * 24 * 16 + 2 * 16**2 * 17 + 10 * 16**2 * 12 + 2 * 12 * 17 * 16 + 12 * 16 * 49
    assert (found.encoder.forward, found.decoder.forward) == (2 * (embedding + block), 2 * decoder)
    assert (found.encoder.backward, found.decoder.backward) == (2 * (embedding + 2 * block), 4 * decoder)
    assert found.total == found.encoder.total + found.decoder.total == found.forward + found.backward


def test_a_ratio_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(MaekitError, match="E-CONFIG-MASK"):
        flops_of(0.999)
