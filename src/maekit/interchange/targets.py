"""What a patch is to be predicted as, fitted or trained beforehand: ``target.safetensors``, and its way back.

`load_target` is the one door for all of them: a folder that ``maekit pca`` or ``maekit tokenizer`` wrote, the file in
it, or the encoder of a dVAE as DALL-E's (arXiv 2102.12092) that the user converted to safetensors. A file is judged as
weights are (`maekit.interchange.weights`): header against a schema, names, shapes and types against the module it
names, then the values. Pickles are not opened at all.
"""

import contextlib
import errno
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from maekit.disk import put
from maekit.errors import MaekitError, clean
from maekit.interchange.files import Tensors
from maekit.interchange.reading import check
from maekit.model.pca import PatchPCA
from maekit.model.tokenizer import DalleEncoder, VQTokenizer, create_tokenizer
from maekit.settings import FORMAT
from maekit.train.checkpoint import state_sha256

FILE = "target.safetensors"
READABLE = "a folder that maekit pca or maekit tokenizer wrote, or a dVAE's encoder in safetensors"
Kind = Literal["pca", "vq"]
Count = Annotated[int, Field(ge=1, le=65536)]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class PcaSpec(_Spec):
    """Arguments of `PatchPCA`."""

    components: Count
    values: Count
    patch: Count
    channels: Count


class VQSpec(_Spec):
    """Arguments of `VQTokenizer`."""

    kind: Literal["vq"]
    vocabulary: Count
    img_size: Annotated[list[Count], Field(min_length=2, max_length=2)]
    patch: Count
    channels: Count
    width: Count
    blocks: Annotated[int, Field(ge=0, le=1024)]
    code_width: Count
    mean: list[float]
    std: list[float]


class Header(_Spec):
    """What a file says about itself."""

    format: int
    kind: Kind
    spec: dict[str, Any]
    mean: list[float]
    std: list[float]
    fingerprint: str
    sha256: str


@dataclass(frozen=True)
class Target:
    """A target that was read, checked.

    Attributes:
        path: of the file.
        kind: "pca" | "vq" | "dalle".
        spec: JSON-able arguments of its module.
        tensors: state dict of its module, float32.
        mean: of each channel, in units of 0..1, that pixels were normalised with; of "dalle" empty.
        std: of each channel.
        fingerprint: of the images it was made from (`maekit.data.source.Source.fingerprint`); of "dalle" "".
    """

    path: Path
    kind: str
    spec: dict[str, Any]
    tensors: Tensors
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str

    @property
    def name(self) -> str:
        """The setting ``target`` that it serves: "pca" | "token"."""
        return "pca" if self.kind == "pca" else "token"

    def module(self) -> PatchPCA | VQTokenizer | DalleEncoder:
        """Build it, frozen, in eval mode."""
        module = _build(self.kind, self.spec)
        module.load_state_dict(self.tensors)
        return module.eval().requires_grad_(False)


def _build(kind: str, spec: dict[str, Any]) -> PatchPCA | VQTokenizer | DalleEncoder:
    return PatchPCA(**spec) if kind == "pca" else create_tokenizer(spec)


