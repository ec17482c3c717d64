"""Checkpoints that either verify or are not there.

A checkpoint is a folder ``step-N`` with safetensors, one JSON and a manifest of SHA-256 sums. It is written into a
temporary folder, every file synced, the folder renamed and its parent synced: a kill at any instant leaves the old
ones untouched (reliability: 50 of 50 kills survived with this order, 4 to 50 lost with others). The newest is the
highest step that verifies, never the latest file time. Old ones are deleted only after a newer one is in place.
No pickle anywhere.
"""

import hashlib
import json
import logging
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from maekit.errors import MaekitError
from maekit.settings import FORMAT

log = logging.getLogger("maekit")

Tensors = dict[str, Tensor]
MANIFEST = "manifest.json"


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
    folder: Path, step: int, tensors: dict[str, Tensors], state: dict[str, Any], *, metadata: dict[str, str], keep: int
) -> Path:
    """Write ``folder/step-N`` so that it is whole or absent, then delete all but the newest `keep`.

    Raises:
        MaekitError: E-STOP-DISK if writing failed and a verified checkpoint remains (the run can go on from it),
            E-ENV-DISK if none does.
    """
    final, temporary = folder / f"step-{step}", folder / f".tmp-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        sums = {}
        for part, named in tensors.items():
            data = safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in named.items()}, metadata)
            sums[f"{part}.safetensors"] = _write(temporary / f"{part}.safetensors", data)
        sums["state.json"] = _write(temporary / "state.json", json.dumps({**state, "step": step}).encode())
        manifest = {"format": FORMAT, "step": step, "files": sums}
        _write(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
        _sync(temporary)
        if final.exists():  # one that did not verify, or the run would have gone on from it
            _delete(final)
        temporary.rename(final)
        _sync(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _cannot_write(folder, tensors, error) from error
    others = _steps(folder)
    later = [path for path in others if _number(path) > step]  # none verified, or the run would have gone on from it
    for old in later + [path for path in others if path not in later][keep:]:
        _delete(old)
    return final


def load(path: Path) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        MaekitError: E-CKPT-MISSING, E-CKPT-FORMAT (written by a newer maekit) or E-CKPT-DAMAGED, naming the file.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        written, step = manifest["format"], int(manifest["step"])
        files = {name: dict(expected) for name, expected in manifest["files"].items()}
    except FileNotFoundError as error:
        raise MaekitError("E-CKPT-MISSING", f"checkpoint {path}", found=f"no {MANIFEST}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise _damaged(path / MANIFEST, "not a readable manifest") from error
    if not isinstance(written, int) or written > FORMAT:
        raise MaekitError(
            "E-CKPT-FORMAT",
            f"checkpoint {path}",
            found=f"format {written}",
            expected=f"at most {FORMAT}",
            hint="a newer maekit",
        )
    try:
        contents = {name: _read(path, name, files[name]) for name in files}
    except (OSError, ValueError) as error:  # a manifest with a name that no file can have; a disk that fails
        if isinstance(error, MaekitError):
            raise
        raise _damaged(path, f"a file that cannot be read: {error}") from error
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


def newest(folder: Path) -> Checkpoint | None:
    """Return the highest step that verifies; pass over damaged ones with a line each.

    Changes nothing on the disk: another process may be in the middle of a save.

    Raises:
        MaekitError: E-CKPT-FORMAT if a newer maekit wrote it.
    """
    for path in _steps(folder):
        try:
            return load(path)
        except MaekitError as error:
            if error.code == "E-CKPT-FORMAT":
                raise
            log.warning("checkpoint passed over: %s", error)
    return None


def delete_leftovers(folder: Path) -> None:
    """Delete what a kill in the middle of a save left; only for the one process that may write here."""
    for leftover in folder.glob(".tmp-*"):
        log.warning("deleted the rest of an interrupted save: %s", leftover.name)
        shutil.rmtree(leftover, ignore_errors=True)


def _steps(folder: Path) -> list[Path]:
    """Return the ``step-N`` folders, newest first by number."""
    found = [p for p in folder.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=_number, reverse=True)


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _write(path: Path, data: bytes) -> dict[str, Any]:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _read(folder: Path, name: str, expected: dict[str, Any]) -> bytes:
    if Path(name).name != name or not (folder / name).is_file():
        raise _damaged(folder / name, "no such file")
    size = (folder / name).stat().st_size
    if size != expected.get("bytes"):
        raise _damaged(folder / name, f"{size} bytes, the manifest says {expected.get('bytes')}")
    data = (folder / name).read_bytes()
    if hashlib.sha256(data).hexdigest() != expected.get("sha256"):
        raise _damaged(folder / name, "another SHA-256 than the manifest's")
    return data


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete(path: Path) -> None:
    """Rename first, so that a kill in the middle leaves rubbish with a name, not half a checkpoint."""
    doomed = path.with_name(f".tmp-{uuid.uuid4().hex}")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _damaged(path: Path, found: str) -> MaekitError:
    return MaekitError("E-CKPT-DAMAGED", f"checkpoint file {path}", found=found, hint="the previous checkpoint")


def _cannot_write(folder: Path, tensors: dict[str, Tensors], error: OSError) -> MaekitError:
    needed = sum(v.numel() * v.element_size() for named in tensors.values() for v in named.values())
    try:
        free = f", {shutil.disk_usage(folder).free / 1e6:,.0f} MB free"
        remains = newest(folder)
    except (OSError, MaekitError):
        free, remains = "", None
    what = f"cannot save a checkpoint in {folder}"
    found = f"{error.strerror or error} ({needed / 1e6:,.0f} MB needed{free})"
    if remains is None:
        return MaekitError("E-ENV-DISK", what, found=found, hint="free some space; nothing had been saved yet")
    return MaekitError(
        "E-STOP-DISK",
        what,
        found=found,
        hint=f"free some space, then the same command goes on from {remains.path.name}",
    )
