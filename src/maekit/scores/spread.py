"""How far a mean of few draws can be trusted."""

import math
import statistics
from collections.abc import Sequence

import torch

PIECES = 2000
"""Of Simpson's rule: far more than double precision needs for so smooth a function."""


def mean_and_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float | None]:
    """Return the mean of independent draws and half the width of its confidence interval (Student's t).

    The interval is about these draws; it knows nothing of what was the same in all of them, such as the images scored
    on. A single value has none.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    return mean, student(level, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


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
