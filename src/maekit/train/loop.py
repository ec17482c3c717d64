"""The one loop: pre-training, fine-tuning and the linear probe differ in the step function they hand in.

``fit`` knows a module, a step function (module, batch) -> {"loss": ...}, a loader whose position is a step number,
an optimizer and a plan. All state that decides the future is in the checkpoint: weights, optimizer, average,
scaler, step and the losses not yet logged. Drop path, mixup and erasing draw from generators seeded with
(seed, step, rank, number of the pass) before each pass. So a run that was stopped anywhere and goes on ends with the
same bits.

The device is not waited for in a step: losses stay on it until a log line, a score or a save is due. Only then does
the loop learn of a bad number, and finds the state of just before it (`maekit.train.guard`).
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from maekit.failpoints import reach
from maekit.seeds import seed_all
from maekit.settings import Loop
from maekit.signals import noting
from maekit.train import checkpoint
from maekit.train.best import FOLDERS, Best
from maekit.train.device import World, circumstances, without_peer
from maekit.train.guard import Guard
from maekit.train.log import Log
from maekit.train.memory import is_out_of_memory, next_smaller, out_of_memory
from maekit.train.precision import autocast, kept_casts
from maekit.train.recheck import Recheck, flip_a_bit
from maekit.train.saver import Saver
from maekit.train.schedule import Schedule
from maekit.train.state import Average, State
from maekit.train.waits import Waits

log = logging.getLogger("maekit")

Batch = dict[str, Tensor]
Step = Callable[[nn.Module, Batch], dict[str, Tensor]]
Evaluate = Callable[[nn.Module], Iterator[tuple[str, float]]]


class Batches(Protocol):
    """What the loop needs of a loader (`maekit.data.loader.Loader`)."""

    batch_size: int
    micro_batch: int

    def steps(self, start: int, stop: int) -> Iterator[Iterator[Batch]]:
        """Yield, for each step, its micro-batches; one at a time is on the device."""
        ...

    def sizes(self, step: int) -> tuple[int, int]:
        """Return the images of a step's global batch and of this process's share of it."""
        ...


@dataclass(frozen=True)
class Plan:
    """How long, how fast and how often.

    Attributes:
        schedule: length and learning rate.
        settings: clipping, average, precision ("auto" already resolved), checkpoints, log lines.
        seed: with step and rank it seeds what is random on the device.
        metadata: written into the weights of every checkpoint, so that they load by themselves.
        eval_every: steps between scores; 0: only at the end.
        keep_best: score whose best weights stay in ``best/``, those of their average in ``best-ema/``; empty: none do.
        keep_casts: weights in half precision stay for the whole step; without, less memory is taken.
        identity: of the run: a checkpoint of another one is passed over.
        narrowed: told the images per pass when memory was too small for more, to go on with them later, too.
    """

    schedule: Schedule
    settings: Loop
    seed: int
    metadata: dict[str, str]
    eval_every: int = 0
    keep_best: str = ""
    keep_casts: bool = True
    identity: str = ""
    narrowed: Callable[[int], None] = lambda _: None


@dataclass(frozen=True)
class Outcome:
    """Where a run stands when `fit` returns.

    Attributes:
        step: optimizer steps done.
        loss: mean loss since the last log line.
        scores: the last evaluation's.
        stopped: by a signal or ``--stop-at`` before the end: a checkpoint is there.
    """

    step: int
    loss: float
    images_per_second: float
    state_sha256: str
    scores: dict[str, float]
    stopped: bool


class Call(nn.Module):
    """The step function as a module, so that DDP and torch.compile wrap one forward, whatever the task."""

    def __init__(self, model: nn.Module, step: Step) -> None:
        super().__init__()
        self.model, self.step = model, step

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Run the step function."""
        return self.step(self.model, batch)


