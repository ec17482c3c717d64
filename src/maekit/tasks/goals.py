"""What a fine-tune is for: one class an image, tags, or numbers. What differs between the three stands here.

Each has the same parts: names of the outputs, `facts` for the weights, `prepared` training images, the step function,
the evaluation with its measures and the one that chooses an epoch, the report, and a word about the result.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.nn import functional as F

from maekit.data.loader import Batch
from maekit.data.sources import Form, Source, Targets, label_subset, open_source
from maekit.errors import MaekitError
from maekit.report.classification import Scored, classification_report
from maekit.report.targets import numbers_report, tags_report
from maekit.scores.measures import Judged, measures
from maekit.scores.targets import Answers, number_measures, tag_measures
from maekit.settings import Finetune
from maekit.tasks.features import labelled_splits
from maekit.tasks.scoring import Scorer, TargetScorer, mirrors, scorer, sweep_loader
from maekit.train.losses import balanced_weights, number_loss, soft_targets, supervised_loss, tag_loss, tag_weights

log = logging.getLogger("maekit")


@dataclass(frozen=True)
class Classes:
    """One class an image.

    Attributes:
        names: of the classes.
        labels: of all training images.
    """

    names: list[str]
    labels: Sequence[int] = field(repr=False)

    best: ClassVar[str] = "top1"
    facts: ClassVar[dict[str, Any]] = {}

    def prepared(self, train: Source) -> Source:
        """Return training images as they are."""
        return train

    def step(self, settings: Finetune, device: torch.device) -> Any:
        """Return the step function."""
        return supervised_step(settings, len(self.names), device, self.labels)

    def scorer(self, val: Source, **more: Any) -> Scorer:
        """Return the evaluation; arguments of `maekit.tasks.scoring.scorer`."""
        return scorer(val, **more)

    def measured(self, judged: Judged) -> dict[str, Any]:
        """Return all measures by name."""
        return measures(judged, len(self.names))

    def report(self, run: Path, scored: Sequence[Scored[Judged]], val: Source, *shown: Any) -> None:
        """Write the report."""
        classification_report(run, scored, val, *shown)

    def told(self, metrics: dict[str, Any]) -> str:
        """Say the score."""
        return f"top-1 {metrics['top1']:.4f}"


@dataclass(frozen=True)
class Tags:
    """Several tags an image, or none.

    Attributes:
        names: of the tags.
        weights: (K,) of images with each tag, where both sides are to weigh the same.
    """

    names: list[str]
    weights: Tensor = field(repr=False)

    best: ClassVar[str] = "map"
    facts: ClassVar[dict[str, Any]] = {"task": "multilabel"}

    @staticmethod
    def of(targets: Targets, name: str) -> "Tags":
        """Look at the tags of all training images.

        Raises:
            MaekitError: E-DATA-TARGETS if none tells images apart.
        """
        count = targets.values.sum(0, dtype=np.int64)
        if not ((count > 0) & (count < len(targets.values))).any():
            raise MaekitError(
                "E-DATA-TARGETS", f"tags of {name}", found=f"{len(targets.names)}, each of all images or of none",
                expected="a tag that some images have and others have not",
            )  # fmt: skip
        if missing := [tag for tag, n in zip(targets.names, count, strict=True) if n == 0]:
            log.warning("%d tags that no training image has: %s", len(missing), ", ".join(missing[:10]))
        return Tags(targets.names, tag_weights(torch.from_numpy(targets.values)))

    def prepared(self, train: Source) -> Source:
        """Return training images as they are."""
        return train

    def step(self, settings: Finetune, device: torch.device) -> Any:
        """Return the step function: random erasing, mixup or cutmix of images and tags, binary cross-entropy."""
        mixup, erase = _mixup(settings, 0.0), _erasing(settings, device)
        weights = self.weights.to(device) if settings.class_weights else None

        def step(module: nn.Module, batch: Batch) -> dict[str, Tensor]:
            images, tags = batch["images"], batch["targets"]
            if erase is not None:
                images = erase(images)
            if mixup is not None:
                # as classes the images' own numbers: on the diagonal comes back how much of itself each image still is,
                # the rest is of its reverse; no matrix product, which would round shares in half precision
                count, times = len(images), 1 + len(images) % 2
                mixup.num_classes = count * times
                numbers = torch.arange(count * times, device=images.device)
                images, shares = mixup(images.repeat(times, 1, 1, 1), numbers)
                own, tags = shares.diagonal().to(tags.dtype)[:, None], tags.repeat(times, 1)
                images, tags = images[:count], (own * tags + (1 - own) * tags.flip(0))[:count]
            return {"loss": tag_loss(module(images), tags, smoothing=settings.label_smoothing, weights=weights)}

        return step

    def scorer(self, val: Source, **more: Any) -> TargetScorer:
        """Return the evaluation; arguments of `maekit.tasks.scoring.scorer`."""
        return _target_scorer(self, val, **more)

    @staticmethod
    def said(outputs: Tensor) -> Tensor:
        """Return log-odds (B, K) of the mean probability of views (V, B, K)."""
        logits = outputs.cpu().double()
        if len(logits) == 1:
            return logits[0]
        return F.logsigmoid(logits).logsumexp(0) - F.logsigmoid(-logits).logsumexp(0)

    def measured(self, answers: Answers) -> dict[str, Any]:
        """Return all measures by name."""
        return tag_measures(answers)

    def report(self, run: Path, scored: Sequence[Scored[Answers]], val: Source, *shown: Any) -> None:
        """Write the report."""
        tags_report(run, scored, val, self.names, *shown)

    def told(self, metrics: dict[str, Any]) -> str:
        """Say the score."""
        return f"mAP {metrics['map']:.4f}, micro F1 {metrics['micro_f1']:.4f}"


@dataclass(frozen=True)
class Numbers:
    """One or several numbers an image, learned in standard deviations from their mean over the training images.

    Attributes:
        names: of the numbers.
        mean: (K,) double, in the user's units, as std.
        std: (K,) double.
        loss: "mse" | "huber".
    """

    names: list[str]
    mean: Tensor
    std: Tensor
    loss: str

    best: ClassVar[str] = "r2"

    @staticmethod
    def of(targets: Targets, name: str, loss: str) -> "Numbers":
        """Measure the numbers of all training images.

        Raises:
            MaekitError: E-DATA-TARGETS for a number that is the same of all images.
        """
        mean, std = targets.values.mean(0), targets.values.std(0)
        for column, deviation, values in zip(targets.names, std, targets.values.T, strict=True):
            if not deviation > 1e-12 * np.abs(values).max():
                raise MaekitError(
                    "E-DATA-TARGETS", f"column {column!r} of {name}",
                    found=f"{values[0]:g} for all {len(values)} training images", expected="numbers that differ",
                )  # fmt: skip
        return Numbers(targets.names, torch.from_numpy(mean), torch.from_numpy(std), loss)

    @property
    def facts(self) -> dict[str, Any]:
        """What the weights say of themselves."""
        return {"task": "regression", "target_mean": self.mean.tolist(), "target_std": self.std.tolist()}

    def prepared(self, train: Source) -> Source:
        """Return training images with standardised numbers."""
        assert train.targets is not None
        return train.with_targets(Targets(self.names, (train.targets.values - self.mean.numpy()) / self.std.numpy()))

    def step(self, settings: Finetune, device: torch.device) -> Any:
        """Return the step function: random erasing, squared or Huber's error."""
        erase = _erasing(settings, device)

        def step(module: nn.Module, batch: Batch) -> dict[str, Tensor]:
            images = batch["images"] if erase is None else erase(batch["images"])
            return {"loss": number_loss(module(images), batch["targets"], kind=self.loss)}

        return step

    def scorer(self, val: Source, **more: Any) -> TargetScorer:
        """Return the evaluation; arguments of `maekit.tasks.scoring.scorer`."""
        return _target_scorer(self, val, **more)

    def said(self, outputs: Tensor) -> Tensor:
        """Return the mean (B, K) of views (V, B, K), in the user's units."""
        return outputs.cpu().double().mean(0) * self.std + self.mean

    def measured(self, answers: Answers) -> dict[str, Any]:
        """Return all measures by name."""
        return number_measures(answers, self.names, self.std, self.loss)

    def report(self, run: Path, scored: Sequence[Scored[Answers]], val: Source, *shown: Any) -> None:
        """Write the report."""
        numbers_report(run, scored, val, self.names, self.std, *shown)

    def told(self, metrics: dict[str, Any]) -> str:
        """Say the score."""
        return f"R2 {metrics['r2']:.4f}" + (f", MAE {metrics['mae']:.4g}" if "mae" in metrics else "")


