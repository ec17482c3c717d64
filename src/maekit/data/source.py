"""A `Source` is a list of images: ids, labels, classes, and `read(i)`.

It is immutable, cheap to subset and cheap to send to loader workers, because files are opened by `read` only and names
are in memory that all processes share (`maekit.data.columns`). One subclass per form: files here, rows of parquet files
in `parquet`, other people's map-style datasets here too.
Files are opened without blocking and must be regular, so a FIFO, a socket, a device or a folder called x.jpg is a
bad image and never a hang.
"""

import copy
import hashlib
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maekit.data.columns import Column, Names, Numbers, RowNames
from maekit.data.image import from_pillow
from maekit.errors import MaekitError

MOST_DIGITS = 1000
"""Of a whole number that classes are ordered by; Python reads 4300."""
MAX_FILE_BYTES = 2**29
"""Bytes of one image file; 64 million pixels of three floats take more, a picture never does."""


@dataclass(frozen=True, eq=False)
class Targets:
    """Several values for each of n images, in place of one class.

    Attributes:
        names: K of them: tags, or what is measured.
        values: (n, K): 0 and 1 for each tag, or numbers in the user's units, double.
    """

    names: list[str]
    values: np.ndarray


@dataclass(frozen=True, eq=False)
class Source(ABC):
    """Images by index.

    Attributes:
        name: what to call it in messages.
        ids: unique, stable name of each image: its relative path, or ``file.parquet:row``.
        keys: what `read` needs to find each image; private to the form. These three are columns that processes share
            (`maekit.data.columns`), whatever sequence was given.
        labels: index into `classes` of each image, None when there are no labels.
        classes: class names by label.
        targets: tags or numbers of each image, where those were asked for; `labels` is None then.
    """

    name: str
    ids: Sequence[str] = field(repr=False)
    keys: Sequence[Any] = field(repr=False)
    labels: Sequence[int] | None = field(default=None, repr=False)
    classes: list[str] | None = None
    targets: Targets | None = field(default=None, repr=False, kw_only=True)

    beside: ClassVar[tuple[str, ...]] = ()
    """Other columns of a form, with a value for each image."""

    def __post_init__(self) -> None:
        if not isinstance(self.ids, Column):
            object.__setattr__(self, "ids", Names.of(self.ids).readable)
        if self.labels is not None and not isinstance(self.labels, Numbers):
            object.__setattr__(self, "labels", Numbers(self.labels))

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def read(self, i: int) -> bytes | Tensor:
        """Return the encoded image `i` (a `DatasetSource`: the decoded one).

        Raises:
            MaekitError: E-DATA-IMAGE when it cannot be read.
        """

    @abstractmethod
    def sizes(self) -> Sequence[int]:
        """Return the sizes in bytes that the fingerprint covers."""

    def fingerprint(self) -> str:
        """Return a SHA-256 over count, ids and sizes: it changes when images come, go or change size; over targets."""
        digest = hashlib.sha256(str(len(self)).encode())
        for column in (self.ids, self.sizes()):
            for part in column.parts() if isinstance(column, Column) else [column]:
                digest.update("".join(f"\0{value}" for value in part).encode())
        if self.targets is not None:
            digest.update("\0".join(["", *self.targets.names]).encode())
            digest.update(np.ascontiguousarray(self.targets.values, dtype="<f8").tobytes())
        return digest.hexdigest()

    def stamps(self) -> Iterable[str] | None:
        """Return texts that change when any image here does, also to one of equal size; None where nothing tells."""
        return None

    def subset(self, indices: Sequence[int] | np.ndarray) -> Self:
        """Return the same kind of source with only these images, in this order."""
        chosen = copy.copy(self)
        for name in ("ids", "keys", "labels", *self.beside):
            if (values := getattr(self, name)) is not None:
                few = values.take(indices) if isinstance(values, Column) else [values[i] for i in indices]
                object.__setattr__(chosen, name, few)
        if self.targets is None:
            return chosen
        return chosen.with_targets(Targets(self.targets.names, self.targets.values[np.asarray(indices, dtype=int)]))

    def with_targets(self, targets: Targets) -> Self:
        """Return the same images with these targets in place of labels."""
        assert len(targets.values) == len(self) and targets.values.shape[1:] == (len(targets.names),)
        changed = copy.copy(self)
        for name, value in (("targets", targets), ("labels", None), ("classes", None)):
            object.__setattr__(changed, name, value)
        return changed


