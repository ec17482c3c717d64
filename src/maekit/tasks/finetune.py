"""Train encoder and head on images with classes, tags or numbers, from pre-trained or random weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maekit.data.augment import EvalView, FinetuneView, default_crop_pct
from maekit.data.sources import Source, hold_out
from maekit.errors import MaekitError
from maekit.interchange.weights import as_model, metadata, read_weights, without_head
from maekit.model.heads import ExactLinear, classifier, freeze_below
from maekit.model.mae import MaskedAutoencoder, at_size, create_model
from maekit.report.classification import Scored
from maekit.seeds import seed_all
from maekit.settings import Finetune
from maekit.tasks import Result
from maekit.tasks.eval_only import evaluate_only, refuse_training
from maekit.tasks.goals import Classes, Goal, goal_of, splits_of
from maekit.tasks.predictions import Columns, Kept, Truth
from maekit.tasks.run_folder import Run, carry_out, finish, open_run, stopped, typed
from maekit.tasks.scoring import final_scores
from maekit.tasks.training import (
    Statistics,
    Training,
    came_out,
    channels_of,
    default_out,
    narrowed,
    prepare,
    say_what_runs,
    spread,
    train_loader,
)
from maekit.train.device import World, world
from maekit.train.loop import Plan
from maekit.train.memory import Passes
from maekit.train.optim import adamw, finetune_groups
from maekit.train.schedule import schedule


def finetune(settings: Finetune | dict[str, Any], splits: tuple[Source, Source] | None = None) -> Result:
    """Fine-tune, or go on with a run that was stopped.

    Args:
        settings: as on the command line; a dictionary is checked like a config file.
        splits: training part and part to score on, in place of ``settings.data``.

    Returns:
        run, steps, loss, images_per_second, state_sha256; then, on the images to score on, each seen once, of the epoch
        that score_of names (with ``--ema`` also ema_top1 ... of the average): top1, top5, macro_f1, balanced_accuracy,
        ece and val_loss; of tags map, macro_auroc, micro_f1, macro_f1, exact_match and val_loss; of numbers r2,
        pearson, spearman, val_loss and, for each, targets; exit code 75 if stopped before the end. ``--eval-only``: as
        `maekit.tasks.eval_only.evaluate_only`. Of classes the run folder gets predictions.parquet, of the weights that
        the report is about, with the columns of `maekit.tasks.predictions`.

    Raises:
        MaekitError: for everything a user can cause.
    """
    settings = typed(Finetune, settings)
    refuse_idle(settings)
    if (result := spread(settings, finetune, splits)) is not None:
        return result
    if settings.eval_only:
        return evaluate_only(settings, None if splits is None else splits[1])
    with world(settings.device, settings.peer_timeout) as here:
        run = open_run(settings.out or default_out("finetune", settings.data), "finetune", settings)
        return carry_out(run, lambda: _train(settings, Parts.of(settings, *(splits or splits_of(settings))), run, here))


@dataclass(frozen=True)
class Parts:
    """Images by what they are for: `fit` is trained on, `held` chooses the epoch if one is chosen, `val` is scored."""

    fit: Source
    held: Source | None
    val: Source

    @property
    def beside(self) -> dict[str, Source]:
        """Those that are not trained on, by what they are for."""
        return {"val": self.val} | ({"held": self.held} if self.held else {})

    @staticmethod
    def of(settings: Finetune, train: Source, val: Source) -> "Parts":
        """Hold a fifth of the training images out where they choose the epoch.

        Raises:
            MaekitError: E-DATA-LABELS if no class has an image to spare.
        """
        if settings.select == "last":
            return Parts(train, None, val)
        if len(set(train.labels or [])) == len(train):
            raise MaekitError(
                "E-DATA-LABELS", f"{train.name}: one training image per class", expected="two or more of some",
                found="none that can be held out to choose the epoch", hint="--select last",
            )  # fmt: skip
        return Parts(*hold_out(train), val)


def _train(settings: Finetune, parts: Parts, run: Run, here: World) -> Result:
    goal = goal_of(settings, parts.fit)
    origin, statistics = start_of(settings, parts.fit)
    score = partial(goal.scorer, size=origin.img_size, here=here, workers=settings.workers, crop_pct=settings.crop_pct)
    score(parts.val, mean=origin.mean, std=origin.std, tta=settings.tta)  # refused before anything is written
    ready = training(settings, parts, goal, origin, statistics, run, here)
    model, timing = ready.model, ready.plan.schedule
    assert isinstance(model, VisionTransformer)
    score = partial(score, mean=origin.mean, std=origin.std, precision=ready.plan.settings.precision)
    outcome = ready.fit(run, here, score(parts.held, name="held") if parts.held else score(parts.val))
    if outcome.stopped:
        return stopped(came_out(run, outcome))
    kept = Kept(Columns.of(model.num_classes, None)) if isinstance(goal, Classes) else None
    found = final_scores(model, score(parts.val, tta=settings.tta), run.path, settings, timing, kept)
    if kept is not None:
        kept.write(run.path, Truth.of(parts.val, goal.names, model.num_classes), here)
    metrics = came_out(run, outcome) | _scored(found, goal, model, parts)
    if here.is_main:
        shown = EvalView(origin.img_size, settings.crop_pct or default_crop_pct(origin.img_size))
        goal.report(run.path, found, parts.val, model, shown, origin.mean)  # type: ignore[arg-type]
        finish(run, metrics)
    here.barrier()
    start = "random weights" if settings.from_scratch else str(settings.run)
    return Result(
        metrics,
        f"{run.path}: {goal.told(metrics)} after {metrics['score_of']}, from {start}; "
        f"{len(parts.fit)} labels, scored on {len(parts.val)} held-out images; look at {run.path}/report.html",
    )


def training(
    settings: Finetune, parts: Parts, goal: Goal, origin: MaskedAutoencoder, statistics: Statistics | None, run: Run,
    here: World,
) -> Training:  # fmt: skip
    """Build all that the training runs with; a new run's config.yaml is written, `origin` given the statistics."""
    train = parts.fit
    view = FinetuneView(
        origin.img_size,
        settings.crop_scale,
        settings.flip,
        settings.auto_augment,
        (0,) * len(origin.mean),
        settings.color_jitter,
    )
    model = _classifier(settings, origin, len(goal.names))
    channels_of(train, len(origin.mean))

    def made_up(images: int) -> Tensor:
        return model(torch.empty(images, len(origin.mean), *origin.img_size)).sum()

    resolved = prepare(
        run, settings, settings, train, here, origin, statistics=statistics, classes=goal.names, beside=parts.beside,
        passes=Passes(model, made_up, origin.num_patches, origin.encoder.in_chans * math.prod(origin.img_size)),
    )  # fmt: skip
    model.to(here.device)
    view = replace(view, fill=tuple(round(255 * value) for value in resolved.mean))
    loader = train_loader(
        goal.prepared(train), view, settings, resolved, here, run,
        size=origin.img_size, seed=settings.seed, reading=settings,
    )  # fmt: skip
    timing = schedule(settings, loader.steps_per_epoch, loader.batch_size)
    every = settings.eval_every * loader.steps_per_epoch if settings.eval_every else max(1, timing.total // 10)
    loop = settings.model_copy(update={"precision": resolved.precision})
    facts = metadata(origin, classes=goal.names, pool=settings.pool, **goal.facts)
    best = f"held/{goal.best}" if parts.held else ""
    plan = Plan(
        timing, loop, settings.seed, facts, eval_every=every, keep_best=best, identity=resolved.identity,
        narrowed=narrowed(run, settings, resolved),
    )  # fmt: skip
    say_what_runs("finetune", model, train, timing.total, here, resolved)
    groups = finetune_groups(model, settings.weight_decay, settings.layer_decay)
    optimizer = adamw(groups, betas=settings.betas, lr=timing.peak)
    return Training(model, goal.step(settings, here.device), loader, optimizer, plan)


def _classifier(settings: Finetune, origin: MaskedAutoencoder, num_classes: int) -> VisionTransformer:
    """Build the classifier in train mode, all but the last blocks frozen where that is asked for."""
    seed_all(settings.seed)
    model = classifier(
        origin, num_classes, pool=settings.pool, drop_path=settings.drop_path, pretrained=not settings.from_scratch
    )
    if settings.task == "regression":
        assert isinstance(model.head, nn.Linear)
        model.head = ExactLinear.instead_of(model.head)
    model.train()
    if settings.tune_blocks != "all":
        freeze_below(model, settings.tune_blocks)
    return model


def _scored(found: Sequence[Scored[Any]], goal: Goal, model: VisionTransformer, parts: Parts) -> dict[str, Any]:
    """Return the scores and how many images and parameters they rest on."""
    metrics: dict[str, Any] = {}
    for one in found:
        metrics |= one.metrics(goal.measured(one.judged))
    metrics["trained_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    metrics |= {"train_images": len(parts.fit), "val_images": len(parts.val)}
    return metrics | ({"held_images": len(parts.held)} if parts.held else {})


def start_of(settings: Finetune, train: Source) -> tuple[MaskedAutoencoder, Statistics | None]:
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
    reading = read_weights(settings.run)
    model = without_head(reading) if settings.new_head else as_model(reading)
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


def refuse_idle(settings: Finetune) -> None:
    """Refuse settings that would change nothing beside the others.

    Raises:
        MaekitError: E-CONFIG-IDLE.
    """
    if settings.eval_only:
        refuse_training(settings)
    numbers = "task regression" if settings.task == "regression" else ""
    idle = {
        "new_head": (settings.from_scratch or settings.run is None) and "random weights",
        "label_separator": settings.task != "multilabel" and f"task {settings.task}",
        "mixup_prob": not (settings.mixup or settings.cutmix) and "mixup and cutmix 0",
        "mixup_switch": not (settings.mixup and settings.cutmix) and "mixup or cutmix 0",
        "class_weights": numbers,
    }
    fields = type(settings).model_fields
    for name, reason in idle.items():
        value = getattr(settings, name)
        if reason and value != fields[name].default:
            raise _idle(name, value, reason, "a setting that does something", f"no --{name.replace('_', '-')}")
    for name in ("mixup", "cutmix", "label_smoothing"):
        if numbers and getattr(settings, name):
            off = "--mixup 0 --cutmix 0 --label-smoothing 0"
            raise _idle(name, getattr(settings, name), numbers, "0: numbers are not mixed or smoothed", off)
    losses = {"classes": ("cross-entropy", "bce"), "multilabel": ("bce",), "regression": ("mse", "huber")}[
        settings.task
    ]
    if settings.loss not in losses:
        raise _idle("loss", settings.loss, f"task {settings.task}", " or ".join(losses), f"--loss {losses[0]}")


def _idle(name: str, value: object, beside: str, expected: str, hint: str) -> MaekitError:
    return MaekitError(
        "E-CONFIG-IDLE", f"setting {name}", found=f"{value} beside {beside}", expected=expected, hint=hint
    )
