"""How far a mean of few draws can be trusted, and the difference of two."""

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

PIECES = 2000
"""Of Simpson's rule: far more than double precision needs for so smooth a function."""
DRAWS = 10_000
"""Of the bootstrap: the ends of a 95 % interval rest on the 250 outermost each."""


def mean_and_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float | None]:
    """Return the mean of independent draws and half the width of its confidence interval (Student's t).

    The interval is about these draws; it knows nothing of what was the same in all of them, such as the images scored
    on. A single value has none.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    return mean, student(level, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


@functools.cache
def student(level: float, freedom: int) -> float:
    """Return the t within which Student's distribution of so many degrees of freedom has `level` of its mass.

    With x = sqrt(freedom) tan(a) the density becomes cos(a) ** (freedom - 1), integrated and inverted by bisection.
    """
    whole = _mass(math.pi / 2, freedom)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _mass(middle, freedom) < level * whole else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _mass(angle: float, freedom: int) -> float:
    """Integrate cos(a) ** (freedom - 1) from 0 to `angle` by Simpson's rule."""
    values = torch.linspace(0, angle, PIECES + 1, dtype=torch.double).cos().clamp(min=0) ** (freedom - 1)
    return float((values[0] + 4 * values[1:-1:2].sum() + 2 * values[2:-1:2].sum() + values[-1]) * angle / PIECES / 3)


@dataclass(frozen=True)
class Difference:
    """How far one arm is from another, and whether chance could have made it so.

    Attributes:
        mean: of the pairs, first minus second.
        low: lower end of the 95 % confidence interval; None where nothing can be said (one pair, no images).
        high: upper end.
        p: probability of a difference at least so far from zero where there is none, two-sided.
        paired: over what: "seeds" or "images"; "" where nothing can be said.
        pairs: how many.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    paired: str = ""
    pairs: int = 1


def paired_over_seeds(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compare scores that belong together one by one, as of the same seed: a paired t-test, as ``scipy.ttest_rel``.

    Where all differences are the same nothing is said of chance: a spread of none knows nothing of it.

    Args:
        first: scores of one arm, two or more.
        second: of the other, in the same order.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean, half = mean_and_interval(differences)
    assert half is not None
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    freedom = len(differences) - 1
    if error < 1e-12 * max(abs(mean), 1):  # all the same: two scores in steps of 1 / images often are
        return Difference(mean, paired="seeds", pairs=len(differences))
    p = 1 - _mass(math.atan(abs(mean) / error / math.sqrt(freedom)), freedom) / _mass(math.pi / 2, freedom)
    return Difference(mean, mean - half, mean + half, min(1.0, max(0.0, p)), "seeds", len(differences))


def bootstrapped(first: Sequence[bool], second: Sequence[bool], seed: int = 0) -> Difference:
    """Compare what two arms got right on the same images, which are drawn anew `DRAWS` times (percentile interval).

    A draw of n images with replacement holds a multinomial number of those that only one arm got right; these numbers
    are drawn, not the images. With it goes McNemar's exact test of whether each arm is right alone equally often.

    Args:
        first: of each image, whether it was right.
        second: the same images in the same order.
    """
    won = sum(a and not b for a, b in zip(first, second, strict=True))
    lost = sum(b and not a for a, b in zip(first, second, strict=True))
    n = len(first)
    drawn = np.random.default_rng(seed).multinomial(n, [won / n, lost / n, 1 - (won + lost) / n], DRAWS)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / n, [0.025, 0.975])
    return Difference((won - lost) / n, float(low), float(high), _sign_test(won, lost), "images", n)


def _sign_test(won: int, lost: int) -> float:
    """Return how likely so uneven a split of won + lost fair coins is, both ends counted (McNemar, exact)."""
    n, few = won + lost, min(won, lost)
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(few + 1)]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))
