"""Every kind of mask has the exact count, lies where it says, and depends on the noise of its own image alone."""

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from maekit.errors import MaekitError
from maekit.model.mask_kinds import ASPECTS, ROUNDS, SMALLEST, divisors, draw_blocks
from maekit.model.masking import (
    KINDS,
    check_masking,
    draw_masking,
    grid_ratios,
    len_keep,
    random_masking,
    ratio_of_step,
)

GRID = (14, 14)
SIDES = st.tuples(st.integers(1, 16), st.integers(1, 16)).filter(lambda grid: grid != (1, 1))


def noise_of(images: int, grid: tuple[int, int] = GRID, seed: int = 0) -> Tensor:
    return torch.rand(images, grid[0] * grid[1], generator=torch.Generator().manual_seed(seed))


def masks(kind: str, noise: Tensor, grid: tuple[int, int], ratio: float, unit: int = 1) -> Tensor:
    """Return (B, rows, columns), True = removed; scores, where needed, are made of the noise."""
    scores = noise.cos().mul(7).floor() if kind == "given" else None
    return draw_masking(kind, noise, grid, ratio, unit, scores).mask.view(-1, *grid)


@given(st.sampled_from(KINDS), SIDES, st.floats(0.01, 0.99), st.data())
@settings(max_examples=150, deadline=None)
def test_every_kind_removes_the_exact_number_in_whole_units(
    kind: str, grid: tuple[int, int], ratio: float, data: st.DataObject
) -> None:
    unit = data.draw(st.sampled_from([side for side in divisors(grid) if grid != (side, side)]))
    units = (grid[0] // unit, grid[1] // unit)
    if kind == "grid":
        assume(grid_ratios(units))
        ratio = data.draw(st.sampled_from(grid_ratios(units)))
    count = units[0] * units[1]
    assume(0 < int(count * (1 - ratio) + 1e-6) < count)
    noise = noise_of(3, grid, data.draw(st.integers(0, 999)))
    scores = noise.square() if kind == "given" else None
    check_masking(kind, grid, ratio, unit)
    chosen = draw_masking(kind, noise, grid, ratio, unit, scores)
    assert chosen.num_keep == len_keep(count, ratio) * unit**2
    assert (chosen.mask.sum(1) == noise.shape[1] - chosen.num_keep).all()
    assert torch.equal(chosen.ids_shuffle.sort(1).values, torch.arange(noise.shape[1]).expand(3, -1))
    whole = chosen.mask.view(3, units[0], unit, units[1], unit)
    assert torch.equal(whole, whole[:, :, :1, :, :1].expand_as(whole))


def test_random_masks_are_those_of_the_noise_as_before() -> None:
    noise = noise_of(4)
    assert torch.equal(draw_masking("random", noise, GRID, 0.75).ids_shuffle, random_masking(noise, 49).ids_shuffle)


@pytest.mark.parametrize(("kind", "ratio"), [(kind, 0.5 if kind == "grid" else 0.6) for kind in KINDS])
@pytest.mark.parametrize("unit", [1, 2])
def test_a_mask_is_a_function_of_its_own_row_of_noise(kind: str, ratio: float, unit: int) -> None:
    grid, noise = (6, 8), noise_of(9, (6, 8))
    whole, before = masks(kind, noise, grid, ratio, unit), torch.get_rng_state()
    chosen = torch.tensor([7, 2, 2])
    assert torch.equal(masks(kind, noise[chosen], grid, ratio, unit), whole[chosen])
    other = noise.clone()
    other[4] = noise_of(1, grid, seed=5)
    assert torch.equal(masks(kind, other, grid, ratio, unit)[[0, 3, 5, 8]], whole[[0, 3, 5, 8]])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "centre"])
def test_images_get_different_masks(kind: str) -> None:
    assert len(torch.unique(masks(kind, noise_of(20), GRID, 0.75), dim=0)) > 3


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_drawn_in_one_graph_without_waiting_for_the_device(kind: str) -> None:
    noise = noise_of(2)
    scores = noise.square() if kind == "given" else None

    def draw(noise: Tensor) -> Tensor:
        return draw_masking(kind, noise, GRID, 0.75, 2 if kind == "block" else 1, scores).mask

    assert torch.equal(torch.compile(draw, fullgraph=True, backend="eager")(noise), draw(noise))


