"""Decoded pictures that stay in memory, one copy for all loader processes.

Decoding a picture of 32 px takes longer than cropping it, every epoch anew. Where all pictures of a source are expected
to fit, each is kept when it has been decoded for the first time, whoever did it. They lie in a file without a name that
every process maps: no process holds a copy, nothing is read beforehand, and memory is taken as pictures come.

A worker may be killed at any moment, so nothing waits for another process: space is taken under a record lock, which
the system gives back when its holder ends, and a picture is announced after its pixels have been written. What a kill
leaves is a gap.
"""

import fcntl
import logging
import mmap
import os
from multiprocessing import reduction
from typing import Any

import torch
from torch import Tensor

from maekit.data.columns import nameless_file

WORD = 8
"""Bytes of one number in the table."""
ROW = 4
"""Numbers of a picture: one more than the place of its pixels (0: not kept), channels, height, width."""
HEAD = 3
"""Numbers before the rows: bytes taken, pictures offered, bytes of those offered."""
SHARE = 4
"""Of the memory that is free at the start, no more than one part in so many is taken."""

log = logging.getLogger("maekit")


def room_for(count: int, most: int) -> "Decoded | None":
    """Return room for that many pictures, None for no bytes or where the system has none.

    Args:
        count: of all pictures of the source.
        most: bytes that they may take; less where a quarter of the free memory is less.
    """
    most = min(most, _free() // SHARE)
    try:
        return Decoded(count, most) if most else None
    except OSError as error:  # a limit of the process: ulimit -f, -v
        log.info("decoded images do not stay in memory: %s", error.strerror)
        return None


class Decoded:
    """Pictures by index.

    Args:
        count: of all pictures of the source.
        most: bytes that they may take.

    Raises:
        OSError: where that is not allowed.
    """

    def __init__(self, count: int, most: int) -> None:
        self.count, self.most = count, most
        self._map(nameless_file(self._first + self.most))

    @property
    def _first(self) -> int:
        return -(-WORD * (HEAD + ROW * self.count) // mmap.PAGESIZE) * mmap.PAGESIZE

    def _map(self, handle: int) -> None:
        self._handle = handle
        self._memory = mmap.mmap(handle, self._first + self.most)
        self._table = memoryview(self._memory)[: WORD * (HEAD + ROW * self.count)].cast("q")
        self._pixels = torch.frombuffer(self._memory, dtype=torch.uint8, offset=self._first)

    def get(self, index: int) -> Tensor | None:
        """Return picture `index`, (C, H, W) uint8 that must not be changed, or None."""
        if not self._table[0]:
            return None
        at = HEAD + ROW * index
        place = self._table[at]
        if not place:
            return None
        channels, height, width = self._table[at + 1], self._table[at + 2], self._table[at + 3]
        return self._pixels.as_strided((channels, height, width), (1, width * channels, channels), place - 1)

    def offer(self, index: int, image: Tensor) -> None:
        """Keep a picture, if all like it are expected to fit; arrays of floats are never kept."""
        if image.dtype != torch.uint8 or (place := self._take(image.numel())) is None:
            return
        channels, height, width = image.shape
        kept = self._pixels.as_strided((channels, height, width), (1, width * channels, channels), place)
        kept.copy_(image)
        at = HEAD + ROW * index
        self._table[at + 1], self._table[at + 2], self._table[at + 3] = channels, height, width
        self._table[at] = place + 1

    @property
    def expected(self) -> int | None:
        """Bytes that all pictures will take, judged by those offered so far; None where they will not be kept."""
        offered = self._table[1]
        whole = self._table[2] * self.count // offered if offered else 0
        return whole if 0 < whole <= self.most else None

    def _take(self, size: int) -> int | None:
        """Return where there is space for `size` bytes."""
        fcntl.lockf(self._handle, fcntl.LOCK_EX)
        try:
            self._table[1] += 1
            self._table[2] += size
            place = self._table[0]
            if self.expected is None or place + size > self.most:
                return None
            self._table[0] += size
            return place
        finally:
            fcntl.lockf(self._handle, fcntl.LOCK_UN)

    def __getstate__(self) -> dict[str, Any]:
        """Hand the file itself over to a process that is being started."""
        return {"count": self.count, "most": self.most, "handle": reduction.DupFd(self._handle)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.count, self.most = state["count"], state["most"]
        self._map(state["handle"].detach())

    def __del__(self) -> None:
        if (handle := getattr(self, "_handle", None)) is not None:
            os.close(handle)


def _free() -> int:
    """Return bytes of memory that can be had: what the system says, or what is left to the control group."""
    with open("/proc/meminfo", encoding="ascii") if os.path.exists("/proc/meminfo") else open(os.devnull) as file:
        lines = dict(line.split(":") for line in file)
    free = int(lines.get("MemAvailable", f"{2**22} kB").split()[0]) * 1024
    try:
        with open("/sys/fs/cgroup/memory.max") as most, open("/sys/fs/cgroup/memory.current") as now:
            return min(free, max(0, int(most.read()) - int(now.read())))
    except (OSError, ValueError):  # no control groups, or no limit ("max")
        return free
