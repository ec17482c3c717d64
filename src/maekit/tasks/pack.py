"""Write a data set once as something that reads fast; every verb then takes the folder as ``--data``.

The images are cut into shards, in the order of the source. A shard is written, read back from the disk and compared
before it counts; beside it a small file says what it holds. All of it lies in ``.OUT.parts`` until the last shard is
there, then the folder gets its name: OUT is whole or absent. The same command goes on after the shards that are there,
with the same bytes for any number of threads, stops and kills. Of other images or settings a folder is refused, never
overwritten.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from maekit.config import spell
from maekit.data.bad_images import FILE as BAD_FILES
from maekit.data.bad_images import BadImages
from maekit.data.check import LIMIT
from maekit.data.packing import Piece, Shard, Way, cut, digest_of, pack_image, psnr, write_shard
from maekit.data.samples import WAITS, may_pass
from maekit.data.sources import VAL_NAMES, Form, Source, open_source, parts_of
from maekit.disk import sync
from maekit.errors import MaekitError
from maekit.failpoints import reach
from maekit.report.files import write_whole
from maekit.settings import Pack
from maekit.signals import Noted, noting
from maekit.tasks import Result
from maekit.tasks.feature_cache import changes_of
from maekit.tasks.run_folder import LOCK, alone, outside, typed
from maekit.tasks.streamed import Progress, full_disk_stops, stopped_after

log = logging.getLogger("maekit")

FILE = "pack.json"
"""In OUT: what was packed and how, and the SHA-256 of every file. In the unfinished folder: what is being packed."""
SHARD_BYTES = 2**27
"""Bytes of a file, about; so much is done again after a kill, and two or three times as much is in memory."""
MOST_IN_SHARD = 2**15
"""Images of a file of tiny ones."""
LOOKED_AT = 64
"""Images that are packed beforehand, to know how large it will be."""
MARGIN = 1.05
"""Of the space that is asked for."""
MOST_THREADS = 16


@dataclass
class Counts:
    """What the images of a shard, or of all, came to; bytes are those of images alone."""

    images: int = 0
    before: int = 0
    after: int = 0
    kept: int = 0
    noisy: int = 0
    decibels: float = 0.0

    def add(self, piece: Piece) -> None:
        """Count an image."""
        self.images += 1
        self.before += piece.before
        self.after += piece.size
        self.kept += piece.kept
        if piece.noise:
            self.noisy += 1
            self.decibels += psnr(piece.noise)

    def merge(self, other: "Counts") -> None:
        """Count a shard."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def psnr(self) -> float | None:
        """Mean over images that changed; None if none did."""
        return self.decibels / self.noisy if self.noisy else None


@dataclass(frozen=True)
class Job:
    """What is packed.

    Attributes:
        way: how.
        sources: images of each part, by its name on the disk.
        about: what decides the bytes, as JSON; of a shard that is found it must be the same.
        shape: height, width and channels with format raw.
        shards: in order of parts and images.
        size: bytes that all will take, about.
    """

    way: Way
    sources: dict[str, Source]
    about: dict[str, Any]
    shape: tuple[int, int, int] | None = None
    shards: list[Shard] = field(default_factory=list)
    size: int = 0

    @property
    def images(self) -> int:
        """How many there are."""
        return sum(map(len, self.sources.values()))

    @property
    def names(self) -> list[str]:
        """Names of all images, after their part where there are several."""
        several = len(self.sources) > 1
        return [f"{part}/{name}" if several else name for part, one in self.sources.items() for name in one.ids]

    def place(self, shard: Shard) -> range:
        """Return the numbers of a shard's images among all."""
        starts = dict(zip(self.sources, accumulate(map(len, self.sources.values()), initial=0), strict=False))
        first = starts[shard.part]
        return range(first + shard.rows.start, first + shard.rows.stop)


