"""The partial fine-tuning series: from end to end, stopped and gone on with, refused."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import maekit as package
from maekit.errors import MaekitError
from maekit.settings import Partial
from maekit.tasks.partial import blocks_of

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def base(pretrained: Path, classes: Path) -> dict[str, Any]:
    return {
        "run": pretrained, "data": str(classes), "labels": "5/class", "batch_size": 25, "epochs": 2, "workers": 0,
        "auto_augment": None, "device": "cpu", "tune_blocks": [0, 0.5, "all"],
    }  # fmt: skip


def test_the_series_runs_goes_on_where_it_was_and_draws_its_curve(
    maekit: Run, base: dict[str, Any], tmp_path: Path, flags: Run
) -> None:
    run = tmp_path / "run"
    words = flags({name: value for name, value in base.items() if name not in ("run", "auto_augment")} | {"out": run})
    words += ["--auto-augment", "none"]
    stopped = maekit("partial", base["run"], *words, "--stop-at", 1, "--json")
    assert stopped.code == 75 and stopped.json["steps"] == 1, stopped.stderr
    done = maekit("partial", base["run"], *words, "--json")
    assert done.code == 0, done.stderr
    assert list(done.json["curve"]) == ["0", "0.5", "all"] and 0 <= done.json["probe"] <= 1
    for name, top1 in done.json["curve"].items():
        assert json.loads((run / f"blocks-{name}" / "result.json").read_text())["top1"] == top1
    with (run / "partial.csv").open() as file:
        rows = list(csv.DictReader(file))
    counts = [int(row["trained_parameters"]) for row in rows]
    assert [row["blocks"] for row in rows] == ["0", "0.5", "all"] and counts == sorted(counts) and counts[0] == 1162
    assert "linear probe" in (run / "report.html").read_text() and (run / "partial.png").exists()
    before = (run / "blocks-0" / "result.json").stat().st_mtime_ns
    (run / "result.json").unlink()
    again = maekit("partial", base["run"], *words, "--json")
    assert again.json == done.json and (run / "blocks-0" / "result.json").stat().st_mtime_ns == before


def test_the_parts_of_the_default_end_with_the_models_blocks(pretrained: Path) -> None:
    assert blocks_of(Partial(run=pretrained)) == [0, 0.5, 1, 2, 4, "all"]
    assert blocks_of(Partial(run=pretrained, tune_blocks=[3, "all", 3])) == [3, "all"]


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        ({"tune_blocks": [0, 5]}, "E-CONFIG-BLOCKS", "5 of a model of 4 blocks"),
        ({"tune_blocks": [1.5]}, "E-CONFIG-BLOCKS", "1.5 of"),
        ({"run": None}, "E-USAGE-RUN", "run folder"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(
    base: dict[str, Any], tmp_path: Path, more: dict[str, Any], code: str, said: str
) -> None:
    with pytest.raises(MaekitError, match=said) as caught:
        package.partial({**base, **more, "out": tmp_path / "run"})
    assert caught.value.code == code and not (tmp_path / "run").exists()


def test_a_recipe_for_fine_tuning_serves_the_series_and_one_for_pretraining_does_not() -> None:
    from maekit.config import resolve

    assert resolve(Partial, recipe="builtin/finetune-fashion")[0].layer_decay == 0.75
    with pytest.raises(MaekitError, match="recipe for pretrain"):
        resolve(Partial, recipe="builtin/pretrain-fashion")
