"""What a run reads, written down: names, sizes, labels and, where asked for, contents of images and masks.

A run keeps it as ``data.parquet``, some megabytes for a million images, so that a later launch can say which images
came, went or changed. A row is one image (``part`` says what it is for), one file of a parquet data set or one mask;
``size`` is in bytes, ``sha256`` of the contents, of the decoded image where there are no bytes. What a later launch
does not know (null) is not compared.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from maekit.data.columns import Names, Numbers, compute
from maekit.data.masks import Masks
from maekit.data.parquet import ParquetSource
from maekit.data.pixels import PixelSource
from maekit.data.source import Source, read_regular_file
from maekit.errors import MaekitError

FILE = "data.parquet"
SCHEMA = pa.schema(
    [("part", pa.string()), ("id", pa.string()), ("size", pa.int64()), ("label", pa.string()), ("sha256", pa.string())]
)
UNREADABLE = "0" * 64
"""In the place of a digest."""
MOST_NAMED = 5
"""Names that a message gives."""
READERS = 4
"""Threads that hash; reading and SHA-256 release the GIL."""


@dataclass
class Difference:
    """What is other than it was; each entry is a name, after its part where that is not train.

    Attributes:
        changed: of another size, label or content.
        moved: those that are in both are in another order.
    """

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    moved: bool = False

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed or self.moved)

    @property
    def counts(self) -> dict[str, int]:
        """How many came, went and changed."""
        return {"added": len(self.added), "removed": len(self.removed), "changed": len(self.changed)}

    @property
    def first(self) -> list[str]:
        """The first names, with a sign: + added, - removed, ~ changed."""
        signed = [f"{sign}{name}" for sign, names in zip("+-~", self._lists(), strict=True) for name in names]
        return signed[:MOST_NAMED]

    def _lists(self) -> tuple[list[str], list[str], list[str]]:
        return self.added, self.removed, self.changed

    def __str__(self) -> str:
        told = [f"{count} {word}" for word, count in self.counts.items() if count]
        return f"{', '.join(told)}: {', '.join(self.first)}" if told else "the same ones in another order"


def manifest(parts: Mapping[str, Source], masks: Masks | None = None) -> pa.Table:
    """Return names, sizes and labels of images and masks; of one file of masks the content too.

    Args:
        parts: images by what they are for; "train" are those trained on.
        masks: given ones.
    """
    tables = [table for part, source in parts.items() for table in _rows_of(part, source)]
    if masks is not None and masks.files is None:
        digest = hashlib.sha256(masks.path.read_bytes()).hexdigest()
        tables.append(_table("masks", [masks.path.name], [masks.path.stat().st_size], sha256=[digest]))
    elif masks is not None and masks.files is not None:
        sizes = [_size(str(masks.path / name)) for name in masks.files]
        tables.append(_table("masks", masks.files, sizes))
    return pa.concat_tables(tables)


def with_contents(table: pa.Table, digests: Iterable[str]) -> pa.Table:
    """Return the table with the digests of `contents`."""
    have = table["sha256"].to_pylist()
    left = iter(digests)
    files = [part.endswith(" files") for part in table["part"].to_pylist()]
    column = [one if one is not None or file else next(left) for one, file in zip(have, files, strict=True)]
    return table.set_column(table.schema.get_field_index("sha256"), "sha256", pa.array(column, pa.string()))


def contents(parts: Mapping[str, Source], masks: Masks | None, share: slice = slice(None)) -> list[str]:
    """Return the SHA-256 of all images and masks, or of a share of them; `UNREADABLE` for some."""
    jobs: list[tuple[Any, int]] = [(source, i) for source in parts.values() for i in range(len(source))]
    if masks is not None and masks.files is not None:
        jobs += [(masks, i) for i in range(len(masks.files))]
    pool = ThreadPoolExecutor(min(READERS, os.cpu_count() or 1))
    try:
        return list(pool.map(lambda job: _digest(*job), jobs[share]))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest


def difference(before: pa.Table, now: pa.Table) -> Difference:
    """Return what of `before` is other `now`. Of a million images it takes a second or two: arrow compares."""
    old, new = before.append_column("key", _keys(before)), now.append_column("key", _keys(now))
    gone = compute.invert(compute.is_in(old["key"], value_set=new["key"]))
    come = compute.invert(compute.is_in(new["key"], value_set=old["key"]))
    removed, added = old.filter(gone), new.filter(come)
    old, new = old.filter(compute.invert(gone)), new.filter(compute.invert(come))
    moved = not old["key"].equals(new["key"])
    if moved:
        old, new = old.sort_by("key"), new.sort_by("key")
    changed = new.filter(_differ(old, new))
    return Difference(_names(added), _names(removed), _names(changed), moved)


def has_contents(table: pa.Table) -> bool:
    """Tell whether the contents of the images were written down."""
    parts, digests = table["part"].to_pylist(), table["sha256"].to_pylist()
    return all(digest is not None for part, digest in zip(parts, digests, strict=True) if part == "train")


def read_manifest(folder: Path) -> pa.Table | None:
    """Return what a run folder has written down; None if nothing, or nothing that can be read."""
    try:
        return pq.read_table(folder / FILE, schema=SCHEMA)
    except (OSError, pa.ArrowException):
        return None


def to_bytes(table: pa.Table) -> bytes:
    """Return the content of ``data.parquet``."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _rows_of(part: str, source: Source) -> list[pa.Table]:
    labels = None
    if source.labels is not None and source.classes is not None:
        labels = pa.array(source.classes, pa.string()).take(pa.array(np.asarray(source.labels)))
    elif source.targets is not None:
        labels = [" ".join(map(repr, row)) for row in source.targets.values.tolist()]
    if isinstance(source, ParquetSource | PixelSource):
        files = _table(f"{part} files", [Path(path).name for path in source.files], source.sizes())
        return [_table(part, source.ids, None, labels), files]
    return [_table(part, source.ids, source.sizes(), labels)]


