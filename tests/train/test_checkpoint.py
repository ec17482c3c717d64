"""A checkpoint verifies or is not there."""

import errno
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from maekit import failpoints
from maekit.errors import MaekitError
from maekit.train import checkpoint
from maekit.train.checkpoint import delete_leftovers, load, newest, save, state_sha256

META = {"maekit": "{}"}


def tensors(value: float = 1.0) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "model": {"w": torch.full((3, 2), value), "b": torch.zeros(2)},
        "optimizer": {"w/exp_avg": torch.full((3, 2), value)},
    }


def write(folder: Path, step: int, keep: int = 9) -> Path:
    return save(folder, step, tensors(step), {"window": [0.5]}, metadata=META, keep=keep)


def signed(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return it with the sum that vouches for what it says now."""
    facts = {name: value for name, value in manifest.items() if name != "sha256"}
    return {**facts, "sha256": hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()}


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = write(tmp_path, 7)
    found = load(path)
    assert found.step == 7
    assert found.state["window"] == [0.5]
    for part, named in tensors(7).items():
        for name, value in named.items():
            assert torch.equal(found.tensors[part][name], value)


@pytest.mark.parametrize("metadata", [{}, META])
def test_an_optimizer_without_a_state_comes_back_too(tmp_path: Path, metadata: dict[str, str]) -> None:
    path = save(tmp_path, 1, {**tensors(), "optimizer": {}}, {"window": []}, metadata=metadata, keep=1)
    assert load(path).tensors["optimizer"] == {}


def test_files_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        path = write(tmp_path, 1)
    finally:
        os.umask(old)
    assert {oct(f.stat().st_mode & 0o777) for f in path.iterdir()} == {"0o644"}


def test_newest_is_the_highest_step_not_the_latest_file(tmp_path: Path) -> None:
    """F11: no time of a file says what is newest."""
    for step in (9, 20, 100):
        write(tmp_path, step, keep=3)
    for name in ("step-9/manifest.json", "step-9"):
        os.utime(tmp_path / name, (2e9, 2e9))
    found = newest(tmp_path)
    assert found is not None
    assert found.step == 100


def test_old_ones_go_only_after_the_new_one_is_there(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-3", "step-4"]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_later_one_never_takes_the_place_of_a_good_one(tmp_path: Path, keep: int) -> None:
    folder = tmp_path / "checkpoints"
    write(folder, 4)
    damaged = write(folder, 9) / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    for step in (5, 6):
        write(folder, step, keep=keep)
        found = newest(folder)
        assert found is not None and found.step == step
    assert sorted(path.name for path in folder.iterdir()) == ["step-5", "step-6"][-keep:]


def test_weights_that_verify_but_are_not_finite_are_passed_over(tmp_path: Path) -> None:
    """F36: written by a program that did not look; going on from the one before makes a good one, which stays."""
    folder = tmp_path / "checkpoints"
    write(folder, 4)
    lost = tensors(6.0)
    lost["model"]["w"][1, 1] = torch.nan
    for step in (6, 7):
        save(folder, step, lost, {"window": []}, metadata=META, keep=9)
    found = newest(folder)
    assert found is not None and found.step == 4
    write(folder, 5, keep=1)
    assert [path.name for path in folder.iterdir()] == ["step-5"]


def test_every_flipped_bit_is_found_and_the_one_before_is_taken(tmp_path: Path) -> None:
    """F5."""
    write(tmp_path, 1)
    good = write(tmp_path, 2)
    draw = random.Random(0)
    for _ in range(40):
        copy = tmp_path / "step-3"
        shutil.copytree(good, copy)
        file = draw.choice(sorted(copy.iterdir()))
        data = bytearray(file.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
        with_flip = newest(tmp_path)
        assert with_flip is not None
        assert with_flip.step == 2
        shutil.rmtree(copy)


FILES = ("model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json", "manifest.json")


def lengths(file: Path) -> set[int]:
    """Return where a file may end early: 64 lengths over all, with the ends of what frames it."""
    size = file.stat().st_size
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little") if file.suffix == ".safetensors" else size // 3
    return {0, 1, 7, 8, 9, header - 1, header, header + 1, size // 2, size - 1, *(size * i // 64 for i in range(64))}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["truncate", "delete", "empty folder", "swap"])
def test_harmed_files_are_refused_with_one_clear_error(tmp_path: Path, name: str, harm: str) -> None:
    """F6: of a file, every sort of early end; gone; all gone; another step's."""
    other, path = (
        save(tmp_path, step, {**tensors(step), "ema": {"w": torch.full((3, 2), float(step))}}, {"window": [0.5]},
             metadata=META, keep=9)
        for step in (1, 2)
    )  # fmt: skip
    assert {file.name for file in path.iterdir()} == set(FILES)
    file = path / name
    if harm == "truncate":
        whole = file.read_bytes()
        for length in sorted(lengths(file)):
            file.write_bytes(whole[:length])
            refused(tmp_path, path)
        return
    if harm == "swap":
        shutil.copy(other / name, file)
    for one in {"delete": [file], "empty folder": list(path.iterdir()), "swap": []}[harm]:
        one.unlink()
    refused(tmp_path, path)


def refused(folder: Path, harmed: Path) -> None:
    """Check that a checkpoint is refused and the first one taken in its place."""
    with pytest.raises(MaekitError, match="E-CKPT"):
        load(harmed)
    found = newest(folder)
    assert found is not None
    assert found.step == 1


@pytest.mark.parametrize("names", [["../../etc/passwd"], ["/etc/passwd"], []])
def test_a_manifest_cannot_point_outside(tmp_path: Path, names: list[str]) -> None:
    path = write(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = {n: {"bytes": 1, "sha256": "0"} for n in names}
    (path / "manifest.json").write_text(json.dumps(signed(manifest)))
    with pytest.raises(MaekitError, match="E-CKPT-DAMAGED"):
        load(path)


@pytest.mark.parametrize(
    "text", ["[]", "{}", "null", '{"format": 1, "files": 3, "step": 1}', "not json", '{"format": 1}']
)
def test_rubbish_manifests_are_damage_not_tracebacks(tmp_path: Path, text: str) -> None:
    """F6."""
    path = write(tmp_path, 1)
    (path / "manifest.json").write_text(text)
    with pytest.raises(MaekitError, match="E-CKPT-DAMAGED"):
        load(path)


def test_a_newer_format_is_refused_and_not_stepped_over(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(MaekitError, match="E-CKPT-FORMAT"):
        newest(tmp_path)


def test_leftovers_of_a_kill_are_deleted_at_the_next_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, 1)
    (tmp_path / ".tmp-123").mkdir()
    (tmp_path / ".tmp-123" / "model.safetensors").write_bytes(b"half")
    newest(tmp_path)
    assert (tmp_path / ".tmp-123").exists()  # who only reads leaves it: a save may be going on
    delete_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert "interrupted save" in caplog.text


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "open"])
def test_a_failing_disk_leaves_the_old_checkpoint_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    write(tmp_path, 1)

    really_open = Path.open

    def fail(*args: Any, **named: Any) -> Any:
        if call == "open" and "x" not in (named.get("mode") or args[1]):  # reading still works
            return really_open(*args, **named)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(*((checkpoint.os, "fsync") if call == "fsync" else (Path, "open")), fail)
        with pytest.raises(MaekitError, match="E-STOP-DISK") as caught:
            write(tmp_path, 2)
    assert caught.value.exit_code == 75
    assert os.strerror(number) in str(caught.value)
    assert re.search(r"\(\d+ bytes needed, [\d,]+ [kMG]?B free\)", str(caught.value))  # F3
    assert "step-1" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_a_small_disk_that_is_full_is_told_in_fitting_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=204_800))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MaekitError, match=r"bytes needed, 204 kB free\)"):
        write(tmp_path / "file", 1)


