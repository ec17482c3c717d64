"""Silent corruption: what memory or arithmetic got wrong without a word (``--sdc-check N``).

Three looks, none of which changes a bit of the run. Each compares sums of bits (XOR: exact in any order, so on any
device; one flipped bit always shows).

- Nothing but an update may change weights, moments and average: their sums are taken after each update, and again just
  before the next one and before a save.
- Every N steps the passes are computed twice, from the same weights, images and seeds: loss, gradients and buffers have
  the same bits. Only on the CPU: on a GPU the kernels of attention and convolution add up in no fixed order.
- With several processes the sums of all are the same.

What differs is noted on the device and read by the host where the loop waits anyway, every N steps at the latest, and
before anything is saved. Then the run stops: the newest checkpoint is from before, the state is not. Faults are kept in
``RUN/sdc.jsonl``, for whoever has to be shown that a machine is broken, and counted in metrics.jsonl ("sdc").

Not seen are images that were wrong before the first of both passes, an update that was computed wrongly in the only
process, and a fault that comes in the same way twice.
"""

import contextlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from maekit.disk import own_file
from maekit.errors import MaekitError
from maekit.train.device import World
from maekit.train.log import Log, read_metrics
from maekit.train.state import State

log = logging.getLogger("maekit")

FILE = "sdc.jsonl"
CHANGED, TWICE, APART = range(3)
TOLD = ("changed between two updates", "came out otherwise the second time", "is not the same in all processes")
NEVER = 2**62

Named = tuple[list[str], Tensor]
"""Names, and the sums of what they name, (n,)."""


class Recheck:
    """Looks for silent corruption in a run.

    Args:
        state: of the run, as it begins or goes on.
        every: steps between those that are computed twice.
        world: this process among all.
        run: folder of the run.

    Raises:
        MaekitError: E-ENV-DEVICE where bits cannot be summed.
    """

    def __init__(self, state: State, every: int, world: World, run: Path) -> None:
        self.state, self.every, self.world, self.file = state, every, world, run / FILE
        kind = world.device.type
        if kind not in ("cpu", "cuda"):
            raise MaekitError(
                "E-ENV-DEVICE", "setting sdc_check", found=kind, expected="cpu or cuda", hint="--sdc-check 0"
            )
        self.repeats = kind == "cpu"
        if not self.repeats:
            log.info("sdc_check: on %s no step gives the same bits twice; only weights are compared", kind)
        self.count = len(read_metrics(self.file))
        """Faults found so far, in earlier launches too."""
        self.noted: list[tuple[int, int, list[str], Tensor]] = []
        self.begin()

    def begin(self) -> None:
        """Take the state as it now is for the one that nothing but an update may change."""
        parts = {**self.state.tensors(), "model": dict(self.state.model.named_parameters())}
        named = {f"{name} ({part})": value for part, tensors in parts.items() for name, value in tensors.items()}
        self.watched = {name: value for name, value in named.items() if value.device.type == self.world.device.type}
        self.sums = sums(self.watched.values())

    def due(self) -> bool:
        """Tell whether the passes of the coming step are to be computed twice."""
        return self.repeats and (self.state.step + 1) % self.every == 0

    def of_passes(self, loss: Tensor) -> Named:
        """Return what the passes of a step gave: loss, gradients, buffers."""
        model = self.state.model
        gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        named = {"loss": loss, **gradients, **dict(model.named_buffers())}
        return list(named), sums(named.values())

    def compare(self, first: Named, second: Named) -> None:
        """Note what is not the same in the coming step's passes, computed twice."""
        assert first[0] == second[0]
        self.noted.append((self.state.step + 1, TWICE, first[0], first[1] != second[1]))

    def look(self) -> None:
        """Note what has changed since the last update."""
        changed = sums(self.watched.values()) != self.sums
        self.noted.append((self.state.step + 1, CHANGED, list(self.watched), changed))

    def read(self, saved_at: int, records: Log | None) -> None:
        """Look once more, and wait for the device; in all processes at the same step.

        Args:
            saved_at: step of the newest checkpoint, -1 if there is none.
            records: where the count of faults goes.

        Raises:
            MaekitError: E-NUM-SDC.
        """
        self.look()
        noted, self.noted = self.noted, []
        flags = torch.cat([wrong for *_, wrong in noted]).cpu().split([len(names) for *_, names, _ in noted])
        mine = [(note[0], note[1], first(wrong)) for note, wrong in zip(noted, flags, strict=True) if wrong.any()]
        rows = self.world.gather(torch.tensor([min(mine, default=(NEVER, 0, 0))]))
        step, kind, at, rank = min((*row, rank) for rank, row in enumerate(rows.tolist()))
        if step < NEVER:
            names = next(note[2] for note in noted if note[:2] == (step, kind))
            raise self._fault(step, f"{names[at]}, which {TOLD[kind]}", rank, saved_at, records)
        every = self.world.gather(self.sums.cpu()[None])
        apart = (every != every[0]).any(0)
        if apart.any():
            name = list(self.watched)[first(apart)]
            raise self._fault(self.state.step, f"{name}, which {TOLD[APART]}", None, saved_at, records)

    def _fault(self, step: int, found: str, rank: int | None, saved_at: int, records: Log | None) -> MaekitError:
        """Write a fault down and return what is said of it."""
        self.count += 1
        if self.world.is_main:
            line = json.dumps({"step": step, "found": found, "process": rank})
            with (
                contextlib.suppress(OSError),
                open(self.file, "a", encoding="utf-8", opener=own_file) as file,
            ):
                file.write(line + "\n")
        if records:
            records.record(self.state.step, {"sdc": self.count})
        where = f" (process {rank})" if self.world.size > 1 and rank is not None else ""
        goes_on = f"goes on from step {saved_at}" if saved_at >= 0 else "begins anew"
        return MaekitError(
            "E-NUM-SDC", f"silent corruption in step {step}", found=found + where, expected="the same bits",
            hint=f"the same command, which {goes_on}; if it happens again ({self.count} so far), another machine: its "
            "memory or processor fails",
        )  # fmt: skip


def sums(tensors: Iterable[Tensor]) -> Tensor:
    """Return the XOR of the bits of each tensor's numbers, (n,) int64, on their device."""
    return torch.stack([torch.hash_tensor(value.detach()).view(torch.int64) for value in tensors])


def first(flags: Tensor) -> int:
    """Return the place of the first that is set."""
    return int(flags.int().argmax())


@torch.no_grad()
def flip_a_bit(model: nn.Module) -> None:
    """Flip one bit of a float32 weight, as a bad memory cell does; for tests."""
    weight = next(p for p in model.parameters() if p.requires_grad)
    weight.view(-1)[:1].view(torch.int32).bitwise_xor_(1 << 12)
