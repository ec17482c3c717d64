"""From a source to float batches on the device, in an order that can be left and taken up again anywhere.

Every sample is a function of (seed, epoch, sample index): `Samples` seeds the random generators with just these
three before it draws the mask's noise, the crop and the flip. The order is a permutation drawn from (seed, epoch),
cut into global batches, each cut into one contiguous part per process and that into micro-batches. So the number
of workers, the number of processes and the step at which a run was stopped change no sample and no mask; a
position is one number, the step. One DataLoader serves the whole run: workers start once, not once per epoch.

An incomplete global batch at the end of an epoch is trained short, or with `drop_last` dropped (as in the official
recipes); a set smaller than one batch is one short batch per epoch in any case.
"""

import atexit
import contextlib
import itertools
import json
import logging
import math
import multiprocessing
import os
import signal
import threading
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from maekit.data.image import read_image
from maekit.data.masks import Masks
from maekit.data.source import Source
from maekit.errors import MaekitError
from maekit.seeds import mix, seed_cpu

log = logging.getLogger("maekit")

PRELOADED = ["maekit.data.loader", "maekit.data.augment", "maekit.data.sources"]
"""What the fork server imports once: a worker that had to import torchvision and timm itself would take seconds."""

STACKED = ("noise", "targets", "scores")
"""What else a sample may hold."""

Batch = dict[str, Tensor]
View = Callable[[Tensor], Tensor]


def auto_workers(num_images: int, size: tuple[int, int]) -> int:
    """Choose how many loader processes: none where decoding is nothing beside a process's start of seconds."""
    small = num_images * math.prod(size) < 20_000 * 64 * 64
    return 0 if small else min(8, max(1, len(os.sched_getaffinity(0)) - 1 if hasattr(os, "sched_getaffinity") else 4))


def steps_per_epoch(num_images: int, batch_size: int, drop_last: bool) -> int:
    """Return the global batches of an epoch; a set smaller than a batch is one."""
    whole, rest = divmod(num_images, batch_size)
    return max(1, whole if drop_last else whole + (rest > 0))


