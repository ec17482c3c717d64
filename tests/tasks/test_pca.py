"""``maekit pca`` from end to end: the folder, its recipe, the same bits again, what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.decomposition import PCA

import maekit as package
from maekit.data.image import read_image
from maekit.data.sources import open_source
from maekit.errors import MaekitError
from maekit.interchange.targets import load_target
from maekit.model.patches import patchify

Run = Callable[..., Any]
SMALL: dict[str, Any] = {"img_size": 28, "channels": 1, "patch_size": 7, "patches": 3000, "workers": 0}


@pytest.fixture(scope="module")
def folder(flat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("pca") / "run"
    assert package.pca({**SMALL, "data": str(flat), "components": 10, "out": run}).exit_code == 0
    return run


def test_the_command_takes_size_and_crop_of_a_pretraining_recipe(fresh: Run, tmp_path: Path) -> None:
    done = fresh("pca", "--recipe", "builtin/pretrain-fashion", "--patches", 2000, "--out", tmp_path / "run", "--json")
    assert done.returncode == 0 and "Warning" not in done.stderr and "deviates" not in done.stderr, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["components"] == 24 and found["values"] == 49 and found["patches"] == 2000  # half of them
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (config["img_size"], config["patch_size"], config["data"]) == ([28, 28], 7, "builtin:fashion")
    assert 0.9 < found["explained"] < 1 and len(found["explained_by"]) == 24


def test_the_folder_explains_itself(folder: Path, flat: Path) -> None:
    assert {"config.yaml", "result.json", "target.safetensors", "components.png", "report.html"} <= {
        path.name for path in folder.iterdir()
    }
    Image.open(folder / "components.png").verify()
    page = (folder / "report.html").read_text()
    assert "Explained variance" in page and 'src="http' not in page
    target = load_target(folder)
    assert target.spec == {"components": 10, "values": 49, "patch": 7, "channels": 1}
    assert target.fingerprint == open_source(flat, "train-or-all").fingerprint()
    resolved = yaml.safe_load((folder / "config.yaml").read_text())["resolved"]
    assert tuple(resolved["mean"]) == target.mean and 0 < target.mean[0] < 1


def test_without_crops_it_is_the_pca_of_all_patches_of_the_images(flat: Path, tmp_path: Path) -> None:
    settings = {**SMALL, "data": str(flat), "components": 6, "crop_scale": (1.0, 1.0), "flip": False, "patches": 640}
    package.pca({**settings, "out": tmp_path / "run"})
    target = load_target(tmp_path / "run")
    images = torch.stack([read_image(path.read_bytes(), channels=1) for path in sorted(flat.iterdir())])
    rows = patchify((images / 255 - target.mean[0]) / target.std[0], 7).flatten(0, 1)
    theirs = PCA(6, svd_solver="full").fit(rows.double().numpy())
    found = target.module()
    np.testing.assert_allclose(found.get_buffer("components").numpy(), np.asarray(theirs.components_), atol=1e-5)
    np.testing.assert_allclose(found.get_buffer("variance").numpy(), np.asarray(theirs.explained_variance_), rtol=1e-5)


def test_the_same_settings_give_the_same_bits_and_another_seed_others(folder: Path, flat: Path, tmp_path: Path) -> None:
    first = load_target(folder).tensors["components"]
    for seed, workers, same in ((0, 1, True), (1, 0, False)):
        out = tmp_path / f"{seed}"
        package.pca({**SMALL, "data": str(flat), "components": 10, "out": out, "seed": seed, "workers": workers})
        assert torch.equal(load_target(out).tensors["components"], first) == same


def test_a_finished_folder_is_left_alone_and_other_settings_are_refused(folder: Path, flat: Path) -> None:
    before = (folder / "target.safetensors").stat().st_mtime_ns
    settings = {**SMALL, "data": str(flat), "components": 10, "out": folder}
    assert "nothing to do" in package.pca(settings).text
    assert (folder / "target.safetensors").stat().st_mtime_ns == before
    with pytest.raises(MaekitError, match="components 10 -> 11"):
        package.pca({**settings, "components": 11})


@pytest.mark.parametrize(
    ("more", "code", "told"),
    [
        ({"components": 50}, "E-CONFIG-PCA", "50 of 49 values"),
        ({"components": 40, "patches": 30}, "E-CONFIG-PCA", "more --patches"),
        ({"img_size": 30}, "E-CONFIG-SIZE", "multiples of the patch side 7"),
        ({"stats": "imagenet"}, "E-CONFIG-STATS", "--stats dataset"),
        ({"channels": 2}, "E-CONFIG-CHANNELS", "--channels 3"),
        ({"components": 0}, "E-CONFIG-VALUE", "components"),
        ({"recipe": "builtin/finetune-fashion"}, "E-CONFIG-RECIPE", "a recipe for finetune"),
        ({"model": "resnet50", "patch_size": None}, "E-CONFIG-MODEL", "resnet50"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(
    flat: Path, tmp_path: Path, more: dict[str, Any], code: str, told: str
) -> None:
    with pytest.raises(MaekitError, match=told) as caught:
        package.pca({**SMALL, "data": str(flat), "out": tmp_path / "run", **more})
    assert caught.value.code == code and not (tmp_path / "run").exists()
