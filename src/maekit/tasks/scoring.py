"""What a fine-tuned model says of every image of a source, each exactly once, at any number of processes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from maekit.data.augment import CropsView, EvalView, default_crop_pct
from maekit.data.loader import Batch, Loader, View
from maekit.data.sources import Source
from maekit.errors import MaekitError
from maekit.report.classification import Scored
from maekit.scores.measures import Judged, judge, top_k
from maekit.scores.targets import Answers
from maekit.settings import Finetune
from maekit.tasks.training import number_of_workers
from maekit.train.best import FOLDERS
from maekit.train.checkpoint import newest
from maekit.train.device import World
from maekit.train.precision import autocast
from maekit.train.schedule import Schedule

Tap = Callable[[Batch, Tensor], object]


@dataclass(frozen=True)
class Scorer:
    """The evaluation of a classifier: images as evaluation sees them, in order, nothing padded or seen twice.

    Attributes:
        name: of the split, before the slash of each score's name.
        mirror: average each probability over the image and its mirror.
    """

    loader: Loader
    world: World
    precision: str
    name: str = "val"
    mirror: bool = False

    def __call__(self, model: nn.Module) -> Iterator[tuple[str, float]]:
        """Yield accuracy and mean cross-entropy, as the loop logs them."""
        judged = self.judged(model)
        yield f"{self.name}/top1", top_k(judged, 1)
        yield f"{self.name}/loss", float(judged.loss.mean())

    @torch.no_grad()
    def judged(self, model: nn.Module, tap: Tap | None = None) -> Judged:
        """Return what `model`, in eval mode, says of every image: the same in every process.

        Args:
            model: in eval mode.
            tap: is shown the logarithms of all probabilities of each batch, of which only six numbers are kept here.

        Raises:
            MaekitError: E-NUM-OUTPUT if an output is not finite.
        """
        rows = [torch.zeros(0, 6, dtype=torch.double)]  # a process may have no image
        for batch in self.loader.sweep():
            with autocast(self.precision, self.world.device):
                found = self.log_probabilities(model, batch["images"])
            if tap is not None:
                tap(batch, found)
            rows.append(judge(found, batch["labels"], batch["ids"]).table())
        judged = Judged.of_table(self.world.gather(torch.cat(rows)))
        _refuse_not_finite(judged.loss.isfinite())
        return judged

    def log_probabilities(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return (B, classes); several views (B, V, C, H, W) of an image give the mean of their probabilities."""
        logs = _each_view(model, images, mirror=self.mirror).log_softmax(-1)
        return logs[0] if len(logs) == 1 else logs.logsumexp(0) - torch.tensor(float(len(logs))).log().item()


@dataclass(frozen=True)
class TargetScorer:
    """The evaluation of a model of tags or numbers, on the same terms.

    Attributes:
        said: outputs of all views (V, B, K) -> what is said of each image, (B, K) double on the CPU.
        measured: answers -> measures by name, val_loss among them.
        best: the measure that is logged, and that chooses an epoch: the higher, the better.
    """

    loader: Loader
    world: World
    precision: str
    said: Callable[[Tensor], Tensor]
    measured: Callable[[Answers], dict[str, Any]]
    best: str
    name: str = "val"
    mirror: bool = False

    def __call__(self, model: nn.Module) -> Iterator[tuple[str, float]]:
        """Yield one measure and the loss, as the loop logs them."""
        found = self.measured(self.judged(model))
        yield f"{self.name}/{self.best}", found[self.best]
        yield f"{self.name}/loss", found["val_loss"]

    @torch.no_grad()
    def judged(self, model: nn.Module, tap: Tap | None = None) -> Answers:
        """Return what `model`, in eval mode, says of every image: the same in every process.

        Args:
            model: in eval mode.
            tap: is shown what is said of each batch.

        Raises:
            MaekitError: E-NUM-OUTPUT if an output is not finite.
        """
        targets = self.loader.source.targets
        assert targets is not None
        rows = [torch.zeros(0, 1 + len(targets.names), dtype=torch.double)]  # a process may have no image
        for batch in self.loader.sweep():
            with autocast(self.precision, self.world.device):
                outputs = _each_view(model, batch["images"], mirror=self.mirror)
            said = self.said(outputs)
            if tap is not None:
                tap(batch, said)
            rows.append(torch.cat([batch["ids"].cpu().double()[:, None], said], 1))
        answers = Answers.of_rows(self.world.gather(torch.cat(rows)), torch.from_numpy(targets.values))
        _refuse_not_finite(answers.said.isfinite().all(1))
        return answers


