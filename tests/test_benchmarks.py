"""`make bench`: the tables of docs/benchmarks.md are its records; a new one takes the place of its like only."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def script() -> Any:
    spec = importlib.util.spec_from_file_location("benchmarks_script", DOCS.parent / "scripts/benchmarks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BENCHMARKS = script()


def record(name: str, device: str, images: float) -> dict[str, Any]:
    found = {
        "threads": 1, "torch": "2.14.1", "batch_size": 8, "precision": "fp32", "rounds": 3, "images_per_second": images,
        "peer_images_per_second": {"transformers": images / 2}, "versions": {"transformers": "5.24.0"},
        "flops_per_second": 5e10, "peak_flops": 1e11, "mfu": 0.5, **{key: {"transformers": 2.0} for key in RATIOS},
    }  # fmt: skip
    return {"name": name, "device": device, "date": "2026-01-02", "load": 0.5, "note": "", "found": found}


RATIOS = ("ratio", "ratio_min", "ratio_max")


def test_the_tables_of_the_page_are_those_of_the_records() -> None:
    text, records = (DOCS / "benchmarks.md").read_text("utf-8"), BENCHMARKS.read(DOCS)
    assert text == BENCHMARKS.page(text, records), "python scripts/benchmarks.py --render"
    assert len({(one["name"], one["device"]) for one in records}) == len(records)
    assert {one["name"] for one in records} <= set(BENCHMARKS.NAMES)
    assert all(set(one) == {"name", "device", "date", "load", "note", "found"} for one in records)


def test_each_device_has_its_own_table_under_what_it_belongs_to() -> None:
    records = [record("train-quickstart-fp32", "one", 1234), record("train-quickstart-bf16", "one", 2468)]
    shown = BENCHMARKS.tables("train", [*records, record("train-vit-b", "two", 2.345)])
    assert shown.count("| size |") == 2
    assert "one, 1 thread, PyTorch 2.14.1, transformers 5.24.0, 2026-01-02, load 0.5." in shown
    assert "fp32 | 8 | 3 | 2.3 | transformers | 1.2 | 2.00 (2.00 to 2.00) | 50 of 100 | 50 % |" in shown
    assert BENCHMARKS.tables("data", records) == BENCHMARKS.tables("kinds", records) == "Not measured yet."


def test_kinds_of_operations_are_shown_for_the_measurements_that_tell_them() -> None:
    records = [record(f"train-quickstart-{precision}", "one", 1) for precision in ("fp32", "bf16")]
    records[0]["found"]["kinds"] = {"attention": 0.25, "norms": 0.75}
    shown = BENCHMARKS.tables("kinds", records)
    assert "| step | attention | norms |" in shown and "ratio .6), fp32 | 25 % | 75 % |" in shown
    assert shown.count("quickstart") == 1
    records[1]["found"] |= {"precision": "bf16", "kinds": {"attention": 0.5, "other": 0.5}}
    assert "bf16 | 50 % | - | 50 % |" in BENCHMARKS.tables("kinds", records)


def test_what_is_computed_anew_is_shown_beside_what_is_kept() -> None:
    found = {
        "precision": "bf16", "batch_size": 32, "mib": {"maekit": 200.0, "maekit --checkpointing": 150.0},
        "seconds": {"maekit": 2.0, "maekit --checkpointing": 2.5},
    }  # fmt: skip
    one = {"name": "anew-vit-b-2-2", "device": "one", "date": "2026-01-02", "load": None, "note": "", "found": found}
    assert "| bf16 | 32 | --checkpointing | 150 | 0.75 | 2.5 | 1.25 |" in BENCHMARKS.tables("anew", [one])


def test_a_renewed_record_goes_in_place_of_that_of_its_device_alone() -> None:
    old = [record("train-quickstart-fp32", device, 1) for device in ("one", "two")]
    old.append(record("train-vit-b", "one", 1))
    new = record("train-quickstart-fp32", "two", 9)
    assert BENCHMARKS.renewed(old, new) == [old[0], old[2], new]
    assert len(BENCHMARKS.renewed(old, record("train-quickstart-fp32", "three", 9))) == 4


@pytest.mark.parametrize(("only", "device"), [("trains", "cpu"), ("train,vit-b", "cpu"), ("memory", "cuda")])
def test_an_unknown_name_is_refused_with_the_names(only: str, device: str) -> None:
    with pytest.raises(SystemExit, match=f"{only.split(',')[-1]}.*train-vit-b"):
        BENCHMARKS.chosen(only, device)


def test_names_and_their_first_words_choose() -> None:
    names = [one.name for one in BENCHMARKS.chosen("train-vit-s,memory", "cpu")]
    assert names == ["train-vit-s-fp32", "train-vit-s-bf16", "memory-quickstart", "memory-vit-b"]
    assert {one.device for one in BENCHMARKS.chosen(None, "cuda")} == {"cuda"}


@pytest.mark.slow
def test_what_is_measured_is_kept_and_shown_and_what_fails_leaves_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = (
        "--model vit_tiny_patch16_224 --img-size 32 --embed-dim 32 --depth 1 --num-heads 2 --decoder-dim 16 "
        "--decoder-depth 1 --decoder-heads 2 --batch-size 4"
    )
    own = [
        BENCHMARKS.Measurement("masks-vit-b", "tiny", f"mask {tiny} --rounds 1"),
        BENCHMARKS.Measurement("memory-vit-b", "no such peer", f"train {tiny} --vs nobody"),
        BENCHMARKS.Measurement("decode-photos", "photographs", "decode --data {photos}"),
    ]
    monkeypatch.setattr(BENCHMARKS, "MEASUREMENTS", own)
    monkeypatch.setattr(BENCHMARKS, "NAMES", [one.name for one in own])
    old = [record("masks-vit-b", "another", 1) | {"found": {"precision": "fp32", "step_seconds": 1, "seconds": {}}}]
    old.append(record("memory-vit-b", "another", 1) | {"found": {"mib": {}}})
    (tmp_path / "benchmarks.jsonl").write_text("".join(json.dumps(one) + "\n" for one in old))
    shutil.copy(DOCS / "benchmarks.md", tmp_path)
    assert BENCHMARKS.main(["--docs", str(tmp_path)]) == 0
    kept = BENCHMARKS.read(tmp_path)
    assert [one for one in kept if one["device"] == "another"] == old and len(kept) == 3
    text = (tmp_path / "benchmarks.md").read_text()
    assert text == BENCHMARKS.page(text, kept) and "| tiny, fp32: " in text
    told = capsys.readouterr().err
    assert (
        "memory-vit-b: maekit: error[E-CONFIG-PEER]: setting vs: found nobody" in told
        and "decode-photos: left out, no --photos" in told
    )
