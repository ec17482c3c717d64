"""How a step's cost grows with one setting: images of a batch, patches kept, size of the image, threads.

Points take turns, so that a machine that slows down slows all of them. What is expected are the operations of
`maekit.model.flops`, shared by the threads. Two things are set beside it: the fastest point, per operation, and the
line time = fixed + operations / rate that misses the points by the least share. What is fixed hurts small points;
products among tokens, which grow with the square of their number and run at another rate, hurt long sequences.
"""

import contextlib
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import truediv

import numpy as np
import torch
from torch import Tensor

from maekit.bench.contenders import Contender, turns
from maekit.errors import MaekitError
from maekit.model.flops import attention_flops, flops
from maekit.model.mae import MaskedAutoencoder
from maekit.model.masking import check_masking
from maekit.settings import Bench

FEWEST, MOST = 2, 6
"""Points of a sweep; of its default at most."""
RATIOS = (0.9, 0.75, 0.5, 0.25, 0.1)
"""Mask ratios of the default."""
SIDES = (0.5, 1.0, 1.5, 2.0)
"""Sides of the default, times the setting's."""


@dataclass(frozen=True)
class Point:
    """One value of what is swept, ready to be timed.

    Attributes:
        value: of the setting.
        contender: maekit, for this mask ratio.
        images: (B, C, H, W).
        threads: of the CPU; 1 elsewhere.
        size: what should decide the cost: images of the batch; patches kept of an image; threads.
        flops: operations of a step.
        attention: share of them that are products among tokens.
        decoder: share of them that is the decoder's.
    """

    value: float
    contender: Contender
    images: Tensor
    threads: int
    size: int
    flops: int
    attention: float
    decoder: float

    def seconds(self) -> float:
        """Train once on so many threads."""
        if self.images.device.type == "cpu" and torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        return self.contender.seconds(self.images)


@dataclass(frozen=True)
class Grown:
    """What a point took.

    Attributes:
        value: of the setting that is swept.
        size: as in `Point`.
        seconds: of a step, median of the rounds.
        lowest: of the rounds.
        highest: of the rounds.
        flops: operations of a step.
        attention: share of them that are products among tokens.
        decoder: share of them that is the decoder's.
        over_best: its time over what the rate of the fastest point, per operation and thread, makes expect.
        fitted: its seconds by the line through all points.
        grows: exponent of the time's growth with the size since the point before it; None for the first.
        expected: that of the operations.
    """

    value: float
    size: int
    images_per_second: float
    seconds: float
    lowest: float
    highest: float
    flops: int
    flops_per_second: float
    attention: float
    decoder: float
    over_best: float
    fitted: float
    grows: float | None
    expected: float | None


@dataclass(frozen=True)
class Line:
    """Time = fixed_seconds + operations of a thread / flops_per_second (None: time does not grow with them).

    Attributes:
        misses: the largest share of a point's time by which the line misses it.
    """

    fixed_seconds: float
    flops_per_second: float | None
    misses: float

    def at(self, work: float) -> float:
        """Return the seconds for so many operations of a thread."""
        return self.fixed_seconds + (work / self.flops_per_second if self.flops_per_second else 0.0)


def unread(settings: Bench) -> set[str]:
    """Return the name of the setting that is swept, unless the default points are chosen by it."""
    chosen_by = settings.points is None and settings.over in ("batch-size", "img-size")
    return set() if chosen_by else {_name(settings.over)}


def _name(over: str) -> str:
    return over.replace("-", "_")


def varied(settings: Bench, build: Callable[[Bench], MaskedAutoencoder]) -> dict[float, Bench]:
    """Return the settings of each point by its value, the smallest size first.

    Args:
        settings: `over` names what is swept; without `points` they are chosen here.
        build: the model of settings; asked where points hang on it.

    Raises:
        MaekitError: E-CONFIG-POINTS for a value that cannot be, or fewer than two; E-CONFIG-MASK for a mask ratio that
            this grid cannot have.
    """
    over, name = settings.over, _name(settings.over)
    model = build(settings) if over == "mask-ratio" or (over == "img-size" and not settings.points) else None
    points = settings.points or _points(settings, model)
    values = sorted(set(points), reverse=over == "mask-ratio")
    if len(values) < FEWEST:
        found = ", ".join(f"{value:g}" for value in values) or "none that this model can have"
        raise _refused(over, found, f"at least {FEWEST} different values", "--points A,B, or another --over")
    for value in values:
        _check(over, value)
    if model is not None and over == "mask-ratio":
        for value in values:
            _check_ratio(model, value)
        kept = [kept_patches(model, value) for value in values]
        if len(set(kept)) < len(kept):
            found = ", ".join(f"{count} patches at {value:g}" for value, count in zip(values, kept, strict=True))
            raise _refused(over, found, "a different number of patches each", "ratios further apart")
        return {value: settings.model_copy(update={name: value}) for value in values}
    if over == "img-size":
        return {value: settings.model_copy(update={name: (int(value), int(value))}) for value in values}
    return {value: settings.model_copy(update={name: int(value)}) for value in values}


