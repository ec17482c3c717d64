"""One wrong (or odd and right) command, and what must never happen whatever it is.

`check` runs a case through `maekit.cli.main` and looks at all that section 3 of the catalogue forbids: a traceback as
the only message, exit code 0 for what is refused, more than one line of error, control characters on the terminal,
output that is left behind or overwritten, code or a program that runs, a network, seconds without an answer, memory
without bound.
"""

import contextlib
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from maekit.cli import main

Lay = Callable[[Path], object]
SENTINEL = "it-ran"
SECONDS = 10
MEGABYTES = 400


@dataclass(frozen=True)
class Case:
    """A command and what comes of it.

    Attributes:
        name: a sentence, unique in its family.
        files: what lies in the folder: content by path, a path that ends in / is a folder; or a function that lays it.
        words: the command; HERE is the folder.
        code: of a refusal, its beginning: ``E-DATA-``; "" where the command is right.
        said: pattern of the line of error, of what is printed where the command is right.
        exit_code: of a refusal, 2 to 5.
    """

    name: str
    files: "Mapping[str, bytes | str] | Lay"
    words: str
    code: str
    said: str = ""
    exit_code: int = 3

    def lay(self, folder: Path) -> None:
        if callable(self.files):
            self.files(folder)
            return
        for name, content in self.files.items():
            place = folder / name
            if name.endswith("/"):
                place.mkdir(parents=True, exist_ok=True)
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content.encode() if isinstance(content, str) else content)

    def argv(self, folder: Path) -> list[str]:
        return [word.replace("HERE", str(folder)).replace("\xa0", " ") for word in self.words.split(" ") if word]


FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
    "socket.getaddrinfo",
    "socket.sendto",
    "socket.bind",
    "pickle.find_class",
)
_strays: list[str] | None = None


def _notice(event: str, told: tuple[Any, ...]) -> None:
    if _strays is not None and event in FORBIDDEN:
        _strays.append(f"{event} {told!r}"[:200])


sys.addaudithook(_notice)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of change of all that lies in a folder."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in folders + files:
            status = os.lstat(os.path.join(root, name))
            found[os.path.relpath(os.path.join(root, name), folder)] = (status.st_size, status.st_mtime_ns)
    return found


@contextlib.contextmanager
def watched(seconds: float = SECONDS, megabytes: float = MEGABYTES) -> Iterator[None]:
    """Let nothing within run code, start a program, speak to a network, take longer or more memory."""
    global _strays
    memory, started = _new_peak(), time.monotonic()
    _strays = []
    try:
        yield
        strays = list(_strays)
    finally:
        _strays = None
    assert time.monotonic() - started < seconds, "too slow"
    assert (most := _peak() - memory) < megabytes, f"too much memory: {most:.0f} MB"
    assert not strays, strays


def check(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    """Run a case in this process and return what it printed."""
    place, elsewhere = folder / "given", folder / "cwd"
    place.mkdir()
    elsewhere.mkdir()
    case.lay(place)
    monkeypatch.chdir(elsewhere)
    before = tree(place)
    with watched():
        exit_code = main(case.argv(place))
    out, err = capfd.readouterr()
    assert tree(place) == before and list(elsewhere.iterdir()) == [], "something was left behind"
    judge(case, exit_code, out, err)
    return out


def judge(case: Case, exit_code: int, out: str, err: str) -> None:
    """Check exit code and words."""
    assert "Traceback" not in err and "Warning" not in err, err
    assert all(line.isprintable() for line in (out + err).splitlines()), "control characters"
    assert "E-BUG" not in err, err
    errors = [line for line in err.splitlines() if "error[" in line]
    if not case.code:
        assert exit_code == 0 and not errors, err
        assert re.search(case.said, out), out
        return
    assert len(errors) == 1 and err.splitlines()[-1] == errors[0], err
    assert re.match(rf"maekit: error\[{case.code}[A-Z0-9-]*\]: ", errors[0]), errors[0]
    assert re.search(case.said, errors[0]), errors[0]
    assert len(errors[0]) < 3000, len(errors[0])
    assert exit_code == case.exit_code, exit_code
    assert out == "", out


def _new_peak() -> float:
    """Let the peak count from here, where the system can; return what is held now, in MB."""
    if (peak := Path("/proc/self/clear_refs")).exists():
        peak.write_text("5")
    return _peak()


def _peak() -> float:
    if (status := Path("/proc/self/status")).exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
