"""The variants of ImageNet's validation images as they are published, and which outputs of a model count as right.

- C (arXiv 1903.12261): ``KIND/SEVERITY/WNID/*``, or with the folders of its archives above (``noise/KIND/...``).
- A (1907.07174), R (2006.16241): ``WNID/*`` of 200 classes; only the outputs of these compete, as their authors score.
- Sketch (1905.13549): ``WNID/*``. V2 (1902.10811): ``0/*`` to ``999/*``, by number and not by the order of names.
- ReaL (2006.07159): the validation images themselves, any number of labels each; those without are not scored.
- mapped (as ObjectNet): class folders and a file that says which outputs each stands for.

The order of the 1000 classes, the subsets of A and R and the labels of ReaL are the files that timm ships. Parquet
files of the hub are read as well, with WordNet ids, numbers or 1000 names as labels.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from maekit.data.source import Source, read_regular_file
from maekit.data.sources import open_source
from maekit.errors import MaekitError

VariantName = Literal["in-a", "in-r", "in-sketch", "in-v2", "in-real", "mapped"]
SUBSETS = {"in-a": "imagenet_a_indices.txt", "in-r": "imagenet_r_indices.txt"}
"""Variants of 200 classes -> timm's list of them."""
NUM_CLASSES = 1000
WNID = re.compile(r"n\d{8}")
VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")


@dataclass(frozen=True)
class Variant:
    """Images, and for each of them the outputs that are right.

    Attributes:
        source: the images that are scored.
        accepted: for each image, outputs of the model any of which is right.
        outputs: those that compete; None: all.
        left_out: images that are there and not scored, having no class or label among the model's.
    """

    source: Source
    accepted: list[tuple[int, ...]]
    outputs: list[int] | None = None
    left_out: int = 0


@cache
def synsets() -> list[str]:
    """Return the WordNet ids of ImageNet's 1000 classes in order (timm)."""
    return _info("imagenet_synsets.txt").split()


def _info(name: str) -> str:
    return files("timm.data").joinpath("_info", name).read_text(encoding="utf-8")


def output_of(classes: Sequence[str], num_outputs: int) -> dict[str, int]:
    """Return the model's output for each WordNet id.

    Args:
        classes: of the model, by output; those of official files have no names, 1000 outputs in ImageNet's order.
        num_outputs: of the model.

    Raises:
        MaekitError: E-DATA-CLASSES for a model of other classes.
    """
    if classes and all(WNID.fullmatch(name) for name in classes):
        return {name: at for at, name in enumerate(classes)}
    if num_outputs == NUM_CLASSES:
        return {name: at for at, name in enumerate(synsets())}
    raise MaekitError(
        "E-DATA-CLASSES",
        "the model's classes",
        found=f"{num_outputs} outputs, {', '.join(map(repr, classes[:3])) or 'without names'}",
        expected="ImageNet's: 1000 outputs, or WordNet ids as names",
        hint="--protocol mapped --class-map FILE for other classes",
    )


def is_imagenet(classes: Sequence[str]) -> bool:
    """Tell whether these are ImageNet's 1000 classes, by their WordNet ids."""
    return list(classes) == synsets()


def open_variant(
    name: VariantName,
    path: str,
    classes: Sequence[str],
    num_outputs: int,
    *,
    class_map: Path | None = None,
    **columns: Any,
) -> Variant:
    """Open a published variant for a model.

    Args:
        name: which.
        path: its folder, as unpacked, or parquet files.
        classes: of the model, by output.
        num_outputs: of the model.
        class_map: for "mapped", see `read_class_map`.
        columns: ``image_column`` and ``label_column``.

    Raises:
        MaekitError: E-DATA-CLASSES, E-DATA-LABELS, E-DATA-EMPTY, E-DATA-PATH.
    """
    source = open_source(path, **columns)
    if name == "mapped":
        return _mapped(source, read_class_map(class_map, source, classes, num_outputs))
    index = output_of(classes, num_outputs)
    if name == "in-real":
        return _real(source, index)
    ids = [synsets()[int(line)] for line in _info(SUBSETS[name]).split()] if name in SUBSETS else synsets()
    wnids = _wnids(source, ids)
    if strangers := sorted(set(wnids) - set(ids)):
        raise _refused(source, f"{', '.join(strangers[:5])}", f"the {len(ids)} classes of {name}")
    if unknown := sorted(set(wnids) - index.keys()):
        raise _refused(source, ", ".join(unknown[:5]), f"classes among the model's {len(index)}")
    outputs = [index[wnid] for wnid in ids if wnid in index] if name in SUBSETS else None
    assert source.labels is not None
    return Variant(source, [(index[wnids[label]],) for label in source.labels], outputs)


def _wnids(source: Source, ids: list[str]) -> list[str]:
    """Return the WordNet id of each class of a source.

    Names that are numbers below the count of `ids` are places in that list, larger ones among all 1000; as many other
    names as there are ids are in the order of the list.
    """
    names = source.classes
    if source.labels is None or names is None:
        raise MaekitError("E-DATA-LABELS", f"{source.name} has no labels", expected="a folder for each class")
    if all(WNID.fullmatch(name) for name in names):
        return names
    if all(name.isascii() and name.isdigit() for name in names):
        numbers = [int(name) for name in names]
        among = ids if max(numbers) < len(ids) else synsets()
        if max(numbers) < len(among):
            return [among[number] for number in numbers]
    elif len(names) in (len(ids), NUM_CLASSES):
        return ids if len(names) == len(ids) else synsets()
    raise _refused(source, ", ".join(map(repr, names[:5])), "WordNet ids as n01440764, or numbers below 1000")


