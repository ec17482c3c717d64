"""Read images once before any work: what is broken, how large, which formats, which twice, mean and std.

`survey` measures and never refuses; `check` is what training calls: it says aloud what will be skipped and stops when
too much is. Sums over 8-bit pixels are exact integers, so mean and std do not depend on the number of threads.
"""

import hashlib
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from random import Random

import numpy as np
from torch import Tensor

from maekit.data.bad_images import Policy, most_bad
from maekit.data.image import num_frames, read_image, sniff
from maekit.data.source import Source
from maekit.errors import MaekitError

LIMIT = 10_000
"""Images that are read before step 1."""
MAX_NAMED = 5
"""Bad images that get a line of their own in the log."""
BLOCK = 2**20
"""Pixels counted at a time: bounds the memory that 64-bit counts take beside a large image."""

log = logging.getLogger("maekit")


@dataclass
class Report:
    """What was seen.

    Attributes:
        seen: images read, good and bad.
        bad: (id, reason) of each image that will be skipped.
        sizes: (height, width) in pixels -> images.
        formats: format -> images.
        channels: channels of the images, 0 when none could be read.
        mean: per channel over all pixels, 8- and 16-bit values within 0..1.
        std: as `mean`; of the whole population.
        digests: SHA-256 of the bytes -> ids.
        animated: images of several frames or pages, of which the first is used.
    """

    seen: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    channels: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    digests: dict[str, list[str]] = field(default_factory=dict, repr=False)
    animated: int = 0

    @property
    def duplicates(self) -> list[list[str]]:
        """Groups of ids with the same bytes."""
        return [ids for ids in self.digests.values() if len(ids) > 1]

    @property
    def max_bad(self) -> int:
        """How many bad images are put up with: 5, or 1 % of those seen."""
        return most_bad(self.seen)

    @property
    def too_many_bad(self) -> bool:
        """Whether training would stop: too many, or nothing left."""
        return len(self.bad) > self.max_bad or len(self.bad) == self.seen


def check(
    source: Source, *, channels: int | None = None, limit: int | None = LIMIT, seed: int = 0, policy: Policy = "skip"
) -> Report:
    """Survey the source, name what is bad in the log, and stop if that is too much.

    Raises:
        MaekitError: E-DATA-BAD when more than max(5, 1 %) of the images seen are bad, with policy "stop" any, or all.
    """
    report = survey(source, channels=channels, limit=limit, seed=seed)
    for name, reason in report.bad[:MAX_NAMED]:
        told = reason if name in reason else f"{name}: {reason}"
        log.warning("%s: %s", "skipped" if policy == "skip" else "unreadable", told)
    if report.bad:
        then = " and are skipped" if policy == "skip" else ""
        log.warning("%d of %d images looked at cannot be used%s", len(report.bad), report.seen, then)
    if report.animated:
        log.warning("%d images have several frames or pages; the first one is used", report.animated)
    if report.too_many_bad or len(report.bad) > most_bad(report.seen, policy):
        raise MaekitError(
            "E-DATA-BAD",
            f"too many images of {source.name} cannot be used",
            found=f"{len(report.bad)} of {report.seen}, the first: {report.bad[0][1]}" if report.bad else "no images",
            expected=f"at most {most_bad(report.seen, policy)}",
            hint=f"maekit data {source.name}",
        )
    return report


def survey(source: Source, *, channels: int | None = None, limit: int | None = LIMIT, seed: int = 0) -> Report:
    """Read min(all, `limit`) images, evenly spaced, and measure them.

    Args:
        source: what to look at.
        channels: as in `read_image`; None: those of the first good image.
        limit: largest number of images to read; None: all.
        seed: where the even spacing starts.
    """
    report, total = Report(), _Sums()
    for name, looked in _look_at_all(source, _spaced(len(source), limit, seed), channels):
        report.seen += 1
        if isinstance(looked, str):
            report.bad.append((name, looked))
            continue
        report.channels = report.channels or len(looked.sums.first)
        if len(looked.sums.first) != report.channels:
            reason = f"{len(looked.sums.first)} channels, others have {report.channels}"
            report.bad.append((name, reason))
            continue
        report.sizes[looked.size] += 1
        report.formats[looked.format] += 1
        report.digests.setdefault(looked.digest, []).append(name)
        report.animated += looked.frames > 1
        total.add(looked.sums)
    report.mean, report.std = total.mean_std()
    return report


