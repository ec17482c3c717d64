"""Scores of frozen features: against scikit-learn, and plausible on real images."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from sklearn.datasets import load_digits

import maekit as package
from maekit.config import load_yaml
from maekit.errors import MaekitError
from maekit.interchange.weights import load_model
from maekit.model.mae import create_model
from maekit.recipes import find
from maekit.scores.regression import STRENGTHS
from maekit.settings import Probe
from maekit.tasks.features import Features
from maekit.tasks.probe import logistic_top1
from maekit.tasks.trained_probe import PER_PASS, Probed, _loop
from maekit.tasks.training import micro_batch
from maekit.train import checkpoint

Run = Callable[..., Any]


def digits() -> tuple[Features, Features]:
    data: Any = load_digits()
    values, labels = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    return tuple(Features(values[part], labels[part], part) for part in (order[:900], order[900:]))  # type: ignore[return-value]


def test_the_regression_solves_digits_and_chooses_a_strength() -> None:
    train, val = digits()
    top1, strength = logistic_top1(train, val, seed=0)
    assert top1 > 0.94 and strength in STRENGTHS


def test_few_labels_of_a_class_are_enough_for_the_regression() -> None:
    train, val = digits()
    few = torch.cat([(train.labels == label).nonzero()[:2, 0] for label in range(10)])
    top1, _ = logistic_top1(Features(train.values[few], train.labels[few], few), val, seed=0)
    assert top1 > 0.5


@pytest.fixture(scope="module")
def scores(pretrained: Path, classes: Path) -> dict[str, float]:
    """kNN and probe of the trained encoder, a random one and the pixels, on 240 and 100 images."""
    settings: dict[str, Any] = {"run": pretrained, "data": str(classes), "device": "cpu", "workers": 0}
    arms = {"mae": {}, "random": {"random_init": True}, "pixels": {"raw_pixels": True}}
    found = {name: package.knn(settings | change).metrics["top1"] for name, change in arms.items()}
    found |= {f"probe {name}": package.probe(settings | arms[name]).metrics["top1"] for name in ("mae", "random")}
    return {name: float(str(score)) for name, score in found.items()}


def test_scores_are_plausible(scores: dict[str, float]) -> None:
    assert all(0.2 < score < 0.95 for score in scores.values()), scores
    assert scores["pixels"] > 0.5


@pytest.mark.slow
def test_pretraining_beats_random_weights(maekit: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = maekit(
        "pretrain",
        "--recipe",
        "builtin/pretrain-fashion",
        "--out",
        run,
        "--steps",
        500,
        "--workers",
        0,
        "--device",
        "cpu",
    )
    assert done.code == 0, done.stderr
    settings: dict[str, Any] = {
        "run": run,
        "data": "builtin:fashion",
        "labels": "30/class",
        "device": "cpu",
        "workers": 0,
    }
    for verb in (package.knn, package.probe):
        ours, random = (float(str(verb(settings | more).metrics["top1"])) for more in ({}, {"random_init": True}))
        assert ours > random + 0.02


@pytest.mark.parametrize("verb", ["knn", "probe"])
def test_the_command_says_what_the_function_says(
    maekit: Run, scores: dict[str, float], pretrained: Path, classes: Path, verb: str
) -> None:
    done = maekit(verb, pretrained, "--data", classes, "--device", "cpu", "--json")
    assert done.code == 0 and "Warning" not in done.stderr, done.stderr
    assert done.json["top1"] == scores["mae" if verb == "knn" else "probe mae"]
    assert done.json["train_images"] == 240 and done.json["val_images"] == 100 and done.json["run"] == str(pretrained)


def test_scores_repeat_and_a_part_of_the_labels_counts(pretrained: Path, classes: Path) -> None:
    settings: dict[str, Any] = {
        "run": pretrained,
        "data": str(classes),
        "device": "cpu",
        "workers": 0,
        "labels": "3/class",
    }
    first, again = (package.knn(settings).metrics for _ in range(2))
    assert first == again and first["train_images"] == 30
    assert package.probe(settings).metrics["train_images"] == 30


def test_an_evaluation_set_of_its_own(pretrained: Path, classes: Path) -> None:
    train, val = (str(classes / part) for part in ("train", "val"))
    settings: dict[str, Any] = {"run": pretrained, "device": "cpu", "workers": 0}
    apart = package.knn({**settings, "data": train, "val_data": val}).metrics
    assert apart["top1"] == package.knn({**settings, "data": str(classes)}).metrics["top1"]


def test_the_encoder_file_scores_as_the_run(pretrained: Path, classes: Path) -> None:
    settings: dict[str, Any] = {"data": str(classes), "device": "cpu", "workers": 0}
    file = package.knn({**settings, "run": pretrained / "encoder.safetensors"}).metrics["top1"]
    assert file == package.knn({**settings, "run": pretrained}).metrics["top1"]


def test_probe_keeps_its_result_where_asked(pretrained: Path, classes: Path, tmp_path: Path) -> None:
    settings = {"run": pretrained, "data": str(classes), "device": "cpu", "workers": 0, "out": tmp_path / "probe"}
    result = package.probe(settings).metrics
    assert (tmp_path / "probe/result.json").exists() and math.isfinite(float(str(result["top1"])))


def test_the_lars_protocol_trains_the_head_only_and_goes_on(
    maekit: Run, pretrained: Path, classes: Path, tmp_path: Path
) -> None:
    words = ["probe", pretrained, "--data", classes, "--recipe", "probe-vit-b16", "--epochs", 20, "--batch-size", 48]
    words += ["--base-lr", 30, "--warmup-epochs", 2, "--micro-batch", 24]
    words += ["--workers", 0, "--device", "cpu", "--out", tmp_path / "run", "--json"]
    done = maekit(*words)
    assert done.code == 0 and "Warning" not in done.stderr, done.stderr
    assert done.json["protocol"] == "lars" and done.json["steps"] == 100 and 0 < done.json["top1"] < 1
    losses = [json.loads(line).get("loss") for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert losses[9] < losses[0] - 0.1
    said = [line for line in done.stderr.splitlines() if line.startswith("deviates from paper/probe-vit-b16: ")]
    assert "deviates from paper/probe-vit-b16: epochs paper T10 90, yours 20" in said and len(said) == 5
    resolved = load_yaml(tmp_path / "run/config.yaml")["resolved"]
    assert resolved["micro_batch"] == "24" and [each["name"] for each in resolved["deviations"]] == [
        "epochs", "batch_size", "micro_batch", "base_lr", "warmup_epochs",
    ]  # fmt: skip
    saved, start = load_model(pretrained).state_dict(), checkpoint.load(tmp_path / "run/checkpoints/step-100")
    assert all(torch.equal(start.tensors["model"][f"model.{name}"], saved[name]) for name in saved)
    assert maekit(*words).json == done.json


def test_the_lars_protocol_says_no_more_than_its_recipe_where_nothing_is_said() -> None:
    """All of table 10 but the batch, which is cut down to what smaller sets of images have."""
    plain, paper = _loop(Probe(protocol="lars")), _loop(find("probe-vit-b16")[1].settings)
    assert plain == paper.model_copy(update={"batch_size": 1024, "micro_batch": "auto"})
    assert _loop(Probe(protocol="lars", epochs=45, warmup_epochs=0, weight_decay=0.1)).warmup_epochs == 0
    assert _loop(Probe(protocol="lars", epochs=45)).warmup_epochs == 5


@pytest.mark.parametrize(
    ("batch", "processes", "each"), [(16384, 1, 512), (16384, 32, 512), (1024, 1, 512), (48, 1, 48)]
)
def test_batch_norm_of_the_probe_sees_512_images_as_on_each_official_gpu(batch: int, processes: int, each: int) -> None:
    assert micro_batch(_loop(Probe(protocol="lars", batch_size=batch)), batch, processes, PER_PASS) == each


def test_in_train_mode_only_the_batch_norm_of_the_probe_reacts() -> None:
    model = create_model("vit_tiny_patch16_224", img_size=32, depth=2, drop_path=0.5, decoder_dim=32, decoder_depth=1)
    probed = Probed(model, 3, "cls").train()
    images = torch.randn(8, 3, 32, 32)
    before = {name: value.clone() for name, value in probed.state_dict().items()}
    one, other = probed(images), probed(images)
    assert torch.equal(one, other)  # no drop path in the frozen encoder
    changed = {name for name, value in probed.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.norm.running_mean", "head.norm.running_var", "head.norm.num_batches_tracked"}
    assert {name for name, p in probed.named_parameters() if p.requires_grad} == {
        "head.linear.weight",
        "head.linear.bias",
    }
    before = {name: value.clone() for name, value in probed.eval().state_dict().items()}
    assert not torch.equal(probed(images), one)
    assert all(torch.equal(value, before[name]) for name, value in probed.state_dict().items())


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of three blocks, nothing learned."""
    model = create_model(
        "vit_tiny_patch16_224", img_size=28, patch_size=7, in_chans=1, embed_dim=32, depth=3, num_heads=2,
        decoder_dim=16, decoder_depth=1, decoder_heads=2,
    )  # fmt: skip
    file = tmp_path_factory.mktemp("deep") / "deep.safetensors"
    package.save_model(model, file)
    return file


