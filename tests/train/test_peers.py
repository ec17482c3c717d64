"""Processes of one run: one dies, one hangs, one never comes, one was told something else (F15, F16, F17, F23)."""

import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from maekit.train.device import World, circumstances, without_peer, world
from maekit.train.loop import _say_what_is_different

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and gloo as on Linux")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def member(rank: int, port: int, folder: Path, timeout: float, what: str, answer: Any) -> None:
    """Join two processes, exchange numbers for ever, and say how that ended."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        with world("cpu", timeout) as here:
            if what == "differ":
                here.agree({"setting a": "1", "setting b": str(rank)})
            for step in range(10**9):
                try:
                    dist.all_reduce(torch.ones(1))
                except RuntimeError as error:
                    raise without_peer(error, step, 3, folder) or error from error
                if step == 20:
                    answer.send("going")
    except Exception as error:
        answer.send(str(error))


def two(folder: Path, *, timeout: float = 60.0, what: str = "", ranks: tuple[int, ...] = (0, 1)) -> Any:
    """Start the processes; return them and the pipes by which they answer."""
    context, port = multiprocessing.get_context("spawn"), free_port()
    members, answers = [], []
    for rank in ranks:
        ours, theirs = context.Pipe(duplex=False)
        members.append(context.Process(target=member, args=(rank, port, folder, timeout, what, theirs)))
        members[-1].start()
        theirs.close()
        answers.append(ours)
    return members, answers


def heard(answer: Any) -> str:
    assert answer.poll(60), "nothing was said for a minute"
    return answer.recv()


def end(members: Any) -> None:
    for one in members:
        if one.pid and one.is_alive():
            os.kill(one.pid, signal.SIGKILL)
        one.join()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "word"), [(signal.SIGKILL, "is gone"), (signal.SIGSTOP, "hangs")])
def test_who_is_left_says_so_soon(tmp_path: Path, kind: signal.Signals, word: str) -> None:
    members, answers = two(tmp_path, timeout=8.0)
    try:
        assert [heard(answer) for answer in answers] == ["going", "going"]
        os.kill(members[1].pid, kind)
        began = time.monotonic()
        told = heard(answers[0])
        assert time.monotonic() - began < (5 if kind is signal.SIGKILL else 8 + 5)
        assert "E-STOP-PEER" in told and word in told and "goes on from step 3" in told
        assert ("test_peers.py" in (tmp_path / "hang-0.txt").read_text()) if word == "hangs" else True
    finally:
        end(members)


@pytest.mark.slow
def test_a_process_that_never_comes_is_not_waited_for_long(tmp_path: Path) -> None:
    members, answers = two(tmp_path, timeout=3.0, ranks=(0,))
    try:
        assert "E-ENV-PEER" in heard(answers[0])
    finally:
        end(members)


@pytest.mark.slow
def test_processes_that_were_told_different_things_do_not_begin(tmp_path: Path) -> None:
    members, answers = two(tmp_path, what="differ")
    try:
        for answer in answers:
            told = heard(answer)
            assert "E-CONFIG-PROCESSES" in told and "setting b" in told and "setting a" not in told
    finally:
        end(members)


def test_a_run_that_goes_on_under_other_circumstances_says_so(caplog: pytest.LogCaptureFixture) -> None:
    now = circumstances(World(0, 1, torch.device("cpu")), 16)
    with caplog.at_level(logging.WARNING, "maekit"):
        _say_what_is_different(now, now)
        _say_what_is_different({}, now)  # a checkpoint from before they were kept
        assert not caplog.text
        _say_what_is_different({**now, "threads": 7, "torch": "2.11.0"}, now)
    assert f"not bit-exact from here on: torch 2.11.0 -> {torch.__version__}, threads 7 -> 1" in caplog.text
