"""One sample: an image of a source by (epoch, index), as training sees it. Runs in loader processes.

Every sample is a function of (seed, epoch, index): the random generators are seeded with just these three before the
mask's noise, the crop and the flip are drawn. What cannot be read is replaced by the next readable image, so every
number of workers sees the same; errors of a file system that may pass (a share that is away for a moment) are tried
again first.

With `repeats` an image that was decoded once gives several samples (repeated augmentation, Hoffer et al., arXiv
1901.09335): sample number index + k * images is the k-th of image `index`, a function of (seed, epoch, number). Those
of one image lie side by side in a batch, and what was decoded last is kept for them; where they are cut apart it is
decoded again.
"""

import errno
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from maekit.data.decoded import Decoded
from maekit.data.image import read_image
from maekit.data.masks import Masks
from maekit.data.source import Source
from maekit.errors import MaekitError
from maekit.failpoints import reach
from maekit.seeds import seed_cpu

STACKED = ("noise", "targets", "scores", "boxes")
"""What else than images, labels and ids a sample may hold."""
IN_A_ROW = 100
"""Unreadable images one after the other that are passed over."""
WAITS = (0.1, 0.3, 0.9)
"""Seconds before an image is tried a second, third and fourth time."""
SLOW_AFTER = 10.0
"""Seconds for one image, or without a batch, that are worth a line."""
PASSING = frozenset(
    getattr(errno, name)
    for name in (
        "EIO", "ESTALE", "ENOENT", "EACCES", "EAGAIN", "EBUSY", "EINTR", "ETIMEDOUT", "EREMOTEIO", "ENFILE", "EMFILE",
        "ENOTCONN", "ECONNRESET", "ECONNABORTED", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET",
    )
    if hasattr(errno, name)
)  # fmt: skip
"""Errors of a file system that may be gone when one tries again."""

Key = tuple[int, int]
"""Epoch and number of the sample: the image's index, plus the number of images for each further sample of it."""
Bad = tuple[int, str]
"""Index of an unreadable image, and what is wrong with it."""
View = Callable[[Tensor], Tensor]

log = logging.getLogger("maekit")


class Seat(Protocol):
    """Where a loader process says what it is at (`maekit.data.workers.Seats`)."""

    def take(self, index: int) -> None:
        """Begin to read image `index`."""
        ...

    def leave(self) -> None:
        """Be at no image."""
        ...


