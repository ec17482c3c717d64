"""What the loader delivers, what decoding costs, and how many loader processes a machine needs.

Others may be at work on the machine, so nothing here is to be compared with another run: what is compared takes turns
within one, and the ratio is what counts.
"""

import io
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from maekit.data.augment import enough, left_to_device, random_box, resized_boxes, resized_crop
from maekit.data.image import read_image
from maekit.data.loader import Batch, Loader
from maekit.data.workers import PREFETCH
from maekit.errors import MaekitError
from maekit.seeds import mix

SCALE = (0.2, 1.0)
"""Of the area of a crop, as in pre-training."""
ENDLESS = 10**9
"""Steps that no measurement comes to."""
PAPERS, OURS, SCALED = "Pillow + torchvision v1 (the paper's)", "maekit", "maekit --dct-scaling"
CUT = "maekit --resize-on device, what is left to the loader"


@dataclass(frozen=True)
class Rate:
    """What a loader delivers.

    Attributes:
        workers: its processes; 0: the main one.
        images_per_second: median of the turns, by the clock.
        lowest: of the turns.
        highest: of the turns.
    """

    workers: int
    images_per_second: float
    lowest: float
    highest: float


def loader_rates(
    make: Callable[[int], Loader], workers: Sequence[int], *, seconds: float, turns: int = 3
) -> list[Rate]:
    """Measure loaders of several numbers of processes.

    Args:
        make: a loader with so many processes.
        workers: numbers of them.
        seconds: for each number, all its turns together; starting the processes comes on top.
        turns: that each number has, one after the other.
    """
    started = {count: Deliveries(make(count)) for count in workers}
    found: dict[int, list[float]] = {count: [] for count in workers}
    try:
        for one in started.values():
            one.warm()
        for _ in range(turns):
            for count, one in started.items():
                found[count].append(one.rate(seconds / turns))
    finally:
        for one in started.values():
            one.close()
    return [Rate(count, statistics.median(rates), min(rates), max(rates)) for count, rates in found.items()]


def workers_needed(rates: Sequence[Rate], images_per_second: float) -> int | None:
    """Return the smallest number of processes that deliver as many images as a step takes; None: none measured does."""
    return next(
        (rate.workers for rate in sorted(rates, key=lambda rate: rate.workers)
         if rate.images_per_second >= images_per_second),
        None,
    )  # fmt: skip


class Deliveries:
    """A loader that is asked for batches now and then.

    Args:
        loader: its batches are thrown away.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self.steps: Iterator[Iterator[Batch]] = loader.steps(0, ENDLESS)

    def _take(self) -> int:
        return sum(len(batch["ids"]) for batch in next(self.steps))

    def warm(self) -> None:
        """Go through all images once where they stay decoded then: that first epoch is another matter."""
        self._take()
        decoded = self.loader.samples.decoded
        for _ in range(self.loader.steps_per_epoch if decoded is not None and decoded.expected else 0):
            self._take()

    def rate(self, seconds: float) -> float:
        """Return images per second; what workers have made beforehand is not counted."""
        for _ in range(1 + PREFETCH * self.loader.workers):
            self._take()
        images, began = 0, time.perf_counter()
        while (passed := time.perf_counter() - began) < seconds or not images:
            images += self._take()
        return images / passed if passed else 0.0

    def close(self) -> None:
        """End its processes."""
        self.steps = iter(())


@dataclass(frozen=True)
class Decoding:
    """What one way from a file's bytes to a crop costs.

    Attributes:
        pipeline: what it is.
        images_per_second: of one core, by the processor's time.
        ratio: that, over the paper's recipe's.
        difference: of its pixels from the paper's recipe's, mean of the absolute in levels of 0 to 255.
    """

    pipeline: str
    images_per_second: float
    ratio: float
    difference: float


def decode_rates(files: Sequence[Path], *, size: int = 224, seconds: float = 10.0, seed: int = 0) -> list[Decoding]:
    """Measure decoding and random resized crop to (3, size, size) of uint8, on one thread.

    All ways cut the same boxes, and take turns on every file. The first is that of the official repository, without
    what comes after it in any way (mirror, normalisation); that of JPEG decoded smaller is there only where some
    are large enough. What a GPU does is not in the time.

    Args:
        files: pictures; those that cannot be read are left out.
        size: side in pixels.
        seconds: in all; each file is used once at least.
        seed: of the boxes.

    Raises:
        MaekitError: E-DATA-EMPTY if none can be read.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _decode_rates([file.read_bytes() for file in files], size, seconds, seed)
    finally:
        torch.set_num_threads(threads)


Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class _File:
    """A readable picture, the box that is cut out of it, and the same box of it decoded smaller, where it can be."""

    data: bytes
    box: Box
    of_smaller: Box | None


def _decode_rates(contents: list[bytes], size: int, seconds: float, seed: int) -> list[Decoding]:
    files = list(_files(contents, enough((size, size), SCALE), seed))
    if not files:
        raise MaekitError("E-DATA-EMPTY", "no picture to decode", found=f"{len(contents)} files, none readable")
    ways = {PAPERS: _papers, OURS: _ours, CUT: _cut}
    if any(file.of_smaller for file in files):
        ways[SCALED] = _scaled
    spent, differs, count = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0.0), 0
    began = time.perf_counter()
    while count < len(files) or time.perf_counter() - began < seconds:
        shown = {}
        for name, way in ways.items():
            start = time.process_time()
            shown[name] = way(files[count % len(files)], size)
            spent[name] += time.process_time() - start
        shown[CUT] = resized_boxes(shown[CUT].flatten(), [(*shown[CUT].shape[:2], 1)], 3, (size, size))[0] * 255
        for name, pixels in shown.items():
            differs[name] += float((pixels.float() - shown[PAPERS].float()).abs().mean())
        count += 1
    return [Decoding(name, count / spent[name], spent[PAPERS] / spent[name], differs[name] / count) for name in ways]


def _files(contents: list[bytes], least: tuple[int, int], seed: int) -> Iterator[_File]:
    for number, data in enumerate(contents):
        with suppress(MaekitError):
            whole, small = read_image(data).shape[1:], read_image(data, enough=least).shape[1:]
            torch.manual_seed(mix(seed, number))
            top, left, tall, wide = random_box(whole[0], whole[1], SCALE)
            down, across = small[0] / whole[0], small[1] / whole[1]
            nearest = round(top * down), round(left * across), round(tall * down), round(wide * across)
            yield _File(data, (top, left, tall, wide), None if small == whole else nearest)


def _papers(file: _File, size: int) -> Tensor:
    """Return what the official repository's loader sees (ImageFolder's loader, RandomResizedCrop of torchvision v1)."""
    image = Image.open(io.BytesIO(file.data)).convert("RGB")
    crop = F.resized_crop(image, *file.box, [size, size], InterpolationMode.BICUBIC)  # type: ignore[arg-type]
    return F.pil_to_tensor(crop)


def _ours(file: _File, size: int) -> Tensor:
    return resized_crop(read_image(file.data), file.box, (size, size)).contiguous()


def _cut(file: _File, size: int) -> Tensor:
    """Return the box as it goes to the device, (H, W, 3)."""
    return left_to_device(read_image(file.data), file.box, (size, size)).permute(1, 2, 0).contiguous()


def _scaled(file: _File, size: int) -> Tensor:
    image = read_image(file.data, enough=enough((size, size), SCALE))
    return resized_crop(image, file.of_smaller or file.box, (size, size)).contiguous()
