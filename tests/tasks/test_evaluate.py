"""One table of several encoders: the scores of the single verbs, kept, gone on with, refused."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import maekit as package
from maekit.errors import MaekitError
from maekit.scores.spread import paired_over_seeds

Run = Callable[..., Any]
QUICK: dict[str, Any] = {"labels": "5/class", "seeds": 2, "shots": [1, 4], "draws": 3}


@pytest.fixture(scope="module")
def base(classes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    kept = tmp_path_factory.mktemp("features")
    return {"data": str(classes), "device": "cpu", "workers": 0, "cache": str(kept)}


@pytest.fixture(scope="module")
def table(pretrained: Path, base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick evaluation of one encoder beside random weights."""
    out = tmp_path_factory.mktemp("evaluated") / "table"
    package.evaluate(base | QUICK | {"runs": [f"mae={pretrained}"], "out": out})
    return out


def row(out: Path, measure: str) -> dict[str, Any]:
    rows = json.loads((out / "result.json").read_text())["rows"]
    return next(one for one in rows if one["measure"] == measure)


def test_its_scores_are_those_of_the_single_verbs(pretrained: Path, base: dict[str, Any], table: Path) -> None:
    for arm, random in (("mae", False), ("random weights", True)):
        asked = base | {"run": pretrained, "random_init": random}
        for verb, measure in ((package.knn, "knn"), (package.probe, "logistic")):
            alone = [verb(asked | {"labels": "5/class", "label_seed": s}).metrics["top1"] for s in (0, 1)]
            assert row(table, measure)["arms"][arm]["values"] == pytest.approx(alone)
        shots = package.lowshot(asked | {"shots": [1, 4], "draws": 3}).metrics["shots"]
        assert isinstance(shots, list)
        for one in shots:
            found = row(table, f"lowshot {one['per_class']}/class")["arms"][arm]["values"]
            assert found == pytest.approx(one["draws"])


