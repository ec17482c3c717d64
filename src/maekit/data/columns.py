"""Long columns of names and numbers that loader processes share: of a million images no process holds a copy.

A million paths as Python strings take 120 MB, half a second to send to every worker, and as much memory in each. Here
they are one block of bytes and the places where each begins, in a file without a name that is mapped by every process
it is sent to; a string is made when it is asked for. Both kinds are sequences that never change and equal any sequence
of the same values.
"""

import os
import tempfile
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from mmap import mmap
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from typing import Any, Self, TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute

T = TypeVar("T")
compute: Any = pyarrow.compute
"""Its functions are made when it is imported, and unknown to a type checker."""

SENT = 2**16
"""Bytes up to which a column is simply sent."""
AT_ONCE = 2**15
"""Values that are made at a time where all are gone through."""
EXACT, READABLE = "surrogateescape", "backslashreplace"
"""How bytes of a name that are no UTF-8 are spelled: so that the system finds the file, or so that any encoding can
hold it."""


def nameless_file(size: int) -> int:
    """Return a handle to a file of `size` zeros without a name, in memory where the system can do that.

    Raises:
        OSError: where no file may be so large (ulimit -f).
    """
    if hasattr(os, "memfd_create"):  # not /dev/shm, which containers keep small
        handle = os.memfd_create("maekit")
    else:
        with tempfile.TemporaryFile() as file:
            handle = os.dup(file.fileno())
    try:
        os.ftruncate(handle, size)
    except OSError:
        os.close(handle)
        raise
    return handle


class Shared:
    """An array that never changes; once it has been sent to a process that is being started, all map one file."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self._handle: int | None = None

    def __reduce__(self) -> Any:
        if self.array.nbytes <= SENT or get_spawning_popen() is None:
            return Shared, (np.array(self.array),)
        if self._handle is None:
            try:
                self._handle = nameless_file(self.array.nbytes)
            except OSError:
                return Shared, (np.array(self.array),)
            mapped = np.frombuffer(mmap(self._handle, self.array.nbytes), self.array.dtype)
            mapped[:] = self.array
            self.array = mapped
        return _map, (reduction.DupFd(self._handle), self.array.nbytes, self.array.dtype.str)

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            os.close(self._handle)  # type: ignore[arg-type]


def _map(handle: Any, size: int, dtype: str) -> Shared:
    handle = handle.detach()
    try:
        return Shared(np.frombuffer(mmap(handle, size), dtype))
    finally:
        os.close(handle)


class Column(Sequence[T]):
    """What names and numbers have in common."""

    @abstractmethod
    def take(self, indices: Sequence[int] | np.ndarray) -> Self:
        """Return the values at these places, in this order."""

    @abstractmethod
    def _part(self, start: int, stop: int) -> list[T]: ...

    @abstractmethod
    def _at(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> T | Self:
        if isinstance(index, slice):
            return self.take(np.arange(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._at(int(index) % len(self))

    def parts(self) -> Iterator[list[T]]:
        """Yield all values, `AT_ONCE` at a time."""
        for start in range(0, len(self), AT_ONCE):
            yield self._part(start, min(len(self), start + AT_ONCE))

    def __iter__(self) -> Iterator[T]:
        for part in self.parts():
            yield from part

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        told = ", ".join(map(repr, self[:5]))
        return f"[{told}{', ...' if len(self) > 5 else ''}]"


class Numbers(Column[int]):
    """Whole numbers.

    Args:
        values: of any length; a list, a range, an array.
    """

    def __init__(self, values: "Sequence[int] | np.ndarray | Shared") -> None:
        if not isinstance(values, Shared):
            array = np.fromiter(values, np.int64, len(values)) if not isinstance(values, np.ndarray) else values
            top = int(np.abs(array).max(initial=0))
            values = Shared(array.astype(np.int32 if top < 2**31 else np.int64))
        self._values = values

    @property
    def array(self) -> np.ndarray:
        """All of them, (n,), int32 or int64."""
        return self._values.array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Let numpy take them as they are."""
        return np.array(self.array, dtype, copy=copy)

    def __len__(self) -> int:
        return len(self.array)

    def take(self, indices: Sequence[int] | np.ndarray) -> "Numbers":
        """Return those at these places, in this order."""
        return Numbers(self.array[np.asarray(indices, np.int64)])

    def _part(self, start: int, stop: int) -> list[int]:
        return self.array[start:stop].tolist()

    def _at(self, index: int) -> int:
        return int(self.array[index])


