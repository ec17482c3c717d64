"""open_source(): what form of data a path is, which part of it a split is, and how parts are drawn from it.

Everything is listed in sorted order, so nothing depends on the disk, and every draw goes by a hash of the image's id,
so it does not depend on how many other images there are before it. URLs and commands are refused: nothing here talks
to a network.
"""

import hashlib
import os
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from maekit.data.annotations import PARTS, open_annotations
from maekit.data.columns import Column, Names, Numbers
from maekit.data.image import SUFFIXES
from maekit.data.lists import SUFFIX as LIST_SUFFIX
from maekit.data.lists import open_list
from maekit.data.parquet import ParquetSource, has_images, open_parquet
from maekit.data.source import DatasetSource, FileSource, Source, Targets, number
from maekit.data.targets import Form
from maekit.errors import MaekitError

__all__ = [
    "DatasetSource", "FileSource", "Form", "ParquetSource", "Source", "Split", "Targets",
    "hold_out", "label_subset", "open_source", "other_files", "parts_of",
]  # fmt: skip

Split = Literal["train", "val", "train-or-all", "val-or-all"]
"""``...-or-all``: all images where the disk has no such parts, in place of a part held out by a hash."""

BUILTIN = Path(__file__).parent / "builtin"
BUILTIN_NAMES = ("fashion",)
VAL_NAMES = ("val", "valid", "validation", "test")
"""Names of the held-out part on disk; the first one present is taken."""
PICKLED = ("batches.meta", "data_batch_1", "meta")
"""Files of CIFAR's own archives, which are Python pickles."""
NO_PATH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/|pipe:|\||-$")
"""What looks like a URL, a shell command or standard input."""


def open_source(
    path: str | Path,
    split: Split | None = None,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    classes: list[str] | None = None,
    form: Form | None = None,
) -> Source:
    """Open a folder, a list file, a JSON file of annotations, parquet files or a folder of them, ``builtin:fashion``.

    Args:
        path: where the images are.
        split: "train" or "val": that part on disk (``D/train`` and ``D/val|test``, ``train.parquet`` and
            ``val|test.parquet``, ``train2018.json`` and ``val2018.json``), otherwise made by `hold_out`;
            "train-or-all", "val-or-all": all images then. None: all images in any case.
        image_column: parquet or list column with the image; found by content or name when None.
        label_column: column with the label; one of `parquet.LABEL_COLUMNS` when None.
        classes: class names of another source: labels are numbered like there, unknown names are refused.
        form: read tags or numbers in place of one class; `label_column` may then name several, ``x,y``, and `classes`
            are the tags of another source.

    Raises:
        MaekitError: E-DATA-PATH, E-DATA-EMPTY, E-DATA-LIST, E-DATA-COLUMN, E-DATA-LABELS, E-DATA-CLASSES,
            E-DATA-TARGETS.
    """
    opener = _Opener(str(path), image_column, label_column, form)
    place = _place(path)
    parts = parts_of(path)
    if split is None or not parts:
        source = opener.open([place], classes, depth=1 if parts else 0)
        return hold_out(source)[split == "val"] if split in ("train", "val") else source
    part = split.removesuffix("-or-all")
    if "val" not in parts:  # D/train alone
        source = opener.open(parts["train"], classes)
        return source if split == "train-or-all" else hold_out(source)[part == "val"]
    if split in ("train-or-all", "val-or-all") or classes is not None:
        return opener.open(parts[part], classes)
    train = opener.open(parts["train"], None)
    val = opener.open(parts["val"], train.classes if train.targets is None else train.targets.names)
    _check_same_classes(train, val)
    return val if part == "val" else train


def parts_of(path: str | Path) -> dict[str, list[Path]]:
    """Return what "train" and "val" are on disk: both, only "train", or {} when `path` is one whole."""
    place = _place(path)
    if not place.is_dir():
        return {}
    parts = {part: found for part, names in _PART_NAMES.items() if (found := _part(place, names))}
    if "train" in parts and ("val" in parts or _is_alone(parts["train"][0])):
        return parts
    return {}


_PART_NAMES = {"train": ("train",), "val": VAL_NAMES}


def _part(place: Path, names: tuple[str, ...]) -> list[Path]:
    """Return the folder or the parquet files (``val.parquet``, ``val-00000-of-00002.parquet``) of a part."""
    for name in names:
        if (place / name).is_dir():
            return [place / name]
        if files := [file for file in _parquets(place) if file.stem == name or file.stem.startswith(f"{name}-")]:
            return files
        if name in PARTS and (files := [one for one in sorted(place.iterdir()) if PARTS[name].fullmatch(one.name)]):
            return files[:1]
    return []