class Samples(Dataset[dict[str, Any]]):
    """Items of a source by (epoch, index): decoded, viewed, with the mask's noise, and scores where masks are given.

    What was wrong with images that had to be replaced travels with the item under "bad".

    Attributes:
        given_up: images that no one shall try to read any more, and why: they made loader processes hang or die.
        seat: where a loader process says what it is at; None in the main process.
        decoded: pictures that need not be read again; None: all are.
        enough: as in `read_image`.
        repeats: samples of each image; of several, the image that was decoded last is kept.
    """

    repeats = 1

    def __init__(
        self,
        source: Source,
        view: View,
        channels: int,
        seed: int,
        num_noise: int,
        masks: Masks | None = None,
        decoded: Decoded | None = None,
        enough: tuple[int, int] | None = None,
    ) -> None:
        self.source, self.view, self.channels = source, view, channels
        self.seed, self.num_noise, self.masks, self.decoded, self.enough = seed, num_noise, masks, decoded, enough
        self.given_up: dict[int, str] = {}
        self.seat: Seat | None = None
        self._waited_for: set[int] = set()
        self._last: tuple[int, tuple[Tensor, Tensor | None, int, list[Bad]]] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        try:
            return self._sample(*key)
        finally:
            if self.seat is not None:
                self.seat.leave()

    def _sample(self, epoch: int, wanted: int) -> dict[str, Any]:
        try:
            image, scores, index, bad = self._decoded_once(wanted % len(self.source))
        except MaekitError as error:  # as an item: an exception of more than one argument cannot leave a worker
            return {"stop": (error.code, str(error.args[0]))}
        seed_cpu(self.seed, epoch, wanted)
        noise = torch.rand(self.num_noise)  # first, so that no augmentation setting moves the mask
        label = -1 if self.source.labels is None else self.source.labels[index]
        image = self.view(image)
        item = {"images": image, "labels": label, "ids": index, "noise": noise, "bad": bad}
        if getattr(self.view, "cut_only", False):
            box = torch.tensor([*image.shape[1:], image.dtype == torch.uint8])
            item |= {"images": image.permute(1, 2, 0).flatten(), "boxes": box}
        if self.source.targets is not None:
            item["targets"] = torch.from_numpy(self.source.targets.values[index]).float()
        if scores is not None:
            item["scores"] = scores
        return item

    def _decoded_once(self, index: int) -> tuple[Tensor, Tensor | None, int, list[Bad]]:
        """Return what `_readable` does; of several samples of one image that is read once."""
        if self.repeats == 1:
            return self._readable(index)
        if self._last is None or self._last[0] != index:
            self._last = index, self._readable(index)
        return self._last[1]

    def _readable(self, index: int) -> tuple[Tensor, Tensor | None, int, list[Bad]]:
        """Return image `index` or the next one that can be read, its scores and index, and those passed over."""
        bad: list[Bad] = []
        for offset in range(min(len(self.source), IN_A_ROW)):
            at = (index + offset) % len(self.source)
            try:
                return *self._patiently(at), at, bad
            except (MaekitError, OSError) as error:
                if isinstance(error.__cause__, MemoryError):
                    raise _no_memory(self.source.ids[at]) from error
                bad.append((at, str(error.args[0]) if isinstance(error, MaekitError) else str(error)))
        raise MaekitError("E-DATA-BAD", f"{len(bad)} images in a row cannot be read, the first: {bad[0][1]}")

    def _patiently(self, at: int) -> tuple[Tensor, Tensor | None]:
        """Read an image and its mask, and again after a while where the error may pass; for what stays so only once."""
        if at in self.given_up:
            raise MaekitError("E-DATA-IMAGE", f"cannot read {self.source.ids[at]}", found=self.given_up[at])
        for wait in () if at in self._waited_for else WAITS:
            try:
                return self._read(at)
            except (MaekitError, OSError) as error:
                if not may_pass(error):
                    raise
                time.sleep(wait)
        try:
            return self._read(at)
        except (MaekitError, OSError):
            self._waited_for.add(at)
            raise

    def _read(self, at: int) -> tuple[Tensor, Tensor | None]:
        began = time.monotonic()
        if self.seat is not None:
            self.seat.take(at)
        reach("worker-read")
        image = None if self.decoded is None else self.decoded.get(at)
        if image is None:
            image = self._decode(at)
        scores = None if self.masks is None else self.masks.scores(at)
        if self.seat is None and (took := time.monotonic() - began) > SLOW_AFTER:
            log.warning("slow: %s took %.0f s to read", self.source.ids[at], took)
        return image, scores

    def _decode(self, at: int) -> Tensor:
        data = self.source.read(at)
        if isinstance(data, Tensor):
            return self._checked(data, at)
        image = read_image(data, channels=self.channels, name=self.source.ids[at], enough=self.enough)
        image = self._checked(image, at)
        if self.decoded is not None:
            self.decoded.offer(at, image)
        return image

    def _checked(self, image: Tensor, at: int) -> Tensor:
        if image.shape[0] != self.channels:
            raise MaekitError(
                "E-DATA-IMAGE",
                f"image {self.source.ids[at]}",
                found=f"{image.shape[0]} channels",
                expected=f"{self.channels} as in the other images",
                hint="--channels",
            )
        return image


def may_pass(error: BaseException) -> bool:
    """Tell whether a file system's error is behind it that may be gone in a moment."""
    cause = error if isinstance(error, OSError) else error.__cause__
    return isinstance(cause, OSError) and cause.errno in PASSING


def _no_memory(name: str) -> MaekitError:
    return MaekitError(
        "E-ENV-MEMORY", "no memory to read images", found=f"none for {name}", expected="what its pixels take",
        hint="fewer --workers, a smaller --micro-batch, or a smaller image in its place",
    )  # fmt: skip


def _stacked(images: list[Tensor]) -> Tensor:
    if images[0].dtype != torch.uint8 or images[0].is_contiguous():
        return default_collate(images)
    return default_collate([image.movedim(-3, -1) for image in images]).movedim(-1, -3)


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack items into a batch; "bad" becomes one list, "stop" (code and line of an error) stands alone.

    In a worker torch's `default_collate` stacks in shared memory at once, so pixels are not copied once more there.
    Pictures that were decoded in (H, W, C) order lie there in that order: another one would take ten times as long.
    Those of boxes that are still to be resized are: they follow one another in one dimension (`resized_boxes`).
    """
    if stops := [item["stop"] for item in items if "stop" in item]:
        return {"stop": stops[0]}
    images = [item["images"] for item in items]
    if len({image.dtype for image in images}) > 1:  # pictures among float arrays, which are within 0..1 already
        most = 1 if "boxes" in items[0] else 255
        images = [image.float().div_(most) if image.dtype == torch.uint8 else image for image in images]
    return {
        "images": torch.cat(images) if "boxes" in items[0] else _stacked(images),
        "labels": torch.tensor([item["labels"] for item in items]),
        "ids": torch.tensor([item["ids"] for item in items]),
        **{name: default_collate([item[name] for item in items]) for name in STACKED if name in items[0]},
        "bad": [entry for item in items for entry in item["bad"]],
    }