def _table(
    part: str, names: Sequence[str], sizes: Sequence[int] | None, labels: "pa.Array | list[str] | None" = None,
    sha256: list[str] | None = None,
) -> pa.Table:  # fmt: skip
    columns = [pa.repeat(part, len(names)), names, sizes, labels, sha256]
    return pa.table(
        [_array(values, kind.type, len(names)) for values, kind in zip(columns, SCHEMA, strict=True)], schema=SCHEMA
    )


def _array(values: Any, kind: pa.DataType, count: int) -> pa.Array:
    """Return a column of the table, of a million values without making each; of nothing, as many nulls."""
    if isinstance(values, Names):
        values = values.arrow
    elif isinstance(values, Numbers):
        values = pa.array(values.array)
    if isinstance(values, pa.Array):
        return values.cast(kind)
    return pa.array(values, kind) if values else pa.nulls(count, kind)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _digest(holder: Source | Masks, i: int) -> str:
    try:
        if isinstance(holder, Masks):
            assert holder.files is not None
            data: Any = read_regular_file(str(holder.path / holder.files[i]))
        else:
            data = holder.read(i)
    except (MaekitError, OSError):
        return UNREADABLE
    return hashlib.sha256(data.numpy().tobytes() if isinstance(data, Tensor) else data).hexdigest()


def _keys(table: pa.Table) -> pa.ChunkedArray:
    return compute.binary_join_element_wise(table["part"], table["id"], "\0")


def _names(table: pa.Table) -> list[str]:
    pairs = zip(table["part"].to_pylist(), table["id"].to_pylist(), strict=True)
    return [
        name if part in ("train", "train files") else f"{part.removesuffix(' files')} {name}" for part, name in pairs
    ]


def _differ(old: pa.Table, new: pa.Table) -> Any:
    """Return for each row whether size, label or content differ; a digest that one of them has not is not compared."""
    sizes = compute.not_equal(old["size"].fill_null(-2), new["size"].fill_null(-2))
    labels = compute.not_equal(old["label"].fill_null("\0"), new["label"].fill_null("\0"))
    digests = compute.not_equal(old["sha256"], new["sha256"]).fill_null(False)
    return compute.or_(compute.or_(sizes, labels), digests)
