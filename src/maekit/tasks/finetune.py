"""Train encoder and head on labelled images, from pre-trained or random weights under one recipe."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.nn import functional as F

from maekit.data.augment import EvalView, FinetuneView, default_crop_pct
from maekit.data.loader import Batch, Loader
from maekit.data.sources import Source
from maekit.errors import MaekitError
from maekit.interchange.weights import load_model, metadata
from maekit.model.heads import classifier
from maekit.model.mae import MaskedAutoencoder, at_size, create_model
from maekit.seeds import seed_all
from maekit.settings import Finetune
from maekit.tasks import Result
from maekit.tasks.features import labelled_splits
from maekit.tasks.run_folder import Run, carry_out, finish, open_run, stopped, typed
from maekit.tasks.training import (
    Statistics,
    channels_of,
    default_out,
    number_of_workers,
    prepare,
    say_what_runs,
    spread,
    train_loader,
)
from maekit.train.device import World, world
from maekit.train.loop import Evaluate, Plan, autocast, fit
from maekit.train.optim import adamw, finetune_groups
from maekit.train.schedule import schedule


def finetune(settings: Finetune | dict[str, Any], splits: tuple[Source, Source] | None = None) -> Result:
    """Fine-tune, or go on with a run that was stopped.

    Args:
        settings: as on the command line; a dictionary is checked like a config file.
        splits: training part and part to score on, in place of ``settings.data``.

    Returns:
        run, steps, loss, images_per_second, state_sha256 and top1 of the last epoch on the held-out images
        (and ema_top1 with ``--ema``); exit code 75 if stopped before the end.

    Raises:
        MaekitError: for everything a user can cause.
    """
    settings = typed(Finetune, settings)
    if (result := spread(settings, finetune, splits)) is not None:
        return result
    with world(settings.device) as here:
        run = open_run(settings.out or default_out("finetune", settings.data), "finetune", settings)
        return carry_out(run, lambda: _train(settings, *(splits or labelled_splits(settings)), run, here))


def _train(settings: Finetune, train: Source, val: Source, run: Run, here: World) -> Result:
    origin, statistics = _origin(settings, train)
    num_classes = len(train.classes or [])
    view = FinetuneView(
        origin.img_size, settings.crop_scale, settings.flip, settings.auto_augment, (0,) * len(origin.mean)
    )
    seed_all(settings.seed)
    model = classifier(
        origin, num_classes, pool=settings.pool, drop_path=settings.drop_path, pretrained=not settings.from_scratch
    )
    channels_of(train, len(origin.mean))
    resolved = prepare(run, settings, settings, train, here, origin, statistics=statistics, classes=train.classes)
    model.to(here.device).train()

    view = replace(view, fill=tuple(round(255 * value) for value in resolved.mean))
    loader = train_loader(
        train, view, settings, resolved, here, run,
        size=origin.img_size, seed=settings.seed, workers=settings.workers,
    )  # fmt: skip
    timing = schedule(settings, loader.steps_per_epoch, loader.batch_size)
    every = settings.eval_every * loader.steps_per_epoch if settings.eval_every else max(1, timing.total // 10)
    loop = settings.model_copy(update={"precision": resolved.precision})
    plan = Plan(
        timing, loop, settings.seed, metadata(origin, classes=train.classes, pool=settings.pool), eval_every=every
    )
    say_what_runs("finetune", model, train, timing.total, here, resolved)

    step = supervised_step(settings, num_classes, here.device)
    groups = finetune_groups(model, settings.weight_decay, settings.layer_decay)
    optimizer = adamw(groups, betas=settings.betas, lr=timing.peak)
    evaluate = scorer(
        val, origin.img_size, resolved.mean, resolved.std, here,
        workers=settings.workers, precision=resolved.precision, crop_pct=settings.crop_pct,
    )  # fmt: skip
    outcome = fit(model, step, loader, optimizer, plan, run=run.path, world=here, evaluate=evaluate)

    metrics: dict[str, Any] = {
        "run": str(run.path),
        "steps": outcome.step,
        "loss": outcome.loss,
        "images_per_second": round(outcome.images_per_second, 1),
        "state_sha256": outcome.state_sha256,
        **{name.replace("val/", ""): score for name, score in outcome.scores.items()},
        "train_images": len(train),
        "val_images": len(val),
    }
    if outcome.stopped:
        return stopped(metrics)
    if here.is_main:
        finish(run, metrics)
    start = "random weights" if settings.from_scratch else str(settings.run)
    return Result(
        metrics,
        f"{run.path}: top-1 {metrics['top1']:.4f} after the last epoch, from {start}; "
        f"{len(train)} labels, scored on {len(val)} held-out images",
    )


def _origin(settings: Finetune, train: Source) -> tuple[MaskedAutoencoder, Statistics | None]:
    """Return the model whose architecture and, unless from scratch, weights are taken, and its statistics.

    An image size other than the weights' resamples their positions (official interpolate_pos_embed).

    Raises:
        MaekitError: E-USAGE-RUN without a start, E-CONFIG-RUN for another architecture than the weights'.
    """
    if settings.run is None and not settings.from_scratch:
        raise MaekitError(
            "E-USAGE-RUN", "nothing to start from", hint="a run folder as first argument, or --from-scratch"
        )
    if settings.run is None:
        model = create_model(
            settings.model or "vit_base_patch16_224",
            img_size=settings.img_size or (224, 224),
            patch_size=settings.patch_size,
            in_chans=channels_of(train, settings.channels),
            embed_dim=settings.embed_dim,
            depth=settings.depth,
            num_heads=settings.num_heads,
        )
        return model, None
    model = load_model(settings.run)
    _same_architecture(settings, model)
    if settings.img_size is not None and settings.img_size != model.img_size:
        model = at_size(model, settings.img_size)
    return model, (model.mean, model.std)


def _same_architecture(settings: Finetune, model: MaskedAutoencoder) -> None:
    """Refuse settings of another architecture beside a RUN, which brings its own: nothing is accepted and ignored.

    Settings that are not given ask for nothing; those of a recipe for this very model agree with it.
    """
    encoder = model.encoder
    has = {
        "model": model.spec["name"],
        "channels": encoder.in_chans,
        "patch_size": model.patch,
        "embed_dim": encoder.embed_dim,
        "depth": len(encoder.blocks),
        "num_heads": model.num_heads,
    }
    for name, value in has.items():
        asked = getattr(settings, name)
        if asked not in (None, value):
            raise MaekitError(
                "E-CONFIG-RUN",
                f"setting {name}",
                found=asked,
                expected=f"{value}, as in {settings.run}",
                hint=f"no --{name.replace('_', '-')}",
            )


def supervised_step(settings: Finetune, num_classes: int, device: torch.device) -> Any:
    """Return the step function: mixup or cutmix, random erasing, label smoothing, cross-entropy (paper table 9).

    Mixup and erasing draw from the generators that the loop seeds with (seed, step, rank).
    """
    mixup = Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        label_smoothing=settings.label_smoothing,
        num_classes=num_classes,
    )
    mixes = settings.mixup > 0 or settings.cutmix > 0
    erase = (
        RandomErasing(settings.random_erasing, mode="pixel", device=str(device)) if settings.random_erasing else None
    )

    def step(module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        images, labels = batch["images"], batch["labels"]
        if erase is not None:
            images = erase(images)
        if mixes:
            # timm mixes a batch with its own reverse and wants an even number; twice the batch gives the same pairs
            count, times = len(images), 1 + len(images) % 2
            images, targets = mixup(images.repeat(times, 1, 1, 1), labels.repeat(times))
            return {"loss": F.cross_entropy(module(images[:count]), targets[:count])}
        return {"loss": F.cross_entropy(module(images), labels, label_smoothing=settings.label_smoothing)}

    return step


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
) -> Evaluate:
    """Return the evaluation of a classifier: top-1 over every held-out image exactly once, at any world size."""
    loader = Loader(
        val,
        EvalView(size, crop_pct or default_crop_pct(size)),
        batch_size=len(val),
        micro_batch=64,
        mean=mean,
        std=std,
        workers=number_of_workers(workers, len(val), size),
        device=here.device,
        rank=here.rank,
        world=here.size,
    )

    def evaluate(model: nn.Module) -> Iterator[tuple[str, float]]:
        rows = [torch.zeros(0, 3, dtype=torch.double)]  # id, right, loss; a process may have none
        for batch in loader.sweep():
            with autocast(precision, here.device):
                logits = model(batch["images"]).float()
            lost = F.cross_entropy(logits, batch["labels"], reduction="none")
            found = (batch["ids"], logits.argmax(1) == batch["labels"], lost)
            rows.append(torch.stack([column.cpu().double() for column in found], 1))
        table = here.gather(torch.cat(rows))
        # in order of the images, at any world size; one that stood in for an unreadable one counts once
        _, first = np.unique(table[:, 0].numpy(), return_index=True)
        _, right, lost = table[torch.from_numpy(first)].unbind(1)
        yield "val/top1", float(right.mean())
        yield "val/loss", float(lost.mean())

    return evaluate
