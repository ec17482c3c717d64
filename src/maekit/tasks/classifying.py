"""A fine-tuned classifier and labelled images of its classes: what the verbs have in common that only score one."""

import hashlib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from tqdm import tqdm

from maekit.data.loader import Batch, Loader, View
from maekit.data.sources import Source, Split, open_source
from maekit.errors import MaekitError
from maekit.interchange.weights import load_classifier
from maekit.settings import Settings
from maekit.tasks.run_folder import Resolved, Run, describe
from maekit.tasks.same_data import same_data
from maekit.tasks.streamed import first_of_each
from maekit.tasks.training import PATCHES_PER_PASS, channels_of, number_of_workers
from maekit.train import checkpoint
from maekit.train.device import World
from maekit.train.precision import autocast, resolve_precision

log = logging.getLogger("maekit")


@dataclass(frozen=True)
class Subject:
    """A classifier, ready to be scored.

    Attributes:
        model: in eval mode on the device.
        classes: names by output; empty if it has none.
        size: H, W of its images in pixels.
        mean: of each channel, as std.
        std: of each channel, in units of 0..1.
        crop_pct: part of the resized image that it sees.
        precision: "fp32" | "bf16" | "fp16".
        digest: of its weights.
    """

    model: VisionTransformer
    classes: list[str]
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    precision: str
    digest: str

    @property
    def num_outputs(self) -> int:
        """Outputs of the head."""
        return int(self.model.num_classes)

    @property
    def num_patches(self) -> int:
        """N."""
        return self.model.patch_embed.num_patches


def load_subject(path: Path | None, here: World, *, crop_pct: float | None, precision: str) -> Subject:
    """Load a classifier; the crop is the one asked for, that of its run, or the usual one of its size.

    Raises:
        MaekitError: E-USAGE-RUN without a path, E-CKPT-KIND for weights without a head, E-CKPT-.
    """
    if path is None:
        raise MaekitError("E-USAGE-RUN", "no classifier named", hint="a run of maekit finetune as first argument")
    found = load_classifier(path)
    if found.task != "classes":
        raise MaekitError(
            "E-CKPT-KIND", f"{path}", found=f"a model for --task {found.task}", expected="a classifier: one class each",
            hint="in Python: maekit.load_classifier(RUN)(images); its scores stand in the run's report.html",
        )  # fmt: skip
    digest = checkpoint.state_sha256({"model": found.model.state_dict()}, {})
    return Subject(
        found.model.to(here.device),
        found.classes,
        found.size,
        tuple(found.spec["mean"]),
        tuple(found.spec["std"]),
        crop_pct or found.crop_pct,
        resolve_precision(precision, here.device, found.model.embed_dim),
        digest,
    )


def labelled(settings: Any, scored: Subject) -> Source:
    """Open labelled images of the classifier's classes: the part that fine-tuning holds out, or ``--all-images``.

    Raises:
        MaekitError: E-USAGE-DATA, E-DATA-LABELS, E-DATA-CLASSES.
    """
    source = open_labelled(settings.data, "val-or-all" if settings.all_images else "val", settings, scored)
    return limited(source, settings.limit, settings.seed)


def open_labelled(place: str | None, split: Split, settings: Any, scored: Subject) -> Source:
    """Open labelled images of the classifier's classes.

    Args:
        place: where they are.
        split: which of them.
        settings: have image_column and label_column.
        scored: the classifier.

    Raises:
        MaekitError: E-USAGE-DATA, E-DATA-LABELS, E-DATA-CLASSES.
    """
    if place is None:
        raise MaekitError("E-USAGE-DATA", "no labelled images named", hint="--data FOLDER, or --data builtin:fashion")
    source = open_source(
        place,
        split,
        image_column=settings.image_column,
        label_column=settings.label_column,
        classes=scored.classes or None,
    )
    if source.labels is None:
        raise MaekitError(
            "E-DATA-LABELS",
            f"{place} has no labels",
            expected="class folders, a list with labels or a parquet label column",
            hint="maekit data PATH",
        )
    if len(source.classes or []) != scored.num_outputs:
        raise MaekitError(
            "E-DATA-CLASSES",
            f"classes of {place}",
            found=len(source.classes or []),
            expected=f"{scored.num_outputs}, as the classifier has outputs",
            hint="the data that it was fine-tuned on",
        )
    return source


def limited(source: Source, limit: int | None, seed: int) -> Source:
    """Return at most `limit` images, by a hash of (seed, id): the same ones of every copy of a data set."""
    if limit is None or limit >= len(source):
        return source
    return source.subset(chosen(source.ids, limit, seed))


def chosen(ids: Sequence[str], limit: int, seed: int) -> list[int]:
    """Return the sorted places of `limit` of the ids."""
    order = sorted(range(len(ids)), key=lambda i: hashlib.sha256(f"{seed}:{ids[i]}".encode()).digest())
    return sorted(order[:limit])


def image_loader(
    source: Source, view: View, scored: Subject, here: World, settings: Any, *, seed: int = 0, num_noise: int = 0
) -> Loader:
    """Return the loader of a sweep over all images."""
    channels_of(source, len(scored.mean))
    return Loader(
        source,
        view,
        batch_size=len(source),
        micro_batch=max(1, PATCHES_PER_PASS // scored.num_patches),
        mean=scored.mean,
        std=scored.std,
        seed=seed,
        num_noise=num_noise,
        workers=number_of_workers(settings.workers, len(source), scored.size),
        device=here.device,
        rank=here.rank,
        world=here.size,
    )


@torch.no_grad()
def predictions(
    loader: Loader, scored: Subject, here: World, predict: Callable[[Batch], Tensor], title: str, columns: int = 1
) -> Tensor:
    """Return what `predict` says of each image, (n, 1 + V) long: index of the image, then V outputs.

    Each image once at any number of processes, in order; one that stood in for an unreadable one counts once.

    Args:
        predict: a batch on the device -> (B, V), or (B,) for V 1.
        title: of the progress bar.
        columns: V.
    """
    rows = [torch.zeros(0, 1 + columns, dtype=torch.long)]  # a process may have no image
    for batch in tqdm(loader.sweep(), title, unit="batch", disable=not sys.stderr.isatty(), leave=False):
        with autocast(scored.precision, here.device):
            said = predict(batch)
        rows.append(torch.cat([batch["ids"][:, None], said.reshape(len(said), -1)], 1).long().cpu())
    table = here.gather(torch.cat(rows))
    return table[first_of_each(table[:, 0])]


def plain(scored: Subject) -> Callable[[Batch], Tensor]:
    """Return the prediction of the classifier itself."""
    return lambda batch: scored.model(batch["images"]).float().argmax(1)


def accuracy(table: Tensor, accepted: Sequence[Sequence[int]]) -> list[float]:
    """Return, for each column of predictions, the share of images of which an accepted output was said.

    Args:
        table: of `predictions`.
        accepted: by image, the outputs that are right.
    """
    right = torch.tensor([[value in accepted[row[0]] for value in row[1:]] for row in table.tolist()])
    return right.double().mean(0).tolist()


def begin(settings: Settings, run: Run, here: World, source: Source, scored: Subject) -> None:
    """Write config.yaml, or see that the images are those that the folder began with."""
    fingerprint = source.fingerprint()
    same_data(run, len(source), fingerprint)
    here.barrier()
    if here.is_main and run.resolved is None:
        resolved = Resolved(
            images=len(source), fingerprint=fingerprint, classes=scored.classes or source.classes,
            precision=scored.precision, mean=scored.mean, std=scored.std,
        )  # fmt: skip
        describe(run, settings, resolved)
