"""Tiny real images, and the real command in processes that can be killed.

Starting a process costs seconds of importing torch. So one parent process imports the tasks once and forks a child for
each command; the child is a process (and a process group) of its own, that runs what ``python -m maekit`` runs.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from maekit.data.sources import open_source

PARENT = """
import json, os, resource, select, sys
from maekit.cli import main
import maekit.tasks.embed, maekit.tasks.finetune, maekit.tasks.knn, maekit.tasks.pretrain, maekit.tasks.probe
import maekit.tasks.quickstart, maekit.tasks.reconstruct, maekit.tasks.lowshot, maekit.tasks.retrieve
import maekit.tasks.predict

def tell(**facts):
    print(json.dumps(facts), flush=True)

def start(argv, cwd, stdout, stderr, file_size):
    os.setsid()
    os.chdir(cwd)
    for number, path in ((0, os.devnull), (1, stdout), (2, stderr)):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
        os.close(handle)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.argv = ["maekit", *argv]
    sys.exit(main())

tell(ready=True)
while True:
    if select.select([0], [], [], 0.02)[0]:
        line = b""
        while not line.endswith(b"\\n"):
            if not (more := os.read(0, 1)):
                sys.exit()
            line += more
        if (pid := os.fork()) == 0:
            start(**json.loads(line))
        tell(started=pid)
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        continue
    if pid:
        tell(ended=pid, code=os.waitstatus_to_exitcode(status))
"""


@dataclass
class Command:
    """A command that runs or ran.

    Attributes:
        code: exit code, negative when a signal killed it.
    """

    pid: int
    folder: Path
    parent: "Parent"
    code: int = 0

    def wait(self) -> "Command":
        self.code = self.parent.wait(self.pid)
        return self

    def send(self, kind: signal.Signals) -> None:
        """Send a signal to the whole process group, as a terminal or a scheduler does."""
        os.killpg(self.pid, kind)

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        file = self.folder / "stderr"
        return file.read_text() if file.exists() else ""  # not yet: the child has not come so far

    @property
    def json(self) -> dict[str, Any]:
        """Return the object in the last line of stdout."""
        return json.loads(self.stdout.splitlines()[-1])


@dataclass
class Parent:
    """The process that has imported everything; `folder` takes what its children print."""

    folder: Path
    process: "subprocess.Popen[str]" = field(init=False)
    ended: dict[int, int] = field(default_factory=dict)
    count: int = 0

    def __post_init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.hear("ready")

    def hear(self, word: str) -> Any:
        """Read what the parent tells until `word`; ends of children are noted on the way."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            facts = json.loads(line)
            if "ended" in facts:
                self.ended[facts["ended"]] = facts["code"]
            if word in facts:
                return facts[word]
        raise AssertionError("the parent process is gone")

    def start(self, *argv: str | Path, cwd: Path | None = None, file_size: int | None = None) -> Command:
        self.count += 1
        folder = self.folder / str(self.count)
        folder.mkdir()
        request = {
            "argv": [str(word) for word in argv], "cwd": str(cwd or folder), "file_size": file_size,
            "stdout": str(folder / "stdout"), "stderr": str(folder / "stderr"),
        }  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Command(self.hear("started"), folder, self)

    def wait(self, pid: int) -> int:
        while pid not in self.ended:
            self.hear("ended")
        return self.ended.pop(pid)

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.read()
        self.process.stdout.close()
        self.process.wait()


@pytest.fixture(scope="session")
def background(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Command]]:
    """``background("pretrain", ...)`` starts a command; its `wait` ends it."""
    parent = Parent(tmp_path_factory.mktemp("commands"))
    yield parent.start
    parent.close()


@pytest.fixture(scope="session")
def maekit(background: Callable[..., Command]) -> Callable[..., Command]:
    """``maekit("pretrain", ...)`` runs a command to its end."""
    return lambda *argv, **options: background(*argv, **options).wait()


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Run ``python -m maekit ...`` itself, in a new interpreter."""

    def run(*argv: str | Path) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "maekit", *map(str, argv)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path_factory.mktemp("cwd"))

    return run


@pytest.fixture(scope="session")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes of clothes, 24 training and 10 validation images each, as PNG files."""
    root = tmp_path_factory.mktemp("classes")
    for part, count in (("train", 24), ("val", 10)):
        copy_builtin(root / part, part, count)
    return root


@pytest.fixture(scope="session")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images without labels in one folder."""
    root = tmp_path_factory.mktemp("flat")
    source = open_source("builtin:fashion", "train")
    for i in range(40):
        (root / f"{i:02d}.png").write_bytes(bytes(source.read(i)))  # type: ignore[arg-type]
    return root


def copy_builtin(root: Path, part: Any, count: int) -> None:
    """Write the first `count` images of each class as ``root/CLASS/i.png``."""
    source = open_source("builtin:fashion", part)
    assert source.labels is not None and source.classes is not None
    left = {label: count for label in range(len(source.classes))}
    for i, label in enumerate(source.labels):
        if left[label]:
            left[label] -= 1
            file = root / source.classes[label].replace("/", "-") / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(bytes(source.read(i)))  # type: ignore[arg-type]


TINY: dict[str, Any] = {
    "model": "vit_tiny_patch16_224", "img_size": 28, "channels": 1, "patch_size": 7, "embed_dim": 16, "depth": 1,
    "num_heads": 2, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, "target": "pixel", "mask_ratio": 0.6,
    "batch_size": 8, "steps": 12, "base_lr": 1e-2, "workers": 0, "log_every": 3, "save_every": 4, "device": "cpu",
    "seed": 3, "precision": "fp32",
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny() -> dict[str, Any]:
    """A pre-training of a second: 12 steps of 8 images, 16 patches each."""
    return dict(TINY)


@pytest.fixture(scope="session")
def flags() -> Callable[[dict[str, Any]], list[str]]:
    """Spell settings as flags."""

    def spell(settings: dict[str, Any]) -> list[str]:
        words: list[str] = []
        for name, value in settings.items():
            flag = name.replace("_", "-")
            words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}"]
            if not isinstance(value, bool):
                words += map(str, value) if isinstance(value, list | tuple) else [str(value)]
        return words

    return spell


@pytest.fixture(scope="session")
def records() -> Callable[[Path], list[dict[str, Any]]]:
    """Read metrics.jsonl without what a clock decides."""

    def read(run: Path) -> list[dict[str, Any]]:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in ("time", "images_per_second")} for line in lines]

    return read


@pytest.fixture(scope="session")
def until() -> Callable[[Callable[[], bool]], None]:
    """Wait until something is so, at most a minute."""

    def wait(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, "nothing happened for a minute"
            time.sleep(0.01)

    return wait


@pytest.fixture(scope="session")
def pretrained(maekit: Callable[..., Command], classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 steps of the built-in recipe on 240 images."""
    run = tmp_path_factory.mktemp("pretrained") / "run"
    done = maekit(
        "pretrain", "--recipe", "builtin/pretrain-fashion", "--data", classes, "--out", run, "--steps", 40,
        "--batch-size", 64, "--workers", 0, "--device", "cpu",
    )  # fmt: skip
    assert done.code == 0, done.stderr
    return run
