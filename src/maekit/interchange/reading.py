"""Weights that were read, in maekit's names, and their check against the architecture that they name.

A `Reading` is what every part of this room passes on: whatever wrote the file, from here on it is one form.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maekit.errors import MaekitError, clean
from maekit.interchange.files import Tensors
from maekit.interchange.names import Row
from maekit.model.encoder import create_encoder
from maekit.model.heads import encoder_spec
from maekit.model.mae import create_model


class Hints(NamedTuple):
    """What a file may not say by itself.

    Attributes:
        model: timm's name of the architecture.
        num_heads: of the encoder.
        decoder_heads: of the decoder.
        target: "norm_pixel" | "pixel".
        img_size: H, W in pixels, for grids that are not square.
    """

    model: str | None = None
    num_heads: int | None = None
    decoder_heads: int | None = None
    target: str | None = None
    img_size: tuple[int, int] | None = None


class Reading(NamedTuple):
    """Weights in maekit's names, whatever layout they were in.

    Attributes:
        path: of the file, or of the folder's file that was read.
        container: "safetensors" | "sharded safetensors" | "torch" | "sharded torch".
        layout: "maekit" | "official" | "timm" | "transformers" | "detectron2" | "torchvision".
        kind: "mae" | "encoder" | "classifier".
        spec: arguments of `create_model`.
        tensors: float32 state dict of that kind: whole model, encoder alone, or timm's model with its head.
        classes: names of a classifier's outputs, empty if it has none.
        pool: "mean" | "cls" of a classifier.
        rows: what became of each tensor of the file, and each tensor that was made.
        notes: what was taken for granted, in words.
        facts: plain values that stood beside the weights: ``epoch``, ``args``.
        beside: what else was in the file and is not read: ``optimizer``, ``scaler``.
        task: what a classifier's outputs are: "classes" | "multilabel" | "regression".
    """

    path: Path
    container: str
    layout: str
    kind: str
    spec: dict[str, Any]
    tensors: Tensors
    classes: list[str]
    pool: str | None
    rows: list[Row]
    notes: list[str]
    facts: dict[str, Any]
    beside: list[str]
    task: str = "classes"

    def whole(self) -> Tensors:
        """Return the tensors under the names of a whole autoencoder: ``encoder.``, ``decoder.``."""
        return self.tensors if self.kind == "mae" else {f"encoder.{name}": t for name, t in self.tensors.items()}

    def num_classes(self) -> int:
        """Return the number of a classifier's outputs, 0 of anything else."""
        return len(self.tensors["head.weight"]) if self.kind == "classifier" else 0


def expected_tensors(spec: dict[str, Any], kind: str, pool: str | None, num_classes: int) -> Tensors:
    """Return names, shapes and types of a model, without memory.

    Raises:
        MaekitError: E-CONFIG-* where the spec names no model that can be built.
    """
    with torch.device("meta"):
        if kind == "classifier":
            return create_encoder(**encoder_spec(spec), num_classes=num_classes, pool=pool or "cls").state_dict()
        model = create_model(**spec)
        return (model if kind == "mae" else model.encoder).state_dict()


def check(path: Path, tensors: Tensors, expected: Tensors, whose: str, hint: str = "another copy of the file") -> None:
    """Compare names, shapes, types and values with an architecture's before any memory is spent on that.

    Raises:
        MaekitError: E-CKPT-KEYS; E-CKPT-SHAPE with the first three that disagree; E-CKPT-NAN.
    """
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        parts = [f"{word} {some(names)}" for word, names in (("missing", missing), ("unknown", extra)) if names]
        raise MaekitError(
            "E-CKPT-KEYS", f"tensors of {path}", found="; ".join(parts), expected=f"those of {whose}", hint=hint
        )
    wrong = [
        f"{name} {tuple(value.shape)} {_type(value)}, not {tuple(expected[name].shape)} {_type(expected[name])}"
        for name, value in tensors.items()
        if value.shape != expected[name].shape or value.dtype != expected[name].dtype
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        found = "; ".join(wrong[:3]) + more
        raise MaekitError("E-CKPT-SHAPE", f"tensors of {path}", found=found, expected=f"those of {whose}", hint=hint)
    bad = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    if bad:
        found = f"NaN or infinity in {some(bad)}"
        raise MaekitError(
            "E-CKPT-NAN",
            f"tensors of {path}",
            found=found,
            expected="finite numbers",
            hint="an earlier one",
        )


def some(names: Iterable[str]) -> str:
    """Return the first three names, and how many more there are."""
    names = list(names)
    return ", ".join(clean(name, 80) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _type(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