def test_a_failing_disk_before_any_checkpoint_is_not_called_resumable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MaekitError, match="E-ENV-DISK") as caught:
        write(tmp_path / "file", 1)
    assert caught.value.exit_code == 5


def test_files_are_synced_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F9."""
    order: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def note_sync(descriptor: int) -> None:
        order.append("sync " + os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2].replace("-", ".")[:5])
        fsync(descriptor)

    def note_rename(self: Path, target: Path) -> Path:
        order.append("rename")
        return rename(self, target)

    monkeypatch.setattr(checkpoint.os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    write(tmp_path / "c", 1)
    assert order.count("rename") == 1
    at = order.index("rename")
    assert len(order[:at]) == 5  # model, optimizer, state, manifest, the temporary folder
    assert order[at + 1 :] == ["sync c"]


def test_digest_sees_every_bit_dtype_shape_and_name_but_no_order() -> None:
    base = state_sha256(tensors(), {"step": 1})
    assert base == state_sha256({k: tensors()[k] for k in ("optimizer", "model")}, {"step": 1})
    other = tensors()
    other["model"]["w"][0, 0] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    reshaped = tensors()
    reshaped["model"]["w"] = reshaped["model"]["w"].reshape(2, 3)
    renamed = tensors()
    renamed["model"]["v"] = renamed["model"].pop("w")
    retyped = tensors()
    retyped["model"]["w"] = retyped["model"]["w"].half()
    digests = {state_sha256(t, {"step": 1}) for t in (other, reshaped, renamed, retyped)} | {
        state_sha256(tensors(), {"step": 2})
    }
    assert len(digests | {base}) == 6


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Make faults of the disk happen, with short waits before new tries."""
    monkeypatch.setattr(checkpoint, "WAITS", (0.01, 0.01, 0.01))
    yield failpoints.arm
    failpoints.arm("")


