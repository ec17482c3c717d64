"""A process that has imported everything once and forks a child for each command: ``python -m maekit.zygote``.

A start of Python with torch takes seconds, a fork takes milliseconds. It reads one JSON object a line from stdin (a
command to start) and writes one a line to stdout: ready, started, ended. A child is what ``python -m maekit`` is, in a
process group of its own. Nothing is computed here before a fork: OpenMP does not survive one.
"""

import json
import os
import resource
import select
import sys
import time
from importlib import import_module
from typing import Any, NoReturn

from maekit import failpoints
from maekit.cli import VERBS, command


def _tell(**facts: Any) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def _start(
    argv: list[str], cwd: str, stdout: str, stderr: str, file_size: int | None, environment: dict[str, str]
) -> NoReturn:
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
