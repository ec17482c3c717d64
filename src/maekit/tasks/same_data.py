"""Does a run that goes on see the images that it began with? If not, which are others, and what happens then.

The first launch writes down what it reads (`maekit.data.manifest`, ``data.parquet`` in the run folder): images to
train on and to score on, masks. A later launch compares: names, sizes and labels always, contents with
``--verify-data``. What is other stops it, or with ``--data-changed accept`` becomes the run's new state, with an entry
in config.yaml.
"""

import contextlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from maekit.data.bad_images import FILE as BAD_FILES
from maekit.data.manifest import (
    FILE,
    Difference,
    contents,
    difference,
    has_contents,
    manifest,
    read_manifest,
    to_bytes,
    with_contents,
)
from maekit.data.masks import Masks
from maekit.data.sources import Source
from maekit.errors import MaekitError
from maekit.report.files import write_whole
from maekit.settings import Steady
from maekit.tasks.run_folder import Resolved, Run, describe
from maekit.train.device import World

ACCEPT = "the old images, --data-changed accept to go on with these, or another --out"

log = logging.getLogger("maekit")


@dataclass(frozen=True)
class Read:
    """What a run reads.

    Attributes:
        source: the images that are trained on.
        beside: images for anything else, by what they are for.
        masks: given ones.
    """

    source: Source
    beside: Mapping[str, Source]
    masks: Masks | None = None

    @property
    def parts(self) -> dict[str, Source]:
        """All images by what they are for."""
        return {"train": self.source, **self.beside}


def write_down(run: Run, settings: Steady, read: Read, world: World) -> None:
    """Keep what a new run reads, in all processes: with ``--verify-data`` they share the hashing."""
    table = manifest(read.parts, read.masks)
    if settings.verify_data:
        table = with_contents(table, _hashed(read, world))
    if world.is_main:
        write_whole(run.path / FILE, to_bytes(table))


def compared(run: Run, settings: Steady, read: Read, world: World) -> Resolved:
    """Compare with what the run began with; return what it resolved to, changed where a change was accepted.

    Raises:
        MaekitError: E-DATA-CHANGED.
    """
    resolved, before = run.resolved, read_manifest(run.path)
    assert resolved is not None
    if before is None:  # killed before it was written, or a run of an older maekit
        same_data(run, len(read.source), read.source.fingerprint(), accept=settings.data_changed == "accept")
        world.barrier()
        write_down(run, settings, read, world)
        return resolved
    now = manifest(read.parts, read.masks)
    found, stops = difference(before, now), settings.data_changed == "stop"
    unknown = settings.verify_data and not has_contents(before)
    if settings.verify_data and not (found and stops):
        now = with_contents(now, _hashed(read, world))
        found = difference(before, now)
    if found and stops:
        raise _changed(run, f"{len(read.source)} images, {found}", resolved, hint=ACCEPT)
    if unknown:
        log.warning("contents were not hashed when the run began: hashed now, for later launches to compare with")
    world.barrier()  # all have compared before one writes
    if found:
        resolved = _with_note(resolved, read.source, found)
        if world.is_main:
            describe(run, settings, resolved)
            with contextlib.suppress(OSError):  # what was bad may have been mended: the account begins anew
                (run.path / BAD_FILES).rename(run.path / f"before-{len(resolved.data_changes)}-{BAD_FILES}")
    if world.is_main and (found or unknown):
        write_whole(run.path / FILE, to_bytes(now))
    return resolved


def same_data(run: Run, images: int, fingerprint: str, *, accept: bool = False) -> None:
    """Refuse to go on with other images than the run began with, for verbs that write none down.

    Raises:
        MaekitError: E-DATA-CHANGED.
    """
    before = run.resolved
    if before is None or before.fingerprint == fingerprint:
        return
    if not accept:
        raise _changed(run, f"{images} images", before, hint="the old images, or another --out")
    log.warning("the images are not those that %s began with: %d now, %d then", run.path, images, before.images)


def _with_note(resolved: Resolved, source: Source, found: Difference) -> Resolved:
    """Return the run's new state, with a note of the change that was accepted."""
    log.warning("going on with other images than before (data_changed: accept): %d images, %s", len(source), found)
    entry: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"), "images": len(source), **found.counts, "first": found.first
    }  # fmt: skip
    update = {"images": len(source), "fingerprint": source.fingerprint()}
    return resolved.model_copy(update={**update, "data_changes": [*resolved.data_changes, entry]})


def _changed(run: Run, found: str, before: Resolved, *, hint: str) -> MaekitError:
    return MaekitError(
        "E-DATA-CHANGED", f"the images are not those that {run.path} began with", found=found,
        expected=f"the same {before.images}", hint=hint,
    )  # fmt: skip


def _hashed(read: Read, world: World) -> list[str]:
    """Return the digests of all images and masks; every process reads its share."""
    count = sum(map(len, read.parts.values()))
    count += len(read.masks.files or ()) if read.masks else 0
    log.info("hashing the contents of %d files", count)
    mine = contents(read.parts, read.masks, slice(world.rank, None, world.size))
    rows = torch.from_numpy(np.frombuffer(bytes.fromhex("".join(mine)), np.uint8).copy()).reshape(-1, 32)
    place = torch.arange(world.rank, count, world.size)
    rows, place = world.gather(rows), world.gather(place)
    return [bytes(row).hex() for row in rows[place.argsort()].numpy()]
