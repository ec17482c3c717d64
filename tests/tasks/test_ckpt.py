"""maekit ckpt: lists, finds every damage, deletes only what may go, puts aside what is damaged, and the run goes on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import maekit as package
from maekit.config import load_yaml
from maekit.errors import MaekitError
from maekit.settings import Pretrain
from maekit.tasks.ckpt import ckpt
from maekit.tasks.run_folder import identity
from maekit.train import checkpoint


@pytest.fixture(scope="module")
def made(flat: Path, tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run with a checkpoint at every one of its steps."""
    run = tmp_path_factory.mktemp("ckpt") / "run"
    package.pretrain({**tiny, "data": str(flat), "out": run, "save_every": 1, "keep": 99})
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def names(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def harm(run: Path, step: int, name: str = "model.safetensors") -> None:
    """Flip one bit."""
    file = run / f"checkpoints/step-{step}" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def test_list_tells_every_checkpoint_and_reads_nothing(run: Path) -> None:
    harm(run, 5)
    found = ckpt({"action": "list", "run": str(run)})
    assert [one["step"] for one in found.metrics["checkpoints"]] == list(range(12, 0, -1))  # pyright: ignore
    assert found.exit_code == 0 and found.metrics["newest"] == 12 and "verify reads the contents" in found.text
    (run / "checkpoints/step-12/state.json").unlink()
    assert ckpt({"action": "list", "run": str(run)}).metrics["newest"] == 11


def test_verify_finds_a_flipped_bit_and_says_where(run: Path) -> None:
    assert ckpt({"action": "verify", "run": str(run)}).exit_code == 0
    harm(run, 12)
    found = ckpt({"action": "verify", "run": str(run)})
    assert found.exit_code == 1 and found.metrics["newest"] == 11
    assert "step-12/model.safetensors: found another SHA-256" in found.text and "ckpt repair" in found.text


def test_prune_keeps_the_newest_that_verify_and_the_multiples(run: Path) -> None:
    harm(run, 12)
    asked = {"action": "prune", "run": str(run), "keep": 2, "keep_every": 4}
    would = ckpt({**asked, "dry_run": True})
    assert names(run) == list(range(1, 13)) and "would delete" in would.text
    done = ckpt(asked)
    assert names(run) == [4, 8, 10, 11, 12] and "left alone, since it does not verify" in done.text
    assert done.metrics["deleted"] == would.metrics["deleted"]
    assert ckpt(asked).metrics["deleted"] == []


def test_repair_puts_damage_aside_and_the_same_command_goes_on_to_the_same_bits(
    run: Path, flat: Path, tiny: dict[str, Any]
) -> None:
    was = json.loads((run / "result.json").read_text())
    harm(run, 12)
    (run / "checkpoints/.tmp-123").mkdir()
    (run / "encoder.safetensors").write_bytes(b"half of it")
    metrics = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe\n" + metrics + b'{"step": 12, "lo')
    asked = {"action": "repair", "run": str(run)}
    would = ckpt({**asked, "dry_run": True})
    assert names(run)[-1] == 12 and len(would.metrics["done"]) == 5  # pyright: ignore[reportArgumentType]
    done = ckpt(asked)
    assert done.metrics["newest"] == 11 and names(run) == list(range(1, 12))
    assert (run / "damaged/checkpoints/step-12/model.safetensors").exists()
    assert (run / "metrics.jsonl").read_bytes() == metrics and b"\xff" in (run / "damaged/metrics.jsonl").read_bytes()
    assert (run / "damaged/result.json").exists() and not list(run.rglob(".tmp-*"))
    assert ckpt(asked).metrics["done"] == []
    again = package.pretrain({**tiny, "data": str(flat), "out": run, "save_every": 1, "keep": 99})
    assert again.metrics["state_sha256"] == was["state_sha256"]
    package.load_model(run / "encoder.safetensors")


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_until_they_are_put_aside(
    run: Path, flat: Path, tiny: dict[str, Any]
) -> None:
    """F6: it does not begin anew by itself, also not with --resume, and deletes nothing; `repair` says what is left."""
    was = json.loads((run / "result.json").read_text())
    (run / "result.json").unlink()
    for step in names(run):
        if step < 10:
            shutil.rmtree(run / f"checkpoints/step-{step}")
        else:
            harm(run, step, "state.json")
    before = {file: file.read_bytes() for file in run.rglob("step-*/*")}
    again = {**tiny, "data": str(flat), "out": run, "save_every": 4}
    said = r"E-CKPT-DAMAGED.*3 and none verifies; the newest: .*step-12/state.json.*SHA-256.*Try: maekit ckpt repair"
    for asked in (again, {**again, "resume": True}):
        with pytest.raises(MaekitError, match=said):
            package.pretrain(asked)
    with pytest.raises(MaekitError, match=said):
        package.load_model(run)
    assert {file: file.read_bytes() for file in run.rglob("step-*/*")} == before
    with pytest.raises(MaekitError, match=r"E-CKPT-DAMAGED.*no checkpoint that verifies.*begins anew"):
        ckpt({"action": "repair", "run": str(run)})
    assert len([*(run / "damaged/checkpoints").iterdir()]) == 3
    assert package.pretrain(again).metrics["state_sha256"] == was["state_sha256"]


def test_a_whole_checkpoint_of_another_run_is_passed_over_with_a_line(
    run: Path, flat: Path, tiny: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """F6: no silent mix; one that keeps no identity, as those of older releases, is taken."""
    was = json.loads((run / "result.json").read_text())
    (run / "result.json").unlink()
    folder = run / "checkpoints"
    for step in names(run):
        if step not in (4, 8):
            shutil.rmtree(folder / f"step-{step}")
    own, other = checkpoint.load(folder / "step-8"), identity(Pretrain(seed=99), "data")
    assert own.state["run"] == load_yaml(run / "config.yaml")["resolved"]["identity"] != other

    def put(step: int, whose: str) -> Path:
        state = {**own.state, "run": whose}
        return checkpoint.save(folder, step, own.tensors, state, metadata={}, keep=99)

    put(10, other)
    verified = ckpt({"action": "verify", "run": str(run)})
    assert verified.exit_code == 1 and verified.metrics["newest"] == 8 and "another run" in verified.text
    again = package.pretrain({**tiny, "data": str(flat), "out": run, "save_every": 4})
    assert again.metrics["state_sha256"] == was["state_sha256"]
    assert "E-CKPT-RUN" in caplog.text and "now lies in" in caplog.text
    assert (run / "damaged/checkpoints/step-10/model.safetensors").exists()
    found = checkpoint.newest(put(13, "").parent, own.state["run"])
    assert found is not None and found.step == 13


def test_a_run_is_told_from_others_by_what_decides_its_numbers() -> None:
    one = identity(Pretrain(), "data")
    assert one == identity(Pretrain(workers=3, save_every=7, out=Path("elsewhere")), "data")
    others = (Pretrain(seed=1), Pretrain(mask_ratio=0.5), Pretrain(target="pca", target_from=Path("pca")))
    digests = {one, identity(Pretrain(), "other data"), *(identity(each, "data") for each in others)}
    assert len(digests) == 5 and all(len(each) == 14 for each in digests)


def test_a_run_at_work_is_left_alone(run: Path) -> None:
    from maekit.tasks.run_folder import alone

    with alone(run), pytest.raises(MaekitError, match="E-ENV-BUSY"):
        ckpt({"action": "prune", "run": str(run)})
    assert ckpt({"action": "list", "run": str(run)}).exit_code == 0


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({}, "E-USAGE-ACTION"),
        ({"action": "verify"}, "E-USAGE-RUN"),
        ({"action": "list", "run": "nowhere"}, "E-CKPT-MISSING"),
        ({"action": "mend", "run": "x"}, "E-CONFIG-VALUE"),
        ({"action": "list", "run": "x", "keep": 3}, "E-CONFIG-BOTH"),
    ],
)
def test_what_it_cannot_do_is_one_line(asked: dict[str, Any], code: str) -> None:
    with pytest.raises(MaekitError) as caught:
        ckpt(asked)
    assert caught.value.code == code


def test_repair_leaves_alone_what_the_disk_does_not_give(
    run: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F4: it may be whole; reading /proc/self/mem from its beginning is an EIO that stays."""
    monkeypatch.setattr(checkpoint, "WAITS", (0.01, 0.01, 0.01))
    manifest = run / "checkpoints/step-12/manifest.json"
    manifest.unlink()
    manifest.symlink_to("/proc/self/mem")
    found = ckpt({"action": "repair", "run": str(run)})
    assert found.metrics["newest"] == 11 and found.metrics["done"] == [] and manifest.is_symlink()
    assert "left alone: " in caplog.text and "the disk fails" in caplog.text
