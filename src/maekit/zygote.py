"""A process that has imported everything once and forks a child for each command: ``python -m maekit.zygote``.

A start of Python with torch takes seconds, a fork takes milliseconds. It reads one JSON object a line from stdin (a
command to start) and writes one a line to stdout: ready, started, ended. A child is what ``python -m maekit`` is, in a
process group of its own. Nothing is computed here before a fork: OpenMP does not survive one. What a request says of
another clock or of writes that are refused is arranged in the child alone, around code that knows nothing of it.
"""

import json
import os
import resource
import select
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NoReturn

from maekit import failpoints
from maekit.cli import VERBS, command


def _tell(**facts: Any) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


WRITES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")
"""What changes a folder, beside a file that is opened for writing: audit events whose first word is a path."""


@dataclass
class Refusal:
    """The system refuses to write into a folder: an audit hook of Python's, which may raise.

    Attributes:
        folder: whose files and folders are refused; others are not.
        number: the errno.
        first: at which opening, renaming, deleting it begins, from 1.
        ever: and stays; else that one time.
    """

    folder: str
    number: int
    first: int
    ever: bool
    tried: int = 0

    def __call__(self, event: str, told: tuple[Any, ...]) -> None:
        """Count, and raise where it is time.

        Raises:
            OSError: the refusal.
        """
        opened = event == "open" and isinstance(told[2], int) and told[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not (opened or event in WRITES) or isinstance(told[0], int) or told[0] is None:
            return
        if os.fsdecode(told[0]).startswith(self.folder):
            self.tried += 1
            if self.tried == self.first or (self.ever and self.tried > self.first):
                raise OSError(self.number, os.strerror(self.number), os.fsdecode(told[0]))


def _shift_clock(seconds: float) -> None:
    """Let Python's code see another time of day; how long something takes stays true."""
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + round(seconds * 1e9)


def _start(
    argv: list[str], cwd: str, stdout: str, stderr: str, file_size: int | None, environment: dict[str, str],
    clock: float, refuse: dict[str, Any] | None,
) -> NoReturn:  # fmt: skip
    os.setsid()
    os.chdir(cwd)
    for number, path in ((0, os.devnull), (1, stdout), (2, stderr)):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
        os.close(handle)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    os.environ.update(environment)
    time.tzset()
    if clock:
        _shift_clock(clock)
    if refuse is not None:
        sys.addaudithook(Refusal(**refuse))
    failpoints.arm(os.environ.get(failpoints.VARIABLE, ""))
    sys.argv = ["maekit", *argv]
    command()


def _line() -> bytes:
    """Read one line without a buffer: what is buffered here would be read again by a child."""
    line = b""
    while not line.endswith(b"\n"):
        more = os.read(0, 1)
        if not more:
            sys.exit()
        line += more
    return line


def serve() -> NoReturn:
    """Start what is asked for and tell what has ended, until stdin is closed."""
    for verb in VERBS.values():
        import_module(verb.module)
    _tell(ready=True)
    while True:
        if select.select([0], [], [], 0.02)[0]:
            asked = json.loads(_line())
            pid = os.fork()
            if pid == 0:
                _start(**asked)
            _tell(started=pid)
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            continue
        if pid:
            _tell(ended=pid, code=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    serve()
