"""metrics.jsonl: what is damaged in it, or stands in its place, stops nothing."""

import json
import logging
import os
from pathlib import Path

import pytest

from maekit.train.log import Log, read_metrics

DAMAGED = [
    b'{"step": 2, "lo\xffss": 1.0}',
    b"\xff\xfe\x00",
    b'{"step": 2, "time": "soon"}',
    b'{"step": 2, "time": NaN}',
    b'{"step": "2"}',
    b"[" * 100_000,
    b'{"step": 2, "lo',
]


def test_lines_that_cannot_be_read_are_put_aside_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "metrics.jsonl"
    good = [json.dumps({"step": step, "loss": 1.0, "time": 2.5 * step}).encode() for step in (1, 2, 3)]
    file.write_bytes(b"\n".join([good[0], *DAMAGED, *good[1:]]) + b"\n")
    assert [record["step"] for record in read_metrics(file)] == [1, 2, 3]
    with caplog.at_level(logging.WARNING, "maekit"), Log(tmp_path, start=2, total=4, batch_size=1) as records:
        assert records.before == 5.0
        records.rewind(1)
    assert file.read_bytes().splitlines() == good[:1]
    assert (tmp_path / "damaged/metrics.jsonl").read_bytes().splitlines() == DAMAGED
    assert len(caplog.records) == 1 and f"{len(DAMAGED)} lines cannot be read" in caplog.text


def test_a_fifo_in_its_place_is_not_waited_at(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:  # T15
    os.mkfifo(tmp_path / "metrics.jsonl")
    with Log(tmp_path, start=0, total=1, batch_size=1) as records:
        records.record(1, {"loss": 1.0})
    assert "not a regular file" in caplog.text and "training goes on" in caplog.text
