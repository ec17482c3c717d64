"""Features that are kept are those that would be computed, or they are computed."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import maekit as package
from maekit.data.sources import DatasetSource, open_source
from maekit.errors import MaekitError
from maekit.interchange.weights import load_model
from maekit.model.mae import MaskedAutoencoder, create_model
from maekit.tasks.feature_cache import FeatureCache
from maekit.tasks.features import Features, extract, extract_layers
from maekit.train.device import World

HERE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def model(pretrained: Path) -> MaskedAutoencoder:
    return load_model(pretrained)


def features(model: MaskedAutoencoder, place: Path, cache: FeatureCache | None, pool: str = "mean") -> Features:
    return extract(model, open_source(place), HERE, pool=pool, workers=0, title="features", cache=cache)


def test_what_is_kept_is_what_is_computed(
    model: MaskedAutoencoder, classes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = FeatureCache(tmp_path / "kept")
    caplog.set_level(logging.INFO, "maekit")
    plain, first = features(model, classes / "val", None), features(model, classes / "val", cache)
    assert "kept in" not in caplog.text
    again = features(model, classes / "val", cache)
    assert "kept in" in caplog.text and len(list((tmp_path / "kept").iterdir())) == 1
    for other in (first, again):
        assert torch.equal(plain.values, other.values) and torch.equal(plain.labels, other.labels)
        assert torch.equal(plain.index, other.index)


def test_other_weights_images_or_pooling_are_other_entries(
    model: MaskedAutoencoder, classes: Path, tmp_path: Path
) -> None:
    cache, own = FeatureCache(tmp_path / "kept"), tmp_path / "images"
    shutil.copytree(classes / "val", own)

    def entries() -> int:
        features(model, own, cache)
        return len(list(cache.folder.iterdir()))

    assert entries() == entries() == 1
    features(model, own, cache, pool="cls")
    assert entries() == 2
    one = next(own.rglob("*.png"))
    os.utime(one, ns=(1, 1))  # an image that was changed and kept its size
    assert entries() == 3
    one.rename(one.with_name("other.png"))
    assert entries() == 4
    model = create_model(**model.spec).eval()
    assert entries() == 5
    model.set_statistics((0.4,), (0.3,))
    assert entries() == 6


@pytest.mark.parametrize("harm", ["cut", "flip", "text"])
def test_a_damaged_entry_is_said_and_computed_anew(
    model: MaskedAutoencoder, classes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    cache = FeatureCache(tmp_path / "kept")
    plain = features(model, classes / "val", cache)
    file = next(cache.folder.iterdir())
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes({"cut": data[: len(data) // 2], "flip": data, "text": b"no features"}[harm])
    caplog.set_level(logging.WARNING, "maekit")
    assert torch.equal(features(model, classes / "val", cache).values, plain.values)
    assert "damaged" in caplog.text
    caplog.clear()
    features(model, classes / "val", cache)
    assert not caplog.text


def test_a_place_that_cannot_be_written_costs_a_warning(
    model: MaskedAutoencoder, classes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    found = features(model, classes / "val", FeatureCache(tmp_path / "file" / "kept"))
    assert len(found.index) == 100 and "not kept" in caplog.text


def test_a_dataset_in_memory_is_not_kept(model: MaskedAutoencoder, tmp_path: Path) -> None:
    cache, images = FeatureCache(tmp_path / "kept"), [np.full((28, 28), i, dtype=np.uint8) for i in range(4)]
    source = DatasetSource(images, channels=1)
    extract(model, source, HERE, pool="mean", workers=0, title="features", cache=cache)
    assert not cache.folder.exists()


def test_all_blocks_come_from_one_pass_and_the_last_is_the_encoders_output(classes: Path) -> None:
    model = create_model("vit_tiny_patch16_224", img_size=28, patch_size=7, in_chans=1, depth=3, decoder_depth=1).eval()
    source = open_source(classes / "val")
    wanted = [(layer, pool) for layer in (1, 2, 3) for pool in ("mean", "cls")]
    found = extract_layers(model, source, HERE, wanted, workers=0, title="features")
    for pool in ("mean", "cls"):
        alone = extract(model, source, HERE, pool=pool, workers=0, title="features")
        assert torch.equal(found[3, pool].values, alone.values)
    seen: list[Any] = []
    hook = model.encoder.blocks[0].register_forward_hook(lambda _, __, output: seen.append(output))
    images = torch.rand(2, 1, 28, 28)
    tokens, (first, second) = model.features(images, "tokens"), model.layer_features(images, [(1, "mean"), (2, "cls")])
    hook.remove()
    assert tokens.shape == (2, 17, 192)
    assert torch.equal(model.encoder.norm(seen[0])[:, 1:].mean(1), first)
    assert torch.equal(model.encoder.norm(model.encoder.blocks[1](seen[0]))[:, 0], second)


def test_features_that_are_no_numbers_are_refused_in_a_line(pretrained: Path, classes: Path) -> None:
    model = load_model(pretrained)
    with torch.no_grad():
        model.encoder.get_parameter("norm.bias").fill_(float("nan"))
    with pytest.raises(MaekitError, match=r"E-NUM-FEATURES.*NaN or infinity for 100 of 100 images"):
        features(model, classes / "val", None)


def test_a_run_folder_keeps_features_unless_told_otherwise(pretrained: Path, classes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(pretrained, run, ignore=shutil.ignore_patterns("features"))
    settings: dict[str, Any] = {"run": run, "data": str(classes), "device": "cpu", "workers": 0}
    plain = package.knn({**settings, "cache": None}).metrics
    assert not (run / "features").exists()
    assert package.knn(settings).metrics == package.knn(settings).metrics == plain
    assert len(list((run / "features").iterdir())) == 2
    package.knn({**settings, "run": run / "encoder.safetensors"})
    assert package.probe({**settings, "cache": str(tmp_path / "own")}).metrics["train_images"] == 240
    assert len(list((tmp_path / "own").iterdir())) == 2
