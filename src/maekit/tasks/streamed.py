"""Rows computed once for every image of data larger than memory: in parts on the disk, which outlive a stop.

The images are cut into parts of about a thousand, in the order of the source. What was computed of one part is a
verified file in ``.FILE.parts`` beside FILE; ``job.json`` there says what work they are parts of. The same command goes
on after the parts that are there; with other weights, images or settings it begins anew and says so. At the end the
parts are read one after the other into FILE, which is whole or absent, and deleted. So never more than one part is in
memory, and a kill costs at most one. `maekit.tasks.pack` shares what such work says of itself and how it stops.
"""

import contextlib
import errno
import json
import logging
import math
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from maekit import __version__
from maekit.data.loader import Batch, Loader
from maekit.data.sources import Source
from maekit.disk import put
from maekit.errors import MaekitError
from maekit.report.files import write_whole
from maekit.signals import Noted, noting
from maekit.tasks import STOPPED, Result
from maekit.tasks.feature_cache import changes_of
from maekit.tasks.run_folder import alone
from maekit.train.checkpoint import state_sha256
from maekit.train.device import World
from maekit.train.log import clock

log = logging.getLogger("maekit")

Rows = dict[str, Tensor]
"""By name, one row per image, on the CPU; "index" is the place of each image in its source."""

