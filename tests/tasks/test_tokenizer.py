"""``maekit tokenizer`` from end to end: the run folder, stopping and going on, what it refuses."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import maekit as package
from maekit.data.image import read_image
from maekit.data.sources import hold_out, open_source
from maekit.errors import MaekitError
from maekit.interchange.targets import load_target
from maekit.model.tokenizer import VQTokenizer
from maekit.report.tokenizer import Judged, flat_error
from maekit.train import checkpoint

Run = Callable[..., Any]
SMALL: dict[str, Any] = {
    "img_size": 28, "channels": 1, "patch_size": 7, "vocabulary": 24, "batch_size": 12, "steps": 12, "base_lr": 2e-2,
    "workers": 0, "log_every": 3, "save_every": 4, "device": "cpu", "seed": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(flat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("tokenizer") / "run"
    assert package.tokenizer({**SMALL, "data": str(flat), "out": run}).exit_code == 0
    return run


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def test_the_run_folder_explains_itself(folder: Path, result: dict[str, Any], flat: Path) -> None:
    for name in ("reconstructions.png", "codes.png"):
        Image.open(folder / name).verify()
    page = (folder / "report.html").read_text()
    assert "Use of the codes" in page and 'src="http' not in page
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["verb"] == "tokenizer" and config["resolved"]["model"]["vocabulary"] == 24
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any({"loss", "lr"} <= record.keys() for record in records)
    assert any("val/perplexity" in record for record in records)
    saved = checkpoint.load(folder / "checkpoints" / "step-12")
    assert saved.sha256() == result["state_sha256"] and "codebook.counts" in saved.tensors["model"]
    target = load_target(folder)
    source = open_source(flat, "train-or-all")  # what pre-training sees: also those that were held out here
    assert (target.kind, target.name, target.fingerprint) == ("vq", "token", source.fingerprint())
    assert all(torch.equal(value, saved.tensors["model"][name]) for name, value in target.tensors.items())


def test_its_numbers_are_those_of_the_target_that_it_wrote(folder: Path, result: dict[str, Any], flat: Path) -> None:
    model = load_target(folder).module()
    assert isinstance(model, VQTokenizer)
    _, held = hold_out(open_source(flat, "train-or-all"))
    images = torch.stack([read_image(bytes(held.read(i)), channels=1) for i in range(len(held))]).float() / 255  # type: ignore[arg-type]
    codes = model.codes(images)
    error = float((model.decode(codes) - images).square().mean())
    assert result["psnr"] == pytest.approx(-10 * math.log10(error), rel=1e-5) and result["held_out"] == len(held)
    counts = torch.bincount(codes.flatten(), minlength=24)
    shares = counts[counts > 0] / counts.sum()
    assert result["perplexity"] == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-5)
    assert result["usage"] == pytest.approx(len(shares) / 24)
    assert 1 <= result["perplexity"] <= 24 * result["usage"] + 1e-9


def test_stopping_and_going_on_gives_the_same_bits_and_lines(
    maekit: Run, flat: Path, folder: Path, result: dict[str, Any], tmp_path: Path, records: Run, flags: Run
) -> None:
    words = ["tokenizer", *flags({**SMALL, "data": flat, "out": tmp_path / "run"}), "--json"]
    stopped = maekit(*words, "--stop-at", 7)  # between two log lines and two checkpoints
    assert stopped.code == 75 and stopped.json["steps"] == 7, stopped.stderr
    with pytest.raises(MaekitError, match="goes on"):
        load_target(tmp_path / "run")
    done = maekit(*words)
    assert done.code == 0 and done.json["state_sha256"] == result["state_sha256"], done.stderr
    assert {name: done.json[name] for name in ("psnr", "perplexity")} == {k: result[k] for k in ("psnr", "perplexity")}
    assert records(tmp_path / "run") == records(folder)
    assert "nothing to do" in maekit(*words[:-1]).stdout


def test_parts_of_a_batch_see_the_same_samples_and_move_the_codes_once(
    flat: Path, tmp_path: Path, result: dict[str, Any]
) -> None:
    done = package.tokenizer({**SMALL, "data": str(flat), "out": tmp_path / "run", "micro_batch": 4, "steps": 2})
    whole = package.tokenizer({**SMALL, "data": str(flat), "out": tmp_path / "whole", "steps": 2})
    one, other = (load_target(tmp_path / name).tensors["codebook.counts"] for name in ("run", "whole"))
    assert float(one.sum()) == pytest.approx(float(other.sum()), rel=0.2)
    assert done.metrics["loss"] == pytest.approx(float(str(whole.metrics["loss"])), rel=0.05)


def test_images_to_score_on_can_be_named_and_classes_are_not_needed(classes: Path, flat: Path, tmp_path: Path) -> None:
    done = package.tokenizer({**SMALL, "data": str(classes), "out": tmp_path / "a", "steps": 2})
    assert done.metrics["held_out"] == 100  # DATA/val
    settings = {**SMALL, "data": str(flat), "val_data": str(classes / "val"), "out": tmp_path / "b", "steps": 2}
    assert package.tokenizer(settings).metrics["held_out"] == 100


@pytest.mark.parametrize(
    ("more", "code", "told"),
    [
        ({"nproc": 2}, "E-CONFIG-NPROC", "expected one"),
        ({"ema": 0.9}, "E-CONFIG-IDLE", "running means already"),
        ({"vocabulary": 1}, "E-CONFIG-VALUE", "vocabulary"),
        ({"img_size": 30}, "E-CONFIG-SIZE", "multiples of the patch side 7"),
        ({"precision": "fp16"}, "E-CONFIG-VALUE", "precision"),
        ({"stats": "imagenet"}, "E-CONFIG-STATS", "--stats dataset"),
        ({"recipe": "builtin/finetune-fashion"}, "E-CONFIG-RECIPE", "a recipe for finetune"),
        ({"data": None}, "E-USAGE-DATA", "--data"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(
    flat: Path, tmp_path: Path, more: dict[str, Any], code: str, told: str
) -> None:
    with pytest.raises(MaekitError, match=told) as caught:
        package.tokenizer({**SMALL, "data": str(flat), "out": tmp_path / "run", **more})
    assert caught.value.code == code and not (tmp_path / "run").exists()


def test_a_recipe_of_pretraining_gives_the_size_and_not_the_schedule() -> None:
    from maekit.config import deviations, origins, resolve

    chosen, sources = resolve(package.Tokenizer, recipe="small/pretrain-32", flags={"patch_size": "8"})
    assert (chosen.img_size, chosen.patch_size, chosen.crop_scale) == ((32, 32), 8, (0.5, 1.0))
    assert (chosen.epochs, chosen.base_lr, sources["epochs"]) == (20, 2e-3, "default")
    assert [deviation.name for deviation in deviations("small/pretrain-32", chosen)] == ["patch_size"]
    assert origins(chosen, sources)["img_size"] == "our own"


def test_measures_by_hand() -> None:
    judged = Judged(torch.tensor([5, 5, 0, 0]), torch.zeros(4, 12), 0.1, 0.2, [])
    assert judged.perplexity == pytest.approx(2) and judged.usage == 0.5
    images = torch.tensor([[[[0.0, 1.0], [0.5, 0.5]]]])
    assert float(flat_error(images, 2).sum()) == pytest.approx(0.5)


@pytest.mark.slow
def test_the_command_gives_clothes_back_better_than_their_patches_mean_colours(fresh: Run, tmp_path: Path) -> None:
    done = fresh(
        "tokenizer", "--recipe", "builtin/pretrain-fashion", "--epochs", 4, "--out", tmp_path / "run", "--json"
    )
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["psnr"] > found["psnr_flat"] + 2 and found["usage"] > 0.8 and found["perplexity"] > 150