def _is_alone(train: Path) -> bool:
    """Tell a split called train from a class called train: nothing else to see beside it."""
    return train.is_dir() and all(entry == train.name or entry[0] == "." for entry in os.listdir(train.parent))


def _parquets(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.parquet") if file.name[0] != ".")


def _place(path: str | Path) -> Path:
    """Return the existing path that the user means."""
    text = str(path)
    if text.startswith("builtin:"):
        name = text.removeprefix("builtin:")
        if name not in BUILTIN_NAMES:
            raise MaekitError("E-DATA-PATH", "no such built-in data set", found=text, expected="builtin:fashion")
        return BUILTIN / name
    expected = "a folder, a list (.txt, .csv, .tsv, .json), a .parquet file or folder, or builtin:fashion"
    if NO_PATH.match(text):
        hint = "download the data first; nothing is fetched or executed here"
        raise MaekitError("E-DATA-PATH", "not a path", found=text, expected=expected, hint=hint)
    place = Path(text).expanduser()
    try:
        place.stat()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise MaekitError("E-DATA-PATH", f"cannot open {text}", found=reason, expected=expected) from None
    return place


class _Opener:
    """Opens parts of one data set with the same name and columns."""

    def __init__(self, name: str, image_column: str | None, label_column: str | None, form: Form | None) -> None:
        self.name, self.form = name, form
        self.columns: dict[str, Any] = {"image_column": image_column, "label_column": label_column}

    def open(self, places: list[Path], classes: list[str] | None, depth: int = 0) -> Source:
        """Open one folder or file, or several parquet files; `depth`: path parts above the class folders."""
        place = places[0]
        if place.is_dir():
            places = [file for file in _parquets(place) if has_images(file)]
            if not places:
                self._no_columns(place)
                self._no_targets(place, "a folder of images")
                return open_folder(place, self.name, classes, depth)
        if places[0].suffix.lower() == ".parquet":
            return open_parquet(places, self.name, classes=classes, form=self.form, **self.columns)
        if place.suffix.lower() == ".json":
            self._no_columns(place)
            self._no_targets(place, "annotations of one class an image")
            return open_annotations(place, self.name, classes=classes)
        if place.suffix.lower() in LIST_SUFFIX:
            return open_list(place, self.name, classes=classes, form=self.form, **self.columns)
        expected = "a folder, a list file (.txt, .csv, .tsv), a .json of annotations or a .parquet file"
        raise MaekitError("E-DATA-PATH", f"cannot use {place}", found="a file of another kind", expected=expected)

    def _no_columns(self, place: Path) -> None:
        for setting, column in self.columns.items():
            if column is not None:
                raise MaekitError(
                    "E-DATA-COLUMN", f"setting {setting}", found=f"{place}, which has no columns",
                    expected="a list or parquet file", hint=f"no --{setting.replace('_', '-')}",
                )  # fmt: skip

    def _no_targets(self, place: Path, found: str) -> None:
        if self.form is not None:
            raise MaekitError(
                "E-DATA-TARGETS", f"{place} for --task {self.form.kind}", found=found,
                expected="a .csv or .tsv with a header, or parquet: a column of tags or of numbers",
            )  # fmt: skip


def open_folder(folder: Path, name: str, classes: list[str] | None = None, depth: int = 0) -> FileSource:
    """List the images in a folder and below; first-level folders are classes if every image lies in one.

    Args:
        folder: where to look; hidden entries are passed over.
        name: what to call it in messages.
        classes: class names of another source, see `open_source`.
        depth: how many path parts stand before the class (1: train/CLASS/image.jpg).
    """
    others, runs = Counter[str](), list[tuple[str, int]]()
    keys = Names.of(_noting(_walk(str(folder), others), runs))
    if not keys:
        found = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5)) or "no visible file"
        pickles = any((folder / name).is_file() for name in PICKLED)
        hint = "the data set's parquet files; pickles hold code, so they are not opened" if pickles else None
        raise MaekitError(
            "E-DATA-EMPTY", f"no images in {folder}", found=found, expected=" ".join(sorted(SUFFIXES)), hint=hint
        )
    parts = [inside.split("/") if inside else [] for inside, _ in runs]
    if any(len(one) <= depth for one in parts):
        return FileSource(name, keys.readable, keys, root=str(folder))
    names = [one[depth] for one in parts]
    numbers, known = number(names, sorted(set(names)), classes, name)
    labels = np.repeat(np.array(numbers), [count for _, count in runs])
    return FileSource(name, keys.readable, keys, Numbers(labels), known, str(folder))


