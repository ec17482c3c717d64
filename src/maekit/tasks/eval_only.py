"""``finetune --eval-only``: score a classifier on labelled images without training it.

A run of ``finetune``, an official fine-tuned file, a classifier of timm: whatever has a head. The scoring, the report
and the files are those of the end of a fine-tuning.
"""

from pathlib import Path
from typing import Any

from maekit import recipes
from maekit.config import load_yaml
from maekit.data.augment import EvalView
from maekit.data.sources import Source
from maekit.errors import MaekitError
from maekit.report.classification import Scored, classification_report
from maekit.scores.measures import measures
from maekit.settings import Finetune
from maekit.tasks import Result
from maekit.tasks.classifying import begin, load_subject, open_labelled
from maekit.tasks.predictions import Columns, Kept, Truth
from maekit.tasks.run_folder import Run, carry_out, finish, open_run
from maekit.tasks.scoring import scorer
from maekit.tasks.training import default_out
from maekit.train.device import World, world

READ = frozenset(
    ("run", "eval_only", "data", "val_data", "image_column", "label_column", "workers", "device", "seed", "out",
     "nproc", "precision", "crop_pct", "tta", "recipe", "resume")
)  # fmt: skip
"""Settings that mean something without training."""


def evaluate_only(settings: Finetune, val: Source | None = None) -> Result:
    """Score the classifier ``settings.run``.

    Args:
        settings: as on the command line.
        val: images to score on, in place of ``settings.val_data`` and ``settings.data``.

    Returns:
        run, weights, weights_sha256, val_images; top1 and the other scores, as a fine-tuning has them.

    Raises:
        MaekitError: E-CONFIG-RUN, E-USAGE-, E-DATA-, E-CKPT-, E-NUM-OUTPUT.
    """
    with world(settings.device) as here:
        run = open_run(
            settings.out or default_out("evaluate", settings.val_data or settings.data), "finetune", settings
        )
        _same_weights(run, settings)
        return carry_out(run, lambda: _score(settings, val, run, here))


def refuse_training(settings: Finetune) -> None:
    """Refuse settings that only training reads, where they are other than by default or by the recipe.

    Raises:
        MaekitError: E-CONFIG-IDLE.
    """
    usual: Any = recipes.find(settings.recipe)[1].settings if settings.recipe else Finetune()
    for name in Finetune.model_fields:
        value = getattr(settings, name)
        if name not in READ and value != getattr(usual, name, value):
            raise MaekitError(
                "E-CONFIG-IDLE", f"setting {name}", found=f"{value} beside eval_only, which trains nothing",
                expected="a setting that does something", hint=f"no --{name.replace('_', '-')}",
            )  # fmt: skip


def _same_weights(run: Run, settings: Finetune) -> None:
    """Refuse the folder of other weights; for training they may have moved, here they are all there is."""
    file = run.path / "config.yaml"
    before = load_yaml(file).get("run") if file.exists() else settings.run
    if settings.run is not None and Path(str(before)) != settings.run:
        raise MaekitError(
            "E-CONFIG-RUN", f"--out {run.path} holds scores of other weights", found=before, expected=str(settings.run),
            hint="another --out",
        )  # fmt: skip


def _score(settings: Finetune, val: Source | None, run: Run, here: World) -> Result:
    subject = load_subject(settings.run, here, crop_pct=settings.crop_pct, precision=settings.precision)
    if val is None:
        apart = settings.val_data is not None
        val = open_labelled(settings.val_data or settings.data, "val-or-all" if apart else "val", settings, subject)
    score = scorer(
        val, subject.size, subject.mean, subject.std, here, workers=settings.workers, precision=subject.precision,
        crop_pct=subject.crop_pct, tta=settings.tta,
    )  # fmt: skip
    begin(settings, run, here, val, subject)
    kept = Kept(Columns.of(subject.num_outputs, None))
    found = Scored("", "the weights as they are", score.judged(subject.model, kept))
    metrics: dict[str, Any] = {"run": str(run.path), "weights": str(settings.run), "weights_sha256": subject.digest}
    metrics |= found.metrics(measures(found.judged, subject.num_outputs)) | {"val_images": len(val)}
    kept.write(run.path, Truth.of(val, subject.classes, subject.num_outputs), here)
    if here.is_main:
        view = EvalView(subject.size, subject.crop_pct)
        classification_report(run.path, [found], val, subject.model, view, subject.mean)
        finish(run, metrics)
    here.barrier()
    return Result(
        metrics,
        f"{run.path}: top-1 {metrics['top1']:.4f} of {settings.run} on {len(val)} images; "
        f"look at {run.path}/report.html",
    )
