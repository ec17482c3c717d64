"""Pre-train a masked autoencoder: images -> run folder with weights, curves and pictures (arXiv 2111.06377)."""

import logging
import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from maekit.data.augment import EvalView, default_crop_pct
from maekit.data.loader import Batch, Loader
from maekit.data.masks import Masks, open_masks
from maekit.data.sources import Source
from maekit.errors import MaekitError
from maekit.interchange.targets import Target, load_target
from maekit.interchange.weights import as_model, metadata, read_weights, save_encoder
from maekit.model.mae import MaskedAutoencoder, create_model
from maekit.model.masking import check_masking, ratio_of_step
from maekit.model.targets import MADE, Components, Tokens
from maekit.model.variant import Variant
from maekit.report.pretraining import pretrain_report
from maekit.seeds import seed_all
from maekit.settings import Pretrain
from maekit.tasks import Result
from maekit.tasks.run_folder import Run, carry_out, finish, open_run, stopped, typed
from maekit.tasks.training import (
    Statistics,
    Training,
    came_out,
    channels_of,
    default_out,
    narrowed,
    prepare,
    published,
    say_what_runs,
    seen_as,
    spread,
    train_loader,
    unlabelled,
)
from maekit.train.checkpoint import newest
from maekit.train.device import World, world
from maekit.train.loop import Plan
from maekit.train.memory import Passes
from maekit.train.optim import adamw, pretrain_groups
from maekit.train.schedule import schedule

log = logging.getLogger("maekit")


def pretrain(settings: Pretrain | dict[str, Any], dataset: Any = None) -> Result:
    """Pre-train, or go on with a run that was stopped.

    Args:
        settings: as on the command line; a dictionary is checked like a config file.
        dataset: in place of ``settings.data``: a `Source` or any map-style dataset of images or (image, label).

    Returns:
        run, steps, loss, images_per_second, state_sha256; exit code 75 if stopped before the end.

    Raises:
        MaekitError: for everything a user can cause; codes E-CONFIG-, E-DATA-, E-NUM-, E-CKPT-, E-ENV-, E-STOP-.
    """
    settings = typed(Pretrain, settings)
    if (result := spread(settings, pretrain, dataset)) is not None:
        return result
    with world(settings.device, settings.peer_timeout) as here:
        run = open_run(settings.out or default_out("pretrain", settings.data), "pretrain", settings)
        return carry_out(run, lambda: _train(settings, unlabelled(settings, dataset, settings.channels), run, here))


def _train(settings: Pretrain, source: Source, run: Run, here: World) -> Result:
    ready = training(settings, source, run, here)
    model = ready.model
    assert isinstance(model, MaskedAutoencoder)
    outcome = ready.fit(run, here)

    metrics = came_out(run, outcome)
    if outcome.stopped:
        return stopped(metrics)
    if here.is_main:
        save_encoder(model, run.path / "encoder.safetensors")
        labelled = source.labels is not None and len(source.classes or []) > 1
        pretrain_report(run.path, model.eval(), some_images(source, model), settings.seed, labelled=labelled)
        if settings.ema:
            _save_average(model, run)
        finish(run, metrics)
    here.barrier()
    return Result(metrics, f"{run.path}: {outcome.step} steps, loss {outcome.loss:.4f}; look at {run.path}/report.html")


