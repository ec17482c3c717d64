"""Frozen features of a labelled data set: what probe, knn, embed and quickstart have in common."""

import logging
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from maekit.data.augment import EvalView, default_crop_pct
from maekit.data.loader import Loader
from maekit.data.sources import Source, label_subset, open_source
from maekit.errors import MaekitError
from maekit.interchange.weights import load_model
from maekit.model.mae import MaskedAutoencoder
from maekit.seeds import seed_all
from maekit.tasks.training import PATCHES_PER_PASS, channels_of, number_of_workers
from maekit.train.device import World

log = logging.getLogger("maekit")


@dataclass(frozen=True)
class Features:
    """Features of one split, on the CPU.

    Attributes:
        values: (n, D) float32.
        labels: (n,), -1 where there is none.
        index: (n,) index of each image in the source that was really read.
    """

    values: Tensor
    labels: Tensor
    index: Tensor

    @property
    def labelled(self) -> tuple[Tensor, Tensor]:
        """Features and labels, as `maekit.scores` takes them."""
        return self.values, self.labels


def labelled_splits(settings: Any) -> tuple[Source, Source]:
    """Return the training part (cut down to ``--labels``) and the part to score on.

    Raises:
        MaekitError: E-USAGE-DATA without ``--data``, E-DATA-LABELS without labels, E-DATA-CLASSES.
    """
    if settings.data is None:
        raise MaekitError("E-USAGE-DATA", "no labelled images named", hint="--data FOLDER, or --data builtin:fashion")
    columns: dict[str, Any] = {"image_column": settings.image_column, "label_column": settings.label_column}
    train = open_source(settings.data, "train-or-all" if settings.val_data else "train", **columns)
    if train.labels is None:
        raise MaekitError(
            "E-DATA-LABELS",
            f"{settings.data} has no labels",
            found="images without class folders or a label column",
            expected="class folders, a list with labels or a parquet label column",
            hint="maekit data PATH",
        )
    if len(train.classes or []) < 2:
        raise MaekitError(
            "E-DATA-CLASSES",
            f"{settings.data} has one class only",
            found=", ".join(map(repr, train.classes or [])),
            expected="two or more: nothing to tell apart",
            hint="maekit data PATH",
        )
    val = open_source(
        settings.val_data or settings.data,
        "val-or-all" if settings.val_data else "val",
        classes=train.classes,
        **columns,
    )
    return train.subset(label_subset(train, settings.labels, settings.label_seed)), val


def load_encoder(settings: Any, world: World) -> MaskedAutoencoder:
    """Load the model a verb was pointed at, in eval mode on the device; ``--random-init``: fresh weights."""
    if settings.run is None:
        raise MaekitError(
            "E-USAGE-RUN", "no weights named", hint="a run folder or a .safetensors file as first argument"
        )
    random_init = getattr(settings, "random_init", False)
    seed_all(settings.seed)
    return load_model(settings.run, random_init=random_init).to(world.device).eval()


@torch.no_grad()
def extract(
    model: MaskedAutoencoder, source: Source, world: World, *, pool: str, workers: int | str, title: str
) -> Features:
    """Run the whole encoder over every image once, as evaluation sees it.

    Args:
        pool: "mean" | "cls" | "tokens" (then values are (n, prefix + N, D)).

    Raises:
        MaekitError: E-CONFIG-CHANNELS, E-DATA-BAD.
    """
    size = model.img_size
    channels_of(source, len(model.mean))  # images of another kind are said at once, not one by one
    loader = Loader(
        source,
        EvalView(size, default_crop_pct(size)),
        batch_size=len(source),
        micro_batch=max(1, PATCHES_PER_PASS // model.num_patches),
        mean=model.mean,
        std=model.std,
        workers=number_of_workers(workers, len(source), size),
        device=world.device,
        rank=world.rank,
        world=world.size,
    )
    width, tokens = model.encoder.embed_dim, model.encoder.num_prefix_tokens + model.num_patches
    none = torch.zeros(0, dtype=torch.long)  # a process may have no image
    values, labels, index = [torch.zeros((0, tokens, width) if pool == "tokens" else (0, width))], [none], [none]
    for batch in tqdm(loader.sweep(), title, unit="batch", disable=not sys.stderr.isatty(), leave=False):
        values.append(model.features(batch["images"], pool=pool).float().cpu())
        labels.append(batch["labels"].cpu())
        index.append(batch["ids"].cpu())
    return _each_once(Features(*(world.gather(torch.cat(parts)) for parts in (values, labels, index))))


def extract_both(
    model: MaskedAutoencoder, train: Source, val: Source, world: World, settings: Any
) -> tuple[Features, Features]:
    """Run the encoder over the labelled images and those to score on."""
    more: dict[str, Any] = {"pool": settings.pool or "mean", "workers": settings.workers}
    first = extract(model, train, world, title="features of train", **more)
    return first, extract(model, val, world, title="features of val", **more)


@torch.no_grad()
def pixels(source: Source, size: tuple[int, int], channels: int, *, workers: int | str) -> Features:
    """Return the images themselves as features, values 0..1: the baseline that needs no encoder."""
    loader = Loader(
        source,
        EvalView(size, default_crop_pct(size)),
        batch_size=len(source),
        micro_batch=256,
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        workers=number_of_workers(workers, len(source), size),
    )
    batches = list(loader.sweep())
    return _each_once(
        Features(
            torch.cat([batch["images"].flatten(1) for batch in batches]),
            torch.cat([batch["labels"] for batch in batches]),
            torch.cat([batch["ids"] for batch in batches]),
        )
    )


def _each_once(features: Features) -> Features:
    """Put the rows into the order of the source; an image that stood in for an unreadable one counts once."""
    rows = {image: row for row, image in enumerate(features.index.tolist())}
    chosen = torch.tensor([rows[image] for image in sorted(rows)])
    return Features(features.values[chosen], features.labels[chosen], features.index[chosen])
