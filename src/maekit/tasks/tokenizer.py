"""Train a discrete tokenizer of patches: images -> run folder that ``pretrain --target token --target-from`` reads.

A small autoencoder with a codebook in the middle learns to give images back; afterwards the index of each patch's code
is what is predicted. It runs in the one loop, on crops as pre-training sees them; the codebook moves once after each
optimizer step, by what all passes of the step have used, and draws from generators that the loop has seeded with
(seed, step, ...). One process: the codebook's means are not exchanged.
"""

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from maekit.data.augment import EvalView, default_crop_pct
from maekit.data.loader import Batch, Loader
from maekit.data.sources import Source, hold_out, open_source, parts_of
from maekit.errors import MaekitError
from maekit.interchange.targets import FILE, header_of, save_target
from maekit.model.patches import patchify
from maekit.model.tokenizer import VQTokenizer
from maekit.report.tokenizer import Judged, flat_error, tokenizer_report
from maekit.report.views import psnr
from maekit.seeds import seed_all
from maekit.settings import Tokenizer
from maekit.tasks import Result
from maekit.tasks.run_folder import Resolved, Run, carry_out, finish, open_run, stopped, typed
from maekit.tasks.training import (
    Training,
    came_out,
    channels_of,
    default_out,
    narrowed,
    number_of_workers,
    patch_of,
    prepare,
    published,
    say_what_runs,
    seen_as,
    train_loader,
    unlabelled,
)
from maekit.train.device import World, world
from maekit.train.loop import Plan
from maekit.train.optim import adamw, pretrain_groups
from maekit.train.schedule import schedule

HELD = 2000
"""Most images to score on, evenly spaced."""
SCORES = 10
"""Times that a run is scored."""


def tokenizer(settings: Tokenizer | dict[str, Any], dataset: Any = None) -> Result:
    """Train a tokenizer, or go on with a run that was stopped.

    Args:
        settings: as on the command line; a dictionary is checked like a config file.
        dataset: in place of ``settings.data``: a `Source` or any map-style dataset of images or (image, label).

    Returns:
        run, target, steps, loss, images_per_second, state_sha256, vocabulary and, of held-out images, perplexity (codes
        in equal use that would be as hard to guess), usage (share of codes that occur), psnr of their reconstruction
        and psnr_flat, of patches that are given their mean colour; exit code 75 if stopped before the end.

    Raises:
        MaekitError: for everything a user can cause; codes E-CONFIG-, E-DATA-, E-NUM-, E-CKPT-, E-ENV-, E-STOP-.
    """
    settings = typed(Tokenizer, settings)
    _refuse(settings)
    with world(settings.device, settings.peer_timeout) as here:
        run = open_run(settings.out or default_out("tokenizer", settings.data), "tokenizer", settings)
        return carry_out(run, lambda: _train(settings, unlabelled(settings, dataset, settings.channels), run, here))


def _refuse(settings: Tokenizer) -> None:
    if settings.nproc > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise MaekitError(
            "E-CONFIG-NPROC", "maekit tokenizer", found="several processes", expected="one: the codebook is not shared",
            hint="--nproc 1, and no torchrun",
        )  # fmt: skip
    if settings.ema is not None:
        raise MaekitError(
            "E-CONFIG-IDLE", "setting ema", found=settings.ema, expected="none: the codes are running means already",
            hint="no --ema",
        )  # fmt: skip


def _train(settings: Tokenizer, source: Source, run: Run, here: World) -> Result:
    channels = channels_of(source, settings.channels)
    _, held = _parts(settings, source)
    ready, fingerprint = training(settings, source, run, here)
    model = ready.model
    assert isinstance(model, VQTokenizer)

    def evaluate(module: nn.Module) -> Iterator[tuple[str, float]]:
        assert isinstance(module, VQTokenizer)
        judged = _judge(module, _held_loader(settings, held, channels, here))
        yield from {
            "val/psnr": psnr(judged.mse), "val/perplexity": judged.perplexity, "val/usage": judged.usage
        }.items()  # fmt: skip

    outcome = ready.fit(run, here, evaluate)
    metrics = came_out(run, outcome)
    if outcome.stopped:
        return stopped(metrics)
    save_target(run.path / FILE, model, model.spec, "vq", mean=model.mean, std=model.std, fingerprint=fingerprint)
    judged = _judge(model.eval(), _held_loader(settings, held, channels, here))
    metrics |= {
        "target": str(run.path / FILE), "vocabulary": settings.vocabulary, "held_out": len(held),
        "perplexity": judged.perplexity, "usage": judged.usage, "psnr": psnr(judged.mse),
        "psnr_flat": psnr(judged.flat_mse),
    }  # fmt: skip
    tokenizer_report(run.path, model, judged, metrics)
    finish(run, metrics)
    return Result(metrics, _told(metrics))


