"""F41 in real trainings: `--sdc-check` finds a flipped bit, gives no false alarm and changes no bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import maekit as package
from maekit.train.checkpoint import newest

Run = Callable[..., Any]


def test_the_command_stops_at_a_flipped_bit_and_goes_on_to_the_same_bits(
    background: Run, words: list[str], result: dict[str, Any], tmp_path: Path
) -> None:
    words = [*words, "--sdc-check", "2"]
    done = background(*words, environment={"MAEKIT_FAILPOINT": "train-flip:on@7"}).wait()
    assert done.code == 4 and "Traceback" not in done.stderr
    assert done.stderr.count("error[E-NUM-SDC]: silent corruption in step 7: ") == 1, done.stderr
    assert "goes on from step 4" in done.stderr
    saved = newest(tmp_path / "run" / "checkpoints")
    assert saved is not None and saved.step == 4
    done = background(*words).wait()
    assert done.code == 0 and done.json["state_sha256"] == result["state_sha256"], done.stderr


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_pre_training_with_all_that_draws_and_averages_has_the_same_bits(
    flat: Path, tiny: dict[str, Any], tmp_path: Path, workers: int
) -> None:
    settings = {**tiny, "data": str(flat), "steps": 24, "save_every": 100, "ema": 0.9, "drop_path": 0.5, "depth": 2}
    settings |= {"batch_size": 9, "micro_batch": 3, "clip_grad": 0.1}
    plain = package.pretrain({**settings, "out": tmp_path / "plain"}).metrics
    checked = package.pretrain({**settings, "out": tmp_path / "checked", "sdc_check": 1, "workers": workers}).metrics
    assert [checked[name] for name in ("state_sha256", "loss")] == [plain[name] for name in ("state_sha256", "loss")]


@pytest.mark.slow
def test_fine_tuning_that_erases_and_mixes_images_has_the_same_bits(
    pretrained: Path, classes: Path, tmp_path: Path
) -> None:
    settings = {"run": pretrained, "data": str(classes), "device": "cpu", "workers": 0, "steps": 12, "batch_size": 24}
    settings |= {"random_erasing": 0.9, "mixup": 0.8, "cutmix": 1.0, "drop_path": 0.2, "precision": "fp32"}
    plain = package.finetune({**settings, "out": tmp_path / "plain"}).metrics
    checked = package.finetune({**settings, "out": tmp_path / "checked", "sdc_check": 1}).metrics
    assert checked["state_sha256"] == plain["state_sha256"]


@pytest.mark.slow
def test_a_codebook_that_moves_with_the_passes_has_the_same_bits(flat: Path, tmp_path: Path) -> None:
    settings = {"data": str(flat), "img_size": 28, "channels": 1, "patch_size": 7, "vocabulary": 24, "steps": 12}
    settings |= {"batch_size": 12, "micro_batch": 4, "base_lr": 2e-2, "workers": 0, "device": "cpu"}
    plain = package.tokenizer({**settings, "out": tmp_path / "plain"}).metrics
    checked = package.tokenizer({**settings, "out": tmp_path / "checked", "sdc_check": 1}).metrics
    assert checked["state_sha256"] == plain["state_sha256"]