def _refused(source: Source, found: str, expected: str) -> MaekitError:
    return MaekitError("E-DATA-CLASSES", f"classes of {source.name}", found=found, expected=expected)


def _real(source: Source, index: Mapping[str, int]) -> Variant:
    labels: list[list[int]] = json.loads(_info("imagenet_real_labels.json"))
    accepted: list[tuple[int, ...]] = []
    for name in source.ids:
        number = VAL_NAME.search(name)
        if number is None or not 0 < int(number[1]) <= len(labels):
            raise MaekitError(
                "E-DATA-LABELS",
                f"{source.name}, image {name}",
                found="a name without its number",
                expected="ImageNet's validation images, ILSVRC2012_val_00000001.JPEG to ..._00050000.JPEG",
            )
        wnids = [synsets()[label] for label in labels[int(number[1]) - 1]]
        accepted.append(tuple(index[wnid] for wnid in wnids if wnid in index))
    return _chosen(source, accepted)


def _mapped(source: Source, outputs: Mapping[str, tuple[int, ...]]) -> Variant:
    assert source.labels is not None and source.classes is not None
    return _chosen(source, [outputs.get(source.classes[label], ()) for label in source.labels])


def _chosen(source: Source, accepted: list[tuple[int, ...]]) -> Variant:
    """Leave the images out for which nothing is right."""
    kept = [at for at, right in enumerate(accepted) if right]
    if not kept:
        raise MaekitError("E-DATA-EMPTY", f"no image of {source.name} has a label among the model's classes")
    return Variant(source.subset(kept), [accepted[at] for at in kept], left_out=len(source) - len(kept))


def read_class_map(
    path: Path | None, source: Source, classes: Sequence[str], num_outputs: int
) -> dict[str, tuple[int, ...]]:
    """Return the outputs that each class of `source` stands for.

    Args:
        path: JSON, ``{"class of the data": output or [outputs]}``, an output being a number, a class name of the model
            or a WordNet id (classes of the data that are not named are not scored); or a list as timm's, one number a
            line for each class of the data in order.
        source: the images.
        classes: of the model, by output.
        num_outputs: of the model.

    Raises:
        MaekitError: E-USAGE-MAP without a file, E-DATA-MAP for one that cannot be used, E-DATA-LABELS.
    """
    if path is None:
        raise MaekitError("E-USAGE-MAP", "no class map named", hint="--class-map FILE.json")
    if source.labels is None or source.classes is None:
        raise MaekitError("E-DATA-LABELS", f"{source.name} has no labels", expected="a folder for each class")
    try:
        text = read_regular_file(str(path)).decode("utf-8-sig")
        said: Any = json.loads(text) if path.suffix == ".json" else dict(zip(source.classes, text.split(), strict=True))
        if not isinstance(said, dict):
            raise ValueError("no object")
        if missing := sorted(said.keys() - set(source.classes)):
            raise ValueError(f"{missing[0]!r}, which is no class of {source.name}")
        names = {name: at for at, name in enumerate(classes)}
        if num_outputs == NUM_CLASSES:
            names = {wnid: at for at, wnid in enumerate(synsets())} | names
        return {name: _outputs(value, names, num_outputs) for name, value in said.items()}
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        expected = '{"class of the data": output or [outputs]}, or one number a line for each class'
        raise MaekitError("E-DATA-MAP", f"class map {path}", found=error, expected=expected) from error


def _outputs(value: Any, names: Mapping[str, int], num_outputs: int) -> tuple[int, ...]:
    found = []
    for one in value if isinstance(value, list) else [value]:
        at = names.get(one) if isinstance(one, str) else one
        if at is None and isinstance(one, str) and one.isascii() and one.isdigit():
            at = int(one)
        if not isinstance(at, int) or isinstance(at, bool) or not 0 <= at < num_outputs:
            raise ValueError(f"{one!r}, which is no output of the model's {num_outputs}")
        found.append(at)
    return tuple(found)


def corrupted_folders(path: str, kinds: Sequence[str], severities: Sequence[int]) -> dict[tuple[str, int], Path]:
    """Return the folder of each kind and severity of ImageNet-C as published; kinds that are not there are left out.

    Raises:
        MaekitError: E-DATA-PATH if there is none, or a kind lacks a severity.
    """
    root, found = Path(path), {}
    for kind in kinds:
        place = next((one for one in (root / kind, *sorted(root.glob(f"*/{kind}"))) if one.is_dir()), None)
        if place is None:
            continue
        for severity in severities:
            if not (place / str(severity)).is_dir():
                raise MaekitError("E-DATA-PATH", f"{place}", found=f"no severity {severity}", expected="folders 1 to 5")
            found[kind, severity] = place / str(severity)
    if not found:
        expected = "KIND/SEVERITY/WNID/*.JPEG, as " + f"{kinds[0]}/1"
        raise MaekitError("E-DATA-PATH", f"no corruptions in {path}", expected=expected)
    return found
