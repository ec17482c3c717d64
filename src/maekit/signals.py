"""Who decides on SIGINT, SIGTERM and SIGUSR1: the signals by which a run is stopped.

A process ends by the first of them, until some block takes them over (`handled`): a run, which finishes its step and
saves, or the launch of several processes, to which they are handed on. When the outermost of these blocks has ended,
the outcome of a command stands, and what comes later is too late to change it: a scheduler that sends SIGTERM after
SIGUSR1, or a second ctrl-C, must not make another exit code of 75. Where maekit is used as a library, the handlers from
before are given back instead.
"""

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

log = logging.getLogger("maekit")
KINDS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
NOBODY = (signal.SIG_DFL, signal.default_int_handler)
"""Handlers of a process in which nobody has taken the signals over."""
Handler = Callable[[int, FrameType | None], None]
_process = {"is a command": False}


def of_command() -> None:
    """Say that this process is a command: it ends when the work is done."""
    _process["is a command"] = True


def settled() -> None:
    """Ignore the signals from here on, if this process is a command: nothing but its end is left."""
    for kind in KINDS if _process["is a command"] else ():
        signal.signal(kind, signal.SIG_IGN)


@contextlib.contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """Let `handler` take the signals; in another thread than the main one whoever owns that decides on them."""
    kinds = KINDS if threading.current_thread() is threading.main_thread() else ()
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def give_back() -> None:
        for kind, one in before.items():
            over = _process["is a command"] and one in NOBODY
            signal.signal(kind, signal.SIG_IGN if over else one)

    try:
        for kind in kinds:
            signal.signal(kind, handler)
        yield
    finally:
        try:
            give_back()
        finally:  # also where the exception of a signal cut it short
            give_back()


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Let the first signal end the block by an exception, as ctrl-C does; more of them find it ending already.

    Raises:
        KeyboardInterrupt: for SIGINT.
        SystemExit: with 128 + its number for another one.
    """
    came = False

    def end(number: int, _: FrameType | None) -> None:
        nonlocal came
        if not came:
            came = True
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)

    with handled(end):
        yield


@dataclass
class Noted:
    """The signal that came.

    Attributes:
        received: name of the last one, None before there is one.
    """

    received: str | None = None


@contextlib.contextmanager
def noting(told: str = "finishing the step, then saving") -> Iterator[Noted]:
    """Only note signals in the block, which looks at them where stopping loses nothing.

    Args:
        told: to the user at the first one, after its name.
    """
    noted = Noted()

    def note(number: int, _: FrameType | None) -> None:
        if noted.received is None:
            log.info("%s: %s", signal.Signals(number).name, told)
        noted.received = signal.Signals(number).name

    with handled(note):
        yield noted
