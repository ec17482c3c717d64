"""The writer beside training: what it copies, what its failures come to, and that a run never ends before it has."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from maekit import failpoints
from maekit.errors import MaekitError
from maekit.train import checkpoint
from maekit.train.checkpoint import newest, number, sound, steps
from maekit.train.saver import Saver


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((5, 2), value), "b": torch.zeros(2)}}


@pytest.fixture
def fault() -> Iterator[Any]:
    """``fault("checkpoint-opened:enospc")`` makes it happen from then on in this process."""
    yield failpoints.arm
    failpoints.arm("")


def test_what_is_saved_is_the_state_at_the_call_whatever_becomes_of_it(tmp_path: Path) -> None:
    live = tensors(1.0)
    with Saver(tmp_path, {}, keep=9) as saver:
        for step in (1, 2, 3):
            live["model"]["w"].fill_(step)
            saver.save(step, live, {})
            live["model"]["w"].fill_(-1)
    for path, step in zip(steps(tmp_path), (3, 2, 1), strict=True):
        found = newest(path.parent) if step == 3 else None
        assert path.name == f"step-{step}" and (found is None or bool((found.tensors["model"]["w"] == 3).all()))


def test_the_memory_of_the_copy_is_used_again(tmp_path: Path) -> None:
    with Saver(tmp_path, {}, keep=1) as saver:
        saver.save(1, tensors(1), {})
        place = saver.copy["model"]["w"].data_ptr()
        saver.save(2, tensors(2), {})
        assert saver.copy["model"]["w"].data_ptr() == place
        saver.save(3, {"model": {"w": torch.zeros(7)}}, {})  # of another shape
    found = newest(tmp_path)
    assert found is not None and found.tensors["model"]["w"].shape == (7,)


@pytest.mark.parametrize("policy", ["stop", "keep-going"])
def test_a_disk_that_fails_stops_the_run_or_costs_one_checkpoint(
    tmp_path: Path, fault: Any, policy: Literal["stop", "keep-going"], caplog: pytest.LogCaptureFixture
) -> None:
    """F3, F7."""
    with Saver(tmp_path, {}, keep=9, errors=policy) as saver:
        saver.save(1, tensors(1), {})
        saver.wait()
        fault("checkpoint-opened:enospc")
        saver.save(2, tensors(2), {})
        if policy == "stop":
            with pytest.raises(MaekitError, match=r"E-STOP-DISK.*the disk is full.*step-1"):
                saver.wait()
        else:
            saver.wait()
            assert "training goes on" in caplog.text
        saver.save(3, tensors(3), {})
    assert [path.name for path in steps(tmp_path)] == ["step-3", "step-1"]
    assert not list(tmp_path.glob(".tmp-*"))


def test_the_last_checkpoint_must_be_there_whatever_the_policy(tmp_path: Path, fault: Any) -> None:
    fault("checkpoint-written:edquot@1+")
    with (
        pytest.raises(MaekitError, match=r"E-ENV-DISK.*quota"),
        Saver(tmp_path, {}, keep=1, errors="keep-going") as saver,
    ):
        saver.save(1, tensors(1), {})


def test_its_failure_does_not_hide_what_ended_the_run(tmp_path: Path, fault: Any, caplog: Any) -> None:
    fault("checkpoint-opened:erofs")
    with pytest.raises(KeyError, match="the reason"), Saver(tmp_path, {}, keep=1) as saver:
        saver.save(1, tensors(1), {})
        raise KeyError("the reason")
    assert "read-only" in caplog.text


@pytest.mark.parametrize("kind", ["eio", "estale", "emfile"])
def test_errors_that_pass_are_tried_again(tmp_path: Path, fault: Any, kind: str, caplog: Any) -> None:
    """F4."""
    fault(f"checkpoint-written:{kind}@2")
    with Saver(tmp_path, {}, keep=1) as saver:
        saver.save(1, tensors(1), {})
    assert newest(tmp_path) is not None and "once more" in caplog.text
    assert os.strerror(getattr(errno, kind.upper())) in caplog.text and not list(tmp_path.glob(".tmp-*"))


def test_what_is_read_back_otherwise_than_written_is_not_kept(tmp_path: Path, fault: Any) -> None:
    fault("checkpoint-read-back:on@1+")
    with (
        pytest.raises(MaekitError, match="what was read back is not what was written"),
        Saver(tmp_path, {}, keep=1) as s,
    ):
        s.save(1, tensors(1), {})
    assert steps(tmp_path) == []


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    """F36; whatever the policy says of disks."""
    with Saver(tmp_path, {}, keep=9, errors="keep-going") as saver:
        saver.save(1, tensors(1), {})
        saver.save(2, tensors(float("nan")), {})
        with pytest.raises(MaekitError, match=r"E-NUM-WEIGHTS.*after step 2"):
            saver.wait()
    assert [path.name for path in steps(tmp_path)] == ["step-1"]


def test_multiples_stay(tmp_path: Path) -> None:
    with Saver(tmp_path, {}, keep=2, keep_every=4) as saver:
        for step in range(1, 11):
            saver.save(step, tensors(step), {})
    assert [path.name for path in steps(tmp_path)] == ["step-10", "step-9", "step-8", "step-4"]


@pytest.mark.parametrize("keep", [1, 2])
def test_at_no_moment_is_there_less_than_one_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    """F8: whenever one is about to go, a newer one is there and verifies; also with a damaged one in between."""
    real, others = checkpoint.delete, []

    def watched(path: Path) -> None:
        others.append([number(one) for one in steps(tmp_path) if one != path and sound(one)])
        real(path)

    monkeypatch.setattr(checkpoint, "delete", watched)
    with Saver(tmp_path, {}, keep=keep) as saver:
        for step in range(1, 8):
            saver.save(step, tensors(step), {})
    assert len(others) == 7 - keep and all(max(left) == at for at, left in enumerate(others, keep + 1))


def test_a_process_does_not_end_before_its_checkpoint_is_written(tmp_path: Path) -> None:
    """F7: also where the program forgets to wait."""
    program = (
        "import sys, torch, json; from pathlib import Path; from maekit.train.saver import Saver\n"
        "saver = Saver(Path(sys.argv[1]), {}, keep=1)\n"
        "saver.save(4, {'model': {'w': torch.ones(2_000_000)}}, {})\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120)
    found = newest(tmp_path)
    assert done.returncode == 0 and found is not None and found.step == 4, done.stderr
    assert json.loads((found.path / "manifest.json").read_text())["step"] == 4