class Samples(Dataset[dict[str, Any]]):
    """Items of a source by (epoch, index): decoded, viewed, with the mask's noise, and scores where masks are given.

    An image that cannot be read is replaced by the next readable one, so every worker count sees the same; what
    was wrong travels with the item under "bad".
    """

    def __init__(
        self, source: Source, view: View, channels: int, seed: int, num_noise: int, masks: Masks | None = None
    ) -> None:
        self.source, self.view, self.channels = source, view, channels
        self.seed, self.num_noise, self.masks = seed, num_noise, masks

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        try:
            image, scores, index, bad = self._read(index)
        except MaekitError as error:  # as an item: an exception of more than one argument cannot leave a worker
            return {"stop": str(error.args[0])}
        seed_cpu(self.seed, epoch, key[1])
        noise = torch.rand(self.num_noise)  # first, so that no augmentation setting moves the mask
        label = -1 if self.source.labels is None else self.source.labels[index]
        item = {"images": self.view(image), "labels": label, "ids": index, "noise": noise, "bad": bad}
        if self.source.targets is not None:
            item["targets"] = torch.from_numpy(self.source.targets.values[index]).float()
        if scores is not None:
            item["scores"] = scores
        return item

    def _read(self, index: int) -> tuple[Tensor, Tensor | None, int, list[tuple[int, str]]]:
        bad: list[tuple[int, str]] = []
        for offset in range(min(len(self.source), 100)):
            at = (index + offset) % len(self.source)
            try:
                data = self.source.read(at)
                image = (
                    data
                    if isinstance(data, Tensor)
                    else read_image(data, channels=self.channels, name=self.source.ids[at])
                )
                scores = None if self.masks is None else self.masks.scores(at)
                return self._checked(image, at), scores, at, bad
            except (MaekitError, OSError) as error:
                bad.append((at, str(error.args[0]) if isinstance(error, MaekitError) else str(error)))
        raise MaekitError("E-DATA-BAD", f"{len(bad)} images in a row cannot be read, the first: {bad[0][1]}")

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


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Micro-batches of (epoch, index) for one process, from one step to another of an endless schedule."""

    def __init__(self, loader: "Loader", start: int, stop: int) -> None:
        self.loader, self.start, self.stop = loader, start, stop

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            yield from self.loader.parts(step)


class Loader:
    """Batches for training (`steps`) and evaluation (`sweep`).

    Args:
        source: images by index, with ids and labels.
        view: one decoded (C, H, W) image to one of the model's size.
        batch_size: global batch, all processes and accumulation steps.
        micro_batch: images per process and pass; the last pass of a step may have fewer.
        drop_last: leave the images of an incomplete batch at the end of an epoch out; otherwise it is a short one.
        mean: per channel, of values in 0..1; subtracted on the device.
        std: per channel, divides on the device.
        num_noise: length of each sample's "noise": the number of patches, 0 where nothing is masked.
        bad_log: file to which unreadable images are written, one JSON object a line.
        masks: gives each sample its "scores" (N,); an image whose mask cannot be read is an unreadable image.
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
        bad_log: Path | None = None,
        masks: Masks | None = None,
    ) -> None:
        self.source, self.seed, self.workers = source, seed, workers
        self.batch_size = min(batch_size, len(source))
        self.micro_batch, self.rank, self.world = micro_batch, rank, world
        self.device = torch.device(device)
        self.samples = Samples(source, view, len(mean), seed, num_noise, masks)
        shape = (1, len(mean), 1, 1)
        self.mean = torch.tensor(mean, dtype=torch.float32, device=self.device).view(shape)
        self.std = torch.tensor(std, dtype=torch.float32, device=self.device).view(shape)
        self.bad: dict[str, str] = {}
        self.seen = 0
        self.bad_log = bad_log
        self.steps_per_epoch = steps_per_epoch(len(source), batch_size, drop_last)
        self._order: tuple[int, list[int]] = (-1, [])

    def order(self, epoch: int) -> list[int]:
        """Return the permutation of sample indices of one epoch: a function of (seed, epoch)."""
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(mix(self.seed, epoch))
            self._order = epoch, torch.randperm(len(self.source), generator=generator).tolist()
        return self._order[1]

    def _share(self, step: int) -> tuple[int, int, int, int]:
        """Return epoch, first and end of the global batch in its order, and that batch's size."""
        epoch, at = divmod(step, self.steps_per_epoch)
        first = at * self.batch_size
        end = min(first + self.batch_size, len(self.source))
        return epoch, first, end, end - first

    def sizes(self, step: int) -> tuple[int, int]:
        """Return the images of a step's global batch and of this process's share of it, which may be none."""
        *_, whole = self._share(step)
        return whole, (self.rank + 1) * whole // self.world - self.rank * whole // self.world

    def parts(self, step: int) -> list[list[tuple[int, int]]]:
        """Return this process's micro-batches of `step`, as lists of (epoch, index).

        At least one of one image: where the share is empty it is another process's, to be weighed with 0.
        """
        epoch, start, end, whole = self._share(step)
        chosen = self.order(epoch)[start:end]
        first, last = self.rank * whole // self.world, (self.rank + 1) * whole // self.world
        mine = [(epoch, index) for index in chosen[first:last] or chosen[:1]]
        return [mine[i : i + self.micro_batch] for i in range(0, len(mine), self.micro_batch)]

    def steps(self, start: int, stop: int) -> Iterator[Iterator[Batch]]:
        """Yield, for each step of ``start..stop-1``, this process's micro-batches in order.

        Each holds the number of the step, the same in every process: "step", shape (), on the CPU, to be read there.
        A micro-batch is put on the device when it is asked for, so that accumulation costs no memory; those of a step
        must all be taken before the next step.
        """
        batches = self._batches(StepSampler(self, start, stop))
        for step in range(start, stop):
            count = math.ceil(max(1, self.sizes(step)[1]) / self.micro_batch)
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

    def _in_batches(self, shares: Iterable[range]) -> Iterator[list[tuple[int, int]]]:
        for share in shares:
            for i in range(0, len(share), self.micro_batch):
                yield [(0, index) for index in share[i : i + self.micro_batch]]

    def _batches(self, sampler: Any) -> Iterator[Batch]:
        batches = self._iterate(sampler)
        _open.add(batches)
        return batches

    def _iterate(self, sampler: Any) -> Generator[Batch, None, None]:
        # forkserver: a child forked after OpenMP has run can hang; its server has never computed anything
        context = multiprocessing.get_context("forkserver") if self.workers else None
        if self.workers:
            _start_server()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # the user has said how many
            data: DataLoader[Any] = DataLoader(
                self.samples,
                batch_sampler=sampler,
                num_workers=self.workers,
                collate_fn=collate,
                multiprocessing_context=context,
                worker_init_fn=_start_worker if self.workers else None,
                prefetch_factor=4 if self.workers else None,
                pin_memory=self.device.type == "cuda",
                generator=torch.Generator(),  # or the DataLoader would draw from the global one
            )
            batches = iter(data)
        try:
            for batch in batches:
                if "stop" in batch:
                    raise MaekitError("E-DATA-BAD", batch["stop"], hint="maekit data PATH lists them")
                self._count(batch.pop("bad"), len(batch["ids"]))
                yield self._to_device(batch)
        finally:
            del batches  # ends its workers, also where a traceback keeps this frame

    def _to_device(self, batch: Batch) -> Batch:
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        images = batch["images"]
        scaled = images.float().div_(255) if images.dtype == torch.uint8 else images
        batch["images"] = (scaled - self.mean) / self.std
        return batch

    def _count(self, bad: list[tuple[int, str]], size: int) -> None:
        """Book unreadable images once each; more than max(5, 1 % of those seen) stop the run (exit 3)."""
        self.seen += size
        for index, reason in bad:
            name = self.source.ids[index]
            if name in self.bad:
                continue
            self.bad[name] = reason
            log.warning("skipped: %s", reason)
            if self.bad_log is not None:
                _list_once(self.bad_log, name, reason)
        seen = min(self.seen, len(self.source))
        if len(self.bad) > max(5, 0.01 * seen):
            raise MaekitError(
                "E-DATA-BAD",
                f"too many unreadable images, the last: {next(reversed(self.bad.values()))}",
                found=f"{len(self.bad)} of {seen} seen",
                expected="at most 5 or 1 %",
                hint="maekit data PATH lists them",
            )


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


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack items into a batch; "bad" becomes one list, "stop" (why no batch is possible) stands alone."""
    if stops := [item["stop"] for item in items if "stop" in item]:
        return {"stop": stops[0]}
    images = [item["images"] for item in items]
    if len({image.dtype for image in images}) > 1:  # pictures among float arrays, which are within 0..1 already
        images = [image.float().div_(255) if image.dtype == torch.uint8 else image for image in images]
    return {
        "images": torch.stack(images),
        "labels": torch.tensor([item["labels"] for item in items]),
        "ids": torch.tensor([item["ids"] for item in items]),
        **{name: torch.stack([item[name] for item in items]) for name in STACKED if name in items[0]},
        "bad": [entry for item in items for entry in item["bad"]],
    }


def _start_worker(_: int) -> None:
    """Let the main process alone decide on signals.

    Ctrl-C reaches the whole group, and a worker that dies of it takes the batch along that is still to be finished.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """End this worker when the main process is gone, also by kill -9.

    torch's own watchdog asks for the parent's number, but a worker's parent is the fork server, which in turn waits for
    its workers.
    """
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _start_server() -> None:
    """Start the fork server with the signals blocked that a terminal or scheduler sends to the whole group.

    Workers inherit the block, so there is no moment at which such a signal could end them or the server.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    if not hasattr(signal, "pthread_sigmask"):
        return
    resource_tracker.ensure_running()  # on its own: it lifts the block when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _list_once(path: Path, name: str, reason: str) -> None:
    """Add an unreadable image to the list of the run, unless an earlier launch or another process has."""
    with contextlib.suppress(OSError):  # a full disk stops no training; the line is in the log too
        known = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if not any(line.startswith(json.dumps({"id": name})[:-1] + ",") for line in known):
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"id": name, "reason": reason}) + "\n")
