"""The share of the time in which steps waited for data."""

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from maekit.train.log import Log
from maekit.train.waits import Waits


class Clock:
    """Goes on only when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("maekit.train.waits.time.perf_counter", lambda: self.now)

    def batches(self, *seconds: float) -> Iterator[int]:
        """Yield numbers, each of which takes so long to come."""
        for number, each in enumerate(seconds):
            self.now += each
            yield number


def test_the_share_is_that_of_the_steps_since_the_last_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, waits = Clock(monkeypatch), Waits(torch.device("cpu"))
    assert waits.share() == 0
    for wait in (1, 3):
        waits.start()
        for _ in waits.over(clock.batches(wait, wait)):
            clock.now += 2  # forward and backward
        waits.stop()
        clock.now += 100  # scores, a save
    assert waits.share() == (2 + 6) / (6 + 10)
    assert waits.share() == 0


def test_a_step_that_is_made_again_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, waits = Clock(monkeypatch), Waits(torch.device("cpu"))
    waits.start()
    next(waits.over(clock.batches(5)))
    waits.start()
    for _ in waits.over(clock.batches(1)):
        clock.now += 3
    waits.stop()
    assert waits.share() == 0.25


def test_metrics_and_progress_say_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "maekit"), Log(tmp_path, start=0, total=2, batch_size=4) as log:
        log.record(2, {"loss": 0.5, "data_wait": 0.034})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["data_wait"] == 0.034
    assert "(3% waiting for data)" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_a_wait_counts_only_while_the_device_has_nothing_to_do() -> None:
    """Two loaders, equally slow: one before a device that is still at work, one before an idle one. No sync."""

    def slow() -> Iterator[int]:
        time.sleep(0.05)
        yield 0

    waits, x = Waits(torch.device("cuda")), torch.randn(8192, 8192, device="cuda")
    shares = []
    for busy in (True, False):
        torch.cuda.synchronize()
        waits.start()
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(60 if busy else 0):
            torch.mm(x, x)
        list(waits.over(slow()))
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        waits.stop()
        shares.append(waits.share())
    assert shares[0] < 0.1 and shares[1] > 0.8