def _points(settings: Bench, model: MaskedAutoencoder | None) -> list[float]:
    if settings.over == "batch-size":
        return [*{max(1, settings.batch_size >> halved) for halved in range(MOST)}]
    if settings.over == "threads":
        return [*{min(2**doubled, cores()) for doubled in range(MOST - 1)}, cores()]
    assert model is not None
    if settings.over == "img-size":
        least = model.patch * settings.mask_unit
        return [least * max(2, round(settings.img_size[0] / least * times)) for times in SIDES]
    kept: dict[int, float] = {}
    for ratio in RATIOS:
        with contextlib.suppress(MaekitError):  # this grid cannot have it
            _check_ratio(model, ratio)
            kept.setdefault(kept_patches(model, ratio), ratio)
    return [*kept.values()]


def _check(over: str, value: float) -> None:
    if over == "mask-ratio" and value >= 1:
        raise _refused(over, f"{value:g}", "shares of patches removed, below 1", "--points 0.9,0.5")
    if over != "mask-ratio" and value != int(value):
        raise _refused(over, f"{value:g}", "whole numbers", "--points 32,64")
    if over == "threads" and value > cores():
        raise _refused(over, f"{value:g}", f"at most {cores()}, the cores that this process may use", "fewer threads")


def _check_ratio(model: MaskedAutoencoder, ratio: float) -> None:
    if model.variant.mask_kind == "none":
        raise _refused("mask-ratio", "mask_kind none, which removes nothing", "a mask", "another --over")
    check_masking(model.variant.mask_kind, model.grid, ratio, model.variant.mask_unit)
    model.check_decode_ratio(ratio)


def _refused(over: str, found: str, expected: str, hint: str) -> MaekitError:
    return MaekitError("E-CONFIG-POINTS", f"points of --over {over}", found=found, expected=expected, hint=hint)


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def kept_patches(model: MaskedAutoencoder, mask_ratio: float) -> int:
    """Return how many patches of an image are kept."""
    if model.variant.mask_kind == "none":
        return model.num_patches
    unit = model.variant.mask_unit
    return int(model.num_patches // unit**2 * (1 - mask_ratio) + 1e-6) * unit**2


def point(value: float, settings: Bench, contender: Contender, images: Tensor) -> Point:
    """Put together one point.

    Args:
        value: of the setting that is swept.
        settings: of this point.
        contender: maekit with this mask ratio.
        images: (B, C, H, W).
    """
    model = contender.model
    assert isinstance(model, MaskedAutoencoder)
    count, ratio = flops(model, settings.mask_ratio), settings.mask_ratio
    threads = 1 if images.device.type != "cpu" else settings.threads or torch.get_num_threads()
    sizes = {"batch-size": len(images), "threads": threads}
    return Point(
        value, contender, images, threads, sizes.get(settings.over, kept_patches(model, ratio)),
        count.total * len(images), attention_flops(model, ratio) / count.total, count.decoder.total / count.total,
    )  # fmt: skip


def grown(points: Sequence[Point], rounds: int) -> tuple[list[Grown], Line]:
    """Time all points in turns; threads are put back as they were.

    Args:
        points: the smallest first.
        rounds: turns of each.
    """
    before = torch.get_num_threads()
    try:
        times = turns({at: one.seconds for at, one in enumerate(points)}, rounds)
    finally:
        torch.set_num_threads(before)
    return judged(points, [times[at] for at in range(len(points))])


def judged(points: Sequence[Point], times: Sequence[Sequence[float]]) -> tuple[list[Grown], Line]:
    """Set what points took beside what their operations make expect.

    Args:
        points: the smallest first.
        times: seconds of the steps of each.
    """
    middle = [statistics.median(seconds) for seconds in times]
    work = [one.flops / one.threads for one in points]
    best = max(map(truediv, work, middle))
    line = fitted(work, middle)
    sizes = [one.size for one in points]
    grows, expected = _exponents(sizes, middle), _exponents(sizes, work)
    found = [
        Grown(
            one.value, one.size, len(one.images) / seconds, seconds, min(times[at]), max(times[at]), one.flops,
            one.flops / seconds, one.attention, one.decoder, seconds * best / work[at],
            line.at(work[at]), grows[at], expected[at],
        )
        for at, (one, seconds) in enumerate(zip(points, middle, strict=True))
    ]  # fmt: skip
    return found, line


def _exponents(sizes: Sequence[float], costs: Sequence[float]) -> list[float | None]:
    """Return e of cost = size^e between each and the one before it."""
    ends = zip(pairwise(sizes), pairwise(costs), strict=True)
    return [None, *(math.log(after / before) / math.log(larger / size) for (size, larger), (before, after) in ends)]


def fitted(work: Sequence[float], seconds: Sequence[float]) -> Line:
    """Return the line of neither negative part that has the least squares of its misses, as shares of each time.

    Args:
        work: operations of a thread, no two alike.
        seconds: what they took.
    """
    done, took = np.array(work), np.array(seconds)
    slope, fixed = np.polyfit(done, took, 1, w=1 / took)
    if fixed < 0:
        share = done / took
        slope, fixed = share.sum() / (share**2).sum(), 0.0
    elif slope < 0:
        slope, fixed = 0.0, (1 / took).sum() / (1 / took**2).sum()
    misses = np.abs(fixed + slope * done - took) / took
    return Line(float(fixed), float(1 / slope) if slope else None, float(misses.max()))