Goal = Classes | Tags | Numbers


def goal_of(settings: Finetune, train: Source) -> Goal:
    """Return what the settings ask for, with what must be known of the training images.

    Raises:
        MaekitError: E-DATA-TARGETS, also for images without tags or numbers.
    """
    if settings.task == "classes":
        return Classes(train.classes or [], train.labels or [])
    if train.targets is None:
        raise MaekitError("E-DATA-TARGETS", f"{train.name} for --task {settings.task}", found="images without targets",
                          expected="a source with targets (Source.with_targets)")  # fmt: skip
    if settings.task == "multilabel":
        return Tags.of(train.targets, train.name)
    return Numbers.of(train.targets, train.name, settings.loss)


def splits_of(settings: Finetune) -> tuple[Source, Source]:
    """Return the training part (cut down to ``--labels``) and the part to score on, with what the task needs.

    Raises:
        MaekitError: E-USAGE-DATA without ``--data``, E-USAGE-LABELS, E-DATA-.
    """
    if settings.task == "classes":
        return labelled_splits(settings)
    if settings.data is None:
        raise MaekitError("E-USAGE-DATA", "no labelled images named", hint="--data LIST.csv, or a parquet file")
    more: dict[str, Any] = {
        "image_column": settings.image_column,
        "label_column": settings.label_column,
        "form": Form(settings.task, settings.label_separator),
    }
    train = open_source(settings.data, "train-or-all" if settings.val_data else "train", **more)
    assert train.targets is not None
    val = open_source(
        settings.val_data or settings.data, "val-or-all" if settings.val_data else "val",
        classes=train.targets.names, **more,
    )  # fmt: skip
    if val.targets is None or val.targets.names != train.targets.names:
        raise MaekitError(
            "E-DATA-TARGETS", f"columns of {val.name}", found=", ".join(val.targets.names if val.targets else []),
            expected=f"those of {train.name}: {', '.join(train.targets.names)}",
        )  # fmt: skip
    return train.subset(label_subset(train, settings.labels, settings.label_seed)), val


