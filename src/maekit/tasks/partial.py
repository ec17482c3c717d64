"""Fine-tune the last 0, 1/2, 1, 2, 4 ... blocks, each in a run of its own, beside the linear probe (Fig. 9)."""

import logging
import os
from pathlib import Path
from typing import Any

from maekit.data.sources import Source
from maekit.errors import MaekitError
from maekit.interchange.weights import load_model
from maekit.model.heads import check_blocks
from maekit.report.partial import Point, partial_report
from maekit.settings import Finetune, Partial, Probe
from maekit.tasks import Result
from maekit.tasks.features import labelled_splits
from maekit.tasks.finetune import finetune
from maekit.tasks.probe import probe
from maekit.tasks.run_folder import Resolved, Run, carry_out, describe, deviating, finish, open_run, typed
from maekit.tasks.same_data import same_data
from maekit.tasks.training import default_out

log = logging.getLogger("maekit")


def partial(settings: Partial | dict[str, Any]) -> Result:
    """Run the series, or go on with one that was stopped: a finished part is not done again.

    Args:
        settings: as on the command line; a dictionary is checked like a config file.

    Returns:
        run, top1 of each number of blocks under curve, top1 of the linear probe; exit code 75 if stopped early.

    Raises:
        MaekitError: for everything a user can cause.
    """
    settings = typed(Partial, settings)
    if settings.run is None:
        raise MaekitError("E-USAGE-RUN", "nothing to start from", hint="a run folder as first argument")
    if settings.eval_only:
        raise MaekitError(
            "E-CONFIG-IDLE", "setting eval_only", found="a series of trainings", hint="finetune --eval-only"
        )
    if settings.task != "classes":
        raise MaekitError(
            "E-CONFIG-TASK", "setting task", found=f"{settings.task} for partial", expected="classes, as the probe has",
            hint=f"maekit finetune --task {settings.task} --tune-blocks N",
        )  # fmt: skip
    blocks = blocks_of(settings)
    run = open_run(settings.out or default_out("partial", settings.data), "partial", settings)
    return carry_out(run, lambda: _series(settings, blocks, *labelled_splits(settings), run))


def blocks_of(settings: Partial) -> list[float | str]:
    """Return the numbers of blocks to train: those asked for, or of the default as far as the model has them.

    Raises:
        MaekitError: E-CONFIG-BLOCKS.
    """
    assert settings.run is not None
    depth = len(load_model(settings.run).encoder.blocks)
    asked: list[float | str] = list(dict.fromkeys(settings.tune_blocks))
    if settings.tune_blocks == Partial.model_fields["tune_blocks"].default:
        return [each for each in asked if isinstance(each, str) or each <= depth]
    for each in asked:
        if not isinstance(each, str):
            check_blocks(depth, each)
    return asked


def _series(settings: Partial, blocks: list[float | str], train: Source, val: Source, run: Run) -> Result:
    fingerprint = train.fingerprint()
    same_data(run, len(train), fingerprint, accept=settings.data_changed == "accept")
    is_main = os.environ.get("RANK", "0") == "0"
    if is_main and run.resolved is None:
        found = Resolved(
            images=len(train), fingerprint=fingerprint, classes=train.classes, deviations=deviating(settings)
        )
        describe(run, settings, found)
    points: list[Point] = []
    for number, each in enumerate(blocks, 1):
        name = each if isinstance(each, str) else f"{each:g}"
        log.info("%d/%d: fine-tuning, blocks trained: %s", number, len(blocks) + 1, name)
        done = finetune(_part(settings, each, run.path / f"blocks-{name}"))
        if done.exit_code:
            return done
        points.append(Point(name, dict(done.metrics)))
    log.info("%d/%d: linear probe", len(blocks) + 1, len(blocks) + 1)
    level = float(str(_probe(settings, run.path / "probe").metrics["top1"]))
    metrics: dict[str, Any] = {
        "run": str(run.path),
        "curve": {point.blocks: point.top1 for point in points},
        "probe": level,
        "train_images": len(train),
        "val_images": len(val),
    }
    if is_main:
        partial_report(run.path, points, level, images=len(val))
        finish(run, metrics)
    return Result(metrics, _text(points, level) + f"\nthe curve: {run.path}/report.html")


def _part(settings: Partial, blocks: float | str, out: Path) -> Finetune:
    """Return the settings of one fine-tune of the series."""
    values = settings.model_dump() | {"tune_blocks": blocks, "out": out, "resume": None}
    return Finetune.model_validate({name: values[name] for name in Finetune.model_fields})


def _probe(settings: Partial, out: Path) -> Result:
    """Return the linear probe on the same images and labels; it sees each image at the size of the run."""
    same = ("run", "data", "image_column", "label_column", "workers", "labels", "label_seed", "val_data", "pool",
            "device", "seed")  # fmt: skip
    values = {name: getattr(settings, name) for name in same}
    return probe(Probe(**values, out=out, random_init=settings.from_scratch))


def _text(points: list[Point], level: float) -> str:
    lines = ["blocks   top-1   trained parameters"]
    lines += [f"{point.blocks:<8} {point.top1:.4f}  {point.trained / 1e6:.2f} M" for point in points]
    return "\n".join([*lines, f"probe    {level:.4f}  linear, features solved once"])
