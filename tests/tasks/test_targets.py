"""Fine-tuning for tags and for numbers from end to end: learned, stopped and gone on with, scored, loaded, refused."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics
from torch.nn import functional as F

import maekit as package
from maekit.data.image import read_image
from maekit.data.source import DatasetSource, Source, Targets
from maekit.data.sources import Form, open_source
from maekit.errors import MaekitError
from maekit.interchange.weights import load_classifier
from maekit.seeds import seed_all
from maekit.settings import Finetune
from maekit.tasks.goals import Numbers, Tags

Run = Callable[..., Any]
COUNT = 240


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clothes with tags that a small model can see, mean brightness in per cent, and lit pixels."""
    root = tmp_path_factory.mktemp("listed")
    source = open_source("builtin:fashion", "train")
    lines = ["path,tags,brightness,lit,bright"]
    for i in range(COUNT):
        data = bytes(source.read(i))  # type: ignore[arg-type]
        (root / f"{i}.png").write_bytes(data)
        pixels = np.asarray(Image.open(io.BytesIO(data)), dtype=float) / 255
        half = len(pixels) // 2
        is_so = {"bright": pixels.mean() > 0.3, "top-heavy": pixels[:half].mean() > pixels[half:].mean()}
        names = "|".join(name for name, so in is_so.items() if so)
        lines.append(f"{i}.png,{names},{100 * pixels.mean():.4f},{(pixels > 0.1).sum()},{int(is_so['bright'])}")
    (root / "list.csv").write_text("\n".join(lines))
    return root / "list.csv"


@pytest.fixture(scope="module")
def base(listed: Path) -> dict[str, Any]:
    return {
        "from_scratch": True, "data": str(listed), "model": "vit_tiny_patch16_224", "img_size": 28, "patch_size": 7,
        "embed_dim": 24, "depth": 1, "num_heads": 2, "channels": 1, "batch_size": 16, "epochs": 8, "base_lr": 3e-2,
        "warmup_epochs": 1, "layer_decay": 1.0, "drop_path": 0.0, "crop_scale": [1, 1], "random_erasing": 0.0,
        "auto_augment": None, "flip": False, "workers": 0, "device": "cpu", "log_every": 8, "seed": 1,
    }  # fmt: skip


@pytest.fixture(scope="module")
def tags(base: dict[str, Any]) -> dict[str, Any]:
    return {**base, "task": "multilabel", "label_column": "tags"}


@pytest.fixture(scope="module")
def numbers(base: dict[str, Any]) -> dict[str, Any]:
    return {**base, "task": "regression", "label_column": "brightness,lit"}


