"""maekit ckpt: lists, finds every damage, deletes only what may go, puts aside what is damaged, and the run goes on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import maekit as package
from maekit.errors import MaekitError
from maekit.tasks.ckpt import ckpt


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


def test_repair_says_when_nothing_is_left(run: Path) -> None:
    for step in names(run):
        harm(run, step, "state.json")
    with pytest.raises(MaekitError, match=r"E-CKPT-DAMAGED.*no checkpoint that verifies"):
        ckpt({"action": "repair", "run": str(run)})


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
