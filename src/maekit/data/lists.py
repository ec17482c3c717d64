"""List files: one image per line, ``path`` or ``path,label``, relative to the folder of the list.

A .csv or .tsv may start with a header (``path,label``). In a .txt, comma, tab or blank may part path and label: the
path ends with the last image suffix of the line, so names with blanks work. UTF-8, with or without a byte order
mark; any line ends. Whatever is doubtful is refused with its line number: a list is written by a program, and a
line skipped in silence is a class lost in silence.

Tags and numbers (`maekit.data.targets`) may stand in several columns, which a header names then.

Lists of data sets that are published with paths from somewhere else are read where the list lies beside the folder they
start from (Places365: ``/a/airfield/00000001.jpg 0``, beside ``data_256``), and so are those of Oxford-IIIT Pet.
"""

import csv
import io
import os
import re
from array import array
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

from maekit.data.annotations import open_pets
from maekit.data.columns import Names
from maekit.data.image import SUFFIXES
from maekit.data.parquet import LABEL_COLUMNS
from maekit.data.source import FileSource, absent, in_order, number, read_regular_file
from maekit.data.targets import Form, columns_of, read_targets
from maekit.errors import MaekitError

SUFFIX = (".txt", ".csv", ".tsv")
PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path")
"""Header words of the column with the path; the first present is taken."""

_TXT_LINE = re.compile(rf"(.*(?:{'|'.join(map(re.escape, sorted(SUFFIXES)))}))(?:\s*[,\t ]\s*(.*))?", re.IGNORECASE)

Line = tuple[int, str, tuple[str, ...]]
"""Line number, path, cells of the columns with the label ("" where there is none)."""


def open_list(
    path: Path,
    name: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    classes: list[str] | None = None,
    form: Form | None = None,
) -> FileSource:
    """Open a list file; see `maekit.data.sources.open_source`.

    Raises:
        MaekitError: E-DATA-LIST with the line; E-DATA-COLUMN, E-DATA-EMPTY, E-DATA-CLASSES, E-DATA-TARGETS.
    """
    try:
        text = read_regular_file(str(path)).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MaekitError("E-DATA-LIST", f"cannot read {path}", found=error, expected="a list in UTF-8") from error
    is_txt = path.suffix.lower() == ".txt"
    if is_txt and form is None and (pets := open_pets(path, text, name, classes=classes)) is not None:
        return pets
    if is_txt and form is not None and label_column is not None:
        raise MaekitError("E-DATA-COLUMN", "setting label_column", found=f"{path}, which has no header",
                          expected="a .csv, .tsv or .parquet file")  # fmt: skip
    stream = _stream(text, None if is_txt else "")
    del text  # of a million lines, as much as all else
    columns, lines = (["label"], _txt(stream, path)) if is_txt else _csv(stream, path, image_column, label_column, form)
    root, at, paths, cells = _gathered(lines, path)
    _check(at, paths, cells, path, root, needs_label=form is None)
    labels = known = targets = None
    if form is not None:
        targets = read_targets(form, columns, cells, lambda one: f"{path} line {at[one]}", known=classes, what=name)
    elif cells[0][0]:
        names = [label for (label,) in cells]
        labels, known = number(names, in_order(names), classes, name)
    return FileSource(name, paths.readable, paths, labels, known, str(root), targets=targets)


def _gathered(lines: Iterator[Line], path: Path) -> tuple[Path, np.ndarray, Names, list[tuple[str, ...]]]:
    """Return the folder that the paths start from, and line numbers, paths and cells in the order of the paths.

    No million lines are ever there as a list of Python's: that would take three times the memory.
    """
    first = next(lines, None)
    if first is None:
        raise MaekitError("E-DATA-EMPTY", f"{path} lists no images")
    root, elsewhere = _root(first, path)
    at, cells, once = array("q"), list[tuple[str, ...]](), dict[tuple[str, ...], tuple[str, ...]]()

    def paths() -> Iterator[str]:
        for number_, where, found in chain([first], lines):
            at.append(number_)
            cells.append(once.setdefault(found, found))  # a million lines name a thousand classes
            yield where.lstrip("/\\") if elsewhere else where

    names = Names.of(paths())
    order = names.order()
    return root, np.array(at)[order], names.take(order), [cells[one] for one in order]


def _refuse(path: Path, line: int | np.integer, found: str, expected: str | None = None) -> MaekitError:
    return MaekitError("E-DATA-LIST", f"{path} line {line}", found=found, expected=expected)


def _stream(text: str, newline: str | None) -> io.TextIOWrapper:
    """Return the text as a file of lines; a StringIO would hold four bytes for each letter."""
    return io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8", newline=newline)


