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
import mmap
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from maekit.errors import MaekitError, clean

Tensors = dict[str, Tensor]

READABLE = (
    "weights: .safetensors, .pth/.pt/.bin of torch.save, a timm or transformers folder, or a run folder of maekit"
)
ALLOWED: list[Any] = [argparse.Namespace]
INSIDE = (
    "model", "state_dict", "model_state_dict", "module", "net", "weights", "model_ema", "state_dict_ema", "ema",
    "teacher", "student",
)  # fmt: skip
"""Where training scripts keep the weights in what they save: official "model", Lightning and timm "state_dict"; where
nothing else is there, averages."""
FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
MOST_BYTES = 1 << 20
"""Of a JSON file beside the weights."""
MOST_INDEX_BYTES = 1 << 26
"""Of an index of shards: a hundred bytes for each tensor."""
MOST_OF_FILE = 2
"""How often all tensors together may outweigh their file: tied weights are views of the same bytes."""
SLACK = 1 << 16
"""Bytes by which they may outweigh it besides."""
MOST_PICKLE_BYTES = 1 << 24
"""Of a refused pickle that are looked through for what to name."""
PLAIN_GLOBALS = re.compile(
    r"torch\._utils\._rebuild_\w+|torch\.(\w+Storage|Size|device|b?float\d\w*)|argparse\.Namespace|_codecs\.encode"
    r"|collections\.(OrderedDict|defaultdict|Counter)|builtins\.(set|dict|list|bytearray|complex)"
)
"""What a pickle of plain tensors loads; not what to name where one was refused."""


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
    if not _exists(path):
        raise MaekitError("E-CKPT-MISSING", f"no weights at {path}", expected=READABLE)
    if path.is_dir():
        path = _in_folder(path)
    beside = path.with_name("config.json")
    config = read_json(beside) if path.name in FOLDER_FILES and beside.is_file() else {}
    if not path.is_file():
        raise MaekitError("E-CKPT-FORMAT", f"{path}", found="no regular file", expected=READABLE)
    if path.name.endswith(".index.json"):
        return _read_shards(path)._replace(config=config)
    head = _head(path)
    if head[8:9] == b"{" and (head[:1] != b"{" or head[4:8] == bytes(4)):  # eight bytes of length before the header
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
        if path.stat().st_size > (MOST_INDEX_BYTES if path.name.endswith(".index.json") else MOST_BYTES):
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


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError) as error:  # a name that is too long, a folder that may not be entered
        raise MaekitError("E-CKPT-MISSING", f"no weights at {path}", found=clean(error), expected=READABLE) from error


def _in_folder(folder: Path) -> Path:
    for name in FOLDER_FILES:
        if _exists(folder / name):
            return folder / name
    try:
        found = ", ".join(sorted(clean(part.name, 40) for part in folder.iterdir())[:5]) or "nothing"
    except OSError as error:
        found = clean(error)
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
        "an ONNX graph, which is a program and no file of weights": path.suffix == ".onnx",
        f"{size} bytes of zeros": bool(head) and not head.strip(b"\0"),
    }
    for found in (words for words, there in looks.items() if there):
        hint = "download the file again" if size < 1 << 16 else "the weights themselves"
        raise MaekitError("E-CKPT-FORMAT", f"{path}", found=found, expected=READABLE, hint=hint)


# ------------------------------------------------------------------------------------------------- torch.save


def _read_torch(path: Path) -> File:
    head = _head(path)
    if head.startswith(b"PK"):
        _check_archive(path)
    elif not head.startswith(b"\x80"):  # how every pickle of torch.save begins
        raise MaekitError("E-CKPT-FORMAT", f"{path}", found="no weights of any known kind", expected=READABLE)
    try:
        with _opened(path, head) as stream, torch.serialization.safe_globals(ALLOWED), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about pickle protocols: what matters is read, or refused below
            value = torch.load(stream, map_location="cpu", weights_only=True)  # a stream: no guesses by the file's name
    except Exception as error:  # damaged bytes make torch raise anything: struct.error, AssertionError, MemoryError
        if isinstance(error, pickle.UnpicklingError) and (offenders := _globals_of(path)):
            raise _unsafe(path, offenders) from error
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().split("\n")[0]
        raise _cut_off(path, f"{type(error).__name__}: {clean(reason, 120)}") from error
    return _unwrap(path, value)


