"""F18: a run goes on in another number of processes with the same losses, and in the same number with the same bits."""

import os
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import start_processes

import maekit as package

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="gloo as on Linux")]


def member(rank: int, size: int, port: int, settings: dict[str, Any]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # DDP on the strides of a convolution with one channel
    done = package.pretrain(settings)
    (settings["out"] / f"told-{rank}").write_text(str(done.metrics["state_sha256"]))


def launch(size: int, settings: dict[str, Any]) -> str:
    """Train in so many processes; return the digest, which is the same in all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(member, (size, port, settings), nprocs=size, start_method="spawn")
    told = {(settings["out"] / f"told-{rank}").read_text() for rank in range(size)}
    assert len(told) == 1
    return told.pop()


def test_losses_stay_the_same_from_2_to_4_to_2_processes(
    flat: Path, tiny: dict[str, Any], tmp_path: Path, records: Callable[[Path], list[dict[str, Any]]]
) -> None:
    """40 images in batches of 9: the last of five has four; 24 steps are almost five epochs."""
    settings = {**tiny, "data": str(flat), "steps": 24, "log_every": 1, "batch_size": 9, "save_every": 100}
    package.pretrain({**settings, "out": tmp_path / "alone"})
    for size, stop in ((2, 7), (4, 15), (2, None)):
        launch(size, {**settings, "out": tmp_path / "parts", "stop_at": stop})
    alone, parts = records(tmp_path / "alone"), records(tmp_path / "parts")
    assert [line["step"] for line in parts] == list(range(1, 25))
    for one, other in zip(alone, parts, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)


def test_four_processes_go_on_to_the_same_bits(flat: Path, tiny: dict[str, Any], tmp_path: Path) -> None:
    """DDP groups gradients otherwise after its first exchange; more than two numbers then add up in another order."""
    settings = {**tiny, "data": str(flat), "save_every": 100}
    straight = launch(4, {**settings, "out": tmp_path / "straight"})
    launch(4, {**settings, "out": tmp_path / "parts", "stop_at": 5})
    assert launch(4, {**settings, "out": tmp_path / "parts"}) == straight
