"""Images in parquet files: a binary column, or Hugging Face's struct with ``bytes``; an id is ``file.parquet:row``.

Nothing but labels is read when a source is opened. Images are read a row group at a time and kept up to
`CACHE_BYTES` per process, so what fits is read once; every worker process opens the files anew, and keeps the last
`OPEN_FILES` open, since reading what a file says of its row groups takes longer than reading one. A group that must be
decoded again for every single image is slow: larger files want small row groups, and a warning says so.

Files of ``maekit pack`` say so in their metadata (`Packed`): a column holds the images' ids, those of the source, so
that every draw by a hash of the id is the same; pixels of one size lie in an array beside (`maekit.data.pixels`).
"""

import contextlib
import json
import logging
import os
import threading
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as kind_of

from maekit.data.columns import Names, Numbers, RowNames
from maekit.data.image import sniff
from maekit.data.pixels import PixelSource
from maekit.data.source import Source, Targets, changed, in_order, number
from maekit.data.targets import Form, columns_of, read_targets
from maekit.errors import MaekitError

CACHE_BYTES = 2**29
"""Bytes of decoded image columns that one process keeps."""
OPEN_FILES = 128
"""Files that one process keeps open: half a megabyte each, at 256 row groups."""
PACKED = b"maekit"
"""Key under which a file says that ``maekit pack`` wrote it."""
LABEL_COLUMNS = ("label", "labels", "class", "target", "fine_label")
"""Names under which a label column is looked for, in this order."""
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")
"""Names that decide between several columns of image bytes."""

log = logging.getLogger("maekit")


@dataclass(frozen=True)
class Packed:
    """What a file of ``maekit pack`` says of itself.

    Attributes:
        part: "train", "val", "test" ...: what the file is a part of.
        pixels: height, width and channels where the images are rows of an array beside the file.
    """

    part: str
    pixels: tuple[int, int, int] | None = None

    @staticmethod
    def of(schema: pa.Schema) -> "Packed | None":
        """Return what a schema says, None for a file from elsewhere."""
        try:
            said = json.loads((schema.metadata or {})[PACKED])
            high, wide, channels = said["pixels"] or (1, 1, 1)
            if type(said["part"]) is str and all(type(n) is int and n > 0 for n in (high, wide, channels)):
                return Packed(said["part"], (high, wide, channels) if said["pixels"] else None)
        except (KeyError, TypeError, ValueError, RecursionError):
            pass
        return None

    def to_json(self) -> str:
        """Return what the file keeps under `PACKED`."""
        return json.dumps({"part": self.part, "pixels": self.pixels})


@dataclass(frozen=True)
class RowGroup:
    """Where a run of rows lies; `size` in bytes, decoded."""

    path: str
    index: int
    num_rows: int
    size: int


@dataclass(frozen=True, eq=False)
class ParquetSource(Source):
    """Rows of parquet files; `keys` are row numbers over all files."""

    groups: tuple[RowGroup, ...] = field(default=(), repr=False)
    column: str = "image"
    _rows: "_Rows | None" = field(default=None, repr=False)

    def read(self, i: int) -> bytes:
        """Return the bytes in row `i`."""
        if self._rows is None:
            object.__setattr__(self, "_rows", _Rows(self.groups, self.column))
        assert self._rows is not None
        try:
            data = self._rows.read(self.keys[i])
        except Exception as error:  # as in `_from`
            raise MaekitError("E-DATA-IMAGE", f"cannot read {self.ids[i]}", found=error) from error
        if data is None:
            raise MaekitError("E-DATA-IMAGE", f"cannot read {self.ids[i]}", found="an empty cell")
        return data

    @property
    def files(self) -> list[str]:
        """The files, in order."""
        return list(dict.fromkeys(group.path for group in self.groups))

    def sizes(self) -> list[int]:
        """Return the size of each file."""
        return [os.stat(path).st_size for path in self.files]

    def stamps(self) -> list[str]:
        """Return each file's place and time of change, the column, and the rows."""
        return [*map(changed, self.files), self.column, *map(str, self.keys)]

    def __getstate__(self) -> dict[str, Any]:
        """Leave cached rows behind: a worker reads its own."""
        return {**self.__dict__, "_rows": None}


