"""Weights in and out: maekit's own files, and the door through which every other layout is read.

maekit writes one safetensors file that says by itself what it holds. The header's metadata carries, under "maekit", a
JSON object with format number, kind ("mae", "encoder" or "classifier") and the model's ``spec``. A file is read in this
order, so that a wrong or hostile one costs nothing: metadata checked against a schema, the architecture built without
memory, names, shapes, types and digest compared, values checked for NaN, and only then a model is allocated and filled.
Files of other libraries go through `files` and `foreign`. Code in a file is never run.
"""

import contextlib
import errno
import json
import logging
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn

from maekit.config import load_yaml
from maekit.disk import put
from maekit.errors import MaekitError
from maekit.interchange.card import Origin, origin, refuse_other_card, write_card
from maekit.interchange.card import card as model_card
from maekit.interchange.classifier import Classifier
from maekit.interchange.files import READABLE, Tensors, read_file
from maekit.interchange.foreign import recognise
from maekit.interchange.names import Row
from maekit.interchange.reading import Hints, Reading, check, expected_tensors
from maekit.interchange.said import contradiction
from maekit.model.encoder import create_encoder, geometry
from maekit.model.heads import ExactLinear, encoder_spec
from maekit.model.mae import MaskedAutoencoder, create_model
from maekit.settings import FORMAT
from maekit.train import checkpoint

log = logging.getLogger("maekit")

Kind = Literal["mae", "encoder", "classifier"]
Count = Annotated[int, Field(ge=1, le=65536)]
Depth = Annotated[int, Field(ge=1, le=1024)]
"""Upper limits of every size in a file: far above any model, far below what would hang the check."""
NO_HINTS = Hints()
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
    decoder_depth: Annotated[int, Field(ge=0, le=1024)]
    decoder_heads: Count
    target: str
    target_spec: dict[str, JsonValue] | None = None
    variant: dict[str, bool | int | float | str] | None = None
    mean: list[float]
    std: list[float]

    def arguments(self) -> dict[str, Any]:
        """Return them as `MaskedAutoencoder.spec` holds them."""
        spec = self.model_dump(mode="json")
        return {name: spec[name] for name in spec if name not in ("variant", "target_spec") or spec[name] is not None}