@dataclass(frozen=True, eq=False)
class FileSource(Source):
    """One file per image; `keys` are paths relative to `root`, spelled as the system spells them."""

    root: str = "."
    _sizes: Numbers | None = field(default=None, repr=False)

    beside = ("_sizes",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.keys, Names):
            object.__setattr__(self, "keys", Names.of(self.keys))

    def read(self, i: int) -> bytes:
        """Return the bytes of file `i`."""
        try:
            return read_regular_file(os.path.join(self.root, self.keys[i]))
        except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
            found = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise MaekitError("E-DATA-IMAGE", f"cannot read {self.ids[i]}", found=found) from error

    def sizes(self) -> Numbers:
        """Return each file's size, -1 where it has none; files are asked once."""
        if self._sizes is None:
            object.__setattr__(self, "_sizes", Numbers(np.fromiter(_sizes(self.root, self.keys), np.int64, len(self))))
        assert self._sizes is not None
        return self._sizes

    def stamps(self) -> Iterator[str]:
        """Yield each file's place and time of change."""
        for key in self.keys:
            yield changed(os.path.join(self.root, key))


@dataclass(frozen=True, eq=False, init=False)
class DatasetSource(Source):
    """A map-style dataset of images or (image, label); `read` gives the decoded image, (C, H, W).

    An image may be a PIL.Image, an array (H, W) or (H, W, C), or a tensor (C, H, W); arrays and tensors keep their
    channels and type (uint8, or float32 that is used as it is). Labels come from the dataset's `targets`, names
    from its `classes`, as torchvision's datasets have them; nothing is read before it is asked for.

    Args:
        dataset: anything with ``len()`` and ``[i]``.
        name: what to call it in messages.
        channels: 3 or 1, what PIL images become.
    """

    dataset: Any = field(default=None, repr=False)
    channels: int = 3

    def __init__(self, dataset: Any, name: str = "dataset", channels: int = 3) -> None:
        targets = getattr(dataset, "targets", None)
        labels = None if targets is None else [int(target) for target in targets]
        classes = None
        if labels is not None:
            numbers = range(max(labels, default=-1) + 1)
            classes = [str(name) for name in getattr(dataset, "classes", None) or numbers]
        count = len(dataset)
        rows = Numbers(np.arange(count))
        super().__init__(name, RowNames(rows), rows, labels, classes)
        object.__setattr__(self, "dataset", dataset)
        object.__setattr__(self, "channels", channels)

    def read(self, i: int) -> Tensor:
        """Return image `i` as (C, H, W)."""
        try:
            item = self.dataset[self.keys[i]]
        except OSError as error:  # a broken file below the dataset, Pillow's UnidentifiedImageError too
            raise MaekitError("E-DATA-IMAGE", f"cannot read {self.name} item {self.ids[i]}", found=error) from error
        image = item[0] if isinstance(item, tuple | list) else item
        if isinstance(image, Image.Image):
            return from_pillow(image, self.channels)
        if isinstance(image, np.ndarray) and image.ndim in (2, 3):
            image = torch.from_numpy(np.array(np.atleast_3d(image))).permute(2, 0, 1)
        if isinstance(image, Tensor) and image.ndim == 3 and image.dtype in (torch.uint8, torch.float32):
            return image
        found = f"{type(image).__name__} {getattr(image, 'dtype', '')} {tuple(getattr(image, 'shape', ()))}"
        expected = "a PIL image, an array (H, W, C) or a tensor (C, H, W) of uint8 or float32"
        raise MaekitError("E-DATA-IMAGE", f"cannot use {self.name} item {self.ids[i]}", found=found, expected=expected)

    def sizes(self) -> Sequence[int]:
        """Return nothing: only the dataset itself could tell, by reading everything."""
        return ()


