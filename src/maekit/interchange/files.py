"""What lies on the disk becomes named tensors; no code in a file is ever run.

Read are safetensors (one file, or shards with an index), and files of ``torch.save`` through
``torch.load(weights_only=True)`` with argparse's Namespace as the only class allowed beside torch's own: the authors'
training script puts its arguments into its checkpoints. A pickle that names anything else is refused with that name,
and there is no second try. Before a tensor is believed its bytes must lie in the file: a few hundred bytes can claim
ten billion numbers (a stride of 0), and a deflated archive unpacks to any size.
"""

import argparse
import contextlib
import io
import itertools
import json
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from maekit.errors import MaekitError, clean

Tensors = dict[str, Tensor]

READABLE = (
    "weights: .safetensors, .pth/.pt/.bin of torch.save, a timm or transformers folder, or a run folder of maekit"
)
ALLOWED: list[Any] = [argparse.Namespace]
INSIDE = ("model", "state_dict", "model_state_dict", "module", "net")
"""Where training scripts keep the weights in what they save: official "model", Lightning and timm "state_dict"."""
FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
MOST_BYTES = 1 << 20
"""Of a JSON file beside the weights."""
SLACK = 1 << 16
"""Bytes by which tensors may outweigh their file: alignment, shared views."""


class File(NamedTuple):
    """Weights as they lie on the disk.

    Attributes:
        path: of the file, or of the folder.
        container: "safetensors" | "sharded safetensors" | "torch" | "sharded torch".
        tensors: by the names in the file.
        metadata: of a safetensors header.
        config: ``config.json`` beside the weights, if there is one.
        facts: plain values that stood beside the weights: ``epoch``, ``args``.
        beside: names of what else was in the file and is not read: ``optimizer``, ``scaler``.
    """

    path: Path
    container: str
    tensors: Tensors
    metadata: dict[str, str]
    config: dict[str, Any]
    facts: dict[str, Any]
    beside: list[str]


