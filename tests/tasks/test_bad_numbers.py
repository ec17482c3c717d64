"""Bad numbers and too little memory in real trainings: what is said, what stays, how the bad step is made again."""

import json
import logging
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import maekit as package
from maekit.cli import main
from maekit.config import resolve
from maekit.errors import MaekitError
from maekit.settings import Pretrain
from maekit.tasks.pretrain import new_model
from maekit.tasks.replay import replay
from maekit.train import memory
from maekit.train.checkpoint import newest

Run = Callable[..., Any]
STEEP = {"steps": 8, "base_lr": 1e12, "warmup_steps": 0, "log_every": 3, "precision": "fp32"}


@pytest.fixture(scope="module")
def steep(flat: Path, tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run whose numbers burst, and its replay file."""
    run = tmp_path_factory.mktemp("steep") / "run"
    with pytest.raises(MaekitError, match="E-NUM-") as caught:
        package.pretrain({**tiny, **STEEP, "data": str(flat), "out": run})
    assert caught.value.exit_code == 4
    (file,) = (run / "replay").iterdir()
    assert f"maekit replay {file}" in str(caught.value)
    return run, file


def test_a_bad_step_is_made_again_in_another_process(steep: tuple[Path, Path], capsys: Any) -> None:
    """F35."""
    run, file = steep
    assert main(["replay", str(file), "--json"]) == 1
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    saved = newest(run / "checkpoints")
    assert saved is not None and found["step"] == saved.step + 1
    assert found["reproduced"] and found["gradients"] and not found["weights"] and not found["images"]
    assert found["module"] is None or found["input_finite"] in (True, False)


def test_a_good_step_is_said_to_be_good(steep: tuple[Path, Path], tmp_path: Path) -> None:
    """The images are innocent: with the weights that the run began with nothing is bad."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    from maekit.interchange.weights import load_model

    run, file = steep
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    model = load_model(run)  # of its architecture
    for parameter in model.parameters():
        parameter.data.mul_(0)
    save_file(model.state_dict(), copy / "replay" / file.name, header)
    done = replay({"file": copy / "replay" / file.name})
    assert (done.exit_code, done.metrics["reproduced"]) == (0, False)
    assert "but not here" in done.text


def test_a_bad_weight_is_named(steep: tuple[Path, Path], tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    run, file = steep
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    with safe_open(file, "pt") as opened:
        header, weights = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    weights["encoder.blocks.0.attn.qkv.weight"][0, 0] = float("nan")
    save_file(weights, copy / "replay" / file.name, header)
    done = replay({"file": copy / "replay" / file.name})
    assert done.exit_code == 1
    assert done.metrics["weights"] == ["encoder.blocks.0.attn.qkv.weight"]
    assert (done.metrics["module"], done.metrics["input_finite"]) == ("encoder.blocks.0.attn.qkv", True)


def test_what_is_no_replay_file_is_refused(steep: tuple[Path, Path], tmp_path: Path) -> None:
    run, file = steep
    lost = tmp_path / "replay" / file.name
    lost.parent.mkdir()
    shutil.copy(file, lost)
    other = next((run / "checkpoints").glob("*/model.safetensors"))
    text = tmp_path / "text.safetensors"
    text.write_text("no weights")
    for path, code in ((tmp_path, "MISSING"), (lost, "MISSING"), (other, "KEYS"), (text, "KEYS")):
        with pytest.raises(MaekitError, match=f"E-CKPT-{code}"):
            replay({"file": path})
    with pytest.raises(MaekitError, match="E-USAGE-FILE"):
        replay({})


def test_the_probe_and_the_classifier_are_made_again_too(pretrained: Path, classes: Path, tmp_path: Path) -> None:
    settings = {"run": pretrained, "data": str(classes), "device": "cpu", "workers": 0, "epochs": 1, "batch_size": 48}
    burst = {"base_lr": 1e30, "warmup_epochs": 0}
    for name, task, more in (
        ("probe", package.probe, {"protocol": "lars"}),
        ("finetune", package.finetune, {"log_every": 1, "precision": "fp32"}),
    ):
        with pytest.raises(MaekitError, match="E-NUM-"):
            task({**settings, **burst, **more, "epochs": 5, "out": tmp_path / name})
        (file,) = (tmp_path / name / "replay").iterdir()
        assert replay({"file": file}).exit_code == 1


def test_a_smaller_pass_is_noted_and_later_launches_begin_with_it(
    flat: Path, tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """F40: the samples stay the same, and the bits are those of a run that had small passes from there on."""
    from maekit import failpoints

    settings = {**tiny, "data": str(flat), "micro_batch": "auto", "save_every": 2, "stop_at": 6}
    monkeypatch.setattr(failpoints, "_faults", failpoints.read("train-memory:on@4"))
    done = package.pretrain({**settings, "out": tmp_path / "auto"})
    assert done.exit_code == 75 and "out of memory with 8 images per pass: 4 from now on" in caplog.text
    resolved = yaml.safe_load((tmp_path / "auto" / "config.yaml").read_text())["resolved"]
    assert resolved["micro_batch"] == 4
    monkeypatch.setattr(failpoints, "_faults", {})
    package.pretrain({**settings, "out": tmp_path / "parts", "stop_at": 3})
    parts = package.pretrain({**settings, "out": tmp_path / "parts", "micro_batch": 4})
    assert parts.metrics["state_sha256"] == done.metrics["state_sha256"]


@pytest.mark.slow
def test_a_process_without_memory_says_so_in_one_line(flat: Path, tmp_path: Path) -> None:
    """F40: a real limit on address space, a real allocation that fails."""
    limit = 6 << 30
    command = [
        sys.executable, "-m", "maekit", "pretrain", "--data", flat, "--out", tmp_path / "run", "--steps", 2,
        "--batch-size", 40, "--micro-batch", 40, "--model", "vit_large_patch16_224", "--precision", "fp32",
        "--patch-size", 8, "--device", "cpu", "--workers", 0,
    ]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 5, done.stderr
    assert "E-ENV-MEMORY" in done.stderr and "40 images per pass" in done.stderr and "--micro-batch 20" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_pass_has_as_many_images_as_memory_holds(
    flat: Path, tiny: dict[str, Any], tmp_path: Path, records: Callable[[Path], list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """F40: asked before the first step, of what the container may take; the samples stay the same."""
    settings = {**tiny, "data": str(flat)}
    package.pretrain({**settings, "out": tmp_path / "plenty"})
    model = new_model(resolve(Pretrain, flags=settings)[0], 1).train()

    def loss(images: int) -> torch.Tensor:
        return model.loss(torch.empty(images, 1, 28, 28), torch.rand(images, 16), 0.6)

    found = memory.Passes(model, loss, 16, 28 * 28).kept("fp32")
    allowed = tmp_path / "memory.max"
    allowed.write_text(str(int((found.fixed + 2.5 * found.per_image) / memory.ROOM)))
    monkeypatch.setattr(memory, "CGROUP", allowed)
    with caplog.at_level(logging.INFO, "maekit"):
        package.pretrain({**settings, "out": tmp_path / "little"})
    assert "2 images per pass: memory holds no more" in caplog.text
    config = yaml.safe_load((tmp_path / "little" / "config.yaml").read_text())
    assert config["resolved"]["micro_batch"] == 2
    for one, other in zip(records(tmp_path / "plenty"), records(tmp_path / "little"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
