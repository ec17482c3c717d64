"""Each kind of fault, some trials of each; and what breaks a promise is noticed, told, and can be done again."""

import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from maekit.errors import MaekitError
from maekit.settings import Soak
from maekit.soak.bench import Bench, copied, make
from maekit.soak.children import Command, Lost
from maekit.soak.storage import SAVING, flip, refused
from maekit.tasks.soak import KINDS, soak
from maekit.train import checkpoint
from maekit.zygote import Refusal

PLACES = {
    "saver-write": 4,
    "checkpoint-opened": -1,  # the second of the files of the first save
    "checkpoint-written": -1,
    "checkpoint-synced": 4,
    "checkpoint-renamed": 8,
    "checkpoint-saved": 8,
    "checkpoint-pruned": 16,  # two are kept: the first goes at step 12, the second at 16
}
"""Places of a save, and the newest checkpoint after a kill at the second time that each is reached."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    made = make(tmp_path_factory.mktemp("soak"), seed=0)
    yield made
    made.children.close()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_of_every_kind_changes_no_bit(bench: Bench, kind: str, number: int, tmp_path: Path) -> None:
    KINDS[kind][0](bench, tmp_path / "run", Random(number))


@pytest.mark.slow
@pytest.mark.parametrize(("place", "left"), PLACES.items())
def test_a_kill_at_every_place_of_a_save_leaves_the_step_or_the_one_before(
    bench: Bench, place: str, left: int, tmp_path: Path
) -> None:
    """F2: at the second time that each place is reached, of saves at steps 4, 8, 12, ..."""
    words = ["--save-every", "4", "--keep", "2", "--workers", "0"]
    died = bench.faulty(tmp_path / "run", f"{place}:kill@2", *words).wait()
    assert died.code == -9, died.stderr
    assert bench.check_verified(tmp_path / "run") == left
    bench.finish(tmp_path / "run", "--workers", "0")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(6))
def test_any_write_of_a_run_may_be_refused(bench: Bench, number: int, tmp_path: Path) -> None:
    """F3, F4: of config, lock, metrics, events, report too, once or from then on."""
    refused(bench, tmp_path / "run", Random(number))


@pytest.mark.slow
def test_a_broken_promise_is_noticed(bench: Bench, tmp_path: Path) -> None:
    other = replace(bench, digest="0" * 64)
    other.template = bench.template
    with pytest.raises(Lost, match="other bits at the end"):
        flip(other, tmp_path / "bits", Random(0))
    run = copied(bench, tmp_path / "run")
    (checkpoint.steps(run / "checkpoints")[0] / "state.json").write_text("{}")
    with pytest.raises(Lost, match="step-18 does not verify"):
        bench.check_verified(run)
    (run / ".tmp-left").write_text("")
    done = bench.children.start("ckpt", "list", run).wait()
    with pytest.raises(Lost, match=r"left behind: \.tmp-left"):
        bench.check_tidy(run, done)


@pytest.mark.slow
def test_what_is_left_of_a_lost_trial_says_what_was_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(bench: Bench, run: Path, _: Random) -> int:
        bench.command(run, "--workers", "0").wait()
        raise Lost("a promise")

    monkeypatch.setitem(KINDS, "clock", (lose, 1))
    found = soak({"trial": 3, "kinds": "clock", "out": tmp_path})
    assert found.exit_code == 1
    assert (tmp_path / "trial-3" / "config.yaml").exists()
    (said,) = (tmp_path / "trial-3" / "said").iterdir()
    assert "24 steps" in (said / "stderr").read_text()


@pytest.mark.slow
def test_a_command_that_hangs_is_killed_with_its_group_and_counts_as_lost(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = bench.children.limit
    assert limit is not None and 120 < limit < 120 + 20 * 60
    monkeypatch.setattr(bench.children, "limit", 8.0)
    hung = bench.faulty(tmp_path / "run", "numbers-loss:hang@3", "--workers", "2")
    with pytest.raises(Lost, match=r"hung at '.+': not over after 8 s"):
        hung.wait()
    assert hung.group_is_gone(10) and not bench.children.running


@pytest.mark.slow
def test_what_a_trial_did_not_expect_is_lost_and_ctrl_c_tells_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[Command] = []

    def strange(bench: Bench, run: Path, _: Random) -> int:
        if commands:
            raise KeyboardInterrupt
        commands.append(bench.faulty(run, "numbers-loss:hang", "--workers", "0"))
        return len("it said"[99:].splitlines()[-1])

    monkeypatch.setitem(KINDS, "clock", (strange, 1))
    found = soak({"kinds": "clock", "minutes": 9})
    assert found.exit_code == 130 and found.metrics["trials"] == 2
    assert found.metrics["lost"] == [{"trial": 0, "kind": "clock", "what": "IndexError: list index out of range"}]
    assert "IndexError: list index out of range\n  again: maekit soak --seed 0 --trial 0 --kinds clock" in found.text
    assert commands[0].group_is_gone(10)


@pytest.mark.slow
def test_the_command_draws_the_same_trial_again() -> None:
    """Of damage to the disk: how many steps a kill at some moment costs is the clock's."""
    found = [soak({"seed": 3, "trial": 7, "minutes": 1, "kinds": "flip,truncate,missing,swapped"}) for _ in range(2)]
    assert found[0].metrics == found[1].metrics and found[0].metrics["trials"] == 1 and found[0].exit_code == 0


def test_a_refusal_counts_the_writes_into_its_folder_and_no_others() -> None:
    writing, reading = os.O_WRONLY | os.O_CREAT, os.O_RDONLY
    refusal = Refusal("/run/", errno.ENOSPC, first=3, ever=False)
    refusal("open", ("/run/a", "w", writing))
    for event, told in (
        ("open", ("/run/a", "r", reading)), ("open", ("/elsewhere", "w", writing)), ("open", (7, "w", writing)),
        ("compile", ("/run/a",)), ("os.listdir", ("/run/a",)),
    ):  # fmt: skip
        refusal(event, told)
    refusal("os.mkdir", (b"/run/b", 511, -1))
    with pytest.raises(OSError, match=r"No space left.*/run/b"):
        refusal("os.rename", ("/run/b", "/run/c", -1, -1))
    refusal("os.remove", ("/run/b", -1))
    refusal.ever = True
    with pytest.raises(OSError, match="No space left"):
        refusal("os.remove", ("/run/b", -1))


def test_each_place_of_a_save_is_tried() -> None:
    assert set(PLACES) == set(SAVING)


def test_the_help_names_the_kinds_there_are() -> None:
    assert sorted(str(Soak.model_fields["kinds"].description).split(",")) == sorted(KINDS)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(MaekitError, match=r"E-USAGE-KIND.*earthquake"):
        soak({"kinds": "earthquake"})