def _txt(stream: Iterable[str], path: Path) -> Iterator[Line]:
    """Yield the lines of a .txt."""
    for at, line in enumerate(map(str.strip, stream), 1):
        if not line:
            continue
        match = _TXT_LINE.fullmatch(line)
        if match is None:
            raise _refuse(path, at, repr(line), "an image's path, then its label if it has one")
        yield at, os.path.normpath(match[1]), ((match[2] or "").strip(),)


def _csv(
    stream: Iterable[str], path: Path, image_column: str | None, label_column: str | None, form: Form | None
) -> tuple[list[str], Iterator[Line]]:
    """Return the names of the label columns and the lines of a .csv or .tsv, with or without a header."""
    rows = _rows(stream, path)
    first, header = next(rows, None), None
    if first is not None and first[0] == 1:
        header = _header(first[1], path, image_column, label_column, form)
    if first is not None and header is None:
        rows = chain([first], rows)
    where, labels = header or (0, {"label": 1})
    return list(labels), (
        (at, _path_cell(cells, where, path, at), tuple(_cell(cells, place) for place in labels.values()) or ("",))
        for at, cells in rows
        if any(cell.strip() for cell in cells)
    )


def _rows(stream: Iterable[str], path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the cells of each row, and the number of the line that it ends with."""
    reader = csv.reader(stream, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        for cells in reader:
            yield reader.line_num, cells
    except csv.Error as error:
        raise _refuse(path, reader.line_num, str(error), "comma or tab separated values") from error


def _header(
    cells: list[str], path: Path, image_column: str | None, label_column: str | None, form: Form | None
) -> tuple[int, dict[str, int]] | None:
    """Return the places of path and labels, these by the columns' names, if this is a header.

    Only of tags and numbers there may be several label columns, and none is refused.
    """
    words = [cell.strip().lower() for cell in cells]
    image = [image_column.lower()] if image_column else PATH_COLUMNS
    where = next((words.index(word) for word in image if word in words), None)
    asked = [label_column] if label_column and form is None else columns_of(label_column, cells) or []
    labels = [name.lower() for name in asked] or [next((word for word in LABEL_COLUMNS if word in words), "")]
    missing = [name for name in asked if name.lower() not in words]
    missing = [image_column] if image_column and where is None else missing
    if missing or (form is not None and where is not None and labels == [""]):
        hint = None if missing else "--label-column NAME"
        expected = f"column {missing[0]!r}" if missing else f"a column called {', '.join(LABEL_COLUMNS)}"
        raise MaekitError("E-DATA-COLUMN", f"header of {path}", found=", ".join(cells), expected=expected, hint=hint)
    if where is None:
        return None
    return where, {cells[words.index(name)].strip(): words.index(name) for name in labels if name}


def _cell(cells: list[str], at: int) -> str:
    return cells[at].strip() if 0 <= at < len(cells) else ""


def _path_cell(cells: list[str], at: int, path: Path, line: int) -> str:
    value = _cell(cells, at)
    if os.path.splitext(value)[1].lower() not in SUFFIXES:
        raise _refuse(path, line, repr(",".join(cells)), "path,label with the path of an image, or a header path,label")
    return os.path.normpath(value)


def _root(line: Line, path: Path) -> tuple[Path, bool]:
    """Return the folder that the paths start from, and whether they are spelled as from elsewhere, with / before.

    It is the list's own; or, where the first image is not there, the one folder beside the list in which it is.
    """
    at, first, _ = line
    here = path.parent
    if "\0" in first or os.path.lexists(here / first):
        return here, False
    inside = first.lstrip("/\\")
    found = [one for one in sorted(here.iterdir()) if one.is_dir() and os.path.lexists(one / inside)]
    if os.path.lexists(here / inside):
        found = [here]
    if len(found) > 1:
        names = ", ".join(one.name for one in found[:5])
        raise _refuse(path, at, f"{inside} in {names}", "the image in one folder beside the list")
    return (found[0], True) if found else (here, False)


def _check(
    at: np.ndarray, paths: Names, cells: list[tuple[str, ...]], path: Path, root: Path, *, needs_label: bool
) -> None:
    """Refuse, of lines in the order of their paths, twins, lines without a label beside others, files not there."""
    bare = [i for i, (label, *_) in enumerate(cells) if not label] if needs_label else []
    if 0 < len(bare) < len(cells):
        one = min(bare, key=at.__getitem__)
        raise _refuse(path, at[one], f"no label for {paths[one]}", "a label on every line or on none")
    for one, (before, where) in enumerate(pairwise(paths)):
        if before == where:
            raise _refuse(path, at[one + 1], f"{where} again", f"each image once (line {at[one]})")
    if gone := list(absent(root, paths)):
        one = min(gone, key=at.__getitem__)
        raise _refuse(path, at[one], f"no file {paths[one]}", f"a path relative to {root}")
