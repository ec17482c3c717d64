"""Write what a classifier says of every image of any data: class and probabilities, a picture on request.

Data larger than memory are streamed, and a stopped prediction is gone on with (`maekit.tasks.streamed`); the columns
are those of `maekit.tasks.predictions`.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maekit.config import load_yaml
from maekit.data.loader import Batch, Loader
from maekit.data.sources import Source, open_source
from maekit.errors import MaekitError, clean
from maekit.report.grids import captioned_grid, write_png
from maekit.settings import Predict
from maekit.tasks import Result
from maekit.tasks.classifying import Subject, limited, load_subject
from maekit.tasks.predictions import Columns, Truth, check_outputs, write_predictions
from maekit.tasks.run_folder import outside, typed
from maekit.tasks.scoring import Scorer, scorer
from maekit.tasks.streamed import Parts, Rows, Work, images_of, stream
from maekit.tasks.training import channels_of, spread
from maekit.train.device import world
from maekit.train.precision import autocast

log = logging.getLogger("maekit")

SHOWN_CLASSES = 20
"""Lines of the summary."""


def predict(settings: Predict | dict[str, Any]) -> Result:
    """Write one row per image, or go on with a file that was stopped.

    Returns:
        run, file, images, skipped (those that cannot be read), classes (predicted images of each), grid if there is
        one; top1 if every image has a true class that is the classifier's. Exit code 75 if stopped with something to
        go on from: file, images, of.

    Raises:
        MaekitError: E-USAGE- (no classifier, no data, no or another kind of file), E-CONFIG-OUT, E-DATA-, E-CKPT-,
            E-NUM-OUTPUT, E-ENV-OUT, E-ENV-BUSY.
    """
    settings = typed(Predict, settings)
    out = _file(settings)
    source = _images(settings)
    if (result := spread(settings, predict)) is not None:
        return result
    with world(settings.device, settings.peer_timeout) as here:
        subject = load_subject(settings.run, here, crop_pct=settings.crop_pct, precision=settings.precision)
        channels_of(source, len(subject.mean))
        score = scorer(
            source, subject.size, subject.mean, subject.std, here, workers=settings.workers,
            precision=subject.precision, crop_pct=subject.crop_pct, tta=settings.tta,
        )  # fmt: skip
        answers = Columns.of(subject.num_outputs, settings.probabilities)
        truth = Truth.of(source, subject.classes, subject.num_outputs)
        found = _Found(truth, settings.count if settings.grid else 0)

        def rows(batch: Batch) -> Rows:
            with autocast(subject.precision, here.device):
                found = score.log_probabilities(subject.model, batch["images"])
            check_outputs(found)
            return answers.rows(found)

        def finish(parts: Parts) -> None:
            write_predictions(out, answers, truth, found.watched(parts))
            if settings.grid is not None:
                write_png(settings.grid, _grid(found, score, source))

        job = _job(settings, subject, answers, source)
        work = Work(score.loader, rows, answers.row_bytes, "predictions", job)
        if (stopped := stream(out, work, here, finish)) is not None:
            return stopped
    return _result(settings, out, source, found)


def _file(settings: Predict) -> Path:
    if settings.grid is None and settings.count != Predict.model_fields["count"].default:
        raise MaekitError(
            "E-CONFIG-IDLE", "setting count", found=f"{settings.count} and no grid", expected="a grid",
            hint="--grid predictions.png",
        )  # fmt: skip
    expected = {"out": (".parquet", ".csv"), "grid": (".png",)}
    for name, suffixes in expected.items():
        path: Path | None = getattr(settings, name)
        if path is None and name == "grid":
            continue
        if path is None or path.suffix.lower() not in suffixes:
            what = " or ".join(f"FILE{suffix}" for suffix in suffixes)
            raise MaekitError(
                "E-USAGE-OUT", f"setting {name}", found=path or "nothing", expected=what,
                hint=f"--{name} predictions{suffixes[0]}",
            )  # fmt: skip
        if path.is_dir():
            raise MaekitError("E-USAGE-OUT", f"setting {name}", found=f"the folder {path}", expected="a file")
        outside(path, settings.data)
    assert settings.out is not None
    return settings.out


def _images(settings: Predict) -> Source:
    if settings.data is None:
        raise MaekitError("E-USAGE-DATA", "no images named", hint="--data FOLDER, or --data builtin:fashion")
    source = open_source(
        settings.data,
        None if settings.split == "all" else settings.split,
        image_column=settings.image_column,
        label_column=settings.label_column,
    )
    return limited(source, settings.limit, settings.seed)


def _job(settings: Predict, subject: Subject, answers: Columns, source: Source) -> dict[str, Any]:
    return images_of(source) | {
        "verb": "predict",
        "weights": subject.digest,
        "size": subject.size,
        "mean": subject.mean,
        "std": subject.std,
        "crop_pct": subject.crop_pct,
        "precision": subject.precision,
        "tta": settings.tta,
        "probabilities": answers.kind,
    }


class _Found:
    """What the rows say in all, counted while they pass by; some of them are kept for the picture."""

    def __init__(self, truth: Truth, shown: int) -> None:
        self.truth, self.shown = truth, shown
        self.images = self.right = 0
        self.counts = torch.zeros(len(truth.names), dtype=torch.long)
        self.kept: list[tuple[int, int, float]] = []
        """Image, predicted output and its probability."""

    def watched(self, parts: Parts) -> Iterator[Rows]:
        """Yield the parts."""
        total = sum(map(len, parts.ranges))
        wanted = {i * total // self.shown for i in range(self.shown)}
        for rows in parts:
            index, predicted, sure = (rows[name].tolist() for name in ("index", "predicted", "probability"))
            self.images += len(index)
            self.counts += torch.bincount(rows["predicted"], minlength=len(self.counts))
            self.right += sum(self.truth.label(i) == said for i, said in zip(index, predicted, strict=True))
            self.kept += [row for row in zip(index, predicted, sure, strict=True) if row[0] in wanted]
            yield rows

    def caption(self, row: tuple[int, int, float]) -> str:
        """Say what is predicted, how sure, and what is true if that is something else."""
        index, predicted, sure = row
        name, true = self.truth.names[predicted], self.truth.label_name(index)
        return f"{name} {sure:.2f}" + ("" if true in (None, name) else f", is {true}")


def _grid(found: _Found, score: Scorer, source: Source) -> Any:
    """Draw the images that were kept, as the classifier saw them."""
    if not found.kept:
        raise MaekitError("E-DATA-BAD", "setting grid", found="no readable image to show", hint="--count, or no --grid")
    chosen, seen = source.subset([index for index, *_ in found.kept]), score.loader
    channels = seen.mean.numel()
    loader = Loader(
        chosen, seen.samples.view, batch_size=len(chosen), micro_batch=len(chosen), mean=(0.0,) * channels,
        std=(1.0,) * channels,
    )  # fmt: skip
    pictures: Tensor = next(loader.sweep())["images"]
    pictures = pictures[:, 0] if pictures.ndim == 5 else pictures  # of several crops the centre
    return captioned_grid(list(pictures), [found.caption(row) for row in found.kept])


def _result(settings: Predict, out: Path, source: Source, found: _Found) -> Result:
    counts = sorted(zip(found.counts.tolist(), found.truth.names, strict=True), key=lambda pair: -pair[0])
    metrics: dict[str, Any] = {
        "run": str(settings.run),
        "file": str(out),
        "images": found.images,
        "skipped": len(source) - found.images,
        "classes": {name: count for count, name in counts},
    }
    skipped = f", {metrics['skipped']} skipped" if metrics["skipped"] else ""
    lines = [f"{out}: {found.images} images{skipped}; predicted:"]
    said = counts if len(counts) <= SHOWN_CLASSES else [pair for pair in counts if pair[0]]
    lines += [f"  {count:>9,}  {clean(name, 60)}" for count, name in said[:SHOWN_CLASSES]]
    if rest := said[SHOWN_CLASSES:]:
        lines.append(f"  {sum(count for count, _ in rest):>9,}  of {len(rest)} other classes")
    if settings.grid is not None:
        metrics["grid"] = str(settings.grid)
        lines.append(f"picture: {settings.grid}")
    if found.truth.labelled and found.images:
        metrics["top1"] = found.right / found.images
        seen = " (those it was trained on too: --split val for the others)" if _trained_on(settings) else ""
        lines.append(f"top-1 {metrics['top1']:.4f}{seen}")
    elif strange := found.truth.strange:
        lines.append(f"no top-1: {len(strange)} classes of the data are not the classifier's, as {strange[0]!r}")
    return Result(metrics, "\n".join(lines))


def _trained_on(settings: Predict) -> bool:
    """Tell whether these are all the images that the run took its training images from."""
    file = (settings.run or Path()) / "config.yaml"
    return settings.split != "val" and file.is_file() and load_yaml(file).get("data") == settings.data
