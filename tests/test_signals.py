"""Who decides on signals, before, in and after a block that takes them over."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from maekit import signals


@pytest.mark.parametrize("kind", signals.KINDS)
def test_a_library_gives_the_handlers_of_before_back(kind: signal.Signals) -> None:
    heard: list[int] = []
    before = signal.signal(kind, lambda number, _: heard.append(number))
    try:
        own = signal.getsignal(kind)
        with signals.noting() as noted:
            os.kill(os.getpid(), kind)
        assert noted.received == kind.name and not heard and signal.getsignal(kind) is own
        os.kill(os.getpid(), kind)
        assert heard == [kind]
    finally:
        signal.signal(kind, before)


@pytest.mark.parametrize("kind", signals.KINDS)
def test_a_block_ends_as_ctrl_c_ends_it(kind: signal.Signals) -> None:
    nobody = signal.default_int_handler if kind == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(kind, nobody)  # it may be ignored here
    try:
        with pytest.raises(BaseException) as ended, signals.ending():
            os.kill(os.getpid(), kind)
        assert isinstance(ended.value, KeyboardInterrupt if kind == signal.SIGINT else SystemExit)
        assert signal.getsignal(kind) is nobody
    finally:
        signal.signal(kind, before)


def test_what_came_first_is_noted() -> None:
    with signals.noting() as noted:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
    assert noted.received == "SIGUSR1"


def test_the_owner_of_ctrl_c_keeps_it_while_a_block_would_end_by_signals() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell has it behind an "&"
    try:
        with signals.ending():
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("inner", [contextlib.nullcontext, signals.ending])
def test_the_first_signal_ends_a_block_and_the_others_let_it_end(inner: Any) -> None:
    tidied = False
    with pytest.raises(SystemExit) as ended, signals.ending():
        try:
            with inner():
                try:
                    os.kill(os.getpid(), signal.SIGTERM)
                finally:
                    os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            tidied = True
    assert tidied and ended.value.code == 128 + signal.SIGTERM


def test_a_block_whose_end_was_lost_ends_by_a_later_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python drops what is raised while it deletes an object."""
    monkeypatch.setattr(signals, "TO_END", 0.05)
    with pytest.raises(SystemExit), signals.ending():
        with contextlib.suppress(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)


def test_another_thread_leaves_signals_to_the_main_one() -> None:
    before, seen = [signal.getsignal(kind) for kind in signals.KINDS], []

    def work() -> None:
        with signals.noting():
            seen.extend(signal.getsignal(kind) for kind in signals.KINDS)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == before


@pytest.mark.parametrize(
    ("when", "code"),
    [("before", -signal.SIGTERM), ("inside", 0), ("between", -signal.SIGTERM), ("after", 0), ("settled", 0)],
)
def test_the_outcome_of_a_command_stands_once_its_work_is_done(when: str, code: int) -> None:
    lines = {
        "before": "",
        "inside": "with signals.noting(settles=True): ",
        "between": "with signals.noting(): pass\n",
        "after": "with signals.noting(settles=True): pass\n",
        "settled": "with signals.ending():\n    with signals.noting(): signals.settled()\n    ",
    }
    script = f"import os\nfrom maekit import signals\nsignals.of_command()\n{lines[when]}os.kill(os.getpid(), 15)\n"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == code
