"""Weights of other libraries, read into maekit's names: which layout it is, what becomes of each tensor.

A file is taken for the layout that names most of its tensors; `architecture` finds what model they make. Nothing is
dropped silently: a `Reading` has one row for every tensor of the file and every tensor that was made.
"""

import difflib
import re

import torch
from torch import Tensor

from maekit.errors import MaekitError, clean
from maekit.interchange.architecture import complete
from maekit.interchange.files import File, Tensors
from maekit.interchange.names import LAYOUTS, QKV, Layout, Place, Row, place, theirs
from maekit.interchange.reading import Hints, Reading


def recognise(file: File, hints: Hints) -> Reading:
    """Find layout and architecture of the tensors of a file.

    Raises:
        MaekitError: E-CKPT-LAYOUT for names that no layout has (with the nearest ones); E-CKPT-KEYS, E-CKPT-SHAPE,
            E-CKPT-NAN, E-CKPT-HEADS as `architecture.complete`.
    """
    layout = find_layout(file)
    found, rows = _gather(file, layout)
    name = "timm" if layout.name == "official" and _is_timm(file) else layout.name
    return complete(file, name, found, rows, hints)


def find_layout(file: File) -> Layout:
    """Return the layout that names most of a file's tensors, at best without a wrapper before the names.

    Raises:
        MaekitError: E-CKPT-LAYOUT.
    """
    names = list(file.tensors)

    def score(layout: Layout) -> tuple[int, int]:
        found = {name: there for name in names if (there := place(layout, name))}
        return len(found), sum(name in theirs(layout, there.ours) for name, there in found.items())

    scores = [score(layout) for layout in LAYOUTS]
    best = LAYOUTS[scores.index(max(scores))]
    there = {found.ours for name in names if (found := place(best, name))}
    if "encoder.patch_embed.proj.weight" not in there or not any(
        name.startswith("encoder.blocks.0.") for name in there
    ):
        raise _unknown(file, best, max(scores)[0])
    return best


def _unknown(file: File, best: Layout, count: int) -> MaekitError:
    """List the ten names of the file that come nearest to a layout's, and the best guess."""
    known = [*best.once, *(f"{prefix}.0.{part}" for prefix in best.lists for part in best.parts)]

    def distance(name: str) -> float:
        stem = re.sub(r"\d+", "0", name.rpartition(".")[0] or name)
        return -max(difflib.SequenceMatcher(None, stem, one).ratio() for one in known)

    names = sorted(file.tensors, key=distance)[:10] if len(file.tensors) <= 5000 else sorted(file.tensors)[:10]
    guess = f"{best.name} ({count} of {len(file.tensors)} names)" if count else "none, no vision transformer's"
    return MaekitError(
        "E-CKPT-LAYOUT",
        f"layout of {file.path}: nearest of its names {', '.join(clean(name, 48) for name in names)}",
        found=f"no whole layout, best guess {guess}",
        expected="official, timm, transformers, detectron2 or torchvision names",
        hint="maekit inspect FILE on a file that works shows what they look like",
    )


def _is_timm(file: File) -> bool:
    return "architecture" in file.config or (
        file.container.endswith("safetensors") and "mask_token" not in file.tensors
    )


def _gather(file: File, layout: Layout) -> tuple[Tensors, list[Row]]:
    """Rename all tensors, put split qkv together, and write down what became of each."""
    found: Tensors = {}
    rows: list[Row] = []
    thirds: dict[str, dict[int, str]] = {}
    for name, value in file.tensors.items():
        where = place(layout, name)
        if where is None:
            rows.append(Row(name, "", "left out", ""))
        elif where.third is not None:
            thirds.setdefault(where.ours, {})[where.third] = name
        else:
            _once(file, found, where, name)
            found[where.ours] = value
            rows.append(_row(name, where.ours, value))
    for ours, parts in thirds.items():
        if len(parts) < 3 or ours in found:
            lacks = " and ".join(QKV[third] for third in range(3) if third not in parts) or "nothing: it is there twice"
            raise MaekitError("E-CKPT-KEYS", f"{ours} of {file.path}", found=f"query, key and value without {lacks}")
        values = [file.tensors[parts[third]] for third in range(3)]
        kinds = [f"{tuple(value.shape)} {value.dtype}".replace("torch.", "") for value in values]
        if len(set(kinds)) > 1 or values[0].ndim == 0:
            found_kinds = ", ".join(kinds)
            raise MaekitError("E-CKPT-SHAPE", f"{ours} of {file.path}", found=found_kinds, expected="three alike")
        found[ours] = torch.cat(values)
        rows += [Row(parts[third], ours, "reshaped", f"{QKV[third]} of the fused qkv") for third in range(3)]
    return {name: _float(file, name, value, rows) for name, value in found.items()}, rows


def _once(file: File, found: Tensors, where: Place, name: str) -> None:
    if where.ours in found:
        raise MaekitError(
            "E-CKPT-KEYS", f"{file.path}", found=f"two tensors for {where.ours}, one {clean(name, 80)}", expected="one"
        )


def _row(name: str, ours: str, value: Tensor) -> Row:
    same = name in (ours, ours.removeprefix("encoder."))
    return Row(name, ours, "used" if same else "renamed", "x".join(map(str, value.shape)))


def _float(file: File, name: str, value: Tensor, rows: list[Row]) -> Tensor:
    """Return float32; say so where it was another type, refuse what is no number of that kind."""
    if value.dtype == torch.float32:
        return value
    if (
        not value.is_floating_point() or value.dtype == torch.float4_e2m1fn_x2
    ):  # two in a byte, which torch cannot take apart
        raise MaekitError("E-CKPT-SHAPE", f"tensor {name} of {file.path}", found=value.dtype, expected="float")
    for at, row in enumerate(rows):
        if row.ours == name and row.what != "left out":
            rows[at] = row._replace(what="reshaped", note=f"{value.dtype} to float32".replace("torch.", ""))
    return value.float()
