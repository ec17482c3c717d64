"""Whole runs whose loader processes die, whose files cannot be read for a moment, whose images are bad."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import maekit as package

Run = Callable[..., Any]


class Deadly:
    """Images of a folder; the first reads of some kill the process that reads."""

    def __init__(self, folder: Path, marks: Path) -> None:
        self.files, self.marks = sorted(folder.iterdir()), marks

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Image.Image:
        mark = self.marks / str(index)
        if index in (7, 30) and not mark.exists() and multiprocessing.parent_process() is not None:
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return Image.open(self.files[index])


@pytest.mark.slow
def test_a_run_whose_workers_are_killed_ends_with_the_same_bits(
    flat: Path, tiny: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """F29, F22: two deaths."""
    found = []
    for workers in (0, 1, 2):
        marks = tmp_path / f"marks-{workers}"
        marks.mkdir()
        settings = {**tiny, "out": tmp_path / str(workers), "workers": workers}
        found.append(package.pretrain(settings, dataset=Deadly(flat, marks)).metrics["state_sha256"])
        assert len(list(marks.iterdir())) == (2 if workers else 0)
    assert len(set(found)) == 1 and "was ended by SIGKILL" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_file_errors_that_pass_change_no_bit_of_a_run(
    flat: Path, tiny: dict[str, Any], tmp_path: Path, flags: Run, workers: int
) -> None:
    """F32, through the real command."""
    straight = package.pretrain({**tiny, "data": str(flat), "out": tmp_path / "straight"})
    words = flags({**tiny, "data": flat, "out": tmp_path / "run", "workers": workers})
    environment = os.environ | {"MAEKIT_FAILPOINT": "worker-read:estale@5"}
    command = [sys.executable, "-m", "maekit", "pretrain", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0 and "skipped" not in done.stderr, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["state_sha256"] == straight.metrics["state_sha256"]


def test_the_first_bad_image_stops_before_the_first_step_where_that_is_asked_for(
    maekit: Run, flags: Run, flat: Path, tiny: dict[str, Any], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for file in flat.iterdir():
        (data / file.name).write_bytes(file.read_bytes())
    (data / "07.png").write_bytes(b"<html>")
    words = flags({**tiny, "data": data, "out": tmp_path / "run"})
    done = maekit("pretrain", *words, "--bad-images", "stop")
    assert done.code == 3 and "error[E-DATA-BAD]" in done.stderr and "07.png" in done.stderr
    assert "expected at most 0" in done.stderr and not (tmp_path / "run").exists()
    assert "skipped" not in done.stderr and done.stderr.count("07.png") == 2  # the look at it, and the error
    done = maekit("pretrain", *words)  # the look before, training and the report's pictures meet it
    assert done.code == 0 and done.stderr.count("07.png") == done.stderr.count("skipped: ") == 1, done.stderr