class _Rows:
    """The most recently used row groups of one column; safe to share between threads."""

    def __init__(self, groups: Sequence[RowGroup], column: str) -> None:
        self.groups, self.column = groups, column
        self.starts = [0, *accumulate(group.num_rows for group in groups)]
        self.kept: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self.size = 0
        self.files: OrderedDict[str, pq.ParquetFile] = OrderedDict()
        self.lock = threading.Lock()

    def read(self, row: int) -> bytes | None:
        at = bisect_right(self.starts, row) - 1
        with self.lock:
            values = self.kept.get(at)
            if values is None:
                values = self._load(at)
            self.kept.move_to_end(at)
        return values[row - self.starts[at]].as_py()

    def _load(self, at: int) -> pa.ChunkedArray:
        group = self.groups[at]
        try:
            values = _values(self._open(group.path), group.index, self.column)
        except Exception:
            self.files.pop(group.path, None)  # who tries again opens it again
            raise
        self.size += group.size
        while self.kept and self.size > CACHE_BYTES:
            self.size -= self.groups[self.kept.popitem(last=False)[0]].size
        self.kept[at] = values
        return values

    def _open(self, path: str) -> pq.ParquetFile:
        if path not in self.files:
            while len(self.files) >= OPEN_FILES:
                self.files.popitem(last=False)[1].close()
            self.files[path] = pq.ParquetFile(path)
        self.files.move_to_end(path)
        return self.files[path]


def read_column(group: RowGroup, column: str) -> pa.ChunkedArray:
    """Return the values of a row group, of a nested column ``a.b`` the inner ones."""
    with pq.ParquetFile(group.path) as file:
        return _values(file, group.index, column)


def _values(file: pq.ParquetFile, group: int, column: str) -> pa.ChunkedArray:
    # no arrow threads: they would not survive a fork and gain nothing beside loader processes
    values = file.read_row_group(group, columns=[column], use_threads=False).column(0)
    if not kind_of.is_struct(values.type):
        return values
    chunks = [chunk.flatten()[0] for chunk in values.chunks]  # unlike field(0), keeps the nulls of the struct itself
    return pa.chunked_array(chunks, values.type.field(0).type)


def has_images(path: Path) -> bool:
    """Tell whether a parquet file has a column that could hold images."""
    try:
        if not path.is_file():
            return False
        schema = pq.read_schema(path)
        return bool(_binary_columns(schema)) or Packed.of(schema) is not None
    except Exception:  # as in `_from`; whoever opens the file says so
        return False


def open_parquet(
    paths: Sequence[Path],
    name: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    classes: list[str] | None = None,
    form: Form | None = None,
) -> ParquetSource | PixelSource:
    """Open parquet files, in the order given, as one source; see `maekit.data.sources.open_source`.

    Raises:
        MaekitError: E-DATA-PATH, E-DATA-COLUMN, E-DATA-EMPTY, E-DATA-LABELS, E-DATA-CLASSES, E-DATA-TARGETS.
    """
    schemas, groups = _layout(paths)
    schema = schemas[0]
    if not groups:
        raise MaekitError("E-DATA-EMPTY", f"{name} holds no images", found="no rows")
    packed = [Packed.of(one) for one in schemas]
    shape = packed[0].pixels if packed[0] is not None else None
    column = "" if shape else _image_column(schema, groups[0], image_column, name)
    labels = known = targets = None
    if form is not None:
        targets = _targets(paths, schema, label_column, classes, name, form)
    else:
        labels, known = _labels(paths, schema, label_column, classes, name)
    rows = Counter[str]()
    for group in groups:
        rows[group.path] += group.num_rows
    starts = [0, *accumulate(rows[str(path)] for path in paths)]
    keys = Numbers(np.arange(starts[-1]))
    ids: Names | RowNames = RowNames(keys, [path.name for path in paths], starts[:-1])
    if any(packed):
        ids = _packed_ids(paths, packed, name)
    if shape is not None:
        counts = {str(path): rows[str(path)] for path in paths}
        return PixelSource.of(name, ids, labels, known, counts, shape, targets=targets)
    _warn_of_large_groups(groups, name)
    return ParquetSource(name, ids, keys, labels, known, tuple(groups), column, targets=targets)


def _layout(paths: Sequence[Path]) -> tuple[list[pa.Schema], list[RowGroup]]:
    """Return the schema of each file and all row groups that hold rows."""
    schemas, groups = [], []
    for path in paths:
        with _from("E-DATA-PATH", f"cannot open {path}"):
            if not path.is_file():
                raise OSError("not a regular file")
            with pq.ParquetFile(path) as file:
                schemas.append(file.schema_arrow)
                for index in range(file.metadata.num_row_groups):
                    group = file.metadata.row_group(index)
                    groups.append(RowGroup(str(path), index, group.num_rows, group.total_byte_size))
    return schemas, [group for group in groups if group.num_rows]


