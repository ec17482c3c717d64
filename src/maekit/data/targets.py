"""Tags and numbers of images, out of the cells of a list or of parquet columns.

Tags (``multilabel``) stand in one column, as names at a separator (``cat|dog``; nothing: none of them) or as a list of
names, or in several columns of 0 and 1, each of which is a tag. Numbers (``regression``) are one or several columns.
Whatever is doubtful is refused with its line: a cell that was left empty is no zero.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from maekit.data.source import Targets, in_order, number
from maekit.errors import MaekitError

MOST_CELLS = 2**32
"""Images times tags, a byte each: a column of names of images taken for tags would ask for more."""
TICKS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
"""How 0 and 1 are spelled in a column of one tag."""

Cells = Sequence[Sequence[Any]]
"""For each image the cells of the columns that were asked for: text, or values of parquet."""
Where = Callable[[int], str]
"""Names the line of an image."""


@dataclass(frozen=True)
class Form:
    """What is read of each image in place of one class.

    Attributes:
        kind: tags, or numbers.
        separator: between the tags in one cell.
    """

    kind: Literal["multilabel", "regression"]
    separator: str = "|"


def columns_of(asked: str | None, present: Sequence[str]) -> list[str] | None:
    """Return the columns that a setting names, ``age`` or ``x,y``; None where it names none.

    A name that is there as it stands is one column, whatever commas it has.
    """
    if asked is None:
        return None
    parts = [name.strip() for name in asked.split(",") if name.strip()]
    return [asked] if asked in present or not parts else list(dict.fromkeys(parts))


def read_targets(
    form: Form, columns: Sequence[str], cells: Cells, where: Where, *, known: list[str] | None, what: str
) -> Targets:
    """Read the targets of all images.

    Args:
        columns: names of the columns.
        cells: of each image.
        where: names the line of an image.
        known: tags of another source, whose order is kept; columns have their own.
        what: the source, for messages.

    Raises:
        MaekitError: E-DATA-TARGETS with the line; E-DATA-CLASSES for a tag that is not known.
    """
    if form.kind == "regression":
        return Targets(list(columns), _table(cells, columns, where, _number))
    if len(columns) > 1 or all(_spelled(row[0]) in TICKS for row in cells):
        return Targets(list(columns), _table(cells, columns, where, _tick).astype(np.uint8))
    return _tags([_names(row[0], form.separator, where, at) for at, row in enumerate(cells)], known, what)


def _tags(names: list[list[str]], known: list[str] | None, what: str) -> Targets:
    """Return 0 and 1 for each image and tag."""
    flat = [name for each in names for name in each]
    labels, order = number(flat, in_order(flat), known, what)
    if not order:
        raise MaekitError("E-DATA-TARGETS", f"{what}", found="no tag of any image", expected="names of tags")
    if len(names) * len(order) > MOST_CELLS:
        raise MaekitError(
            "E-DATA-TARGETS", f"tags of {what}", found=f"{len(order)} names for {len(names)} images",
            expected="names that images share", hint="another --label-column or --label-separator",
        )  # fmt: skip
    values = np.zeros((len(names), len(order)), dtype=np.uint8)
    values[np.repeat(np.arange(len(names)), [len(each) for each in names]), np.array(labels, dtype=int)] = 1
    return Targets(list(order), values)


def _names(cell: Any, separator: str, where: Where, at: int) -> list[str]:
    if cell is None:
        raise _refuse(where(at), "no value", "names; an empty list or text for none of them")
    parts = cell.split(separator) if isinstance(cell, str) else list(cell) if isinstance(cell, list | tuple) else [cell]
    names = [str(part).strip() for part in parts if part is not None and str(part).strip()]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise _refuse(where(at), f"{twice!r} twice", "each tag once; for 0 and 1 of every tag, a column for each")
    return names


def _table(cells: Cells, columns: Sequence[str], where: Where, read: Callable[[Any], float | None]) -> np.ndarray:
    """Return (n, K) double of what `read` makes of each cell; it says None of what it does not take."""
    values = np.zeros((len(cells), len(columns)))
    for at, row in enumerate(cells):
        for place, cell in enumerate(row):
            value = read(cell)
            if value is None:
                found = "an empty cell" if cell is None or cell == "" else repr(cell)
                expected = "a finite number" if read is _number else "0 or 1"
                raise _refuse(f"{where(at)}, column {columns[place]!r}", found, expected)
            values[at, place] = value
    return values


def _number(cell: Any) -> float | None:
    if isinstance(cell, bool | list) or (isinstance(cell, str) and "_" in cell):  # 1_000 is Python's, not a file's
        return None
    try:
        value = float(cell)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def _tick(cell: Any) -> float | None:
    return TICKS.get(_spelled(cell))


def _spelled(cell: Any) -> str:
    return str(cell).strip().lower()


def _refuse(where: str, found: str, expected: str) -> MaekitError:
    return MaekitError("E-DATA-TARGETS", where, found=found, expected=expected)
