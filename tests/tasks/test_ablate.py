"""Tables from end to end: run, killed and gone on with, grown, shared, beside one another, refused."""

import csv
import importlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import maekit as package
from maekit.errors import MaekitError, clean
from maekit.recipes.tables import TABLES
from maekit.report.ablation import ablation_report, scores_table
from maekit.settings import Ablate, Pretrain
from maekit.tasks import parts as doing
from maekit.tasks.ablate import _speed_ups, table_of
from maekit.tasks.parts import Part, make_part, work_off

Run = Callable[..., Any]
SMALL = ("embed_dim=16", "depth=1", "num_heads=2", "decoder_dim=16", "decoder_heads=2", "steps=6", "batch_size=16",
         "save_every=1", "workers=0")  # fmt: skip


def words(data: Path, place: Path, *more: Any, out: str = "table") -> list[Any]:
    return [
        "ablate", "fig5-mask-ratio", "--data", data, "--rows", "50,75", "--seeds", 1, "--labels", "5/class",
        "--workers", 0, "--device", "cpu", "--pretrain", *SMALL[:-1], "decoder_depth=1",
        "--finetune", "steps=3", "batch_size=16", "--out", place / out, "--json", *more,
    ]  # fmt: skip


def scores(out: Path) -> list[list[str]]:
    with (out / "ablation.csv").open() as file:
        return [[row[name] for name in ("row", "measure", "values", "paper")] for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def table(maekit: Run, classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two rows of one seed."""
    place = tmp_path_factory.mktemp("ablation")
    done = maekit(*words(classes, place))
    assert done.code == 0, done.stderr
    return place, done


@pytest.fixture(scope="module")
def seeds(maekit: Run, classes: Path, table: Any) -> Any:
    """The same table with a seed more."""
    before = finished(table[0])
    done = maekit(*words(classes, table[0], "--seeds", 2))
    assert done.code == 0, done.stderr
    after = finished(table[0])
    assert len(before) == 6 and len(after) == 12 and {path: after[path] for path in before} == before
    return table[0], done


def finished(place: Path) -> dict[Path, int]:
    """Return when each run that is finished was."""
    return {path: path.stat().st_mtime_ns for path in (place / "ablate-parts").glob("*/result.json")}


def test_a_table_stands_beside_the_papers_in_five_forms(table: Any, tmp_path: Path) -> None:
    place, done = table
    found, out = done.json, place / "table"
    assert [row["name"] for row in found["rows"]] == ["50", "75"] and found["runs"] == found["done"] == 6
    for row in found["rows"]:
        for measure in ("finetune", "probe"):
            assert row["scores"][measure].keys() == {"0"}
            for seed, value in row["scores"][measure].items():
                run = out / "rows" / row["name"] / f"seed-{seed}" / measure
                assert run.is_symlink() and json.loads((run / "result.json").read_text())["top1"] == value
        assert row["images_per_second"] > 0 and row["memory_mib"] > 100
        # time is that of six steps of 16 images, not of the verb with its report
        assert row["seconds"] == pytest.approx(6 * 16 / row["images_per_second"]) and not row["with_setup"]
        booked = json.loads(
            (place / "ablate-parts" / f"{Path(row['runs']['0']['pretrain']).name}.cost.json").read_text()
        )
        assert booked["seconds"] > row["seconds"] and booked["sharing"] == row["sharing"] == 1
    assert found["rows"][1]["speed_up"] == 1.0 and found["rows"][0]["speed_up"] > 0
    half, most = (row["gflops_per_image"] for row in found["rows"])
    assert half > most
    assert found["rows"][1]["paper"] == {"finetune": 0.849, "probe": 0.735} and found["rows"][0]["paper"] == {}
    pairs = found["ordering"]["probe"]
    assert [(pair["better"], pair["worse"]) for pair in pairs] == []  # 60 and 70 were left out
    assert json.loads((out / "ablation.json").read_text()) == found
    with Image.open(out / "ablation.png") as drawn:
        assert drawn.size[0] > 500
    shutil.copytree(out, tmp_path / "anew", symlinks=True)
    ablation_report(tmp_path / "anew", {**found, "rows": [{**row, "scores": {}} for row in found["rows"]]})
    assert not (tmp_path / "anew/ablation.png").exists()  # as the page, which has no figure then
    page, text = (out / "ablation.html").read_text(), (out / "ablation.md").read_text()
    assert "<svg" in page and "paper Fig. 5" in page and "| 75 |" in text and "shared the CPU" not in text
    assert [row[:2] for row in scores(out)] == [[r, m] for r in ("50", "75") for m in ("finetune", "probe")]
    assert (out / "config.yaml").exists() and "run 6 of 6" in done.stderr


@pytest.mark.slow
def test_what_is_there_is_not_run_again_and_a_table_grows(maekit: Run, classes: Path, seeds: Any) -> None:
    place, done = seeds
    before = finished(place)
    again = maekit(*words(classes, place, "--seeds", 2))
    assert again.code == 0 and again.json == done.json and "are there already" in again.stderr
    # the default row of another table is the same run: only its other row is pre-trained
    other = words(classes, place, out="other")
    other[1] = "table1c"
    del other[other.index("--rows") : other.index("--rows") + 2]
    grown = maekit(*other)
    assert grown.code == 0, grown.stderr
    assert [row["name"] for row in grown.json["rows"]] == ["with", "without"]
    assert grown.json["rows"][1]["scores"]["probe"]["0"] == done.json["rows"][1]["scores"]["probe"]["0"]
    now = finished(place)
    assert len(now) == 15 and {path: now[path] for path in before} == before
    assert grown.json["ordering"]["probe"][0]["verdict"].endswith("one seed")


@pytest.mark.slow
def test_runs_of_images_that_have_changed_count_no_more_and_that_is_said(
    maekit: Run, classes: Path, tmp_path: Path
) -> None:
    line = words(classes, tmp_path, "--seeds", 1, "--rows", "75")
    assert maekit(*line).code == 0
    image = next(classes.rglob("*.png"))
    told = image.stat()
    os.utime(image, (told.st_atime, told.st_mtime + 60))
    again = maekit(*line)
    os.utime(image, ns=(told.st_atime_ns, told.st_mtime_ns))
    assert again.code == 0 and "3 finished runs no longer count" in again.stderr
    assert len(finished(tmp_path)) == 6


@pytest.mark.slow
def test_a_table_that_was_killed_goes_on_and_is_the_same(
    background: Run, maekit: Run, classes: Path, seeds: Any, tmp_path: Path, until: Run
) -> None:
    line = words(classes, tmp_path, "--seeds", 2)
    begun = background(*line)
    until(lambda: len([*(tmp_path / "ablate-parts").glob("pretrain-*/checkpoints/*")]) > 4)
    begun.send(signal.SIGKILL)
    assert begun.wait().code == -signal.SIGKILL
    assert 0 < len(finished(tmp_path)) < 12
    done = maekit(*line)
    assert done.code == 0, done.stderr
    assert scores(tmp_path / "table") == scores(seeds[0] / "table")


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_stop_leaves_75_and_what_is_done(
    background: Run, maekit: Run, classes: Path, tmp_path: Path, until: Run, storm: Run, jobs: int
) -> None:
    """Also where signals go on coming while the parts save and the table is written."""
    begun = background(*words(classes, tmp_path, "--jobs", jobs))
    until(lambda: any((tmp_path / "ablate-parts").glob("pretrain-*/checkpoints/*")))
    storm(begun, signal.SIGTERM)
    assert begun.wait().code == 75, begun.stderr
    assert "the same command goes on" in begun.stderr and begun.json["done"] < 6
    changed = maekit(*words(classes, tmp_path, "--label-seed", 3))
    assert changed.code == 2 and "E-CONFIG-RUN" in changed.stderr and "label_seed 0 -> 3" in changed.stderr


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(maekit: Run, classes: Path, tmp_path: Path) -> None:
    line = words(classes, tmp_path, "--dry-run", "--rows", "pca,token", "--seeds", 2)
    line[1] = "table1d"
    found = maekit(*line)
    assert found.code == 0, found.stderr
    assert not any(tmp_path.iterdir())
    plain = found.json
    assert plain["uncounted"] == ["pca", "tokenizer"]  # fitted once for both seeds
    assert plain["runs"] == 2 * 2 * 3 + 2 and plain["flops"] > 0 and plain["seconds"] > 0 and plain["disk_mib"] > 0


def test_a_dry_run_counts_only_the_blocks_that_are_trained(maekit: Run, classes: Path, tmp_path: Path) -> None:
    line = words(classes, tmp_path, "--dry-run", "--rows", "0,0.5,24", "--seeds", 1)
    line[1] = "fig9"
    found = maekit(*line)
    assert found.code == 0, found.stderr
    none, half, whole = (row["flops"] for row in found.json["rows"])
    assert none < half < whole
    line[line.index("--dry-run")] = "--slurm=a=b"
    assert "E-CONFIG-IDLE" in maekit(*line, "--dry-run").stderr


@pytest.mark.slow
def test_runs_beside_one_another_find_the_same(fresh: Run, classes: Path, table: Any, tmp_path: Path) -> None:
    done = fresh(*words(classes, tmp_path, "--jobs", 2))
    assert done.returncode == 0, done.stderr
    found, expected = json.loads(done.stdout.splitlines()[-1]), table[1].json
    assert "Up to 2 runs at a time shared the CPU" in (tmp_path / "table" / "ablation.md").read_text()
    for one, other in zip(found["rows"], expected["rows"], strict=True):
        assert one["scores"]["finetune"]["0"] == other["scores"]["finetune"]["0"]
        assert one["memory_mib"] and one["images_per_second"]


@pytest.mark.slow
def test_jobs_of_submitit_find_the_same(fresh: Run, classes: Path, table: Any, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    more = ("--jobs", "slurm", "--slurm", "cluster=local", "timeout_min=10", "--rows", "75")
    done = fresh(*words(classes, tmp_path, *more))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["rows"][0]["scores"]["probe"]["0"] == table[1].json["rows"][1]["scores"]["probe"]["0"]


def test_speed_ups_are_relative_to_the_papers_row() -> None:
    """Paper, Table 2: 2.8 and 3.7 times faster than ViT-L with mask tokens in the encoder, 3.5 and 4.1 than ViT-H."""
    known: dict[str, Any] = {"label": "", "scores": {}, "with_setup": False, "memory_mib": None}
    rows: list[dict[str, Any]] = [
        known | {"name": row.name, "reference": row.reference, "paper": row.paper, "seconds": 10.0 * row.paper["hours"],
                 "gflops_per_image": 1.0, "images_per_second": 1.0}
        for row in TABLES["table2-wallclock"].rows
    ]  # fmt: skip
    for row in rows:
        row |= _speed_ups(row, next(other for other in rows if other["name"] == row["reference"]))
    headers, cells = scores_table({"measures": [], "rows": rows})
    assert [line[headers.index("speed-up (paper)")] for line in cells] == ["1.0", "2.8", "3.7", "1.0", "3.5", "4.1"]
    assert [line[headers.index("speed-up")] for line in cells] == ["1.00", "2.75", "3.66", "1.00", "3.47", "4.08"]
    assert _speed_ups(rows[1], None) == {"speed_up": None, "speed_up_paper": None}  # the row was left out
    assert _speed_ups(rows[1] | {"with_setup": True}, rows[0])["speed_up"] is None
    assert not any(row.reference for name, table in TABLES.items() if name != "table2-wallclock" for row in table.rows)


# -------------------------------------------------------------------------------------------------- refused


def test_a_word_names_a_table_by_its_beginning() -> None:
    assert table_of("fig5").name == "fig5-mask-ratio" and table_of("table1d").name == "table1d-target"
    for word, said in (
        ("table1", "the beginning of table1a-decoder-depth"), ("fig5-mask-ration", "did you mean 'fig5-mask-ratio'"),
        ("nothing", "one of table1a"), ("table-transfer", "data set of its own"),
        ("table-robustness", "scores classif"),
        (None, "no table named"),
    ):  # fmt: skip
        with pytest.raises(MaekitError, match=said) as caught:
            table_of(word)
        assert caught.value.code == "E-CONFIG-TABLE"


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        ({"rows": "74"}, "E-CONFIG-ROW", "row '74' of fig5"),
        ({"table": "table3", "rows": "beit-b"}, "E-CONFIG-ROW", "another method"),
        ({"table": "fig9", "rows": "18"}, "E-CONFIG-ROW", "has 4 blocks"),
        ({"table": "table1f", "rows": "grid-75", "pretrain": ["patch_size=4"]}, "E-CONFIG-ROW", "grid"),
        ({"pretrain": ["steps"]}, "E-USAGE-WORD", "NAME=VALUE"),
        ({"pretrain": ["stepps=3"]}, "E-CONFIG-KEY", "did you mean 'steps'"),
        ({"pretrain": ["seed=3"]}, "E-CONFIG-BOTH", "settings of the training alone"),
        ({"pretrain": ["mask_ratio=.3"]}, "E-CONFIG-BOTH", "the rows of fig5-mask-ratio decide"),
        ({"finetune": ["epochs=-1"]}, "E-CONFIG-VALUE", "epochs"),
        ({"slurm": ["a=b"]}, "E-CONFIG-IDLE", "slurm"),
        ({"data": None}, "E-USAGE-DATA", "no labelled images"),
        ({"labels": "1000/class"}, "E-DATA-LABELS", "label"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(
    classes: Path, tmp_path: Path, more: dict[str, Any], code: str, said: str
) -> None:
    given = {"table": "fig5", "data": str(classes), "out": tmp_path / "table", "device": "cpu", **more}
    with pytest.raises(MaekitError, match=said) as caught:
        package.ablate({name: value for name, value in given.items() if value is not None})
    assert caught.value.code in (code, "E-USAGE-LABELS") and not any(tmp_path.iterdir())


def test_slurm_without_submitit_is_refused(classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(MaekitError, match="submitit is not installed") as caught:
        package.ablate({"table": "fig5", "data": str(classes), "out": tmp_path / "t", "jobs": "slurm", "device": "cpu"})
    assert caught.value.code == "E-ENV-IMPORT" and not any(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------- parts


def part(place: Path, *needs: Part, **changes: Any) -> Part:
    return make_part("knn", Ablate, {"table": "fig5", **changes}, place, ["images"], tuple(needs))


def test_equal_parts_have_one_folder_and_what_decides_makes_another(tmp_path: Path) -> None:
    first = part(tmp_path)
    assert part(tmp_path, jobs=4).folder == first.folder  # how it is run decides nothing
    others = {part(tmp_path, seed=1).folder, part(tmp_path, first).folder, part(tmp_path, scale="small").folder}
    assert len(others | {first.folder}) == 4


class Ended:
    """A handle that has ended with a code."""

    def __init__(self, outcome: int) -> None:
        self.outcome = outcome

    def code(self) -> int:
        return self.outcome

    def told(self) -> str:
        return "it broke"

    def stop(self) -> None:
        return None


def test_a_failure_stops_only_what_rests_on_it_and_a_busy_folder_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doing, "BUSY_WAIT", 0.01)
    monkeypatch.setattr(doing, "WAIT", 0.001)
    bad, good = part(tmp_path, seed=1), part(tmp_path, seed=2)
    on_bad, on_good = part(tmp_path, bad), part(tmp_path, good)
    started: list[Part] = []

    def start(one: Part, _: int) -> Ended:
        started.append(one)
        if one is bad:
            return Ended(4)
        if one is good and started.count(good) == 1:
            return Ended(doing.BUSY)
        one.folder.mkdir()
        (one.folder / "result.json").write_text("{}")
        return Ended(0)

    done: list[Part] = []
    outcome = work_off([bad, good, on_bad, on_good], start, 1, said=lambda *_: None, done=done.append)
    assert started == [bad, good, good, on_good] and done == [good, on_good] and not outcome.stopped
    assert outcome.failed[bad.folder.name] == "it broke" and "failed: it broke" in outcome.failed[on_bad.folder.name]


@pytest.mark.parametrize("fault", [RuntimeError("out of memory\nof the device"), OSError("no space")])
def test_any_exception_is_the_failure_of_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: Exception
) -> None:
    raised: list[BaseException] = [fault, KeyboardInterrupt()]

    def knn(_: Any) -> None:
        raise raised.pop(0)

    monkeypatch.setattr(importlib.import_module("maekit.tasks.knn"), "knn", knn)
    caplog.set_level("DEBUG", "maekit")
    parts = [part(tmp_path, seed=1), part(tmp_path, seed=2), part(tmp_path, seed=3)]
    outcome = work_off(parts, doing.in_this_process, 1, said=lambda *_: None, done=lambda _: None)
    told = f"{type(fault).__name__}: {clean(fault)}"
    assert outcome.failed == {parts[0].folder.name: told} and outcome.stopped and not raised
    (line,) = (record.message for record in caplog.records if record.levelname == "ERROR")
    assert line.endswith(f"failed: {told}")
    assert any(record.exc_info for record in caplog.records if record.levelname == "DEBUG")


def test_a_run_beside_others_ends_with_what_started_it(classes: Path, tmp_path: Path) -> None:
    values = {"data": str(classes), "device": "cpu", "workers": 0, "steps": 10**6, "img_size": (32, 32)}
    values |= {"model": "vit_tiny_patch16_224", "batch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    endless = make_part("pretrain", Pretrain, values, tmp_path, [])
    handle = doing.beside(2)(endless, 0)
    assert isinstance(handle, doing._Process) and handle.process.stdin is not None
    handle.process.stdin.close()  # as the end of this process would
    assert handle.process.wait(timeout=120) == doing.BROKEN
    assert not endless.folder.with_name(f"{endless.folder.name}.error").exists()  # and not of a fault


def test_a_failed_run_is_told_and_the_table_is_not_finished(maekit: Run, classes: Path, tmp_path: Path) -> None:
    more = words(classes, tmp_path, "--rows", "75")
    more.insert(more.index("--finetune"), "lr=1e30")
    done = maekit(*more)
    assert done.code == 1 and "failed" in done.stderr
    assert done.json["rows"][0]["faults"] and not (tmp_path / "table" / "result.json").exists()
    assert "75 failed, seed 0" in (tmp_path / "table" / "ablation.md").read_text()
    assert os.path.islink(tmp_path / "table" / "rows" / "75" / "seed-0" / "pretrain")
