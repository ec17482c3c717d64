"""The learning rate of every step: linear warm-up from 0, then half a cosine to the floor.

Per optimizer step, not per epoch, as the official pre-training and fine-tuning do it (arXiv 2111.06377, appendix A).
"""

import math
from dataclasses import dataclass

from maekit.errors import MaekitError
from maekit.settings import Loop

WARMUP = 0.05
"""Share of the schedule when nothing is said: 40 of 800 epochs (paper table 8), 5 of 100 (table 9)."""


def half_cosine(step: int, *, total: int, warmup: int, peak: float, floor: float = 0.0) -> float:
    """Return the learning rate with which update number `step` (from 0) is made.

    >>> [round(half_cosine(s, total=10, warmup=4, peak=1.0), 3) for s in (0, 2, 4, 7, 10)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if step < warmup:
        return peak * step / warmup
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


@dataclass(frozen=True)
class Schedule:
    """Length and learning rate of a run, in optimizer steps."""

    total: int
    warmup: int
    peak: float
    floor: float
    steps_per_epoch: int

    def lr(self, step: int) -> float:
        """Return the learning rate of update number `step` (from 0)."""
        return half_cosine(step, total=self.total, warmup=self.warmup, peak=self.peak, floor=self.floor)


def schedule(settings: Loop, steps_per_epoch: int, global_batch: int) -> Schedule:
    """Turn epochs and base learning rate into steps and the rate itself: lr = base_lr * global_batch / 256.

    Raises:
        MaekitError: E-CONFIG-LENGTH without a length or with a warm-up longer than the schedule,
            E-CONFIG-LR without a rate.
    """
    if settings.steps is None and settings.epochs is None:
        raise MaekitError("E-CONFIG-LENGTH", "length of the schedule", found="none", hint="--epochs N or --steps N")
    total = settings.steps or max(1, round((settings.epochs or 0) * steps_per_epoch))
    warmup = settings.warmup_steps
    if warmup is None and settings.warmup_epochs is None:
        warmup = round(WARMUP * total)
    elif warmup is None:
        warmup = round((settings.warmup_epochs or 0) * steps_per_epoch)
    if warmup > total:
        raise MaekitError(
            "E-CONFIG-LENGTH",
            "warm-up longer than the schedule",
            found=f"{warmup} steps of {total}",
            expected="at most the schedule's length",
            hint=f"--warmup-steps {max(1, total // 10)}",
        )
    if settings.lr is None and settings.base_lr is None:
        raise MaekitError("E-CONFIG-LR", "learning rate", found="none", hint="--base-lr 1.5e-4")
    peak = settings.lr if settings.lr is not None else (settings.base_lr or 0) * global_batch / 256
    if settings.min_lr > peak:
        raise MaekitError(
            "E-CONFIG-LR",
            "setting min_lr",
            found=settings.min_lr,
            expected=f"at most the peak {peak:.3g}",
            hint="--min-lr 0",
        )
    return Schedule(total, warmup, peak, settings.min_lr, steps_per_epoch)
