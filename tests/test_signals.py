"""Who decides on signals, before, in and after a block that takes them over."""

import os
import signal
import subprocess
import sys
import threading

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
        with pytest.raises(BaseException) as ended, signals.ending():
            os.kill(os.getpid(), kind)
        assert isinstance(ended.value, KeyboardInterrupt if kind == signal.SIGINT else SystemExit)
        assert signal.getsignal(kind) is own
        os.kill(os.getpid(), kind)
        assert heard == [kind]
    finally:
        signal.signal(kind, before)


def test_the_first_signal_ends_a_block_and_the_others_let_it_end() -> None:
    tidied = False
    with pytest.raises(SystemExit) as ended, signals.ending():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            tidied = True
    assert tidied and ended.value.code == 128 + signal.SIGTERM


def test_another_thread_leaves_signals_to_the_main_one() -> None:
    before, seen = [signal.getsignal(kind) for kind in signals.KINDS], []

    def work() -> None:
        with signals.noting():
            seen.extend(signal.getsignal(kind) for kind in signals.KINDS)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == before


@pytest.mark.parametrize(("when", "code"), [("before", -signal.SIGTERM), ("inside", 0), ("after", 0)])
def test_the_outcome_of_a_command_stands_once_its_work_is_done(when: str, code: int) -> None:
    lines = {
        "before": "", "inside": "with signals.noting(): ", "after": "with signals.noting(): pass\n",
    }  # fmt: skip
    script = f"import os\nfrom maekit import signals\nsignals.of_command()\n{lines[when]}os.kill(os.getpid(), 15)\n"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == code