def _target_scorer(
    goal: Tags | Numbers, val: Source, *, here: Any, name: str = "val", tta: str | None = None,
    precision: str = "fp32", crop_pct: float | None = None, **more: Any,
) -> TargetScorer:  # fmt: skip
    loader = sweep_loader(val, here=here, tta=tta, crop_pct=crop_pct, **more)
    return TargetScorer(loader, here, precision, goal.said, goal.measured, goal.best, name, mirror=mirrors(tta))


def _mixup(settings: Finetune, smoothing: float, num_classes: int = 0) -> Mixup | None:
    """Return timm's mixup and cutmix; they draw from the generators that the loop seeds with (seed, step, rank)."""
    if not (settings.mixup or settings.cutmix):
        return None
    return Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        prob=settings.mixup_prob,
        switch_prob=settings.mixup_switch,
        label_smoothing=smoothing,
        num_classes=num_classes,
    )


def _erasing(settings: Finetune, device: torch.device) -> RandomErasing | None:
    if not settings.random_erasing:
        return None
    return RandomErasing(settings.random_erasing, mode="pixel", device=str(device))


def supervised_step(
    settings: Finetune, num_classes: int, device: torch.device, labels: Sequence[int] | None = None
) -> Any:
    """Return the step function: random erasing, mixup or cutmix, label smoothing, loss (paper table 9).

    Args:
        labels: of all training images; needed where classes are weighted.
    """
    mixup, erase = _mixup(settings, settings.label_smoothing, num_classes), _erasing(settings, device)
    weights = balanced_weights(labels or [], num_classes).to(device) if settings.class_weights else None

    def step(module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        images, labels = batch["images"], batch["labels"]
        if erase is not None:
            images = erase(images)
        if mixup is not None:
            # timm mixes a batch with its own reverse and wants an even number; twice the batch gives the same pairs
            count, times = len(images), 1 + len(images) % 2
            images, targets = mixup(images.repeat(times, 1, 1, 1), labels.repeat(times))
            images, targets = images[:count], targets[:count]
        elif settings.loss == "cross-entropy" and weights is None:
            return {"loss": F.cross_entropy(module(images), labels, label_smoothing=settings.label_smoothing)}
        else:
            targets = soft_targets(labels, num_classes, settings.label_smoothing)
        return {"loss": supervised_loss(module(images), targets, kind=settings.loss, weights=weights)}

    return step
