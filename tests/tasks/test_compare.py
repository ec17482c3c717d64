"""Two runs side by side: scores, images, settings; what is no pair is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import maekit as package
from maekit.errors import MaekitError
from maekit.scores.spread import bootstrapped, paired_over_seeds
from maekit.settings import Finetune
from maekit.tasks.run_folder import Resolved, Run, describe, finish

Command = Callable[..., Any]


def a_run(folder: Path, seed: int, lr: float, top1: float, right: list[bool] | None = None) -> Path:
    """Leave what a finished fine-tune leaves, without the training."""
    folder.mkdir()
    run = Run(folder, None, None)
    describe(run, Finetune(from_scratch=True, base_lr=lr, seed=seed), Resolved(images=4, fingerprint="x"))
    finish(run, {"run": str(folder), "steps": 3, "top1": top1, "val_loss": 2 - top1})
    if right is not None:
        predictions(folder / "predictions.parquet", right)
    return folder


def predictions(path: Path, right: list[bool], first: int = 0) -> Path:
    columns = {
        "path": [f"{first + i}.png" for i in range(len(right))],
        "label_name": ["b"] * len(right),
        "label": [1] * len(right),
        "predicted_index": [int(one) for one in right],
    }
    pq.write_table(pa.table(columns), path)
    return path


def test_seeds_are_compared_pair_by_pair_and_settings_that_differ_are_shown(maekit: Command, tmp_path: Path) -> None:
    scores = {"a": [0.6, 0.7, 0.65], "b": [0.5, 0.62, 0.6]}
    words = [
        ",".join(str(a_run(tmp_path / f"{arm}{seed}", seed, lr, scores[arm][seed])) for seed in range(3))
        for arm, lr in (("a", 1e-3), ("b", 2e-3))
    ]
    done = maekit("compare", *words, "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.stderr
    found = {row["score"]: row for row in done.json["rows"]}
    oracle = paired_over_seeds(scores["a"], scores["b"])
    assert list(found) == ["top1", "val_loss"] and found["top1"]["p"] == oracle.p and found["top1"]["low"] == oracle.low
    assert done.json["settings"] == {"base_lr": ["0.001", "0.002"]}
    assert (
        "0.6500 ± 0.0500" in maekit("compare", *words).stdout
        and "base_lr" in (tmp_path / "out/report.html").read_text()
    )
    assert "| top1 |" in (tmp_path / "out/table.md").read_text() and (tmp_path / "out/table.csv").exists()


def test_one_run_each_is_compared_image_by_image(maekit: Command, tmp_path: Path) -> None:
    first, second = [True] * 30 + [False] * 10, [True] * 20 + [False] * 15 + [True] * 5
    a, b = a_run(tmp_path / "a", 0, 1e-3, 0.75, first), a_run(tmp_path / "b", 0, 1e-3, 0.625, second)
    done = maekit("compare", a, b, "--json")
    assert done.code == 0, done.stderr
    row, oracle = done.json["rows"][0], bootstrapped(first, second)
    assert (row["mean"], row["low"], row["p"]) == (oracle.mean, oracle.low, oracle.p) and row["paired"] == "images"
    assert [done.json[name] for name in ("both", "only_a", "only_b", "neither")] == [20, 10, 5, 5]
    assert "a alone 10, b alone 5" in maekit("compare", a, b).stdout
    files = [a / "predictions.parquet", b / "predictions.parquet"]
    assert package.compare({"a": files[:1], "b": files[1:]}).metrics["rows"][0]["p"] == oracle.p  # type: ignore[index]
    other = predictions(tmp_path / "other.parquet", second, first=7)
    assert package.compare({"a": files[:1], "b": [other]}).metrics["rows"][0]["low"] is None  # type: ignore[index]


def test_what_is_no_pair_is_refused(pretrained: Path, tmp_path: Path) -> None:
    a, b = a_run(tmp_path / "a", 0, 1e-3, 0.75), a_run(tmp_path / "b", 1, 1e-3, 0.5)
    unfinished = a_run(tmp_path / "c", 1, 1e-3, 0.5)
    (unfinished / "result.json").unlink()
    nothing = tmp_path / "nothing.parquet"
    nothing.write_bytes(b"no parquet")
    unlabelled = tmp_path / "unlabelled.parquet"
    pq.write_table(
        pa.table({"path": ["x"], "label_name": ["y"], "label": pa.array([None], pa.int64()), "predicted_index": [1]}),
        unlabelled,
    )
    for sides, code, said in (
        (([a], []), "E-USAGE-RUN", "two runs"),
        (([a], [unfinished]), "E-CONFIG-RUN", "not finished"),
        (([a], [tmp_path / "nowhere"]), "E-CONFIG-RUN", "no such folder"),
        (([a], [tmp_path]), "E-CONFIG-RUN", "no run"),
        (([a], [pretrained]), "E-CONFIG-VERB", "evaluate"),
        (([a, b], [b]), "E-CONFIG-SEEDS", "2 and 1 runs"),
        (([a, b], [b, a]), "E-CONFIG-SEEDS", "in the same order"),
        (([a, a], [b, b]), "E-CONFIG-SEEDS", "a run twice"),
        (([nothing], [nothing]), "E-CONFIG-RUN", "no predictions"),
        (([unlabelled], [unlabelled]), "E-DATA-LABELS", "true class"),
    ):
        with pytest.raises(MaekitError, match=said) as error:
            package.compare({"a": sides[0], "b": sides[1]})
        assert error.value.code == code
    with pytest.raises(MaekitError, match=r"other files: config\.yaml") as error:
        package.compare({"a": [a], "b": [b], "out": a})
    assert error.value.code == "E-CONFIG-OUT"


def test_two_pretrainings_are_compared_too(pretrained: Path) -> None:
    metrics = package.compare({"a": [pretrained], "b": [pretrained]}).metrics
    assert metrics["settings"] == {} and any(row["score"] == "loss" for row in metrics["rows"])  # type: ignore[attr-defined]
    assert json.dumps(metrics)
