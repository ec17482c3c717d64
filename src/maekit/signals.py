"""Who decides on SIGINT, SIGTERM and SIGUSR1: the signals by which a run is stopped.

A process ends by the first of them, until some block takes them over (`handled`): a run, which finishes its step and
saves, or the launch of several processes, to which they are handed on. Who had them before gets them back at the end of
the block.

A command differs from a library in that its outcome stands at some point, and a signal that comes later is too late to
change it: a scheduler that sends SIGTERM after SIGUSR1, or a second ctrl-C, must not make another exit code of 75. From
there on (`settled`) it ignores them.
"""

import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

log = logging.getLogger("maekit")
KINDS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
NOBODY = (signal.SIG_DFL, signal.default_int_handler)
"""Handlers of a process in which nobody has taken the signals over."""
Handler = Callable[[int, FrameType | None], None]
TO_END = 10.0
"""Seconds that a block has to end; a signal after them ends it once more, for an exception may be lost on the way."""
_process = {"is a command": False}


def of_command() -> None:
    """Say that this process is a command: it ends when the work is done."""
    _process["is a command"] = True


def settled() -> None:
    """Say that the outcome stands: a command ignores the signals from here on, whatever blocks are open."""
    if _process["is a command"]:
        _exchange(dict.fromkeys(KINDS, signal.SIG_IGN))


@contextlib.contextmanager
def handled(handler: Handler, kinds: Iterable[signal.Signals] = KINDS, *, settles: bool) -> Iterator[None]:
    """Let `handler` take the signals; in another thread than the main one whoever owns that decides on them.

    Args:
        settles: the outcome of a command that has nobody else to take its signals stands when the block ends.
    """
    before: dict[signal.Signals, Any] = {}

    def give_back() -> None:
        over = settles and _process["is a command"]
        mine = [kind for kind in before if signal.getsignal(kind) is handler]  # not where `settled` was said inside
        _exchange({kind: signal.SIG_IGN if over and before[kind] in NOBODY else before[kind] for kind in mine})

    try:
        with contextlib.suppress(ValueError):
            for kind in kinds:
                before[kind] = signal.getsignal(kind)
                signal.signal(kind, handler)
        yield
    finally:
        try:
            give_back()
        finally:  # also where the exception of a signal cut it short
            give_back()


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Let a signal end the block by an exception, as ctrl-C does; those after it find it ending for some seconds.

    Where SIGINT has an owner, or is ignored, that stays so. A block inside of another one ends with it.

    Raises:
        KeyboardInterrupt: for SIGINT.
        SystemExit: with 128 + its number for another one.
    """
    owners = {kind: signal.getsignal(kind) for kind in KINDS}
    if any(isinstance(owner, _End) for owner in owners.values()):
        yield
        return
    free = [kind for kind in KINDS if kind != signal.SIGINT or owners[kind] in NOBODY]
    with handled(_End(), free, settles=True):
        yield


class _End:
    def __init__(self) -> None:
        self.came = -math.inf

    def __call__(self, number: int, _: FrameType | None) -> None:
        if time.monotonic() - self.came < TO_END:
            return
        self.came = time.monotonic()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)


@dataclass
class Noted:
    """The signal that came.

    Attributes:
        received: name of the first one, None before there is one.
    """

    received: str | None = None


@contextlib.contextmanager
def noting(told: str = "finishing the step, then saving", *, settles: bool = False) -> Iterator[Noted]:
    """Only note signals in the block, which looks at them where stopping loses nothing.

    Args:
        told: to the user at the first one, after its name.
        settles: as of `handled`.
    """
    noted = Noted()

    def note(number: int, _: FrameType | None) -> None:
        if noted.received is None:
            noted.received = signal.Signals(number).name
            log.info("%s: %s", noted.received, told)

    with handled(note, settles=settles):
        yield noted


def _exchange(handlers: Mapping[signal.Signals, Any]) -> None:
    """Set handlers while signals wait: Python complains of one that comes in between."""
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, KINDS)  # one that came before is still for the old handler
        with contextlib.suppress(ValueError):  # another thread than the main one has no say
            for kind, handler in handlers.items():
                signal.signal(kind, handler)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