def save_target(
    path: Path, module: nn.Module, spec: dict[str, Any], kind: Kind, *,
    mean: Sequence[float], std: Sequence[float], fingerprint: str,
) -> None:  # fmt: skip
    """Write a target's file, whole or not at all.

    Args:
        path: of the file, usually `FILE` in a run's folder.
        module: its tensors are written.
        spec: its arguments.
        kind: of target.
        mean: that pixels are normalised with.
        std: as `mean`.
        fingerprint: of the images.

    Raises:
        MaekitError: E-ENV-DISK if the disk is full, E-ENV-OUT if the place cannot be written.
    """
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in module.state_dict().items()}
    header = header_of(spec, kind, mean=mean, std=std, fingerprint=fingerprint, sha256=_digest(tensors))
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(safetensors.torch.save(tensors, header))
        put(temporary, path)
    except OSError as error:
        code = "E-ENV-DISK" if error.errno == errno.ENOSPC else "E-ENV-OUT"
        raise MaekitError(code, f"cannot write {path}", found=error.strerror or error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def header_of(
    spec: dict[str, Any], kind: Kind, *, mean: Sequence[float], std: Sequence[float], fingerprint: str, sha256: str = ""
) -> dict[str, str]:
    """Return the safetensors metadata of a target; arguments as `save_target`."""
    header = Header(
        format=FORMAT, kind=kind, spec=spec, mean=list(mean), std=list(std), fingerprint=fingerprint, sha256=sha256
    )
    return {"maekit": header.model_dump_json()}


def load_target(path: str | Path) -> Target:
    """Read a target from a folder or a file, checked.

    Raises:
        MaekitError: E-CKPT-MISSING, E-CKPT-FORMAT (no target, or a newer maekit's), E-CKPT-DAMAGED, E-CKPT-KEYS,
            E-CKPT-SHAPE, E-CKPT-NAN.
    """
    file = _file(Path(path))
    tensors, metadata = _read(file)
    if "maekit" not in metadata and "blocks.input.w" in tensors:
        return _dalle(file, {name: value.float() for name, value in tensors.items()})
    header = _header(file, metadata)
    if header.sha256 != _digest(tensors):
        raise MaekitError(
            "E-CKPT-DAMAGED", f"{file}", found="other values than were written (SHA-256)", hint="another copy of it"
        )
    check(file, tensors, _expected(file, header.kind, header.spec), "the target that it names")
    return Target(file, header.kind, header.spec, tensors, tuple(header.mean), tuple(header.std), header.fingerprint)


def _dalle(file: Path, tensors: Tensors) -> Target:
    spec = DalleEncoder.spec_of(tensors)
    check(file, tensors, _expected(file, "dalle", spec), "a dVAE's encoder of its widths")
    return Target(file, "dalle", spec, tensors, (), (), "")


def _expected(file: Path, kind: str, spec: dict[str, Any]) -> Tensors:
    """Return names, shapes and types of a target's module, without memory."""
    try:
        with torch.device("meta"):
            return _build(kind, spec).state_dict()
    except MaekitError as error:
        raise MaekitError("E-CKPT-FORMAT", f"{file}", found=error.args[0], expected=READABLE) from error


def _file(path: Path) -> Path:
    try:
        file = path / FILE if path.is_dir() else path
        there = file.is_file()
    except (OSError, ValueError) as error:  # a name that is too long, a folder that may not be entered
        raise MaekitError("E-CKPT-MISSING", f"no target at {path}", found=clean(error), expected=READABLE) from error
    if not there:
        unfinished = path.is_dir() and (path / "config.yaml").exists()
        hint = "the command that made the folder goes on" if unfinished else "maekit pca, or maekit tokenizer"
        raise MaekitError("E-CKPT-MISSING", f"no target at {file}", expected=READABLE, hint=hint)
    return file


def _read(file: Path) -> tuple[Tensors, dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise MaekitError(
            "E-CKPT-FORMAT", f"{file}", found=f"no whole safetensors file ({clean(error, 100)})", expected=READABLE,
            hint="pickles are never read: save its state dict with safetensors.torch.save_file where you trust it",
        ) from error  # fmt: skip


def _header(file: Path, metadata: dict[str, str]) -> Header:
    """Return what the file says about itself, its spec checked too."""
    try:
        found = json.loads(metadata["maekit"])
        version = found["format"]
        if isinstance(version, int) and version > FORMAT:
            raise MaekitError(
                "E-CKPT-FORMAT", f"{file}", found=f"format {version}", expected=f"at most {FORMAT}",
                hint="a newer maekit",
            )  # fmt: skip
        header = Header.model_validate(found)
        (PcaSpec if header.kind == "pca" else VQSpec).model_validate(header.spec)
        pairs = [(header.mean, header.std), (header.spec.get("mean", header.mean), header.spec.get("std", header.std))]
        if any(not len(mean) == len(std) == header.spec["channels"] or min(std) <= 0 for mean, std in pairs):
            raise ValueError("not one mean and one positive deviation for each channel")
    except MaekitError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise MaekitError("E-CKPT-FORMAT", f"{file}", found=found, expected=READABLE) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        found = "no metadata of a target" if "maekit" not in metadata else f"metadata that are wrong: {clean(error)}"
        raise MaekitError("E-CKPT-FORMAT", f"{file}", found=found, expected=READABLE) from error
    return header


def _digest(tensors: dict[str, Tensor]) -> str:
    return state_sha256({"target": tensors}, {})
