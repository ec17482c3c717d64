"""What a run tells: metrics.jsonl, TensorBoard events and a line of progress.

Losses, scores, images per second since the launch, and the share of the time in which steps waited for data
(`maekit.train.waits`): near 0, more loader processes gain nothing.

A full disk must never stop training: a sink that fails says so once and falls silent (checkpoints do raise). Nor must
lines that cannot be read: they are put aside.
"""

import contextlib
import json
import logging
import math
import os
import sys
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard.writer import SummaryWriter
from tqdm import tqdm

from maekit.disk import own_file

log = logging.getLogger("maekit")

ASIDE = "damaged"
"""Folder of a run for what was damaged: nothing of it is deleted."""


class Log:
    """Writes the records of one run; on a resume those after the checkpoint's step are dropped first."""

    def __init__(self, run: Path, *, start: int, total: int, batch_size: int) -> None:
        self.path, self.start, self.total, self.batch_size = run / "metrics.jsonl", start, total, batch_size
        self.began = self.spoke = time.monotonic()
        self.broken = False
        self.before = self._drop_after(start)
        self.board: SummaryWriter | None = None
        self.other_threads, threading.excepthook = threading.excepthook, self._thread_failed
        with contextlib.suppress(OSError):  # under names that cannot be guessed: torch would follow a link there
            suffix = f".{uuid.uuid4().hex}"
            self.board = SummaryWriter(str(run / "events"), purge_step=start + 1, filename_suffix=suffix)
        self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None

    def _drop_after(self, step: int) -> float:
        """Drop records later than `step`; return the seconds of training already booked."""
        records, lost = sort_metrics(self.path)
        if not records and not lost:
            return 0.0
        kept = [record for record in records if record["step"] <= step]
        with contextlib.suppress(OSError):
            if lost:
                aside = self.path.parent / ASIDE / self.path.name
                log.warning("%s: %d lines cannot be read, they go to %s", self.path, len(lost), aside)
                aside.parent.mkdir(exist_ok=True)
                with open(aside, "ab", opener=own_file) as file:
                    file.write(b"".join(line + b"\n" for line in lost))
            temporary = self.path.with_name(f".tmp-{uuid.uuid4().hex}")
            with temporary.open("x", encoding="utf-8") as file:
                file.write("".join(json.dumps(record) + "\n" for record in kept))
            os.replace(temporary, self.path)
        return max((record.get("time", 0.0) for record in kept), default=0.0)

    def rewind(self, step: int) -> None:
        """Drop records later than `step`: the run went back to it."""
        self._drop_after(step)

    def rate(self, step: int) -> float:
        """Return images per second since this process began."""
        return (step - self.start) * self.batch_size / max(1e-9, time.monotonic() - self.began)

    def record(self, step: int, values: dict[str, float]) -> None:
        """Write one record: a line of metrics.jsonl and the same to TensorBoard."""
        seconds = self.before + time.monotonic() - self.began
        record = {"step": step, **values, "images_per_second": round(self.rate(step), 1), "time": round(seconds, 2)}
        try:
            with open(self.path, "a", encoding="utf-8", opener=own_file) as file:
                file.write(json.dumps(record) + "\n")
            if self.board is not None:
                for name, value in values.items():
                    self.board.add_scalar(name, value, step)
        except OSError as error:
            self._tell_broken(error)
            self._close_board()
        self._show(step, values)

    def _tell_broken(self, error: OSError) -> None:
        if not self.broken:
            log.warning("metrics are not written any more: %s; training goes on", error)
        self.broken = True

    def _thread_failed(self, told: threading.ExceptHookArgs) -> None:
        """TensorBoard writes in a thread of its own, from which an error would come as a traceback."""
        if isinstance(told.exc_value, OSError) and type(told.thread).__module__.startswith("tensorboard."):
            self._tell_broken(told.exc_value)
        else:
            self.other_threads(told)

    def _close_board(self) -> None:
        board, self.board = self.board, None
        if board is not None:
            with contextlib.suppress(OSError):
                board.close()

    def _show(self, step: int, values: dict[str, float]) -> None:
        shown = {k: f"{v:.4g}" for k, v in values.items() if k == "loss" or "/" in k}
        waits = {"data": f"{values['data_wait']:.0%}"} if "data_wait" in values else {}
        if self.bar is not None:
            self.bar.n = step
            self.bar.set_postfix({**shown, **waits}, refresh=True)
        elif time.monotonic() - self.spoke > 10 or step >= self.total or any("/" in k for k in values):
            self.spoke = time.monotonic()
            left = (self.total - step) * self.batch_size / max(1e-9, self.rate(step))
            told = ", ".join(f"{k} {v}" for k, v in shown.items())
            wait = "".join(f" ({share} waiting for data)" for share in waits.values())
            log.info(
                "step %d/%d, %s, %.0f images/s%s, %s left", step, self.total, told, self.rate(step), wait, clock(left)
            )

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
        self._close_board()
        threading.excepthook = self.other_threads


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl, none of a file that is not there; lines that are none are left out."""
    return sort_metrics(path)[0]


def sort_metrics(path: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Return the records of a file and the lines that are none; of what cannot be read at all neither, with a line."""
    if not os.path.lexists(path):
        return [], []
    try:
        with open(path, "rb", opener=own_file) as file:
            lines = file.read().split(b"\n")
    except OSError as error:
        log.warning("%s cannot be read: %s", path, error.strerror or error)
        return [], []
    records, lost = [], []
    for line in filter(None, lines):
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and _whole(record):
            records.append(record)
        else:
            lost.append(line)
    return records, lost


def _whole(record: dict[str, Any]) -> bool:
    """Tell whether a record has a step, and seconds, if any, that can be counted with."""
    seconds = record.get("time", 0.0)
    return isinstance(record.get("step"), int) and isinstance(seconds, int | float) and math.isfinite(seconds)


def clock(seconds: float) -> str:
    """Return a duration as people read it: 42 s, 3 min 10 s, 5 h 02 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