# ---- blocks


@given(SIDES, st.integers(0, 10_000), st.data())
@settings(max_examples=100, deadline=None)
def test_blocks_lie_inside_the_grid_and_cover_what_they_say(
    grid: tuple[int, int], seed: int, data: st.DataObject
) -> None:
    count = grid[0] * grid[1]
    removed = data.draw(st.integers(1, count - 1))
    blocks, covered = draw_blocks(noise_of(4, grid, seed), grid, removed)
    assert 1 <= blocks.shape[1] <= ROUNDS
    for image, by_hand in zip(blocks.tolist(), covered.view(4, *grid), strict=True):
        seen = torch.zeros(grid, dtype=torch.bool)
        for top, left, height, width in image:
            missing = removed - int(seen.sum())
            assert top >= 0 and left >= 0 and top + height <= grid[0] and left + width <= grid[1]
            assert height * width <= missing
            if missing:
                assert height >= 1 and width >= 1
                before = int(seen.sum())
                seen[top : top + height, left : left + width] = True
                assert int(seen.sum()) > before, "every block covers something new"
            else:
                assert (top, left, height, width) == (0, 0, 0, 0)
        assert torch.equal(seen, by_hand)


def test_blocks_have_the_areas_and_aspects_of_beit() -> None:
    removed, smallest = 75, SMALLEST * 196
    assert round(smallest) == 16
    blocks, _ = draw_blocks(noise_of(4000, seed=1), GRID, removed)
    _, _, height, width = blocks[:, 0].unbind(1)
    # sides are rounded to whole patches: half a patch either way
    assert ((height + 0.5) / (width - 0.5) >= ASPECTS[0]).all()
    assert ((height - 0.5) / (width + 0.5) <= ASPECTS[1]).all()
    assert ((height + 0.5) * (width + 0.5) >= smallest).all()
    assert (height * width <= removed).all()
    area = (height * width).double()
    assert abs(float(area.mean()) - (smallest + removed) / 2) < 1.5
    assert float(area.min()) <= 18 and float(area.max()) >= 72
    stretch = (height / width).log()
    assert abs(float(stretch.mean())) < 0.06, "as often flat as tall"


def test_the_first_block_lies_anywhere_with_equal_chance() -> None:
    blocks, _ = draw_blocks(noise_of(40_000, (8, 8), seed=2), (8, 8), 32)
    top, left, height, width = blocks[:, 0].unbind(1)
    for at, side in ((top, height), (left, width)):
        chosen = at[side == 4]
        places = torch.bincount(chosen, minlength=5).double()
        expected = len(chosen) / 5
        chi = float(((places - expected) ** 2 / expected).sum())
        assert chi < 18.5, (chi, places)  # 0.1 % point at 4 degrees of freedom
    square = (height == 4) & (width == 4)
    assert abs(float(torch.corrcoef(torch.stack([top[square], left[square]]).double())[0, 1])) < 0.06


def test_blocks_hide_the_middle_more_often_than_the_edge_and_no_side_more_than_its_opposite() -> None:
    """As any rectangle inside the image does; nothing but the grid's own symmetry can be expected."""
    often = masks("block", noise_of(20_000, (8, 8), seed=3), (8, 8), 0.5).double().mean(0)
    assert 0.49 < float(often.mean()) < 0.51
    assert float(often[0, 0]) < 0.25 < 0.7 < float(often[3:5, 3:5].min())
    for turned in (often.flip(0), often.flip(1), often.T):
        torch.testing.assert_close(often, turned, rtol=0, atol=0.02)  # 4 sigma of a difference: 0.02


