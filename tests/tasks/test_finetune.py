"""Fine-tuning from end to end: from a run and from scratch, stopped and gone on with, whatever the batch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional as F

import maekit as package
from maekit.data.image import read_image
from maekit.data.sources import label_subset, open_source
from maekit.errors import MaekitError
from maekit.interchange.weights import load_classifier
from maekit.model.heads import classifier
from maekit.model.mae import create_model
from maekit.seeds import seed_all
from maekit.settings import Finetune
from maekit.tasks.goals import supervised_step
from maekit.train import checkpoint

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def base(pretrained: Path, classes: Path) -> dict[str, Any]:
    """30 steps on five labels a class, with everything on that the paper lists."""
    return {
        "run": pretrained, "data": str(classes), "labels": "5/class", "batch_size": 10, "epochs": 6, "base_lr": 3e-2,
        "warmup_epochs": 1, "layer_decay": 0.75, "crop_scale": [0.6, 1], "workers": 0, "device": "cpu", "log_every": 5,
        "save_every": 7, "seed": 1, "label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.25,
        "auto_augment": "rand-m9-mstd0.5-inc1", "drop_path": 0.1, "precision": "fp32",
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    run = tmp_path_factory.mktemp("finetuned") / "run"
    return run, dict(package.finetune({**base, "out": run}).metrics)


def test_the_result_and_its_folder(whole: tuple[Path, dict[str, Any]]) -> None:
    run, result = whole
    assert {"run", "steps", "loss", "images_per_second", "state_sha256", "top1"} <= result.keys()
    assert result["steps"] == 30 and result["train_images"] == 50 and result["val_images"] == 100
    assert 0 <= result["top1"] <= 1 and json.loads((run / "result.json").read_text()) == result
    scores = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in scores if "val/top1" in record]
    assert len(last) == 10 and last[-1]["val/top1"] == result["top1"] and last[-1]["step"] == 30
    assert last[-1]["val/loss"] == pytest.approx(result["val_loss"]) and result["score_of"] == "the last epoch"
    assert {"top5", "macro_f1", "balanced_accuracy", "ece"} <= result.keys()
    assert result["balanced_accuracy"] == pytest.approx(result["top1"])  # ten images of each class
    files = {"report.html", "per_class.csv", "confusion.png", "reliability.png", "mistakes.png"}
    assert files <= {file.name for file in run.iterdir()}
    page = (run / "report.html").read_text()
    assert "the last epoch" in page
    assert "random weights" not in page  # it started from a run


def test_the_command_and_the_function_give_the_same_bits(
    maekit: Run, base: dict[str, Any], whole: tuple[Path, dict[str, Any]], tmp_path: Path, flags: Run
) -> None:
    settings = {name: value for name, value in base.items() if name != "run"}
    done = maekit("finetune", base["run"], *flags({**settings, "out": tmp_path / "run"}), "--workers", 1, "--json")
    assert done.code == 0 and "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr
    assert done.json["state_sha256"] == whole[1]["state_sha256"] and done.json["top1"] == whole[1]["top1"]


@pytest.mark.parametrize("at", [1, 13, 29])
def test_stopping_and_going_on_gives_the_same_bits_and_lines(
    base: dict[str, Any], whole: tuple[Path, dict[str, Any]], tmp_path: Path, at: int, records: Run
) -> None:
    settings = {**base, "out": tmp_path / "run"}
    stopped = package.finetune({**settings, "stop_at": at})
    assert stopped.exit_code == 75 and stopped.metrics["steps"] == at
    done = package.finetune(settings)
    assert done.metrics["state_sha256"] == whole[1]["state_sha256"] and done.metrics["top1"] == whole[1]["top1"]
    assert records(tmp_path / "run") == records(whole[0])


def test_predictions_of_the_images_scored_on_are_those_of_predict(
    whole: tuple[Path, dict[str, Any]], classes: Path, tmp_path: Path
) -> None:
    table = pq.read_table(whole[0] / "predictions.parquet")
    assert table.num_rows == 100
    right = np.equal(table["predicted_index"].to_pylist(), table["label"].to_pylist())
    assert right.mean() == whole[1]["top1"]
    settings = {"run": whole[0], "data": str(classes), "split": "val", "out": tmp_path / "p.parquet", "workers": 0}
    assert package.predict({**settings, "device": "cpu"}).metrics["top1"] == whole[1]["top1"]
    assert pq.read_table(tmp_path / "p.parquet").equals(table)


def test_eval_only_scores_the_run_and_its_timm_form_as_at_the_end_of_training(
    whole: tuple[Path, dict[str, Any]], classes: Path, tmp_path: Path
) -> None:
    package.convert({"src": whole[0], "dst": tmp_path / "weights", "to": "timm"})
    for name, weights in (("own", whole[0]), ("timm", tmp_path / "weights")):
        settings = {"run": weights, "eval_only": True, "data": str(classes), "workers": 0, "device": "cpu"}
        settings["precision"] = "fp32"
        done = package.finetune({**settings, "out": tmp_path / name})
        for score in ("top1", "top5", "macro_f1", "balanced_accuracy", "ece", "val_loss"):
            assert done.metrics[score] == pytest.approx(whole[1][score], rel=1e-5), score
        one, other = (pq.read_table(run / "predictions.parquet") for run in (whole[0], tmp_path / name))
        assert one["predicted"].equals(other["predicted"]) and one["path"].equals(other["path"])
        made = {file.name for file in (tmp_path / name).iterdir()}
        assert made == {file.name for file in whole[0].iterdir()} & made | {"predictions.parquet"}
        assert {"report.html", "per_class.csv", "confusion.png", "reliability.png", "mistakes.png"} <= made
        page = (tmp_path / name / "report.html").read_text()
        assert "Nothing was trained here" in page and "Curves" not in page
        assert package.finetune({**settings, "out": tmp_path / name}).metrics == done.metrics  # finished: not again
    with pytest.raises(MaekitError, match="holds scores of other weights"):
        package.finetune({**settings, "run": whole[0], "out": tmp_path / "timm"})


def test_eval_only_reads_an_official_fine_tuned_file(classes: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", img_size=28, patch_size=7, in_chans=1, depth=1)
    made = classifier(model, 10)
    torch.nn.init.normal_(made.head.weight)  # type: ignore[arg-type]
    torch.save({"model": made.state_dict(), "epoch": 99}, tmp_path / "mae_finetuned.pth")
    settings = {"run": tmp_path / "mae_finetuned.pth", "eval_only": True, "data": str(classes), "workers": 0}
    package.finetune({**settings, "device": "cpu", "precision": "fp32", "out": tmp_path / "run", "tta": "flip"})
    table, spec = pq.read_table(tmp_path / "run/predictions.parquet"), load_classifier(settings["run"]).spec
    for i in (3, 57):
        image = read_image((classes / "val" / table["path"][i].as_py()).read_bytes(), channels=1)
        views = (torch.stack([image, image.flip(-1)]) / 255 - spec["mean"][0]) / spec["std"][0]
        with torch.no_grad():
            expected = made.eval()(views).softmax(1).mean(0)
        torch.testing.assert_close(torch.tensor(table["probabilities"][i].as_py()), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "idle", [{"mixup": 0.0}, {"labels": "1%"}, {"from_scratch": True}, {"epochs": 3}, {"img_size": 32}, {"ema": 0.9}]
)
def test_eval_only_refuses_what_only_training_reads(
    idle: dict[str, Any], whole: tuple[Path, dict[str, Any]], classes: Path, tmp_path: Path
) -> None:
    settings = {"run": whole[0], "eval_only": True, "data": str(classes), "out": tmp_path / "run", **idle}
    with pytest.raises(MaekitError, match=f"setting {next(iter(idle))}.*beside eval_only") as caught:
        package.finetune(settings)
    assert caught.value.code == "E-CONFIG-IDLE" and not (tmp_path / "run").exists()


def test_a_finished_run_does_nothing_and_says_the_same(
    base: dict[str, Any], whole: tuple[Path, dict[str, Any]]
) -> None:
    assert package.finetune({**base, "out": whole[0]}).metrics == whole[1]


def test_the_pretrained_arm_learns(base: dict[str, Any], tmp_path: Path) -> None:
    """On 240 images with mild augmentation: far above the 10 % of chance."""
    plain = dict(mixup=0, cutmix=0, random_erasing=0, auto_augment=None, drop_path=0, crop_scale=[0.8, 1], labels=None)
    done = package.finetune({**base, **plain, "out": tmp_path / "run", "batch_size": 40, "epochs": 12})
    assert float(str(done.metrics["top1"])) > 0.3


def test_both_arms_train_on_the_same_images(base: dict[str, Any], classes: Path) -> None:
    """The subset is a function of the images and the label seed, never of the start or the run's seed."""
    train = open_source(classes, "train")
    first, again, other = (label_subset(train, "5/class", seed) for seed in (0, 0, 1))
    assert first == again != other and len(first) == 50
    assert train.labels is not None and np.bincount([train.labels[i] for i in first]).tolist() == [5] * 10


