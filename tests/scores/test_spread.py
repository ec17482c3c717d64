"""Intervals are those of scipy, and hold the truth as often as they say."""

import numpy as np
import pytest
import torch
from scipy import stats

from maekit.scores.spread import bootstrapped, mean_and_interval, paired_over_seeds, student


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


def test_a_difference_over_seeds_is_the_paired_t_test_of_scipy() -> None:
    first, second = [0.66, 0.68, 0.65, 0.70], [0.59, 0.64, 0.60, 0.61]
    found, oracle = paired_over_seeds(first, second), stats.ttest_rel(first, second)
    interval = oracle.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p == pytest.approx(oracle.pvalue, rel=1e-6) and (found.paired, found.pairs) == ("seeds", 4)


@pytest.mark.parametrize("second", [[0.4, 0.5, 0.6], [0.5, 0.6, 0.7]])
def test_differences_that_are_all_the_same_say_nothing_of_chance(second: list[float]) -> None:
    found = paired_over_seeds([0.5, 0.6, 0.7], second)
    assert found.mean == pytest.approx(0.5 - second[0]) and (found.low, found.p, found.pairs) == (None, None, 3)


def test_images_drawn_anew_give_the_interval_of_scipys_bootstrap_and_mcnemars_test() -> None:
    generator = torch.Generator().manual_seed(1)
    first = (torch.rand(400, generator=generator) < 0.7).tolist()
    changed = (torch.rand(400, generator=generator) < 0.2).tolist()
    second = [one != other for one, other in zip(first, changed, strict=True)]
    found = bootstrapped(first, second)
    difference = np.array(first, float) - np.array(second, float)
    oracle = stats.bootstrap((difference,), np.mean, method="percentile", rng=np.random.default_rng(0))
    interval = oracle.confidence_interval
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.004)
    won, lost = int((difference > 0).sum()), int((difference < 0).sum())
    assert found.mean == pytest.approx(difference.mean())
    assert found.p == pytest.approx(stats.binomtest(won, won + lost).pvalue, rel=1e-9)
    assert bootstrapped(first, first).p == 1 and bootstrapped(first, first).low == 0