def test_blocks_are_seldom_filled_up_with_single_patches() -> None:
    for ratio, most in ((0.5, 0.001), (0.75, 0.006), (0.9, 0.15)):
        removed = 196 - len_keep(196, ratio)
        _, covered = draw_blocks(noise_of(4000, seed=4), GRID, removed)
        assert float((covered.sum(1) < removed).double().mean()) <= most, ratio


def test_blocks_are_less_scattered_than_random_masks() -> None:
    def edges(mask: Tensor) -> float:
        return float((mask[:, 1:] != mask[:, :-1]).double().mean())

    noise = noise_of(500)
    assert edges(masks("block", noise, GRID, 0.75)) < 0.4 * edges(masks("random", noise, GRID, 0.75))


# ---- regular patterns


def test_at_75_percent_one_of_every_2_x_2_is_kept_the_same_one_and_each_in_its_turn() -> None:
    removed = masks("grid", noise_of(4000, (6, 8)), (6, 8), 0.75)
    kept = (~removed).view(-1, 3, 2, 4, 2)
    assert (kept.sum((2, 4)) == 1).all()
    assert torch.equal(kept, kept[:, :1, :, :1].expand_as(kept))
    often = kept[:, 0, :, 0].double().mean(0)
    torch.testing.assert_close(often, torch.full_like(often, 0.25), rtol=0, atol=0.03)  # 4 sigma


