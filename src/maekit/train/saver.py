"""Checkpoints written beside training: the loop waits only while the state is copied into memory.

One thread writes, one checkpoint at a time: who offers the next before the last is on the disk waits for that one. The
copy takes as much memory as the checkpoint, and is used again for the next. What a writer could not do reaches the loop
at the next step, and at the latest before the run says that it is saved: an exit code of 0 or 75 means that the last
promised checkpoint was verified. With ``save_errors: keep-going`` a disk that fails costs only a line and that
checkpoint, until the last one.
"""

import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor

from maekit.errors import MaekitError
from maekit.failpoints import reach
from maekit.train import checkpoint
from maekit.train.state import DIVERGED

log = logging.getLogger("maekit")

ON_DISK = ("E-STOP-DISK", "E-ENV-DISK")


class Saver:
    """Saves the state of one run; to be closed by ``with``, which waits for the writer.

    Args:
        folder: of the checkpoints.
        metadata: written into the weights of every one.
        keep: newest ones that stay.
        keep_every: those of its multiples stay, too.
        errors: "stop": a checkpoint that cannot be written ends the run; "keep-going": only the last one does.
    """

    def __init__(
        self, folder: Path, metadata: dict[str, str], *, keep: int, keep_every: int | None = None,
        errors: Literal["stop", "keep-going"] = "stop",
    ) -> None:  # fmt: skip
        self.folder, self.metadata, self.errors = folder, metadata, errors
        self.keep, self.keep_every = keep, keep_every
        self.pool = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[Path] | None = None
        self.copy: dict[str, dict[str, Tensor]] = {}
        self.slow = False

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> None:
        """Copy the state and begin to write it.

        Raises:
            MaekitError: what the checkpoint before this one came to: E-STOP-DISK, E-ENV-DISK, E-NUM-WEIGHTS.
        """
        began = time.monotonic()
        self.wait()
        if time.monotonic() - began > 1 and not self.slow:
            log.warning("checkpoints come faster than the disk takes them: training waits for it (--save-every)")
            self.slow = True
        self.copy = {part: _copied(named, self.copy.get(part, {})) for part, named in tensors.items()}
        if any(value.is_cuda for named in tensors.values() for value in named.values()):
            torch.cuda.synchronize()  # copies into pinned memory
        self.writing = self.pool.submit(self._write, step, state)

    def look(self) -> None:
        """Raise what the writer came to, if it has ended; costs nothing.

        Raises:
            MaekitError: as `save`.
        """
        if self.writing is not None and self.writing.done():
            self.wait()

    def wait(self, *, last: bool = False) -> None:
        """Wait until what was offered is on the disk and verified.

        Args:
            last: nothing else will be saved: no error is passed over.

        Raises:
            MaekitError: as `save`.
        """
        writing, self.writing = self.writing, None
        if writing is None:
            return
        try:
            writing.result()
        except MaekitError as error:
            if last or self.errors == "stop" or error.code not in ON_DISK:
                raise
            log.warning("%s; training goes on and tries again at the next checkpoint", error)

    def _write(self, step: int, state: dict[str, Any]) -> Path:
        reach("saver-write")
        if lost := checkpoint.not_finite(self.copy):
            raise MaekitError(
                "E-NUM-WEIGHTS", f"weights after step {step}", found=f"NaN or infinity in {lost}",
                expected="finite numbers", hint=DIVERGED,
            )  # fmt: skip
        return checkpoint.save(
            self.folder, step, self.copy, state, metadata=self.metadata, keep=self.keep, keep_every=self.keep_every
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait(last=True)
        except MaekitError as its:
            if error is None:
                raise
            log.warning("%s", its)  # beside what ends the run, not in its place
        finally:
            self.pool.shutdown()


def _copied(named: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `named` on the CPU, in the memory of an earlier copy where it fits: new memory costs more than copying."""
    found = {}
    for name, value in named.items():
        place = before.get(name)
        if place is None or place.shape != value.shape or place.dtype != value.dtype:
            place = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        found[name] = place.copy_(value.detach(), non_blocking=True)
    return found
