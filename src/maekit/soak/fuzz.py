"""fuzz(): thousands of mutants through the doors of the package; each is read, or refused in one line, and no more.

Mutant number n of a kind is a function of (seed, kind, n), so a finding is three words and is made again by `mutant`.
Mutants are read in processes of their own, one after the other, in a folder of their own, under limits of memory and of
time for each; a process that dies or hangs names the mutant that it was at, and another goes on behind it. What a
mutant must not do, beside raising anything but a `MaekitError`: warn, start a program, speak to a network, unpickle,
write outside the folder, leave what its payload makes, or take more memory than `MEMORY`.
"""

import json
import multiprocessing
import os
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import count, islice
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from maekit.errors import MaekitError, clean
from maekit.failpoints import reach
from maekit.soak.mutants import mutate
from maekit.soak.originals import KINDS, SENTINEL, Original

MEMORY = 1 << 30
"""Bytes beyond those of the process itself: an image of 64 million pixels takes half of it while it is converted."""
SECONDS = 10.0
"""For one mutant."""
CHUNK = 500
"""Mutants between two looks at the clock."""
FORBIDDEN = {
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn", "socket.connect",
    "socket.bind", "socket.getaddrinfo", "socket.sendto", "urllib.Request", "pickle.find_class",
}  # fmt: skip
"""Audit events that no reading of a file causes."""


@dataclass(frozen=True)
class Finding:
    """A mutant that was neither read nor refused.

    Attributes:
        kind: of `KINDS`.
        seed: of the fuzzing.
        number: of the mutant.
        original: what it was made of.
        outcome: "crash" | "hang" | "memory" | "error" | "warning" | "forbidden".
        said: exception, signal or event.
    """

    kind: str
    seed: int
    number: int
    original: str
    outcome: str
    said: str

    def __str__(self) -> str:
        return f"{self.kind} seed {self.seed} number {self.number} ({self.original}): {self.outcome}: {self.said}"


@dataclass
class Tally:
    """What became of the mutants of a kind.

    Attributes:
        fine: read.
        refused: with a `MaekitError`.
        bad: anything else, one each.
        seconds: of all, in all processes.
        slowest: seconds of one mutant, and its number.
    """

    fine: int = 0
    refused: int = 0
    bad: list[Finding] = field(default_factory=list)
    seconds: float = 0.0
    slowest: tuple[float, int] = (0.0, 0)

    @property
    def tried(self) -> int:
        """How many there were."""
        return self.fine + self.refused + len(self.bad)


def fuzz(
    kinds: Iterable[str] = tuple(KINDS), seed: int = 0, *, mutants: int | None = None, seconds: float | None = None,
    workers: int = 1, folder: Path | None = None, first: int = 0,
) -> dict[str, Tally]:  # fmt: skip
    """Read mutants of each kind, in turns of `CHUNK`, until there were enough.

    Args:
        kinds: of `KINDS`.
        seed: decides every mutant, with its kind and number.
        mutants: of each kind; None: as many as the time allows.
        seconds: when to stop, after the turn that is under way; None: no limit.
        workers: processes.
        folder: takes each finding, as a file of its bytes and one that says what it is; None: nothing is kept.
        first: number of the first mutant.

    Raises:
        MaekitError: E-USAGE-FUZZ for an unknown kind or without an end.
    """
    kinds = list(kinds)
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise MaekitError("E-USAGE-FUZZ", "kinds of mutants", found=unknown[0], expected=", ".join(KINDS))
    if mutants is None and seconds is None:
        raise MaekitError("E-USAGE-FUZZ", "fuzzing without an end", expected="a number of mutants, or seconds")
    tallies = {kind: Tally() for kind in kinds}
    end = None if seconds is None else time.monotonic() + seconds
    turns = _turns(kinds, first, mutants)
    with TemporaryDirectory(prefix="maekit-fuzz-") as root:
        teams = [_Worker(Path(root, str(number)), seed) for number in range(workers)]
        try:
            _work(teams, turns, tallies, end)
        finally:
            for worker in teams:
                worker.stop()
    if folder is not None:
        for tally in tallies.values():
            for found in tally.bad:
                keep(found, folder)
    return tallies


