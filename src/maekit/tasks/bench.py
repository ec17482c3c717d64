"""Measure this machine: how fast it trains and how that grows, in how much memory; what saving, masks, reading cost.

``bench train`` steps through pre-training on images that are already there, so nothing but the step is measured; the
best square matrix product of the same run stands beside it, and peers with ``--vs`` take turns with it in one process.
Model FLOPs are those of `maekit.model.flops`; MFU is their share of that peak.
"""

import contextlib
import json
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache
from torch.profiler import ProfilerActivity, profile

from maekit.bench.contenders import Contender, check_peer, ours, peer, peer_versions, turns
from maekit.bench.data import decode_rates, loader_rates, workers_needed
from maekit.bench.machine import describe, layer_in_fp32_over_bf16, peak, wait
from maekit.bench.memory import Held, Job, held
from maekit.bench.saving import costs
from maekit.bench.scale import Point, grown, point, unread, varied
from maekit.bench.shares import kinds, shares
from maekit.data.decoded import room_for
from maekit.data.loader import Loader
from maekit.data.sources import open_source
from maekit.errors import MaekitError
from maekit.interchange.weights import metadata
from maekit.model.flops import flops
from maekit.model.mae import MaskedAutoencoder
from maekit.model.masking import check_masking, draw_masking
from maekit.recipes import RECIPES
from maekit.report.evaluation import aligned
from maekit.report.files import write_whole
from maekit.report.grids import write_png
from maekit.report.scaling import scale_drawing
from maekit.report.scaling import told as scale_told
from maekit.report.scored import as_picture
from maekit.settings import Bench, Place, Pretrain, Settings, Views
from maekit.tasks import Result
from maekit.tasks.pretrain import check_checkpointing, new_model, passes_of
from maekit.tasks.run_folder import typed
from maekit.tasks.training import channels_of, seen_as
from maekit.train.allocator import keep_freed_memory
from maekit.train.device import cpu_model, prepare_compiler, resolve_device
from maekit.train.precision import best_precision, resolve_precision

log = logging.getLogger("maekit")

PLACE, VIEWS = {*Place.model_fields} - {"recipe"}, {*Views.model_fields} - {"recipe"}
ANEW = {"checkpointing_encoder", "checkpointing_decoder"}
MODEL = {*Bench.takes_only, "device", "seed", "threads"} - PLACE - VIEWS - ANEW - {"save_every", "decoded_mb"}
READS: dict[str, set[str]] = {
    "train": MODEL | {"precision", "compile", "vs", "rounds", "profile"},
    "scale": MODEL | {"precision", "rounds", "over", "points", "out"},
    "memory": MODEL | ANEW | {"precision", "vs"},
    "checkpoint": MODEL | PLACE | {"precision", "rounds", "save_every", "out"},
    "mask": MODEL | {"precision", "rounds"},
    "data": MODEL | PLACE | VIEWS | {"precision", "decoded_mb", "workers", "seconds"},
    "decode": {"data", "img_size", "seconds", "seed"},
}
"""Settings that each action reads, beside its own name."""
MASKS = {
    "random 75 %": ("random", 0.75), "block 50 %": ("block", 0.5), "block 75 %": ("block", 0.75),
    "grid 75 %": ("grid", 0.75), "centre 25 %": ("centre", 0.25),
}  # fmt: skip
EAGER = "maekit, not compiled"
"""Contender beside a compiled one."""
MOST_FILES = 500
"""Photographs that decoding is measured on."""
MASKED = 256
"""Images whose masks are drawn at a time."""


