"""Bad numbers: no update is ever made with them, and the host is not asked in every step.

`Guard.update` stands between the gradients and the optimizer. A loss or a gradient norm that is not finite, or with
``--spike-sigma`` a loss far above the last ones, sets a flag **on the device**. While it is set every update leaves
weights, optimizer, average, buffers and loss scale as they are, to the bit. The host reads the flag where it reads the
losses anyway (a log line, a save, a score), so at most ``log_every`` steps later, and finds the state of just before
the bad step k. Then it answers, and the steps after k, whose updates were blocked too, are made again:

- ``--bad-numbers stop``: save this state, raise. The same command comes to the same number again.
- ``--bad-numbers skip``, and spikes: step k counts as done without an update, up to `LIMIT` of them one after another.
- ``--roll-back N``, after `LIMIT` spikes: back to the newest checkpoint, whose batches up to k are passed over (as in
  PaLM, arXiv 2204.02311, section 5.1), at most N times in a run.

So neither ``log_every`` nor a stop changes what comes out; all that decides is in the checkpoint (`Mishaps`). The
norm stands for a look at every gradient: it is one pass over them, and a gradient above 1e19, whose square would make
AdamW's second moment infinite for ever, counts as bad too. fp16's scaler leaves updates with too large gradients out by
itself and lowers its scale: there only the loss is judged, and a scale that sinks without end.

What is needed to make the bad step again is written to ``RUN/replay/step-K.safetensors``: `maekit.tasks.replay`.
"""

import json
import logging
import math
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from maekit.errors import MaekitError
from maekit.failpoints import reach
from maekit.settings import FORMAT, Loop
from maekit.train.checkpoint import Checkpoint
from maekit.train.device import World
from maekit.train.state import DIVERGED, State

log = logging.getLogger("maekit")

LIMIT = 20
"""Updates left out one after another before a run stops or rolls back; the same for fp16's scaler."""
WINDOW = 128
"""Losses that a spike is measured against, at least half of them (OLMo-core's skip-step: 128)."""
SMALLEST_SCALE = 2.0**-14
"""Of fp16: below it the scale makes gradients smaller than fp16's smallest normal number."""
REPLAYS = 3
"""Bad steps of a run that are kept to be looked at; one that stops it always is."""
HEADER = "maekit_replay"


@dataclass(frozen=True)
class Taken:
    """A step whose outcome is still on the device.

    Attributes:
        facts: (4,): loss, gradient norm, fp16's scale after the step, whether this or an earlier step was bad.
        mine: loss of this process.
        ids: of the images of this process, a tensor for each pass.
        lr: learning rate.
    """

    facts: Tensor
    mine: Tensor
    ids: list[Tensor]
    lr: float


@dataclass(frozen=True)
class Bad:
    """A step with a bad number.

    Attributes:
        step: number of the update that was not made, from 1.
        batch: number of the batch, from 0: another one after a roll-back.
        loss: of all processes.
        norm: of the gradient; 0 if it was not measured (fp16 without clipping).
        scale: of fp16; 1 without.
        lr: learning rate.
        losses: of each process.
        ids: of all images, in order of process.
        micro_batch: images of a pass.
    """

    step: int
    batch: int
    loss: float
    norm: float
    scale: float
    lr: float
    losses: list[float]
    ids: list[int]
    micro_batch: int

    @property
    def kind(self) -> str:
        """Return what is bad: "loss", "gradient" or "spike"."""
        if not math.isfinite(self.loss):
            return "loss"
        return "spike" if math.isfinite(self.norm) else "gradient"

    def __str__(self) -> str:
        """Say what is known, on one line."""
        value = f"a gradient norm of {self.norm}" if self.kind == "gradient" else f"a loss of {self.loss:.6g}"
        where = [str(rank) for rank, loss in enumerate(self.losses) if not math.isfinite(loss)]
        parts = [f"lr {self.lr:.3g}"] + ([f"scale {self.scale:g}"] if self.scale != 1 else [])
        parts += [f"process {', '.join(where)}"] if where and len(self.losses) > 1 else []
        first = ", ".join(map(str, self.ids[:5])) + (", ..." if len(self.ids) > 5 else "")
        return f"{value} ({'; '.join([*parts, f'{len(self.ids)} images, numbers {first}'])})"