def mutant(kind: str, seed: int, number: int, originals: list[Original] | None = None) -> tuple[Original, bytes]:
    """Return what mutant `number` is made of, and its bytes."""
    make, words = KINDS[kind]
    originals = make() if originals is None else originals
    random = Random(f"{seed}/{kind}/{number}")
    original = random.choice(originals)
    return original, original.finish(mutate(original.data, [one.data for one in originals], words, random))


def keep(found: Finding, folder: Path) -> Path:
    """Write the bytes of a finding, and what it is, into a folder; return the file of bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    _, data = mutant(found.kind, found.seed, found.number)
    file = folder / f"{found.kind}-{found.seed}-{found.number}.bin"
    file.write_bytes(data)
    file.with_suffix(".json").write_text(json.dumps(asdict(found), indent=1))
    return file


def read_one(kind: str, seed: int, number: int, folder: Path, originals: list[Original] | None = None) -> str | Finding:
    """Read one mutant in this process: "fine", "refused", or what is wrong.

    Args:
        kind: of `KINDS`.
        seed: of the fuzzing.
        number: of the mutant.
        folder: empty, or used for this kind before.
        originals: of the kind, where they are at hand.
    """
    original, data = mutant(kind, seed, number, originals)
    place = folder / "".join(c if c.isalnum() else "-" for c in original.name)
    place.mkdir(exist_ok=True)

    def finding(outcome: str, said: object) -> Finding:
        return Finding(kind, seed, number, original.name, outcome, clean(said, 600))

    with warnings.catch_warnings(record=True) as warned:
        try:
            original.read(data, place)
            found: str | Finding = "fine"
        except MaekitError as error:
            found = "refused"
            if _caused_by_memory(error):
                found = finding("memory", error)
            elif "\n" in str(error) or len(str(error)) > 2500 or not str(error).isprintable():
                found = finding("error", f"no plain line: {str(error)!r}")
        except MemoryError as error:
            found = finding("memory", _told(error))
        except Exception as error:
            found = finding("error", _told(error))
    if warned and isinstance(found, str):
        found = finding(
            "warning", f"{warned[0].category.__name__}: {warned[0].message} ({warned[0].filename}:{warned[0].lineno})"
        )
    return finding("forbidden", "the payload ran") if (place / SENTINEL).exists() or Path(SENTINEL).exists() else found


def _told(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno} {last.name})"


def _caused_by_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__
    return False


# ------------------------------------------------------------------------------------------------- processes

Turn = tuple[str, int, int]
"""Kind, number of the first mutant, number behind the last."""


def _turns(kinds: list[str], first: int, mutants: int | None) -> Iterator[Turn]:
    """Yield chunks of each kind in turn, so that a limit of time treats all alike."""
    for start in count(first, CHUNK):
        left = CHUNK if mutants is None else min(CHUNK, first + mutants - start)
        if left <= 0:
            return
        for kind in kinds:
            yield kind, start, start + left


def _work(workers: list["_Worker"], turns: Iterator[Turn], tallies: dict[str, Tally], end: float | None) -> None:
    for worker, turn in zip(workers, islice(turns, len(workers)), strict=False):
        worker.begin(turn)
    while busy := [worker for worker in workers if worker.turn is not None]:
        for worker in busy:
            kind = worker.turn[0] if worker.turn else ""
            over = worker.look(tallies[kind])
            if over and (end is None or time.monotonic() < end) and (turn := next(turns, None)) is not None:
                worker.begin(turn)
        time.sleep(0.005)


class _Worker:
    """A process that reads mutants, and what its keeper knows of it.

    `at` is shared with it: number of the mutant under way, and the counts of this turn; nothing is lost when it dies.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed, self.started = folder, seed, 0
        self.context = multiprocessing.get_context("spawn")
        self.at: Any = self.context.Array(
            "d", 5, lock=False
        )  # number, fine, refused, seconds of the slowest, its number
        self.process: Any = None
        self.pipe: Any = None
        self.turn: Turn | None = None
        self.seen = (-1.0, 0.0)

    def begin(self, turn: Turn) -> None:
        self.turn, self.at[:] = turn, [turn[1], 0, 0, 0, 0]
        self.seen, self.since = (-1.0, 0.0), time.monotonic()
        if self.process is None:
            mine, theirs = self.context.Pipe()
            self.started += 1
            place = self.folder / str(self.started)
            place.mkdir(parents=True)
            self.process = self.context.Process(target=_serve, args=(theirs, self.at, self.seed, place), daemon=True)
            self.process.start()
            theirs.close()
            self.pipe = mine
            self.seen = (turn[1], time.monotonic() + 60)  # it has a library to import first
        assert self.pipe is not None
        self.pipe.send(turn)

    def look(self, tally: Tally) -> bool:
        """Take in what is new; return whether the turn is over."""
        assert self.pipe is not None and self.turn is not None
        kind, _, stop = self.turn
        try:
            while self.pipe.poll():
                told = self.pipe.recv()
                if told is None:
                    self._count(tally)
                    self.turn = None
                    return True
                tally.bad.append(told)
        except (EOFError, ConnectionResetError):
            pass
        number, now = self.at[0], time.monotonic()
        if number != self.seen[0]:
            self.seen = (number, now)
        hangs = now - self.seen[1] > SECONDS
        if not hangs and self.process.is_alive():
            return False
        self.process.kill()
        self.process.join()
        code = self.process.exitcode
        outcome, said = ("hang", f"more than {SECONDS:g} s") if hangs else ("crash", f"exit code {code}")
        tally.bad.append(
            Finding(kind, self.seed, int(number), mutant(kind, self.seed, int(number))[0].name, outcome, said)
        )
        self._count(tally)
        self.stop()
        if number + 1 >= stop:
            self.turn = None
            return True
        self.begin((kind, int(number) + 1, stop))
        return False

    def _count(self, tally: Tally) -> None:
        tally.fine += int(self.at[1])
        tally.refused += int(self.at[2])
        tally.slowest = max(tally.slowest, (self.at[3], int(self.at[4])))
        tally.seconds += time.monotonic() - self.since

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None
        if self.pipe is not None:
            self.pipe.close()
            self.pipe = None