def bench(settings: Bench | dict[str, Any]) -> Result:
    """Do what the action says.

    Returns:
        for train: images_per_second, peer_images_per_second, step_seconds (p50, p90, p99), flops_per_image,
        flops_per_second, peak_flops, mfu, shares, kinds (on a CPU), ratio ({peer: its seconds over ours}) and their
        spread; with compile first_step_seconds, compiled_is_faster, compiling_pays_after_steps.

    Raises:
        MaekitError: E-USAGE-ACTION, E-CONFIG-IDLE for a setting that the action does not read, E-CONFIG-PEER,
            E-ENV-IMPORT, E-ENV-COMPILER, and what building the model raises.
    """
    settings = typed(Bench, settings)
    if settings.action is None:
        raise MaekitError("E-USAGE-ACTION", "nothing named to measure", hint=f"maekit bench {' | '.join(READS)}")
    _refuse_unused(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.action != "memory" and resolve_device(settings.device).type == "cpu":
        keep_freed_memory()  # as in training; peers that take turns in this process have it, too
    actions = {
        "train": _train, "scale": _scale, "memory": _memory, "checkpoint": _checkpoint, "mask": _mask, "data": _data,
        "decode": _decode,
    }  # fmt: skip
    return actions[settings.action](settings)


def _refuse_unused(settings: Bench) -> None:
    assert settings.action is not None
    stated = RECIPES[settings.recipe]().settings if settings.recipe else Settings()
    given = {
        name for name in settings.model_fields_set - {"action", "recipe"}
        if getattr(settings, name) not in (getattr(stated, name, None), Bench.model_fields[name].default)
    }  # fmt: skip
    read = READS[settings.action] - (unread(settings) if settings.action == "scale" else set())
    if unused := sorted(given - read):
        flag = f"--{unused[0].replace('_', '-')}"
        raise MaekitError(
            "E-CONFIG-IDLE", f"maekit bench {settings.action}", found=flag, expected="settings that it reads",
            hint=f"leave {flag} out; maekit bench --help",
        )  # fmt: skip


def _model(settings: Bench, device: torch.device) -> MaskedAutoencoder:
    shared = {name: getattr(settings, name) for name in (*Bench.takes_only, "seed") if name in Pretrain.model_fields}
    return new_model(Pretrain(**shared), settings.channels or 3).to(device)


def _images(settings: Bench, model: MaskedAutoencoder, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (settings.batch_size, model.encoder.in_chans, *model.img_size)
    return torch.randn(shape, generator=generator).to(device)


def _precision(settings: Bench, model: MaskedAutoencoder, device: torch.device) -> tuple[str, str]:
    """Return the precision, and why."""
    width = model.encoder.embed_dim
    if settings.precision == "auto":
        chosen, why = best_precision(device, width)
    else:
        chosen, why = resolve_precision(settings.precision, device, width), "as asked"
    if device.type == "cpu":
        why += f"; a layer of this width takes {layer_in_fp32_over_bf16(width):.1f} times as long in fp32 as in bf16"
    return chosen, why


def _train(settings: Bench) -> Result:
    device = resolve_device(settings.device)
    if settings.compile:
        prepare_compiler(device)
    model = _model(settings, device)
    precision, why = _precision(settings, model, device)
    images = _images(settings, model, device)
    contenders = [ours(model, settings.mask_ratio, precision, compiled=settings.compile)]
    contenders += [peer(name, model, settings.mask_ratio, precision, device) for name in settings.vs or []]
    eager = contenders[0]
    if settings.compile:
        eager = ours(model, settings.mask_ratio, precision, compiled=False)
        eager.name = EAGER
        contenders.append(eager)
    with fresh_cache() if settings.compile else contextlib.nullcontext():  # as if nothing had been compiled before
        first = {one.name: one.seconds(images) for one in contenders}
    times = turns({one.name: partial(one.seconds, images) for one in contenders}, settings.rounds)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    best, side = peak(device, dtype)
    seconds = sorted(times["maekit"])
    middle = statistics.median(seconds)
    count = flops(model, settings.mask_ratio).total
    reached = count * settings.batch_size / middle
    ratios = {name: sorted(a / b for a, b in zip(times[name], times["maekit"], strict=True)) for name in times}
    del ratios["maekit"]
    ratios.pop(EAGER, None)
    parts = shares(eager, images)
    by_kind = kinds(eager, images) if device.type == "cpu" else {}
    if settings.profile:
        _trace(eager, images, settings.profile)
    metrics: dict[str, object] = {
        **describe(device), "model": settings.model, "batch_size": settings.batch_size, "precision": precision,
        "precision_why": why, "compile": settings.compile, "mask_ratio": settings.mask_ratio,
        "images_per_second": settings.batch_size / middle,
        "peer_images_per_second": {name: settings.batch_size / statistics.median(times[name]) for name in ratios},
        "step_seconds": {"p50": middle, "p90": _quantile(seconds, 0.9), "p99": _quantile(seconds, 0.99)},
        "first_step_seconds": first["maekit"], **_worth(first, times),
        "flops_per_image": count, "flops_per_second": reached, "peak_flops": best, "peak_side": side,
        "mfu": reached / best, "shares": parts, "kinds": by_kind,
        "ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "ratio_min": {name: values[0] for name, values in ratios.items()},
        "ratio_max": {name: values[-1] for name, values in ratios.items()},
        "versions": peer_versions(ratios), "rounds": settings.rounds,
    }  # fmt: skip
    return Result(metrics, "\n".join(_told(settings, contenders, times, metrics, why)))


def _worth(first: dict[str, float], times: dict[str, list[float]]) -> dict[str, object]:
    """Return how much faster a compiled step is, and after how many the compiling has paid; None: never."""
    if EAGER not in times:
        return {}
    eager, compiled = (statistics.median(times[name]) for name in (EAGER, "maekit"))
    steps = math.ceil((first["maekit"] - compiled) / (eager - compiled)) if eager > compiled else None
    return {"compiled_is_faster": eager / compiled, "compiling_pays_after_steps": steps}


def _told(
    settings: Bench, contenders: list[Contender], times: dict[str, list[float]], found: dict[str, Any], why: str
) -> Iterator[str]:
    threads = f", {found['threads']} threads" if "threads" in found else ""
    yield f"{found['device']}{threads}, torch {found['torch']}; {found['precision']}: {why}"
    yield f"{settings.model}, batch {settings.batch_size}, mask ratio {settings.mask_ratio:g}; {settings.rounds} rounds"
    rows: list[tuple[str, ...]] = [("", "images/s", "s a step", "p90", "p99", "its time / ours")]
    for one in contenders:
        seconds = sorted(times[one.name])
        middle = statistics.median(seconds)
        spread = ""
        if one.name in found["ratio"]:
            low, high = found["ratio_min"][one.name], found["ratio_max"][one.name]
            spread = f"{found['ratio'][one.name]:.2f} ({low:.2f} to {high:.2f})"
        name = one.name if one.trains else f"{one.name}, forward pass only, whole images"
        rows.append((
            name, f"{settings.batch_size / middle:,.1f}", f"{middle:.4f}", f"{_quantile(seconds, 0.9):.4f}",
            f"{_quantile(seconds, 0.99):.4f}", spread,
        ))  # fmt: skip
    yield from aligned(rows)
    yield (
        f"{found['flops_per_image'] / 1e9:.3g} GFLOP an image, {found['flops_per_second'] / 1e9:,.0f} GFLOP/s of "
        f"{found['peak_flops'] / 1e9:,.0f} in a square product of {found['peak_side']}: MFU {found['mfu']:.0%}"
    )
    if settings.compile:
        steps, faster = found["compiling_pays_after_steps"], found["compiled_is_faster"]
        pays = f"which pays from {steps:,} steps on" if steps else "which never pays"
        first = f"compiled: the first step took {found['first_step_seconds']:.1f} s"
        yield f"{first}, the others are {faster:.2f} times as fast as uncompiled ones, {pays}"
    for told in ("shares", "kinds") if found["kinds"] else ("shares",):
        yield "of a step: " + ", ".join(f"{name} {share:.0%}" for name, share in found[told].items())
    if settings.profile:
        yield f"trace: {settings.profile}"


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def _trace(contender: Contender, images: Tensor, place: Path) -> None:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (images.device.type == "cuda")
    with profile(activities=activities, record_shapes=True) as found:
        contender.step(images)
        contender.step(images)
    place.parent.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(place))


def _scale(settings: Bench) -> Result:
    device = resolve_device(settings.device)
    if settings.over == "threads" and device.type != "cpu":
        raise MaekitError(
            "E-CONFIG-IDLE", "--over threads", found=f"device {device}", expected="a CPU", hint="--device cpu"
        )
    if settings.out:
        _make(settings.out)
    each = varied(settings, lambda one: _model(one, torch.device("meta")))
    models = {one.img_size: _model(one, device) for one in each.values()}
    precision, why = _precision(settings, next(iter(models.values())), device)
    points: list[Point] = []
    for value, one in each.items():
        model = models[one.img_size]
        contender = ours(model, one.mask_ratio, precision, compiled=False)
        same = [other.contender for other in points if other.contender.model is model]
        contender.optimizer = (same or [contender])[0].optimizer  # moments once for all points of a model
        points.append(point(value, one, contender, _images(one, model, device)))
    found, line = grown(points, settings.rounds)
    metrics: dict[str, object] = {
        **describe(device), "model": settings.model, "over": settings.over, "batch_size": settings.batch_size,
        "mask_ratio": settings.mask_ratio, "img_size": settings.img_size, "precision": precision,
        "rounds": settings.rounds, "points": [asdict(one) for one in found], "line": asdict(line),
    }  # fmt: skip
    if settings.out:
        write_png(settings.out / "scale.png", as_picture(scale_drawing(metrics), 4.6))
        write_whole(settings.out / "scale.json", json.dumps(metrics, indent=1).encode())
    return Result(metrics, "\n".join([f"{settings.model}, {precision}: {why}", *scale_told(metrics)]))


def _memory(settings: Bench) -> Result:
    anew = (settings.checkpointing_encoder, settings.checkpointing_decoder)
    check_checkpointing(*anew)
    device = resolve_device(settings.device)
    model = _model(settings, torch.device("cpu"))
    precision, why = _precision(settings, model, device)
    shape = (settings.batch_size, model.encoder.in_chans, *model.img_size)

    def job(name: str, checkpointing: tuple[int, int] = (0, 0)) -> Job:
        return Job(
            name, model.spec, shape, settings.mask_ratio, precision, str(device), torch.get_num_threads(), checkpointing
        )

    own = {"maekit": job("maekit"), _named(anew): job("maekit", anew)}
    peers = [name for name in settings.vs or [] if name.partition(":")[0] != "timm-forward"]
    for name in peers:
        check_peer(name, model, settings.mask_ratio, precision, device)  # before anything is measured
    found: dict[str, Held] = {name: held(one) for name, one in (own | {name: job(name) for name in peers}).items()}
    base = found[peers[0] if peers else "maekit"]
    against = peers[0] if peers else "maekit"
    rows: list[tuple[str, ...]] = [
        (
            "", "MiB at the peak", f"of {against}'s", "above weights, moments", "counted", "s a step",
            f"of {against}'s",
        )
    ]  # fmt: skip
    expected = {name: _counted(model, one) for name, one in own.items()}
    rows += [
        (
            name, f"{one.mib:,.0f}", f"{one.mib / base.mib:.2f}", f"{one.mib - one.kept_mib:,.0f}",
            f"{expected[name]:,.0f}" if name in expected else "-", f"{one.seconds:.3f}",
            f"{one.seconds / base.seconds:.2f}",
        )
        for name, one in found.items()
    ]  # fmt: skip
    metrics: dict[str, object] = {
        **describe(device), "model": settings.model, "batch_size": settings.batch_size, "precision": precision,
        "mib": {name: one.mib for name, one in found.items()},
        "kept_mib": {name: one.kept_mib for name, one in found.items()}, "counted_mib": expected,
        "seconds": {name: one.seconds for name, one in found.items()},
        "of": {name: one.mib / base.mib for name, one in found.items()}, "against": against,
        "versions": peer_versions(peers),
    }  # fmt: skip
    head = f"{settings.model}, batch {settings.batch_size}, {precision} ({why}); each in a process of its own"
    return Result(metrics, "\n".join([head, *aligned(rows)]))


def _counted(model: MaskedAutoencoder, job: Job) -> float:
    """Return the MiB that ``--micro-batch auto`` counts for such a step, from shapes alone."""
    model.train().set_checkpointing(*job.checkpointing)
    kept = passes_of(model, job.mask_ratio).kept(job.precision)
    return (kept.fixed + kept.per_image * job.shape[0]) / 2**20


def _named(anew: tuple[int, int]) -> str:
    blocks = zip(("encoder", "decoder"), anew, strict=True)
    return " ".join(["maekit --checkpointing", *(f"--checkpointing-{part} {n}" for part, n in blocks if n != 1)])


def _checkpoint(settings: Bench) -> Result:
    device = resolve_device(settings.device)
    model = _model(settings, device)
    precision, _ = _precision(settings, model, device)
    every = settings.save_every or _steps_of_an_epoch(settings)
    trained = ours(model, settings.mask_ratio, precision, compiled=False)
    with _scratch(settings.out or Path()) as folder:
        found = costs(trained, _images(settings, model, device), folder, metadata(model), settings.rounds)
    write = statistics.median(found.waited.write)
    rates = {"one a minute": found.seconds / 60} | ({f"every {every} steps": found.share(every)} if every else {})
    rows: list[tuple[str, ...]] = [
        ("a save, seconds", "loop waits for copy", "writer", "added to training", "least to most")
    ]
    rows += [
        (
            name, *(f"{statistics.median(seconds):.3g}" for seconds in (cost.stall, cost.write, cost.added)),
            f"{min(cost.added):.3g} to {max(cost.added):.3g}",
        )
        for name, cost in (("beside training, as pretrain saves", found.beside), ("waited for", found.waited))
    ]  # fmt: skip
    metrics: dict[str, object] = {
        **describe(device), "model": settings.model, "batch_size": settings.batch_size, "precision": precision,
        "bytes": found.bytes, "bytes_per_second": found.bytes / write, "step_seconds": found.step_seconds,
        "stall_seconds": statistics.median(found.beside.stall), "write_seconds": write,
        "write_seconds_beside": statistics.median(found.beside.write), "added_seconds": found.seconds,
        "added_seconds_waited": statistics.median(found.waited.added), "share": rates, "save_every": every,
        "steps": found.steps, "late": found.late, "rounds": settings.rounds,
    }  # fmt: skip
    mega = found.bytes / 1e6
    lines = [
        f"{settings.model}, batch {settings.batch_size}, {precision}: {mega:,.1f} MB a checkpoint, written, synced and "
        f"verified at {mega / write:,.0f} MB/s",
        f"{settings.rounds} rounds of {found.steps} steps of {found.step_seconds:.4g} s, with and without a save",
        *aligned(rows),
        "of training time: " + ", ".join(f"{share:.2%} {name}" for name, share in rates.items()),
        *([f"{found.late} saves were not written when their round was over"] if found.late else []),
    ]
    return Result(metrics, "\n".join(lines))


def _steps_of_an_epoch(settings: Bench) -> int | None:
    if settings.data is None:
        return None
    source = open_source(
        settings.data, "train-or-all", image_column=settings.image_column, label_column=settings.label_column
    )
    return -(-len(source) // settings.batch_size)


@contextlib.contextmanager
def _scratch(where: Path) -> Iterator[Path]:
    """Yield a folder for the time of the block, on the disk that is to be measured."""
    _make(where)
    with tempfile.TemporaryDirectory(prefix="maekit-bench-", dir=where) as folder:
        yield Path(folder)


def _make(folder: Path) -> None:
    """Make a folder that can be written before any time is spent."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise MaekitError("E-ENV-OUT", f"cannot write {folder}", found=error.strerror or error) from error


def _mask(settings: Bench) -> Result:
    device = resolve_device(settings.device)
    model = _model(settings, device)
    precision, _ = _precision(settings, model, device)
    images = _images(settings, model, device)
    trained = ours(model, settings.mask_ratio, precision, compiled=False)
    noise = torch.rand(MASKED, model.num_patches, device=device)
    kinds: dict[str, Callable[[], Tensor]] = {}
    for name, (kind, ratio) in MASKS.items():
        with contextlib.suppress(MaekitError):  # this grid cannot have it
            check_masking(kind, model.grid, ratio, settings.mask_unit)
            kinds[name] = partial(_drawn, kind, noise, model.grid, ratio, settings.mask_unit)
    drawn: dict[str, list[float]] = {name: [] for name in kinds}
    steps: list[float] = []
    for number in range(settings.rounds + 1):
        step = trained.seconds(images) * MASKED / settings.batch_size
        timed = {name: _seconds(draw, device) for name, draw in kinds.items()}
        if number:
            steps.append(step)
            for name, seconds in timed.items():
                drawn[name].append(seconds)
    step = statistics.median(steps)
    middle = {name: statistics.median(seconds) for name, seconds in drawn.items()}
    rows: list[tuple[str, ...]] = [(f"masks of {MASKED} images", "ms", "of a step")]
    rows += [(name, f"{1000 * seconds:.2f}", f"{seconds / step:.4%}") for name, seconds in middle.items()]
    metrics: dict[str, object] = {
        **describe(device), "model": settings.model, "precision": precision, "step_seconds": step,
        "seconds": middle, "share": {name: seconds / step for name, seconds in middle.items()},
    }  # fmt: skip
    head = f"{settings.model}, {precision}: {step:.2f} s for a step of {MASKED} images, from {settings.batch_size}"
    return Result(metrics, "\n".join([head, *aligned(rows)]))


def _drawn(kind: str, noise: Tensor, grid: tuple[int, int], ratio: float, unit: int) -> Tensor:
    return draw_masking(kind, noise, grid, ratio, unit).mask


def _data(settings: Bench) -> Result:
    source = open_source(
        _place(settings), "train-or-all", image_column=settings.image_column, label_column=settings.label_column
    )
    device = resolve_device(settings.device)
    channels = channels_of(source, settings.channels)
    model = _model(settings.model_copy(update={"channels": channels}), device)
    precision, _ = _precision(settings, model, device)
    view = seen_as(settings, model.img_size, channels)

    decoded = room_for(len(source), settings.decoded_mb * 2**20)  # one for all, as they are there at the same time

    def make(workers: int) -> Loader:
        loader = Loader(
            source, view, batch_size=settings.batch_size, micro_batch=settings.batch_size, seed=settings.seed,
            mean=model.mean, std=model.std, num_noise=model.num_patches, workers=workers,
        )  # fmt: skip
        loader.samples.decoded = decoded
        return loader

    rates = loader_rates(make, settings.workers, seconds=settings.seconds)
    trained = ours(model, settings.mask_ratio, precision, compiled=False)
    images = _images(settings, model, device)
    step = settings.batch_size / min(trained.seconds(images) for _ in range(4))
    needed = workers_needed(rates, step)
    rows: list[tuple[str, ...]] = [("loader processes", "images/s", "least to most")]
    rows += [
        (str(rate.workers), f"{rate.images_per_second:,.0f}", f"{rate.lowest:,.0f} to {rate.highest:,.0f}")
        for rate in rates
    ]
    told = f"{needed} loader processes keep up" if needed is not None else "none of these numbers keeps up"
    metrics: dict[str, object] = {
        **describe(device), "images": len(source), "batch_size": settings.batch_size,
        "images_per_second": {str(rate.workers): rate.images_per_second for rate in rates},
        "step_images_per_second": step, "workers_needed": needed, "precision": precision,
    }  # fmt: skip
    lines = [*aligned(rows), f"a step of {settings.model} in {precision} takes {step:,.0f} images/s: {told}"]
    return Result(metrics, "\n".join(lines))


def _decode(settings: Bench) -> Result:
    files = [file for file in sorted(Path(_place(settings)).rglob("*")) if file.suffix.lower() in (".jpg", ".jpeg")]
    if not files:
        raise MaekitError("E-DATA-EMPTY", f"{settings.data}", found="no .jpg or .jpeg file", expected="photographs")
    found = decode_rates(files[:MOST_FILES], size=settings.img_size[0], seconds=settings.seconds, seed=settings.seed)
    rows: list[tuple[str, ...]] = [("from the file to a crop", "images/s of a core", "times the first", "difference")]
    rows += [
        (one.pipeline, f"{one.images_per_second:,.0f}", f"{one.ratio:.2f}", f"{one.difference:.3f} levels")
        for one in found
    ]
    metrics: dict[str, object] = {
        "device": cpu_model(), "files": len(files[:MOST_FILES]), "img_size": settings.img_size[0],
        "pipelines": [asdict(one) for one in found],
    }  # fmt: skip
    return Result(metrics, "\n".join(aligned(rows)))


def _place(settings: Bench) -> str:
    if settings.data is None:
        raise MaekitError("E-USAGE-DATA", "no images named", hint=f"maekit bench {settings.action} --data DIR")
    return settings.data


def _seconds(run: Callable[[], object], device: torch.device, times: int = 10) -> float:
    wait(device)
    began = time.perf_counter()
    for _ in range(times):
        run()
    wait(device)
    return (time.perf_counter() - began) / times