def _opened(path: Path, head: bytes) -> IO[bytes]:
    """Open what torch reads; a bare pickle so that no claim of a length asks for more memory than the file has."""
    with path.open("rb") as stream:
        if head.startswith(b"PK"):
            return path.open("rb")
        return cast(IO[bytes], mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))


def _cut_off(path: Path, found: str) -> MaekitError:
    return MaekitError(
        "E-CKPT-FORMAT",
        f"{path} ({path.stat().st_size} bytes)",
        found=f"damaged or cut off: {found}",
        expected=READABLE,
    )


def _check_archive(path: Path) -> None:
    """Refuse what torch.save never writes: programs, compressed members, or more bytes than the file has."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:  # damaged bytes make zipfile raise anything: NotImplementedError, UnicodeDecodeError
        raise _cut_off(path, f"an archive: {clean(error, 100)}") from error
    names = {member.filename.partition("/")[2] for member in members}
    program = "constants.pkl" in names or "models/model.json" in names
    if program or "data.pkl" not in names:
        found = "a program (TorchScript or torch.export), no weights" if program else "a zip archive without weights"
        raise MaekitError("E-CKPT-FORMAT", f"{path}", found=found, expected=READABLE)
    total = sum(member.file_size for member in members)
    if any(member.compress_type != zipfile.ZIP_STORED for member in members) or total > path.stat().st_size:
        raise MaekitError(
            "E-CKPT-SIZE",
            f"{path}",
            found=f"a compressed archive of {total} bytes in {path.stat().st_size}",
            expected="members stored as they are, as torch.save writes them",
        )


def _unsafe(path: Path, offenders: list[str]) -> MaekitError:
    return MaekitError(
        "E-CKPT-PICKLE",
        f"{path}",
        found=f"a pickle that loads {', '.join(clean(name, 80) for name in offenders[:3])}",
        expected="tensors and plain values: code in a file is never run",
        hint="safetensors from its author, or convert it where you trust it",
    )


def _globals_of(path: Path) -> list[str]:
    """Take a pickle apart without running it: what it would load beside tensors, as far as it can be followed."""
    try:
        with path.open("rb") if not _head(path).startswith(b"PK") else _pickle_in(path) as stream:
            raw = stream.read(MOST_PICKLE_BYTES)
    except Exception:  # the file was refused already; this only looks for a name
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in strings that no one will use
        names = dict.fromkeys(_globals(io.BytesIO(raw)))
    return [name for name in names if not PLAIN_GLOBALS.fullmatch(name)]


def _pickle_in(path: Path) -> IO[bytes]:
    with zipfile.ZipFile(path) as archive:
        return archive.open(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


def _globals(raw: io.BytesIO) -> Iterator[str]:
    """Yield the names that up to five pickles in a row load: torch's old format is five."""
    strings: list[str] = []
    memo: dict[Any, str] = {}
    pushed: str | None = None
    with contextlib.suppress(ValueError, IndexError, UnicodeDecodeError, OverflowError):
        for code, argument, _ in itertools.chain.from_iterable(pickletools.genops(raw) for _ in range(5)):
            if code.name in ("GLOBAL", "INST"):
                yield str(argument).replace(" ", ".").replace("__builtin__.", "builtins.")  # Python 2's name
            elif code.name == "STACK_GLOBAL":
                yield ".".join(strings[-2:])
            elif code.name == "MEMOIZE" or "PUT" in code.name:
                memo[len(memo) if argument is None else argument] = pushed or ""
                continue
            pushed = memo.get(argument) if "GET" in code.name else argument if isinstance(argument, str) else None
            strings += [pushed] if pushed else []