def test_a_sweep_scores_each_block_pooling_and_part_of_the_labels_as_each_alone(
    maekit: Run, deep: Path, classes: Path, tmp_path: Path
) -> None:
    words = ["probe", deep, "--data", classes, "--device", "cpu", "--workers", 0]
    several = ["--layers", "all", "--pool", "mean,cls", "--labels", "3/class,100%", "--cache", tmp_path / "kept"]
    done = maekit(*words, *several, "--out", tmp_path / "run", "--json")
    assert done.code == 0 and "Warning" not in done.stderr, done.stderr
    rows = done.json["sweep"]
    expected = [(l, p, s) for s in ("3/class", "100%") for l in (1, 2, 3) for p in ("mean", "cls")]  # noqa: E741
    assert [(row["layer"], row["pool"], row["labels"]) for row in rows] == expected
    assert [row["train_images"] for row in rows] == [30] * 6 + [240] * 6
    best = max(rows[6:], key=lambda row: (row["held_top1"], -row["held_loss"]))
    assert done.json["top1"] == best["top1"] and (done.json["layer"], done.json["pool"]) == (
        best["layer"],
        best["pool"],
    )
    for row in (rows[0], rows[3], rows[-1]):
        alone = maekit(
            *words, "--layers", row["layer"], "--pool", row["pool"], "--labels", row["labels"],
            "--cache", tmp_path / "kept", "--json",
        ).json  # fmt: skip
        assert alone["top1"] == pytest.approx(row["top1"], abs=0.021) and "sweep" not in alone
    table = (tmp_path / "run/sweep.csv").read_text().splitlines()
    assert len(table) == 13 and table[0] == "layer,pool,labels,train_images,strength,held_top1,held_loss,top1"
    svg = (tmp_path / "run/sweep.svg").read_text()
    assert svg.startswith("<svg") and "100% cls" in svg and "block" in svg
    text = maekit(*words, *several).stdout
    assert text.splitlines()[0].split() == ["block", "3/class", "mean", "3/class", "cls", "100%", "mean", "100%", "cls"]
    assert len(text.splitlines()) == 5 and "chosen on held-out training labels" in text


