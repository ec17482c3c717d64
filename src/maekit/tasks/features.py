"""Frozen features of a labelled data set: what probe, knn and quickstart have in common, and embed in part."""

import logging
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from maekit.data.augment import EvalView, default_crop_pct
from maekit.data.loader import Loader
from maekit.data.sources import Source, label_subset, open_source
from maekit.errors import MaekitError
from maekit.interchange.weights import load_model
from maekit.model.mae import MaskedAutoencoder, check_pool
from maekit.seeds import seed_all
from maekit.tasks.feature_cache import FeatureCache, open_cache
from maekit.tasks.streamed import first_of_each
from maekit.tasks.training import PATCHES_PER_PASS, channels_of, number_of_workers
from maekit.train.device import World

log = logging.getLogger("maekit")


Wanted = tuple[int, str]
"""Block, counted from 1, and pooling."""


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
        MaekitError: as `whole_splits`; E-USAGE-LABELS.
    """
    train, val = whole_splits(settings)
    return train.subset(label_subset(train, settings.labels, settings.label_seed)), val


def whole_splits(settings: Any) -> tuple[Source, Source]:
    """Return all of the training part and the part to score on.

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
    if val.labels is None:
        raise MaekitError(
            "E-DATA-LABELS",
            f"{val.name}, the images to score on, have no labels",
            expected="the classes of the training images: class folders, a list with labels or a parquet label column",
            hint="maekit data PATH",
        )
    return train, val


def load_encoder(settings: Any, world: World) -> MaskedAutoencoder:
    """Load the model a verb was pointed at, in eval mode on the device; ``--random-init``: fresh weights."""
    if settings.run is None:
        raise MaekitError(
            "E-USAGE-RUN", "no weights named", hint="a run folder or a .safetensors file as first argument"
        )
    random_init = getattr(settings, "random_init", False)
    seed_all(settings.seed)
    return load_model(settings.run, random_init=random_init).to(world.device).eval()


def extract(
    model: MaskedAutoencoder,
    source: Source,
    world: World,
    *,
    pool: str,
    workers: int | str,
    title: str,
    cache: FeatureCache | None = None,
) -> Features:
    """Run the whole encoder over every image once, as evaluation sees it.

    Args:
        pool: "mean" | "cls" | "tokens" (then values are (n, prefix + N, D)).

    Raises:
        MaekitError: as `extract_layers`.
    """
    last = (len(model.encoder.blocks), pool)
    return extract_layers(model, source, world, [last], workers=workers, title=title, cache=cache)[last]


def extract_layers(
    model: MaskedAutoencoder,
    source: Source,
    world: World,
    wanted: list[Wanted],
    *,
    workers: int | str,
    title: str,
    cache: FeatureCache | None = None,
) -> dict[Wanted, Features]:
    """Return features of several blocks and poolings: those that are kept, the others from one pass of the encoder.

    Args:
        wanted: block, counted from 1, and "mean" | "cls" | "tokens"; the final norm stands after every block.
        cache: where they are kept; whole sets of tokens never are.

    Raises:
        MaekitError: E-CONFIG-POOL, E-CONFIG-CHANNELS, E-DATA-BAD, E-NUM-FEATURES for NaN and infinity.
    """
    for _, pool in wanted:
        check_pool(model.encoder, pool, also=("tokens",))
    key = cache.key(model, source, world.device.type) if cache is not None else None
    kept: dict[Wanted, Features] = {}
    if cache is not None and key is not None:
        read = {one: cache.read(key, *one) for one in wanted if one[1] != "tokens"}
        kept = {one: _labelled(source, *entry) for one, entry in read.items() if entry is not None}
    missing = [one for one in wanted if one not in kept]
    if not world.any(bool(missing)):
        log.info("%s: kept in %s", title, cache.folder if cache is not None else "")
        return kept
    if world.size > 1:  # all take part, whatever each of them could read
        missing = list(wanted)
    found = _run(model, source, world, missing, workers, title)
    for (layer, pool), features in found.items():
        check_features(features.values, source.name, layer)
        if cache is not None and key is not None and world.is_main and pool != "tokens":
            cache.write(key, layer, pool, features.values, features.index)
    return {one: found[one] if one in found else kept[one] for one in wanted}


