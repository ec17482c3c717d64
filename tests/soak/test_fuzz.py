"""The fuzzer: mutants can be made again, a worker dies and hangs without loss, what is read is fine or refused."""

from pathlib import Path
from typing import Any

import pytest

from maekit.errors import MaekitError
from maekit.failpoints import VARIABLE
from maekit.soak import fuzz as engine
from maekit.soak.fuzz import Finding, fuzz, keep, mutant, read_one
from maekit.soak.originals import KINDS, Original

ORIGINALS: dict[str, list[Original]] = {}


def originals(kind: str) -> list[Original]:
    if kind not in ORIGINALS:
        ORIGINALS[kind] = KINDS[kind][0]()
    return ORIGINALS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_every_original_is_read_before_it_is_hurt(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [one.name for one in originals(kind)]
    assert len(set(names)) == len(names)
    for one in originals(kind):
        place = tmp_path / str(names.index(one.name))
        place.mkdir()
        if one.name == "payload":  # T1
            with pytest.raises(MaekitError, match=r"E-CKPT-PICKLE.*mkdir"):
                one.read(one.finish(one.data), place)
        else:
            one.read(one.finish(one.data), place)
    assert not (tmp_path / engine.SENTINEL).exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_mutant_is_a_function_of_seed_kind_and_number(kind: str) -> None:
    once = [mutant(kind, 3, number, originals(kind))[1] for number in range(20)]
    assert once == [mutant(kind, 3, number, originals(kind))[1] for number in range(20)]
    assert mutant(kind, 3, 7)[1] == once[7]  # of originals made anew
    assert once != [mutant(kind, 4, number, originals(kind))[1] for number in range(20)]
    assert len(set(once)) > 15


@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_mutants_of_each_kind_are_read_or_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = [read_one(kind, 11, number, tmp_path, originals(kind)) for number in range(100)]
    assert not [str(one) for one in found if isinstance(one, Finding)]
    assert "refused" in found


def test_a_worker_reads_what_this_process_reads(tmp_path: Path) -> None:
    tally = fuzz(["config"], 5, mutants=30, folder=tmp_path / "found")["config"]
    here = [read_one("config", 5, number, tmp_path, originals("config")) for number in range(30)]
    assert (tally.fine, tally.refused, tally.bad) == (here.count("fine"), here.count("refused"), [])
    assert tally.tried == 30 and not (tmp_path / "found").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("action", "outcome"), [("segv", "crash"), ("kill", "crash"), ("hang", "hang")])
def test_a_worker_that_dies_or_hangs_names_its_mutant_and_another_goes_on(
    action: str, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, f"fuzz-mutant:{action}@4")
    monkeypatch.setattr(engine, "SECONDS", 2.0)
    tally = fuzz(["config"], 5, mutants=6, folder=tmp_path)["config"]
    assert [(one.number, one.outcome) for one in tally.bad] == [(3, outcome)]
    assert tally.tried == 6
    assert (tmp_path / "config-5-3.bin").read_bytes() == mutant("config", 5, 3)[1]


def test_a_finding_is_kept_with_what_makes_it_again(tmp_path: Path) -> None:
    found = Finding("decode", 1, 2, "png", "error", "KeyError")
    assert keep(found, tmp_path).read_bytes() == mutant("decode", 1, 2)[1]
    assert '"number": 2' in (tmp_path / "decode-1-2.json").read_text()
    assert str(found) == "decode seed 1 number 2 (png): error: KeyError"


@pytest.mark.parametrize(("kinds", "options"), [(["tar"], {"mutants": 1}), (["config"], {})])
def test_an_unknown_kind_and_no_end_are_refused(kinds: list[str], options: dict[str, Any]) -> None:
    with pytest.raises(MaekitError, match="E-USAGE-FUZZ"):
        fuzz(kinds, **options)


@pytest.mark.slow
def test_thousands_of_mutants_are_read_or_refused(tmp_path: Path) -> None:
    tallies = fuzz(seed=20, mutants=2000, folder=tmp_path)
    assert not [str(one) for tally in tallies.values() for one in tally.bad]
    assert all(tally.tried == 2000 and tally.refused for tally in tallies.values())
