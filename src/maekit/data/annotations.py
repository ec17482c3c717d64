"""Data sets whose labels lie in one file beside the images, in the forms in which they are published.

- iNaturalist 2017, 2018, 2019 and later: JSON as COCO's, ``images`` with ``file_name``, ``annotations`` with
  ``image_id`` and ``category_id``, ``categories`` with ``name``; paths start at the folder of the JSON file.
- Oxford-IIIT Pet: ``annotations/trainval.txt`` with lines ``Abyssinian_100 1 1 1``; the image is
  ``images/Abyssinian_100.jpg``, the class the name before the number.

As in `maekit.data.lists`, whatever is doubtful is refused, and nothing in a file is run.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maekit.data.columns import Names
from maekit.data.source import FileSource, absent, number, read_regular_file
from maekit.errors import MaekitError

PARTS = {"train": re.compile(r"train(_?20\d\d)?\.json"), "val": re.compile(r"val(_?20\d\d)?\.json")}
"""Names of the annotations of a part, as train2018.json."""
PET_LINE = re.compile(r"(\S+)_(\d+) (\d+) ([12]) (\d+)")
"""Name with number, class, species, breed: the README of Oxford-IIIT Pet."""
PET_FIRST = re.compile(r"(?:^|(?<=\r))(?!#)[^\r\n]*\S[^\r\n]*", re.MULTILINE)
"""A line that is no comment: of a list of a million lines no more is looked at."""
EXPECTED = "images, annotations and categories as iNaturalist's, one annotation an image"


def open_annotations(path: Path, name: str, *, classes: list[str] | None = None) -> FileSource:
    """Open a JSON file of annotations; see `maekit.data.sources.open_source`.

    Classes are in the order of their ids. Without annotations (a test part) there are no labels.

    Raises:
        MaekitError: E-DATA-LIST, E-DATA-EMPTY, E-DATA-CLASSES.
    """
    try:
        said = json.loads(read_regular_file(str(path)).decode("utf-8-sig"))
        files = {image["id"]: os.path.normpath(image["file_name"]) for image in said["images"]}
        labels = _labels(said, files)
    except KeyError as error:
        raise MaekitError("E-DATA-LIST", f"{path}", found=f"no {error}", expected=EXPECTED) from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise MaekitError("E-DATA-LIST", f"cannot read {path}", found=error, expected=EXPECTED) from error
    if not files:
        raise MaekitError("E-DATA-EMPTY", f"{path} lists no images")
    order = sorted(files, key=lambda image: files[image])
    paths = [files[image] for image in order]
    _check_files(path, paths)
    keys = Names.of(paths)
    if labels is None:
        return FileSource(name, keys.readable, keys, root=str(path.parent))
    numbers, known = number([labels[image] for image in order], _class_names(said), classes, name)
    return FileSource(name, keys.readable, keys, numbers, known, str(path.parent))


def _labels(said: Mapping[str, Any], files: Mapping[Any, str]) -> dict[Any, str] | None:
    """Return the class name of each image; None when nothing is annotated."""
    if not said.get("annotations"):
        return None
    names = dict(zip(_category_ids(said), _class_names(said), strict=True))
    labels: dict[Any, str] = {}
    for one in said["annotations"]:
        image, category = one["image_id"], one["category_id"]
        if image in labels:
            raise ValueError(f"two annotations of image {image!r}")
        if category not in names:
            raise ValueError(f"category {category!r}, which is not listed")
        labels[image] = names[category]
    if missing := files.keys() - labels.keys():
        raise ValueError(f"{len(missing)} images without annotation, as {files[min(missing, key=str)]}")
    return labels


def _category_ids(said: Mapping[str, Any]) -> list[Any]:
    return sorted(category["id"] for category in said["categories"])


def _class_names(said: Mapping[str, Any]) -> list[str]:
    """Return the names in the order of the ids; a name that two categories share is told apart by the id."""
    by_id = {category["id"]: str(category["name"]) for category in said["categories"]}
    times = Counter(by_id.values())
    return [name if times[name := by_id[at]] == 1 else f"{at} {name}" for at in sorted(by_id)]


def _check_files(path: Path, paths: list[str]) -> None:
    """Refuse a file listed twice, one outside the folder, and one that is not there."""
    if len(set(paths)) < len(paths):
        again = next(name for name, times in Counter(paths).items() if times > 1)
        raise MaekitError("E-DATA-LIST", f"{path}", found=f"{again} twice", expected="each image once")
    if (at := next(absent(path.parent, paths), None)) is not None:
        expected = f"paths relative to {path.parent}"
        raise MaekitError("E-DATA-LIST", f"{path}", found=f"no file {paths[at]}", expected=expected)


def open_pets(path: Path, text: str, name: str, *, classes: list[str] | None = None) -> FileSource | None:
    """Open a list of Oxford-IIIT Pet; None if this is none: its lines or the folder ``../images`` say so.

    Raises:
        MaekitError: E-DATA-LIST with the line, E-DATA-CLASSES.
    """
    root, first = path.resolve().parent.parent, PET_FIRST.search(text)
    if first is None or PET_LINE.fullmatch(first[0].strip()) is None or not (root / "images").is_dir():
        return None
    lines = [(at, line.strip()) for at, line in enumerate(text.splitlines(), 1) if line.strip() and line[0] != "#"]
    found: dict[str, str] = {}
    for at, line in lines:
        match = PET_LINE.fullmatch(line)
        key = os.path.join("images", f"{line.split()[0]}.jpg")
        if match is None or key in found or not os.path.lexists(root / key):
            expected = "NAME_NUMBER CLASS SPECIES BREED, each image once, with ../images/NAME_NUMBER.jpg"
            raise MaekitError("E-DATA-LIST", f"{path} line {at}", found=repr(line), expected=expected)
        found[key] = match[1]
    keys = sorted(found)
    numbers, known = number([found[key] for key in keys], sorted(set(found.values())), classes, name)
    paths = Names.of(keys)
    return FileSource(name, paths.readable, paths, numbers, known, str(root))
