"""The fast path equals the method as the paper tells it (reference.py), in values and in every gradient."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maekit.model.mae import MaskedAutoencoder, create_model
from maekit.model.masking import len_keep
from maekit.model.targets import PIXELS

from .conftest import Build
from .reference import flatten_patches, reference

CLOSE = {"rtol": 0, "atol": 1e-10}


def draw(model: MaskedAutoencoder, batch: int = 3) -> tuple[Tensor, Tensor]:
    """Return images and noise in float64."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(batch, model.encoder.in_chans, *model.img_size, generator=generator, dtype=torch.float64)
    return images, torch.rand(batch, model.num_patches, generator=generator, dtype=torch.float64)


def gradients(model: MaskedAutoencoder, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("target", ["norm_pixel", "pixel"])
def test_outputs_and_all_gradients_are_those_of_the_reference(build: Build, kind: str, target: str) -> None:
    model = build(kind, target=target).double()
    images, noise = draw(model)
    expected = reference(model, images, noise, len_keep(model.num_patches, 0.7))
    found = model(images, 0.7, noise=noise)
    assert torch.equal(found.mask, expected.mask)
    assert torch.equal(found.ids_restore, expected.ids_restore)
    for name in ("latent", "pred", "loss"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **CLOSE)
    slow, fast = gradients(model, expected.loss), gradients(model, found.loss)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert slow.keys() == fast.keys() == trained
    for name in trained:
        torch.testing.assert_close(fast[name], slow[name], **CLOSE)


@pytest.mark.parametrize("target", ["norm_pixel", "pixel"])
def test_the_loss_that_training_calls_is_that_of_forward(build: Build, kind: str, target: str) -> None:
    model = build(kind, target=target).double()
    images, noise = draw(model)
    whole, only_removed = model(images, 0.7, noise=noise).loss, model.loss(images, noise, mask_ratio=0.7)
    torch.testing.assert_close(only_removed, whole, **CLOSE)
    one, other = gradients(model, whole), gradients(model, only_removed)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(other[name], one[name], **CLOSE)


class Case(NamedTuple):
    """One model, its input and the method's count of kept patches."""

    model: MaskedAutoencoder
    images: Tensor
    noise: Tensor
    mask_ratio: float
    keep: int


PREFIXES = {
    "class token": "vit_tiny_patch16_224",
    "none": "vit_base_patch16_siglip_gap_224",
    "class token and registers": "vit_small_patch14_reg4_dinov2",
    "registers": "vit_medium_patch16_reg4_gap_256",
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a geometry, weights in which no bias is 0 and no norm 1, images, noise and a ratio."""
    rows, columns = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)).filter(lambda grid: grid[0] * grid[1] > 1))
    patch, channels = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    percents = [one for one in range(1, 100) if rows * columns * (100 - one) // 100 not in (0, rows * columns)]
    percent = draw(st.sampled_from(percents))
    heads, decoder_heads = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 4]))
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    model = create_model(
        draw(st.sampled_from(list(PREFIXES.values()))),
        img_size=(rows * patch, columns * patch),
        patch_size=patch,
        in_chans=channels,
        embed_dim=4 * heads * draw(st.integers(1, 4)),
        depth=draw(st.integers(1, 3)),
        num_heads=heads,
        decoder_dim=4 * decoder_heads * draw(st.integers(1, 3)),
        decoder_depth=draw(st.integers(1, 3)),
        decoder_heads=decoder_heads,
        target=draw(st.sampled_from(PIXELS if patch * patch * channels > 1 else ["pixel"])),
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    batch = draw(st.integers(1, 3))
    images = torch.randn(batch, channels, *model.img_size, dtype=torch.float64)
    noise = torch.rand(batch, model.num_patches, dtype=torch.float64)
    # in whole numbers, so that no dust of floats enters (trap 4.1)
    return Case(model, images, noise, percent / 100, model.num_patches * (100 - percent) // 100)


def far_apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return the tensors that are further apart than 1e-10 of the largest expected value."""
    assert found.keys() == expected.keys()
    apart = {
        name: ((found[name] - expected[name]).abs().max() / expected[name].abs().max()).item() for name in expected
    }
    return {name: relative for name, relative in apart.items() if not relative <= 1e-10}


def equals_the_reference(case: Case) -> None:
    model, images, noise, mask_ratio, keep = case
    model.requires_grad_(True)  # position tables too: their gradients prove where they were added
    expected = reference(model, images, noise, keep)
    found = model(images, mask_ratio, noise=noise)
    assert torch.equal(found.mask, expected.mask)
    assert torch.equal(found.ids_restore, expected.ids_restore)
    values = [{name: getattr(one, name) for name in ("latent", "pred", "loss")} for one in (found, expected)]
    assert not far_apart(*values)
    of_training = model.loss(images, noise, mask_ratio=mask_ratio)
    slow, *fast = (gradients(model, loss) for loss in (expected.loss, found.loss, of_training))
    assert slow.keys() == {name for name, _ in model.named_parameters()}
    assert [far_apart(one, slow) for one in fast] == [{}, {}]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases())
def test_it_holds_for_any_geometry_ratio_and_target(case: Case) -> None:
    equals_the_reference(case)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(case=cases())
def test_it_holds_for_a_thousand_more(case: Case) -> None:
    equals_the_reference(case)


def test_a_given_mask_scores_like_the_noise_it_came_from(build: Build) -> None:
    model = build().double()
    images, noise = draw(model)
    by_noise = model(images, noise=noise)
    by_mask = model(images, mask=by_noise.mask)
    assert torch.equal(by_mask.mask, by_noise.mask)
    torch.testing.assert_close(by_mask.pred, by_noise.pred, **CLOSE)
    torch.testing.assert_close(by_mask.loss, by_noise.loss, **CLOSE)


def test_gradients_are_right_by_finite_differences(build: Build) -> None:
    model = build(embed_dim=8, num_heads=2, depth=1, decoder_dim=8, decoder_depth=1, img_size=16, patch_size=4).double()
    images, noise = draw(model, batch=1)
    parameter = model.decoder.mask_token
    grad = gradients(model, model.loss(images, noise))["decoder.mask_token"]
    step = torch.zeros_like(parameter)
    step[0, 0, 3] = 1e-6
    with torch.no_grad():
        parameter += step
        above = model.loss(images, noise)
        parameter -= 2 * step
        below = model.loss(images, noise)
    torch.testing.assert_close((above - below) / 2e-6, grad[0, 0, 3], rtol=1e-6, atol=1e-9)


def test_the_reference_cuts_patches_row_by_row_with_the_channel_fastest() -> None:
    images = torch.arange(2 * 4 * 4).reshape(1, 2, 4, 4)
    assert flatten_patches(images, 2)[0, 1].tolist() == [2, 18, 3, 19, 6, 22, 7, 23]