def _sizes(root: str, keys: Iterable[str]) -> Iterator[int]:
    for key in keys:
        try:
            yield os.stat(os.path.join(root, key)).st_size
        except (OSError, ValueError):  # ValueError: a NUL byte in the name
            yield -1


LISTED_FROM = 500
"""Paths of one folder from which on the folder is listed, in place of asking for each: a third of the time."""


def absent(root: str | Path, paths: Iterable[str]) -> Iterator[int]:
    """Yield the places of those paths, which start from `root`, that name nothing there (or hold a NUL byte).

    Sorted paths are quickest: each folder is listed once. What a listing lacks is asked for by itself, since there are
    systems to which ``A.png`` is ``a.png``.
    """
    listed, at = lru_cache(maxsize=2)(_entries), -1
    for folder, group in groupby(((path[: (cut := path.rfind("/") + 1)], path[cut:]) for path in paths), itemgetter(0)):
        first = list(islice(group, LISTED_FROM))
        whole = os.path.join(root, folder)
        names = listed(whole) if len(first) == LISTED_FROM and "\0" not in folder else frozenset[str]()
        for _, name in chain(first, group):
            at += 1
            if name not in names and ("\0" in folder + name or not os.path.lexists(os.path.join(whole, name))):
                yield at


def _entries(folder: str) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except (OSError, ValueError):  # ValueError: a name that the system's encoding cannot spell
        return frozenset()


def changed(path: str) -> str:
    """Return a file's absolute path and its time of change in nanoseconds, 0 when it has none."""
    try:
        return f"{os.path.abspath(path)} {os.stat(path).st_mtime_ns}"
    except (OSError, ValueError):
        return f"{os.path.abspath(path)} 0"


def read_regular_file(path: str) -> bytes:
    """Return the bytes of a regular file, at most `MAX_FILE_BYTES`.

    Raises:
        OSError: for anything else under that name, without waiting for it.
    """
    # O_NONBLOCK: opening a FIFO without a writer would wait forever
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags)
    with open(handle, "rb", buffering=0) as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise OSError(f"{status.st_size} bytes, more than {MAX_FILE_BYTES}")
        data = file.read(status.st_size + 1)  # one more: a file that grows meanwhile is seen
        while data and len(data) < status.st_size and (more := file.read(status.st_size - len(data))):
            data += more
    if len(data or b"") != status.st_size:
        raise OSError("the file changed while it was read")
    return data or b""


def number(
    names: Sequence[str], order: Sequence[str], classes: list[str] | None, what: str
) -> tuple[list[int], list[str]]:
    """Return labels and classes for one class name per image.

    Args:
        names: class name of each image.
        order: the classes in their own order, used when `classes` is None.
        classes: classes of another source whose numbers must be kept.
        what: the source, for the message.

    Raises:
        MaekitError: E-DATA-CLASSES if a name is not in `classes`.
    """
    known = list(order) if classes is None else classes
    index = {name: label for label, name in enumerate(known)}
    if unknown := sorted(set(names) - index.keys()):
        raise MaekitError(
            "E-DATA-CLASSES",
            f"{what} has {len(unknown)} classes not in train",
            found=", ".join(map(repr, unknown[:10])),
            expected=f"the same {len(known)} classes",
            hint="give both splits the same class names",
        )
    return [index[name] for name in names], known


def in_order(names: Iterable[str]) -> list[str]:
    """Return the distinct names sorted, by value when all are whole numbers."""
    distinct = set(names)
    if all(name.isascii() and name.lstrip("-").isdigit() and len(name) <= MOST_DIGITS for name in distinct):
        return sorted(distinct, key=lambda name: (int(name), name))
    return sorted(distinct)
