"""maekit's own weights: one safetensors file that says by itself what it holds.

The header's metadata carries, under "maekit", a JSON object with format number, kind ("mae", "encoder" or
"classifier") and the model's ``spec``. A file is read in this order, so that a wrong or hostile one costs nothing:
metadata checked against a schema, the architecture built without memory, names, shapes, types and digest compared,
values checked for NaN, and only then a model is allocated and filled. Nothing is unpickled, ever.
"""

import contextlib
import errno
import json
import logging
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maekit.errors import MaekitError
from maekit.model.heads import classifier
from maekit.model.mae import MaskedAutoencoder, create_model
from maekit.settings import FORMAT
from maekit.train import checkpoint

log = logging.getLogger("maekit")

Tensors = dict[str, Tensor]
Kind = Literal["mae", "encoder", "classifier"]
SUPPORTED = "a run folder, a checkpoint folder or a .safetensors file written by maekit"
Count = Annotated[int, Field(ge=1, le=65536)]
Depth = Annotated[int, Field(ge=1, le=1024)]
"""Upper limits of every size in a file: far above any model, far below what would hang the check."""
MOST_PARAMETERS = 10**9
"""Of a decoder that a file asks for without holding it."""


class Spec(BaseModel):
    """Arguments of `create_model` as they stand in a file."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: Annotated[str, Field(max_length=200)]
    img_size: tuple[Count, Count]
    patch_size: Count | None
    in_chans: Count
    embed_dim: Count | None
    depth: Depth | None
    num_heads: Count | None
    drop_path: float
    decoder_dim: Count
    decoder_depth: Depth
    decoder_heads: Count
    target: str
    mean: list[float]
    std: list[float]


class Header(BaseModel):
    """What a file says about itself."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: int
    kind: Kind
    spec: Spec
    sha256: str | None = None
    classes: list[str] | None = None
    pool: Literal["mean", "cls"] | None = None


class Weights(NamedTuple):
    """A file in memory: where it was, what it says, what it holds."""

    path: Path
    header: Header
    tensors: Tensors


class Classifier(NamedTuple):
    """A fine-tuned model with what it needs to be used.

    Attributes:
        model: timm's, with head, in eval mode.
        classes: names in the order of the outputs; empty if they had none.
        spec: of the autoencoder it came from: geometry, mean and std of the images.
    """

    model: VisionTransformer
    classes: list[str]
    spec: dict[str, Any]


def metadata(
    model: MaskedAutoencoder, *, classes: Sequence[str] | None = None, pool: str | None = None
) -> dict[str, str]:
    """Return the safetensors metadata that makes weights load by themselves.

    Args:
        model: whose ``spec`` is written.
        classes: of a classifier on the model's encoder; with `pool` it marks the file as a classifier's.
        pool: "mean" | "cls" of that classifier.
    """
    if pool is None:
        return _metadata(model, "mae")
    return _metadata(model, "classifier", classes=None if classes is None else list(classes), pool=pool)


def save_model(model: MaskedAutoencoder, path: str | Path) -> None:
    """Write encoder, decoder and ``spec`` into one safetensors file, in float32, whole or not at all.

    Raises:
        MaekitError: E-ENV-DISK if the disk is full, E-ENV-OUT if the place cannot be written.
    """
    _save(model, model.state_dict(), "mae", Path(path))


def save_encoder(model: MaskedAutoencoder, path: str | Path) -> None:
    """Write the encoder alone under timm's names: ``timm.create_model(name, ..., checkpoint_path=path)`` reads it.

    Raises:
        MaekitError: as `save_model`.
    """
    _save(model, model.encoder.state_dict(), "encoder", Path(path))