def pack(settings: Pack | dict[str, Any]) -> Result:
    """Pack a data set, or go on with what was stopped.

    Returns:
        out, images, parts, files, skipped, bytes_before, bytes_after, kept (byte for byte), psnr (mean over those that
        changed, None if none did), images_per_second, seconds; exit code 75 if stopped: out, images, of.

    Raises:
        MaekitError: E-USAGE-DATA, E-USAGE-OUT, E-CONFIG-IDLE, E-CONFIG-OUT, E-CONFIG-RUN (other images or settings),
            E-CONFIG-SIZE (format raw of several sizes), E-DATA-, E-ENV-DISK, E-ENV-OUT, E-ENV-BUSY, E-STOP-DISK.
    """
    settings = typed(Pack, settings)
    _check(settings)
    assert settings.data is not None and settings.out is not None
    out = settings.out if settings.out.name not in ("", "..") else settings.out.resolve()
    way = Way(settings.format, settings.quality, settings.short_side, settings.square, settings.channels,
              settings.recompress)  # fmt: skip
    if (known := _read(Path(settings.data) / FILE, result=dict)) and known["about"]["way"] == asdict(way):
        return Result(known["result"], f"{settings.data} is packed in this way: nothing to do")
    job = _job(settings, way, _sources(settings))
    if (found := _finished(out, job)) is not None:
        return Result(found, f"{out} is there: nothing to do")
    folder = out.with_name(f".{out.name}.parts")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MaekitError("E-ENV-OUT", f"cannot write {out}", found=error.strerror or error) from error
    with alone(folder), noting("stopping", settles=True) as signals, _one_thread():
        try:
            with full_disk_stops(out, lambda: any(folder.glob("*.parquet"))):
                return _packed(settings, job, folder, out, signals)
        finally:
            if folder.exists() and not any(folder.glob("*.parquet")):
                shutil.rmtree(folder, ignore_errors=True)


def _check(settings: Pack) -> None:
    """Refuse settings that have no part."""
    if settings.data is None:
        raise MaekitError("E-USAGE-DATA", "no images named", hint="maekit pack PATH --out FOLDER")
    if settings.out is None:
        raise MaekitError("E-USAGE-OUT", "no folder named", hint=f"maekit pack {settings.data} --out FOLDER")
    outside(settings.out, settings.data)
    for name, has in (("quality", ("jpeg", "webp")), ("recompress", ("jpeg", "webp", "png"))):
        value = settings.model_dump()[name]
        if value != Pack.model_fields[name].default and settings.format not in has:
            raise MaekitError(
                "E-CONFIG-IDLE", f"setting {name}", found=f"{spell(value)} with format {settings.format}",
                expected=f"format {' or '.join(has)}", hint=f"no --{name}",
            )  # fmt: skip


def _sources(settings: Pack) -> dict[str, Source]:
    """Return the parts on disk, or all images, by the name that their files get."""
    assert settings.data is not None
    how: dict[str, Any] = {"image_column": settings.image_column, "label_column": settings.label_column}
    if settings.task != "classes":
        how["form"] = Form(settings.task, settings.label_separator)
    parts = parts_of(settings.data)
    if "val" not in parts:
        return {"images": open_source(settings.data, "train-or-all", **how)}
    name = next((n for n in sorted(VAL_NAMES, key=len, reverse=True) if parts["val"][0].name.startswith(n)), "val")
    train = open_source(settings.data, "train-or-all", **how)
    if train.targets is not None:  # tags are those of train, in their order
        how["classes"] = train.targets.names
    return {"train": train, name: open_source(settings.data, "val-or-all", **how)}


def _job(settings: Pack, way: Way, sources: dict[str, Source]) -> Job:
    about = {
        "way": asdict(way),
        "shard_images": settings.shard_images,
        "task": settings.task,
        "parts": {part: {"images": one.fingerprint(), "labels": _labels(one)} for part, one in sources.items()},
        "changes": {part: changes_of(one) for part, one in sources.items()},
    }
    return Job(way, sources, json.loads(json.dumps(about)))


def _labels(source: Source) -> str:
    """Return a digest of classes and labels; tags and numbers are in the fingerprint of the images."""
    labels = None if source.labels is None else list(map(int, source.labels))
    return hashlib.sha256(json.dumps([source.classes, labels]).encode("utf-8", "surrogatepass")).hexdigest()


