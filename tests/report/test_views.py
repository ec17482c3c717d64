import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maekit.model.patches import patchify
from maekit.model.targets import target_of
from maekit.report import views

GRID = (3, 4)


def some(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches (2, 12, 12) of 2 x 2 pixels and 3 channels, and a mask that removes 8 of 12."""
    generator = torch.Generator().manual_seed(seed)
    patches = patchify(torch.rand(2, 3, 6, 8, generator=generator), 2)
    order = torch.rand(2, 12, generator=generator).argsort(1).argsort(1)
    return patches, order >= 4


def test_true_statistics_undo_the_normalised_target_exactly() -> None:
    patches, _ = some()
    target = target_of(patches, "norm_pixel")
    torch.testing.assert_close(views.denormalise(target, views.patch_statistics(patches)), patches)


@given(st.integers(0, 50), st.floats(-1e6, 1e6))
def test_the_neighbours_view_never_reads_a_removed_pixel(seed: int, poison: float) -> None:
    patches, mask = some(seed)
    changed = torch.where(mask[..., None], poison, patches)
    for before, after in zip(
        views.neighbour_statistics(patches, mask, GRID), views.neighbour_statistics(changed, mask, GRID), strict=True
    ):
        assert torch.equal(before, after)
    filled = [views.neighbour_fill(p, mask, GRID, 3)[mask] for p in (patches, changed)]
    assert torch.equal(*filled)


def test_even_a_removed_nan_does_not_reach_the_neighbours_view() -> None:
    patches, mask = some()
    poisoned = patches.masked_fill(mask[..., None], math.nan)
    for statistic in views.neighbour_statistics(poisoned, mask, GRID):
        assert statistic.isfinite().all()


def test_the_true_statistics_do_read_removed_pixels() -> None:
    patches, mask = some()
    changed = torch.where(mask[..., None], patches + 1, patches)
    assert not torch.equal(views.patch_statistics(patches)[0][mask], views.patch_statistics(changed)[0][mask])


def test_visible_patches_keep_their_own_statistics() -> None:
    patches, mask = some()
    for guessed, true in zip(
        views.neighbour_statistics(patches, mask, GRID), views.patch_statistics(patches), strict=True
    ):
        torch.testing.assert_close(guessed[~mask], true[~mask])


def test_weights_sum_to_one_take_nothing_from_removed_patches_and_most_from_the_nearest() -> None:
    mask = torch.tensor([[False, True, True, True, True, False]])
    weights = views.neighbour_weights(mask, (1, 6))[0]
    torch.testing.assert_close(weights.sum(1), torch.ones(6))
    assert (weights[:, 1:5] == 0).all()
    # distances 1 and 4: 1 / 1 against 1 / 64
    torch.testing.assert_close(weights[1], torch.tensor([64 / 65, 0, 0, 0, 0, 1 / 65]))
    torch.testing.assert_close(weights[0], torch.eye(6)[0])


def test_weights_equal_a_slow_reference_by_coordinates() -> None:
    _, mask = some(3)
    fast = views.neighbour_weights(mask, GRID)
    for image in range(2):
        for i in range(12):
            if not mask[image, i]:
                continue
            raw = [0.0 if mask[image, j] else 1 / math.dist((i // 4, i % 4), (j // 4, j % 4)) ** 3 for j in range(12)]
            expected = torch.tensor([value / sum(raw) for value in raw])
            torch.testing.assert_close(fast[image, i], expected)


def test_pasting_keeps_visible_pixels_bit_for_bit_and_takes_removed_ones_from_the_prediction() -> None:
    patches, mask = some()
    pred = torch.rand_like(patches) + 2
    pasted = views.paste(pred, patches, mask)
    assert torch.equal(pasted[~mask], patches[~mask]) and torch.equal(pasted[mask], pred[mask])
    hidden = views.hide(patches, mask)
    assert torch.equal(hidden[~mask], patches[~mask]) and (hidden[mask] == views.GREY).all()


def test_the_raw_view_shows_zero_as_mid_grey_and_three_deviations_as_black_and_white() -> None:
    assert views.raw(torch.tensor([-3.0, 0.0, 3.0])).tolist() == [0.0, 0.5, 1.0]


def test_channel_statistics_are_undone_per_channel() -> None:
    images = torch.rand(2, 3, 6, 8)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    normalised = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(views.to_pixels(patchify(normalised, 2), mean, std), patchify(images, 2))


def test_errors_count_removed_pixels_only() -> None:
    patches, mask = some()
    pred = torch.where(mask[..., None], patches + 0.1, patches + 5)
    mse = float(views.masked_mse(pred, patches, mask))
    assert mse == pytest.approx(0.01, rel=1e-4)
    assert views.psnr(mse) == pytest.approx(20, abs=1e-2)
    assert views.psnr(0.0) == pytest.approx(100)
