"""Masks are fair, exact and reproducible."""

import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maekit.errors import MaekitError
from maekit.model import masking
from maekit.model.masking import given_masking, len_keep, random_masking

from .conftest import Build


def test_the_worked_example_of_the_field_runs_as_written() -> None:
    outcome = doctest.testmod(masking)
    assert outcome.attempted >= 3
    assert outcome.failed == 0


def test_worked_example_of_the_field() -> None:
    chosen = random_masking(torch.tensor([[0.6, 0.9, 0.4, 0.7, 0.8]]), keep=3)
    assert chosen.ids_shuffle.tolist() == [[2, 0, 3, 4, 1]]
    assert chosen.ids_restore.tolist() == [[1, 4, 0, 2, 3]]


@pytest.mark.parametrize(
    ("patches", "ratio", "keep"),
    [(100, 0.9, 10), (400, 0.8, 80), (196, 0.75, 49), (64, 0.75, 16), (256, 0.75, 64), (196, 0.2, 156), (196, 0.95, 9)],
)
def test_trap_1_the_number_kept_is_free_of_float_dust(patches: int, ratio: float, keep: int) -> None:
    assert len_keep(patches, ratio) == keep


def test_trap_1_otherwise_the_official_truncation_holds_and_not_rounding() -> None:
    for ratio in (0.2, 0.4, 0.7, 0.9, 0.95):
        assert len_keep(196, ratio) == int(196 * (1 - ratio)) != round(196 * (1 - ratio))


@given(st.integers(2, 4096), st.integers(1, 99))
def test_trap_1_the_number_kept_is_the_exact_floor_at_every_whole_percent(patches: int, percent: int) -> None:
    exact = patches * (100 - percent) // 100
    if exact == 0:
        with pytest.raises(MaekitError) as caught:
            len_keep(patches, percent / 100)
        assert caught.value.code == "E-CONFIG-MASK"
    else:
        assert len_keep(patches, percent / 100) == exact


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.999, -0.5, 1.5, float("nan"), float("inf"), float("-inf")])
def test_a_ratio_that_keeps_none_or_all_is_refused(ratio: float) -> None:
    with pytest.raises(MaekitError, match="mask_ratio") as caught:
        len_keep(196, ratio)
    assert caught.value.code == "E-CONFIG-MASK"


@given(st.integers(1, 4), st.integers(2, 60), st.data())
@settings(max_examples=50, deadline=None)
def test_a_masking_is_a_permutation_its_inverse_and_a_mask_of_the_right_count(
    batch: int, n: int, data: st.DataObject
) -> None:
    keep = data.draw(st.integers(1, n - 1))
    seed = data.draw(st.integers(0, 2**31))
    noise = torch.rand(batch, n, generator=torch.Generator().manual_seed(seed))
    chosen = random_masking(noise, keep)
    everything = torch.arange(n).expand(batch, n)
    assert torch.equal(chosen.ids_shuffle.sort(dim=1).values, everything)
    assert torch.equal(chosen.ids_shuffle.gather(1, chosen.ids_restore), everything)
    assert torch.equal(chosen.ids_restore, noise.argsort(1).argsort(1))
    assert chosen.ids_keep.shape == (batch, keep)
    assert chosen.ids_masked.shape == (batch, n - keep)
    assert chosen.mask.dtype == torch.bool
    assert (chosen.mask.sum(1) == n - keep).all()
    assert not chosen.mask.gather(1, chosen.ids_keep).any()
    assert chosen.mask.gather(1, chosen.ids_masked).all()


@given(st.integers(1, 4), st.integers(2, 40), st.data())
@settings(max_examples=50, deadline=None)
def test_a_given_mask_removes_exactly_its_true_patches(batch: int, n: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, n - 1))
    noise = torch.rand(batch, n, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 2**31))))
    mask = random_masking(noise, keep).mask
    chosen = given_masking(mask)
    assert torch.equal(chosen.mask, mask)
    assert chosen.num_keep == keep
    assert torch.equal(chosen.ids_keep, chosen.ids_keep.sort(1).values)


def test_trap_2_true_means_removed_and_the_lowest_noise_stays() -> None:
    chosen = random_masking(torch.tensor([[3.0, 1.0, 2.0]]), keep=1)
    assert chosen.mask.tolist() == [[True, False, True]]


