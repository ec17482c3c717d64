"""F25: what an earlier release has saved is gone on with, for ever: tests/golden/releases, one folder for each.

A folder holds images, a run that was stopped after six steps, and ``expected.json``: what the release that made it
found in the two steps after that. Asked of this release is

- on every machine the same: the digest of the state once it is in model, optimizer and average; which images the next
  two steps have, their noise, which patches are removed;
- where rounding is the same (`circumstances`: processor, instructions, threads, torch), the same to the bit: losses and
  the digest at the end; elsewhere losses within RTOL.

The next release adds its folder and leaves the others as they are: `make golden` makes that of `maekit.__version__` if
it is not there. As long as a version is not released its folder may be deleted and made anew.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import maekit as package
from maekit.config import resolve
from maekit.data.sources import open_source
from maekit.model.mae import MaskedAutoencoder
from maekit.settings import Pretrain
from maekit.tasks.pretrain import training
from maekit.tasks.run_folder import open_run
from maekit.train.checkpoint import newest
from maekit.train.device import World, circumstances

RELEASES = Path(__file__).parents[1] / "golden" / "releases"
RENEW = os.environ.get("MAEKIT_GOLDEN") == "renew"
RTOL = 1e-6
"""Of losses. Measured: 1e-7 between AVX512, AVX2 and no vectors (ATEN_CPU_CAPABILITY, MKL_ENABLE_INSTRUCTIONS)."""
STOPPED, END = 6, 8
HERE = World(0, 1, torch.device("cpu"))
SETTINGS: dict[str, Any] = {
    "model": "vit_tiny_patch16_224", "img_size": 12, "channels": 1, "patch_size": 4, "embed_dim": 8, "depth": 1,
    "num_heads": 2, "decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2, "crop_scale": (1.0, 1.0), "batch_size": 4,
    "steps": END, "base_lr": 0.1, "ema": 0.9, "drop_path": 0.1, "clip_grad": 1.0, "log_every": 1, "workers": 0,
    "device": "cpu", "precision": "fp32", "seed": 5,
}  # fmt: skip


def make(folder: Path) -> None:
    """Make a release's folder with what is installed; no path and no name of a machine gets into it."""
    (folder / "images").mkdir(parents=True)
    for number in range(14):
        counted = np.arange(144).reshape(12, 12) * (number + 7) ** 2
        Image.fromarray((counted % 251).astype(np.uint8)).save(folder / "images" / f"{number:02d}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        package.pretrain({**SETTINGS, "data": "images", "out": "run", "stop_at": STOPPED})
    for name in ("metrics.jsonl", "events"):
        path = folder / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for other in (folder / "run" / "checkpoints").iterdir():
        if other.name != f"step-{STOPPED}":
            shutil.rmtree(other)
    with tempfile.TemporaryDirectory() as elsewhere:
        copy = shutil.copytree(folder, Path(elsewhere) / "copy")
        expected = {**batches(copy), **gone_on(copy)}
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def settings_of(folder: Path, **changes: Any) -> Pretrain:
    """Return the settings of the folder's run, as ``--config`` reads them."""
    file = folder / "run" / "config.yaml"
    return resolve(Pretrain, file=file, flags={"data": str(folder / "images"), "out": folder / "run", **changes})[0]


def batches(folder: Path) -> dict[str, Any]:
    """Return images, noise and masks of the next steps."""
    settings = settings_of(folder)
    source = open_source(folder / "images", "train-or-all")
    ready = training(settings, source, open_run(folder / "run", "pretrain", settings), HERE)
    assert isinstance(ready.model, MaskedAutoencoder)
    found: dict[str, Any] = {"ids": [], "noise": [], "removed": []}
    for parts in ready.loader.steps(STOPPED, END):
        (batch,) = parts
        out = ready.model.eval()(batch["images"], settings.mask_ratio, noise=batch["noise"])
        found["ids"].append(batch["ids"].tolist())
        found["noise"].append(sha256(batch["noise"]))
        found["removed"].append(out.mask.long().tolist())
    return found


def gone_on(folder: Path) -> dict[str, Any]:
    """Return digest, losses and digest again of the run: as it is read, in the steps that follow, and at the end."""
    saved = newest(folder / "run" / "checkpoints")
    assert saved is not None and saved.step == STOPPED
    begun = package.pretrain(settings_of(folder, stop_at=STOPPED))
    assert begun.exit_code == 75 and begun.metrics["state_sha256"] == saved.sha256()
    done = package.pretrain(settings_of(folder))
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {
        "circumstances": saved.state["circumstances"],
        "state_sha256": saved.sha256(),
        "losses": [line["loss"] for line in lines],
        "state_sha256 at the end": done.metrics["state_sha256"],
    }


def sha256(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("release", sorted(path.name for path in RELEASES.glob("*")))
def test_a_run_of_an_earlier_release_is_gone_on_with(release: str, tmp_path: Path) -> None:
    folder = shutil.copytree(RELEASES / release, tmp_path / release)
    expected = json.loads((folder / "expected.json").read_text())
    drawn = batches(folder)
    assert drawn == {name: expected[name] for name in drawn}
    found = gone_on(folder)
    assert found["state_sha256"] == expected["state_sha256"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=RTOL)
    if circumstances(HERE, expected["circumstances"]["micro_batch"]) == expected["circumstances"]:
        assert {**drawn, **found} == expected
    model = package.load_model(folder / "run")
    assert isinstance(model, MaskedAutoencoder) and model.features(torch.zeros(1, 1, 12, 12)).isfinite().all()


def test_the_golden_folder_of_this_release_is_there_and_none_names_a_place() -> None:
    folder = RELEASES / package.__version__
    if RENEW and not folder.exists():
        make(folder)
    assert folder.exists(), "a release keeps a checkpoint for those after it: make golden"
    words = [b"/home/", b"/tmp/", b"/Users/", str(Path.home()).encode()]
    for one in RELEASES.iterdir():
        files = [path for path in one.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) < 100_000
        assert not [(path, word) for path in files for word in words if word in path.read_bytes()]
