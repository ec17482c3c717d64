"""The small run that all trials share, and what must hold after each of them.

The run: 24 steps of a masked autoencoder 16 wide on 64 drawn images of 32 px, a checkpoint every few steps, on one
thread of the CPU: about a second. Left in peace it ends with a digest of its state; whatever happens to it, the same
command must end with that digest, and leave nothing behind: no process, no temporary file, no lock, no checkpoint that
does not verify.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from maekit import failpoints
from maekit.errors import MaekitError
from maekit.soak.children import Children, Command, Lost
from maekit.train import checkpoint
from maekit.train.log import read_metrics

STEPS = 24
RUN = [
    "--model", "vit_tiny_patch16_224", "--img-size", "32", "--patch-size", "8", "--embed-dim", "16", "--depth", "2",
    "--num-heads", "2", "--decoder-dim", "16", "--decoder-depth", "1", "--decoder-heads", "2", "--batch-size", "16",
    "--steps", str(STEPS), "--warmup-steps", "2", "--base-lr", "1e-2", "--ema", "0.9", "--log-every", "1",
    "--device", "cpu", "--precision", "fp32", "--seed", "5",
]  # fmt: skip


PATIENCE, TIMES = 120.0, 20
"""A command that takes longer than so many seconds and so many times the run left in peace hangs."""


@dataclass
class Bench:
    """What the trials of one soak share.

    Attributes:
        folder: for data, the runs and what commands say.
        digest: of the state of the run left in peace.
        seconds: that it took.
    """

    folder: Path
    children: Children
    data: Path
    digest: str = ""
    seconds: float = 0.0
    template: Path = field(init=False)
    """A run that was stopped in the middle with several checkpoints, to be copied."""

    def command(self, run: Path, *more: str, **options: Any) -> Command:
        """Start, or go on with, the run in a folder; options as of `Children.start`."""
        words = ["pretrain", *RUN, "--data", self.data, "--out", run, "--json", *more]
        return self.children.start(*words, **options)

    def faulty(self, run: Path, fault: str, *more: str) -> Command:
        """Start it with a failpoint."""
        return self.command(run, *more, environment={failpoints.VARIABLE: fault})

    def finish(self, run: Path, *more: str, logged: bool = True) -> None:
        """Give the command again, in peace, and compare the end.

        Args:
            logged: metrics.jsonl must hold every step.

        Raises:
            Lost: if anything is not as it would have been.
        """
        done = self.command(run, *more).wait()
        if done.code != 0:
            raise Lost(f"the same command did not go on: exit {done.code}, {done.last_line}")
        if done.json["state_sha256"] != self.digest:
            raise Lost(f"other bits at the end: {done.json['state_sha256'][:12]}, not {self.digest[:12]}")
        steps = [record["step"] for record in read_metrics(run / "metrics.jsonl")]
        if logged and steps != list(range(1, STEPS + 1)):
            raise Lost(f"metrics.jsonl has steps {steps}")
        self.check_tidy(run, done)

    def check_tidy(self, run: Path, done: Command) -> None:
        """Refuse what a finished command may not leave.

        Raises:
            Lost: naming it.
        """
        if not done.group_is_gone(10):
            raise Lost("a process is left")
        left = [str(path.relative_to(run)) for path in run.rglob("*") if path.name.startswith((".tmp", ".lock"))]
        if left:
            raise Lost(f"left behind: {left[0]}")
        self.check_verified(run)

    def check_verified(self, run: Path, at_least: int = -1) -> int:
        """Return the newest step on the disk, -1 if there is none; every checkpoint there must verify.

        Raises:
            Lost: if one does not, or the newest is older than `at_least`.
        """
        found = checkpoint.steps(run / "checkpoints")
        for path in found:
            try:
                checkpoint.sound(path)
            except MaekitError as error:
                raise Lost(f"{path.name} does not verify: {error.args[0]}") from error
        newest = max(map(checkpoint.number, found), default=-1)
        if newest < at_least:
            raise Lost(f"newest checkpoint: {newest}, and before it was {at_least}")
        return newest

    def redone(self, run: Path) -> int:
        """Return how many steps were done and have to be done again."""
        done = max((record["step"] for record in read_metrics(run / "metrics.jsonl")), default=0)
        return done - max(0, self.check_verified(run))


def make(folder: Path, seed: int) -> Bench:
    """Draw the images, start the zygote, let the run go through once in peace and once to the middle.

    Raises:
        Lost: if it does not even do that.
    """
    data = folder / "images"
    data.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    for i in range(64):
        low = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        low.resize((40, 36), Image.Resampling.BICUBIC).save(data / f"{i:02d}.png")
    (folder / "said").mkdir()
    bench = Bench(folder, Children(folder / "said", PATIENCE), data)
    peace = bench.command(folder / "peace", "--save-every", "6", "--workers", "0").wait()
    if peace.code != 0:
        raise Lost(f"the run left in peace failed: {peace.last_line}")
    bench.digest = peace.json["state_sha256"]
    records = read_metrics(folder / "peace" / "metrics.jsonl")
    bench.seconds = 1.0 + max(record["time"] for record in records)  # and its start
    bench.children.limit = PATIENCE + TIMES * bench.seconds
    bench.template = folder / "template"
    stopped = bench.command(
        bench.template, "--save-every", "4", "--keep", "4", "--stop-at", "18", "--workers", "0"
    ).wait()
    if stopped.code != 75:
        raise Lost(f"the run that is stopped failed: {stopped.last_line}")
    return bench


def copied(bench: Bench, run: Path) -> Path:
    """Return a copy of the stopped run."""
    return Path(shutil.copytree(bench.template, run))


def check_said(command: Command, *codes: int, pattern: str = "") -> None:
    """Refuse an exit code or words that a user should not see.

    Raises:
        Lost: naming them.
    """
    if command.code not in codes:
        raise Lost(f"exit code {command.code}, not one of {codes}: {command.last_line}")
    if "Traceback" in command.stderr:
        raise Lost(f"a traceback: {command.last_line}")
    if pattern and pattern not in command.stderr:
        raise Lost(f"nothing said of {pattern!r}: {command.last_line}")
