"""Tiny real images, and the real command in processes that can be killed (`maekit.soak.children`)."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import maekit as package
from maekit.data.sources import open_source
from maekit.soak.children import Children, Command


@pytest.fixture(scope="session")
def background(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Command]]:
    """``background("pretrain", ...)`` starts a command; its `wait` ends it."""
    children = Children(tmp_path_factory.mktemp("commands"))
    yield children.start
    children.close()


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


OF_THE_CLOCK = ("time", "images_per_second", "data_wait")
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
def whole(flat: Path, tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One unbroken run through the Python API."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert package.pretrain({**tiny, "data": str(flat), "out": run}).exit_code == 0
    return run


@pytest.fixture(scope="session")
def result(whole: Path) -> dict[str, Any]:
    return json.loads((whole / "result.json").read_text())


@pytest.fixture
def words(flat: Path, tiny: dict[str, Any], tmp_path: Path, flags: Callable[..., list[str]]) -> list[str]:
    """The command of that run, into a folder of its own."""
    return ["pretrain", *flags({**tiny, "data": flat, "out": tmp_path / "run"}), "--json"]


@pytest.fixture(scope="session")
def records() -> Callable[[Path], list[dict[str, Any]]]:
    """Read metrics.jsonl without what a clock decides."""

    def read(run: Path) -> list[dict[str, Any]]:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in OF_THE_CLOCK} for line in lines]

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
def storm() -> Callable[[Command, signal.Signals], None]:
    """Send a signal every millisecond until the last process of a command is gone, at most a minute."""

    def blow(command: Command, kind: signal.Signals) -> None:
        end = time.monotonic() + 60
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < end:
                command.send(kind)
                time.sleep(0.001)
        assert time.monotonic() < end, f"still there after a minute: {command.stderr}"

    return blow


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
