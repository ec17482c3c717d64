"""The reports of a model of tags and of one of numbers: every tag or number, what is wrong by most, as pictures too."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from maekit.config import load_yaml
from maekit.data.augment import EvalView
from maekit.data.sources import Source
from maekit.report.classification import MISTAKES, MOST_CLASSES, Scored, intro, run_facts, seen_images
from maekit.report.files import write_whole
from maekit.report.grids import captioned_grid, write_png
from maekit.report.page import Cell, Figure, Section, Table, write_report
from maekit.report.plots import curves
from maekit.report.scored import (
    MOST_BARS,
    MOST_NUMBERS,
    as_picture,
    as_svg,
    numbers_drawing,
    tags_drawing,
    tags_height,
)
from maekit.report.tables import to_csv
from maekit.scores.targets import (
    Answers,
    number_measures,
    per_number,
    per_tag,
    tag_measures,
    worst_numbers,
    worst_tags,
)
from maekit.train.log import read_metrics


def tags_report(
    run: Path,
    scored: Sequence[Scored[Answers]],
    source: Source,
    names: Sequence[str],
    model: nn.Module,
    view: EvalView,
    mean: Sequence[float],
) -> Path:
    """Write ``report.html``, ``per_label.csv``, ``labels.png`` and ``mistakes.png``.

    Args:
        run: holds config.yaml and metrics.jsonl.
        scored: the weights, then their average if there is one, which tables and pictures are of then.
        source: the images they were scored on.
        names: of the tags.
        model: that was scored; says which machine.
        view: how the images were shown.
        mean: of the channels: how many there are.

    Returns:
        The report's path.

    Raises:
        MaekitError: E-CONFIG- if config.yaml cannot be read, E-ENV-OUT if nothing can be written.
    """
    shown = scored[-1].judged
    rows = _tag_rows(shown, names)
    headers = ["label", "images", "average_precision", "auroc", "precision", "recall", "f1"]
    write_whole(run / "per_label.csv", to_csv(headers, rows))
    drawn = [row for row in rows if row[2] is not None]
    drawn.sort(key=lambda row: -float(row[2] or 0))
    kept = [*drawn[: MOST_BARS // 2], *drawn[len(drawn) - MOST_BARS // 2 :]] if len(drawn) > MOST_BARS else drawn
    figures = []
    if kept:
        share = [float(row[1] or 0) / len(shown.index) for row in kept]
        draw = tags_drawing([str(row[0]) for row in kept], [float(row[2] or 0) for row in kept], share)
        write_png(run / "labels.png", as_picture(draw, tags_height(len(kept))))
        told = f"The best and the worst {MOST_BARS // 2}." if len(drawn) > MOST_BARS else "All with images, best first."
        figures = [Figure(as_svg(draw, tags_height(len(kept))), told)]
    note = ""
    if len(rows) > MOST_CLASSES:
        rows = sorted(rows, key=lambda row: 2.0 if row[2] is None else float(row[2]))[:MOST_CLASSES]
        note = f"The {MOST_CLASSES} of lowest average precision; all are in per_label.csv."
    table = Table(
        ["label", "images", "average precision", "AUROC", "precision", "recall", "F1"],
        [[name, images, *(_fixed(value) for value in values)] for name, images, *values in rows],
        note=note,
    )
    return _page(
        run, "A model that tags images", "labels", scored, source, model,
        [_tag_scores(scored, names), Section("Labels", tables=[table], figures=figures)],
        _wrong_tags(run, shown, names, source, view, len(mean)),
    )  # fmt: skip


def numbers_report(
    run: Path,
    scored: Sequence[Scored[Answers]],
    source: Source,
    names: Sequence[str],
    std: Tensor,
    model: nn.Module,
    view: EvalView,
    mean: Sequence[float],
) -> Path:
    """Write ``report.html``, ``per_target.csv``, ``targets.png`` and ``worst.png``.

    Args:
        names: of the numbers.
        std: (K,) of the training images' numbers, in which errors of several are compared.
        run: as `tags_report`, and all others.

    Returns:
        The report's path.

    Raises:
        MaekitError: as `tags_report`.
    """
    shown = scored[-1].judged
    found = per_number(shown)
    columns = (found.mae, found.rmse, found.r2, found.pearson, found.spearman)
    spread = shown.truth.std(0, correction=0)
    rows: list[list[Cell]] = [
        [name, float(spread[at]), *(float(column[at]) for column in columns)] for at, name in enumerate(names)
    ]
    headers = ["target", "deviation_of_the_truth", "mae", "rmse", "r2", "pearson", "spearman"]
    write_whole(run / "per_target.csv", to_csv(headers, rows))
    height = 2.9 * min(len(names), MOST_NUMBERS)
    draw = numbers_drawing(shown, names)
    write_png(run / "targets.png", as_picture(draw, height))
    told = "Left: each dot an image, on the dashed line where it is right. Right: the errors."
    if len(names) > MOST_NUMBERS:
        told += f" The first {MOST_NUMBERS} of {len(names)}."
    note = (
        "MAE and RMSE are in the units of each target; a model that always says the mean has the deviation as RMSE and "
        "an R2 of 0."
    )
    table = Table(
        ["target", "deviation", "MAE", "RMSE", "R2", "Pearson", "Spearman"],
        [[row[0], *(f"{float(value or 0):.4g}" for value in row[1:4]), *map(_fixed, row[4:])] for row in rows],
        note=note,
    )
    return _page(
        run, "A model that measures images", "targets", scored, source, model,
        [
            _number_scores(scored, names, std),
            Section("Targets", tables=[table], figures=[Figure(as_svg(draw, height), told)]),
        ],
        _wrong_numbers(run, shown, names, std, source, view, len(mean)),
    )  # fmt: skip


def _page(
    run: Path,
    what: str,
    outputs: str,
    scored: Sequence[Scored[Answers]],
    source: Source,
    model: nn.Module,
    sections: Sequence[Section],
    pictures: Section,
) -> Path:
    """Write the page around what was found."""
    config = load_yaml(run / "config.yaml")
    records = read_metrics(run / "metrics.jsonl")
    first, *more = sections
    drawn = curves(records)
    write_report(
        run / "report.html",
        title=f"Fine-tuning: {run.name}",
        intro=intro(what, scored, source, config),
        sections=[
            first,
            Section("What was run", facts=run_facts(config, model, records, outputs)),
            Section("Curves", figures=[Figure(drawn, "Loss, learning rate and scores.")] if drawn else []),
            *more,
            pictures,
            Section("Configuration", details={"config.yaml": (run / "config.yaml").read_text("utf-8").rstrip()}),
        ],
    )
    return run / "report.html"


def _tag_rows(answers: Answers, names: Sequence[str]) -> list[list[Cell]]:
    found = per_tag(answers)
    columns = (found.ap, found.auroc, found.precision, found.recall, found.f1)
    return [
        [name, int(found.support[at]), *(None if column[at].isnan() else float(column[at]) for column in columns)]
        for at, name in enumerate(names)
    ]


def _tag_scores(scored: Sequence[Scored[Answers]], names: Sequence[str]) -> Section:
    titles = {
        "map": "mAP", "macro_auroc": "macro AUROC", "micro_f1": "micro F1", "macro_f1": "macro F1",
        "exact_match": "all right", "val_loss": "loss",
    }  # fmt: skip
    rows = [[one.name, *(_fixed(tag_measures(one.judged)[name]) for name in titles)] for one in scored]
    with_images = int((scored[0].judged.truth.sum(0) > 0).sum())
    note = (
        f"mAP: mean average precision over the {with_images} of {len(names)} labels that images here have. F1 and all "
        "right: of probabilities from one half."
    )
    return Section("Scores", tables=[Table(["", *titles.values()], rows, note=note)])


def _number_scores(scored: Sequence[Scored[Answers]], names: Sequence[str], std: Tensor) -> Section:
    titles = {"r2": "R2", "pearson": "Pearson", "spearman": "Spearman"}
    found = [number_measures(one.judged, list(names), std) for one in scored]
    if len(names) == 1:
        titles = {"mae": "MAE", "rmse": "RMSE", **titles}
    rows = [
        [one.name, *(f"{float(str(values[name])):.4g}" for name in titles)]
        for one, values in zip(scored, found, strict=True)
    ]
    note = "" if len(names) == 1 else f"Means over {len(names)} targets."
    return Section("Scores", tables=[Table(["", *titles.values()], rows, note=note)])


def _wrong_tags(
    run: Path, answers: Answers, names: Sequence[str], source: Source, view: EvalView, channels: int
) -> Section:
    found = worst_tags(answers, MISTAKES)
    if not found:
        return Section("Most confident mistakes", text=["None: every label is right."])
    captions = []
    for row, tag in found:
        has, sure = bool(answers.truth[row, tag] > 0.5), float(answers.said[row, tag].sigmoid())
        captions.append(f"{names[tag]} {sure:.2f}, {'has it' if has else 'has it not'}")
    chosen = source.subset([int(answers.index[row]) for row, _ in found])
    told = "What probability was given to a label, and whether the image has it: wrong labels, too, are found here."
    return _pictures("Most confident mistakes", run / "mistakes.png", chosen, view, channels, captions, told)


def _wrong_numbers(
    run: Path, answers: Answers, names: Sequence[str], std: Tensor, source: Source, view: EvalView, channels: int
) -> Section:
    found = worst_numbers(answers, std, MISTAKES)
    captions = []
    for row, at in found:
        name = f"{names[at]}: " if len(names) > 1 else ""
        captions.append(f"{name}{float(answers.said[row, at]):.4g}, is {float(answers.truth[row, at]):.4g}")
    chosen = source.subset([int(answers.index[row]) for row, _ in found])
    told = "What was predicted, and what is true: wrong values, too, are found here."
    return _pictures("Largest errors", run / "worst.png", chosen, view, channels, captions, told)


def _pictures(
    heading: str, file: Path, source: Source, view: EvalView, channels: int, captions: Sequence[str], told: str
) -> Section:
    grid = captioned_grid(seen_images(source, view, channels), captions)
    write_png(file, grid)
    return Section(heading, figures=[Figure(grid, told)], details={"Which images": "; ".join(source.ids)})


def _fixed(value: Any) -> Cell:
    return None if value is None else f"{float(value):.4f}"
