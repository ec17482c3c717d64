"""Our own weights: safetensors files that say in their header which model they belong to. Never pickle.

The header key "maekit" holds JSON: format, kind and the keyword arguments of `create_model`. A file is checked by key,
shape and dtype before a number is copied, and must be finite. kinds: "mae" (encoder and decoder), "encoder" (timm's
own key names, so timm loads the file as it is), "classifier" (fine-tuned, for resuming its run only).
"""

import json
import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from maekit.errors import MaekitError
from maekit.model.mae import MaskedAutoencoder, create_model
from maekit.settings import FORMAT
from maekit.train import checkpoint

log = logging.getLogger("maekit")


def metadata(model: MaskedAutoencoder, kind: str = "mae", **more: Any) -> dict[str, str]:
    """Return the header of a file with these weights."""
    return {"maekit": json.dumps({"format": FORMAT, "kind": kind, "spec": model.spec, **more}, sort_keys=True)}


def save_model(model: MaskedAutoencoder, path: str | Path) -> None:
    """Write encoder and decoder so that `load_model` needs nothing else. The file is whole or absent."""
    _write(Path(path), model.state_dict(), metadata(model))


def save_encoder(model: MaskedAutoencoder, path: str | Path) -> None:
    """Write the encoder alone, with timm's names: ``timm.create_model(NAME, checkpoint_path=FILE)`` loads it."""
    _write(Path(path), model.encoder.state_dict(), metadata(model, "encoder"))


def load_model(path: str | Path, *, random_init: bool = False) -> MaskedAutoencoder:
    """Load a model from a run folder, a checkpoint folder or a .safetensors file that maekit wrote.

    Of a run folder the newest checkpoint that verifies is taken. A file with the encoder only gives a model whose
    decoder is random, and a line that says so.

    Args:
        path: where the weights are.
        random_init: build the same model with fresh weights instead (for comparison).

    Raises:
        MaekitError: E-CKPT-MISSING, E-CKPT-FORMAT (no weights of maekit, or of a newer one), E-CKPT-DAMAGED,
            E-CKPT-MODEL (keys or shapes do not fit), E-CKPT-NUMBERS (not finite).
    """
    path = Path(path)
    file = _weights_file(path)
    about = _about(file)
    model = create_model(**about["spec"])
    if random_init:
        return model
    module = model if about["kind"] == "mae" else model.encoder
    if module is not model:
        log.warning("%s holds the encoder only: the decoder is random", file)
    tensors = _read(file)
    _fit(tensors, module.state_dict(), file)
    module.load_state_dict(tensors)
    return model


def _weights_file(path: Path) -> Path:
    if path.is_file():
        return path
    if (path / "checkpoints").is_dir():
        found = checkpoint.newest(path / "checkpoints")
        if found is not None:
            return found.path / "model.safetensors"
    elif (path / checkpoint.MANIFEST).is_file():
        return checkpoint.load(path).path / "model.safetensors"
    raise MaekitError(
        "E-CKPT-MISSING",
        f"weights {path}",
        found="nothing there" if not path.exists() else "a folder without a checkpoint",
        expected="a run folder, a checkpoint folder or a .safetensors file of maekit",
    )


def _about(file: Path) -> dict[str, Any]:
    """Read and check a file's header."""
    try:
        with safetensors.safe_open(str(file), "pt") as opened:
            header = (opened.metadata() or {}).get("maekit")
    except (safetensors.SafetensorError, OSError, UnicodeError) as error:
        raise _foreign(file, "no readable safetensors") from error
    if header is None:
        raise _foreign(file, "safetensors without maekit's header")
    try:
        about = json.loads(header)
        written, kind, spec = about["format"], about["kind"], dict(about["spec"])
    except (ValueError, KeyError, TypeError) as error:
        raise MaekitError("E-CKPT-DAMAGED", f"weights {file}", found="a header that cannot be read") from error
    if not isinstance(written, int) or written > FORMAT:
        raise MaekitError(
            "E-CKPT-FORMAT",
            f"weights {file}",
            found=f"format {written}",
            expected=f"at most {FORMAT}",
            hint="a newer maekit",
        )
    if kind not in ("mae", "encoder"):
        raise MaekitError(
            "E-CKPT-FORMAT",
            f"weights {file}",
            found=f"weights of a {kind}",
            expected="of a masked autoencoder or its encoder",
        )
    if unknown := spec.keys() - create_model.__annotations__.keys():
        raise MaekitError("E-CKPT-DAMAGED", f"weights {file}", found=f"unknown model settings {sorted(unknown)}")
    return about


def _foreign(file: Path, found: str) -> MaekitError:
    return MaekitError(
        "E-CKPT-FORMAT",
        f"weights {file}",
        found=found,
        expected="a run folder, a checkpoint folder or a .safetensors file of maekit",
    )


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(file)
    except (safetensors.SafetensorError, OSError) as error:
        raise MaekitError("E-CKPT-DAMAGED", f"weights {file}", found=error) from error


def _fit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], file: Path) -> None:
    """Compare keys, shapes and dtypes before anything is copied, and refuse numbers that are not finite."""
    faults = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    faults += [f"{name} is unknown" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(found.keys() & expected.keys()):
        have, want = found[name], expected[name]
        if have.shape != want.shape or have.dtype != want.dtype:
            faults.append(f"{name} is {have.dtype} {tuple(have.shape)}, not {want.dtype} {tuple(want.shape)}")
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise MaekitError(
            "E-CKPT-MODEL", f"weights {file}", found="; ".join(faults[:3]) + more, expected="the model its header names"
        )
    if bad := [name for name, value in found.items() if not torch.isfinite(value).all()]:
        raise MaekitError(
            "E-CKPT-NUMBERS", f"weights {file}", found=f"NaN or infinity in {bad[0]}", expected="finite numbers"
        )


def _write(path: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
    data = safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, header)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise MaekitError("E-ENV-DISK", f"cannot write {path}", found=error.strerror or error) from error
