"""How much of the steps' time the device waited for data: by the clock on a CPU, by the device's own on a GPU.

On a GPU the clock would say nothing: the program runs ahead of the device, so it may wait for a batch while the device
is still at work. Two events around each wait, read when the loop waits for the device anyway, say how long the device
had nothing to do; the copy to the device is part of it. Nothing is waited for to know this.
"""

import time
from collections.abc import Iterator
from typing import TypeVar

import torch

T = TypeVar("T")


class Waits:
    """Books steps and, in each, the waits for its batches.

    Args:
        device: that the steps run on.
    """

    def __init__(self, device: torch.device) -> None:
        self.has_clock = device.type == "cuda"
        self._lasted = self._waited = self._of_step = self._began = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        """Begin a step; what was booked of one that did not end is dropped."""
        self._began, self._of_step = time.perf_counter(), 0.0

    def stop(self) -> None:
        """End a step: where the loop has waited for the device, after that."""
        self._lasted += time.perf_counter() - self._began
        self._waited += self._of_step

    def over(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield the batches of a step and book how long each was waited for."""
        while True:
            began, before = time.perf_counter(), self._event()
            try:
                batch = next(batches)
            except StopIteration:
                return
            after = self._event()
            if before is not None and after is not None:
                self._events.append((before, after))
            else:
                self._of_step += time.perf_counter() - began
            yield batch

    def _event(self) -> torch.cuda.Event | None:
        if not self.has_clock:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def share(self) -> float:
        """Return the share of the time since the last call, 0 to 1; on a GPU, after it has been waited for."""
        waited = self._waited + sum(a.elapsed_time(b) for a, b in self._events if b.query()) / 1000
        found = min(1.0, waited / self._lasted) if self._lasted else 0.0
        self._lasted = self._waited = 0.0
        self._events.clear()
        return found