PART_ROWS = 1024
"""Images of a part, rounded up to whole passes: seconds to minutes of work, one small file."""
PART_BYTES = 64 * 2**20
"""A part of long rows, as all tokens of an image are, has fewer."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SPEAK_EVERY = 30.0
"""Seconds between two lines of progress where there is no terminal."""


@dataclass(frozen=True)
class Work:
    """What is to be computed of every image.

    Attributes:
        loader: of all images.
        rows: a batch on the device -> rows of its images; all but "index", which is added.
        row_bytes: of one image.
        title: of the progress.
        job: what decides the values beside the images, as JSON: weights, sizes, precision ...
    """

    loader: Loader
    rows: Callable[[Batch], Rows]
    row_bytes: int
    title: str
    job: dict[str, Any]


@dataclass(frozen=True)
class Parts:
    """Parts of a table on the disk; `ranges` are the images of each."""

    folder: Path
    ranges: list[range]

    def __iter__(self) -> Iterator[Rows]:
        """Yield the rows of one part after the other."""
        for number in range(len(self.ranges)):
            yield self.read(number)

    def num_rows(self) -> int:
        """Return how many rows all parts have, without reading them."""
        total = 0
        for number in range(len(self.ranges)):
            with safe_open(self._path(number), framework="pt") as file:
                total += file.get_slice("index").get_shape()[0]
        return total

    def read(self, number: int) -> Rows:
        """Return the rows of a part.

        Raises:
            MaekitError: E-CKPT-DAMAGED for other values than were written.
        """
        path = self._path(number)
        try:
            with safe_open(path, framework="pt") as file:
                said, rows = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if said.get("sha256") != state_sha256({"rows": rows}, {}):
                raise ValueError("other values than were written (SHA-256)")
        except (SafetensorError, OSError, ValueError) as error:
            raise MaekitError("E-CKPT-DAMAGED", f"{path}", found=error, hint="the same command again") from error
        return rows

    def write(self, number: int, rows: Rows) -> None:
        """Keep the rows of a part, whole or not at all.

        Raises:
            MaekitError: E-ENV-OUT.
        """
        data = safetensors.torch.save(rows, {"sha256": state_sha256({"rows": rows}, {})})
        temporary = self.folder / f".tmp-{uuid.uuid4().hex}"
        try:
            with temporary.open("xb") as file:
                file.write(data)
            put(temporary, self._path(number))
        except OSError as error:
            raise MaekitError("E-ENV-OUT", f"cannot write in {self.folder}", found=error.strerror or error) from error
        finally:
            temporary.unlink(missing_ok=True)

    def begin(self, job: dict[str, Any]) -> list[int]:
        """Return the numbers of the parts that are there, those of other work and damaged ones deleted."""
        try:
            before = json.loads((self.folder / "job.json").read_bytes())
        except (OSError, ValueError):
            before = None
        job = json.loads(json.dumps(job))
        there = sorted(self.folder.glob("part-*.safetensors"))
        if before != job:
            if there:
                other = [key for key in job if not isinstance(before, dict) or before.get(key) != job[key]]
                log.warning("%s: begun anew, the %d parts there are of other work: %s differs", self.folder, len(there),
                            ", ".join(other) or "its description")  # fmt: skip
            for path in there:
                path.unlink()
            write_whole(self.folder / "job.json", json.dumps(job, indent=1).encode())
            return []
        return [number for number in range(len(self.ranges)) if self._verified(number)]

    def _verified(self, number: int) -> bool:
        if not self._path(number).exists():
            return False
        try:
            self.read(number)
        except MaekitError as error:
            log.warning("computed anew: %s", error.args[0])
            return False
        return True

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.safetensors"


def images_of(source: Source) -> dict[str, Any]:
    """Return what a job says of its images: other values, other images."""
    return {"maekit": __version__, "images": source.fingerprint(), "count": len(source), "changes": changes_of(source)}


def stream(out: Path, work: Work, here: World, finish: Callable[[Parts], None]) -> Result | None:
    """Compute what is missing and hand all rows to `finish`, or stop at a signal.

    Args:
        out: the file that `finish` writes, in the first process; the parts lie beside it until then.
        work: what is computed.
        finish: reads the parts one by one, in order of the images.

    Returns:
        None when the file is written; after a signal the result of a stop, with exit code 75.

    Raises:
        MaekitError: E-ENV-OUT, E-STOP-DISK where the disk is full and there are parts, E-ENV-BUSY if another process is
            at work on the same file, E-DATA-BAD, and what ``work.rows`` and `finish` raise.
        SystemExit: 128 + the signal's number if it was stopped before there was a part.
    """
    folder = out.with_name(f".{out.name}.parts")
    parts = Parts(folder, _cut(work))
    if here.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MaekitError("E-ENV-OUT", f"cannot write {out}", found=error.strerror or error) from error
    here.barrier()
    with alone(folder), noting("stopping", settles=True) as signals:
        try:
            with full_disk_stops(out, lambda: any(folder.glob("part-*"))):
                done = torch.tensor(parts.begin(work.job) if here.is_main else [], dtype=torch.long)
                done = set(here.gather(done).tolist())
                stopped = _compute(parts, done, work, here, signals)
                if not stopped and here.is_main:
                    finish(parts)
                    shutil.rmtree(folder)
                here.barrier()
        finally:
            if here.is_main and folder.exists() and not any(folder.glob("part-*")):
                shutil.rmtree(folder, ignore_errors=True)
    if not stopped:
        return None
    count = sum(len(parts.ranges[number]) for number in done)
    assert count or signals.received is not None or here.size > 1
    return stopped_after(count, work.job["count"], signals, file=str(out))


@contextlib.contextmanager
def full_disk_stops(out: Path, something: Callable[[], bool]) -> Iterator[None]:
    """Make a stop of a full disk where there is something to go on from.

    Raises:
        MaekitError: E-STOP-DISK then; whatever the block raises otherwise.
    """
    try:
        yield
    except MaekitError as error:
        full = isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL
        if not full or not something():
            raise
        raise MaekitError(
            "E-STOP-DISK", f"cannot write {out}", found=error.__cause__,
            hint="free some space, then the same command goes on from the parts that are there",
        ) from error  # fmt: skip


def stopped_after(count: int, of: int, signals: Noted, **metrics: str) -> Result:
    """Say how far it came: exit code 75.

    Raises:
        SystemExit: 128 + the signal's number if there is nothing to go on from.
    """
    if not count:
        raise SystemExit(128 + signal.Signals[signals.received or "SIGINT"])
    log.info("stopped after %d of %d images; the same command goes on", count, of)
    return Result({**metrics, "images": count, "of": of}, exit_code=STOPPED)


def _cut(work: Work) -> list[range]:
    """Cut the images into parts, the same ones at any number of processes."""
    images, passes = len(work.loader.source), work.loader.micro_batch
    rows = min(PART_ROWS, max(1, PART_BYTES // work.row_bytes))
    rows = math.ceil(rows / passes) * passes
    return [range(first, min(first + rows, images)) for first in range(0, images, rows)]


@torch.no_grad()
def _compute(parts: Parts, done: set[int], work: Work, here: World, signals: Noted) -> bool:
    """Write all parts that are not `done` and add them to it; return whether a signal came before the end."""
    missing = [number for number in range(len(parts.ranges)) if number not in done]
    progress = Progress(work.title, parts.ranges, done, speaks=here.is_main)
    ranges = [parts.ranges[number] for number in missing]
    for number, batches in zip(missing, work.loader.sweeps(ranges), strict=True):
        rows = []
        for batch in batches:
            rows.append({"index": batch["ids"].cpu(), **work.rows(batch)})
            progress.add(len(batch["ids"]) * here.size)
            if here.size == 1 and signals.received is not None:
                return True
        whole = each_once(rows, here)
        inside = (whole["index"] >= parts.ranges[number].start) & (whole["index"] < parts.ranges[number].stop)
        if here.is_main:  # an image that stood in for the last of a part belongs to the next
            parts.write(number, {name: value[inside].contiguous() for name, value in whole.items()})
        done.add(number)
        if here.any(signals.received is not None) and number != missing[-1]:
            return True
    progress.close()
    return False


def each_once(rows: Sequence[Rows], here: World) -> Rows:
    """Join the batches of all processes in the order of the source, each image once.

    One that stood in for an unreadable one comes twice. There must be at least one batch, of no image if need be.
    """
    joined = {name: here.gather(torch.cat([one[name] for one in rows])) for name in rows[0]}
    first = first_of_each(joined["index"])
    return {name: value[first] for name, value in joined.items()}


def first_of_each(index: Tensor) -> Tensor:
    """Return the rows that put images (n,), some of them twice, into the order of their source, each once."""
    return torch.from_numpy(np.unique(index.numpy(), return_index=True)[1])


class Progress:
    """A bar on a terminal, else now and then a line: how many of how many, how fast, how long it will take.

    Args:
        title: of the work.
        ranges: images of each part.
        done: parts that are there.
        speaks: whether this process does.
    """

    def __init__(self, title: str, ranges: Sequence[range], done: set[int], *, speaks: bool = True) -> None:
        self.title, self.speaks = title, speaks
        self.total = sum(map(len, ranges))
        self.first = self.count = sum(len(ranges[number]) for number in done)
        self.began = self.spoke = time.monotonic()
        if self.speaks and self.first:
            log.info("%s: going on after %d of %d images", title, self.first, self.total)
        shown = self.speaks and sys.stderr.isatty()
        self.bar = tqdm(total=self.total, initial=self.first, desc=title, unit="image", disable=not shown, leave=False)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began

    def add(self, images: int) -> None:
        """Count images that are done."""
        images = min(images, self.total - self.count)
        self.count += images
        self.bar.update(images)
        now = time.monotonic()
        if self.bar.disable and self.speaks and now - self.spoke > SPEAK_EVERY:
            self.spoke = now
            rate = (self.count - self.first) / (now - self.began)
            left = clock((self.total - self.count) / rate)
            log.info("%s: %d of %d images, %.3g a second, %s left", self.title, self.count, self.total, rate, left)

    def close(self) -> None:
        """End the bar."""
        self.bar.close()