def read_file(path: Path) -> File:
    """Read a file of weights, or the one in a folder.

    Raises:
        MaekitError: E-CKPT-MISSING; E-CKPT-FORMAT for what is no weights (empty, a web page, an LFS pointer, cut off);
            E-CKPT-PICKLE, naming what the pickle wants to run; E-CKPT-SIZE for tensors larger than their file.
    """
    if not path.exists():
        raise MaekitError("E-CKPT-MISSING", f"no weights at {path}", expected=READABLE)
    config = {}
    if path.is_dir():
        folder, path = path, _in_folder(path)
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if not path.is_file():
        raise MaekitError("E-CKPT-FORMAT", f"{path}", found="no regular file", expected=READABLE)
    if path.name.endswith(".index.json"):
        return _read_shards(path)._replace(config=config)
    head = _head(path)
    if head[8:9] == b"{" and head[:1] != b"{":
        tensors, metadata = read_safetensors(path)
        return File(path, "safetensors", tensors, metadata, config, {}, [])
    _refuse_obvious(path, head)
    return _read_torch(path)._replace(config=config)


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a small JSON file.

    Raises:
        MaekitError: E-CKPT-FORMAT.
    """
    try:
        if path.stat().st_size > MOST_BYTES and not path.name.endswith(".index.json"):
            raise ValueError(f"{path.stat().st_size} bytes")
        value = json.loads(path.read_text("utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__}, no mapping")
        return value
    except (OSError, ValueError, RecursionError) as error:
        raise MaekitError("E-CKPT-FORMAT", f"{path}", found=clean(error), expected="a JSON mapping") from error


def read_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Return tensors and header metadata of one safetensors file.

    Raises:
        MaekitError: E-CKPT-FORMAT.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        found = f"no whole safetensors file ({error})"
        raise MaekitError("E-CKPT-FORMAT", f"cannot read {path}", found=found, expected=READABLE) from error


def _in_folder(folder: Path) -> Path:
    for name in FOLDER_FILES:
        if (folder / name).exists():
            return folder / name
    found = ", ".join(sorted(clean(part.name, 40) for part in folder.iterdir())[:5]) or "nothing"
    raise MaekitError(
        "E-CKPT-MISSING", f"no weights in folder {folder}", found=found, expected=" | ".join(FOLDER_FILES)
    )


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(512)
    except OSError as error:
        raise MaekitError("E-CKPT-FORMAT", f"cannot read {path}", found=error.strerror) from error


def _refuse_obvious(path: Path, head: bytes) -> None:
    """Name what is often found in place of weights."""
    text = head.lstrip().lower()
    size = path.stat().st_size
    looks = {
        "an empty file": not head,
        "a Git LFS pointer, not the file it points to": text.startswith(b"version https://git-lfs"),
        "a web page: the download failed": text.startswith((b"<!doctype", b"<html", b"<?xml")),
        "JSON text": text.startswith((b"{", b"[")),
        "a GGUF file": head.startswith(b"GGUF"),
        "a program (ELF)": head.startswith(b"\x7fELF"),
        "a gzip archive": head.startswith(b"\x1f\x8b"),
        f"{size} bytes of zeros": bool(head) and not head.strip(b"\0"),
    }
    for found in (words for words, there in looks.items() if there):
        hint = "download the file again" if size < 1 << 16 else "the weights themselves"
        raise MaekitError("E-CKPT-FORMAT", f"{path}", found=found, expected=READABLE, hint=hint)


# ------------------------------------------------------------------------------------------------- torch.save


def _read_torch(path: Path) -> File:
    if zipfile.is_zipfile(path):
        _check_archive(path)
    elif _head(path).startswith(b"PK"):
        raise _cut_off(path, "an archive without its end")
    elif not _head(path).startswith(b"\x80"):  # how every pickle of torch.save begins
        raise MaekitError("E-CKPT-FORMAT", f"{path}", found="no weights of any known kind", expected=READABLE)
    try:
        with path.open("rb") as stream, torch.serialization.safe_globals(ALLOWED), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about pickle protocols: what matters is read, or refused below
            value = torch.load(stream, map_location="cpu", weights_only=True)  # a stream: no guesses by the file's name
    except pickle.UnpicklingError as error:
        raise _unsafe(path, error) from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise _cut_off(path, f"{type(error).__name__}: {clean(error, 120)}") from error
    return _unwrap(path, value)


def _cut_off(path: Path, found: str) -> MaekitError:
    return MaekitError(
        "E-CKPT-FORMAT",
        f"{path} ({path.stat().st_size} bytes)",
        found=f"damaged or cut off: {found}",
        expected=READABLE,
    )


def _check_archive(path: Path) -> None:
    """Refuse what torch.save never writes: compressed members, or more bytes than the file has."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile as error:
        raise _cut_off(path, str(error)) from error
    total = sum(member.file_size for member in members)
    if any(member.compress_type != zipfile.ZIP_STORED for member in members) or total > path.stat().st_size:
        raise MaekitError(
            "E-CKPT-SIZE",
            f"{path}",
            found=f"a compressed archive of {total} bytes in {path.stat().st_size}",
            expected="members stored as they are, as torch.save writes them",
        )
    if not any(member.filename.endswith("data.pkl") for member in members):
        raise MaekitError("E-CKPT-FORMAT", f"{path}", found="a zip archive without weights", expected=READABLE)


def _unsafe(path: Path, error: Exception) -> MaekitError:
    """Name the first thing that a pickle wanted to load or run."""
    if offenders := _globals_of_torch(path) or _globals_of_pickle(path):
        found = f"a pickle that loads {', '.join(clean(name, 80) for name in offenders[:3])}"
    else:
        found = f"no plain tensors: {clean(str(error).split('.')[-1] or error, 100)}"
    return MaekitError(
        "E-CKPT-PICKLE",
        f"{path}",
        found=found,
        expected="tensors and plain values: code in a file is never run",
        hint="safetensors from its author, or convert it where you trust it",
    )


def _globals_of_torch(path: Path) -> list[str]:
    try:
        with path.open("rb") as stream, torch.serialization.safe_globals(ALLOWED):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(stream))
    except Exception:  # what it is was found already; this only looks for a name
        return []