def load_model(path: str | Path, *, random_init: bool = False) -> MaskedAutoencoder:
    """Load a masked autoencoder on the CPU, in eval mode.

    Args:
        path: a run folder (its newest checkpoint that verifies), one checkpoint's folder, or a file of `save_model` or
            `save_encoder`; of the latter the decoder is drawn anew.
        random_init: take the architecture only; all weights are drawn anew.

    Raises:
        MaekitError: E-CKPT-MISSING, E-CKPT-FORMAT (not maekit's, or a newer one's), E-CKPT-DAMAGED, E-CKPT-KIND (a
            classifier), E-CKPT-KEYS, E-CKPT-SHAPE, E-CKPT-NAN; the message names file and tensor.
    """
    weights = _read(Path(path))
    if weights.header.kind == "classifier":
        raise MaekitError(
            "E-CKPT-KIND",
            f"{weights.path}",
            found="a fine-tuned classifier",
            expected="a masked autoencoder or its encoder",
            hint="the run that it was fine-tuned from, or load_classifier of maekit.interchange.weights",
        )
    spec, only_encoder = weights.header.spec.model_dump(), weights.header.kind == "encoder"

    def build() -> nn.Module:
        model = create_model(**spec)
        if only_encoder:
            _limit(model.decoder)
        return model.encoder if only_encoder else model

    _check(weights, build)
    model = create_model(**spec).eval()
    if random_init:
        return model
    if only_encoder:
        log.info("%s holds the encoder only: the decoder is drawn anew", weights.path)
    (model.encoder if only_encoder else model).load_state_dict(weights.tensors)
    return model


def holds_decoder(path: str | Path) -> bool:
    """Say whether `load_model` finds a decoder there, or draws one anew.

    Raises:
        MaekitError: as `load_model`.
    """
    path = Path(path)
    return path.is_dir() or _header(path, _open(path, False)[0]).kind == "mae"


def load_classifier(path: str | Path) -> Classifier:
    """Load what ``maekit finetune`` made, on the CPU.

    Args:
        path: the run folder, one checkpoint's folder or its model.safetensors.

    Raises:
        MaekitError: as `load_model`; E-CKPT-KIND for weights without a head.
    """
    weights = _read(Path(path))
    header, head = weights.header, weights.tensors.get("head.bias")
    if header.kind != "classifier" or header.pool is None or head is None:
        raise MaekitError(
            "E-CKPT-KIND", f"{weights.path}", found=f"kind {header.kind}", expected="a fine-tuned classifier"
        )
    spec, pool, num_classes = header.spec.model_dump(mode="json"), header.pool, head.numel()

    def build() -> VisionTransformer:
        with torch.device("meta"):  # the decoder is not in the file, and not needed
            origin = create_model(**spec)
        return classifier(origin, num_classes, pool=pool, pretrained=False)

    _check(weights, build)
    model = build().eval()
    model.load_state_dict(weights.tensors)
    return Classifier(model, header.classes or [], spec)


def _metadata(model: MaskedAutoencoder, kind: Kind, **more: Any) -> dict[str, str]:
    return {"maekit": json.dumps({"format": FORMAT, "kind": kind, "spec": model.spec, **more})}


def _save(model: MaskedAutoencoder, state: Tensors, kind: Kind, path: Path) -> None:
    # torch.compile wraps a module under this name.
    tensors = {
        name.removeprefix("_orig_mod."): value.detach().float().cpu().contiguous() for name, value in state.items()
    }
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(safetensors.torch.save(tensors, _metadata(model, kind, sha256=_digest(tensors))))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        code = "E-ENV-DISK" if error.errno == errno.ENOSPC else "E-ENV-OUT"
        raise MaekitError(code, f"cannot write {path}", found=error.strerror or error) from error
    finally:
        with contextlib.suppress(OSError):  # where nothing can be written, there is nothing to delete either
            temporary.unlink(missing_ok=True)


def _digest(tensors: Tensors) -> str:
    return checkpoint.state_sha256({"model": tensors}, {})