def fit(
    model: nn.Module,
    step_function: Step,
    loader: Batches,
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    *,
    run: Path,
    world: World,
    evaluate: Evaluate | None = None,
) -> Outcome:
    """Train `model` in place from where the run folder stands to the end of the schedule, or to a stop.

    Args:
        model: on the world's device, in train mode as the task wants it (frozen parts in eval mode stay so).
        step_function: (module, batch) -> {"loss": scalar, ...}.
        loader: gives the micro-batches of any step.
        optimizer: its groups carry "lr_scale".
        plan: schedule and habits.
        run: folder for checkpoints/, metrics.jsonl and events/.
        world: this process among all.
        evaluate: yields (name, score) of a model in eval mode; its scores are logged as ("val/top1", 0.812).

    Raises:
        MaekitError: E-NUM-LOSS, E-NUM-GRADIENT and E-NUM-WEIGHTS (not finite), E-NUM-SPIKE, E-NUM-SCALE, E-NUM-SDC,
            E-CKPT-... (the run's checkpoint cannot be taken over), E-STOP-DISK / E-ENV-DISK (saving failed),
            E-STOP-MEMORY / E-ENV-MEMORY.
    """
    settings, schedule = plan.settings, plan.schedule
    scaler = torch.amp.GradScaler(world.device.type, enabled=settings.precision == "fp16")
    average = Average(model, settings.ema) if settings.ema else None
    state = State(model, optimizer, scaler, average, circumstances(world, loader.micro_batch), plan.identity)
    folder = run / "checkpoints"
    if world.is_main:
        checkpoint.delete_leftovers(folder)
    saved = checkpoint.newest(folder, plan.identity)
    if saved is not None:
        state.restore(saved)
        log.info("going on from %s", saved.path)
        _say_what_is_different(saved.state.get("circumstances", {}), state.circumstances)
    world.agree({"newest checkpoint": str(state.step)})
    if world.is_main and saved is not None:
        checkpoint.put_later_aside(folder, saved.step)
    call = _wrap(model, step_function, settings, world)
    stop = min(schedule.total, settings.stop_at or schedule.total)
    save_every = settings.save_every or schedule.steps_per_epoch
    compiling = settings.compile
    first, began, saved_at, scores = state.step, time.monotonic(), state.step if saved else -1, {}
    best = {prefix: Best(run, plan.keep_best, prefix) for prefix in FOLDERS if plan.keep_best}
    guard, waits = Guard(state, settings, plan.seed, world, run), Waits(world.device)
    recheck = Recheck(state, settings.sdc_check, world, run) if settings.sdc_check else None

    def flush() -> bool:
        """Fetch what is still on the device: the only place where the loop waits for it; True: it went back."""
        if recheck:
            recheck.read(saved_at, records)
        bad = guard.read(keep)
        back = bad is not None and guard.answer(bad, keep, newest)
        if recheck and back:
            recheck.begin()
        return back

    def newest() -> checkpoint.Checkpoint | None:
        saver.wait()
        return checkpoint.newest(folder, plan.identity)

    def due(step: int) -> bool:
        every = (
            settings.log_every,
            save_every,
            plan.eval_every or schedule.total,
            settings.sdc_check or schedule.total,
        )
        return step in (stop, schedule.total) or any(step % n == 0 for n in every)

    def save() -> None:
        nonlocal saved_at
        flush()
        world.share_buffers(model)
        if world.is_main and saved_at != state.step:
            saver.save(state.step, state.tensors(), state.numbers())
        saved_at = state.step

    def keep() -> None:
        save()
        saver.wait(last=True)

    saver = Saver(
        folder, plan.metadata, keep=settings.keep, keep_every=settings.keep_every, errors=settings.save_errors
    )
    with _main_log(run, state.step, schedule, loader.batch_size, world) as records, noting() as signals, saver:
        stopped = state.step >= stop and stop < schedule.total
        if compiling and state.step < stop:
            log.info("compiling the model, in the first step")
        for micro_batches in guard.batches(loader.steps, stop):
            at = state.step
            try:
                waits.start()
                sizes = loader.sizes(at + state.mishaps.shift)
                settle, batches = world.size > 2 and at == first, waits.over(micro_batches)
                _train_step(call, batches, state, plan, sizes, world, guard, recheck, settle=settle)
            except (RuntimeError, MemoryError) as error:
                if isinstance(error, RuntimeError) and (known := without_peer(error, at, saved_at, run)):
                    raise known from None
                if state.step > at:  # after the update: the step cannot be made again
                    raise
                _narrow(error, loader, plan, world, saved_at)
                guard.undo()
                continue
            if compiling:
                compiling = False
                log.info("first step done, compiled: %.0f s since the start", time.monotonic() - began)
            saver.look()
            if due(state.step) and flush():
                if records:
                    records.rewind(state.step)
                continue
            waits.stop()
            if state.step % settings.log_every == 0 or state.step == schedule.total:
                _log_line(state, schedule, records, waits.share(), recheck.count if recheck else 0)
            last = state.step == schedule.total
            if evaluate and (last or (plan.eval_every and state.step % plan.eval_every == 0)):
                world.share_buffers(model)
                scores = _scores(evaluate, model, state.average)
                if records:
                    records.record(state.step, scores)
                for prefix, one in best.items():
                    one.offer(state.step, scores, state.weights(prefix), plan.metadata, write=world.is_main)
            halt = world.any(signals.received is not None)
            if last or halt or state.step == stop or state.step % save_every == 0:
                save()
            if (halt or state.step == stop) and not last:
                stopped = True
                break
        keep()
        if evaluate and not scores and state.step == schedule.total:  # killed after the last save
            scores = _scores(evaluate, model, state.average)
        world.barrier()
    rate = (state.step - first) * loader.batch_size / max(1e-9, time.monotonic() - began)
    return Outcome(state.step, state.mean_loss(), rate, state.sha256(), scores, stopped)


