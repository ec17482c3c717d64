"""Recipes of other data sets: the paper's scores are in them, and those of own sets run from any encoder."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maekit.config import load_yaml
from maekit.recipes import RECIPES, entry, find

# arXiv 2111.06377, table 6: ViT-B, ViT-L, ViT-H, ViT-H at 448 px, best before; typed in anew.
TABLE_6 = {
    "inat17": (70.5, 75.7, 79.3, 83.4, 75.4),
    "inat18": (75.4, 80.1, 83.0, 86.8, 81.2),
    "inat19": (80.5, 83.4, 85.7, 88.3, 84.1),
    "places205": (63.9, 65.8, 65.9, 66.8, 66.0),
    "places365": (57.9, 59.4, 59.8, 60.3, 58.0),
}


@pytest.mark.parametrize("name", TABLE_6)
def test_each_data_set_of_the_paper_says_its_five_scores(name: str) -> None:
    said = re.findall(r"0\.\d{3}", entry(f"transfer/finetune-{name}").expect)
    assert [round(100 * float(value), 1) for value in said] == list(TABLE_6[name])


def test_what_the_paper_adjusted_and_did_not_publish_is_said() -> None:
    cited = find("transfer/finetune-inat18")[1].cited
    assert {name for name, one in cited.items() if "paper A.5" in one.others} == {"base_lr", "epochs"}
    paper = find("paper/finetune-vit-b16-paper")[1]
    assert find("transfer/finetune-inat18")[1].settings == paper.settings


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("own/")])
def test_recipes_of_own_sets_start_from_any_run(
    maekit: Callable[..., Any], name: str, pretrained: Path, classes: Path, tmp_path: Path
) -> None:
    words = [
        "finetune",
        pretrained,
        "--recipe",
        name,
        "--data",
        classes,
        "--steps",
        2,
        "--workers",
        0,
        "--device",
        "cpu",
    ]
    done = maekit(*words, "--out", tmp_path / "run", "--json")
    assert done.code == 0 and 0 <= done.json["top1"] <= 1, done.stderr
    chosen = load_yaml(tmp_path / "run" / "config.yaml")
    assert chosen["recipe"] == name and chosen["layer_decay"] == str(find(name)[1].settings.layer_decay)