def _packed_ids(paths: Sequence[Path], packed: Sequence[Packed | None], name: str) -> Names:
    """Return the names that images had in the source that was packed.

    Several parts of one set are told apart as their folders were: ``train/...``, ``val/...``.

    Raises:
        MaekitError: E-DATA-COLUMN for files that were not packed together, or have no ids.
    """
    if any(one is None or one.pixels != (packed[0] and packed[0].pixels) for one in packed):
        raise MaekitError("E-DATA-COLUMN", f"{name}", found="files that were packed in several ways, or not at all",
                          expected="those of one maekit pack")  # fmt: skip
    parts = {one.part for one in packed if one is not None}
    hashes = [np.empty(0, np.int64)]  # a set of all names would take more than the names

    def of_files() -> Iterator[list[str]]:
        for path, one in zip(paths, packed, strict=True):
            with _from("E-DATA-COLUMN", f"cannot read the ids of {path}"):
                found = _table(path, ["id"]).column(0).to_pylist()
            if not all(type(each) is str for each in found):
                raise MaekitError("E-DATA-COLUMN", f"ids of {path}", found="a row without text", expected="a name each")
            ids = [f"{one.part}/{each}" for each in found] if one is not None and len(parts) > 1 else found
            hashes.append(np.fromiter(map(hash, ids), np.int64, len(ids)))
            yield ids

    names = Names.of(of_files())
    if len(np.unique(np.concatenate(hashes))) < len(names):
        each, count = Counter(names).most_common(1)[0]
        if count > 1:
            raise MaekitError("E-DATA-COLUMN", f"ids of {name}", found=f"{each} twice", expected="each once")
    return names


@contextlib.contextmanager
def _from(code: str, what: str) -> Iterator[None]:
    """Refuse a file at which pyarrow failed: hostile bytes make it raise anything (OSError, UnicodeDecodeError)."""
    try:
        yield
    except Exception as error:
        raise MaekitError(code, what, found=error, expected="a whole parquet file") from error


def _binary_columns(schema: pa.Schema) -> list[str]:
    """Return the columns that hold bytes; a struct with ``bytes`` as ``name.bytes``."""
    columns = []
    for item in schema:
        if kind_of.is_struct(item.type) and item.type.get_field_index("bytes") >= 0:
            columns += [f"{item.name}.bytes"] if _is_bytes(item.type.field("bytes").type) else []
        elif _is_bytes(item.type):
            columns.append(item.name)
    return columns


def _is_bytes(kind: pa.DataType) -> bool:
    return kind_of.is_binary(kind) or kind_of.is_large_binary(kind)


def _image_column(schema: pa.Schema, group: RowGroup, asked: str | None, name: str) -> str:
    """Return the column asked for, or the one whose first value is an image."""
    columns = _binary_columns(schema)
    if asked is not None:
        columns = [column for column in columns if asked in (column, column.removesuffix(".bytes"))]
    elif len(columns) > 1:
        columns = [column for column in columns if _starts_with_image(group, column)] or columns
        columns = [next((c for word in IMAGE_COLUMNS for c in columns if c.split(".")[0] == word), columns[0])]
    if not columns:
        raise MaekitError(
            "E-DATA-COLUMN",
            f"{name} has no {'column of image bytes' if asked is None else f'column {asked!r} of bytes'}",
            found=", ".join(f"{item.name} ({item.type})" for item in schema),
            expected="a binary column, or a struct with 'bytes'",
            hint="--image-column NAME",
        )
    return columns[0]


def _starts_with_image(group: RowGroup, column: str) -> bool:
    with _from("E-DATA-PATH", f"cannot read {group.path}, column {column!r}"):
        values = read_column(group, column)
        return bool(values[0].is_valid) and sniff(values[0].as_py()) is not None


def _warn_of_large_groups(groups: list[RowGroup], name: str) -> None:
    if sum(group.size for group in groups) > CACHE_BYTES and max(group.num_rows for group in groups) > 1000:
        largest = max(group.num_rows for group in groups)
        log.warning("%s: row groups of %d rows are decoded whole to read one image; 100 are faster", name, largest)


def _labels(
    paths: Sequence[Path], schema: pa.Schema, asked: str | None, classes: list[str] | None, name: str
) -> tuple[list[int] | None, list[str] | None]:
    """Return label of each row and class names, (None, None) when there are none."""
    column = _label_column(schema, asked, name)
    if column is None:
        return None, None
    beside = f"{column}_name" if f"{column}_name" in schema.names else None
    values, *names_beside = _read(paths, [column, *filter(None, [beside])], name)
    if None in values:
        raise MaekitError("E-DATA-LABELS", f"{name} row {values.index(None)}, column {column!r}", found="no label")
    if all(isinstance(value, int) and value < 0 for value in values):
        return None, None  # Hugging Face's way to say that a split has no labels
    if beside is not None:
        names = [str(value) for value in names_beside[0]]
        first = dict(sorted(set(zip(values, names, strict=True)), reverse=True))
        return number(names, list(dict.fromkeys([*(first[v] for v in sorted(first)), *in_order(names)])), classes, name)
    if (spelled := _huggingface_names(schema, column)) is not None:
        names = [_spelled(value, spelled, f"{name} row {row}") for row, value in enumerate(values)]
        return number(names, spelled, classes, name)
    names = [str(value) for value in values]
    return number(names, in_order(names), classes, name)


