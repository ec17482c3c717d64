"""Commands as processes that can be killed, started through one `maekit.zygote`."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


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
        """Wait for its end."""
        self.code = self.children.wait(self.pid)
        return self

    def send(self, kind: signal.Signals, *, group: bool = True) -> None:
        """Send a signal to the whole process group, as a terminal or a scheduler does, or to the process alone."""
        if group:
            os.killpg(self.pid, kind)
        else:
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
    """The zygote's other end; `folder` takes what its children print."""

    folder: Path
    process: "subprocess.Popen[str]" = field(init=False)
    ended: dict[int, int] = field(default_factory=dict)
    count: int = 0

    def __post_init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "maekit.zygote"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self._hear("ready")

    def start(
        self, *argv: str | Path, cwd: Path | None = None, file_size: int | None = None,
        environment: dict[str, str] | None = None,
    ) -> Command:  # fmt: skip
        """Start ``maekit ARGV``.

        Args:
            cwd: its working folder; default: a new one.
            file_size: no file may become longer, in bytes.
            environment: variables beside those that are there.
        """
        self.count += 1
        folder = self.folder / str(self.count)
        folder.mkdir()
        request = {
            "argv": [str(word) for word in argv], "cwd": str(cwd or folder), "file_size": file_size,
            "stdout": str(folder / "stdout"), "stderr": str(folder / "stderr"), "environment": environment or {},
        }  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Command(self._hear("started"), folder, self)

    def wait(self, pid: int) -> int:
        """Return the exit code of a child once it has ended."""
        while pid not in self.ended:
            self._hear("ended")
        return self.ended.pop(pid)

    def close(self) -> None:
        """End the zygote."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.read()
        self.process.stdout.close()
        self.process.wait()

    def _hear(self, word: str) -> Any:
        """Read what the zygote tells until `word`; ends of children are noted on the way."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            facts = json.loads(line)
            if "ended" in facts:
                self.ended[facts["ended"]] = facts["code"]
            if word in facts:
                return facts[word]
        raise RuntimeError("the process that starts commands is gone")