def test_each_row_says_what_chance_could_have_done_and_the_page_shows_it(table: Path) -> None:
    found = row(table, "lowshot 4/class")
    mine, theirs = (found["arms"][arm]["values"] for arm in ("mae", "random weights"))
    apart, oracle = found["differences"]["random weights"], paired_over_seeds(mine, theirs)
    assert (apart["mean"], apart["p"], apart["paired"]) == (oracle.mean, oracle.p, "draws")
    page = (table / "report.html").read_text()
    assert all(word in page for word in ("random weights", "Differences from mae", "GMAC an image", "paired t-test"))
    with (table / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [one["arm"] for one in rows[:2]] == ["mae", "random weights"]
    assert float(rows[0]["mean"]) == row(table, rows[0]["measure"])["arms"]["mae"]["mean"]
    assert (table / "table.md").read_text().count("| lowshot 1/class |") == 2
    cost = json.loads((table / "result.json").read_text())["cost"]["mae"]
    assert 0.1e6 < cost["parameters"] < 1e6
    assert cost["gmac_per_image"] > 0 and cost["seconds"]["features"] > 0 and cost["memory_mib"] > 50


def test_scores_that_are_there_are_kept_and_others_are_added(
    pretrained: Path, base: dict[str, Any], table: Path, tmp_path: Path
) -> None:
    out = tmp_path / "table"
    shutil.copytree(table, out)
    stamps = {file.name: file.stat().st_mtime_ns for file in (out / "scores").iterdir()}
    damaged = out / "scores" / next(name for name in stamps if name.startswith("knn_mae"))
    damaged.write_text(damaged.read_text()[:-20])
    more = {"runs": [f"mae={pretrained}", f"again={pretrained}"], "out": out}
    metrics = package.evaluate(base | QUICK | more).metrics
    assert list(metrics["arms"]) == ["mae", "again", "random weights"]  # type: ignore[call-overload]
    assert row(out, "knn")["arms"]["again"] == row(out, "knn")["arms"]["mae"] == row(table, "knn")["arms"]["mae"]
    assert row(out, "knn")["differences"]["again"]["p"] is None  # all differences 0: nothing is said of chance
    assert row(out, "knn")["differences"]["again"]["mean"] == 0
    now = {file.name: file.stat().st_mtime_ns for file in (out / "scores").iterdir()}
    assert all(now[name] == stamp for name, stamp in stamps.items() if name != damaged.name)
    assert sum(name not in stamps for name in now) == 5 and now[damaged.name] != stamps[damaged.name]


def test_one_score_each_is_compared_over_the_images(pretrained: Path, base: dict[str, Any], tmp_path: Path) -> None:
    package.evaluate(base | {"runs": [str(pretrained)], "suite": ["logistic"], "out": tmp_path / "t"})
    found = row(tmp_path / "t", "logistic")
    apart = found["differences"]["random weights"]
    assert (apart["paired"], apart["pairs"]) == ("images", 100) and apart["low"] <= apart["mean"] <= apart["high"]
    assert found["arms"]["run"]["deviation"] is None


def test_several_encoders_of_an_arm_are_its_seeds(pretrained: Path, base: dict[str, Any], tmp_path: Path) -> None:
    before, last = sorted((pretrained / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    arms = [f"mae={last}", f"mae={before}"]
    with pytest.raises(MaekitError, match="the same weights twice"):
        package.evaluate(base | {"runs": [arms[0], f"mae={pretrained}"], "out": tmp_path / "t"})
    package.evaluate(base | {"runs": arms, "suite": ["knn"], "labels": "5/class", "seeds": 2, "out": tmp_path / "t"})
    found = row(tmp_path / "t", "knn")
    assert len(found["arms"]["mae"]["values"]) == 2 and found["differences"]["random weights"]["paired"] == "encoders"
    assert len(set(found["arms"]["random weights"]["values"])) == 2


def test_a_stopped_suite_goes_on_and_what_is_trained_pairs_by_seed(
    maekit: Run, pretrained: Path, base: dict[str, Any], tmp_path: Path, flags: Run
) -> None:
    """A fine-tune that stops itself after a step stands for the signal, which finds its moment by chance."""
    out, recipe = tmp_path / "table", tmp_path / "finetune.yaml"
    whole = "epochs: 2\nbatch_size: 25\nauto_augment: none\nprecision: fp32\n"
    recipe.write_text(whole + "stop_at: 1\n")
    attack = tmp_path / "attack.yaml"
    attack.write_text("occlusions: [drop]\nfractions: [0, 0.5]\n")
    words = [pretrained, *flags(base | {"labels": "5/class", "seeds": 2, "out": out}), "--finetune", recipe]
    words += ["--robustness", attack, "--suite", "knn,occlusion", "--json"]
    stopped = maekit("evaluate", *words)
    assert stopped.code == 75 and stopped.json["jobs_done"] == 4 and stopped.json["jobs"] == 12, stopped.stderr
    assert "Not finished: 8 scores are missing" in (out / "report.html").read_text()
    recipe.write_text(whole)
    done = maekit("evaluate", *words)
    assert done.code == 0 and done.json["jobs_done"] == 12, done.stderr
    found = row(out, "finetune")
    assert len(found["arms"]["run"]["values"]) == 2 and found["differences"]["random weights"]["paired"] == "seeds"
    runs = [json.loads(file.read_text()) for file in sorted((out / "runs").glob("finetune_run_*/result.json"))]
    assert sorted(run["top1"] for run in runs) == sorted(found["arms"]["run"]["values"])
    assert 0 <= row(out, "occlusion drop")["arms"]["run"]["mean"] <= 1
    one = maekit("evaluate", *words, "--seeds", 1)  # nothing is left to measure: one fine-tune each
    assert one.code == 0 and "6 of 6 scores are there" in one.stderr, one.stderr
    assert row(out, "finetune")["differences"]["random weights"]["paired"] == "images"


def test_a_trained_probe_is_that_of_the_verb(pretrained: Path, base: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "probe.yaml").write_text("epochs: 1\nbatch_size: 25\n")
    asked = {"labels": "5/class", "suite": ["lars"], "seeds": 1, "random_arm": False}
    package.evaluate(
        base | asked | {"runs": [str(pretrained)], "probe": str(tmp_path / "probe.yaml"), "out": tmp_path / "t"}
    )
    more = {"run": pretrained, "labels": "5/class", "protocol": "lars", "epochs": 1, "batch_size": 25}
    alone = package.probe(base | more | {"out": tmp_path / "alone"}).metrics["top1"]
    assert row(tmp_path / "t", "lars")["arms"]["run"]["values"] == [alone]


def test_other_pixels_or_labels_under_the_same_names_are_measured_anew(
    pretrained: Path, classes: Path, base: dict[str, Any], tmp_path: Path
) -> None:
    rows = {
        part: [f"{file.resolve()},{file.parent.name}" for file in sorted((classes / part).rglob("*.png"))]
        for part in ("train", "val")
    }

    def measured(turn: int) -> float:
        for part, lines in rows.items():
            names = [line.split(",")[1] for line in lines]
            moved = names[turn:] + names[:turn] if part == "train" else names
            text = "".join(f"{line.split(',')[0]},{name}\n" for line, name in zip(lines, moved, strict=True))
            (tmp_path / f"{part}.csv").write_text("path,label\n" + text)
        asked = {"data": str(tmp_path / "train.csv"), "val_data": str(tmp_path / "val.csv"), "suite": ["knn"]}
        package.evaluate(base | asked | {"runs": [str(pretrained)], "random_arm": False, "out": tmp_path / "t"})
        return float(row(tmp_path / "t", "knn")["arms"]["run"]["mean"])

    right, wrong = measured(0), measured(72)  # every label of the bank three classes off
    assert right > wrong + 0.1


def test_a_first_job_that_is_stopped_can_go_on(
    maekit: Run, pretrained: Path, base: dict[str, Any], tmp_path: Path
) -> None:
    recipe = tmp_path / "finetune.yaml"
    recipe.write_text("epochs: 2\nbatch_size: 25\nauto_augment: none\nprecision: fp32\nstop_at: 1\n")
    words = [pretrained, "--data", base["data"], "--device", "cpu", "--workers", 0, "--labels", "5/class"]
    words += ["--suite", "finetune", "--seeds", 1, "--finetune", recipe, "--no-random-arm", "--out", tmp_path / "t"]
    stopped = maekit("evaluate", *words, "--json")
    assert stopped.code == 75 and stopped.json["jobs_done"] == 0, stopped.stderr


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        ({"runs": []}, "E-USAGE-RUN", "no weights named"),
        ({"runs": ["nowhere"]}, "E-USAGE-RUN", "no such file"),
        ({"runs": ["random weights={run}"]}, "E-CONFIG-ARM", "random weights"),
        ({"suite": ["kn"]}, "E-CONFIG-SUITE", "expected quick, full or some of knn"),
        ({"finetune": "own/finetune-hundreds"}, "E-CONFIG-IDLE", "setting finetune"),
        ({"shots": [1, 100]}, "E-DATA-LABELS", "expected 100"),
        ({"suite": ["finetune"], "finetune": "builtin/pretrain-fashion"}, "E-CONFIG-RECIPE", "pretrain"),
        ({"suite": ["finetune"], "finetune": "scratch-vit-b16"}, "E-CONFIG-TASK", "from_scratch True"),
        ({"runs": ["a={run}", "a"]}, "E-USAGE-RUN", "no such file"),
        ({"runs": ["x" * 61 + "={run}"]}, "E-CONFIG-ARM", "up to 60 letters"),
        ({"val_data": "{flat}"}, "E-DATA-LABELS", "have no labels"),
        ({"suite": ["finetune"], "finetune": "{idle}"}, "E-CONFIG-IDLE", "mixup_prob"),
        ({"suite": ["lars"], "probe": "{layers}"}, "E-CONFIG-BOTH", "layers"),
        ({"suite": ["corruptions"]}, "E-DATA-IMAGE", "at least 32 px"),
        ({"labels": "a few"}, "E-USAGE-LABELS", "a few"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is(
    more: dict[str, Any], code: str, said: str, pretrained: Path, flat: Path, base: dict[str, Any], tmp_path: Path
) -> None:
    places = {"run": pretrained, "flat": flat, "idle": tmp_path / "idle.yaml", "layers": tmp_path / "layers.yaml"}
    places["idle"].write_text("mixup: 0\ncutmix: 0\nmixup_prob: 0.5\n")
    places["layers"].write_text("protocol: logistic\nlayers: all\n")
    for name, value in more.items():
        if name in ("runs", "finetune", "probe", "val_data"):
            filled = [each.format(**places) for each in ([value] if isinstance(value, str) else value)]
            more = more | {name: filled[0] if isinstance(value, str) else filled}
    with pytest.raises(MaekitError, match=said) as error:
        package.evaluate(base | {"runs": [str(pretrained)], "out": tmp_path / "out"} | more)
    assert error.value.code == code and not (tmp_path / "out").exists()