class Guard:
    """Makes the updates of a run, and answers for those that it did not make.

    Args:
        state: of the run, as it begins or goes on.
        settings: clipping, what to do about bad numbers.
        seed: written into replay files.
        world: this process among all.
        run: folder of the run.
    """

    def __init__(self, state: State, settings: Loop, seed: int, world: World, run: Path) -> None:
        self.state, self.settings, self.seed, self.world, self.run = state, settings, seed, world, run
        self.parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
        self.frozen = torch.zeros((), dtype=torch.bool, device=world.device)
        self.one = torch.ones((), device=world.device)
        self.pending: list[Taken] = []
        self.begin()

    def begin(self) -> None:
        """Take the state as it now is for the one before the next step."""
        state = self.state
        changing = list(state.model.buffers())
        if state.scaler.is_enabled():
            state.scaler.scale(self.one)  # which makes its tensors
            changing += [state.scaler._scale, state.scaler._growth_tracker]  # pyright: ignore[reportPrivateUsage]
        self.changing = [tensor for tensor in changing if tensor is not None]
        self.before = [tensor.detach().clone() for tensor in self.changing]
        self.scale = float(state.scaler.scale(self.one))
        losses = state.mishaps.losses or [0.0] * WINDOW
        self.history = torch.tensor(losses, device=self.world.device)
        self.frozen.zero_()

    def batches(self, steps: Callable[[int, int], Iterator[Any]], stop: int) -> Iterator[Any]:
        """Yield the micro-batches of the state's next step, also after the state has gone back, until step `stop`."""
        coming, found = -1, iter(())
        while self.state.step < stop:
            shift = self.state.mishaps.shift
            if coming != self.state.step + shift:
                coming, found = self.state.step + shift, steps(self.state.step + shift, stop + shift)
            coming += 1
            yield next(found)

    # -------------------------------------------------------------------------------------------- on the device

    @torch.no_grad()
    def update(self, loss: Tensor, ids: list[Tensor], lr: float) -> None:
        """Make the optimizer's update and the average's, unless this step or one not yet read is bad.

        Args:
            loss: of this process, (); afterwards the mean of all processes.
            ids: of the images of this process, a tensor for each pass.
            lr: learning rate, for the message.
        """
        state, scaler = self.state, self.state.scaler
        if reach("numbers-loss"):
            loss.fill_(math.nan)
        if reach("numbers-gradient"):
            self.parameters[0].grad = torch.full_like(self.parameters[0], math.inf)
        mine = loss
        if self.world.size > 1:
            mine = loss.clone()
            torch.distributed.all_reduce(loss)
            loss /= self.world.size
        self.frozen |= ~loss.isfinite() | self._is_spike(loss)
        if scaler.is_enabled():
            self._poison()
        norm = self._norm()
        if not scaler.is_enabled():  # otherwise the scaler minds it
            self.frozen |= ~norm.isfinite()
        self._step()
        scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        if state.average:
            state.average.update(state.step, 1 - self.frozen.float())
        # batch norm's statistics, a codebook and the scale move with the passes themselves; versions do not tell of it
        for tensor, before in zip(self.changing, self.before, strict=True):
            tensor.copy_(torch.where(self.frozen, before, tensor))
            before.copy_(tensor)
        if self.settings.spike_sigma:
            at = state.mishaps.accepted % WINDOW
            self.history[at] = torch.where(self.frozen, self.history[at], loss)
            state.mishaps.accepted += 1
        facts = torch.stack([loss, norm, scaler.scale(self.one), self.frozen.float()])
        self.pending.append(Taken(facts, mine, ids, lr))

    def _is_spike(self, loss: Tensor) -> Tensor:
        """Tell whether the loss lies far above the last ones, those that were bad left out."""
        count = min(self.state.mishaps.accepted, WINDOW)
        if not self.settings.spike_sigma or count < WINDOW // 2:
            return torch.zeros_like(self.frozen)
        past = self.history[:count]
        # losses that never change have no deviation, and rounding is no spike
        deviation = past.std().clamp_min(1e-3 * past.mean().abs())
        return loss > past.mean() + self.settings.spike_sigma * deviation

    def _poison(self) -> None:
        """Let fp16's scaler, which looks for infinite gradients by itself, find one if the update is blocked."""
        gradient = min((p.grad for p in self.parameters if p.grad is not None), key=Tensor.numel)
        gradient += torch.where(self.frozen, math.nan, 0.0).to(gradient.dtype)

    def _norm(self) -> Tensor:
        """Clip gradients where that is asked for, and return their norm before it."""
        if self.settings.clip_grad:
            self.state.scaler.unscale_(self.state.optimizer)
            return nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_grad)
        if self.state.scaler.is_enabled():
            return torch.zeros_like(self.one)
        return nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def _step(self) -> None:
        optimizer = self.state.optimizer
        if self.state.scaler.is_enabled():
            self.state.scaler.step(optimizer)
        elif getattr(optimizer, "_step_supports_amp_scaling", False):  # the fused kernels of torch ask for the flag
            optimizer.found_inf = self.frozen.float()  # pyright: ignore[reportAttributeAccessIssue]
            optimizer.step()
        else:
            _step_or_undo(optimizer, self.parameters, self.frozen)

    def undo(self) -> None:
        """Take back what a step that broke off has changed: gradients, buffers and what modules have noted."""
        self.state.optimizer.zero_grad(set_to_none=True)
        for tensor, before in zip(self.changing, self.before, strict=True):
            tensor.copy_(before)
        for module in self.state.model.modules():
            getattr(module, "forget", lambda: None)()

    # ---------------------------------------------------------------------------------------------- on the host

    def read(self, save: Callable[[], None]) -> Bad | None:
        """Wait for the device and take its losses; at a bad step put the state's counters back to before it.

        Args:
            save: writes a checkpoint of the state.

        Raises:
            MaekitError: E-NUM-SCALE.
        """
        taken, state, mishaps = self.pending, self.state, self.state.mishaps
        if not taken:
            return None
        self.pending = []
        rows = torch.stack([one.facts for one in taken]).tolist()
        good = next((number for number, row in enumerate(rows) if row[3]), len(rows))
        undone = len(rows) - good
        state.window += tuple(row[0] for row in rows[:good])
        state.step -= undone
        if good:
            mishaps.streak = 0
        if self.settings.spike_sigma:
            mishaps.accepted -= undone
            mishaps.losses = self.history.tolist()
        self._mind_scale([row[2] for row in rows[:good]], save)
        if not undone:
            return None
        self.frozen.zero_()
        (loss, norm, scale, _), one = rows[good], taken[good]
        losses = self.world.gather(one.mine.cpu().view(1)).tolist()
        ids = self.world.gather(torch.cat([part.cpu() for part in one.ids])).tolist()
        passes = len(one.ids[0]) if one.ids else 0
        return Bad(state.step + 1, state.step + mishaps.shift, loss, norm, scale, one.lr, losses, ids, passes)

    def _mind_scale(self, scales: Sequence[float], save: Callable[[], None]) -> None:
        if not self.state.scaler.is_enabled() or not scales:
            return
        streaks = overflowing(self.scale, scales, self.state.mishaps.overflows)
        self.scale, self.state.mishaps.overflows = scales[-1], streaks[-1]
        if max(streaks) >= LIMIT or min(scales) < SMALLEST_SCALE:
            save()
            self.world.barrier()
            raise MaekitError(
                "E-NUM-SCALE", f"the loss scale of fp16 up to step {self.state.step}",
                found=f"{min(scales):.3g}, {max(streaks)} updates in a row left out",
                expected=f"at least {SMALLEST_SCALE:.3g}, fewer than {LIMIT} in a row",
                hint="--precision bf16, or fp32, in another --out; --init RUN takes up its weights; those of step "
                f"{self.state.step} are saved",
            )  # fmt: skip

    def answer(self, bad: Bad, save: Callable[[], None], newest: Callable[[], Checkpoint | None]) -> bool:
        """Leave the update out, roll back or stop; return whether the state is now an earlier one.

        Args:
            bad: what `read` returned.
            save: writes a checkpoint of the state.
            newest: returns the newest one.

        Raises:
            MaekitError: E-NUM-LOSS, E-NUM-GRADIENT, E-NUM-SPIKE.
        """
        mishaps, spike = self.state.mishaps, bad.kind == "spike"
        tolerated = spike or self.settings.bad_numbers == "skip"
        if tolerated and mishaps.streak + 1 < LIMIT:
            replay = self._write_replay(bad) if mishaps.skipped < REPLAYS else None
            self.state.step += 1
            mishaps.streak += 1
            mishaps.skipped += 1
            log.warning("update %d left out: %s%s", bad.step, bad, f"; maekit replay {replay}" if replay else "")
            return False
        if spike and mishaps.rolled_back < self.settings.roll_back and (saved := newest()) is not None:
            self._roll_back(bad, saved)
            return True
        replay = self._write_replay(bad)
        save()
        self.world.barrier()  # whoever ends first ends the others
        raise _stop(bad, mishaps.streak, replay, self.run)

    def _roll_back(self, bad: Bad, saved: Checkpoint) -> None:
        before = self.state.mishaps
        self.state.restore(saved)
        now = self.state.mishaps
        now.shift = before.shift + bad.step - saved.step
        now.rolled_back, now.skipped, now.streak = before.rolled_back + 1, before.skipped + 1, 0
        self.begin()
        log.warning(
            "%d spikes in a row: back to step %d; %d batches are passed over", LIMIT, saved.step, bad.step - saved.step
        )

    def _write_replay(self, bad: Bad) -> Path | None:
        """Write weights and what else makes the step again; None where that failed, as on a full disk."""
        path = self.run / "replay" / f"step-{bad.step}.safetensors"
        if not self.world.is_main:
            return path
        facts = {
            "format": FORMAT, **asdict(bad), "kind": bad.kind, "seed": self.seed, "world": self.world.size,
            "precision": self.settings.precision,
        }  # fmt: skip
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state.weights().items()}
        temporary = self.run / f".tmp-{uuid.uuid4().hex}"  # where the next launch deletes what a kill left
        try:
            path.parent.mkdir(exist_ok=True)
            with temporary.open("xb") as file:
                file.write(safetensors.torch.save(weights, {HEADER: json.dumps(facts)}))
            os.replace(temporary, path)
        except OSError as error:
            log.warning("no replay file: %s", error)
            temporary.unlink(missing_ok=True)
            return None
        return path