def _finished(out: Path, job: Job) -> dict[str, Any] | None:
    """Return what an earlier launch found, None where nothing is there.

    Raises:
        MaekitError: E-CONFIG-OUT, E-CONFIG-RUN.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    known = _read(out / FILE, result=dict)
    if known is None:
        raise MaekitError(
            "E-CONFIG-OUT", f"--out {out}", found="a file" if out.is_file() else "files that are no packed data",
            expected="a folder that maekit pack made, or nothing yet", hint="another --out",
        )  # fmt: skip
    # where the images lie and when they were written may change: they are packed
    _same(out, {**known["about"], "changes": None}, {**job.about, "changes": None})
    return {**known["result"], "out": str(out)}


def _same(where: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse what holds other images, or was packed with other settings.

    Raises:
        MaekitError: E-CONFIG-RUN.
    """
    if before == now:
        return
    told = [
        f"{name} {spell(before['way'].get(name))} -> {spell(value)}"
        for name, value in now["way"].items()
        if before["way"].get(name) != value
    ]
    told += [f"{name} {before.get(name)} -> {now[name]}" for name in ("shard_images", "task")
             if before.get(name) != now[name]]  # fmt: skip
    raise MaekitError(
        "E-CONFIG-RUN", f"{where} was packed otherwise", found="; ".join(told) or "other images or labels",
        expected="the same images and settings", hint=f"another --out, or delete {where}",
    )  # fmt: skip


def _read(file: Path, **needs: type) -> dict[str, Any] | None:
    """Return what a file of this verb says, None if it is none or lacks one of `needs`."""
    try:
        known = json.loads(file.read_bytes())
        right = isinstance(known["about"]["way"], dict) and all(type(known[name]) is one for name, one in needs.items())
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return known if right else None


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute in one thread: there are as many of ours as cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _threads(settings: Pack) -> int:
    if settings.workers != "auto":
        return max(1, settings.workers)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_THREADS, cores)


# ----------------------------------------------------------------------------------------------------- planning


def _planned(settings: Pack, job: Job, folder: Path) -> Job:
    """Return the job cut into shards: as it was cut before, or as some images let expect.

    Raises:
        MaekitError: E-CONFIG-RUN if other work is in the folder, E-ENV-DISK if there is no room for this.
    """
    begun = any(folder.glob("*.parquet"))
    known = _read(folder / FILE, rows=int, each=float) if begun else None
    if known is not None:
        _same(folder, known["about"], job.about)
        rows, shape, each = known["rows"], known.get("shape"), known["each"]
    else:
        first, each = _looked_at(job)
        shape = first.data.shape if first is not None and not isinstance(first.data, bytes) else None
        rows = settings.shard_images
        if rows == "auto":
            rows = min(MOST_IN_SHARD, max(1, int(SHARD_BYTES / each)))
        text = json.dumps({"about": job.about, "rows": rows, "shape": shape, "each": each}, indent=1)
        write_whole(folder / FILE, text.encode())
    shards = [shard for part, one in job.sources.items() for shard in cut(part, len(one), rows)]
    shape = None if shape is None else (shape[0], shape[1], shape[2])
    return Job(job.way, job.sources, job.about, shape, shards, int(job.images * (each + 40)))


def _looked_at(job: Job) -> tuple[Piece | None, float]:
    """Return the first readable image, packed, and how many bytes one of them takes."""
    places = [(one, i) for one in job.sources.values() for i in _spaced(len(one), LOOKED_AT)]
    pieces = [piece for one, i in places if isinstance(piece := _piece(one, i, job.way), Piece)]
    if not pieces:
        return None, 1e5
    return pieces[0], max(1.0, sum(piece.size for piece in pieces) / len(pieces))


def _spaced(count: int, wanted: int) -> list[int]:
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]


