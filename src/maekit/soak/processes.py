"""Faults of processes: killed, signalled, two at once, loader workers that die or hang."""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from maekit.soak.bench import STEPS, Bench, check_said
from maekit.soak.children import Command, Lost

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def kill(bench: Bench, run: Path, random: Random) -> int:
    """F1: kill -9 at any moment, up to three times, with and without workers."""
    newest = worst = 0
    for _ in range(random.randint(1, 3)):
        command = bench.command(run, *_habits(random))
        time.sleep(random.uniform(0, 1.2 * bench.seconds))
        command.send(signal.SIGKILL, group=random.random() < 0.5)
        code = command.wait().code
        if not command.group_is_gone(10):
            raise Lost("a process outlives kill -9 of its parent by more than 10 s")
        if code == 0:
            break
        if code != -signal.SIGKILL:
            raise Lost(f"exit code {code}")
        newest = bench.check_verified(run, newest if newest else -1)
        worst = max(worst, bench.redone(run))
    bench.finish(run, *_habits(random))
    return worst


def stop(bench: Bench, run: Path, random: Random) -> int:
    """F13: a signal at any moment, to the group or to the process; sometimes a second one at once."""
    command = bench.command(run, *_habits(random))
    time.sleep(random.uniform(0, 1.2 * bench.seconds))
    kind, group = random.choice(SIGNALS), random.random() < 0.5
    for _ in range(random.randint(1, 2)):
        try:
            command.send(kind, group=group)
        except ProcessLookupError:
            break
        time.sleep(random.uniform(0, 0.3))
    command.wait()
    newest = bench.check_verified(run)
    if newest >= 0:
        check_said(command, 0, 75)
    else:  # nothing could be saved; before Python's own handlers are ours, the signal itself ends it
        check_said(command, 0, 75, 130, 138, 143, -kind)
    if command.code == 75 and command.json["steps"] != newest:
        raise Lost(f"says step {command.json['steps']}, and the newest checkpoint is {newest}")
    if not command.group_is_gone(10):
        raise Lost("a process is left")
    redone = bench.redone(run)
    bench.finish(run, *_habits(random))
    return redone


def two(bench: Bench, run: Path, random: Random) -> int:
    """F10: two processes at once on one run: one does it, the other says that it is busy."""
    first = bench.command(run, "--workers", "0")
    time.sleep(random.uniform(0, bench.seconds))
    second = bench.command(run, "--workers", "0").wait()
    first.wait()
    for command in (first, second):
        check_said(command, 0, 5, pattern="E-ENV-BUSY" if command.code == 5 else "")
    if first.code and second.code:
        raise Lost("neither did it")
    bench.finish(run, "--workers", "0")
    return 0


def worker(bench: Bench, run: Path, random: Random) -> int:
    """F29: a loader worker is killed; the same batch is made again."""
    command = bench.command(run, "--workers", "2", "--save-every", "6")
    _wait(command, lambda: bool(_workers(command)))
    time.sleep(random.uniform(0, 0.5))
    _strike(command, random, signal.SIGKILL, signal.SIGSEGV)
    return _ended_alike(bench, run, command)


def hang(bench: Bench, run: Path, random: Random) -> int:
    """F30: a loader worker hangs; the watchdog ends it, and the same batch is made again."""
    command = bench.command(run, "--workers", "2", "--save-every", "6", "--read-timeout", "2")
    _wait(command, (run / "metrics.jsonl").exists)  # after the first step: one that has not started is given minutes
    _strike(command, random, signal.SIGSTOP)
    return _ended_alike(bench, run, command)


def nan(bench: Bench, run: Path, random: Random) -> int:
    """F35: a loss or gradient that is not a number, at any step; the weights are those of the step before."""
    step, place = random.randint(1, STEPS), random.choice(("numbers-loss", "numbers-gradient"))
    died = bench.faulty(run, f"{place}:on@{step}", "--workers", "0", "--log-every", "5").wait()
    check_said(died, 4, pattern="error[E-NUM-")
    newest = bench.check_verified(run)
    if newest != step - 1 and step > 1:
        raise Lost(f"bad numbers at step {step}, and the newest checkpoint is {newest}")
    shutil.rmtree(run)  # that run logged every fifth step; another shows that the fault alone was it
    bench.finish(run, "--workers", "0")
    return 0


def memory(bench: Bench, run: Path, random: Random) -> int:
    """F41: a bit of a weight flips between two steps, with ``--sdc-check``; nothing that it touched is saved."""
    step, habits = random.randint(1, STEPS), ["--sdc-check", str(random.randint(1, STEPS)), *_habits(random)]
    died = bench.faulty(run, f"train-flip:on@{step}", *habits).wait()
    check_said(died, 4, pattern=f"error[E-NUM-SDC]: silent corruption in step {step}:")
    newest = bench.check_verified(run)
    if newest >= step:
        raise Lost(f"a bit flipped before step {step}, and step {newest} was saved")
    bench.finish(run, *habits)
    return step - 1 - max(0, newest)


def _wait(command: Command, condition: Callable[[], bool]) -> None:
    """Wait until something is so, the command has ended, or 20 s are over."""
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end and not command.group_is_gone():
        time.sleep(0.005)


def _strike(command: Command, random: Random, *kinds: signal.Signals) -> None:
    """Send one of these signals to one or two loader workers."""
    for pid in _workers(command)[: random.randint(1, 2)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, random.choice(kinds))


def _ended_alike(bench: Bench, run: Path, command: Command) -> int:
    """Refuse a command that what happened to its workers has stopped or changed."""
    command.wait()
    check_said(command, 0)
    if command.json["state_sha256"] != bench.digest:
        raise Lost("other bits after what happened to a worker")
    bench.finish(run, "--workers", "0")
    return 0


def _workers(command: Command) -> list[int]:
    """Return the loader workers of a command: children of its fork server."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
    return sorted(pid for pid, parent in parents.items() if parents.get(parent) == command.pid)


def _habits(random: Random) -> list[str]:
    """Return settings that change no bit."""
    every, keep = random.randint(1, STEPS // 3), random.randint(1, 3)
    return ["--save-every", str(every), "--keep", str(keep), "--workers", str(random.choice((0, 0, 2)))]