@pytest.mark.parametrize(("grid", "side"), [((6, 9), 3), ((14, 14), 7), ((4, 8), 4)])
def test_k_x_k_keeps_or_removes_one(grid: tuple[int, int], side: int) -> None:
    few, many = (r for r in grid_ratios(grid) if round(abs(r - 0.5) * grid[0] * grid[1]) == _off_half(grid, side))
    for ratio, wanted in ((few, 1), (many, side**2 - 1)):
        removed = masks("grid", noise_of(5, grid), grid, ratio)
        assert (removed.view(5, grid[0] // side, side, grid[1] // side, side).sum((2, 4)) == wanted).all()


def _off_half(grid: tuple[int, int], side: int) -> int:
    count = grid[0] * grid[1]
    return round(count / 2 - count / side**2)


@pytest.mark.parametrize("grid", [(14, 14), (3, 8), (7, 10)])
def test_half_is_a_chessboard_of_either_colour(grid: tuple[int, int]) -> None:
    removed = masks("grid", noise_of(40, grid), grid, 0.5)
    assert (removed[:, 1:] != removed[:, :-1]).all()
    assert (removed[:, :, 1:] != removed[:, :, :-1]).all()
    assert 5 < int(removed[:, 0, 0].sum()) < 35


def test_the_ratios_of_a_grid_are_those_that_can_be_asked_for() -> None:
    assert grid_ratios((14, 14)) == [0.005, 0.02, 0.25, 0.5, 0.75, 0.979, 0.99]
    assert grid_ratios((3, 7)) == []
    for grid in ((14, 14), (12, 12), (6, 9), (28, 28), (2, 2)):
        for ratio in grid_ratios(grid):
            check_masking("grid", grid, ratio)


# ---- one block in the middle, and given masks


@pytest.mark.parametrize(
    ("grid", "ratio", "shape"), [((14, 14), 0.25, (7, 7)), ((8, 8), 0.25, (4, 4)), ((8, 16), 0.25, (4, 8))]
)
def test_the_centre_is_one_rectangle_of_the_image_s_shape_in_the_middle(
    grid: tuple[int, int], ratio: float, shape: tuple[int, int]
) -> None:
    for removed in masks("centre", noise_of(10, grid), grid, ratio):
        rows, columns = removed.any(1).nonzero().flatten(), removed.any(0).nonzero().flatten()
        assert (len(rows), len(columns)) == shape
        assert abs(float(rows.double().mean()) - (grid[0] - 1) / 2) <= 0.5
        assert abs(float(columns.double().mean()) - (grid[1] - 1) / 2) <= 0.5


def test_a_centre_of_any_ratio_is_whole_but_for_its_rim() -> None:
    for removed in masks("centre", noise_of(20), GRID, 0.4):
        rows, columns = removed.any(1).nonzero().flatten(), removed.any(0).nonzero().flatten()
        assert removed[rows[1] : rows[-1], columns[1] : columns[-1]].all()


def test_given_masks_remove_the_highest_scores_and_the_noise_decides_between_equal_ones() -> None:
    noise = torch.tensor([[0.1, 0.2, 0.9, 0.8, 0.3, 0.4]])
    scores = torch.tensor([[5.0, -1.0, 2.0, 2.0, 2.0, -1e30]])
    chosen = draw_masking("given", noise, (2, 3), 0.5, scores=scores)
    assert chosen.ids_shuffle.tolist() == [[5, 1, 4, 3, 2, 0]]
    assert chosen.mask.tolist() == [[True, False, True, True, False, False]]


def test_the_score_of_a_unit_is_the_mean_of_its_patches() -> None:
    scores = torch.zeros(1, 4, 4)
    scores[0, 0, 3] = 3.0
    scores[0, 2:, :2] = 1.0
    chosen = draw_masking("given", noise_of(1, (4, 4)), (4, 4), 0.25, 2, scores.flatten(1))
    assert chosen.mask.view(4, 4).nonzero().tolist() == [[2, 0], [2, 1], [3, 0], [3, 1]]


# ---- refusals, and the ratio of a step


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("grid", (14, 14), 0.6), "0.6 of 14 x 14 patches, expected .* 0.25, 0.5, 0.75, .* Try: --mask-ratio 0.5"),
        (("grid", (14, 14), 0.75, 2), "0.75 of 7 x 7 units.* Try: --mask-ratio 0.97"),
        (("grid", (7, 5), 0.75), "this grid has none. Try: another mask_kind"),
        (("random", (14, 14), 0.75, 3), "mask_unit: found 3 on 14 x 14 patches.* Try: --mask-unit 1 or 2 or 7"),
        (("block", (14, 14), 0.75, 14), "leaves more than one unit"),
        (("block", (14, 14), 0.75, 0), "mask_unit: found 0"),
        (("random", (14, 14), 0.9, 7), "keeps no patch"),
        (("blocks", (14, 14), 0.75), "mask_kind: found blocks, expected random, block, grid, centre, given"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(map(str, value)),
)
def test_what_cannot_be_drawn_is_refused_in_one_line(arguments: tuple[Any, ...], said: str) -> None:
    with pytest.raises(MaekitError, match=said) as caught:
        check_masking(*arguments)
    kind, grid, *rest = arguments
    with pytest.raises(MaekitError, match=said):
        draw_masking(kind, noise_of(2, grid), grid, *rest)
    assert caught.value.code == "E-CONFIG-MASK"
    assert "\n" not in str(caught.value)


def test_scores_belong_to_given_masks_and_have_their_shape() -> None:
    noise = noise_of(2, (4, 4))
    for kind, scores in (("given", None), ("given", torch.zeros(2, 9)), ("random", torch.zeros(2, 16))):
        with pytest.raises(MaekitError, match="argument scores") as caught:
            draw_masking(kind, noise, (4, 4), 0.75, scores=scores)
        assert caught.value.code == "E-CONFIG-MASK"


def test_the_ratio_of_a_step_is_uniform_in_its_range_and_a_function_of_seed_and_step() -> None:
    drawn = [ratio_of_step(0.5, 0.9, seed, step) for seed in (0, 1) for step in range(2000)]
    random.seed(1)
    torch.manual_seed(1)
    assert drawn[:5] == [ratio_of_step(0.5, 0.9, 0, step) for step in range(5)]
    assert drawn[:2000] != drawn[2000:]
    assert all(0.5 <= ratio < 0.9 for ratio in drawn)
    ordered = sorted(drawn)
    gap = max(abs((ratio - 0.5) / 0.4 - place / len(ordered)) for place, ratio in enumerate(ordered))
    assert gap < 1.95 / math.sqrt(len(ordered))  # Kolmogorov-Smirnov, 0.1 % point
    assert ratio_of_step(0.7, 0.7, 3, 4) == 0.7