def _room(job: Job, folder: Path, there: int) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        MaekitError: E-ENV-DISK.
    """
    needed, free = int((job.size - there) * MARGIN), shutil.disk_usage(folder).free
    log.info("about %s to write, %s free", _bytes(max(0, needed)), _bytes(free))
    if needed > free:
        raise MaekitError(
            "E-ENV-DISK", f"room for {job.images} packed images", found=f"{_bytes(free)} free",
            expected=f"about {_bytes(needed)}", hint="a smaller --short-side or --quality, or another --out",
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ packing


def _packed(settings: Pack, job: Job, folder: Path, out: Path, signals: Noted) -> Result:
    """Write the shards that are missing; give the folder its name when all are there."""
    if (known := _read(folder / FILE, result=dict)) is not None:  # killed just before the end
        _same(folder, known["about"], job.about)
        _take_place(folder, out)
        return Result({**known["result"], "out": str(out)}, f"{out} is complete")
    job = _planned(settings, job, folder)
    bad = BadImages(job.names, settings.bad_images, looked_at=LIMIT, file=folder / BAD_FILES)
    (folder / BAD_FILES).unlink(missing_ok=True)
    records = {n: found for n, shard in enumerate(job.shards) if (found := _verified(folder, shard)) is not None}
    _room(job, folder, sum(record["size"] for record in records.values()))
    for record in records.values():
        bad.book([(index, reason) for index, reason in record["bad"]], record["seen"])
    ranges = [shard.rows for shard in job.shards]
    progress = Progress("pack", ranges, set(records))
    if not _write_missing(job, folder, records, bad, progress, signals, _threads(settings)):
        return stopped_after(sum(len(ranges[n]) for n in records), job.images, signals, out=str(out))
    progress.close()
    result = _told(out, job, records, progress)
    files = [name for n in sorted(records) for name in records[n]["files"].items()]
    text = json.dumps({"about": job.about, "result": result.metrics, "files": dict(files)}, indent=1)
    write_whole(folder / FILE, text.encode())
    _take_place(folder, out)
    return result


def _write_missing(
    job: Job, folder: Path, records: dict[int, dict[str, Any]], bad: BadImages, progress: Progress, signals: Noted,
    threads: int,
) -> bool:  # fmt: skip
    """Write what is missing and note it in `records`; return whether it came to the end.

    A thread of its own writes a shard while the next one is packed.
    """
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    writer = ThreadPoolExecutor(1)
    writing: tuple[int, Future[dict[str, Any]]] | None = None

    def written() -> None:
        nonlocal writing
        if writing is not None:
            records[writing[0]] = writing[1].result()
            writing = None

    try:
        for number, shard in enumerate(job.shards):
            if number in records:
                continue
            pieces, record = _made(job, shard, pool, bad, progress, signals)
            written()
            if signals.received is not None:
                return False
            writing = number, writer.submit(_write, job, folder, shard, pieces, record)
        written()
        return True
    except OSError as error:
        raise MaekitError("E-ENV-OUT", f"cannot write in {folder}", found=error.strerror or error) from error
    finally:
        pool.shutdown(cancel_futures=True)
        writer.shutdown(cancel_futures=True)


def _made(
    job: Job, shard: Shard, pool: ThreadPoolExecutor, bad: BadImages, progress: Progress, signals: Noted
) -> tuple[list[tuple[int, Piece]], dict[str, Any]]:
    """Pack the images of a shard; return those that can be read with their indices, and what is said of the shard.

    Raises:
        MaekitError: E-DATA-BAD, E-CONFIG-SIZE.
    """
    source, counts = job.sources[shard.part], Counts()
    pieces, missing = list[tuple[int, Piece]](), list[tuple[int, str]]()
    found = pool.map(lambda i: _piece(source, i, job.way), shard.rows)
    for i, place, piece in zip(shard.rows, job.place(shard), found, strict=True):
        if signals.received is not None:
            break
        progress.add(1)
        if isinstance(piece, str):
            missing.append((place, piece))
        else:
            _fits(piece, job.shape, source.ids[i])
            counts.add(piece)
            pieces.append((i, piece))
        bad.book(missing[-1:] if isinstance(piece, str) else [], 1)
    return pieces, {"bad": missing, "seen": len(shard.rows), "counts": asdict(counts)}


def _piece(source: Source, i: int, way: Way) -> Piece | str:
    """Return image `i`, packed, or what is wrong with it; a file system's error that may pass is waited for."""
    for wait in (*WAITS, None):
        try:
            return pack_image(source.read(i), way, source.ids[i])
        except MaekitError as error:
            if isinstance(error.__cause__, MemoryError):
                raise MaekitError("E-ENV-MEMORY", "no memory to pack images", found=f"none for {source.ids[i]}",
                                  hint="fewer --workers, fewer --shard-images") from error  # fmt: skip
            if error.code != "E-DATA-IMAGE":
                raise
            if wait is None or not may_pass(error):
                return str(error.args[0])
            time.sleep(wait)
    raise AssertionError("the last try returns")