@pytest.mark.parametrize("with_run", [True, False])
def test_from_scratch_with_and_without_the_architecture_of_a_run(
    base: dict[str, Any], tmp_path: Path, with_run: bool
) -> None:
    settings = {**base, "from_scratch": True, "epochs": 1, "out": tmp_path / "run"}
    if not with_run:
        del settings["run"]
        settings |= {"img_size": 28, "patch_size": 7, "embed_dim": 24, "depth": 1, "num_heads": 2, "channels": 1}
        settings |= {"model": "vit_tiny_patch16_224"}
    done = package.finetune(settings)
    assert done.exit_code == 0 and done.metrics["train_images"] == 50 and "random weights" in done.text


def test_scratch_weights_follow_the_seed_and_differ_from_the_runs(base: dict[str, Any], tmp_path: Path) -> None:
    settings = {**base, "epochs": 0.2, "warmup_epochs": 0.0, "mixup": 0, "cutmix": 0}
    digests = [
        package.finetune({**settings, **change, "out": tmp_path / str(i)}).metrics["state_sha256"]
        for i, change in enumerate(
            [{"from_scratch": True}, {"from_scratch": True}, {"from_scratch": True, "seed": 2}, {"from_scratch": False}]
        )
    ]
    assert digests[0] == digests[1] and len(set(digests)) == 3


