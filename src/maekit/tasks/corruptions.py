"""Errors of a classifier by kind and severity of corruption, made here or as published, and what they come to."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from maekit.config import suggest
from maekit.data.augment import EvalView
from maekit.data.corrupt import CorruptedView
from maekit.data.imagenet import corrupted_folders, is_imagenet, output_of
from maekit.data.loader import Loader
from maekit.data.sources import Source, open_source
from maekit.errors import MaekitError
from maekit.report.files import write_whole
from maekit.report.robustness import corruption_rows, draw_corruptions, published
from maekit.report.tables import to_csv, to_markdown
from maekit.scores.corruption import (
    ALEXNET,
    ALEXNET_CLEAN,
    EXTRA,
    GROUPS,
    KINDS,
    Corruption,
    corruption_errors,
    mean_corruption,
)
from maekit.seeds import mix
from maekit.settings import Robustness
from maekit.tasks import Result
from maekit.tasks.classifying import (
    Subject,
    accuracy,
    begin,
    image_loader,
    labelled,
    limited,
    load_subject,
    plain,
    predictions,
)
from maekit.tasks.run_folder import Run, finish
from maekit.train.device import World

log = logging.getLogger("maekit")

Accepted = list[tuple[int, ...]]


def score_corruptions(settings: Robustness, scored: Subject, run: Run, here: World) -> Result:
    """Score on corruptions made here, or on those of ImageNet-C as published."""
    if settings.protocol == "in-c":
        return _corruptions(settings, scored, run, here, _published_cells(settings))
    source = labelled(settings, scored)
    cells = _Cells(_made(settings, source), source, chosen_kinds(settings.kinds))
    return _corruptions(settings, scored, run, here, cells)


def load(settings: Robustness, path: Path | None, here: World) -> Subject:
    """Load a classifier; the files of ImageNet-C are the crops already, so nothing is cut off them."""
    crop = settings.crop_pct or (1.0 if settings.protocol == "in-c" else None)
    return load_subject(path, here, crop_pct=crop, precision=settings.precision)


def chosen_kinds(names: list[str]) -> list[str]:
    """Return the kinds that names of kinds and groups stand for, in the order of `KINDS`; none: all.

    Raises:
        MaekitError: E-USAGE-KINDS.
    """
    for name in names:
        if name not in KINDS and name not in GROUPS:
            near = suggest(name, [*KINDS, *GROUPS])
            raise MaekitError("E-USAGE-KINDS", f"unknown corruption {name!r}{near}", expected=" ".join(KINDS))
    wanted = {kind for name in names for kind in GROUPS.get(name, (name,))}
    return [kind for kind in KINDS if not names or kind in wanted]


class Cell(NamedTuple):
    """The images of one kind and severity; severity 0 means as they are."""

    loader: Loader
    accepted: Accepted


Cells = Callable[[Subject, World, str, int], Cell | None]
"""None: there are no such images, as clean ones of ImageNet-C."""


def _made(settings: Robustness, source: Source) -> Cells:
    """Return the cells of corruptions that are computed: each a function of (seed, kind, severity, image)."""
    assert source.labels is not None
    accepted = [(label,) for label in source.labels]

    def cell(scored: Subject, here: World, kind: str, severity: int) -> Cell:
        if severity == 0:
            return Cell(image_loader(source, EvalView(scored.size, scored.crop_pct), scored, here, settings), accepted)
        view = CorruptedView(scored.size, scored.crop_pct, kind, severity)
        seed = mix(settings.seed, KINDS.index(kind), severity)
        return Cell(image_loader(source, view, scored, here, settings, seed=seed), accepted)

    return cell


class _Cells(NamedTuple):
    """The images of each cell, those of one for names and fingerprint, and the kinds that there are."""

    one: Cells
    first: Source
    kinds: list[str]


def _published_cells(settings: Robustness) -> _Cells:
    """Open ImageNet-C."""
    assert settings.data is not None
    folders = corrupted_folders(settings.data, chosen_kinds(settings.kinds), sorted(set(settings.severities)))

    def images(place: Path) -> Source:
        return limited(open_source(place), settings.limit, settings.seed)

    def cell(scored: Subject, here: World, kind: str, severity: int) -> Cell | None:
        if (kind, severity) not in folders:
            return None
        source = images(folders[kind, severity])
        if source.labels is None or source.classes is None:
            raise MaekitError("E-DATA-LABELS", f"{source.name} has no labels", expected="a folder for each WordNet id")
        index = output_of(scored.classes, scored.num_outputs)
        if unknown := [name for name in source.classes if name not in index]:
            raise MaekitError(
                "E-DATA-CLASSES", f"classes of {source.name}", found=", ".join(unknown[:5]),
                expected=f"WordNet ids among the model's {len(index)} classes",
            )  # fmt: skip
        view = EvalView(scored.size, scored.crop_pct)
        accepted = [(index[source.classes[label]],) for label in source.labels]
        return Cell(image_loader(source, view, scored, here, settings), accepted)

    return _Cells(cell, images(next(iter(folders.values()))), list(dict.fromkeys(kind for kind, _ in folders)))


@dataclass
class Table:
    """Errors of one classifier by kind and severity, and what they depend on.

    Attributes:
        key: weights, images and seed: errors of another key are not taken over.
        clean: error on the images as they are, None if there are none.
        errors: by kind and severity.
    """

    key: dict[str, Any]
    clean: float | None = None
    errors: dict[tuple[str, int], float] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        kinds: dict[str, dict[str, float]] = {}
        for (kind, severity), error in self.errors.items():
            kinds.setdefault(kind, {})[str(severity)] = error
        text = json.dumps({**self.key, "clean": self.clean, "errors": kinds}, indent=1)
        write_whole(path, (text + "\n").encode())


def read_table(path: Path) -> Table:
    """Read robustness.json.

    Raises:
        MaekitError: E-DATA-TABLE.
    """
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        clean = said.pop("clean")
        errors = {(kind, int(s)): float(e) for kind, row in said.pop("errors").items() for s, e in row.items()}
        return Table(dict(said), None if clean is None else float(clean), errors)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise MaekitError("E-DATA-TABLE", f"{path}", found=error, expected="errors by kind and severity") from error


def _fill(
    settings: Robustness, scored: Subject, here: World, cells: Cells, kinds: list[str], file: Path, key: dict[str, Any]
) -> Table:
    """Return the whole table, computing what the file does not hold yet; it is written after each kind."""
    table = Table({**key, "model": scored.digest, "crop_pct": scored.crop_pct, "size": list(scored.size)})
    if file.exists() and (before := read_table(file)).key == table.key:
        table = before
    here.barrier()  # all have looked at the file before one writes
    if table.clean is None:
        table.clean = _error(cells(scored, here, "", 0), scored, here, "as they are")
    for kind in kinds:
        for severity in sorted(set(settings.severities)):
            if (kind, severity) not in table.errors:
                error = _error(cells(scored, here, kind, severity), scored, here, f"{kind} {severity}")
                if error is not None:
                    table.errors[kind, severity] = error
        if here.is_main:
            table.write(file)
        log.info("%s: error %.3f", kind, corruption_errors(table.errors)[kind].error)
    return table


def _error(cell: Cell | None, scored: Subject, here: World, title: str) -> float | None:
    if cell is None:
        return None
    return 1.0 - accuracy(predictions(cell.loader, scored, here, plain(scored), title), cell.accepted)[0]


class Reference(NamedTuple):
    """What corruptions are measured against."""

    name: str
    errors: Mapping[tuple[str, int], float]
    clean: float | None


def _corruptions(settings: Robustness, scored: Subject, run: Run, here: World, wanted: _Cells) -> Result:
    cells, source, kinds = wanted
    begin(settings, run, here, source, scored)
    key = {"protocol": settings.protocol, "data": source.fingerprint(), "images": len(source), "seed": settings.seed}
    of_imagenet = settings.protocol == "in-c" or is_imagenet(source.classes or [])
    # first: a reference that cannot be used is said before hours are spent
    reference = _reference(settings, scored, run, here, cells, kinds, key, of_imagenet)
    table = _fill(settings, scored, here, cells, kinds, run.path / "robustness.json", key)
    known: tuple[Any, ...] = () if reference is None else (reference.errors, reference.clean)
    found = corruption_errors({cell: e for cell, e in table.errors.items() if cell[0] in kinds}, table.clean, *known)
    standard, extra = mean_corruption(found), mean_corruption(found, EXTRA)
    metrics = {
        "run": str(settings.run),
        "out": str(run.path),
        "protocol": settings.protocol,
        "images": len(source),
        "top1": None if table.clean is None else 1.0 - table.clean,
        "reference": None if reference is None else reference.name,
        **_spread("mean_error", "mce", "relative_mce", standard),
        **_spread("extra_error", "extra_ce", "extra_relative_ce", extra),
        "kinds": {kind: {"error": one.error, "ce": one.ce, "relative_ce": one.relative} for kind, one in found.items()},
        "published": published("in-c") if of_imagenet else {},
    }
    if here.is_main:
        _write_corruptions(run, table, found, metrics)
        finish(run, metrics)
    return Result(metrics, f"{run.path}: {_say(metrics, standard, len(kinds))}")


def _spread(error: str, ce: str, relative: str, mean: Corruption | None) -> dict[str, float | None]:
    return dict(zip((error, ce, relative), (mean.error, mean.ce, mean.relative) if mean else (None,) * 3, strict=True))


def _say(metrics: dict[str, Any], standard: Corruption | None, count: int) -> str:
    clean = "" if metrics["top1"] is None else f"; top-1 {metrics['top1']:.4f} as they are"
    if standard is None:
        return f"{count} kinds; no mCE without all 15 standard ones{clean}"
    mce = f"mCE {standard.ce:.4f} against {metrics['reference']}, " if standard.ce is not None else ""
    return f"{mce}mean error {standard.error:.4f} over the 15 standard kinds{clean}; {metrics['images']} images"


def _reference(
    settings: Robustness,
    scored: Subject,
    run: Run,
    here: World,
    cells: Cells,
    kinds: list[str],
    key: dict[str, Any],
    of_imagenet: bool,
) -> Reference | None:
    """Return what to measure against: published errors, a table made before, or one made now.

    Raises:
        MaekitError: E-CONFIG-REFERENCE for a table of other images.
    """
    wanted = settings.reference or ("alexnet" if of_imagenet else None)
    if wanted is None:
        return None
    if wanted == "alexnet":
        if not of_imagenet:
            log.warning(
                "AlexNet's errors are of ImageNet: over those of other images they rank models, and mean no more"
            )
        return Reference("AlexNet", ALEXNET, ALEXNET_CLEAN)
    file = Path(wanted) / "robustness.json"
    if file.is_file():
        table = read_table(file)
        if differing := [name for name in key if table.key.get(name) != key[name]]:
            raise MaekitError(
                "E-CONFIG-REFERENCE", f"{file}", found=f"another {' and '.join(differing)}",
                expected="errors on the same images", hint="--reference with the weights themselves",
            )  # fmt: skip
        if missing := sorted({kind for kind in kinds for s in settings.severities if (kind, s) not in table.errors}):
            log.warning("%s lacks severities of %s: these have no CE", file, ", ".join(missing))
        return Reference(wanted, table.errors, table.clean)
    other = load(settings, Path(wanted), here)
    if other.num_outputs != scored.num_outputs or other.classes != scored.classes:
        raise MaekitError(
            "E-CONFIG-REFERENCE", wanted, found=f"{other.num_outputs} classes, other ones than {settings.run} has",
            expected="a classifier of the same classes",
        )  # fmt: skip
    table = _fill(settings, other, here, cells, kinds, run.path / "reference.json", key)
    return Reference(wanted, table.errors, table.clean)


def _write_corruptions(run: Run, table: Table, found: dict[str, Corruption], metrics: dict[str, Any]) -> None:
    errors = {cell: error for cell, error in table.errors.items() if cell[0] in found}
    headers, rows = corruption_rows(errors, found)
    write_whole(run.path / "table.csv", to_csv(headers, rows))
    for name, (error, ce, relative) in {
        "mean of the 15 standard kinds": ("mean_error", "mce", "relative_mce"),
        "mean of the 4 extra kinds": ("extra_error", "extra_ce", "extra_relative_ce"),
    }.items():
        if metrics[error] is not None:
            rows.append([name, *[""] * (len(headers) - 4), metrics[error], metrics[ce], metrics[relative]])
    notes = [f"{metrics['images']} images, weights {table.key['model'][:12]}, seed {table.key['seed']}."]
    if metrics["reference"]:
        notes.append(f"CE: error over that of {metrics['reference']}; its mean over the standard kinds is the mCE.")
    if metrics["published"]:
        notes.append("mCE in the paper: " + ", ".join(f"{k} {v:.3f}" for k, v in metrics["published"].items()) + ".")
    write_whole(run.path / "table.md", to_markdown(headers, rows, notes))
    write_whole(run.path / "corruptions.png", draw_corruptions(errors, table.clean, [metrics["run"]]))
