"""All that moves during a run, and its way into a checkpoint and back: weights, optimizer, average, scaler, step."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maekit.errors import MaekitError
from maekit.train import checkpoint

DIVERGED = "another --out with a lower --base-lr or --clip-grad 1; --init RUN takes up a checkpoint made before this"


class Average:
    """Exponential moving average of trainable weights, with warm-up min(decay, (1 + t) / (10 + t)) (as in timm)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.tensors = {name: p.detach().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def update(self, step: int, take: Tensor) -> None:
        """Take the weights after update number `step` (from 1) in; `take`, on the device, is 0 to leave all as it is.

        A weight that is a tensor gives the bits of one that is a number, at the same speed.
        """
        weight = take * (1 - min(self.decay, (1 + step) / (10 + step)))
        for name, parameter in self.live.items():
            self.tensors[name].lerp_(parameter, weight)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the model for the time of the block."""
        kept = {name: p.detach().clone() for name, p in self.live.items()}
        self._copy(self.tensors)
        try:
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.live.items():
            parameter.copy_(tensors[name])


@dataclass
class Mishaps:
    """What went wrong so far and decides how a run goes on (`maekit.train.guard`).

    Attributes:
        skipped: updates left out.
        streak: of them, those one after another up to now.
        rolled_back: times that the run went back to a checkpoint.
        shift: steps whose batches were passed over in doing so.
        overflows: updates one after another that fp16's scaler left out, up to now.
        accepted: losses that entered `losses`.
        losses: the last ones, as a ring: number n stands at n modulo its length; empty where nobody asks for it.
    """

    skipped: int = 0
    streak: int = 0
    rolled_back: int = 0
    shift: int = 0
    overflows: int = 0
    accepted: int = 0
    losses: list[float] = field(default_factory=list)


@dataclass
class State:
    """All that moves during a run, and its way into a checkpoint and back."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: Average | None
    circumstances: dict[str, Any] = field(default_factory=dict)
    """What rounding depends on beside the settings (`maekit.train.device.circumstances`)."""
    run: str = ""
    """Identity of the run, kept in its checkpoints; empty for runs of older releases."""
    step: int = 0
    window: tuple[float, ...] = ()
    """Losses of the steps since the last log line."""
    loss: float | None = None
    """Mean loss of the last log line."""
    mishaps: Mishaps = field(default_factory=Mishaps)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return weights, optimizer state and average by part and name."""
        parts = {"model": dict(self.model.state_dict()), "optimizer": self._optimizer_tensors()}
        return parts | ({"ema": self.average.tensors} if self.average else {})

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        """Return the model's tensors; for "ema_" with the average in place of what is trained."""
        averaged = self.average.tensors if self.average and prefix == "ema_" else {}
        return dict(self.model.state_dict()) | averaged

    def numbers(self) -> dict[str, Any]:
        """Return all else that a checkpoint keeps, as plain JSON."""
        scaler = self.scaler.state_dict()
        losses = {"window": list(self.window), "loss": self.loss}
        more = {"circumstances": self.circumstances, "mishaps": asdict(self.mishaps)}
        return {"step": self.step, **losses, "scaler": scaler, **more, "run": self.run}

    def sha256(self) -> str:
        """Return the digest that a checkpoint of this state has."""
        numbers = self.numbers()
        return checkpoint.state_sha256(self.tensors(), {name: numbers[name] for name in checkpoint.DECIDING})

    def mean_loss(self) -> float:
        """Return the mean loss since the last log line, or that line's own."""
        return math.fsum(self.window) / len(self.window) if self.window else (self.loss or math.nan)

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Take a checkpoint's state over.

        Raises:
            MaekitError: E-CKPT-MODEL if it belongs to another model or optimizer.
        """
        theirs = saved.tensors
        try:  # sums that match do not say that these are there
            window, loss, scaler = tuple(saved.state["window"]), saved.state["loss"], saved.state["scaler"]
            mishaps = Mishaps(**saved.state.get("mishaps", {}))  # a checkpoint of best weights has none
        except (KeyError, TypeError) as error:
            raise MaekitError("E-CKPT-DAMAGED", f"state of {saved.path}", found=f"none of a training: {error}",
                              hint="the previous checkpoint") from error  # fmt: skip
        _same_shapes(self.tensors()["model"], theirs["model"], saved.path)
        self.model.load_state_dict(theirs["model"])
        self._restore_optimizer(theirs.get("optimizer", {}), saved.path)
        if self.average:
            _same_shapes(self.average.tensors, theirs.get("ema", {}), saved.path)
            for name, value in theirs["ema"].items():
                self.average.tensors[name].copy_(value)
        self.step, self.window, self.loss, self.mishaps = saved.step, window, loss, mishaps
        if scaler:
            self.scaler.load_state_dict(scaler)

    def _restore_optimizer(self, tensors: dict[str, Tensor], path: Path) -> None:
        """Hand each parameter's tensors to the optimizer's own loading, which knows where each belongs."""
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, _, kind = key.rpartition("/")
            by_name.setdefault(name, {})[kind] = value
        names = {parameter: name for name, parameter in self._named()}
        order = [p for group in self.optimizer.param_groups for p in group["params"]]
        if unknown := by_name.keys() - set(names.values()):
            raise MaekitError(
                "E-CKPT-MODEL", f"optimizer state in {path}", found=sorted(unknown)[0], expected="this run's parameters"
            )
        whole = self.optimizer.state_dict()
        whole["state"] = {i: by_name[names[p]] for i, p in enumerate(order) if names[p] in by_name}
        self.optimizer.load_state_dict(whole)

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}/{key}": value
            for name, parameter in self._named()
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }


def _same_shapes(mine: dict[str, Tensor], theirs: dict[str, Tensor], path: Path) -> None:
    wrong = sorted(mine.keys() ^ theirs.keys()) or [k for k in mine if mine[k].shape != theirs[k].shape]
    if wrong:
        raise MaekitError(
            "E-CKPT-MODEL",
            f"checkpoint {path}",
            found=f"{len(wrong)} tensors missing, unknown or of another shape, the first {wrong[0]}",
            expected="this run's model",
            hint="another --out",
        )