def test_a_batch_of_odd_size_with_mixup_works(base: dict[str, Any], tmp_path: Path) -> None:
    done = package.finetune({**base, "batch_size": 7, "epochs": 1, "out": tmp_path / "run"})
    assert done.exit_code == 0 and done.metrics["steps"] == 8 and float(str(done.metrics["loss"])) < 5


def test_averaged_weights_are_scored_beside_the_others(base: dict[str, Any], tmp_path: Path) -> None:
    done = package.finetune({**base, "epochs": 1, "ema": 0.5, "out": tmp_path / "run"})
    assert {"top1", "ema_top1"} <= done.metrics.keys()


def test_a_class_token_pools_too(base: dict[str, Any], tmp_path: Path) -> None:
    assert package.finetune({**base, "epochs": 1, "pool": "cls", "out": tmp_path / "run"}).exit_code == 0


def test_five_channels_train_without_randaugment_only(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for i in range(20):
        file = tmp_path / "data" / "ab"[i % 2] / f"{i}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, generator.integers(0, 256, (16, 16, 5), dtype=np.uint8))
    settings: dict[str, Any] = {
        "from_scratch": True, "data": str(tmp_path / "data"), "img_size": 16, "patch_size": 4, "embed_dim": 16,
        "depth": 1,
        "num_heads": 2, "model": "vit_tiny_patch16_224", "epochs": 1, "warmup_epochs": 0, "batch_size": 4, "workers": 0,
        "device": "cpu", "out": tmp_path / "run",
    }  # fmt: skip
    with pytest.raises(MaekitError, match="5 channels") as caught:
        package.finetune(settings)
    assert caught.value.code == "E-CONFIG-AUGMENT" and not (tmp_path / "run").exists()
    assert package.finetune({**settings, "auto_augment": None}).exit_code == 0


def test_the_scores_are_those_of_the_saved_weights(
    whole: tuple[Path, dict[str, Any]], classes: Path, pretrained: Path
) -> None:
    """Oracle: the classifier rebuilt from the checkpoint by timm, scored image by image."""
    import safetensors.torch
    import timm

    from maekit.interchange.weights import load_model

    run, result = whole
    tensors = safetensors.torch.load_file(run / "checkpoints/step-30/model.safetensors")
    origin = load_model(pretrained)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=28, patch_size=7, in_chans=1, embed_dim=96, depth=4, num_heads=4,
        num_classes=10,
        global_pool="avg", fc_norm=True,
    ).eval()  # fmt: skip
    model.load_state_dict(tensors)
    val = open_source(classes, "val")
    images = torch.stack([read_image(bytes(val.read(i)), channels=1) for i in range(len(val))])  # type: ignore[arg-type]
    with torch.no_grad():
        right = model((images / 255 - origin.mean[0]) / origin.std[0]).argmax(1) == torch.tensor(val.labels)
    assert right.double().mean().item() == pytest.approx(result["top1"], abs=0.011)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_a_batch_of_any_size_is_mixed_with_its_own_reverse(count: int) -> None:
    """Oracle: timm's rule, x lam + reversed x (1 - lam), also for the odd sizes that timm's class refuses."""
    settings = Finetune(mixup=0.8, cutmix=0.0, random_erasing=0.0, label_smoothing=0.1)
    step = supervised_step(settings, 3, torch.device("cpu"))
    images, labels = torch.randn(count, 1, 4, 4), torch.arange(count) % 3
    seen: list[torch.Tensor] = []

    class Watch(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x.flatten(1)[:, :3]

    for draw in range(5):
        seed_all(draw)
        loss = step(Watch(), {"images": images.clone(), "labels": labels})["loss"]
        mixed, other = seen[-1], images.flip(0)
        assert mixed.shape == images.shape
        share = 1.0 if count == 1 else float(((mixed - other)[0] / (images - other)[0]).median())
        torch.testing.assert_close(mixed, images * share + other * (1 - share), rtol=1e-3, atol=1e-4)
        soft = F.one_hot(labels, 3) * 0.9 + 0.1 / 3
        expected = F.cross_entropy(mixed.flatten(1)[:, :3], soft * share + soft.flip(0) * (1 - share))
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)