def training(settings: Tokenizer, source: Source, run: Run, here: World) -> tuple[Training, str]:
    """Build all that the training runs with, and the fingerprint of the images."""
    channels = channels_of(source, settings.channels)
    view = seen_as(settings, settings.img_size, channels)
    patch, _ = patch_of(settings)
    seed_all(settings.seed)
    model = VQTokenizer(settings.vocabulary, settings.img_size, patch, channels)
    to_train, held = _parts(settings, source)
    resolved = prepare(
        run,
        settings,
        settings,
        source,
        here,
        model,
        statistics=published(settings.stats, channels),
        beside={"val": held},
    )  # of all images: statistics and fingerprint are those of the pre-training to come
    model.to(here.device).train()

    loader = train_loader(
        to_train, view, settings, resolved, here, run,
        size=settings.img_size, seed=settings.seed, reading=settings,
    )  # fmt: skip
    plan = _plan(settings, loader, model, resolved, narrowed(run, settings, resolved))
    say_what_runs("tokenizer", model, to_train, plan.schedule.total, here, resolved)

    def step(module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(module, VQTokenizer)
        return {"loss": module.loss(batch["images"])}

    optimizer = adamw(pretrain_groups(model, settings.weight_decay), betas=settings.betas, lr=plan.schedule.peak)
    optimizer.register_step_post_hook(lambda *_: model.codebook.update())
    return Training(model, step, loader, optimizer, plan), resolved.fingerprint


def _parts(settings: Tokenizer, source: Source) -> tuple[Source, Source]:
    """Return images to train on and images to score on."""
    if settings.val_data is not None:
        held = open_source(settings.val_data, "val-or-all", image_column=settings.image_column)
    elif settings.data is not None and "val" in parts_of(settings.data):
        held = open_source(settings.data, "val-or-all", image_column=settings.image_column)
    else:
        source, held = hold_out(source)
    count = min(HELD, len(held))
    return source, held.subset([i * len(held) // count for i in range(count)])


def _held_loader(settings: Tokenizer, held: Source, channels: int, here: World) -> Loader:
    """Return held-out images as evaluation sees them, in 0..1."""
    return Loader(
        held, EvalView(settings.img_size, default_crop_pct(settings.img_size)), batch_size=64, micro_batch=64,
        mean=(0.0,) * channels, std=(1.0,) * channels, device=here.device,
        workers=number_of_workers(settings.workers, len(held), settings.img_size),
    )  # fmt: skip


def _plan(
    settings: Tokenizer, loader: Loader, model: VQTokenizer, resolved: Resolved, narrow: Callable[[int], None]
) -> Plan:
    planned = schedule(settings, loader.steps_per_epoch, loader.batch_size)
    said = header_of(model.spec, "vq", mean=model.mean, std=model.std, fingerprint=resolved.fingerprint)
    every = math.ceil(planned.total / SCORES)
    return Plan(planned, settings, settings.seed, said, eval_every=every, identity=resolved.identity, narrowed=narrow)


@torch.no_grad()
def _judge(model: VQTokenizer, loader: Loader) -> Judged:
    """Encode and decode held-out images; the first few stay as pictures."""
    counts = torch.zeros(model.vocabulary, dtype=torch.long)
    patch = model.spec["patch"]
    sums = torch.zeros(model.vocabulary, patch * patch * model.channels)
    errors, flat, seen, pictures = 0.0, 0.0, 0, []
    for batch in loader.sweep():
        images = batch["images"]
        codes = model.codes(images)
        back = model.decode(codes)
        counts += torch.bincount(codes.flatten().cpu(), minlength=model.vocabulary)
        sums.index_add_(0, codes.flatten().cpu(), patchify(images, patch).flatten(0, 1).cpu())
        errors += float((back - images).square().double().sum())
        flat += float(flat_error(images, patch).double().sum())
        seen += images.numel()
        pictures += [] if pictures else list(zip(images.cpu(), back.cpu(), strict=True))
    return Judged(counts, sums / counts.clamp_min(1)[:, None], errors / seen, flat / seen, pictures)


def _told(metrics: dict[str, Any]) -> str:
    return (
        f"{metrics['run']}: {metrics['steps']} steps; of {metrics['held_out']:,} held-out images: "
        f"PSNR {metrics['psnr']:.2f} dB (patches in their mean colour: {metrics['psnr_flat']:.2f} dB), perplexity "
        f"{metrics['perplexity']:.1f} of {metrics['vocabulary']} codes, {100 * metrics['usage']:.1f} % of them in use; "
        f"look at {metrics['run']}/report.html"
    )