def training(settings: Pretrain, source: Source, run: Run, here: World) -> Training:
    """Build all that the training runs with; a new run's config.yaml is written."""
    channels = channels_of(source, settings.channels)
    goal = _goal(settings)
    model = new_model(settings, channels, goal)
    _check(settings, model)  # refused before anything is read or written
    masks = _masks(settings, source, model)
    view = seen_as(settings, settings.img_size, channels, settings.resize_on)
    statistics = published(settings.stats, channels)
    if goal is not None and goal.kind == "pca":
        statistics = _same_images(goal, source, statistics)
    if settings.init is not None:
        weights = read_weights(settings.init)
        start_from(model, as_model(weights), with_decoder=weights.kind == "mae")
    model.train()
    if settings.checkpointing:
        model.set_checkpointing(settings.checkpointing_encoder, settings.checkpointing_decoder)
    resolved = prepare(
        run, settings, settings, source, here, model, statistics=statistics, masks=masks, repeats=settings.repeats,
        passes=passes_of(model, settings.mask_ratio, masks is not None),
    )  # fmt: skip
    model.to(here.device)

    loader = train_loader(
        source, view, settings, resolved, here, run,
        size=settings.img_size, seed=settings.seed, reading=settings, num_noise=model.num_patches, masks=masks,
        repeats=settings.repeats,
    )  # fmt: skip
    plan = Plan(
        schedule(settings, loader.steps_per_epoch, loader.batch_size),
        settings.model_copy(update={"precision": resolved.precision}),
        settings.seed,
        metadata(model),
        keep_casts=not settings.checkpointing,
        identity=resolved.identity,
        narrowed=narrowed(run, settings, resolved),
    )
    say_what_runs("pretrain", model, source, plan.schedule.total, here, resolved)

    def step(module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(module, MaskedAutoencoder)
        ratio = settings.mask_ratio
        if settings.mask_ratio_max is not None:
            ratio = ratio_of_step(ratio, settings.mask_ratio_max, settings.seed, int(batch["step"]))
        return {"loss": module.loss(batch["images"], batch["noise"], ratio, batch.get("scores"))}

    groups = pretrain_groups(model, settings.weight_decay)
    optimizer = adamw(groups, betas=settings.betas, lr=plan.schedule.peak)
    return Training(model, step, loader, optimizer, plan)


def _save_average(model: MaskedAutoencoder, run: Run) -> None:
    """Write ``encoder-ema.safetensors`` beside the encoder of the last step."""
    saved = newest(run.path / "checkpoints")
    assert saved is not None
    model.load_state_dict(saved.tensors["ema"], strict=False)  # all but the fixed tables
    save_encoder(model, run.path / "encoder-ema.safetensors")


def new_model(settings: Pretrain, channels: int, goal: Target | None = None) -> MaskedAutoencoder:
    """Build the model of these settings; its initial weights are a function of the seed.

    Args:
        channels: per image.
        goal: what ``target_from`` holds.
    """
    seed_all(settings.seed)
    model = create_model(
        settings.model,
        img_size=settings.img_size,
        patch_size=settings.patch_size,
        in_chans=channels,
        embed_dim=settings.embed_dim,
        depth=settings.depth,
        num_heads=settings.num_heads,
        drop_path=settings.drop_path,
        decoder_dim=settings.decoder_dim,
        decoder_depth=settings.decoder_depth,
        decoder_heads=settings.decoder_heads,
        target=settings.target,
        target_spec=None if goal is None else goal.spec,
        variant=Variant(**{field.name: getattr(settings, field.name) for field in fields(Variant)}),
    )
    if goal is not None:
        assert isinstance(model.objective, Components | Tokens)
        model.objective.made.load_state_dict(goal.tensors)
    return model


def _masks(settings: Pretrain, source: Source, model: MaskedAutoencoder) -> Masks | None:
    """Open the masks that were given.

    Raises:
        MaekitError: E-DATA-MASK; E-CONFIG-MASK for a mask of each whole image with views that show parts of it.
    """
    if settings.mask_from is None:
        return None
    masks = open_masks(settings.mask_from, source, model.grid)
    whole = settings.crop == "centre" and default_crop_pct(settings.img_size) == 1.0
    whole = whole or (settings.crop == "random" and settings.crop_scale == (1.0, 1.0))
    if masks.per_image and (settings.flip or not whole):
        raise MaekitError(
            "E-CONFIG-MASK", f"masks in {settings.mask_from}, one for each image", found="views of parts of the image",
            expected="views of the whole image, as the masks are", hint="--crop-scale 1 1 --no-flip",
        )  # fmt: skip
    return masks


def _goal(settings: Pretrain) -> Target | None:
    """Read what is to be predicted, where it was made beforehand.

    Raises:
        MaekitError: E-CONFIG-TARGET for a target without ``target_from`` or another one; as `load_target`.
    """
    made = settings.target in MADE
    if made != (settings.target_from is not None):
        raise MaekitError(
            "E-CONFIG-TARGET", f"target {settings.target} {'without' if made else 'with'} target_from",
            expected="target_from for targets pca and token, and for no other",
            hint=f"maekit {'pca' if settings.target == 'pca' else 'tokenizer'} makes one" if made else "--target pca",
        )  # fmt: skip
    if settings.target_from is None:
        return None
    goal = load_target(settings.target_from)
    if goal.name != settings.target:
        raise MaekitError(
            "E-CONFIG-TARGET", f"{settings.target_from} for target {settings.target}", found=f"one for {goal.name}",
            hint=f"--target {goal.name}",
        )  # fmt: skip
    return goal


def _same_images(goal: Target, source: Source, wanted: Statistics | None) -> Statistics:
    """Return mean and deviation that a PCA's pixels were normalised with; refuse one of other images.

    A tokenizer is not asked: it looks at values in 0..1, and may have been trained on any images.

    Raises:
        MaekitError: E-CONFIG-TARGET.
    """
    if goal.fingerprint != source.fingerprint():
        found, expected = "components of other images", f"those of {source.name}"
    elif wanted not in (None, (goal.mean, goal.std)):
        found, expected = "pixels normalised otherwise", "mean and deviation of this run"
    else:
        return goal.mean, goal.std
    raise MaekitError(
        "E-CONFIG-TARGET", f"{goal.path}", found=found, expected=expected,
        hint="maekit pca with the images and settings of this run",
    )  # fmt: skip


def start_from(model: MaskedAutoencoder, old: MaskedAutoencoder, *, with_decoder: bool) -> None:
    """Take weights over, encoder and decoder; the fixed position tables stay those of the new image size.

    Args:
        with_decoder: False: the decoder of `old` was not in its file, and that of `model` stays as it was drawn.

    Raises:
        MaekitError: E-CKPT-MODEL if a tensor does not fit.
    """
    untold = {"num_heads": (model.num_heads, old.num_heads)}  # by shapes
    if with_decoder:
        untold |= {name: (model.spec[name], old.spec[name]) for name in ("decoder_heads", "target")}
    for name, (now, before) in untold.items():
        if now != before:
            raise MaekitError(
                "E-CKPT-MODEL", "setting init", found=f"weights of {name} {before}", expected=f"{name} {now}",
                hint=f"--{name.replace('_', '-')} {before}",
            )  # fmt: skip
    mine, theirs = model.state_dict(), old.state_dict()
    made = [name for name in mine if name.startswith("objective.")]
    if with_decoder and not all(name in theirs and torch.equal(mine[name], theirs[name]) for name in made):
        raise MaekitError(
            "E-CKPT-MODEL", "setting init", found=f"a decoder of another {model.target} target",
            expected="one of the same components or codes",
            hint="--target-from of the run that the weights are from, or --init RUN/encoder.safetensors",
        )  # fmt: skip
    # fixed tables stay; of learned ones those of the same grid are taken over
    fixed = model.variant.positions == "sincos"
    learned = [name for name in mine if not (fixed and name.endswith("pos_embed"))]
    learned = [name for name in learned if name.startswith(("encoder.", "decoder.", "mask_token"))]
    learned = [name for name in learned if with_decoder or name.startswith("encoder.")]
    wrong = [name for name in learned if name not in theirs or theirs[name].shape != mine[name].shape]
    if wrong:
        found = f"{wrong[0]} missing or of another shape" + (f", and {len(wrong) - 1} more" if wrong[1:] else "")
        raise MaekitError(
            "E-CKPT-MODEL",
            "setting init",
            found=found,
            expected="weights of this architecture",
            hint="the model settings of the run that they are from: maekit config show RUN",
        )
    model.load_state_dict({name: theirs[name] for name in learned}, strict=False)


def some_images(source: Source, model: MaskedAutoencoder, count: int = 8) -> Tensor:
    """Return up to `count` readable images, evenly spaced over the source, (n, C, H, W) as evaluation sees them."""
    every = max(1, len(source) // count)
    chosen = source.subset(range(0, len(source), every)[:count])
    view = EvalView(model.img_size, default_crop_pct(model.img_size))
    ones = (1.0,) * len(model.mean)
    loader = Loader(chosen, view, batch_size=count, micro_batch=count, mean=(0.0,) * len(ones), std=ones)
    return next(loader.sweep())["images"]


def check_checkpointing(encoder: int, decoder: int) -> None:
    """Refuse checkpointing of nothing.

    Raises:
        MaekitError: E-CONFIG-IDLE.
    """
    if encoder == decoder == 0:
        raise MaekitError(
            "E-CONFIG-IDLE", "settings checkpointing_encoder and checkpointing_decoder", found="0 blocks of both",
            expected="blocks of one of them", hint="leave one of them out",
        )  # fmt: skip


def passes_of(model: MaskedAutoencoder, mask_ratio: float, scored: bool = False) -> Passes:
    """Return passes of a model in training over made-up images, to count what they keep.

    Args:
        scored: masks come with the images.
    """
    shape = (model.encoder.in_chans, *model.img_size)

    def loss(images: int) -> Tensor:
        noise, scores = (torch.rand(images, model.num_patches) for _ in range(2))
        return model.loss(torch.empty(images, *shape), noise, mask_ratio, scores if scored else None)

    def keeping(*blocks: int) -> Callable[[int], Tensor]:
        def kept(images: int) -> Tensor:
            model.set_checkpointing(*blocks)
            try:
                return loss(images)
            finally:
                model.set_checkpointing(encoder, decoder)

        return kept

    encoder, decoder = model.checkpointing
    depths = len(model.encoder.blocks), model.decoder.depth
    parts = ((encoder, depths[0], keeping(0, decoder)), (decoder, depths[1], keeping(encoder, 0)))
    again = [(min(1.0, blocks / depth), kept) for blocks, depth, kept in parts if blocks and depth]
    return Passes(model, loss, model.num_patches, math.prod(shape), again)


def _check(settings: Pretrain, model: MaskedAutoencoder) -> None:
    """Refuse settings that do not fit together, before anything is read or written.

    Raises:
        MaekitError: E-CONFIG-BATCH, E-CONFIG-MASK, E-CONFIG-DECODER, E-CONFIG-IDLE.
    """
    anew = (settings.checkpointing_encoder, settings.checkpointing_decoder)
    if anew != (1, 1) and not settings.checkpointing:
        raise MaekitError(
            "E-CONFIG-IDLE", "settings checkpointing_encoder and checkpointing_decoder",
            found=f"{anew[0]} and {anew[1]} without checkpointing", expected="them with it", hint="--checkpointing",
        )  # fmt: skip
    check_checkpointing(*anew)
    if settings.batch_size % settings.repeats:
        raise MaekitError(
            "E-CONFIG-BATCH", "settings batch_size and repeats", found=f"{settings.batch_size} and {settings.repeats}",
            expected="a batch divisible by repeats: it holds all samples of an image",
            hint=f"--batch-size {-(-settings.batch_size // settings.repeats) * settings.repeats}",
        )  # fmt: skip
    if settings.repeats > 1 and settings.epochs is not None:
        log.info(
            "repeats %d: an epoch makes so many samples of every image, %g epochs are as long as %g without",
            settings.repeats, settings.epochs, settings.epochs * settings.repeats,
        )  # fmt: skip
    kind, low, high = settings.mask_kind, settings.mask_ratio, settings.mask_ratio_max
    if kind != "none":
        for ratio in (low,) if high is None else (low, high):
            check_masking(kind, model.grid, ratio, settings.mask_unit)
        model.check_decode_ratio(low)
    wrong = [
        (
            (kind == "given") != (settings.mask_from is not None),
            f"mask_kind {kind} {'without' if kind == 'given' else 'with'} mask_from",
            "mask_from for mask_kind given, and for no other",
            "--mask-from FILE.npy or FOLDER" if kind == "given" else "--mask-kind given",
        ),
        (
            high is not None and (high < low or kind in ("none", "grid")),
            f"mask_ratio_max {high} with mask_ratio {low}, mask_kind {kind}",
            "a larger ratio than mask_ratio, and masks that any ratio can have",
            "leave mask_ratio_max out",
        ),
        (
            high is not None and settings.compile,
            "mask_ratio_max with compile",
            "one number of visible patches: every other one would be compiled anew",
            "--no-compile",
        ),
    ]
    for is_wrong, found, expected, hint in wrong:
        if is_wrong:
            raise MaekitError("E-CONFIG-MASK", "masks", found=found, expected=expected, hint=hint)
