import math
from itertools import pairwise
from typing import Literal

import numpy as np
import pytest
import torch

from maekit.errors import MaekitError
from maekit.model.mae import MaskedAutoencoder, create_model
from maekit.report.reconstruction import (
    LEAK,
    check_ratios,
    combined_figure,
    combined_notes,
    mask_noise,
    ratio_figure,
    ratio_notes,
    reconstruct_images,
    reconstruction_figure,
)


def tiny(
    target: Literal["norm_pixel", "pixel"] = "norm_pixel", channels: int = 3, size: tuple[int, int] = (16, 24)
) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return create_model(
        "vit_tiny_patch16_224", img_size=size, patch_size=4, in_chans=channels, embed_dim=16, depth=1, num_heads=2,
        decoder_dim=16, decoder_depth=1, decoder_heads=2, target=target,
    )  # fmt: skip


def some_images(channels: int = 3, count: int = 3) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, channels, 16, 24), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )


def removed_pixels(shown_mask: torch.Tensor) -> torch.Tensor:
    """(B, N) of a 4 x 6 grid of 4-pixel patches -> (B, 1, 16, 24)."""
    return shown_mask.view(-1, 1, 4, 6).repeat_interleave(4, 2).repeat_interleave(4, 3)


def mask_of(count: int, keep: int, seed: int = 0) -> torch.Tensor:
    return mask_noise(seed, count, 24).argsort(1).argsort(1) >= keep


@pytest.mark.parametrize("target", ["norm_pixel", "pixel"])
def test_visible_pixels_of_the_pasted_view_equal_the_original(target: Literal["norm_pixel", "pixel"]) -> None:
    images = some_images()
    shown = reconstruct_images(tiny(target), images, 0.75)
    visible = ~removed_pixels(mask_of(3, 6)).expand(-1, 3, -1, -1)
    for view in (shown.pasted, shown.masked, *([shown.leaking] if shown.leaking is not None else [])):
        assert torch.equal((view * 255).round().to(torch.uint8)[visible], images[visible])
    assert (shown.masked[~visible] == 0.5).all()


def test_masks_are_nested_over_ratios_and_depend_on_seed_and_place_only() -> None:
    masks = [mask_of(4, keep) for keep in (12, 6, 2)]
    assert all((less <= more).all() for less, more in pairwise(masks))
    assert torch.equal(mask_noise(3, 5, 24)[:2], mask_noise(3, 2, 24))
    assert not torch.equal(mask_noise(3, 1, 24), mask_noise(4, 1, 24))


@pytest.mark.parametrize("target", ["norm_pixel", "pixel"])
def test_the_scored_views_do_not_change_when_removed_pixels_change(target: Literal["norm_pixel", "pixel"]) -> None:
    """The leak property, through the whole model: only the view labelled as leaking may move."""
    images, hidden = some_images(), removed_pixels(mask_of(3, 6)).expand(-1, 3, -1, -1)
    changed = torch.where(hidden, 255 - images, images)
    before, after = (reconstruct_images(tiny(target), x, 0.75) for x in (images, changed))
    assert torch.equal(before.pasted, after.pasted) and torch.equal(before.prediction, after.prediction)
    assert torch.equal(before.masked, after.masked) and before.mse != after.mse
    if before.raw is not None and after.raw is not None:
        assert torch.equal(before.raw, after.raw)
    if before.leaking is not None and after.leaking is not None:
        assert not torch.equal(before.leaking, after.leaking)


def test_numbers_are_those_of_a_plain_computation() -> None:
    model, images = tiny("pixel"), some_images()
    shown = reconstruct_images(model, images, 0.75)
    hidden = removed_pixels(mask_of(3, 6)).expand(-1, 3, -1, -1)
    mse = float((shown.pasted - images / 255)[hidden].square().mean())
    assert shown.mse == pytest.approx(mse, rel=1e-5) and shown.psnr == pytest.approx(-10 * math.log10(mse), rel=1e-5)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.mean, model.std))
    with torch.no_grad():
        out = model.eval()((images / 255 - mean) / std, 0.75, noise=mask_noise(0, 3, 24))
    assert shown.loss == pytest.approx(float(out.loss), rel=1e-5)


def test_many_images_in_parts_equal_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = tiny(), some_images(count=5)
    whole = reconstruct_images(model, images, 0.75)
    monkeypatch.setattr("maekit.report.reconstruction.CHUNK_PIXELS", 2 * 16 * 24)
    parts = reconstruct_images(model, images, 0.75)
    torch.testing.assert_close(parts.pasted, whole.pasted)
    assert parts.mse == pytest.approx(whole.mse, rel=1e-5) and parts.loss == pytest.approx(whole.loss, rel=1e-5)


def test_floats_and_bytes_of_the_same_image_give_the_same_views() -> None:
    images = some_images()
    one, other = (reconstruct_images(tiny(), x, 0.5) for x in (images, images / 255))
    torch.testing.assert_close(one.pasted, other.pasted)


def test_float_arrays_beyond_0_and_1_are_shown_over_their_own_range() -> None:
    images = some_images() / 255 * 9 - 4
    shown = reconstruct_images(tiny("pixel"), images, 0.5)
    torch.testing.assert_close(shown.original, (images - images.min()) / (images.max() - images.min()))


def test_the_mode_of_the_model_is_left_as_found_and_no_gradient_stays() -> None:
    model = tiny().train()
    shown = reconstruct_images(model, some_images(), 0.5)
    assert model.training and not shown.pasted.requires_grad


def test_a_leaking_view_is_labelled_as_leaking_and_stays_out_of_the_combined_picture() -> None:
    shown = reconstruct_images(tiny(), some_images(), 0.75)
    assert LEAK == "uses the true patch mean/variance: leaks"
    assert any("true" in note or "own mean" in note for note in ratio_notes(shown))
    assert len(combined_notes([shown])) == 2
    red = np.asarray(ratio_figure(shown)).astype(int)
    assert (red == (176, 32, 32)).all(-1).any()
    plain = np.asarray(combined_figure([shown])).astype(int)
    assert not (plain[:40] == (176, 32, 32)).all(-1).any()


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_number_of_channels_is_drawn_and_said(channels: int) -> None:
    shown = reconstruct_images(tiny("norm_pixel", channels), some_images(channels), 0.75)
    assert ratio_figure(shown, ["a", "b", "c"]).width > 300
    assert any("channels" in note for note in combined_notes([shown])) == (channels != 1)


def test_one_call_draws_all_ratios_and_equal_seeds_give_equal_pictures() -> None:
    model, images = tiny(), some_images()
    first = reconstruction_figure(model, images, [0.5, 0.75], seed=3)
    assert first.tobytes() == reconstruction_figure(model, images, [0.5, 0.75], seed=3).tobytes()
    assert first.tobytes() != reconstruction_figure(model, images, [0.5, 0.75], seed=4).tobytes()
    assert reconstruction_figure(model, images).width < first.width


@pytest.mark.parametrize("ratios", [[0.75], [100.0], [-5.0], [99.0], []])
def test_ratios_that_keep_none_or_all_or_are_no_per_cents_are_refused(ratios: list[float]) -> None:
    with pytest.raises(MaekitError, match=r"E-CONFIG-MASK.*ratios"):
        check_ratios(ratios, tiny())


def test_ratios_are_taken_once_each_as_shares() -> None:
    assert check_ratios([75, 62.5, 75], tiny()) == [0.75, 0.625]