def _fits(piece: Piece, shape: tuple[int, int, int] | None, name: str) -> None:
    """Refuse an image of another size than the first where all must have one.

    Raises:
        MaekitError: E-CONFIG-SIZE.
    """
    if shape is None or isinstance(piece.data, bytes) or piece.data.shape == shape:
        return
    raise MaekitError(
        "E-CONFIG-SIZE", f"image {name} for format raw",
        found=" x ".join(map(str, piece.data.shape)), expected=f"{' x '.join(map(str, shape))} as the first",
        hint="--square and a --short-side that none is smaller than, --channels, or another --format",
    )  # fmt: skip


def _write(
    job: Job, folder: Path, shard: Shard, pieces: Sequence[tuple[int, Piece]], record: dict[str, Any]
) -> dict[str, Any]:
    """Write a shard and then what it holds: only with this it counts."""
    reach("pack-shard")
    files = write_shard(folder, shard, job.sources[shard.part], pieces, job.shape)
    size = sum((folder / name).stat().st_size for name in files)
    record = {**record, "files": files, "size": size}
    write_whole(_record_of(folder, shard), json.dumps(record).encode())
    return record


def _record_of(folder: Path, shard: Shard) -> Path:
    return folder / f"{shard.stem}.json"


def _verified(folder: Path, shard: Shard) -> dict[str, Any] | None:
    """Return what is said of a shard that is there with the bytes that were written, None if it is not."""
    try:
        record = json.loads(_record_of(folder, shard).read_bytes())
        wrong = next((name for name, digest in record["files"].items() if digest_of(folder / name) != digest), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if wrong is None:
        return record
    log.warning("packed anew: %s holds other bytes than were written (SHA-256)", folder / wrong)
    return None


def _take_place(folder: Path, out: Path) -> None:
    """Tidy a complete folder up and give it its name.

    Raises:
        MaekitError: E-ENV-OUT.
    """
    try:
        for record in folder.glob("*-of-*.json"):
            record.unlink()
        reach("pack-finish")
        folder.replace(out)
        (out / LOCK).unlink(missing_ok=True)
        sync(out.parent)
    except OSError as error:
        raise MaekitError("E-ENV-OUT", f"cannot write {out}", found=error.strerror or error) from error


# ------------------------------------------------------------------------------------------------------ telling


def _told(out: Path, job: Job, records: dict[int, dict[str, Any]], progress: Progress) -> Result:
    total, parts = Counts(), dict.fromkeys(job.sources, 0)
    for number in sorted(records):
        counts = Counts(**records[number]["counts"])
        total.merge(counts)
        parts[job.shards[number].part] += counts.images
    done = progress.total - progress.first
    metrics: dict[str, Any] = {
        "out": str(out),
        "images": total.images,
        "parts": parts,
        "files": len(job.shards),
        "skipped": job.images - total.images,
        "bytes_before": total.before,
        "bytes_after": total.after,
        "kept": total.kept,
        "psnr": None if total.psnr is None else round(total.psnr, 2),
        "images_per_second": round(done / max(1e-9, progress.seconds), 1),
        "seconds": round(progress.seconds, 1),
    }
    named = f" ({', '.join(f'{part} {count:,}' for part, count in parts.items())})" if len(parts) > 1 else ""
    skipped = f"; {metrics['skipped']:,} skipped, in {BAD_FILES}" if metrics["skipped"] else ""
    form = f"{job.way.format} {job.way.quality}" if job.way.format in ("jpeg", "webp") else job.way.format
    quality = "no pixel changed" if total.psnr is None else f"PSNR {total.psnr:.1f} dB on average"
    share = f" ({total.after / total.before:.0%})" if total.before else ""
    lines = [
        f"{out}: {total.images:,} images{named} in {len(job.shards):,} files{skipped}",
        f"{_bytes(total.before)} -> {_bytes(total.after)}{share}; {total.kept:,} kept byte for byte, "
        f"{total.images - total.kept:,} encoded as {form}: {quality}",
        f"{metrics['images_per_second']:,.0f} images a second; take it as --data {out}",
    ]
    return Result(metrics, "\n".join(lines))


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
