"""The fast path equals the method as the paper tells it (reference.py), in values and in every gradient."""

import pytest
import torch
from torch import Tensor

from maekit.model.mae import MaskedAutoencoder
from maekit.model.masking import len_keep

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


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_it_holds_at_other_ratios(build: Build, ratio: float) -> None:
    model = build().double()
    images, noise = draw(model)
    expected = reference(model, images, noise, len_keep(model.num_patches, ratio))
    torch.testing.assert_close(model(images, ratio, noise=noise).loss, expected.loss, **CLOSE)


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