def _say_what_is_different(before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [f"{name} {before[name]} -> {now[name]}" for name in now if name in before and before[name] != now[name]]
    if changed:
        log.warning("not bit-exact from here on: %s", ", ".join(changed))


def _train_step(
    call: nn.Module,
    micro_batches: Iterator[Batch],
    state: State,
    plan: Plan,
    sizes: tuple[int, int],
    world: World,
    guard: Guard,
    recheck: Recheck | None,
    *,
    settle: bool,
) -> None:
    """One optimizer update from all micro-batches of a step.

    Args:
        settle: make the passes once before, for DDP to settle: after its first exchange it puts gradients together in
            another order, and more than two processes then add them up in another one. Without this a run that goes on
            would have other bits than one that was never stopped.
    """
    lr = plan.schedule.lr(state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    if reach("train-flip"):
        flip_a_bit(state.model)
    again = recheck is not None and recheck.due()
    batches = list(micro_batches) if settle or again else micro_batches

    def passes(batches: Iterable[Batch]) -> tuple[Tensor, list[Tensor]]:
        return _passes(call, batches, state, plan, sizes, world)

    def rehearse() -> Tensor:
        """Make the passes of the step on copies of its batches, since some change their images."""
        return passes({name: value.clone() for name, value in batch.items()} for batch in batches)[0]

    if settle:
        rehearse()
        guard.undo()
    before = recheck.of_passes(rehearse()) if recheck and again else None
    if before:
        guard.undo()
    loss, ids = passes(batches)
    if recheck:
        if before:
            recheck.compare(before, recheck.of_passes(loss))
        recheck.look()
    guard.update(loss, ids, lr)
    if recheck:
        recheck.begin()


def _passes(
    call: nn.Module, batches: Iterable[Batch], state: State, plan: Plan, sizes: tuple[int, int], world: World
) -> tuple[Tensor, list[Tensor]]:
    """Run forward and backward on each micro-batch of a step; return this process's loss, (), and the images' ids.

    Every image of the global batch weighs the same, also in an uneven last micro-batch; DDP averages over processes. A
    process whose share is empty passes an image of another's with weight 0, since all have to take part in the exchange
    of gradients.
    """
    total = torch.zeros((), device=world.device)
    (whole, mine), done, ids = sizes, 0, []
    precision = plan.settings.precision
    with kept_casts(world.device) if plan.keep_casts else contextlib.nullcontext():
        for number, batch in enumerate(batches):
            # after the batch is there: a loader without workers draws from these generators too
            seed_all(plan.seed, state.step, world.rank, number)
            weight = len(batch["ids"]) * world.size / whole if mine else 0.0
            done += len(batch["ids"])
            ids.append(batch["ids"])
            if reach("train-memory"):
                raise torch.OutOfMemoryError("failpoint: tried to allocate 1.50 GiB")
            pass_ = autocast(precision, world.device, keep_casts=plan.keep_casts)
            with pass_, _no_sync(call, done < mine):
                loss = call(batch)["loss"] * weight
                state.scaler.scale(loss).backward()
            total += loss.detach().float()
    return total, ids


def _wrap(model: nn.Module, step: Step, settings: Loop, world: World) -> nn.Module:
    call: nn.Module = Call(model, step)
    if settings.compile:
        call.compile(dynamic=False)
    if world.size > 1:
        call = DistributedDataParallel(call, device_ids=[world.device] if world.device.type == "cuda" else None)
    return call


def _no_sync(call: nn.Module, more_to_come: bool) -> contextlib.AbstractContextManager[Any]:
    """Keep DDP from exchanging gradients before the last micro-batch of a step."""
    return call.no_sync() if more_to_come and isinstance(call, DistributedDataParallel) else contextlib.nullcontext()


def _scores(evaluate: Evaluate, model: nn.Module, average: Average | None) -> dict[str, float]:
    """Score the model, and its average under names with "ema_" before; modes are put back as they were."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():
        scores = dict(evaluate(model))
        if average:
            with average.applied():
                scores |= {f"ema_{name}": score for name, score in evaluate(model)}
    for module, training in modes.items():
        module.training = training
    return scores


def _main_log(
    run: Path, step: int, schedule: Schedule, batch_size: int, world: World
) -> contextlib.AbstractContextManager[Log | None]:
    if not world.is_main:
        return contextlib.nullcontext()
    return Log(run, start=step, total=schedule.total, batch_size=batch_size)


def _narrow(error: Exception, loader: Batches, plan: Plan, world: World, saved_at: int) -> None:
    """Let passes have fewer images after an allocation that failed; raise any other error again.

    Raises:
        MaekitError: E-STOP-MEMORY, E-ENV-MEMORY where ``micro_batch`` was given, where a pass had one image, and with
            several processes, which have to make the same passes: then the same command goes on with fewer.
    """
    if not is_out_of_memory(error):
        raise error
    before, auto = loader.micro_batch, plan.settings.micro_batch == "auto"
    smaller = next_smaller(before, -(-loader.batch_size // world.size))
    if auto and smaller is not None:
        plan.narrowed(smaller)
    if not auto or smaller is None or world.size > 1:
        raise out_of_memory(
            error, batch=loader.batch_size, micro_batch=before, smaller=smaller, saved_at=saved_at, noted=auto
        ) from None
    log.warning("out of memory with %d images per pass: %d from now on; not bit-exact", before, smaller)
    loader.micro_batch = smaller


def _log_line(state: State, schedule: Schedule, records: Log | None, data_wait: float, faults: int) -> None:
    """Write the mean loss since the last line; none where all these steps were left out.

    Args:
        data_wait: share of the time since the last line in which steps waited for data.
        faults: bits found that had flipped.
    """
    if not state.window:
        return
    loss = state.loss = math.fsum(state.window) / len(state.window)
    state.window = ()
    counts = {name: count for name, count in (("skipped", state.mishaps.skipped), ("sdc", faults)) if count}
    if records:
        epoch = round(state.step / schedule.steps_per_epoch, 4)
        values = {"epoch": epoch, "loss": loss, "lr": schedule.lr(state.step - 1), "data_wait": round(data_wait, 4)}
        records.record(state.step, {**values, **counts})
