"""The report of a classifier: what the page says of the score, the files beside it."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from maekit.config import dump_yaml
from maekit.data.augment import EvalView
from maekit.data.sources import open_source
from maekit.report.classification import Scored, classification_report
from maekit.report.grids import captioned_grid
from maekit.report.scored import as_svg, confusion_picture, partial_drawing
from maekit.scores.measures import judge
from maekit.settings import Finetune


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(dump_yaml(Finetune(data="builtin:fashion"), {"images": 9, "classes": ["a"]}))
    return tmp_path


def report(run: Path, wrong: int, **more: Any) -> str:
    source = open_source("builtin:fashion", "val").subset(range(60))
    labels = torch.tensor(source.labels)
    said = labels.clone()
    said[:wrong] = (said[:wrong] + 1) % 10
    logs = torch.nn.functional.one_hot(said, 10).float().mul(4).log_softmax(1)
    scored = [Scored("", "the last epoch", judge(logs, labels, torch.arange(60)))]
    scored += [Scored("ema_", "the last epoch", scored[0].judged)] * bool(more.get("ema"))
    classification_report(run, scored, source, torch.nn.Linear(2, 2), EvalView((28, 28), 1.0), (0.5,))
    return (run / "report.html").read_text()


def test_the_page_and_the_files_beside_it(run: Path) -> None:
    page = report(run, 6)
    assert "0.9000" in page and "the last epoch" in page and "each exactly once" in page
    assert "Most confident mistakes" in page and page.count("data:image/png") == 2 and "<script" not in page
    with (run / "per_class.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 and sum(int(row["images"]) for row in rows) == 60
    assert sum(int(row["so_many_times"]) for row in rows) <= 6
    for name in ("confusion.png", "reliability.png", "mistakes.png"):
        with Image.open(run / name) as picture:
            assert picture.size[0] > 300


def test_a_classifier_without_mistakes_has_no_picture_of_them(run: Path) -> None:
    assert "every prediction is right" in report(run, 0) and not (run / "mistakes.png").exists()


def test_weights_and_their_average_stand_side_by_side(run: Path) -> None:
    page = report(run, 3, ema=True)
    assert "average of weights (EMA)" in page and page.count("0.9500") == 2


@pytest.mark.parametrize("classes", [2, 21, 61, 1000])
def test_a_confusion_matrix_of_any_size_is_a_picture(classes: int) -> None:
    matrix = torch.eye(classes, dtype=torch.long) * 3
    names = [f"class <{i}> & a name that is much longer than there is room for" for i in range(classes)]
    assert 400 < confusion_picture(matrix, names).size[0] < 2000


def test_the_partial_curve_names_its_points_and_the_probe() -> None:
    drawn = as_svg(partial_drawing({"0": 0.5, "0.5": 0.6, "all": 0.7}, 0.45))
    assert "0.5 0.600, all 0.700" in drawn and "linear probe 0.450" in drawn


@pytest.mark.parametrize("count", [1, 6, 7])
def test_captions_stand_under_their_pictures(count: int) -> None:
    grid = captioned_grid([torch.full((1, 8, 8), 0.5)] * count, ["a long caption of several words / and more"] * count)
    assert grid.size[0] > 100 * min(count, 6) and (grid.size[1] > 300) == (count > 6)
