"""The report of a fine-tuned classifier: whose score it is, every class, what is confused, how far to trust it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from maekit.config import Deviation, load_yaml
from maekit.data.augment import EvalView
from maekit.data.loader import Loader
from maekit.data.sources import Source
from maekit.report.files import write_whole
from maekit.report.grids import captioned_grid, write_png
from maekit.report.page import Cell, Figure, Section, Table, write_report
from maekit.report.plots import curves
from maekit.report.pretraining import machine, software
from maekit.report.scored import as_picture, as_svg, confusion_picture, reliability_drawing
from maekit.report.tables import to_csv
from maekit.scores.measures import Judged, Reliability, confusion, measures, per_class, reliability, worst_mistakes
from maekit.train.log import clock, read_metrics

MISTAKES = 24
"""Pictures of wrong predictions."""
MOST_CLASSES = 60
"""Rows of the page's table; all classes are in per_class.csv."""


T = TypeVar("T")


HEADERS = ["class", "images", "precision", "recall", "f1", "most_often_taken_for", "so_many_times"]
"""Of per_class.csv."""


@dataclass(frozen=True)
class Scored(Generic[T]):
    """What one set of weights says of the images to score on.

    Attributes:
        prefix: of the names of its measures: "" for the weights themselves, "ema_" for their average.
        told: which epoch they are of, and who chose it.
        judged: what they say of each image.
    """

    prefix: str
    told: str
    judged: T

    @property
    def name(self) -> str:
        """Words for a table."""
        return "average of weights (EMA)" if self.prefix else "weights"

    def metrics(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """Return measures, and what they are of, under names that begin with the prefix."""
        return {f"{self.prefix}{name}": value for name, value in {**found, "score_of": self.told}.items()}


def classification_report(
    run: Path, scored: Sequence[Scored[Judged]], source: Source, model: nn.Module, view: EvalView, mean: Sequence[float]
) -> Path:
    """Write ``report.html``, ``per_class.csv``, ``confusion.png``, ``reliability.png`` and ``mistakes.png``.

    Tables and pictures are of the average where there is one, as its score is the one to report then.

    Args:
        run: holds config.yaml and metrics.jsonl.
        scored: the weights, then their average if there is one.
        source: the images they were scored on.
        model: that was scored; says which machine.
        view: how the images were shown.
        mean: of the channels: how many there are.

    Returns:
        The report's path.

    Raises:
        MaekitError: E-CONFIG- if config.yaml cannot be read, E-ENV-OUT if nothing can be written.
    """
    config = load_yaml(run / "config.yaml")
    records = read_metrics(run / "metrics.jsonl")
    classes, shown = source.classes or [], scored[-1]
    matrix, bins = confusion(shown.judged, len(classes)), reliability(shown.judged)
    write_whole(run / "per_class.csv", to_csv(HEADERS, _rows(matrix, classes)))
    picture = confusion_picture(matrix, classes)
    write_png(run / "confusion.png", picture)
    write_png(run / "reliability.png", as_picture(reliability_drawing(bins), 4.4))
    figures = [Figure(picture, "True class by row, predicted class by column; shades are shares of the row.")]
    drawn = curves(records)
    write_report(
        run / "report.html",
        title=f"{'Evaluation' if config.get('eval_only') == 'true' else 'Fine-tuning'}: {run.name}",
        intro=intro("A classifier", scored, source, config),
        sections=[
            _scores(scored, len(classes)),
            Section("What was run", facts=run_facts(config, model, records, "classes")),
            *([Section("Curves", figures=[Figure(drawn, "Loss, learning rate and scores.")])] if drawn else []),
            Section("Classes", tables=[_class_table(matrix, classes)]),
            Section("What is confused", figures=figures),
            _calibration(bins),
            _mistakes(run, shown.judged, source, view, len(mean)),
            Section("Configuration", details={"config.yaml": (run / "config.yaml").read_text("utf-8").rstrip()}),
        ],
    )
    return run / "report.html"


def intro(what: str, scored: Sequence[Scored[Any]], source: Source, config: dict[str, Any]) -> list[str]:
    """Say what was scored on what, of which epoch, and who chose it."""
    if config.get("eval_only") == "true":
        return [
            f"{config.get('run')} was scored as it is on {len(source):,} images, each exactly once. Nothing was "
            "trained here; whether these images were among those it was trained on, only its maker can tell."
        ]
    of = "; ".join(f"{one.name}: {one.told}" for one in scored)
    chosen = config.get("select") == "held-out"
    seen = (
        "The epoch was chosen on training images that were held out from training; the images scored here were looked "
        "at once, after that."
        if chosen
        else "No epoch was chosen: the images scored here were watched during training, and nothing depends on it."
    )
    return [
        f"{what} was trained and scored on {len(source):,} images that no training has seen, each exactly once.",
        f"The score is that of {of}. {seen}",
    ]


def _scores(scored: Sequence[Scored[Judged]], num_classes: int) -> Section:
    found = [measures(one.judged, num_classes) for one in scored]
    names = {
        "top1": "top-1", "top5": "top-5", "macro_f1": "macro F1", "balanced_accuracy": "balanced accuracy",
        "ece": "calibration error", "val_loss": "loss",
    }  # fmt: skip
    kept = [name for name in names if name in found[0]]
    rows = [[one.name, *(f"{values[name]:.4f}" for name in kept)] for one, values in zip(scored, found, strict=True)]
    n = len(scored[0].judged.labels)
    top1 = found[-1]["top1"]
    note = (
        f"Of {n:,} images; one standard error of the last top-1 is {math.sqrt(top1 * (1 - top1) / n):.4f}. Macro F1 "
        "and balanced accuracy weigh every class the same. Calibration error: 15 bins (arXiv 1706.04599)."
    )
    return Section("Scores", tables=[Table(["", *(names[name] for name in kept)], rows, note=note)])


def run_facts(
    config: dict[str, Any], model: nn.Module, records: Sequence[dict[str, Any]], outputs: str
) -> dict[str, Cell]:
    """Return what was run; `outputs`: what those of the head are called."""
    resolved, last = config.get("resolved") or {}, (records[-1] if records else {})
    epoch = max((record["epoch"] for record in records if "epoch" in record), default=0.0)
    trained, all_of_them = (
        sum(p.numel() for p in model.parameters() if only is None or p.requires_grad) / 1e6 for only in (True, None)
    )
    classes = f"{len(resolved.get('classes') or [])} {outputs}"
    if config.get("eval_only") == "true":
        place = config.get("val_data") or config.get("data")
        facts: dict[str, Cell] = {
            "Images": f"{place} · {resolved.get('images')}, {classes}",
            "Weights": f"{config.get('run')}, {all_of_them:.2f} M parameters",
            "Views at the score": str(config.get("tta") or "one"),
            "Precision": resolved.get("precision"),
            "Software": software(),
            "Machine": machine(model),
        }
        return {name: value for name, value in facts.items() if value not in (None, "")}
    start = "random weights" if config.get("from_scratch") == "true" else config.get("run")
    facts = {
        "Recipe": config.get("recipe"),
        "Deviations from it": "; ".join(str(Deviation(**each)) for each in resolved.get("deviations") or []),
        "Images": f"{config.get('data')} · {resolved.get('images')} to train on, {classes}",
        "Started from": str(start),
        "Trained": f"{trained:.2f} of {all_of_them:.2f} M parameters (blocks: {config.get('tune_blocks')})",
        "Length": f"{last.get('step', 0):,} steps, {epoch:.4g} epochs, batch {config.get('batch_size')}",
        "Views at the score": str(config.get("tta") or "one"),
        "Time": clock(last["time"]) if "time" in last else None,
        "Precision": resolved.get("precision"),
        "Seed": config.get("seed"),
        "Software": software(),
        "Machine": machine(model),
    }
    return {name: value for name, value in facts.items() if value not in (None, "")}


def _rows(matrix: Tensor, classes: Sequence[str]) -> list[list[Cell]]:
    """Return name, images, precision, recall, F1, and the class it is most often taken for, of each class."""
    found = per_class(matrix)
    wrong = matrix.clone().fill_diagonal_(0)
    rows: list[list[Cell]] = []
    for i, name in enumerate(classes):
        count, taken = int(wrong[i].max()), classes[int(wrong[i].argmax())]
        values = (float(column[i]) for column in (found.precision, found.recall, found.f1))
        rows.append([name, int(found.support[i]), *values, taken if count else "", count])
    return rows


def _class_table(matrix: Tensor, classes: Sequence[str]) -> Table:
    rows = _rows(matrix, classes)
    note = ""
    if len(rows) > MOST_CLASSES:
        rows = sorted(rows, key=lambda row: row[4])[:MOST_CLASSES]  # type: ignore[arg-type,return-value]
        note = f"The {MOST_CLASSES} classes of lowest F1; all are in per_class.csv."
    shown = [
        [name, images, *(f"{float(value or 0):.3f}" for value in values), f"{taken} ({count})" if count else None]
        for name, images, *values, taken, count in rows
    ]
    return Table(["class", "images", "precision", "recall", "F1", "most often taken for"], shown, note=note)


def _calibration(bins: Reliability) -> Section:
    sure = float((bins.count * bins.confidence).sum() / bins.count.sum())
    right = float((bins.count * bins.accuracy).sum() / bins.count.sum())
    word = "more" if sure > right else "less"
    told = (
        f"Mean confidence {sure:.3f}, accuracy {right:.3f}: {word} sure than right. The expected calibration error, "
        f"{bins.ece:.3f}, is the mean distance of bars and diagonal, weighed by images. Label smoothing, mixup and "
        "cutmix make a classifier less sure."
    )
    return Section("How far to trust a probability", figures=[Figure(as_svg(reliability_drawing(bins), 4.4), told)])


def _mistakes(run: Path, judged: Judged, source: Source, view: EvalView, channels: int) -> Section:
    rows = worst_mistakes(judged, MISTAKES)
    if not len(rows):
        return Section("Most confident mistakes", text=["None: every prediction is right."])
    classes = source.classes or []
    chosen = source.subset(judged.index[rows].tolist())
    said, true = (column[rows].tolist() for column in (judged.predicted, judged.labels))
    sure = judged.confidence[rows].tolist()
    captions = [f"{classes[a]} {p:.2f}, is {classes[b]}" for a, p, b in zip(said, sure, true, strict=True)]
    grid = captioned_grid(seen_images(chosen, view, channels), captions)
    write_png(run / "mistakes.png", grid)
    names = "; ".join(chosen.ids[:MISTAKES])
    told = "What was predicted with which probability, and what is true: wrong labels, too, are found here."
    return Section("Most confident mistakes", figures=[Figure(grid, told)], details={"Which images": names})


def seen_images(source: Source, view: EvalView, channels: int) -> list[Tensor]:
    """Return all images of a source as they were scored, (C, H, W) with values 0..1."""
    loader = Loader(
        source, view, batch_size=len(source), micro_batch=len(source), mean=(0.0,) * channels, std=(1.0,) * channels
    )
    return list(next(loader.sweep())["images"])
