"""What every training verb decides before its first step: processes, data statistics, batch sizes, plan."""

import contextlib
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from maekit import __version__
from maekit.data.augment import PretrainView
from maekit.data.bad_images import FILE as BAD_FILES
from maekit.data.bad_images import Policy
from maekit.data.check import LIMIT, check
from maekit.data.image import read_image, sniff
from maekit.data.loader import Loader, View, auto_workers, steps_per_epoch
from maekit.data.masks import Masks
from maekit.data.sources import DatasetSource, Source, open_source
from maekit.errors import MaekitError
from maekit.model.encoder import check_patches, geometry
from maekit.settings import Images, Loop, Seen, Settings, Steady, Views
from maekit.signals import settled
from maekit.tasks import STOPPED, Result
from maekit.tasks.run_folder import Resolved, Run, deciding, describe, deviating, identity
from maekit.tasks.same_data import Read, compared, write_down
from maekit.train.device import World, launch, prepare_compiler
from maekit.train.loop import Evaluate, Outcome, Plan, Step, fit
from maekit.train.memory import ROOM, Passes, memory_of
from maekit.train.precision import resolve_precision
from maekit.train.schedule import schedule

log = logging.getLogger("maekit")

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
PATCHES_PER_PASS = 64 * 196
"""Patches of one pass when micro_batch is auto: 64 images of 224 px, as the paper's 64 per GPU."""