def _step_or_undo(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], frozen: Tensor) -> None:
    """Step with an optimizer that has no flag (LARS: a probe's small head), and take it back where `frozen`."""

    def tensors(parameter: nn.Parameter) -> dict[str, Tensor]:
        return {name: value for name, value in optimizer.state[parameter].items() if isinstance(value, Tensor)}

    before = [(p.detach().clone(), {name: value.clone() for name, value in tensors(p).items()}) for p in parameters]
    optimizer.step()
    for parameter, (weights, state) in zip(parameters, before, strict=True):
        parameter.copy_(torch.where(frozen, weights, parameter))
        for name, value in tensors(parameter).items():  # a momentum that was not there before was as good as 0
            value.copy_(torch.where(frozen, state.get(name, torch.zeros_like(value)), value))


def overflowing(before: float, scales: Sequence[float], streak: int) -> list[int]:
    """Return, for each step, how many updates one after another fp16's scaler had left out up to it.

    Args:
        before: scale before the first of these steps.
        scales: after each; the scaler lowers it when it leaves an update out.
        streak: up to the step before the first.

    >>> overflowing(8.0, [8.0, 4.0, 2.0, 2.0], 5)
    [0, 1, 2, 0]
    """
    streaks = []
    for scale in scales:
        streak = streak + 1 if scale < before else 0
        streaks.append(streak)
        before = scale
    return streaks


def _stop(bad: Bad, streak: int, replay: Path | None, run: Path) -> MaekitError:
    code = {"loss": "E-NUM-LOSS", "gradient": "E-NUM-GRADIENT", "spike": "E-NUM-SPIKE"}[bad.kind]
    what = {"loss": "loss", "gradient": "gradient", "spike": "loss"}[bad.kind]
    hints = [] if replay is None else [f"maekit replay {replay}"]
    hints += [] if bad.kind == "spike" or streak else [f"--bad-numbers skip with --out {run}"]
    return MaekitError(
        code,
        f"{what} of step {bad.step}" + (f", after {streak} updates in a row that were left out" if streak else ""),
        found=bad,
        expected="one near the last" if bad.kind == "spike" else "a finite number",
        hint="; ".join([*hints, DIVERGED]) + f"; the weights of step {bad.step - 1} are saved",
    )