def _serve(pipe: Any, at: Any, seed: int, folder: Path) -> None:
    """Read the mutants of each turn that comes; the whole life of a worker."""
    os.chdir(folder)
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what C libraries say of damaged files
        os.dup2(devnull, stream)
    originals = {kind: make() for kind, (make, _) in KINDS.items()}
    _limit()
    strays = _watch(folder)
    while True:
        try:
            kind, start, stop = pipe.recv()
        except (EOFError, OSError):
            return
        place = folder / kind
        place.mkdir(exist_ok=True)
        for number in range(start, stop):
            at[0], began = number, time.monotonic()
            reach("fuzz-mutant")
            found = read_one(kind, seed, number, place, originals[kind])
            if strays:
                found = Finding(
                    kind, seed, number, mutant(kind, seed, number, originals[kind])[0].name, "forbidden", strays[0]
                )
                strays.clear()
            at[3], at[4] = max((at[3], at[4]), (time.monotonic() - began, number))
            if isinstance(found, Finding):
                pipe.send(found)
            else:
                at[1 if found == "fine" else 2] += 1
        pipe.send(None)


def _limit() -> None:
    """Let the process take `MEMORY` more than it has now; no core files."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    statm = Path("/proc/self/statm")
    if statm.exists():  # elsewhere such a limit is not kept, or counts other things
        now = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


def _watch(folder: Path) -> list[str]:
    """Note every audit event that no reading of a file may cause; return the list that they come to."""
    strays: list[str] = []
    inside = f"{folder}{os.sep}"
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def notice(event: str, told: tuple[Any, ...]) -> None:
        if event in FORBIDDEN:
            strays.append(f"{event} {told!r}"[:300])
        elif event == "open" and isinstance(told[2], int) and told[2] & writing:
            path = os.path.abspath(os.fsdecode(told[0])) if isinstance(told[0], str | bytes) else inside
            if not (path.startswith(inside) or path == os.devnull or path.endswith(".pyc") or "__pycache__" in path):
                strays.append(f"writes {path}"[:300])

    sys.addaudithook(notice)
    return strays