def test_equal_noise_keeps_image_order() -> None:
    assert random_masking(torch.zeros(1, 50), keep=10).ids_keep.tolist() == [list(range(10))]


def test_every_patch_is_removed_equally_often() -> None:
    images, n, keep = 20_000, 16, 4
    noise = torch.rand(images, n, generator=torch.Generator().manual_seed(3))
    removed = random_masking(noise, keep).mask.sum(0).double()
    expected = images * (n - keep) / n
    # without replacement: sum of squares over the variance of one count, times (n-1)/n, is chi-square of n-1
    variance = expected * keep / n
    chi = float(((removed - expected) ** 2 / variance).sum() * (n - 1) / n)
    assert chi < 37.7, chi  # 0.1 % point at 15 degrees of freedom


def test_every_pair_of_patches_is_kept_equally_often() -> None:
    noise = torch.rand(20_000, 8, generator=torch.Generator().manual_seed(4))
    kept = (~random_masking(noise, 4).mask).double()
    together = (kept.T @ kept / len(kept))[~torch.eye(8, dtype=torch.bool)]
    torch.testing.assert_close(together, torch.full_like(together, 3 / 14), rtol=0, atol=0.013)  # 4.5 sigma


def test_trap_3_the_class_token_never_counts(build: Build, kind: str) -> None:
    model = build(kind)
    images = torch.zeros(2, model.encoder.in_chans, *model.img_size)
    out = model(images, 0.7)
    keep = len_keep(model.num_patches, 0.7)
    assert out.mask.shape == (2, model.num_patches)
    assert (out.mask.sum(1) == model.num_patches - keep).all()
    assert out.latent.shape[1] == model.encoder.num_prefix_tokens + keep


@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([[True] * 4 + [False] * 12, [True] * 5 + [False] * 11]),
        torch.ones(2, 16, dtype=torch.bool),
        torch.zeros(2, 16, dtype=torch.bool),
        torch.tensor([[1] * 4 + [0] * 12] * 2),
        torch.tensor([True] * 4 + [False] * 12),
    ],
    ids=["counts differ", "all", "none", "not bool", "one row"],
)
def test_a_mask_that_cannot_be_used_is_refused(build: Build, mask: torch.Tensor) -> None:
    with pytest.raises(MaekitError, match="mask") as caught:
        build()(torch.zeros(2, 3, 32, 32), mask=mask)
    assert caught.value.code == "E-CONFIG-MASK"


def test_noise_and_mask_of_the_wrong_shape_are_refused(build: Build) -> None:
    model = build()
    images, n = torch.zeros(2, 3, 32, 32), model.num_patches
    for shape in ((2, n + 1), (1, n), (n,), (2, n, 1)):
        for given_one in ({"noise": torch.rand(shape)}, {"mask": torch.rand(shape) > 0.5}):
            with pytest.raises(MaekitError, match=r"\(2, 16\)") as caught:
                model(images, **given_one)
            assert caught.value.code == "E-CONFIG-MASK"
    with pytest.raises(MaekitError):
        model.loss(images, torch.rand(2, n + 1))


def test_two_sources_of_a_mask_are_one_too_many(build: Build) -> None:
    model, noise = build(), torch.rand(2, 16)
    with pytest.raises(MaekitError) as caught:
        model(torch.zeros(2, 3, 32, 32), noise=noise, mask=noise > 0.5)
    assert caught.value.code == "E-CONFIG-MASK"


def test_a_generator_beside_noise_or_mask_would_be_ignored_and_is_refused(build: Build) -> None:
    model = build()
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, model.num_patches)
    given = {"noise": noise, "mask": noise > noise.median(dim=1, keepdim=True).values}
    for name, value in given.items():
        with pytest.raises(MaekitError, match=f"argument generator: found {name} as well") as caught:
            model(images, generator=torch.Generator(), **{name: value})
        assert caught.value.code == "E-CONFIG-MASK"


def test_a_generator_alone_decides_the_mask(build: Build) -> None:
    model, images = build(), torch.zeros(2, 3, 32, 32)
    draws = [model(images, generator=torch.Generator().manual_seed(seed)).mask for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    before = torch.get_rng_state()
    model(images, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_images_of_a_batch_get_different_masks(build: Build) -> None:
    assert len(torch.unique(build()(torch.zeros(8, 3, 32, 32)).mask, dim=0)) > 1