def _read(path: Path) -> Weights:
    """Find the file, read its header and tensors; nothing in them is believed yet but the digest."""
    if not path.exists():
        raise MaekitError("E-CKPT-MISSING", f"no weights at {path}", expected=SUPPORTED)
    if path.is_dir():
        found = _checkpoint(path)
        file = found.path / "model.safetensors"
        return Weights(file, _header(file, _open(file, False)[0]), found.tensors["model"])
    raw, tensors = _open(path, True)
    weights = Weights(path, _header(path, raw), tensors)
    if weights.header.sha256 not in (None, _digest(tensors)):
        raise MaekitError(
            "E-CKPT-DAMAGED",
            f"{path}",
            found="other values than were written (SHA-256)",
            hint="another copy of the file",
        )
    return weights


def _checkpoint(folder: Path) -> checkpoint.Checkpoint:
    """Read the checkpoint in a folder, or the newest that verifies of a run."""
    if (folder / checkpoint.MANIFEST).exists():
        return checkpoint.load(folder)
    found = checkpoint.newest(folder / "checkpoints")
    if found is None:
        raise MaekitError("E-CKPT-MISSING", f"no checkpoint in {folder} that verifies", expected=SUPPORTED)
    log.info("weights of step %d from %s", found.step, found.path)
    return found


def _open(path: Path, with_tensors: bool) -> tuple[dict[str, str], Tensors]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()} if with_tensors else {}  # noqa: SIM118
            return file.metadata() or {}, tensors
    except (SafetensorError, OSError, ValueError) as error:
        found = f"no whole safetensors file ({error})"
        raise MaekitError("E-CKPT-FORMAT", f"cannot read {path}", found=found, expected=SUPPORTED) from error


def _header(path: Path, raw: dict[str, str]) -> Header:
    if "maekit" not in raw:
        raise MaekitError(
            "E-CKPT-FORMAT", f"{path}", found="a safetensors file without maekit's metadata", expected=SUPPORTED
        )
    try:
        version = json.loads(raw["maekit"])["format"]
        if isinstance(version, int) and version > FORMAT:
            raise MaekitError(
                "E-CKPT-FORMAT",
                f"{path}",
                found=f"format {version}",
                expected=f"at most {FORMAT}",
                hint="a newer maekit",
            )
        return Header.model_validate_json(raw["maekit"])
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise MaekitError("E-CKPT-FORMAT", f"{path}", found=found, expected="metadata written by maekit") from error
    except MaekitError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # ValueError: also a number of 5000 digits
        raise MaekitError(
            "E-CKPT-FORMAT", f"{path}", found="metadata that cannot be read", expected="metadata written by maekit"
        ) from error


def _check(weights: Weights, build: Callable[[], nn.Module]) -> None:
    """Compare a file with the architecture it names before any memory is spent on that."""
    path, tensors = weights.path, weights.tensors
    try:
        with torch.device("meta"):
            expected = build().state_dict()
    except MaekitError as error:
        raise MaekitError("E-CKPT-FORMAT", f"{path} names a model that cannot be built", found=error.args[0]) from error
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        found = "; ".join(
            f"{word} {_some(names)}" for word, names in (("missing", missing), ("unknown", extra)) if names
        )
        raise MaekitError(
            "E-CKPT-KEYS", f"tensors of {path}", found=found, expected="exactly those of the model it names"
        )
    for name, value in tensors.items():
        wanted = expected[name]
        if value.shape != wanted.shape or value.dtype != wanted.dtype:
            raise MaekitError(
                "E-CKPT-SHAPE",
                f"tensor {name} of {path}",
                found=f"{tuple(value.shape)} {value.dtype}",
                expected=f"{tuple(wanted.shape)} {wanted.dtype}",
            )
    bad = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    if bad:
        raise MaekitError(
            "E-CKPT-NAN", f"tensors of {path}", found=f"NaN or infinity in {_some(bad)}", expected="finite numbers"
        )


def _limit(decoder: nn.Module) -> None:
    """Refuse to draw a decoder anew whose size only a few words in a file ask for."""
    if (found := sum(p.numel() for p in decoder.parameters())) > MOST_PARAMETERS:
        raise MaekitError(
            "E-CKPT-FORMAT", "decoder", found=f"{found} parameters", expected=f"at most {MOST_PARAMETERS}"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