class Names(Column[str]):
    """File names, kept as the bytes that they are.

    Args:
        text: all of them, one after the other.
        ends: the place where each begins, and after the last the end.
        spelled: `EXACT` or `READABLE`.
    """

    def __init__(self, text: Shared, ends: Shared, spelled: str = EXACT) -> None:
        self._text, self._ends, self._spelled = text, ends, spelled

    @classmethod
    def of(cls, names: Iterable[str] | Iterable[Sequence[str]]) -> "Names":
        """Gather names, or lists of names."""
        text, lengths = bytearray(), [np.zeros(1, np.int64)]
        few: list[str] = []
        for name in names:
            if not isinstance(name, str):
                _gather(name, text, lengths)
                continue
            few.append(name)
            if len(few) == AT_ONCE:
                _gather(few, text, lengths)
                few.clear()
        _gather(few, text, lengths)
        return cls(Shared(np.frombuffer(text, np.uint8)), Shared(np.cumsum(np.concatenate(lengths))))

    @property
    def readable(self) -> "Names":
        """The same names, spelled so that any encoding can hold them."""
        return Names(self._text, self._ends, READABLE)

    @property
    def arrow(self) -> pa.Array:
        """The same as an array of arrow, without a copy; of readable ones, a copy where not all are UTF-8."""
        held = [None, *(pa.py_buffer(one.array) for one in (self._ends, self._text))]
        raw = pa.Array.from_buffers(pa.large_binary(), len(self), held)
        if self._spelled == EXACT:
            return raw
        try:
            return raw.cast(pa.large_string())
        except pa.ArrowInvalid:
            return pa.array(self, pa.large_string())

    def order(self) -> np.ndarray:
        """Return the places of the names as they sort, of equal ones the first first; of UTF-8, as Python sorts."""
        return compute.sort_indices(Names(self._text, self._ends).arrow).to_numpy()

    def __len__(self) -> int:
        return len(self._ends.array) - 1

    def take(self, indices: Sequence[int] | np.ndarray) -> "Names":
        """Return those at these places, in this order."""
        raw = Names(self._text, self._ends).arrow.take(pa.array(np.asarray(indices, np.int64)))
        raw = raw.combine_chunks() if isinstance(raw, pa.ChunkedArray) else raw
        _, ends, text = raw.buffers()
        ends = np.frombuffer(ends, np.int64)[: len(raw) + 1] if len(raw) else np.zeros(1, np.int64)
        text = np.frombuffer(text, np.uint8)[: ends[-1]] if ends[-1] else np.zeros(0, np.uint8)
        return Names(Shared(text), Shared(ends), self._spelled)

    def _part(self, start: int, stop: int) -> list[str]:
        ends = self._ends.array[start : stop + 1].tolist()
        first = ends[0]
        text = self._text.array[first : ends[-1]].tobytes()
        return [text[a - first : b - first].decode("utf-8", self._spelled) for a, b in pairwise(ends)]

    def _at(self, index: int) -> str:
        ends = self._ends.array
        return self._text.array[ends[index] : ends[index + 1]].tobytes().decode("utf-8", self._spelled)


def _gather(names: Sequence[str], text: bytearray, lengths: list[np.ndarray]) -> None:
    """Add names to a text and their lengths in bytes to a list."""
    joined = "".join(names)
    parts: Sequence[str | bytes] = names
    if joined.isascii():
        text += joined.encode()
    else:
        parts = [name.encode("utf-8", EXACT) for name in names]
        text += b"".join(parts)
    lengths.append(np.fromiter(map(len, parts), np.int64, len(parts)))


class RowNames(Column[str]):
    """Names of rows: ``file.parquet:3``, or the number alone; made when they are asked for.

    Args:
        rows: numbers over all files.
        files: their names.
        starts: number of each file's first row.
    """

    def __init__(self, rows: Numbers, files: Sequence[str] = (), starts: Sequence[int] | np.ndarray = ()) -> None:
        self.rows, self.files, self.starts = rows, list(files), np.asarray(starts, np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int] | np.ndarray) -> "RowNames":
        """Return those at these places, in this order."""
        return RowNames(self.rows.take(indices), self.files, self.starts)

    def _part(self, start: int, stop: int) -> list[str]:
        rows = self.rows.array[start:stop]
        if not self.files:
            return list(map(str, rows.tolist()))
        file = np.searchsorted(self.starts, rows, side="right") - 1
        inside = rows - self.starts[file]
        return [f"{self.files[a]}:{b}" for a, b in zip(file.tolist(), inside.tolist(), strict=True)]

    def _at(self, index: int) -> str:
        return self._part(index, index + 1)[0]