def other_files(path: str | Path) -> Counter[str]:
    """Count the visible files of a folder that no one reads, by suffix."""
    place, others = _place(path), Counter[str]()
    if place.is_dir():
        for _ in _walk(str(place), others):
            pass
    return others


def _noting(walk: Iterable[tuple[str, list[str]]], runs: list[tuple[str, int]]) -> Iterator[list[str]]:
    """Yield the paths of a walk, and note for each run of them the id of its folder and how many they are."""
    for inside, names in walk:
        runs.append((_id(inside), len(names)))
        before = os.path.join(inside, "") if inside else ""
        yield [before + name for name in names]


def _walk(root: str, others: Counter[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield runs of images in the order of their ids: a folder relative to `root`, names in it.

    A folder is entered once, so links cannot make a loop. A folder with an image's suffix is yielded as an image: it
    will be listed as a bad one.

    Args:
        root: where to look.
        others: counts all other files by suffix.
    """
    seen = set()
    waiting: list[tuple[str, list[str] | None]] = [("", None)]
    while waiting:
        inside, names = waiting.pop()
        if names is not None:
            yield inside, names
            continue
        try:
            status = os.stat(os.path.join(root, inside))
            if (place := (status.st_dev, status.st_ino)) in seen:
                continue
            seen.add(place)
            images, folders = _sorted_out(os.path.join(root, inside), others)
        except OSError as error:
            where = os.path.join(root, inside)
            raise MaekitError("E-DATA-PATH", f"cannot list {where}", found=error.strerror) from None
        waiting += reversed(_in_turns(inside, images, folders))


def _sorted_out(folder: str, others: Counter[str]) -> tuple[list[str], list[str]]:
    """Return the names of images and of folders in a folder, and count what else is there."""
    images, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            suffix = name[dot:].lower() if (dot := name.rfind(".")) > 0 else ""
            if suffix in SUFFIXES:
                if name[0] != ".":
                    images.append(name)
            elif name[0] != ".":
                if _is_folder(entry):
                    folders.append(name)
                else:
                    others[suffix or "without suffix"] += 1
    return images, folders


def _in_turns(inside: str, images: list[str], folders: list[str]) -> list[tuple[str, list[str] | None]]:
    """Return a folder's images and folders in the order of ids: runs of names, and between them what is to be entered.

    What is in a folder comes where the folder's name with a slash behind it comes.
    """
    plain = "".join(images).isascii()
    images.sort(key=None if plain else _id)
    turns, first = list[tuple[str, list[str] | None]](), 0
    for name in sorted(folders, key=lambda name: _id(name) + "/"):
        at = bisect_left(images, _id(name) + "/", lo=first, key=None if plain else _id)
        if at > first:
            turns.append((inside, images[first:at]))
        turns.append((os.path.join(inside, name), None))
        first = at
    return [*turns, (inside, images[first:])] if first < len(images) else turns


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _id(key: str) -> str:
    """Return a path with forward slashes that any encoding can hold: names need not be UTF-8."""
    if os.sep != "/":
        key = key.replace(os.sep, "/")
    return key if key.isascii() else os.fsencode(key).decode("utf-8", "backslashreplace")


def _check_same_classes(train: Source, val: Source) -> None:
    """Refuse parts of one data set that do not hold the same classes."""
    if train.labels is None and val.labels is None:
        return
    if train.labels is None or val.labels is None or train.classes is None:
        bare, other = ("train", "val") if train.labels is None else ("val", "train")
        raise MaekitError("E-DATA-CLASSES", f"{bare} of {train.name} has no labels", expected=f"classes as in {other}")
    if missing := [train.classes[label] for label in sorted(set(train.labels) - set(val.labels))]:
        raise MaekitError(
            "E-DATA-CLASSES",
            f"train of {train.name} has {len(missing)} classes not in val",
            found=", ".join(map(repr, missing[:10])),
            expected="the same classes in both",
            hint="add images of them to val, or move them out of train",
        )


def hold_out(source: Source, fraction: float = 0.2) -> tuple[Source, Source]:
    """Split into (train, val): of each class the `fraction` with the smallest SHA-256 of the id is held out.

    At least one image of a class of two or more is held out; both keep the order of `source`.

    Raises:
        MaekitError: E-DATA-EMPTY when nothing is left for one of them.
    """
    held = np.zeros(len(source), bool)
    for members in _by_class(source):
        count = max(round(fraction * len(members)), min(1, len(members) - 1))
        held[_by_hash(source, members)[:count]] = True
    if not 0 < held.sum() < len(source):
        found = f"{len(source)} images"
        raise MaekitError("E-DATA-EMPTY", f"cannot hold out a part of {source.name}", found=found, expected="2 or more")
    return source.subset(np.flatnonzero(~held)), source.subset(np.flatnonzero(held))


def label_subset(source: Source, spec: str | None, seed: int = 0) -> list[int]:
    """Return the sorted indices of a part of the labelled images, the same for equal ids and seed.

    Args:
        source: a source with labels.
        spec: "10/class", "1%" of each class (at least one), "250" in all, as even over the classes as can be;
            None or "100%": all.
        seed: which images; they are taken by SHA-256 of (seed, id), so a smaller part lies within a larger one.

    Raises:
        MaekitError: E-DATA-LABELS without labels or with too few, E-USAGE-LABELS for another spec.
    """
    if source.labels is None and source.targets is None:
        raise MaekitError("E-DATA-LABELS", f"{source.name} has no labels", expected="class folders or a label column")
    if spec is None:
        return list(range(len(source)))
    if source.targets is not None:
        return _part_of_all(source, spec, seed)
    assert source.labels is not None
    queues = [_by_hash(source, members, f"{seed}:") for members in _by_class(source)]
    counts = _counts(spec, [len(queue) for queue in queues])
    for queue, count in zip(queues, counts, strict=True):
        if count > len(queue):
            name = (source.classes or [])[source.labels[queue[0]]]
            raise MaekitError(
                "E-DATA-LABELS", f"class {name!r} of {source.name}", found=f"{len(queue)} images",
                expected=f"{count} for --labels {spec}",
            )  # fmt: skip
    return sorted(i for queue, count in zip(queues, counts, strict=True) for i in queue[:count])


def _part_of_all(source: Source, spec: str, seed: int) -> list[int]:
    """Return a part of images that have tags or numbers, by the same hash."""
    if spec.strip().endswith("/class"):
        raise MaekitError("E-USAGE-LABELS", "setting labels", found=f"{spec} of images that have no one class",
                          expected="1%, 100% or a count")  # fmt: skip
    count = _counts(spec, [len(source)])[0]
    return sorted(_by_hash(source, np.arange(len(source)), f"{seed}:")[:count])


def _counts(spec: str, sizes: list[int]) -> list[int]:
    """Return how many of each class a spec asks for."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d+)?)(%|/class)?", spec.strip())
    value, unit = (float(match[1]), match[2]) if match else (0.0, None)
    if value <= 0 or (unit == "%" and value > 100) or (unit != "%" and value != int(value)):
        raise MaekitError("E-USAGE-LABELS", "setting labels", found=spec, expected="10/class, 1%, 100% or a count")
    if unit == "/class":
        return [int(value)] * len(sizes)
    if unit == "%":
        return [max(1, round(size * value / 100)) for size in sizes]
    return _share(int(value), sizes)


def _share(total: int, sizes: list[int]) -> list[int]:
    """Deal `total` over the classes one by one; a class that is used up is passed over."""
    if not len(sizes) <= total <= sum(sizes):
        expected = f"{len(sizes)} (one per class) to {sum(sizes)}"
        raise MaekitError("E-DATA-LABELS", "setting labels", found=total, expected=expected)
    counts = [0] * len(sizes)
    while total:
        open_classes = [i for i, size in enumerate(sizes) if counts[i] < size]
        each = max(1, min(total // len(open_classes), *(sizes[i] - counts[i] for i in open_classes)))
        for i in open_classes[:total]:
            counts[i] += each
        total -= each * len(open_classes[:total])
    return counts


def _by_class(source: Source) -> list[np.ndarray]:
    """Return the indices of the images of each label, in its order; one group when there are no labels."""
    if source.labels is None:
        return [np.arange(len(source))]
    labels = np.asarray(source.labels)
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1) if len(order) else []


def _by_hash(source: Source, members: np.ndarray, before: str = "") -> list[int]:
    """Return these indices in the order of SHA-256 of `before` and the image's id."""
    assert isinstance(source.ids, Column)
    hashes = (hashlib.sha256(f"{before}{name}".encode()).digest() for name in source.ids.take(members))
    return [index for _, index in sorted(zip(hashes, members.tolist(), strict=True))]