def check_features(values: Tensor, name: str, layer: int) -> None:
    """Refuse features that are no numbers.

    Raises:
        MaekitError: E-NUM-FEATURES.
    """
    if torch.isfinite(values).all():
        return
    wrong = int((~torch.isfinite(values.flatten(1)).all(1)).sum())
    raise MaekitError(
        "E-NUM-FEATURES",
        f"features of {name} after block {layer}",
        found=f"NaN or infinity for {wrong} of {len(values)} images",
        expected="numbers",
        hint="an earlier checkpoint, or maekit data PATH to look at the images",
    )


def encoder_loader(model: MaskedAutoencoder, source: Source, world: World, workers: int | str) -> Loader:
    """Return the loader of all images as evaluation shows them to an encoder.

    Raises:
        MaekitError: E-CONFIG-CHANNELS for images of another kind, said at once, not one by one.
    """
    channels_of(source, len(model.mean))
    return Loader(
        source,
        EvalView(model.img_size, default_crop_pct(model.img_size)),
        batch_size=len(source),
        micro_batch=max(1, PATCHES_PER_PASS // model.num_patches),
        mean=model.mean,
        std=model.std,
        workers=number_of_workers(workers, len(source), model.img_size),
        device=world.device,
        rank=world.rank,
        world=world.size,
    )


@torch.no_grad()
def _run(
    model: MaskedAutoencoder, source: Source, world: World, wanted: list[Wanted], workers: int | str, title: str
) -> dict[Wanted, Features]:
    """Pass every image through the encoder once."""
    loader = encoder_loader(model, source, world, workers)
    width, tokens = model.encoder.embed_dim, model.encoder.num_prefix_tokens + model.num_patches
    # a process may have no image
    values = {one: [torch.zeros((0, tokens, width) if one[1] == "tokens" else (0, width))] for one in wanted}
    index = [torch.zeros(0, dtype=torch.long)]
    for batch in tqdm(loader.sweep(), title, unit="batch", disable=not sys.stderr.isatty(), leave=False):
        for one, features in zip(wanted, model.layer_features(batch["images"], wanted), strict=True):
            values[one].append(features.float().cpu())
        index.append(batch["ids"].cpu())
    read = world.gather(torch.cat(index))
    return {one: _labelled(source, *_each_once(world.gather(torch.cat(values.pop(one))), read)) for one in wanted}


def _each_once(values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Put the rows into the order of the source; an image that stood in for an unreadable one counts once."""
    chosen = first_of_each(index)
    return values[chosen], index[chosen]


def _labelled(source: Source, values: Tensor, index: Tensor) -> Features:
    if source.labels is None:
        return Features(values, torch.full_like(index, -1), index)
    return Features(values, torch.tensor(np.asarray(source.labels), dtype=torch.long)[index], index)


def rows_of(features: Features, images: list[int]) -> Features:
    """Return the features of these images of the source, but those that could not be read."""
    chosen = torch.isin(features.index, torch.tensor(images, dtype=torch.long))
    return Features(features.values[chosen], features.labels[chosen], features.index[chosen])


def extract_both(
    model: MaskedAutoencoder, train: Source, val: Source, world: World, settings: Any
) -> tuple[Features, Features]:
    """Run the encoder over the labelled images and those to score on, or take what is kept of them."""
    more: dict[str, Any] = {
        "pool": settings.pool or "mean",
        "workers": settings.workers,
        "cache": open_cache(settings),
    }
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
    values, index = (
        torch.cat([batch[name].flatten(1 if name == "images" else 0) for batch in batches])
        for name in ("images", "ids")
    )
    return _labelled(source, *_each_once(values, index))
