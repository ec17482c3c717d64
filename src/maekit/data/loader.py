"""From a source to float batches on the device, in an order that can be left and taken up again anywhere.

Every sample is a function of (seed, epoch, sample index) (`maekit.data.samples`). The order is a permutation drawn
from (seed, epoch), cut into global batches, each cut into one contiguous part per process and that into
micro-batches. So the number of workers, the number of processes and the step at which a run was stopped change no
sample and no mask; a position is one number, the step. One pool of workers serves the whole run: they start once,
not once per epoch (`maekit.data.workers`). Pictures that all fit into memory are decoded once (`maekit.data.decoded`).

With `repeats` an epoch decodes every image once and makes so many samples of it, which lie in the same global batch
(`maekit.data.samples`); sizes and positions count samples, so an epoch has as many times more steps.

An incomplete global batch at the end of an epoch is trained short, or with `drop_last` dropped (as in the official
recipes); a set smaller than one batch is one short batch per epoch in any case.
"""

import atexit
import contextlib
import itertools
import logging
import math
import os
import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from maekit.data.augment import MOST_PIXELS, resized_boxes
from maekit.data.bad_images import BadImages, Policy
from maekit.data.decoded import room_for
from maekit.data.masks import Masks
from maekit.data.samples import Key, Samples, View, collate
from maekit.data.source import Source
from maekit.data.workers import Pool
from maekit.errors import MaekitError
from maekit.seeds import mix

READ_TIMEOUT = 120.0
"""Seconds after which a worker that is still at one image counts as hung."""

Batch = dict[str, Tensor]

log = logging.getLogger("maekit")


def auto_workers(num_images: int, size: tuple[int, int], *, beside_gpu: bool = False) -> int:
    """Choose how many loader processes: none where decoding is nothing beside a process's start of seconds.

    One process crops 10,000 images of 32 px a second, which is plenty beside training on a CPU. A GPU takes more, and
    cores are idle beside it.
    """
    small = num_images * math.prod(size) < (2_000 if beside_gpu else 20_000) * 64 * 64
    return 0 if small else min(8, max(1, len(os.sched_getaffinity(0)) - 1 if hasattr(os, "sched_getaffinity") else 4))


def steps_per_epoch(num_images: int, batch_size: int, drop_last: bool) -> int:
    """Return the global batches of an epoch; a set smaller than a batch is one."""
    whole, rest = divmod(num_images, batch_size)
    return max(1, whole if drop_last else whole + (rest > 0))


class StepSampler(Sampler[list[Key]]):
    """Micro-batches of (epoch, index) for one process, from one step to another of an endless schedule."""

    def __init__(self, loader: "Loader", start: int, stop: int) -> None:
        self.loader, self.start, self.stop = loader, start, stop

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.start, self.stop):
            yield from self.loader.parts(step)