def three(run: Path) -> Path:
    for step in (8, 12, 14):
        write(run / "checkpoints", step)
    return run / "checkpoints"


def everything(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*") if file.is_file()}


@pytest.mark.parametrize("place", ["list", "read"])
def test_a_disk_that_fails_for_a_moment_is_asked_again(
    tmp_path: Path, broken: Callable[[str], None], place: str, caplog: pytest.LogCaptureFixture
) -> None:
    """F4: a share that was away while the run began."""
    folder = three(tmp_path)
    broken(f"checkpoint-{place}:eio")
    found = newest(folder)
    assert found is not None and found.step == 14
    assert "once more in" in caplog.text and "passed over" not in caplog.text


@pytest.mark.parametrize("fault", ["eio", "eacces", "estale"])
@pytest.mark.parametrize("place", ["list", "read"])
def test_what_cannot_be_read_is_not_damaged_and_nothing_is_deleted(
    tmp_path: Path, broken: Callable[[str], None], place: str, fault: str
) -> None:
    """F4: the run is refused; it does not begin anew and delete what it could not see."""
    before = everything(three(tmp_path))
    broken(f"checkpoint-{place}:{fault}@1+")
    with pytest.raises(MaekitError, match=r"E-CKPT-READ.*Try: the same command") as caught:
        newest(tmp_path / "checkpoints")
    assert checkpoint.PLAIN[getattr(errno, fault.upper())] in str(caught.value)
    assert everything(tmp_path / "checkpoints") == before


def test_one_file_that_the_disk_lost_costs_steps_and_is_put_aside(
    tmp_path: Path, broken: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    """F4, F6: a bad sector; reading /proc/self/mem from its beginning is an EIO of the system's own."""
    folder = three(tmp_path)
    weights = everything(folder)["step-14/model.safetensors"]
    (folder / "step-14/manifest.json").unlink()
    (folder / "step-14/manifest.json").symlink_to("/proc/self/mem")
    broken("")
    found = newest(folder)
    assert found is not None and found.step == 12
    assert "E-CKPT-READ" in caplog.text and "the disk fails" in caplog.text
    write(folder, 13, keep=1)
    assert [path.name for path in folder.iterdir()] == ["step-13"]
    assert (tmp_path / "damaged/checkpoints/step-14/model.safetensors").read_bytes() == weights
    assert "now lies in" in caplog.text


def test_later_ones_that_were_not_gone_on_from_are_put_aside_also_twice(tmp_path: Path) -> None:
    """F6: neither one of a later step nor one of the same step is deleted."""
    folder = three(tmp_path)
    hurt = []
    for _ in range(2):
        for step in (12, 14):
            file = folder / f"step-{step}/model.safetensors"
            file.write_bytes(file.read_bytes()[:-1])
            hurt.append(file.read_bytes())
        write(folder, 12)
        write(folder, 14)
    aside = tmp_path / "damaged/checkpoints"
    assert sorted(path.name for path in aside.iterdir()) == ["step-12", "step-12.1", "step-14", "step-14.1"]
    assert sorted((path / "model.safetensors").read_bytes() for path in aside.iterdir()) == sorted(hurt)


def test_a_save_does_not_stop_over_a_folder_that_cannot_be_listed(
    tmp_path: Path, broken: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    folder = three(tmp_path)
    broken("checkpoint-list:eacces@1+")
    path = write(folder, 20, keep=1)
    assert load(path).step == 20 and len([*folder.iterdir()]) == 4
    assert "old checkpoints cannot be deleted" in caplog.text


def test_a_checkpoint_under_the_name_of_another_step_is_refused(tmp_path: Path) -> None:
    """F6: no silent mix; elsewhere it may have any name."""
    path = write(tmp_path, 8)
    shutil.copytree(path, tmp_path / "step-20")
    for look in (load, checkpoint.sizes):
        with pytest.raises(MaekitError, match=r"E-CKPT-DAMAGED.*step-20: found the checkpoint of step 8 under this"):
            look(tmp_path / "step-20")
    found = newest(tmp_path)
    assert found is not None and found.step == 8
    assert load(Path(shutil.copytree(path, tmp_path / "mine"))).step == 8
