"""Commands as processes that can be killed, started through one `maekit.zygote`."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Lost(Exception):
    """A promise was broken; the text says which."""


@dataclass
class Command:
    """A command that runs or ran.

    Attributes:
        code: exit code, negative when a signal killed it; known after `wait`.
    """

    pid: int
    folder: Path
    children: "Children"
    code: int = 0

    def wait(self) -> "Command":
        """Wait for its end.

        Raises:
            Lost: if it has not ended after `Children.limit`; its group is killed.
        """
        try:
            self.code = self.children.wait(self.pid)
        except TimeoutError as error:
            said = self.last_line
            self.children.end(self.pid)
            raise Lost(f"hung at {said!r}: {error}") from error
        return self

    def send(self, kind: signal.Signals, *, group: bool = True) -> None:
        """Send a signal to the whole process group, as a terminal or a scheduler does, or to the process alone.

        Raises:
            ProcessLookupError: if it is gone.
        """
        if group:
            with contextlib.suppress(ProcessLookupError):  # or it has not made its group yet
                os.killpg(self.pid, kind)
                return
        os.kill(self.pid, kind)

    @property
    def stdout(self) -> str:
        """What it has printed."""
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        """What it has said."""
        file = self.folder / "stderr"
        return file.read_text() if file.exists() else ""  # not yet: the child has not come so far

    @property
    def last_line(self) -> str:
        """The last line that it said."""
        return (self.stderr.splitlines() or ["it said nothing"])[-1]

    @property
    def json(self) -> dict[str, Any]:
        """The object in the last line of stdout."""
        return json.loads(self.stdout.splitlines()[-1])

    def group_is_gone(self, seconds: float = 0.0) -> bool:
        """Whether nothing is left of its process group, now or within some seconds."""
        end = time.monotonic() + seconds
        while True:
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return True
            if time.monotonic() > end:
                return False
            time.sleep(0.02)


@dataclass
class Children:
    """The zygote's other end.

    Attributes:
        folder: takes what its children print.
        limit: seconds that one may take before it counts as hung; None: for ever.
        running: those whose end was not yet waited for.
    """

    folder: Path
    limit: float | None = None
    process: "subprocess.Popen[bytes]" = field(init=False)
    running: set[int] = field(default_factory=set)
    ended: dict[int, int] = field(default_factory=dict)
    count: int = 0
    heard: bytes = b""

    def __post_init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "maekit.zygote"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment,
            process_group=0,  # ctrl-C is for the soak: it ends its children itself
        )  # fmt: skip
        self._hear("ready")

    def start(
        self, *argv: str | Path, cwd: Path | None = None, file_size: int | None = None,
        environment: dict[str, str] | None = None, clock: float = 0.0, refuse: dict[str, object] | None = None,
    ) -> Command:  # fmt: skip
        """Start ``maekit ARGV``.

        Args:
            cwd: its working folder; default: a new one.
            file_size: no file may become longer, in bytes.
            environment: variables beside those that are there.
            clock: seconds by which its time of day is another.
            refuse: fields of `maekit.zygote.Refusal`, for a system that refuses to write.
        """
        self.count += 1
        folder = self.folder / str(self.count)
        folder.mkdir()
        request = {
            "argv": [str(word) for word in argv], "cwd": str(cwd or folder), "file_size": file_size,
            "stdout": str(folder / "stdout"), "stderr": str(folder / "stderr"), "environment": environment or {},
            "clock": clock, "refuse": refuse,
        }  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        pid = self._hear("started")
        self.running.add(pid)
        return Command(pid, folder, self)

    def wait(self, pid: int) -> int:
        """Return the exit code of a child once it has ended.

        Raises:
            TimeoutError: if it has not ended after `limit`.
        """
        end = None if self.limit is None else time.monotonic() + self.limit
        while pid not in self.ended:
            self._hear("ended", end)
        self.running.discard(pid)
        return self.ended.pop(pid)

    def end(self, *pids: int) -> None:
        """Kill the groups of some children, by default of all whose end was not waited for."""
        for pid in pids or tuple(self.running):
            for kill in (os.killpg, os.kill):  # at its very start it has no group yet
                with contextlib.suppress(ProcessLookupError):
                    kill(pid, signal.SIGKILL)
            self.running.discard(pid)
            if self.process.poll() is None:
                self.wait(pid)

    def close(self) -> None:
        """End the zygote."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        while self.process.stdout.read(65536):
            pass
        self.process.stdout.close()
        self.process.wait()

    def _hear(self, word: str, end: float | None = None) -> Any:
        """Read what the zygote tells until `word`; ends of children are noted on the way."""
        while True:
            facts = json.loads(self._line(end))
            if "ended" in facts:
                self.ended[facts["ended"]] = facts["code"]
            if word in facts:
                return facts[word]

    def _line(self, end: float | None) -> bytes:
        assert self.process.stdout is not None
        while b"\n" not in self.heard:
            left = None if end is None else max(0.0, end - time.monotonic())
            if not select.select([self.process.stdout], [], [], left)[0]:
                raise TimeoutError(f"not over after {self.limit:.0f} s")
            more = self.process.stdout.read(65536)
            if not more:
                self.process.wait()
                raise RuntimeError("the process that starts commands is gone")
            self.heard += more
        line, _, self.heard = self.heard.partition(b"\n")
        return line
