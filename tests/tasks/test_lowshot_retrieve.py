"""Few labels, many draws; and which images lie near which."""

import csv
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import maekit as package
from maekit.scores.spread import mean_and_interval

Run = Callable[..., Any]


def test_lowshot_is_the_mean_of_what_the_probe_finds_with_each_draw(
    maekit: Run, pretrained: Path, classes: Path, tmp_path: Path
) -> None:
    words = [pretrained, "--data", classes, "--device", "cpu", "--workers", 0, "--cache", tmp_path / "kept", "--json"]
    done = maekit("lowshot", *words, "--shots", "1,4", "--draws", 3, "--label-seed", 7)
    assert done.code == 0 and "Warning" not in done.stderr, done.stderr
    rows = done.json["shots"]
    assert [row["per_class"] for row in rows] == [1, 4] and rows[0]["top1"] < rows[1]["top1"]
    for row in rows:
        assert (row["top1"], row["interval"]) == pytest.approx(mean_and_interval(row["draws"]))
        spec = f"{row['per_class']}/class"
        alone = [maekit("probe", *words, "--labels", spec, "--label-seed", 7 + i, "--seed", i).json for i in range(3)]
        assert statistics.fmean(one["top1"] for one in alone) == pytest.approx(row["top1"], abs=0.02)
    text = maekit("lowshot", *words[:-1], "--shots", 2, "--draws", 1).stdout
    assert "one draw" in text and "100 held-out images" in text


def test_retrieve_draws_a_grid_and_lists_every_neighbour(
    maekit: Run, pretrained: Path, classes: Path, tmp_path: Path
) -> None:
    words = ["retrieve", pretrained, "--data", classes, "--device", "cpu", "--workers", 0, "--k", 4, "--queries", 5]
    done = maekit(*words, "--out", tmp_path / "near", "--json")
    assert done.code == 0 and "Warning" not in done.stderr, done.stderr
    assert done.json["k"] == 4 and done.json["images"] == 100 and 0.3 < done.json["precision"] < 1
    with Image.open(tmp_path / "near/neighbours.png") as picture:
        assert picture.width > 5 * 112 and picture.height > 5 * 112
    with (tmp_path / "near/neighbours.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 400
    right = [Path(row["image"]).parts[-2] == Path(row["neighbour"]).parts[-2] for row in rows]
    assert sum(right) / 400 == pytest.approx(done.json["precision"])
    cosines = torch.tensor([float(row["cosine"]) for row in rows]).view(100, 4)
    assert torch.equal(cosines, cosines.sort(1, descending=True).values)


def test_retrieve_needs_no_labels(pretrained: Path, flat: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"run": pretrained, "data": str(flat), "device": "cpu", "out": tmp_path, "cache": None}
    found = package.retrieve(settings).metrics
    assert "precision" not in found and (tmp_path / "neighbours.png").exists()


def test_an_image_is_its_own_nearest(pretrained: Path, classes: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"run": pretrained, "data": str(classes / "val"), "val_data": str(classes / "val")}
    package.retrieve({**settings, "device": "cpu", "out": tmp_path, "cache": None, "k": 1})
    with (tmp_path / "neighbours.csv").open() as file:
        assert all(row["image"] == row["neighbour"] for row in csv.DictReader(file))