class Prepared(Protocol):
    """What `prepare` needs of a model that trains on images (`maekit.model.mae.MaskedAutoencoder`)."""

    mean: tuple[float, ...]
    spec: dict[str, Any]
    num_patches: int
    encoder: Any
    """Has ``embed_dim``."""

    def set_statistics(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Say what images are normalised with."""
        ...


@dataclass(frozen=True)
class Training:
    """All that a training runs with, made from its settings: to be trained, or for one step to be made again."""

    model: nn.Module
    step: Step
    loader: Loader
    optimizer: torch.optim.Optimizer
    plan: Plan

    def fit(self, run: Run, world: World, evaluate: Evaluate | None = None) -> Outcome:
        """Train, or go on (`maekit.train.loop.fit`)."""
        return fit(self.model, self.step, self.loader, self.optimizer, self.plan, run=run.path, world=world,
                   evaluate=evaluate)  # fmt: skip


def spread(settings: Any, task: Callable[..., Result], *args: Any) -> Result | None:
    """Start ``nproc`` processes of `task` if asked for and not inside one already; None: go on in this one."""
    if settings.nproc == 1 or "RANK" in os.environ:
        return None
    result = launch(settings.nproc, task, settings, *args)
    if result.exit_code == STOPPED:
        settled()
    return result


def number_of_workers(wanted: int | str, num_images: int, size: tuple[int, int], *, beside_gpu: bool = False) -> int:
    """Resolve ``workers: auto``."""
    return auto_workers(num_images, size, beside_gpu=beside_gpu) if wanted == "auto" else int(wanted)


def prepare(
    run: Run,
    settings: Steady,
    loop: Loop,
    source: Source,
    world: World,
    model: Prepared,
    *,
    statistics: Statistics | None = None,
    classes: list[str] | None = None,
    per_pass: int | None = None,
    passes: Passes | None = None,
    beside: Mapping[str, Source] | None = None,
    masks: Masks | None = None,
    repeats: int = 1,
) -> Resolved:
    """Decide once what must stay, write config.yaml; on a later launch return what stands there.

    What the run reads is written down, and a later launch compares.

    Before the first step min(all, 10,000) images are read: unreadable ones are found, mean and deviation measured.

    Args:
        settings: the verb's, for config.yaml.
        loop: batch sizes and precision.
        model: its size decides where settings say auto; it is given the statistics of the images.
        statistics: mean and std to use in place of measured ones.
        beside: images that are not trained on, by what they are for.
        masks: given ones.
        per_pass: images of one pass when ``micro_batch`` is auto; default: as many as make `PATCHES_PER_PASS`, on a GPU
            as many as its memory holds.
        passes: show what is kept in memory: a pass has no more images than that holds.
        repeats: samples of each image.

    Raises:
        MaekitError: E-CONFIG-PROCESSES, E-CONFIG-BATCH, E-CONFIG-IDLE, E-CONFIG-LENGTH, E-CONFIG-LR, E-DATA-BAD,
            E-DATA-CHANGED, E-DATA-CLASSES, E-ENV-PRECISION, E-ENV-COMPILER.
    """
    told = {f"setting {name}": str(value) for name, value in deciding(settings).items()}
    versions = {"version of maekit": __version__, "version of torch": torch.__version__}
    world.agree({**versions, "images": source.fingerprint(), **told})
    read = Read(source, beside or {}, masks)
    known = run.resolved and compared(run, settings, read, world)
    samples = repeats * len(source)
    batch = min(loop.batch_size, samples)
    if loop.roll_back and not loop.spike_sigma:
        raise MaekitError(
            "E-CONFIG-IDLE", "setting roll_back", found=f"{loop.roll_back} without spike_sigma",
            expected="a run that minds spikes", hint="--spike-sigma 6",
        )  # fmt: skip
    if loop.compile:
        prepare_compiler(world.device)
    if known is not None:
        _same_classes(known, classes)
        model.set_statistics(known.mean, known.std)
        return _again(known, loop, batch, world)
    precision = resolve_precision(loop.precision, world.device, model.encoder.embed_dim)
    if loop.precision == "auto" and world.any(precision == "fp32"):  # machines may differ
        precision = "fp32"
    per_pass = per_pass or max(1, PATCHES_PER_PASS // model.num_patches)
    if passes is not None and loop.micro_batch == "auto":
        per_pass = _held(passes, precision, per_pass, batch, world)
    parts = micro_batch(loop, batch, world.size, per_pass)
    in_epoch = steps_per_epoch(samples, batch, loop.drop_last)
    schedule(loop, in_epoch, batch)  # what is wrong with it is said before anything is read
    found = measured(source, len(model.mean), settings.bad_images)
    mean, std = statistics or found
    model.set_statistics(mean, std)
    own = int(identity(settings, source.fingerprint()), 16)  # places of weights may be others on other machines
    resolved = Resolved(
        images=len(source),
        fingerprint=source.fingerprint(),
        identity=f"{int(world.gather(torch.tensor([own]))[0]):014x}",
        precision=precision,
        micro_batch=parts,
        mean=mean,
        std=std,
        classes=classes,
        model=model.spec,
        deviations=deviating(settings),
    )
    if samples < loop.batch_size:
        log.warning("%d images are fewer than a batch of %d: every epoch is one short batch", samples, loop.batch_size)
    elif loop.drop_last and samples % batch:
        log.info("%d images of every epoch are left out: they fill no batch (drop_last)", samples % batch // repeats)
    world.barrier()  # all have looked into the folder before one writes
    if world.is_main:
        describe(run, settings, resolved)
    write_down(run, settings, read, world)
    return resolved


def _held(passes: Passes, precision: str, per_pass: int, batch: int, world: World) -> int:
    """Return how many images a pass may have: on a CPU no more than `per_pass`: its caches are small."""
    mine, memory = math.ceil(batch / world.size), memory_of(world.device)
    most = mine if world.device.type == "cuda" else min(per_pass, mine)
    small = passes.at_most(most) < ROOM * memory
    fit = most if small else min(most, passes.kept(precision).images(memory))
    fit = int(world.gather(torch.tensor([fit])).min())  # every process makes the same passes
    if fit < most:
        log.info("%d images per pass: memory holds no more", fit)
    return fit


def _same_classes(known: Resolved, classes: list[str] | None) -> None:
    """Refuse other classes than the model has outputs for, also where other images are accepted.

    Raises:
        MaekitError: E-DATA-CLASSES.
    """
    if classes != known.classes and known.classes is not None:
        raise MaekitError(
            "E-DATA-CLASSES", "classes of the images", found=", ".join(classes or ["none"]),
            expected=f"those that the run began with: {', '.join(known.classes)}", hint="another --out",
        )  # fmt: skip


def measured(source: Source, channels: int, policy: Policy = "skip") -> Statistics:
    """Return mean and deviation of the images' channels, in units of 0..1; a channel that never changes has 1.

    Raises:
        MaekitError: E-DATA-BAD if too many images cannot be used.
    """
    report = check(source, channels=channels, policy=policy)
    return report.mean, tuple(value if value > 1e-4 else 1.0 for value in report.std)


def published(stats: str, channels: int) -> Statistics | None:
    """Return the statistics of ImageNet where the setting asks for them, None where they are to be measured.

    Raises:
        MaekitError: E-CONFIG-STATS if the images have not three channels.
    """
    if stats == "dataset":
        return None
    if channels != 3:
        raise MaekitError(
            "E-CONFIG-STATS", "setting stats", found=f"imagenet for {channels} channels", hint="--stats dataset"
        )
    return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


def unlabelled(settings: Images, dataset: Any, channels: int | None) -> Source:
    """Open the images that pre-training sees: all, or the part to train on where the data have one.

    Args:
        settings: where they are.
        dataset: in place of them: a `Source` or any map-style dataset of images or (image, label).
        channels: of that dataset's images, 3 if not said.

    Raises:
        MaekitError: E-USAGE-DATA if nothing is named; E-DATA-.
    """
    if dataset is not None:
        return dataset if isinstance(dataset, Source) else DatasetSource(dataset, channels=channels or 3)
    if settings.data is None:
        raise MaekitError("E-USAGE-DATA", "no images named", hint="--data FOLDER, or --data builtin:fashion")
    return open_source(
        settings.data, "train-or-all", image_column=settings.image_column, label_column=settings.label_column
    )


def seen_as(settings: Views, size: tuple[int, int], channels: int, resize_on: str = "loader") -> PretrainView:
    """Return the views of pre-training.

    Raises:
        MaekitError: E-CONFIG-AUGMENT for colour jitter of images that are no pictures; E-CONFIG-IDLE for views that
            the device cannot finish.
    """
    cuts = settings.crop == "random" and settings.crop_scale != (1.0, 1.0)
    if resize_on == "device" and (settings.color_jitter or not cuts):
        raise MaekitError(
            "E-CONFIG-IDLE", "setting resize_on", found="device, for other views than boxes cut at random",
            expected="crop random of a scale below 1, color_jitter 0", hint="leave --resize-on out",
        )  # fmt: skip
    if settings.color_jitter and channels not in (1, 3):
        raise MaekitError(
            "E-CONFIG-AUGMENT", "setting color_jitter", found=f"images of {channels} channels",
            expected="1 or 3 channels: it works on pictures", hint="--color-jitter 0",
        )  # fmt: skip
    return PretrainView(
        size, settings.crop_scale, settings.flip, settings.crop, settings.color_jitter, cut_only=resize_on == "device"
    )


def patch_of(settings: Seen) -> tuple[int, tuple[int, int]]:
    """Return the patch side in pixels and the grid, rows and columns, of what pre-training sees.

    Raises:
        MaekitError: E-CONFIG-MODEL, E-CONFIG-SIZE if patches do not fill the image.
    """
    patch = settings.patch_size or geometry(settings.model).patch
    check_patches(settings.img_size, patch)
    return patch, (settings.img_size[0] // patch, settings.img_size[1] // patch)


def _again(resolved: Resolved, loop: Loop, batch: int, world: World) -> Resolved:
    """Return what was decided, with another ``micro_batch`` where one is asked for: the samples stay the same."""
    if loop.micro_batch in ("auto", resolved.micro_batch):
        return resolved
    parts = micro_batch(loop, batch, world.size, resolved.micro_batch)
    log.warning("not bit-exact: micro_batch %d -> %d", resolved.micro_batch, parts)
    return resolved.model_copy(update={"micro_batch": parts})


def narrowed(run: Run, settings: Settings, resolved: Resolved) -> Callable[[int], None]:
    """Return what notes in config.yaml that a pass had to have fewer images, so that later launches begin with them."""
    return lambda images: describe(run, settings, resolved.model_copy(update={"micro_batch": images}))


def train_loader(
    source: Source,
    view: View,
    loop: Loop,
    resolved: Resolved,
    world: World,
    run: Run,
    *,
    size: tuple[int, int],
    seed: int,
    reading: Steady,
    num_noise: int = 0,
    masks: Masks | None = None,
    repeats: int = 1,
) -> Loader:
    """Return the loader of a training run: this process's part of every global batch."""
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Loader(
        source,
        view,
        batch_size=loop.batch_size,
        micro_batch=resolved.micro_batch,
        drop_last=loop.drop_last,
        mean=resolved.mean,
        std=resolved.std,
        seed=seed,
        num_noise=num_noise,
        masks=masks,
        workers=number_of_workers(reading.workers, len(source), size, beside_gpu=world.device.type == "cuda"),
        device=world.device,
        rank=world.rank,
        world=world.size,
        read_timeout=reading.read_timeout,
        bad_images=reading.bad_images,
        bad_log=run.path / BAD_FILES,
        looked_at=LIMIT,
        decoded_bytes=reading.decoded_mb * 2**20 // on_this_machine,
        dct_scaling=reading.dct_scaling,
        repeats=repeats,
    )


def micro_batch(settings: Loop, batch: int, processes: int, per_pass: int) -> int:
    """Return images per process and pass: at most `per_pass` where the setting says auto.

    Raises:
        MaekitError: E-CONFIG-BATCH if the batch is smaller than the number of processes or not divisible.
    """
    if batch < processes:
        raise MaekitError(
            "E-CONFIG-BATCH",
            "setting batch_size",
            found=batch,
            expected=f"at least one image for each of {processes} processes",
        )
    mine = math.ceil(batch / processes)
    if settings.micro_batch == "auto":
        passes = math.ceil(mine / per_pass)
        return math.ceil(mine / passes)
    if batch == settings.batch_size and batch % (settings.micro_batch * processes):
        raise MaekitError(
            "E-CONFIG-BATCH",
            "settings batch_size and micro_batch",
            found=f"{batch} over {processes} processes in parts of {settings.micro_batch}",
            expected="a batch divisible by both",
            hint="--micro-batch auto",
        )
    return settings.micro_batch


def channels_of(source: Source, wanted: int | None) -> int:
    """Return how many channels the images have: what was asked for, what arrays hold, 3 for pictures.

    Raises:
        MaekitError: E-CONFIG-CHANNELS if they cannot have as many as asked for, E-DATA-BAD if none of the first images
            can be read.
    """
    has, is_picture = _first_image(source)
    if wanted in (None, has) or (is_picture and wanted == 1):
        return wanted or has
    raise MaekitError(
        "E-CONFIG-CHANNELS",
        f"{source.name}",
        found="pictures, which give 3 channels or 1" if is_picture else f"images of {has} channels",
        expected=f"{wanted} channels, as --channels or the weights say",
        hint=f"--channels {has}, or weights for such images",
    )


def _first_image(source: Source) -> tuple[int, bool]:
    """Return the channels of the first image that can be read, and whether it is a picture (no array)."""
    for index in range(min(len(source), 100)):
        with contextlib.suppress(MaekitError):
            data = source.read(index)
            image = data if isinstance(data, Tensor) else read_image(data, name=source.ids[index])
            return len(image), not isinstance(data, Tensor) and sniff(data) != "npy"
    raise MaekitError(
        "E-DATA-BAD", f"{source.name}", found="no readable image among the first", hint="maekit data PATH"
    )


def came_out(run: Run, outcome: Outcome) -> dict[str, Any]:
    """Return what every training says of itself: run, steps, loss, images_per_second, state_sha256."""
    return {
        "run": str(run.path),
        "steps": outcome.step,
        "loss": outcome.loss,
        "images_per_second": round(outcome.images_per_second, 1),
        "state_sha256": outcome.state_sha256,
    }


def default_out(verb: str, data: str | None) -> Path:
    """Return the run folder when ``--out`` says none: runs/VERB-DATA."""
    name = Path(str(data or "data").replace("builtin:", "")).stem or "data"
    return Path("runs") / f"{verb}-{name}"


def say_what_runs(
    verb: str, model: torch.nn.Module, source: Source, steps: int, world: World, resolved: Resolved
) -> None:
    """Log one line before the first step."""
    millions = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    log.info(
        "%s: %.2f M trainable parameters, %d images, %d steps, %s on %d x %s",
        verb,
        millions,
        len(source),
        steps,
        resolved.precision,
        world.size,
        world.device,
    )