def test_another_image_size_than_the_runs_resamples_the_positions(
    pretrained: Path, classes: Path, tmp_path: Path
) -> None:
    done = package.finetune(
        {
            "run": pretrained, "data": str(classes), "img_size": 56, "out": tmp_path / "run", "epochs": 1,
            "batch_size": 40, "auto_augment": None, "device": "cpu", "workers": 0, "labels": "4/class",
        }
    )  # fmt: skip
    assert done.exit_code == 0
    tensors = checkpoint.load(tmp_path / "run/checkpoints/step-1").tensors["model"]
    assert tensors["pos_embed"].shape == (1, 1 + 64, 96)


# ------------------------------------------------------------------------------------------ which epoch is scored


@pytest.fixture(scope="module")
def chosen(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    run = tmp_path_factory.mktemp("chosen") / "run"
    more = {"select": "held-out", "ema": 0.7, "batch_size": 8, "eval_every": 1}
    return run, dict(package.finetune({**base, **more, "out": run}).metrics)


def test_an_epoch_is_chosen_on_training_images_and_the_others_are_looked_at_once(
    chosen: tuple[Path, dict[str, Any]],
) -> None:
    run, result = chosen
    assert result["train_images"] == 40 and result["held_images"] == 10 and result["val_images"] == 100
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert not any(name.startswith(("val/", "ema_val/")) for record in records for name in record)
    for name, folder, told in (("held/top1", "best", "score_of"), ("ema_held/top1", "best-ema", "ema_score_of")):
        scores = [(record[name], -record["step"]) for record in records if name in record]
        assert len(scores) == 6
        score, step = max(scores)
        saved = checkpoint.newest(run / folder)
        assert saved is not None and (saved.step, saved.state["score"]) == (-step, score)
        assert f"epoch {-step // 5} of 6, the best on held-out training images ({score:.4f})" == result[told]
    assert "looked at once" in (run / "report.html").read_text().replace("\n", " ")


def test_what_is_loaded_from_such_a_run_is_what_was_scored(chosen: tuple[Path, dict[str, Any]], classes: Path) -> None:
    from maekit.tasks.scoring import scorer
    from maekit.train.device import World

    found = load_classifier(chosen[0])
    mean, std = (tuple(found.spec[name]) for name in ("mean", "std"))
    val = open_source(classes, "val", classes=found.classes)
    score = scorer(val, (28, 28), mean, std, World(0, 1, torch.device("cpu")), workers=0)
    assert dict(score(found.model))["val/top1"] == chosen[1]["top1"]


def test_stopping_and_going_on_chooses_the_same_epoch(
    base: dict[str, Any], chosen: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    settings = {**base, "select": "held-out", "ema": 0.7, "batch_size": 8, "eval_every": 1, "out": tmp_path / "run"}
    for at in (9, 22):
        assert package.finetune({**settings, "stop_at": at}).exit_code == 75
    same = {name for name in chosen[1] if name not in ("run", "images_per_second")}
    done = package.finetune(settings).metrics
    assert {name: done[name] for name in same} == {name: chosen[1][name] for name in same}


# ------------------------------------------------------------------------------------------------- frozen blocks


@pytest.mark.parametrize("blocks", ["0", "0.5", "1"])
def test_what_is_frozen_keeps_its_bits_and_what_is_trained_moves(
    maekit: Run, base: dict[str, Any], pretrained: Path, tmp_path: Path, flags: Run, blocks: str
) -> None:
    from maekit.interchange.weights import load_model

    settings = {name: value for name, value in base.items() if name != "run"} | {"epochs": 1, "out": tmp_path / "run"}
    done = maekit("finetune", base["run"], *flags(settings), "--tune-blocks", blocks, "--json")
    assert done.code == 0, done.stderr
    before = load_model(pretrained).encoder.state_dict()
    after = checkpoint.load(tmp_path / "run/checkpoints/step-5").tensors["model"]
    moved = {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}
    allowed = {"0": (), "0.5": ("blocks.3.norm2.", "blocks.3.mlp."), "1": ("blocks.3.",)}[blocks]
    assert moved == {name for name in before if allowed and name.startswith(allowed)}
    assert after["head.weight"].abs().max() > 1e-3


def test_more_blocks_than_there_are_leave_nothing_behind(base: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(MaekitError, match="5 of a model of 4 blocks") as caught:
        package.finetune({**base, "tune_blocks": 5, "out": tmp_path / "run"})
    assert caught.value.exit_code == 2 and not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "more",
    [
        {"loss": "bce"},
        {"loss": "bce", "mixup": 0, "cutmix": 0},
        {"class_weights": "balanced", "mixup": 0, "cutmix": 0},
        {"color_jitter": 0.4},
        {"mixup_prob": 0.3},
        {"mixup_switch": 0.9},
        {"clip_grad": 0.1},
    ],
)
def test_every_option_changes_what_is_learned(base: dict[str, Any], tmp_path: Path, more: dict[str, Any]) -> None:
    plain = {name: more[name] for name in ("mixup", "cutmix") if name in more}
    settings = {**base, "labels": "1%", "batch_size": 8, "epochs": 4}
    if "class_weights" in more:  # as many of each would weigh the same
        settings["labels"] = None
        settings |= {"data": str(_uneven(Path(base["data"]), tmp_path / "data")), "epochs": 1, "batch_size": 40}
    digests = {
        package.finetune({**settings, **changes, "out": tmp_path / name}).metrics["state_sha256"]
        for name, changes in (("plain", plain), ("more", more))
    }
    assert len(digests) == 2


def _uneven(classes: Path, out: Path) -> Path:
    """Link all images but most of one class's training images."""
    for file in sorted(classes.rglob("*.png")):
        place = out / file.relative_to(classes)
        place.parent.mkdir(parents=True, exist_ok=True)
        if "train" not in file.parts or file.parent.name != "Bag" or len(list(place.parent.iterdir())) < 3:
            place.symlink_to(file)
    return out


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        ({"mixup_prob": 0.5, "mixup": 0, "cutmix": 0}, "E-CONFIG-IDLE", "mixup and cutmix 0"),
        ({"mixup_switch": 0.9, "mixup": 0}, "E-CONFIG-IDLE", "mixup or cutmix 0"),
        ({"tta": "5-crop"}, "E-CONFIG-TTA", "crop_pct below 1"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(
    base: dict[str, Any], tmp_path: Path, more: dict[str, Any], code: str, said: str
) -> None:
    with pytest.raises(MaekitError, match=said) as caught:
        package.finetune({**base, **more, "out": tmp_path / "run"})
    assert caught.value.code == code and not (tmp_path / "run").exists()


@pytest.mark.parametrize("tta", ["flip", "5-crop", "10-crop"])
def test_views_at_the_score_are_averaged_as_probabilities(
    whole: tuple[Path, dict[str, Any]], classes: Path, tta: str
) -> None:
    """Oracle: each view by itself through the model, image by image."""
    from torchvision.transforms.v2 import functional as V

    from maekit.data.augment import resize_to_cover
    from maekit.tasks.scoring import scorer
    from maekit.train.device import World

    found = load_classifier(whole[0])
    model, names, spec = found.model, found.classes, found.spec
    val = open_source(classes, "val", classes=names).subset(range(0, 100, 9))
    mean, std = tuple(spec["mean"]), tuple(spec["std"])
    here = World(0, 1, torch.device("cpu"))
    judged = scorer(val, (28, 28), mean, std, here, workers=0, crop_pct=0.875, tta=tta).judged(model)
    for i in range(len(val)):
        image = resize_to_cover(read_image(bytes(val.read(i)), channels=1), (28, 28), 0.875)  # type: ignore[arg-type]
        views = [V.center_crop(image, [28, 28])] if tta == "flip" else list(V.five_crop(image, [28, 28]))
        views += [view.flip(-1) for view in views] if tta != "5-crop" else []
        with torch.no_grad():
            each = model((torch.stack(views) / 255 - mean[0]) / std[0]).softmax(1).mean(0)
        assert float(judged.confidence[i]) == pytest.approx(float(each.max()), rel=1e-4)
        assert float(judged.loss[i]) == pytest.approx(-float(each[val.labels[i]].log()), rel=1e-3, abs=1e-4)  # type: ignore[index]


@pytest.mark.slow
def test_three_processes_score_each_image_once_and_as_one_does(
    maekit: Run, base: dict[str, Any], classes: Path, tmp_path: Path, flags: Run
) -> None:
    """100 images over three processes, none padded or seen twice; held-out images choose the same epoch for all."""
    from maekit.scores.measures import measures
    from maekit.tasks.scoring import scorer
    from maekit.train.device import World

    settings = {name: value for name, value in base.items() if name != "run"} | {"epochs": 1, "out": tmp_path / "run"}
    words = flags({**settings, "select": "held-out", "nproc": 3, "batch_size": 9, "layer_decay": 0.75})
    done = maekit("finetune", base["run"], *words, "--json")
    assert done.code == 0, done.stderr
    found = load_classifier(tmp_path / "run")
    model, names, spec = found.model, found.classes, found.spec
    here, val = World(0, 1, torch.device("cpu")), open_source(classes, "val", classes=names)
    judged = scorer(val, (28, 28), tuple(spec["mean"]), tuple(spec["std"]), here, workers=0).judged(model)
    assert len(judged.labels) == 100
    for name, value in measures(judged, 10).items():
        assert done.json[name] == pytest.approx(value, rel=1e-6), name


def test_a_class_of_one_image_is_trained_on_and_has_none_to_be_scored_on(
    base: dict[str, Any], classes: Path, tmp_path: Path
) -> None:
    for i, file in enumerate(sorted((classes / "train").rglob("*.png"))[:30]):
        place = tmp_path / "data" / ("rare" if i == 29 else "ab"[i % 2]) / file.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(file)
    settings = {**base, "data": str(tmp_path / "data"), "labels": None, "epochs": 1, "select": "held-out"}
    done = package.finetune({**settings, "class_weights": "balanced", "out": tmp_path / "run"})
    rare = (tmp_path / "run/per_class.csv").read_text().splitlines()[-1]
    assert done.exit_code == 0 and rare.startswith("rare,0,0.0,0.0,0.0") and done.metrics["val_images"] == 6


def test_a_fine_tuned_classifier_is_a_start_only_where_its_head_may_go(
    base: dict[str, Any], whole: tuple[Path, dict[str, Any]], classes: Path, tmp_path: Path
) -> None:
    """Its head, of whatever size, is neither taken over nor dropped silently; the encoder is taken bit by bit."""
    for part in ("train", "val"):
        for folder in sorted((classes / part).iterdir())[:3]:
            place = tmp_path / "data" / part / folder.name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(folder)
    settings = {**base, "run": whole[0], "data": str(tmp_path / "data"), "epochs": 1, "tune_blocks": 0}
    settings |= {"out": tmp_path / "run"}
    with pytest.raises(MaekitError, match="fine-tuned classifier") as caught:
        package.finetune(settings)
    assert caught.value.code == "E-CKPT-KIND" and not (tmp_path / "run").exists()
    done = package.finetune({**settings, "new_head": True})
    before, after = (checkpoint.newest(run / "checkpoints") for run in (whole[0], tmp_path / "run"))
    assert done.exit_code == 0 and before is not None and after is not None
    old, new = before.tensors["model"], after.tensors["model"]
    assert new["head.weight"].shape[0] == 3 and old["head.weight"].shape[0] == 10
    assert all(torch.equal(old[name], new[name]) for name in old if not name.startswith(("head.", "fc_norm.")))


@pytest.mark.parametrize(
    ("more", "code"), [({}, "E-CKPT-KIND"), ({"from_scratch": True}, "E-CONFIG-IDLE"), ({"run": None}, "E-CONFIG-IDLE")]
)
def test_a_new_head_is_refused_where_there_is_no_old_one(
    base: dict[str, Any], tmp_path: Path, more: dict[str, Any], code: str
) -> None:
    with pytest.raises(MaekitError) as caught:
        package.finetune({**base, **more, "new_head": True, "out": tmp_path / "run"})
    assert caught.value.code == code and not (tmp_path / "run").exists()
