"""Corruption errors against tables worked out by hand and the paper's own printed numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maekit.scores.corruption import (
    ALEXNET,
    ALEXNET_CLEAN,
    EXTRA,
    KINDS,
    SEVERITIES,
    STANDARD,
    Corruption,
    corruption_errors,
    mean_corruption,
)

TOY = {("fog", 1): 0.2, ("fog", 2): 0.4, ("snow", 1): 0.5, ("snow", 2): 0.7, ("spatter", 1): 0.9, ("spatter", 2): 0.9}
REFERENCE = {("fog", 1): 0.4, ("fog", 2): 0.8, ("snow", 1): 0.6, ("snow", 2): 1.0}


def test_mce_of_a_toy_table_is_the_one_by_hand() -> None:
    found = corruption_errors(TOY, 0.1, REFERENCE, 0.3)
    # fog: (.2 + .4) / (.4 + .8) = .5; relative (.1 + .3) / (.1 + .5) = 2/3
    assert found["fog"] == Corruption(pytest.approx(0.3), pytest.approx(0.5), pytest.approx(2 / 3))  # type: ignore[arg-type]
    # snow: 1.2 / 1.6 = .75; relative (.4 + .6) / (.3 + .7) = 1
    assert found["snow"] == Corruption(pytest.approx(0.6), pytest.approx(0.75), pytest.approx(1.0))  # type: ignore[arg-type]
    assert found["spatter"] == Corruption(pytest.approx(0.9))  # type: ignore[arg-type]
    mean = mean_corruption(found, ("fog", "snow"))
    assert mean is not None and mean.error == pytest.approx(0.45)
    assert mean.ce == pytest.approx(0.625) and mean.relative == pytest.approx(5 / 6)


def test_the_sum_over_severities_is_divided_and_not_each_severity() -> None:
    found = corruption_errors({("fog", 1): 0.1, ("fog", 2): 0.8}, None, {("fog", 1): 0.1, ("fog", 2): 0.9})
    assert found["fog"].ce == pytest.approx(0.9) != pytest.approx((1 + 0.8 / 0.9) / 2)


def test_extra_kinds_never_enter_the_mean() -> None:
    errors = {(kind, s): 0.3 if kind in STANDARD else 0.9 for kind in KINDS for s in SEVERITIES}
    found = corruption_errors(errors, 0.2, ALEXNET, ALEXNET_CLEAN)
    mean, extra = mean_corruption(found), mean_corruption(found, EXTRA)
    assert mean is not None and mean.error == pytest.approx(0.3)
    assert extra is not None and extra.error == pytest.approx(0.9) and extra.ce is None
    assert len(STANDARD) == 15 and len(EXTRA) == 4 and list(found) == list(KINDS)


def test_a_mean_over_some_of_the_standard_kinds_is_no_mce() -> None:
    assert mean_corruption(corruption_errors(TOY)) is None


def test_alexnet_against_itself_is_one_and_its_errors_are_the_papers() -> None:
    found = corruption_errors(ALEXNET, ALEXNET_CLEAN, ALEXNET, ALEXNET_CLEAN)
    mean = mean_corruption(found)
    assert mean is not None and mean.ce == pytest.approx(1.0) and mean.relative == pytest.approx(1.0)
    means = {  # as those who report mCE have them, to six digits
        "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
        "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
        "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056,
        "pixelate": 0.717840, "jpeg_compression": 0.606500,
    }  # fmt: skip
    assert {kind: round(one.error, 6) for kind, one in found.items()} == means


def test_resnet_50_of_the_literature_has_its_published_mce() -> None:
    """Top-1 accuracies of torchvision's ResNet-50 and the CE printed beside them by a third party."""
    top1_and_ce = {"brightness": (68.02, 56.64), "contrast": (39.06, 71.43), "defocus_blur": (38.75, 74.71)}
    errors = {(kind, s): 1 - top1 / 100 for kind, (top1, _) in top1_and_ce.items() for s in SEVERITIES}
    found = corruption_errors(errors, None, ALEXNET)
    for kind, (_, printed) in top1_and_ce.items():
        assert found[kind].ce == pytest.approx(printed / 100, abs=1e-4)


def test_a_reference_without_errors_or_without_a_severity_gives_no_ratio() -> None:
    assert corruption_errors({("fog", 1): 0.5}, None, {("fog", 1): 0.0})["fog"].ce is None
    assert corruption_errors({("fog", 1): 0.5, ("fog", 5): 0.5}, None, {("fog", 1): 0.3})["fog"].ce is None
    assert corruption_errors({("fog", 1): 0.5}, 0.1, {("fog", 1): 0.3}, 0.3)["fog"].relative is None


@given(st.lists(st.floats(0.01, 1), min_size=5, max_size=5), st.floats(0.1, 3))
def test_ce_is_proportional_to_the_errors(values: list[float], factor: float) -> None:
    errors = {("fog", s): value for s, value in enumerate(values, 1)}
    once, more = (corruption_errors({c: f * e for c, e in errors.items()}, None, ALEXNET)["fog"] for f in (1, factor))
    assert once.ce is not None and more.ce == pytest.approx(factor * once.ce)