def _read(paths: Sequence[Path], columns: list[str], name: str) -> list[list[Any]]:
    """Return the values of each column."""
    with _from("E-DATA-COLUMN", f"cannot read the labels of {name}"):
        table = pa.concat_tables([_table(path, columns) for path in paths])
        return [_plain(table.column(column)) for column in columns]


def _table(path: Path, columns: list[str]) -> pa.Table:
    """Return columns of a file; of many small row groups in a quarter of the time of `pq.read_table`."""
    with pq.ParquetFile(path) as file:
        return file.read(columns=columns, use_threads=False).select(columns)


def _plain(values: pa.ChunkedArray) -> list[Any]:
    """Return the values; equal texts are one object."""
    if not (kind_of.is_string(values.type) or kind_of.is_large_string(values.type)) or values.null_count:
        return values.to_pylist()
    texts = values.combine_chunks().dictionary_encode()
    known = texts.dictionary.to_pylist()
    return [known[index] for index in texts.indices.to_pylist()]


def _targets(
    paths: Sequence[Path], schema: pa.Schema, asked: str | None, known: list[str] | None, name: str, form: Form
) -> Targets:
    """Return tags or numbers of each row."""
    columns = columns_of(asked, schema.names) or [next((one for one in LABEL_COLUMNS if one in schema.names), "")]
    found = ", ".join(f"{item.name} ({item.type})" for item in schema)
    if missing := [column for column in columns if column not in schema.names]:
        expected = f"column {missing[0]!r}" if missing[0] else f"a column called {', '.join(LABEL_COLUMNS)}"
        raise MaekitError("E-DATA-COLUMN", f"labels of {name}", found=found, expected=expected,
                          hint="--label-column NAME")  # fmt: skip
    spelled = _huggingface_names(schema, columns[0])
    if form.kind == "regression" and (spelled or f"{columns[0]}_name" in schema.names) and asked is None:
        raise MaekitError("E-DATA-TARGETS", f"column {columns[0]!r} of {name}", found="classes, which have names",
                          expected="numbers", hint="--label-column NAME, or no --task")  # fmt: skip
    cells = list(zip(*_read(paths, columns, name), strict=True))
    if spelled and form.kind == "multilabel" and len(columns) == 1:
        cells = [(_all_spelled(row[0], spelled, f"{name} row {at}"),) for at, row in enumerate(cells)]
        known = known or spelled
    return read_targets(form, columns, cells, lambda at: f"{name} row {at}", known=known, what=name)


def _all_spelled(values: Any, names: list[str], where: str) -> Any:
    values = values if isinstance(values, list) or values is None else [values]
    return None if values is None else [_spelled(value, names, where) for value in values]


def _label_column(schema: pa.Schema, asked: str | None, name: str) -> str | None:
    usable = [item.name for item in schema if _is_label(item.type)]
    if asked is not None and asked not in usable:
        found = ", ".join(f"{item.name} ({item.type})" for item in schema)
        expected = f"column {asked!r} of whole numbers or text"
        raise MaekitError("E-DATA-COLUMN", f"labels of {name}", found=found, expected=expected)
    return asked or next((column for column in LABEL_COLUMNS if column in usable), None)


def _is_label(kind: pa.DataType) -> bool:
    kind = kind.value_type if kind_of.is_dictionary(kind) else kind
    return any(test(kind) for test in (kind_of.is_integer, kind_of.is_string, kind_of.is_large_string))


def _huggingface_names(schema: pa.Schema, column: str) -> list[str] | None:
    """Return the names of a ClassLabel column or of a list of them, which Hugging Face's datasets keep in the file."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        feature = feature[0] if isinstance(feature, list) else feature.get("feature", feature)
        names = [str(name) for name in feature["names"]]
    except (KeyError, IndexError, AttributeError, TypeError, ValueError, RecursionError):
        return None
    return names if len(set(names)) == len(names) else None


def _spelled(value: Any, names: list[str], where: str) -> str:
    if isinstance(value, int) and not 0 <= value < len(names):
        raise MaekitError("E-DATA-LABELS", where, found=f"label {value}", expected=f"0 to {len(names) - 1}")
    return names[value] if isinstance(value, int) else value