@pytest.fixture(scope="module")
def tagged(tags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    run = tmp_path_factory.mktemp("tagged") / "run"
    return run, dict(package.finetune({**tags, "out": run}).metrics)


@pytest.fixture(scope="module")
def measured(numbers: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    run = tmp_path_factory.mktemp("measured") / "run"
    return run, dict(package.finetune({**numbers, "out": run}).metrics)


def said(run: Path, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Return truth and outputs: the loaded model, image by image."""
    found = load_classifier(run)
    assert source.targets is not None and found.classes == source.targets.names
    images = torch.stack([read_image(bytes(source.read(i)), channels=1) for i in range(len(source))])  # type: ignore[arg-type]
    images = F.interpolate(images.float(), (28, 28)) if images.shape[-1] != 28 else images
    with torch.no_grad():
        outputs = found.model((images / 255 - found.spec["mean"][0]) / found.spec["std"][0])
    return source.targets.values, outputs.double().numpy()


def test_tags_are_learned_and_what_is_loaded_is_what_was_scored(
    tagged: tuple[Path, dict[str, Any]], tags: dict[str, Any]
) -> None:
    """Oracle: scikit-learn's measures of the loaded model's logits."""
    run, result = tagged
    assert result["map"] > 0.6 and result["train_images"] == 192 and result["val_images"] == 48
    val = open_source(tags["data"], "val", label_column="tags", form=Form("multilabel"))
    truth, logits = said(run, val)
    assert result["map"] == pytest.approx(metrics.average_precision_score(truth, logits), abs=2e-3)
    assert result["macro_auroc"] == pytest.approx(metrics.roc_auc_score(truth, logits), abs=2e-3)
    assert load_classifier(run).task == "multilabel"
    files = {"report.html", "per_label.csv", "labels.png", "mistakes.png", "result.json"}
    assert files <= {file.name for file in run.iterdir()}
    with (run / "per_label.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == ["bright", "top-heavy"]
    assert sum(float(row["average_precision"]) for row in rows) / 2 == pytest.approx(result["map"])
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [record for record in records if "val/map" in record]
    assert len(logged) >= 10 and logged[-1]["val/map"] == result["map"]
    assert logged[-1]["val/loss"] == pytest.approx(result["val_loss"])
    assert "Traceback" not in (page := (run / "report.html").read_text()) and "average precision" in page


def test_numbers_are_learned_and_what_is_loaded_says_them_in_the_users_units(
    measured: tuple[Path, dict[str, Any]], numbers: dict[str, Any]
) -> None:
    """Oracle: scikit-learn's measures of the loaded model's outputs."""
    run, result = measured
    assert result["r2"] > 0.6
    val = open_source(numbers["data"], "val", label_column="brightness,lit", form=Form("regression"))
    truth, outputs = said(run, val)
    assert load_classifier(run).task == "regression"
    for i, name in enumerate(["brightness", "lit"]):
        found = result["targets"][name]
        assert found["r2"] == pytest.approx(metrics.r2_score(truth[:, i], outputs[:, i]), abs=1e-3)
        assert found["mae"] == pytest.approx(metrics.mean_absolute_error(truth[:, i], outputs[:, i]), rel=1e-2)
    assert result["r2"] == pytest.approx(np.mean([each["r2"] for each in result["targets"].values()]))
    assert {"report.html", "per_target.csv", "targets.png", "worst.png"} <= {file.name for file in run.iterdir()}
    assert "mae" not in result and "R2" in (run / "report.html").read_text()


def test_the_command_stopped_and_gone_on_with_gives_the_same_bits(
    maekit: Run, tags: dict[str, Any], tagged: tuple[Path, dict[str, Any]], tmp_path: Path, flags: Run
) -> None:
    words = [*flags({name: value for name, value in tags.items() if value is not None}), "--auto-augment", "none"]
    words += ["--out", str(tmp_path / "run"), "--json"]
    assert maekit("finetune", *words, "--stop-at", 41).code == 75
    done = maekit("finetune", *words)
    assert done.code == 0 and "Warning" not in done.stderr, done.stderr
    same = {name for name in tagged[1] if name not in ("run", "images_per_second")}
    assert {name: done.json[name] for name in same} == {name: tagged[1][name] for name in same}


def test_numbers_too_go_on_with_the_same_bits(
    numbers: dict[str, Any], measured: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    settings = {**numbers, "out": tmp_path / "run"}
    assert package.finetune({**settings, "stop_at": 29}).exit_code == 75
    done = package.finetune(settings).metrics
    assert (done["state_sha256"], done["r2"]) == (measured[1]["state_sha256"], measured[1]["r2"])


def test_a_run_does_not_go_on_with_other_values(
    measured: tuple[Path, dict[str, Any]], numbers: dict[str, Any], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for file in Path(numbers["data"]).parent.glob("*.png"):
        (data / file.name).symlink_to(file)
    text = Path(numbers["data"]).read_text()
    (data / "list.csv").write_text(text)
    settings = {**numbers, "data": str(data / "list.csv"), "out": tmp_path / "run"}
    assert package.finetune({**settings, "stop_at": 5}).exit_code == 75
    lines = [line.split(",") for line in text.splitlines()]
    for line in lines[1:20]:
        line[2] = "99"
    (data / "list.csv").write_text("\n".join(map(",".join, lines)))
    with pytest.raises(MaekitError) as caught:
        package.finetune(settings)
    assert caught.value.code == "E-DATA-CHANGED"


def test_an_epoch_is_chosen_by_mean_average_precision_and_by_r2(
    tags: dict[str, Any], numbers: dict[str, Any], tmp_path: Path
) -> None:
    for settings, name, view in ((tags, "map", "flip"), (numbers, "r2", "5-crop")):
        run = tmp_path / name
        more = {"select": "held-out", "epochs": 3, "eval_every": 1, "ema": 0.6, "tta": view, "crop_pct": 0.875}
        done = package.finetune({**settings, **more, "labels": "60%", "out": run}).metrics
        assert done["train_images"] == 92 and done["held_images"] == 23 and f"ema_{name}" in done
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        scores = [record[f"held/{name}"] for record in records if f"held/{name}" in record]
        assert len(scores) == 3 and f"the best on held-out training images ({max(scores):.4f})" in str(done["score_of"])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_tags_are_mixed_as_the_images_are(count: int) -> None:
    """An image that holds its own tag as its value: what is seen and what is asked for agree, whatever was drawn."""
    settings = Finetune(task="multilabel", mixup=0.8, cutmix=0.0, random_erasing=0.0)
    goal = Tags.of(Targets(["a"], np.array([[0], [1]])), "here")
    step, seen = goal.step(settings, torch.device("cpu")), list[torch.Tensor]()

    class Honest(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x[:, 0, 0, :1])
            return seen[-1].logit(eps=1e-4)

    values = 0.1 + 0.8 * torch.rand(count, 1)
    for draw in range(4):
        seed_all(draw)
        loss = step(Honest(), {"images": values[:, :, None, None].repeat(1, 1, 4, 4), "targets": values})["loss"]
        assert float(loss) == pytest.approx(float(F.binary_cross_entropy(seen[-1], seen[-1])), rel=1e-5)
        assert count == 1 or not torch.allclose(seen[-1], values, atol=1e-4)


def test_views_are_averaged_as_probabilities_of_tags_and_as_numbers() -> None:
    outputs = torch.tensor([[[0.3, -60.0]], [[2.0, -70.0]]])
    said = Tags.said(outputs)
    torch.testing.assert_close(said.sigmoid(), outputs.double().sigmoid().mean(0))
    goal = Numbers(["a", "b"], torch.tensor([10.0, 0.0]).double(), torch.tensor([2.0, 1.0]).double(), "mse")
    torch.testing.assert_close(goal.said(outputs), torch.tensor([[12.3, -65.0]]).double())


def test_numbers_keep_their_digits_in_half_precision(
    measured: tuple[Path, dict[str, Any]], numbers: dict[str, Any]
) -> None:
    """In bf16 a plain head that says a thousand lit pixels would say them in steps of 4 or 8."""
    found, images = load_classifier(measured[0]), torch.rand(64, 1, 28, 28)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        said = found.model(images)[:, 1]
    assert said.dtype == torch.float32 and (said % 1 != 0).double().mean() > 0.9 and len(said.unique()) > 60


def test_a_task_brings_defaults_that_fit_it() -> None:
    plain, tags, numbers = (Finetune(task=task) for task in ("classes", "multilabel", "regression"))  # type: ignore[arg-type]
    assert (plain.loss, plain.mixup, plain.cutmix, plain.label_smoothing) == ("cross-entropy", 0.8, 1.0, 0.1)
    assert (tags.loss, tags.mixup, tags.cutmix, tags.label_smoothing) == ("bce", 0.8, 1.0, 0.0)
    assert (numbers.loss, numbers.mixup, numbers.cutmix, numbers.label_smoothing) == ("mse", 0.0, 0.0, 0.0)
    assert Finetune(task="multilabel", label_smoothing=0.2, mixup=0.0).label_smoothing == 0.2


def test_values_of_ones_own_dataset_are_learned_from_python(base: dict[str, Any], tmp_path: Path) -> None:
    images = [np.full((28, 28), shade, dtype=np.uint8) for shade in range(0, 250, 5)]
    settings = {**base, "task": "regression", "loss": "huber", "epochs": 2, "out": tmp_path / "run"}
    bare = DatasetSource(images)
    with pytest.raises(MaekitError, match="images without targets"):
        package.finetune(settings, splits=(bare, bare))
    whole = bare.with_targets(Targets(["shade"], np.arange(0, 250, 5.0)[:, None]))
    done = package.finetune(settings, splits=(whole.subset(range(40)), whole.subset(range(40, 50))))
    assert done.metrics["val_images"] == 10 and {"mae", "rmse", "r2"} <= done.metrics.keys()
    assert "R2" in done.text and "MAE" in done.text


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        ({"task": "regression", "label_column": "tags"}, "E-DATA-TARGETS", "list.csv line 2, column 'tags'"),
        ({"task": "regression", "label_column": "lit", "mixup": 0.8}, "E-CONFIG-IDLE", "0.8 beside task regression"),
        ({"task": "regression", "label_column": "lit", "label_smoothing": 0.1}, "E-CONFIG-IDLE", "not mixed or smooth"),
        ({"task": "regression", "label_column": "lit", "class_weights": "balanced"}, "E-CONFIG-IDLE", "class_weights"),
        ({"task": "regression", "label_column": "lit", "labels": "5/class"}, "E-USAGE-LABELS", "have no one class"),
        ({"task": "multilabel", "label_column": "tags", "loss": "mse"}, "E-CONFIG-IDLE", "expected bce"),
        ({"task": "multilabel", "label_column": "tags", "labels": "5/class"}, "E-USAGE-LABELS", "have no one class"),
        ({"label_column": "bright", "label_separator": ";"}, "E-CONFIG-IDLE", "beside task classes"),
        ({"label_column": "bright", "loss": "huber"}, "E-CONFIG-IDLE", "beside task classes"),
        ({"task": "regression", "label_column": "lit", "data": "builtin:fashion"}, "E-DATA-COLUMN", "lit"),
        ({"task": "regression", "data": "builtin:fashion"}, "E-DATA-TARGETS", "classes, which have names"),
    ],
)
def test_what_does_not_fit_a_task_is_one_line_and_leaves_nothing_behind(
    base: dict[str, Any], tmp_path: Path, more: dict[str, Any], code: str, words: str
) -> None:
    with pytest.raises(MaekitError, match=words) as caught:
        package.finetune({**base, **more, "out": tmp_path / "run"})
    assert caught.value.code == code and "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_numbers_that_do_not_differ_and_tags_that_tell_nothing_apart_are_refused() -> None:
    with pytest.raises(MaekitError, match="column 'b' of here: found 7 for all 3 training images"):
        Numbers.of(Targets(["a", "b"], np.array([[1.0, 7.0], [2.0, 7.0], [3.0, 7.0]])), "here", "mse")
    with pytest.raises(MaekitError, match="each of all images or of none"):
        Tags.of(Targets(["a", "b"], np.array([[1, 0], [1, 0]])), "here")


def test_other_verbs_take_such_weights_or_say_why_not(
    tagged: tuple[Path, dict[str, Any]], measured: tuple[Path, dict[str, Any]], listed: Path, tmp_path: Path
) -> None:
    for run, _ in (tagged, measured):
        with pytest.raises(MaekitError, match="a model for --task") as caught:
            package.robustness({"run": run, "data": "builtin:fashion", "protocol": "occlusion", "out": tmp_path / "r"})
        assert caught.value.code == "E-CKPT-KIND" and not (tmp_path / "r").exists()
    with pytest.raises(MaekitError) as caught:
        package.partial({"run": tagged[0], "data": str(listed), "task": "regression", "out": tmp_path / "p"})
    assert caught.value.code == "E-CONFIG-TASK" and not (tmp_path / "p").exists()


@pytest.mark.parametrize("to", ["safetensors", "timm", pytest.param("onnx", marks=pytest.mark.slow)])
def test_converted_weights_give_the_same_numbers(
    measured: tuple[Path, dict[str, Any]], tmp_path: Path, to: str
) -> None:
    found, images = load_classifier(measured[0]), torch.rand(2, 1, 28, 28)
    place = tmp_path / {"safetensors": "a.safetensors", "timm": "a", "onnx": "a.onnx"}[to]
    package.convert({"src": measured[0], "dst": place, "to": to})
    with torch.no_grad():
        expected = found.model(images)
    if to == "onnx":
        runtime = pytest.importorskip("onnxruntime")
        (got,) = runtime.InferenceSession(str(place)).run(["numbers"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-3)
        return
    again = load_classifier(place)
    with torch.no_grad():
        got = again.model(images)
    assert torch.equal(got, expected) or to == "timm"
    torch.testing.assert_close(got, expected)  # timm's head adds up in another order
    assert again.classes == ["brightness", "lit"] and again.task == ("regression" if to == "safetensors" else "classes")


def test_transformers_is_told_what_the_outputs_are(tags: dict[str, Any], tmp_path: Path) -> None:
    package.finetune({**tags, "pool": "cls", "epochs": 1, "out": tmp_path / "run"})
    package.convert({"src": tmp_path / "run", "dst": tmp_path / "hf", "to": "transformers"})
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["problem_type"] == "multi_label_classification"
    assert load_classifier(tmp_path / "hf").task == "multilabel"
    assert package.inspect({"file": tmp_path / "run"}).metrics["task"] == "multilabel"


@pytest.mark.slow
def test_three_processes_score_each_image_once_and_as_one_does(
    maekit: Run, numbers: dict[str, Any], tmp_path: Path, flags: Run
) -> None:
    words = [*flags({name: value for name, value in numbers.items() if value is not None}), "--auto-augment", "none"]
    words += ["--out", str(tmp_path / "run"), "--nproc", "3", "--batch-size", "18", "--epochs", "2", "--json"]
    done = maekit("finetune", *words)
    assert done.code == 0, done.stderr
    val = open_source(numbers["data"], "val", label_column="brightness,lit", form=Form("regression"))
    truth, outputs = said(tmp_path / "run", val)
    assert done.json["val_images"] == len(truth) == 48
    assert done.json["targets"]["lit"]["mae"] == pytest.approx(np.abs(truth - outputs)[:, 1].mean(), rel=1e-2)
