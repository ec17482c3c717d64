"""Intervals are those of scipy, and hold the truth as often as they say."""

import pytest
import torch
from scipy import stats

from maekit.scores.spread import mean_and_interval, student


@pytest.mark.parametrize("freedom", [1, 2, 3, 9, 19, 99, 999])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_the_quantile_is_that_of_scipy(level: float, freedom: int) -> None:
    assert student(level, freedom) == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=1e-9)


def test_the_interval_is_that_of_scipy_and_one_draw_has_none() -> None:
    values = [0.61, 0.58, 0.66, 0.57]
    mean, half = mean_and_interval(values)
    low, high = stats.t.interval(0.95, 3, loc=mean, scale=stats.sem(values))
    assert half is not None and (mean - half, mean + half) == pytest.approx((low, high))
    assert mean_and_interval([0.5]) == (0.5, None)


def test_nineteen_of_twenty_intervals_hold_the_true_mean() -> None:
    draws = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0)) + 3
    found = [mean_and_interval(row) for row in draws.tolist()]
    inside = sum(abs(mean - 3) <= (half or 0) for mean, half in found) / len(found)
    assert inside == pytest.approx(0.95, abs=0.015)