def _each_view(model: nn.Module, images: Tensor, *, mirror: bool) -> Tensor:
    """Return outputs (V, B, K) of images, or of several views (B, V, C, H, W) of each; `mirror`: and their mirrors."""
    views = list(images.unbind(1)) if images.ndim == 5 else [images]
    views += [view.flip(-1) for view in views] if mirror else []
    return torch.stack([model(view).float() for view in views])


def _refuse_not_finite(finite: Tensor) -> None:
    if not bool(finite.all()):
        raise MaekitError(
            "E-NUM-OUTPUT", f"outputs for {int((~finite).sum())} of {len(finite)} images", found="NaN or infinity",
            expected="finite numbers", hint="--precision fp32, or a lower --base-lr",
        )  # fmt: skip


def scorer(
    val: Source,
    size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    here: World,
    *,
    workers: int | str,
    precision: str = "fp32",
    crop_pct: float | None = None,
    name: str = "val",
    tta: str | None = None,
) -> Scorer:
    """Return the evaluation of a classifier on a source.

    Args:
        val: images with their classes.
        size: H, W that the model sees, in pixels.
        crop_pct: part of the resized image that is kept; default: `default_crop_pct`.
        name: of the split.
        tta: views that are averaged: "flip", "5-crop", "10-crop"; None: one.

    Raises:
        MaekitError: E-CONFIG-TTA for crops of images of which nothing is cut off.
    """
    loader = sweep_loader(val, size, mean, std, here, workers=workers, crop_pct=crop_pct, tta=tta)
    return Scorer(loader, here, precision, name, mirror=mirrors(tta))


def mirrors(tta: str | None) -> bool:
    """Tell whether views are averaged with their mirrors."""
    return tta in ("flip", "10-crop")


def sweep_loader(
    val: Source,
    size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    here: World,
    *,
    workers: int | str,
    crop_pct: float | None,
    tta: str | None,
) -> Loader:
    """Return the loader of an evaluation: arguments and refusals of `scorer`."""
    crop_pct = crop_pct or default_crop_pct(size)
    view: View = EvalView(size, crop_pct)
    if tta in ("5-crop", "10-crop"):
        if crop_pct == 1:
            raise MaekitError(
                "E-CONFIG-TTA", "setting tta", found=f"{tta} of whole images", expected="a crop_pct below 1",
                hint="--crop-pct 0.875, or --tta flip",
            )  # fmt: skip
        view = CropsView(size, crop_pct)
    return Loader(
        val,
        view,
        batch_size=len(val),
        micro_batch=64,
        mean=mean,
        std=std,
        workers=number_of_workers(workers, len(val), size),
        device=here.device,
        rank=here.rank,
        world=here.size,
    )


T = TypeVar("T", covariant=True)


class Judge(Protocol[T]):
    """What `final_scores` needs of an evaluation."""

    def judged(self, model: nn.Module, tap: Tap | None = None) -> T:
        """Return what a model says of every image."""
        ...


def final_scores(
    model: nn.Module, score: Judge[T], run: Path, settings: Finetune, timing: Schedule, tap: Tap | None = None
) -> list[Scored[T]]:
    """Judge the images to score on by the chosen weights, then by the chosen average where there is one.

    The weights come from the disk, where the loop has put them: what is scored is what a user loads. `tap` is shown
    what the last of them say, which the report is about.
    """
    model.eval()
    found = []
    prefixes = list(FOLDERS) if settings.ema else [""]
    for prefix in prefixes:
        last = settings.select == "last"
        saved = newest(run / "checkpoints" if last else run / FOLDERS[prefix])
        assert saved is not None
        averaged = saved.tensors.get("ema", {}) if prefix else {}
        model.load_state_dict(saved.tensors["model"] | averaged)
        told = "the last epoch"
        if not last:
            epoch, of = (f"{step / timing.steps_per_epoch:.4g}" for step in (saved.step, timing.total))
            told = f"epoch {epoch} of {of}, the best on held-out training images ({saved.state['score']:.4f})"
        found.append(Scored(prefix, told, score.judged(model, tap if prefix == prefixes[-1] else None)))
    return found
