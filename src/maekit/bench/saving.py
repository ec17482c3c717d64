"""What a checkpoint costs training: steps with a save in them over the same steps without, in turns.

It is saved as the training loop does (`maekit.train.saver`): copied into memory while the loop waits, then written,
synced, read back and compared beside training. For comparison a third turn waits for all of that. A round is as long
as two saves, so that one ends within it; the rest of one that does not is counted too.
"""

import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maekit.bench.contenders import Contender, turns
from maekit.bench.machine import wait
from maekit.train import checkpoint
from maekit.train.saver import Saver
from maekit.train.state import State

FEWEST_STEPS = 4
"""Of a round."""


@dataclass(frozen=True)
class Cost:
    """What saves of one kind cost, in seconds; a number for each round.

    Attributes:
        stall: the loop waited for the copy.
        write: the writer took, from the copy to a verified checkpoint in its place.
        added: a round took longer than that without a save.
    """

    stall: list[float]
    write: list[float]
    added: list[float]


@dataclass(frozen=True)
class Costs:
    """What a checkpoint costs.

    Attributes:
        bytes: of its files; the copy takes as much memory.
        steps: of a round.
        step_seconds: without saves, median of the rounds.
        beside: as the loop saves.
        waited: training stands still until it is verified.
        late: rounds of the first kind that were over before the save was.
    """

    bytes: int
    steps: int
    step_seconds: float
    beside: Cost
    waited: Cost
    late: int

    @property
    def seconds(self) -> float:
        """What a save beside training adds to it, median of the rounds."""
        return statistics.median(self.beside.added)

    def share(self, steps: int) -> float:
        """Return the share of training time that saves take, one every so many steps."""
        return self.seconds / (self.seconds + steps * self.step_seconds)


class _Timed(Saver):
    """A saver that keeps how long each write took."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seconds: list[float] = []

    def _write(self, step: int, state: dict[str, Any]) -> Path:
        began = time.perf_counter()
        path = super()._write(step, state)
        self.seconds.append(time.perf_counter() - began)
        return path


def costs(contender: Contender, images: Tensor, folder: Path, metadata: dict[str, str], rounds: int) -> Costs:
    """Measure saving a training.

    Args:
        contender: maekit.
        images: (B, C, H, W).
        folder: for the checkpoints, on the disk that is measured.
        metadata: written into the weights.
        rounds: of each kind.

    Raises:
        MaekitError: E-STOP-DISK, E-ENV-DISK.
    """
    with _Timed(folder, metadata, keep=1) as saver:
        training = _Training(contender, images, saver)
        times = turns({"none": training.alone, "beside": training.beside, "waited": training.waited}, rounds)
        size = sum(file.stat().st_size for file in checkpoint.steps(folder)[0].iterdir())
    found = {
        kind: Cost(
            [stall for stall, _ in seen[1:]],  # the first round warms up
            [write for _, write in seen[1:]],
            [taken - alone for taken, alone in zip(times[kind], times["none"], strict=True)],
        )
        for kind, seen in training.seen.items()
    }
    step = statistics.median(times["none"]) / training.steps
    return Costs(size, training.steps, step, found["beside"], found["waited"], training.late)


class _Training:
    """Rounds of as many steps: with no save, with one beside them, with one before them.

    Attributes:
        steps: of a round.
        seen: for each kind of save, how long the loop stood still for the copy and how long the writer took.
        late: rounds that were over before the save beside them was.
    """

    def __init__(self, contender: Contender, images: Tensor, saver: _Timed) -> None:
        self.contender, self.images, self.saver = contender, images, saver
        scaler = torch.amp.GradScaler(images.device.type, enabled=contender.precision == "fp16")
        self.state = State(contender.model, contender.optimizer, scaler, None)
        self.seen: dict[str, list[tuple[float, float]]] = {"beside": [], "waited": []}
        self.late = 0
        contender.seconds(images)  # moments are there from then on, and with the first save the copy's memory
        step = min(contender.seconds(images) for _ in range(2))
        self._save()
        saver.wait()
        self.steps = max(FEWEST_STEPS, math.ceil(2 * saver.seconds[-1] / step))

    def alone(self) -> float:
        """Return the seconds of a round without a save."""
        began = time.perf_counter()
        for _ in range(self.steps):
            self.contender.step(self.images)
            self.saver.look()
        wait(self.images.device)
        return time.perf_counter() - began

    def beside(self) -> float:
        """Return the seconds of a round whose save is written beside its steps, and of the rest of that save."""
        began = time.perf_counter()
        stall = self._save()
        self.alone()
        self.late += self.saver.writing is not None and not self.saver.writing.done()
        self.saver.wait()
        seconds = time.perf_counter() - began
        self.seen["beside"].append((stall, self.saver.seconds[-1]))
        return seconds

    def waited(self) -> float:
        """Return the seconds of a round whose save is verified before its first step."""
        began = time.perf_counter()
        stall = self._save()
        self.saver.wait()
        self.seen["waited"].append((stall, self.saver.seconds[-1]))
        return time.perf_counter() - began + self.alone()

    def _save(self) -> float:
        """Begin to save; return how long the loop stood still."""
        began = time.perf_counter()
        self.state.step += 1  # a name of its own for each
        self.saver.save(self.state.step, self.state.tensors(), self.state.numbers())
        return time.perf_counter() - began