def _unwrap(path: Path, value: Any) -> File:
    """Find the weights in what a training script saved; keep plain facts, count the rest."""
    facts: dict[str, Any] = {}
    beside: list[str] = []
    for _ in range(3):
        if not isinstance(value, Mapping):
            break
        key = next((name for name in INSIDE if _holds_tensors(value.get(name))), None)
        if key is None:
            break
        if key not in ("model", "state_dict"):
            facts["weights under"] = key
        rest = {str(name): part for name, part in value.items() if name != key}
        facts |= {name: _plain(part) for name, part in rest.items() if _is_plain(name, part)}
        beside += [name for name, part in rest.items() if not _is_plain(name, part)]
        value = value[key]
    parts = value.items() if _is_dict(value) else ()
    tensors = {str(name): part.detach() for name, part in parts if isinstance(part, Tensor)}
    if not tensors:
        found = f"a {type(value).__name__}" + (
            f" with {', '.join(map(str, list(value)[:5]))}" if _is_dict(value) else ""
        )
        raise MaekitError("E-CKPT-FORMAT", f"{path}", found=f"no tensors in it: {clean(found)}", expected=READABLE)
    beside += [str(name) for name, part in value.items() if not isinstance(part, Tensor)]
    _check_bytes(path, tensors)
    return File(path, "torch", tensors, {}, {}, facts, beside)


def _holds_tensors(value: object, depth: int = 3) -> bool:
    """Say whether a mapping has tensors, or a mapping that has some."""
    if not isinstance(value, Mapping):
        return False
    inside = value.values()
    return any(isinstance(part, Tensor) or (depth > 0 and _holds_tensors(part, depth - 1)) for part in inside)


def _is_dict(value: object) -> bool:
    return isinstance(value, Mapping)


def _is_plain(name: str, value: object) -> bool:
    arguments = isinstance(value, argparse.Namespace) or (name == "args" and isinstance(value, dict))
    return value is None or arguments or isinstance(value, bool | int | float | str)


def _is_argument(value: object) -> bool:
    if isinstance(value, list):
        return all(isinstance(part, bool | int | float | str) for part in value)
    return isinstance(value, bool | int | float | str)


def _plain(value: object) -> object:
    """Return plain values as they are, arguments as a dictionary."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return {str(name): part for name, part in value.items() if _is_argument(part)}
    return value


def _check_bytes(path: Path, tensors: Tensors) -> None:
    total, most = 0, MOST_OF_FILE * path.stat().st_size + SLACK
    for name, value in tensors.items():
        kinds = {"quantized": value.is_quantized, "nested": value.is_nested, "without values": value.is_meta}
        kinds[str(value.layout)] = value.layout != torch.strided
        for found in (words for words, there in kinds.items() if there):
            raise MaekitError(
                "E-CKPT-FORMAT", f"tensor {clean(name, 80)} of {path}", found=found, expected="a dense tensor"
            )
        total += value.numel() * value.element_size()
        if total > most:
            raise MaekitError(
                "E-CKPT-SIZE",
                f"tensor {clean(name, 80)} of {path}",
                found=f"{total} bytes claimed up to it, by a file of {path.stat().st_size}",
                expected="as many bytes in the file as the shapes say",
            )


# ---------------------------------------------------------------------------------------------------- shards


def _read_shards(index: Path) -> File:
    """Read the files that an index names; only files beside it, each tensor once."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()) or not places:
        raise MaekitError("E-CKPT-FORMAT", f"{index}", found="no weight_map", expected="an index of shards")
    tensors: Tensors = {}
    kinds: set[str] = set()
    beside: list[str] = []
    for name in sorted(set(places.values())):
        beside_it = Path(name).name == name and not name.endswith(".json")
        if not beside_it or (_exists(index.parent / name) and (index.parent / name).is_dir()):
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
        beside += [key for key in part.tensors if key not in tensors]
    return File(index, f"sharded {kinds.pop()}", tensors, {}, {}, {}, beside)