def test_knn_shows_a_table_and_scores_the_first(maekit: Run, pretrained: Path, classes: Path) -> None:
    words = ["knn", pretrained, "--data", classes, "--device", "cpu", "--k", "5,1,300", "--temperature", ".07,1"]
    done = maekit(*words, "--json")
    rows = done.json["sweep"]
    assert [(row["k"], row["temperature"]) for row in rows] == [(k, t) for k in (5, 1, 240) for t in (0.07, 1.0)]
    alone = maekit("knn", pretrained, "--data", classes, "--device", "cpu", "--k", 5, "--json").json
    assert done.json["top1"] == rows[0]["top1"] == alone["top1"] and "sweep" not in alone
    lines = maekit(*words).stdout.splitlines()
    assert lines[0].split() == ["k", "T", "0.07", "T", "1"] and len(lines) == 5


def test_the_attentive_protocol_trains_the_head_only(
    maekit: Run, pretrained: Path, classes: Path, tmp_path: Path
) -> None:
    words = ["probe", pretrained, "--data", classes, "--protocol", "attentive", "--epochs", 12, "--batch-size", 48]
    words += ["--base-lr", 0.02, "--crop-scale", 1, 1, "--no-flip", "--workers", 0, "--device", "cpu"]
    words += ["--out", tmp_path / "run", "--json"]
    done = maekit(*words)
    assert done.code == 0 and "Warning" not in done.stderr, done.stderr
    assert done.json["protocol"] == "attentive" and done.json["steps"] == 60 and done.json["top1"] > 0.2
    saved, start = load_model(pretrained).state_dict(), checkpoint.load(tmp_path / "run/checkpoints/step-60")
    assert all(torch.equal(start.tensors["model"][f"model.{name}"], saved[name]) for name in saved)
    assert maekit(*words).json == done.json


def test_the_attentive_head_is_a_softmax_over_patches_worked_out_by_hand() -> None:
    model = create_model("vit_tiny_patch16_224", img_size=32, depth=1, decoder_dim=32, decoder_depth=1).eval()
    probed = Probed(model, 5, "attentive").eval()
    images = torch.randn(2, 3, 32, 32)
    tokens = model.features(images, "tokens")[:, 1:]
    attend, heads, wide = cast(Any, probed.head).attend, 3, 64
    query = attend.q(attend.latent)[0, 0].view(heads, wide)
    keys, values = attend.kv(tokens).view(2, 4, 2, heads, wide).unbind(2)
    weights = (torch.einsum("hd,bnhd->bhn", query, keys) / wide**0.5).softmax(-1)
    pooled = torch.einsum("bhn,bnhd->bhd", weights, values).flatten(1)
    expected = probed.head.linear(probed.head.norm(pooled))
    assert torch.allclose(probed(images), expected, atol=1e-5)
    trained = {name for name, p in probed.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"head"}


def test_an_encoder_without_class_token_is_not_asked_for_it(tmp_path: Path, classes: Path) -> None:
    model = create_model("vit_base_patch16_gap_224", img_size=32, embed_dim=32, depth=2, num_heads=2)
    package.save_model(model, tmp_path / "gap.safetensors")
    settings: dict[str, Any] = {"run": tmp_path / "gap.safetensors", "data": str(classes), "device": "cpu"}
    for verb, more in (
        (package.knn, {}),
        (package.probe, {}),
        (package.probe, {"protocol": "lars", "out": tmp_path / "a"}),
    ):
        with pytest.raises(MaekitError, match=r"E-CONFIG-POOL.*without class token"):
            verb({**settings, "pool": "cls", **more})
