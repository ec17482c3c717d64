"""Checkpoints that either verify or are not there.

A checkpoint is a folder ``step-N`` with safetensors, one JSON and a manifest of SHA-256 sums. It is written into a
temporary folder, every file synced, read back from the disk and compared with what is in memory; then the folder is
renamed and its parent synced: a kill at any instant leaves the old ones untouched (benchmarks/kills.py: 50 of 50 kills
survived with this order, 6 to 44 lost with others). The newest is the highest step that verifies, never the
latest file time. Old ones are deleted only after a newer one is in place. No pickle anywhere. `maekit.train.saver` does
this beside training.

Errors of the disk that may pass (`PASSING`) are tried again, in writing, reading and listing; what stays is one line,
and nothing that was there is lost: what cannot be read is not damaged, and what is damaged is put aside, not deleted.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from maekit.disk import sync
from maekit.errors import MaekitError
from maekit.failpoints import reach
from maekit.settings import FORMAT

log = logging.getLogger("maekit")

T = TypeVar("T")
Tensors = dict[str, Tensor]
MANIFEST = "manifest.json"
STEP = re.compile(r"step-\d+")
ASIDE = "damaged"
"""Folder of a run for what is put aside."""
OWN = "sha256"
"""Where a manifest keeps the sum of all else that it says."""
PASSING = {
    errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.ENOTCONN, errno.EMFILE, errno.ENFILE,
}  # fmt: skip
"""Errors after which the same may succeed: network shares that were away, file descriptors that others held."""
WAITS = (0.1, 0.5, 2.0)
"""Seconds before each new try."""
NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
"""Errors that say what is in a folder, or not; all others say that the disk could not be asked."""
PLAIN = {
    errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "larger than files may be",
    errno.EROFS: "the file system is read-only", errno.EACCES: "no permission", errno.EPERM: "no permission",
    errno.EIO: "the disk fails", errno.ESTALE: "the network share was lost", errno.EMFILE: "too many open files",
    errno.ENFILE: "too many open files on this machine", errno.ENOENT: "the folder is gone",
}  # fmt: skip
"""What an errno means to whoever reads the message; the system's own words stand beside it."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, read into memory (CPU).

    Attributes:
        tensors: by part ("model", "optimizer", "ema"), then by name.
        state: step and whatever else the loop keeps, plain JSON.
    """

    path: Path
    step: int
    tensors: dict[str, Tensors]
    state: dict[str, Any]

    def sha256(self) -> str:
        """Return the digest of what decides the future: all tensors, the step and the loss scaler."""
        return state_sha256(self.tensors, {name: self.state.get(name) for name in DECIDING})


DECIDING = ("step", "scaler")
"""What of the state enters its digest: the losses waiting for a log line do not."""


def state_sha256(tensors: dict[str, Tensors], state: dict[str, Any]) -> str:
    """Digest all tensors by sorted name with dtype and shape, then the state; equal exactly when bit-identical."""
    digest = hashlib.sha256()
    for part in sorted(tensors):
        for name, value in sorted(tensors[part].items()):
            digest.update(f"{part}/{name} {value.dtype} {tuple(value.shape)}\n".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    digest.update(json.dumps(state, sort_keys=True).encode())
    return digest.hexdigest()


def save(
    folder: Path, step: int, tensors: dict[str, Tensors], state: dict[str, Any], *, metadata: dict[str, str],
    keep: int, keep_every: int | None = None,
) -> Path:  # fmt: skip
    """Write ``folder/step-N`` so that it is whole and verified, or absent; then delete those that need not stay.

    Args:
        keep: newest ones that stay.
        keep_every: those of its multiples stay, too.

    Raises:
        MaekitError: E-STOP-DISK if writing failed and a verified checkpoint remains (the run can go on from it),
            E-ENV-DISK if none does.
    """
    try:
        final = _patiently(
            lambda: _write(folder, step, tensors, state, metadata), "a checkpoint cannot be saved", iter(WAITS)
        )
    except OSError as error:
        raise _cannot_write(folder, tensors, error) from error
    try:
        put_later_aside(folder, step)
        prune(folder, keep, keep_every)
    except OSError as error:  # the new one is there; the next save tries again
        log.warning("old checkpoints cannot be deleted: %s", told(error))
    except MaekitError as error:
        log.warning("old checkpoints cannot be deleted: %s", error)
    return final


def _patiently(work: Callable[[], T], what: str, waits: Iterator[float]) -> T:
    """Do it, again after errors that may pass.

    Args:
        what: cannot be done, for the line.
        waits: seconds before each new try; what is done one after the other shares them.

    Raises:
        OSError: one that stays.
    """
    while True:
        try:
            return work()
        except OSError as error:
            wait = next(waits, None) if error.errno in PASSING else None
            if wait is None:
                raise
            log.warning("%s (%s), once more in %.1f s", what, told(error), wait)
            time.sleep(wait)


def _write(
    folder: Path, step: int, tensors: dict[str, Tensors], state: dict[str, Any], metadata: dict[str, str]
) -> Path:
    final, temporary = folder / f"step-{step}", folder / f".tmp-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        sums = {f"{part}.safetensors": _write_tensors(temporary, part, tensors[part], metadata) for part in tensors}
        sums["state.json"] = _write_json(temporary / "state.json", {**state, "step": step})
        facts = {"format": FORMAT, "step": step, "files": sums}
        _write_json(temporary / MANIFEST, {**facts, OWN: _sum_of(facts)}, indent=1)
        sync(temporary)
        reach("checkpoint-synced")
        if final.exists():
            _make_way(final)
        temporary.rename(final)
        reach("checkpoint-renamed")
        sync(folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    reach("checkpoint-saved")
    return final


def prune(folder: Path, keep: int, keep_every: int | None = None) -> None:
    """Delete all but the newest `keep` and the multiples of `keep_every`."""
    for old in steps(folder)[keep:]:
        if not keep_every or number(old) % keep_every:
            delete(old)


def put_later_aside(folder: Path, step: int) -> None:
    """Put aside those of later steps than the one that a run has gone on from or has come to.

    Raises:
        MaekitError: E-ENV-OUT, E-CKPT-READ.
    """
    for path in [path for path in steps(folder) if number(path) > step]:
        try:
            _make_way(path)
        except OSError as error:
            raise MaekitError("E-ENV-OUT", f"{path} cannot be put aside", found=told(error)) from error


def _make_way(path: Path) -> None:
    """Put aside one that did not verify, or the run would have gone on from it."""
    place = set_aside(path.parent.parent, path)
    log.warning("%s, which was not gone on from, now lies in %s", path, place)


def set_aside(run: Path, path: Path, *, dry: bool = False) -> Path:
    """Move a file or folder to the same place under ``damaged`` of the run, where nothing is deleted; return that."""
    place = run / ASIDE / path.relative_to(run)
    number = 1
    while place.exists():
        place, number = place.with_name(f"{path.name}.{number}"), number + 1
    if not dry:
        place.parent.mkdir(parents=True, exist_ok=True)
        path.rename(place)
    return place


def load(path: Path, waits: Iterator[float] | None = None) -> Checkpoint:
    """Read and verify one checkpoint.

    Args:
        waits: before new tries at what cannot be read; default: `WAITS`.

    Raises:
        MaekitError: E-CKPT-MISSING, E-CKPT-FORMAT (written by a newer maekit) or E-CKPT-DAMAGED, naming the file;
            E-CKPT-READ where the disk fails, which says nothing of what is on it.
    """

    def read() -> tuple[dict[str, bytes], int]:
        files, step = _manifest(path)
        return {name: _read(path, name, files[name]) for name in files}, step

    contents, step = _asked(path, read, waits)
    if "state.json" not in contents or "model.safetensors" not in contents:
        raise _damaged(path / MANIFEST, "an incomplete list of files")
    try:  # sums that match say who wrote a file, not that it makes sense
        state = dict(json.loads(contents.pop("state.json")))
        tensors = {name.removesuffix(".safetensors"): safetensors.torch.load(data) for name, data in contents.items()}
    except (ValueError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        raise _damaged(path, f"contents that cannot be read: {error}") from error
    if state.get("step") != step:
        raise _damaged(path / "state.json", f"step {state.get('step')} in a checkpoint of step {step}")
    return Checkpoint(path, step, tensors, state)


def sizes(path: Path) -> None:
    """Compare sizes alone with the manifest: quick, and finds what is missing or cut off.

    Raises:
        MaekitError: as `load`.
    """

    def compare() -> None:
        files, _ = _manifest(path)
        for name in files:
            _sized(path, name, files[name])

    _asked(path, compare)


def _asked(path: Path, ask: Callable[[], T], waits: Iterator[float] | None = None) -> T:
    """Return what `ask` finds out of a checkpoint; tell a disk that fails from a file that is wrong."""
    try:
        return _patiently(ask, f"{path} cannot be read", iter(WAITS) if waits is None else waits)
    except MaekitError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a manifest with a name that no file can have
        if isinstance(error, OSError) and error.errno not in NO_FILE:
            raise _unread(f"checkpoint {path}", error) from error
        raise _damaged(path, f"a file that cannot be read: {error}") from error


def _unread(what: str, error: OSError) -> MaekitError:
    hint = "the same command when the disk answers; nothing was deleted"
    return MaekitError("E-CKPT-READ", what, found=told(error), expected="what can be read", hint=hint)


def _manifest(path: Path) -> tuple[dict[str, Any], int]:
    """Return what the manifest says of each file, and the step."""
    reach("checkpoint-read")
    try:
        data = (path / MANIFEST).read_bytes()
    except FileNotFoundError as error:
        raise MaekitError("E-CKPT-MISSING", f"checkpoint {path}", found=f"no {MANIFEST}") from error
    try:
        manifest = json.loads(data)
        written, step = manifest["format"], int(manifest["step"])
        files = {name: dict(facts) for name, facts in manifest["files"].items()}
        own = manifest.pop(OWN)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise _damaged(path / MANIFEST, "not a readable manifest") from error
    if not isinstance(written, int) or written > FORMAT:
        raise MaekitError(
            "E-CKPT-FORMAT",
            f"checkpoint {path}",
            found=f"format {written}",
            expected=f"at most {FORMAT}",
            hint="a newer maekit",
        )
    if own != _sum_of(manifest):
        raise _damaged(path / MANIFEST, "another SHA-256 than its own")
    if STEP.fullmatch(path.name) and number(path) != step:
        raise _damaged(path, f"the checkpoint of step {step} under this name")
    return files, step


def _sum_of(facts: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest's facts: a flipped bit in a number of it would pass otherwise."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def not_finite(tensors: dict[str, Tensors]) -> str | None:
    """Return the name of the first weights, or average of them, that are not all finite."""
    named = (item for part in ("model", "ema") for item in tensors.get(part, {}).items())
    return next((name for name, value in named if not bool(value.isfinite().all())), None)


def sound(path: Path, run: str = "", waits: Iterator[float] | None = None) -> Checkpoint:
    """Read and verify a checkpoint that training can go on from.

    Args:
        run: identity of the run that it has to be of; a checkpoint that keeps none, of an older release, is of any.
        waits: as of `load`.

    Raises:
        MaekitError: as `load`; E-CKPT-RUN, E-CKPT-NAN.
    """
    found = load(path, waits)
    theirs = found.state.get("run") or run
    if run and theirs != run:
        raise MaekitError(
            "E-CKPT-RUN", f"checkpoint {path}", found=f"one of another run ({theirs})", expected=f"this run's ({run})",
            hint="back to the run that it came from",
        )  # fmt: skip
    if lost := not_finite(found.tensors):
        raise MaekitError(
            "E-CKPT-NAN", f"checkpoint {path}", found=f"NaN or infinity in {lost}", expected="finite numbers"
        )
    return found


def newest(folder: Path, run: str = "") -> Checkpoint | None:
    """Return the highest step that verifies and is finite; pass over others with a line each. None: there are none.

    Args:
        run: identity of the run, as of `sound`; empty: any.

    Changes nothing on the disk: another process may be in the middle of a save.

    Raises:
        MaekitError: E-CKPT-FORMAT if a newer maekit wrote it; where there are some and none verifies, which is not the
            same as none, E-CKPT-READ if one, or the folder, cannot be read, otherwise E-CKPT-DAMAGED.
    """
    waits, faults = iter(WAITS), list[MaekitError]()
    for path in steps(folder):
        try:
            found = sound(path, run, waits)
        except MaekitError as error:
            if error.code == "E-CKPT-FORMAT":
                raise
            if path.exists():  # not one that was deleted meanwhile by the process that trains
                faults.append(error)
        else:
            for fault in faults:
                log.warning("checkpoint passed over: %s", fault)
            return found
    if unread := [fault for fault in faults if fault.code == "E-CKPT-READ"]:
        raise unread[0]
    if faults:
        fault = str(faults[0].args[0]).partition(". Try: ")[0]
        raise MaekitError(
            "E-CKPT-DAMAGED", f"checkpoints in {folder}", found=f"{len(faults)} and none verifies; the newest: {fault}",
            hint=f"maekit ckpt repair {folder.parent} puts them aside, then the run begins anew; or another --out",
        )  # fmt: skip
    return None


def delete_leftovers(folder: Path) -> None:
    """Delete what a kill in the middle of a save left; only for the one process that may write here."""
    for leftover in leftovers(folder):
        log.warning("deleted the rest of an interrupted save: %s", leftover.name)
        shutil.rmtree(leftover, ignore_errors=True)


def leftovers(folder: Path) -> list[Path]:
    """Return what a kill in the middle of a save left.

    Raises:
        MaekitError: E-CKPT-READ.
    """
    return [path for path in _folders(folder) if path.name.startswith(".tmp-")]


def steps(folder: Path) -> list[Path]:
    """Return the ``step-N`` folders, verified or not, newest first by number.

    Raises:
        MaekitError: E-CKPT-READ if it cannot be known what is there; a folder that is not there has none.
    """
    found = [p for p in _folders(folder) if STEP.fullmatch(p.name)]
    return sorted(found, key=number, reverse=True)


def _folders(folder: Path) -> list[Path]:
    """Return the folders in a folder. `Path.glob` would not do: where it may not look, it finds nothing."""

    def look() -> list[Path]:
        reach("checkpoint-list")
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir())

    try:
        return _patiently(look, f"{folder} cannot be listed", iter(WAITS))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unread(f"checkpoints in {folder}", error) from error


def number(path: Path) -> int:
    """Return N of ``step-N``."""
    return int(path.name.removeprefix("step-"))


def _write_tensors(folder: Path, part: str, named: Tensors, metadata: dict[str, str]) -> dict[str, Any]:
    """Write one file of tensors and read it back: its sum is that of bytes that were on the disk and are right."""
    path = folder / f"{part}.safetensors"
    path.open("xb").close()
    mode = path.stat().st_mode  # as the umask has it: safetensors would make it 0600
    ours = {name: value.detach().cpu().contiguous() for name, value in named.items()}
    reach("checkpoint-opened")
    try:
        # lets other threads run, unlike `save`; an empty part with empty metadata would be written as no JSON (0.8)
        safetensors.torch.save_file(ours, path, metadata or None)
    except safetensors.SafetensorError as error:
        raise _as_os_error(error, path) from error
    path.chmod(mode)
    reach("checkpoint-written")
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # so that what is read comes from the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
    theirs = safetensors.torch.load_file(path)
    if reach("checkpoint-read-back") or not all(_same_bits(ours[name], theirs[name]) for name in ours):
        raise OSError(errno.EIO, "what was read back is not what was written", str(path))
    return {"bytes": size, "sha256": digest}


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(*(one.reshape(-1).view(torch.uint8) for one in (a, b)))


def _as_os_error(error: safetensors.SafetensorError, path: Path) -> OSError:
    """Return the error of the system that safetensors tells in words."""
    found = re.search(r"os error (\d+)", str(error))
    number = int(found[1]) if found else errno.EIO
    return OSError(number, os.strerror(number) if found else str(error), str(path))


def _write_json(path: Path, value: dict[str, Any], indent: int | None = None) -> dict[str, Any]:
    data = json.dumps(value, indent=indent).encode()
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        reach("checkpoint-written")
        os.fsync(file.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _sized(folder: Path, name: str, expected: dict[str, Any]) -> None:
    try:
        found = (folder / name).stat() if Path(name).name == name else None
    except FileNotFoundError:
        found = None
    if found is None or not stat.S_ISREG(found.st_mode):
        raise _damaged(folder / name, "no such file")
    size = found.st_size
    if size != expected.get("bytes"):
        raise _damaged(folder / name, f"{size} bytes, the manifest says {expected.get('bytes')}")


def _read(folder: Path, name: str, expected: dict[str, Any]) -> bytes:
    _sized(folder, name, expected)
    data = (folder / name).read_bytes()
    if hashlib.sha256(data).hexdigest() != expected.get("sha256"):
        raise _damaged(folder / name, "another SHA-256 than the manifest's")
    return data


def delete(path: Path) -> None:
    """Delete a checkpoint: renamed first, so that a kill in the middle leaves rubbish with a name, not half of one."""
    doomed = path.with_name(f".tmp-{uuid.uuid4().hex}")
    path.rename(doomed)
    reach("checkpoint-pruned")
    shutil.rmtree(doomed, ignore_errors=True)


def _damaged(path: Path, found: str) -> MaekitError:
    return MaekitError("E-CKPT-DAMAGED", f"checkpoint file {path}", found=found, hint="the previous checkpoint")


def _cannot_write(folder: Path, tensors: dict[str, Tensors], error: OSError) -> MaekitError:
    needed = sum(v.numel() * v.element_size() for named in tensors.values() for v in named.values())
    free, remains, hint = "", None, "free some space; nothing had been saved yet"
    with contextlib.suppress(OSError):
        free = f", {_size(shutil.disk_usage(folder).free)} free"
    try:
        remains = newest(folder)
    except MaekitError as fault:
        hint = f"mend the disk: what was saved before cannot be gone on from either ({fault.code})"
    what = f"cannot save a checkpoint in {folder}"
    found = f"{told(error)} ({_size(needed)} needed{free})"
    if remains is None:
        return MaekitError("E-ENV-DISK", what, found=found, hint=hint)
    return MaekitError(
        "E-STOP-DISK",
        what,
        found=found,
        hint=f"free some space, then the same command goes on from {remains.path.name}",
    )


def _size(count: int) -> str:
    """Return bytes in the largest unit in which they are 10 or more, rounded down."""
    unit, name = next(
        ((u, n) for u, n in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")) if count >= 10 * u), (1, "bytes")
    )
    return f"{count // unit:,} {name}"


def told(error: OSError) -> str:
    """Return what an error of the system means, in plain words and in its own."""
    own = error.strerror or str(error)
    plain = PLAIN.get(error.errno or 0)
    return f"{plain}: {own}" if plain else own
