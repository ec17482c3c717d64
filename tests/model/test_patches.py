"""Patches and positions keep their places."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed

from maekit.model.patches import patchify, resample_positions, sincos_2d, unpatchify

from .conftest import Build
from .reference import flatten_patches


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_patchify_and_unpatchify_are_inverse_and_agree_with_the_loops(
    b: int, c: int, rows: int, columns: int, patch: int
) -> None:
    images = torch.arange(b * c * rows * columns * patch**2).reshape(b, c, rows * patch, columns * patch)
    patches = patchify(images, patch)
    assert patches.shape == (b, rows * columns, patch * patch * c)
    assert torch.equal(patches, flatten_patches(images, patch))
    assert torch.equal(unpatchify(patches, patch, (rows, columns)), images)


def test_trap_4_inside_a_patch_the_channel_is_fastest_then_the_column_then_the_row() -> None:
    images = torch.arange(3 * 4 * 4).reshape(1, 3, 4, 4)
    assert patchify(images, 2)[0, 0].tolist() == [0, 16, 32, 1, 17, 33, 4, 20, 36, 5, 21, 37]


def test_trap_4_patches_go_row_by_row_through_the_image() -> None:
    images = torch.arange(6).reshape(1, 1, 2, 3).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert patchify(images, 2)[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_trap_6_the_width_comes_first() -> None:
    table = sincos_2d(16, (3, 5)).reshape(3, 5, 16)
    assert torch.equal(table[0, :, :8], table[2, :, :8])  # first half: the same in every row
    assert torch.equal(table[:, 0, 8:], table[:, 4, 8:])  # second half: the same in every column
    assert not torch.equal(table[0, 0, :8], table[0, 1, :8])


@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_trap_6_every_number_of_the_table_is_sin_or_cos_of_position_over_a_power_of_10000(
    quarter: int, rows: int, columns: int
) -> None:
    table = sincos_2d(4 * quarter, (rows, columns), prefix=1)
    assert table.shape == (1 + rows * columns, 4 * quarter)
    assert table.dtype == torch.float32
    assert not table[0].any()
    expected = [
        [f(p / 10000 ** (i / quarter)) for p in (x, y) for f in (math.sin, math.cos) for i in range(quarter)]
        for y in range(rows)
        for x in range(columns)
    ]
    torch.testing.assert_close(table[1:], torch.tensor(expected), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("dim", "grid"), [(64, (14, 14)), (32, (3, 7)), (512, (16, 16))])
def test_trap_6_it_is_the_official_table_by_its_known_relation_to_timms(dim: int, grid: tuple[int, int]) -> None:
    timms = build_sincos2d_pos_embed(list(grid), dim).view(-1, 4, dim // 4)
    # timm: [sin row, sin column, cos row, cos column] in some order; the official one is this order of quarters
    torch.testing.assert_close(sincos_2d(dim, grid), timms[:, [1, 3, 0, 2]].reshape(-1, dim), rtol=0, atol=2e-6)


def test_trap_6_the_other_table_in_circulation_differs_by_a_quarter() -> None:
    dim, side = 64, 14
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4 - 1))  # MoCo v3, big_vision
    angle = torch.arange(side, dtype=torch.float64)[:, None] * omega
    ours = sincos_2d(dim, (1, side))[:, : dim // 2].double()
    gap = (ours - torch.cat([angle.sin(), angle.cos()], 1)).abs().max()
    assert 0.2 < gap < 0.3, gap


def test_trap_7_both_tables_are_frozen_parameters_of_the_state(build: Build, kind: str) -> None:
    model = build(kind)
    parameters = dict(model.named_parameters())
    for name in ("encoder.pos_embed", "decoder.pos_embed"):
        assert not parameters[name].requires_grad
        assert name in model.state_dict()
    prefix = model.encoder.num_prefix_tokens
    assert torch.equal(parameters["decoder.pos_embed"][0], sincos_2d(16, model.grid, prefix))
    inside = 0 if model.encoder.no_embed_class else prefix
    assert torch.equal(parameters["encoder.pos_embed"][0], sincos_2d(24, model.grid, inside))
    assert not parameters["decoder.pos_embed"][0, :prefix].any()


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_positions_are_resampled_as_by_timm_and_the_prefix_stays(prefix: int) -> None:
    """Oracle: timm's resample_abs_pos_embed, which is the official bicubic rule when it does not antialias."""
    table = torch.randn(1, prefix + 4 * 6, 8)
    ours = resample_positions(table, (4, 6), (7, 5))
    theirs = resample_abs_pos_embed(table, [7, 5], [4, 6], num_prefix_tokens=prefix, antialias=False)
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(ours[:, :prefix], table[:, :prefix])
    torch.testing.assert_close(resample_positions(table, (4, 6), (4, 6)), table)
