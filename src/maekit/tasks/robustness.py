"""Score a classifier on corrupted, occluded and otherwise foreign images (paper appendix B; arXiv 1903.12261)."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maekit.config import suggest
from maekit.data.augment import EvalView
from maekit.data.corrupt import CorruptedView, check_pictures, corruptions
from maekit.data.imagenet import Variant, corrupted_folders, is_imagenet, open_variant, output_of
from maekit.data.loader import Batch, Loader
from maekit.data.sources import Source, open_source
from maekit.errors import MaekitError
from maekit.model.occlusion import blacken, drop, shuffle
from maekit.report.files import write_whole
from maekit.report.robustness import (
    corruption_rows,
    draw_corruptions,
    draw_occlusion,
    published,
    to_csv,
    to_markdown,
)
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
    Scored,
    accuracy,
    image_loader,
    labelled,
    limited,
    load_scored,
    plain,
    predictions,
)
from maekit.tasks.run_folder import Resolved, Run, carry_out, describe, finish, open_run, same_data, typed
from maekit.tasks.training import default_out
from maekit.train.device import World, world

log = logging.getLogger("maekit")

Accepted = list[tuple[int, ...]]


def robustness(settings: Robustness | dict[str, Any]) -> Result:
    """Score a classifier, or go on with a scoring that was stopped.

    ``--out`` gets table.csv, table.md, a plot and robustness.json, written after each kind of corruption: the same
    command goes on after the last whole one.

    Args:
        settings: as on the command line; a dictionary is checked like a config file.

    Returns:
        run, out, protocol, images, top1; with corruptions mean_error, mce, relative_mce (over the 15 standard kinds),
        extra_error, extra_ce and kinds; with occlusion curves; with ReaL, A, R and mapped ones left_out, and top1_all
        where only some outputs compete.

    Raises:
        MaekitError: for everything a user can cause.
    """
    settings = typed(Robustness, settings)
    check_settings(settings)
    with world(settings.device) as here:
        scored = _load(settings, settings.run, here)
        if settings.protocol == "corruptions":
            check_pictures(torch.zeros(len(scored.mean), *scored.size, dtype=torch.uint8))
        run = open_run(settings.out or default_out("robustness", settings.data), "robustness", settings)
        return carry_out(run, lambda: _score(settings, scored, run, here))


def _load(settings: Robustness, path: Path | None, here: World) -> Scored:
    """Load a classifier; the files of ImageNet-C are the crops already, so nothing is cut off them."""
    crop = settings.crop_pct or (1.0 if settings.protocol == "in-c" else None)
    return load_scored(path, here, crop_pct=crop, precision=settings.precision)


def check_settings(settings: Robustness) -> None:
    """Refuse what is missing or belongs to another protocol: nothing is accepted and ignored.

    Raises:
        MaekitError: E-USAGE-DATA, E-USAGE-KINDS, E-USAGE-MAP, E-CONFIG-BOTH, E-ENV-IMPORT.
    """
    if settings.data is None:
        raise MaekitError("E-USAGE-DATA", "no labelled images named", hint="--data FOLDER, or --data builtin:fashion")
    fresh, mine = Robustness(), ONLY_FOR
    for name, protocols in mine.items():
        if settings.protocol not in protocols and getattr(settings, name) != getattr(fresh, name):
            raise MaekitError(
                "E-CONFIG-BOTH", f"setting {name}", found=f"protocol {settings.protocol}",
                expected=" or ".join(protocols),
            )  # fmt: skip
    chosen_kinds(settings.kinds)
    if settings.protocol == "mapped" and settings.class_map is None:
        raise MaekitError("E-USAGE-MAP", "no class map named", hint="--class-map FILE.json")
    if settings.protocol == "corruptions":
        corruptions()


ONLY_FOR = {
    "kinds": ("corruptions", "in-c"),
    "severities": ("corruptions", "in-c"),
    "reference": ("corruptions", "in-c"),
    "occlusions": ("occlusion",),
    "fractions": ("occlusion",),
    "class_map": ("mapped",),
    "all_images": ("corruptions", "occlusion"),
}
"""Settings that mean something to some protocols only."""


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


def _score(settings: Robustness, scored: Scored, run: Run, here: World) -> Result:
    if settings.protocol == "occlusion":
        return _occlusion(settings, scored, run, here)
    if settings.protocol == "corruptions":
        source = labelled(settings, scored)
        kinds = chosen_kinds(settings.kinds)
        return _corruptions(settings, scored, run, here, _made(settings, source), source, kinds)
    if settings.protocol == "in-c":
        cells = _published_cells(settings)
        return _corruptions(settings, scored, run, here, cells.one, cells.first, cells.kinds)
    return _variant(settings, scored, run, here)


# ------------------------------------------------------------------------------------------------ corruptions


class Cell(NamedTuple):
    """The images of one kind and severity; severity 0 means as they are."""

    loader: Loader
    accepted: Accepted


Cells = Callable[[Scored, World, str, int], Cell | None]
"""None: there are no such images, as clean ones of ImageNet-C."""


def _made(settings: Robustness, source: Source) -> Cells:
    """Return the cells of corruptions that are computed: each a function of (seed, kind, severity, image)."""
    assert source.labels is not None
    accepted = [(label,) for label in source.labels]

    def cell(scored: Scored, here: World, kind: str, severity: int) -> Cell:
        if severity == 0:
            return Cell(image_loader(source, EvalView(scored.size, scored.crop_pct), scored, here, settings), accepted)
        view = CorruptedView(scored.size, scored.crop_pct, kind, severity)
        seed = mix(settings.seed, KINDS.index(kind), severity)
        return Cell(image_loader(source, view, scored, here, settings, seed=seed), accepted)

    return cell


@dataclass(frozen=True)
class _Published:
    """The cells of ImageNet-C as published, and the images of the first for the fingerprint."""

    one: Cells
    first: Source
    kinds: list[str]


def _published_cells(settings: Robustness) -> _Published:
    """Open ImageNet-C."""
    assert settings.data is not None
    folders = corrupted_folders(settings.data, chosen_kinds(settings.kinds), sorted(set(settings.severities)))

    def images(place: Path) -> Source:
        return limited(open_source(place), settings.limit, settings.seed)

    def cell(scored: Scored, here: World, kind: str, severity: int) -> Cell | None:
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

    return _Published(cell, images(next(iter(folders.values()))), list(dict.fromkeys(kind for kind, _ in folders)))


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
    settings: Robustness, scored: Scored, here: World, cells: Cells, kinds: list[str], file: Path, key: dict[str, Any]
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


def _error(cell: Cell | None, scored: Scored, here: World, title: str) -> float | None:
    if cell is None:
        return None
    return 1.0 - accuracy(predictions(cell.loader, scored, here, plain(scored), title), cell.accepted)[0]


class Reference(NamedTuple):
    """What corruptions are measured against."""

    name: str
    errors: Mapping[tuple[str, int], float]
    clean: float | None


def _corruptions(
    settings: Robustness, scored: Scored, run: Run, here: World, cells: Cells, source: Source, kinds: list[str]
) -> Result:
    _begin(settings, run, here, source, scored)
    key = {"protocol": settings.protocol, "data": source.fingerprint(), "images": len(source), "seed": settings.seed}
    table = _fill(settings, scored, here, cells, kinds, run.path / "robustness.json", key)
    of_imagenet = settings.protocol == "in-c" or is_imagenet(source.classes or [])
    reference = _reference(settings, scored, run, here, cells, kinds, key, of_imagenet)
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
        "published": published("in-c") if settings.protocol == "in-c" or is_imagenet(scored.classes) else {},
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
    scored: Scored,
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
        return Reference(wanted, table.errors, table.clean)
    other = _load(settings, Path(wanted), here)
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


# -------------------------------------------------------------------------------------------------- occlusion


def _occlusion(settings: Robustness, scored: Scored, run: Run, here: World) -> Result:
    """Sweep once: every image under every way and fraction, from one noise."""
    source = labelled(settings, scored)
    _begin(settings, run, here, source, scored)
    assert source.labels is not None
    ways = [
        (way, fraction) for way in dict.fromkeys(settings.occlusions) for fraction in sorted(set(settings.fractions))
    ]
    black = torch.tensor([-mean / std for mean, std in zip(scored.mean, scored.std, strict=True)], device=here.device)

    def predict(batch: Batch) -> Tensor:
        return torch.stack([_occluded(scored, batch, way, f, black).float().argmax(1) for way, f in ways], 1)

    view = EvalView(scored.size, scored.crop_pct)
    loader = image_loader(source, view, scored, here, settings, seed=settings.seed, num_noise=scored.num_patches)
    table = predictions(loader, scored, here, predict, "occluded")
    top1 = accuracy(table, [(label,) for label in source.labels])
    curves: dict[str, list[tuple[float, float]]] = {}
    for (way, fraction), score in zip(ways, top1, strict=True):
        curves.setdefault(way, []).append((fraction, score))
    metrics = {
        "run": str(settings.run),
        "out": str(run.path),
        "protocol": settings.protocol,
        "images": len(source),
        "patches": scored.num_patches,
        "curves": curves,
    }
    if here.is_main:
        _write_occlusion(run, metrics, 1 / scored.num_outputs)
        finish(run, metrics)
    said = "; ".join(
        f"{way} " + " ".join(f"{score:.3f}@{fraction:g}" for fraction, score in points)
        for way, points in curves.items()
    )
    return Result(metrics, f"{run.path}: top-1 by fraction of patches: {said}; {len(source)} images")


def _occluded(scored: Scored, batch: Batch, way: str, fraction: float, black: Tensor) -> Tensor:
    images, noise, patch = batch["images"], batch["noise"], scored.model.patch_embed.patch_size[0]
    if way == "drop":
        return drop(scored.model, images, noise, fraction)
    if way == "black":
        return scored.model(blacken(images, noise, fraction, patch, black))
    return scored.model(shuffle(images, noise, fraction, patch))


def _write_occlusion(run: Run, metrics: dict[str, Any], chance: float) -> None:
    curves = metrics["curves"]
    fractions = sorted({fraction for points in curves.values() for fraction, _ in points})
    headers = ["fraction", *curves]
    rows = [[float(fraction), *(dict(points)[fraction] for points in curves.values())] for fraction in fractions]
    note = f"Top-1 of {metrics['images']} images, {metrics['patches']} patches each; chance {chance:.3f}."
    write_whole(run.path / "table.csv", to_csv(headers, rows))
    write_whole(run.path / "table.md", to_markdown(headers, rows, [note]))
    write_whole(run.path / "robustness.json", (json.dumps(metrics, indent=1) + "\n").encode())
    write_whole(run.path / "occlusion.png", draw_occlusion(curves, chance, [metrics["run"]]))


# --------------------------------------------------------------------------------------------- published sets


def _variant(settings: Robustness, scored: Scored, run: Run, here: World) -> Result:
    """Score on a published set; where only some outputs compete, both numbers are told."""
    variant = _open_variant(settings, scored)
    _begin(settings, run, here, variant.source, scored)
    outputs = None if variant.outputs is None else torch.tensor(variant.outputs, device=here.device)

    def predict(batch: Batch) -> Tensor:
        logits = scored.model(batch["images"]).float()
        among = logits if outputs is None else logits[:, outputs]
        best = among.argmax(1) if outputs is None else outputs[among.argmax(1)]
        return torch.stack([best, logits.argmax(1)], 1)

    loader = image_loader(variant.source, EvalView(scored.size, scored.crop_pct), scored, here, settings)
    top1, top1_all = accuracy(predictions(loader, scored, here, predict, settings.protocol), variant.accepted)
    metrics: dict[str, Any] = {
        "run": str(settings.run),
        "out": str(run.path),
        "protocol": settings.protocol,
        "images": len(variant.source),
        "left_out": variant.left_out,
        "top1": top1,
        **({} if outputs is None else {"top1_all": top1_all, "outputs": len(outputs)}),
        "published": published(settings.protocol),
    }
    if here.is_main:
        rows = [[metrics["run"], top1], *([model, value] for model, value in metrics["published"].items())]
        among = "" if outputs is None else f" among {len(outputs)} classes ({top1_all:.4f} among all)"
        note = f"{settings.protocol}: {metrics['images']} images scored, {metrics['left_out']} left out{among}."
        write_whole(run.path / "table.csv", to_csv(["model", "top-1"], rows))
        write_whole(run.path / "table.md", to_markdown(["model", "top-1"], rows, [note]))
        write_whole(run.path / "robustness.json", (json.dumps(metrics, indent=1) + "\n").encode())
        finish(run, metrics)
    beside = ", ".join(f"{model} {value:.3f}" for model, value in metrics["published"].items())
    more = f"; the paper: {beside}" if beside else ""
    return Result(metrics, f"{run.path}: {settings.protocol} top-1 {top1:.4f}, {len(variant.source)} images{more}")


def _open_variant(settings: Robustness, scored: Scored) -> Variant:
    """Open the images, at most ``--limit`` of those that can be scored."""
    variant = open_variant(
        settings.protocol,  # type: ignore[arg-type]
        str(settings.data),
        scored.classes,
        scored.num_outputs,
        class_map=settings.class_map,
        image_column=settings.image_column,
        label_column=settings.label_column,
    )
    source = limited(variant.source, settings.limit, settings.seed)
    if source is variant.source:
        return variant
    places = {name: at for at, name in enumerate(variant.source.ids)}
    return Variant(source, [variant.accepted[places[name]] for name in source.ids], variant.outputs, variant.left_out)


def _begin(settings: Robustness, run: Run, here: World, source: Source, scored: Scored) -> None:
    """Write config.yaml, or see that the images are those that the folder began with."""
    fingerprint = source.fingerprint()
    same_data(run, len(source), fingerprint)
    here.barrier()
    if here.is_main and run.resolved is None:
        describe(run, settings, Resolved(images=len(source), fingerprint=fingerprint, classes=scored.classes or None))