class Loader:
    """Batches for training (`steps`) and evaluation (`sweep`).

    Args:
        source: images by index, with ids and labels.
        view: one decoded (C, H, W) image to one of the model's size; where its "cut_only" is set, to a box of any size,
            which is resized on the device.
        batch_size: global batch, all processes and accumulation steps.
        micro_batch: images per process and pass; the last pass of a step may have fewer.
        drop_last: leave the images of an incomplete batch at the end of an epoch out; otherwise it is a short one.
        mean: per channel, of values in 0..1; subtracted on the device.
        std: per channel, divides on the device.
        num_noise: length of each sample's "noise": the number of patches, 0 where nothing is masked.
        workers: loader processes; 0 reads in this one, which can neither survive an image that crashes it nor end one
            that hangs.
        read_timeout: seconds after which a worker that is still at one image is killed; the second time the image
            counts as unreadable.
        bad_images: "skip" up to 5 or 1 % of those seen, or "stop" at the first.
        bad_log: file to which unreadable images are written, one JSON object a line.
        looked_at: images that were looked at before (`maekit.data.check`): they count as seen.
        masks: gives each sample its "scores" (N,); an image whose mask cannot be read is an unreadable image.
        decoded_bytes: pictures are decoded once and stay in memory if all together take no more.
        dct_scaling: large JPEG are decoded no larger than the view, which says so, makes use of (`read_image`).
        repeats: samples of each image in an epoch; must divide `batch_size`.
    """

    def __init__(
        self,
        source: Source,
        view: View,
        *,
        batch_size: int,
        micro_batch: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        seed: int = 0,
        drop_last: bool = False,
        num_noise: int = 0,
        workers: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
        masks: Masks | None = None,
        read_timeout: float = READ_TIMEOUT,
        bad_images: Policy = "skip",
        bad_log: Path | None = None,
        looked_at: int = 0,
        decoded_bytes: int = 0,
        dct_scaling: bool = False,
        repeats: int = 1,
    ) -> None:
        self.source, self.seed, self.workers, self.read_timeout = source, seed, workers, read_timeout
        assert batch_size % repeats == 0 or batch_size > repeats * len(source)
        self.repeats = repeats
        self.batch_size = min(batch_size, repeats * len(source))
        self.micro_batch, self.rank, self.world = micro_batch, rank, world
        self.device = torch.device(device)
        decoded = room_for(len(source), decoded_bytes)
        self.size: tuple[int, int] = getattr(view, "size", (1, 1))
        enough = getattr(view, "enough", None) if dct_scaling else None
        self.samples = Samples(source, view, len(mean), seed, num_noise, masks, decoded, enough)
        self.samples.repeats = repeats
        shape = (len(mean), 1, 1)
        self.mean = torch.tensor(mean, dtype=torch.float32, device=self.device).view(shape)
        self.std = torch.tensor(std, dtype=torch.float32, device=self.device).view(shape)
        self.bad = BadImages(source.ids, bad_images, looked_at=looked_at, file=bad_log)
        self.steps_per_epoch = steps_per_epoch(repeats * len(source), batch_size, drop_last)
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))
        self._said = False

    def order(self, epoch: int) -> Tensor:
        """Return the permutation of sample indices of one epoch, (n,): a function of (seed, epoch)."""
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(mix(self.seed, epoch))
            self._order = epoch, torch.randperm(len(self.source), generator=generator)
        return self._order[1]

    def _share(self, step: int) -> tuple[int, int, int, int]:
        """Return epoch, first and end of the global batch in its order, and that batch's size."""
        epoch, at = divmod(step, self.steps_per_epoch)
        first = at * self.batch_size
        end = min(first + self.batch_size, self.repeats * len(self.source))
        return epoch, first, end, end - first

    def sizes(self, step: int) -> tuple[int, int]:
        """Return the images of a step's global batch and of this process's share of it, which may be none."""
        *_, whole = self._share(step)
        return whole, (self.rank + 1) * whole // self.world - self.rank * whole // self.world

    def parts(self, step: int) -> list[list[Key]]:
        """Return this process's micro-batches of `step`, as lists of (epoch, number of the sample).

        At least one of one image: where the share is empty it is another process's, to be weighed with 0.
        """
        epoch, start, end, whole = self._share(step)
        chosen = self.order(epoch)[start // self.repeats : end // self.repeats].tolist()
        if self.repeats > 1:
            chosen = [index + k * len(self.source) for index in chosen for k in range(self.repeats)]
        first, last = self.rank * whole // self.world, (self.rank + 1) * whole // self.world
        mine = [(epoch, index) for index in chosen[first:last] or chosen[:1]]
        return [mine[i : i + self.micro_batch] for i in range(0, len(mine), self.micro_batch)]

    def steps(self, start: int, stop: int) -> Iterator[Iterator[Batch]]:
        """Yield, for each step of ``start..stop-1``, this process's micro-batches in order.

        Each holds the number of the step, the same in every process: "step", shape (), on the CPU, to be read there.
        A micro-batch is put on the device when it is asked for, so that accumulation costs no memory; those of a step
        must all be taken before the next step.

        Raises:
            MaekitError: E-DATA-BAD (too many unreadable images), E-ENV-WORKER, E-ENV-SHM, E-ENV-FILES.
        """
        epoch, first, *_ = self._share(start)
        self.bad.begin(start, epoch * self.steps_per_epoch * self.batch_size + first)
        batches = self._batches(StepSampler(self, start, stop))
        for step in range(start, stop):
            count = math.ceil(max(1, self.sizes(step)[1]) / self.micro_batch)
            self.bad.step = step
            yield _numbered(itertools.islice(batches, count), step)

    def sweep(self) -> Iterator[Batch]:
        """Yield every sample of this process's share exactly once, in order, for evaluation and features.

        Shares are strided by rank and need not be equally long: nothing is padded or seen twice.
        """
        mine = range(self.rank, len(self.source), self.world)
        yield from self._batches(self._in_batches([mine]))

    def sweeps(self, parts: Sequence[range]) -> Iterator[Iterator[Batch]]:
        """Yield, for each part of the source, this process's batches of it in order, like `sweep`.

        Workers go through all parts without a halt. The batches of a part must all be taken before the next part. At
        least one of one image: where the share is empty it is another process's.
        """
        mine = [part[self.rank :: self.world] or part[:1] for part in parts]
        batches = self._batches(self._in_batches(mine))
        for share in mine:
            yield itertools.islice(batches, math.ceil(len(share) / self.micro_batch))

    def _in_batches(self, shares: Iterable[range]) -> Iterator[list[Key]]:
        for share in shares:
            for i in range(0, len(share), self.micro_batch):
                yield [(0, index) for index in share[i : i + self.micro_batch]]

    def _batches(self, sampler: Any) -> Iterator[Batch]:
        batches = self._iterate(sampler)
        _open.add(batches)
        return batches

    def _iterate(self, sampler: Iterable[list[Key]]) -> Generator[Batch, None, None]:
        # closed in any case: a traceback may keep this frame, and workers end with their iteration
        with contextlib.closing(self._collated(sampler)) as batches:
            for batch in batches:
                if "stop" in batch:
                    code, line = batch["stop"]
                    hint = "maekit data PATH lists them" if code == "E-DATA-BAD" else None
                    raise MaekitError(code, line, hint=hint)
                self.bad.book(batch.pop("bad"), len(batch["ids"]))
                self._say_what_stays()
                yield self._to_device(batch)

    def _say_what_stays(self) -> None:
        """Say after the first batch, which shows how large images are, that they stay in memory."""
        if not self._said and self.samples.decoded is not None and (size := self.samples.decoded.expected):
            log.info("decoded images stay in memory: %.0f MB for all %d", size / 2**20, len(self.source))
        self._said = True

    def _collated(self, sampler: Iterable[list[Key]]) -> Generator[dict[str, Any], None, None]:
        """Yield the batches of the sampler's keys in main memory, made here or by workers."""
        pinned = self.device.type == "cuda"
        if not self.workers:
            self.samples.seat = None
            for keys in sampler:
                batch = collate([self.samples[key] for key in keys])
                yield {name: _pinned(value) for name, value in batch.items()} if pinned else batch
            return
        image_bytes = self.samples.channels * math.prod(self.size)  # at least: of 8 bits
        if getattr(self.samples.view, "cut_only", False):
            image_bytes *= MOST_PIXELS
        pool = Pool(
            self.samples, self.workers, timeout=self.read_timeout,
            batch_bytes=image_bytes * min(self.micro_batch, self.batch_size), pin_memory=pinned,
        )  # fmt: skip
        yield from pool.batches(sampler)

    def _to_device(self, batch: Batch) -> Batch:
        boxes = batch.pop("boxes").tolist() if "boxes" in batch else None
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        images = batch["images"]
        if boxes is not None:
            images = resized_boxes(images, boxes, self.samples.channels, self.size)
        images = images.float().div_(255) if images.dtype == torch.uint8 else images
        # a mean for each pixel, in the images' own order in memory: pixels by threes would take four times as long
        mean, std = (torch.empty_like(images[0]).copy_(one) for one in (self.mean, self.std))
        batch["images"] = images.sub_(mean).div_(std)  # in place: the batch is nobody else's
        return batch


_open: weakref.WeakSet[Generator[Batch, None, None]] = weakref.WeakSet()
"""Iterations that have been begun and may not have ended."""


@atexit.register
def _close_all() -> None:
    """End the workers of iterations that a program left half done.

    multiprocessing would send them SIGTERM, which they ignore, and then wait for them for ever.
    """
    for batches in list(_open):
        with contextlib.suppress(ValueError):  # another thread is in the middle of it
            batches.close()


def _numbered(batches: Iterator[Batch], step: int) -> Iterator[Batch]:
    for batch in batches:
        yield {**batch, "step": torch.tensor(step)}


def _pinned(value: Any) -> Any:
    return value.pin_memory() if isinstance(value, Tensor) else value