def _globals_of_pickle(path: Path) -> list[str]:
    """Take a pickle apart without running it: names that it would load, as far as it can be followed."""
    found: list[str] = []
    strings: list[str] = []
    with path.open("rb") as stream:
        raw = io.BytesIO(stream.read(MOST_BYTES))
    with contextlib.suppress(ValueError, IndexError, UnicodeDecodeError, OverflowError):
        # torch's old format is five pickles, one after the other
        for code, argument, _ in itertools.chain.from_iterable(pickletools.genops(raw) for _ in range(5)):
            if code.name in ("GLOBAL", "INST"):
                found.append(str(argument).replace(" ", "."))
            elif code.name == "STACK_GLOBAL" and len(strings) > 1:
                found.append(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    return found


def _unwrap(path: Path, value: Any) -> File:
    """Find the weights in what a training script saved; keep plain facts, count the rest."""
    facts: dict[str, Any] = {}
    beside: list[str] = []
    for _ in range(3):
        if not isinstance(value, Mapping):
            break
        key = next((name for name in INSIDE if isinstance(value.get(name), Mapping)), None)
        if key is None:
            break
        rest = {str(name): part for name, part in value.items() if name != key}
        facts |= {name: _plain(part) for name, part in rest.items() if _is_plain(part)}
        beside += [name for name, part in rest.items() if not _is_plain(part)]
        value = value[key]
    tensors = {str(name): part for name, part in value.items() if isinstance(part, Tensor)} if _is_dict(value) else {}
    if not tensors:
        found = f"a {type(value).__name__}" + (
            f" with {', '.join(map(str, list(value)[:5]))}" if _is_dict(value) else ""
        )
        raise MaekitError("E-CKPT-FORMAT", f"{path}", found=f"no tensors in it: {clean(found)}", expected=READABLE)
    beside += [str(name) for name, part in value.items() if not isinstance(part, Tensor)]
    _check_bytes(path, tensors)
    return File(path, "torch", tensors, {}, {}, facts, beside)


def _is_dict(value: object) -> bool:
    return isinstance(value, Mapping)


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str | argparse.Namespace)


def _plain(value: object) -> object:
    if isinstance(value, argparse.Namespace):
        return {name: part for name, part in vars(value).items() if isinstance(part, bool | int | float | str)}
    return value


def _check_bytes(path: Path, tensors: Tensors) -> None:
    for name, value in tensors.items():
        if value.layout != torch.strided or value.is_quantized:
            raise MaekitError(
                "E-CKPT-FORMAT",
                f"tensor {clean(name, 80)} of {path}",
                found=f"{value.layout}",
                expected="a dense tensor",
            )
        claimed = value.numel() * value.element_size()
        if claimed > value.untyped_storage().nbytes() + SLACK:
            raise MaekitError(
                "E-CKPT-SIZE",
                f"tensor {clean(name, 80)} of {path}",
                found=f"{claimed} bytes claimed by {value.untyped_storage().nbytes()}",
                expected="as many bytes in the file as the shape says",
            )


# ---------------------------------------------------------------------------------------------------- shards


def _read_shards(index: Path) -> File:
    """Read the files that an index names; only files beside it, each tensor once."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()) or not places:
        raise MaekitError("E-CKPT-FORMAT", f"{index}", found="no weight_map", expected="an index of shards")
    tensors: Tensors = {}
    kinds: set[str] = set()
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise MaekitError(
                "E-CKPT-FORMAT", f"{index}", found=f"shard {clean(name, 80)}", expected="a file beside it"
            )
        part = read_file(index.parent / name)
        kinds.add(part.container)
        wanted = [key for key, place in places.items() if place == name]
        missing = [key for key in wanted if key not in part.tensors]
        if missing:
            raise MaekitError(
                "E-CKPT-KEYS",
                f"shard {index.parent / name}",
                found=f"no {clean(missing[0], 80)}",
                expected="it, by the index",
            )
        tensors |= {key: part.tensors[key] for key in wanted}
    return File(index, f"sharded {kinds.pop()}", tensors, {}, {}, {}, [])