class Header(BaseModel):
    """What a file says about itself."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: int
    kind: Kind
    spec: Spec
    sha256: str | None = None
    classes: list[str] | None = None
    pool: Literal["mean", "cls"] | None = None
    task: Literal["classes", "multilabel", "regression"] = "classes"
    target_mean: list[float] | None = None
    target_std: list[float] | None = None


def metadata(
    model: MaskedAutoencoder, *, classes: Sequence[str] | None = None, pool: str | None = None, **more: Any
) -> dict[str, str]:
    """Return the safetensors metadata that makes weights load by themselves.

    Args:
        model: whose ``spec`` is written.
        classes: of a classifier on the model's encoder; with `pool` it marks the file as a classifier's.
        pool: "mean" | "cls" of that classifier.
        more: its ``task`` unless it is one class an image; of numbers ``target_mean`` and ``target_std``, in which the
            head's outputs count: `read_weights` gives a head of the user's units.
    """
    if pool is None:
        return _metadata(model.spec, "mae")
    names = None if classes is None else list(classes)
    return _metadata(model.spec, "classifier", classes=names, pool=pool, **more)


def save_model(
    model: MaskedAutoencoder,
    path: str | Path,
    *,
    card: bool = False,
    licence: str = "",
    data: str = "",
    recipe: str = "",
    run: str | Path | None = None,
) -> None:
    """Write encoder, decoder and ``spec`` into one safetensors file, in float32, whole or not at all.

    Args:
        model: as it is.
        path: of the file; one that is there is replaced.
        card: write a model card beside it, README.md, as model hubs show it.
        licence: of the weights, for the card, which is refused without one.
        data: what they were trained on, for the card.
        recipe: what they were trained by, for the card.
        run: run folder that says both, and what deviates from its recipe.

    Raises:
        MaekitError: E-CONFIG-LICENCE for a card without licence, E-CONFIG-CARD for what only a card would say without
            one; E-ENV-DISK if the disk is full, E-ENV-OUT if the place
            cannot be written, or holds a README.md that is no card of ours.
    """
    path, text = Path(path), ""
    given = {"licence": licence, "data": data, "recipe": recipe, "run": run}
    if unheard := [name for name, value in given.items() if value and not card]:
        raise MaekitError(
            "E-CONFIG-CARD", f"argument {unheard[0]}", found="card False", expected="card True: the card says it"
        )
    if card:
        said = origin(Path(run)) if run is not None else Origin()
        said = said._replace(data=data or said.data, recipe=recipe or said.recipe)
        state = dict(model.state_dict())
        reading = Reading(path, "safetensors", "maekit", "mae", model.spec, state, [], None, [], [], {}, [])
        text = model_card(reading, licence, said, name=path.name)
        refuse_other_card(path.parent)
    _save(model.spec, model.state_dict(), "mae", path)
    if card:
        write_card(path.parent, text)


def save_encoder(model: MaskedAutoencoder, path: str | Path) -> None:
    """Write the encoder alone under timm's names: ``timm.create_model(name, ..., checkpoint_path=path)`` reads it.

    Raises:
        MaekitError: as `save_model`.
    """
    _save(model.spec, model.encoder.state_dict(), "encoder", Path(path))


def read_weights(path: str | Path, hints: Hints = NO_HINTS) -> Reading:
    """Read weights of any layout into memory, checked; no model is built yet.

    Args:
        path: a run folder (the epoch it chose, if it chose one, else its newest checkpoint that verifies), one
            checkpoint's folder, a file of maekit, or what another library wrote: a file, or a folder with
            ``config.json``.
        hints: what a file of another library does not say by itself.

    Raises:
        MaekitError: E-CKPT-MISSING, E-CKPT-FORMAT (no weights, or a newer maekit's), E-CKPT-PICKLE, E-CKPT-SIZE,
            E-CKPT-DAMAGED, E-CKPT-LAYOUT, E-CKPT-HEADS, E-CKPT-KEYS, E-CKPT-SHAPE, E-CKPT-NAN; the message names file
            and tensor.
    """
    path = Path(path)
    if _holds_checkpoint(path):
        found = _checkpoint(path)
        file = found.path / "model.safetensors"
        header = _header(file, _metadata_of(file))
        _agree(hints, header.spec.model_dump(mode="json"))
        return _own(file, header, found.tensors["model"])
    file = read_file(path)
    if "maekit" not in file.metadata:
        return recognise(file, hints)
    header = _header(file.path, file.metadata)
    _agree(hints, header.spec.model_dump(mode="json"))
    if header.sha256 not in (None, _digest(file.tensors)):
        raise MaekitError(
            "E-CKPT-DAMAGED",
            f"{path}",
            found="other values than were written (SHA-256)",
            hint="another copy of the file",
        )
    return _own(file.path, header, file.tensors)


def load_model(path: str | Path, *, random_init: bool = False, hints: Hints = NO_HINTS) -> MaskedAutoencoder:
    """Load a masked autoencoder on the CPU, in eval mode.

    Args:
        path: anything `read_weights` reads. Where it holds no decoder, that is drawn anew, and a line says so.
        random_init: take the architecture only; all weights are drawn anew.
        hints: what a file of another library does not say by itself.

    Raises:
        MaekitError: as `read_weights`; E-CKPT-KIND for a classifier.
    """
    return as_model(read_weights(path, hints), random_init=random_init)


def as_model(reading: Reading, *, random_init: bool = False) -> MaskedAutoencoder:
    """Build the masked autoencoder of weights that were read, in eval mode.

    Raises:
        MaekitError: E-CKPT-KIND for a classifier; E-CKPT-FORMAT for a decoder to draw that is larger than any.
    """
    if reading.kind == "classifier":
        raise MaekitError(
            "E-CKPT-KIND",
            f"{reading.path}",
            found="a fine-tuned classifier",
            expected="a masked autoencoder or its encoder",
            hint="the weights it was fine-tuned from, finetune --new-head, or maekit.load_classifier",
        )
    if reading.kind == "encoder":
        _limit(reading.spec)
    model = create_model(**reading.spec).eval()
    if random_init:
        return model
    if reading.kind == "encoder":
        log.info("%s holds the encoder only: the decoder is drawn anew", reading.path)
    (model.encoder if reading.kind == "encoder" else model).load_state_dict(reading.tensors)
    return model


def without_head(reading: Reading) -> MaskedAutoencoder:
    """Build an autoencoder around a classifier's encoder: head, norm under a mean of tokens and decoder are drawn anew.

    Raises:
        MaekitError: E-CKPT-KIND for weights without a head; E-CKPT-FORMAT as `as_model`.
    """
    if reading.kind != "classifier":
        raise MaekitError(
            "E-CKPT-KIND", f"{reading.path}", found="weights without a head", expected="a fine-tuned classifier",
            hint="no --new-head: every fine-tune of such weights has one",
        )  # fmt: skip
    _limit(reading.spec)
    model = create_model(**reading.spec).eval()
    taken = {name: value for name, value in reading.tensors.items() if not name.startswith(("head.", "fc_norm."))}
    missing = model.encoder.load_state_dict(taken, strict=False).missing_keys
    assert all(name.startswith("norm.") for name in missing), missing
    return model


def load_classifier(path: str | Path, hints: Hints = NO_HINTS) -> Classifier:
    """Load what ``maekit finetune`` made, or a fine-tuned file of another library, on the CPU, in eval mode.

    ``load_classifier(path)(images)`` gives probabilities (B, classes), see `Classifier.forward`; ``.model`` is timm's.

    Args:
        path: the run folder, one checkpoint's folder, or anything `read_weights` reads that has a head.
        hints: as `read_weights`.

    Raises:
        MaekitError: as `read_weights`; E-CKPT-KIND for weights without a head.
    """
    return as_classifier(read_weights(path, hints), _crop_of_run(Path(path)))


def as_classifier(reading: Reading, crop_pct: float | None = None) -> Classifier:
    """Build the classifier of weights that were read, in eval mode.

    Args:
        reading: of weights with a head.
        crop_pct: part of the resized image that it sees; None: the usual one.

    Raises:
        MaekitError: E-CKPT-KIND for weights without a head.
    """
    if reading.kind != "classifier" or reading.pool is None:
        raise MaekitError(
            "E-CKPT-KIND",
            f"{reading.path}",
            found=f"{'a masked autoencoder' if reading.kind == 'mae' else 'an encoder'}, pre-trained",
            expected="a fine-tuned classifier",
            hint="maekit finetune",
        )
    model = create_encoder(**encoder_spec(reading.spec), num_classes=reading.num_classes(), pool=reading.pool).eval()
    model.load_state_dict(reading.tensors)
    assert model.pos_embed is not None and isinstance(model.head, nn.Linear)
    model.pos_embed.requires_grad_(True)
    if reading.task == "regression":
        model.head = ExactLinear.instead_of(model.head)
    return Classifier(model, reading.classes, reading.spec, crop_pct, reading.task).eval()


def _crop_of_run(path: Path) -> float | None:
    """Return the crop that a run of ``finetune`` was scored with, None where it was the usual one."""
    file = path / "config.yaml"
    value = load_yaml(file).get("crop_pct") if file.is_file() else None
    return None if value is None else float(value)


def save_reading(reading: Reading, path: Path) -> None:
    """Write weights of any kind that were read as a file of maekit's own, which holds all of them.

    Raises:
        MaekitError: as `save_model`.
    """
    more: dict[str, Any] = {}
    if reading.kind == "classifier":
        more = {"classes": reading.classes or None, "pool": reading.pool}
        more |= {} if reading.task == "classes" else {"task": reading.task}
    _save(reading.spec, reading.tensors, reading.kind, path, **more)


def _metadata(spec: dict[str, Any], kind: str, **more: Any) -> dict[str, str]:
    return {"maekit": json.dumps({"format": FORMAT, "kind": kind, "spec": spec, **more})}


def _save(spec: dict[str, Any], state: Tensors, kind: str, path: Path, **more: Any) -> None:
    # torch.compile wraps a module under this name.
    tensors = {
        name.removeprefix("_orig_mod."): value.detach().float().cpu().contiguous() for name, value in state.items()
    }
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(safetensors.torch.save(tensors, _metadata(spec, kind, sha256=_digest(tensors), **more)))
        put(temporary, path)
    except OSError as error:
        code = "E-ENV-DISK" if error.errno == errno.ENOSPC else "E-ENV-OUT"
        raise MaekitError(code, f"cannot write {path}", found=error.strerror or error) from error
    finally:
        with contextlib.suppress(OSError):  # where nothing can be written, there is nothing to delete either
            temporary.unlink(missing_ok=True)


def _digest(tensors: Tensors) -> str:
    return checkpoint.state_sha256({"model": tensors}, {})


def _holds_checkpoint(path: Path) -> bool:
    try:
        return path.is_dir() and ((path / checkpoint.MANIFEST).exists() or (path / "checkpoints").exists())
    except OSError:  # a name too long, a folder that may not be entered: `read_file` says so
        return False


def _checkpoint(folder: Path) -> checkpoint.Checkpoint:
    """Read the checkpoint in a folder; of a run the best epoch's where it chose one, else the newest that verifies."""
    if (folder / checkpoint.MANIFEST).exists():
        return checkpoint.load(folder)
    best = folder / "best"
    found = checkpoint.newest(best if best.exists() else folder / "checkpoints")
    if found is None:
        raise MaekitError("E-CKPT-MISSING", f"no checkpoint in {folder} that verifies", expected=READABLE)
    log.info("weights of step %d from %s", found.step, found.path)
    return found


def _metadata_of(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        found = f"no whole safetensors file ({error})"
        raise MaekitError("E-CKPT-FORMAT", f"cannot read {path}", found=found, expected=READABLE) from error


def _header(path: Path, raw: dict[str, str]) -> Header:
    if "maekit" not in raw:
        raise MaekitError(
            "E-CKPT-FORMAT", f"{path}", found="a safetensors file without maekit's metadata", expected="a checkpoint"
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


def _agree(hints: Hints, spec: dict[str, Any]) -> None:
    """Refuse hints that a file of ours, which says everything itself, contradicts.

    Raises:
        MaekitError: E-CONFIG-HINT.
    """
    has: dict[str, Any] = {
        "model": spec["name"],
        "num_heads": spec["num_heads"] or (geometry(spec["name"]).heads if hints.num_heads else None),
        "decoder_heads": spec["decoder_heads"],
        "target": spec["target"],
        "source_size": tuple(spec["img_size"]),
    }
    for name, given in zip(has, hints, strict=True):
        if given is not None and given != has[name]:
            raise contradiction(name, given, f"{has[name]}, as the file says")


def _own(path: Path, header: Header, tensors: Tensors) -> Reading:
    """Compare a file of maekit's with the architecture it names before any memory is spent on that."""
    spec, kind = header.spec.arguments(), header.kind
    head = tensors.get("head.bias")
    if kind == "classifier" and (header.pool is None or head is None or head.ndim != 1):
        raise MaekitError("E-CKPT-FORMAT", f"{path}", found="a classifier without pool or head")
    pool = header.pool if kind == "classifier" else None
    blocks = (spec["depth"] or 0) + (spec["decoder_depth"] if kind == "mae" else 0)
    if blocks > len(tensors):  # to build a thousand, without memory, takes seconds
        raise MaekitError("E-CKPT-KEYS", f"tensors of {path}", found=f"{len(tensors)} for {blocks} blocks",
                          expected="those of the model it names", hint="another copy of the file")  # fmt: skip
    try:
        expected = expected_tensors(spec, kind, pool, 0 if head is None else head.numel())
    except MaekitError as error:
        raise MaekitError("E-CKPT-FORMAT", f"{path} names a model that cannot be built", found=error.args[0]) from error
    check(path, tensors, expected, "the model it names")
    rows = [Row(name, name, "used", "x".join(map(str, value.shape))) for name, value in tensors.items()]
    tensors = _in_units(path, header, tensors)
    classes = header.classes or []
    return Reading(path, "safetensors", "maekit", kind, spec, tensors, classes, pool, rows, [], {}, [], header.task)


def _in_units(path: Path, header: Header, tensors: Tensors) -> Tensors:
    """Return weights whose head gives numbers in the user's units where it was trained in standard deviations."""
    mean, std = header.target_mean, header.target_std
    if mean is None and std is None:
        return tensors
    weight, bias = tensors.get("head.weight"), tensors.get("head.bias")
    if (
        header.task != "regression"
        or weight is None
        or bias is None
        or not len(mean or []) == len(std or []) == len(bias)
    ):
        raise MaekitError("E-CKPT-FORMAT", f"{path}", found="mean and deviation of numbers that no head gives")
    scale, shift = (torch.tensor(values, dtype=torch.double) for values in (std, mean))
    head = {"head.weight": weight.double() * scale[:, None], "head.bias": bias.double() * scale + shift}
    return tensors | {name: value.float() for name, value in head.items()}


def _limit(spec: dict[str, Any]) -> None:
    """Refuse to draw a decoder anew whose size only a few words in a file ask for."""
    with torch.device("meta"):
        found = sum(p.numel() for p in create_model(**spec).decoder.parameters())
    if found > MOST_PARAMETERS:
        raise MaekitError(
            "E-CKPT-FORMAT", "decoder", found=f"{found} parameters", expected=f"at most {MOST_PARAMETERS}"
        )