@dataclass
class _Sums:
    """Pixels, sum and sum of squares per channel, in units of 1/255."""

    pixels: int = 0
    first: list[float] = field(default_factory=list)
    second: list[float] = field(default_factory=list)

    def add(self, other: "_Sums") -> None:
        zeros = [0] * len(other.first)
        self.pixels += other.pixels
        self.first = [a + b for a, b in zip(self.first or zeros, other.first, strict=True)]
        self.second = [a + b for a, b in zip(self.second or zeros, other.second, strict=True)]

    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        mean = tuple(value / self.pixels / 255 for value in self.first)
        square = (value / self.pixels / 255**2 for value in self.second)
        return mean, tuple(math.sqrt(max(0.0, s - m * m)) for s, m in zip(square, mean, strict=True))


@dataclass(frozen=True)
class _Looked:
    """What one good image showed."""

    size: tuple[int, int]
    format: str
    digest: str
    frames: int
    sums: _Sums


def _spaced(count: int, limit: int | None, seed: int) -> list[int]:
    """Return min(count, limit) evenly spaced indices."""
    if limit is None or limit >= count:
        return list(range(count))
    start = Random(seed).random()
    return [int((i + start) * count / limit) for i in range(limit)]


def _look_at_all(source: Source, indices: list[int], channels: int | None) -> Iterator[tuple[str, "_Looked | str"]]:
    """Yield (id, what it showed or why it is bad) in order; decoders release the GIL, so threads help."""
    pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
    try:
        looks = pool.map(lambda i: _look(source, i, channels), indices)
        yield from zip((source.ids[i] for i in indices), looks, strict=True)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest


def _look(source: Source, i: int, channels: int | None) -> "_Looked | str":
    try:
        data = source.read(i)
        image = data if isinstance(data, Tensor) else read_image(data, channels=channels, name=source.ids[i])
    except MaekitError as error:
        return str(error.args[0])
    pixels = image.numpy()
    if isinstance(data, Tensor):
        form, frames, data = "decoded", 1, pixels.tobytes()
    else:
        form, frames = sniff(data) or "", num_frames(data)
    size = (pixels.shape[1], pixels.shape[2])
    return _Looked(size, form, hashlib.sha256(data).hexdigest(), frames, _sums(pixels))


def _sums(pixels: np.ndarray) -> _Sums:
    """Add up (C, H, W): exact integers for uint8, 64-bit floats (times 255, to go with them) otherwise."""
    add = _count_bytes if pixels.dtype == np.uint8 else _add_floats
    pairs = [add(channel.reshape(-1)) for channel in pixels]
    return _Sums(pixels[0].size, [first for first, _ in pairs], [second for _, second in pairs])


def _count_bytes(values: np.ndarray) -> tuple[int, int]:
    blocks = range(0, len(values), BLOCK)
    counts = sum((np.bincount(values[i : i + BLOCK], minlength=256) for i in blocks), np.zeros(256, np.int64))
    levels = np.arange(256)
    return int(counts @ levels), int(counts @ levels**2)


def _add_floats(values: np.ndarray) -> tuple[float, float]:
    blocks = (values[i : i + BLOCK].astype(np.float64) for i in range(0, len(values), BLOCK))
    sums = [(float(block.sum()), float(np.square(block).sum())) for block in blocks]
    return math.fsum(first for first, _ in sums) * 255, math.fsum(second for _, second in sums) * 255**2
