"""Pre-training from end to end: the command, its run folder, and that nothing which may differ changes a bit."""

import contextlib
import fcntl
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

import maekit as package
from maekit.errors import MaekitError
from maekit.interchange.weights import load_model
from maekit.train import checkpoint

Run = Callable[..., Any]


def test_the_command_that_outside_checks_use(fresh: Run, classes: Path, tmp_path: Path) -> None:
    command = [
        "pretrain", "--data", classes, "--recipe", "builtin/pretrain-fashion", "--out", tmp_path / "run", "--steps", 4,
        "--batch-size", 16, "--workers", 0, "--save-every", 2, "--seed", 1, "--device", "cpu", "--json",
    ]  # fmt: skip
    done = fresh(*command)
    assert done.returncode == 0 and "Warning" not in done.stderr and "Traceback" not in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"run", "steps", "loss", "images_per_second", "state_sha256"} <= found.keys()
    assert "deviates from builtin/pretrain-fashion: batch_size our own 128, yours 16\n" in done.stderr
    assert "deviates from builtin/pretrain-fashion: epochs our own 24, yours steps 4\n" in done.stderr
    assert found["steps"] == 4 and found["run"] == str(tmp_path / "run") and len(found["state_sha256"]) == 64
    assert 0 < found["loss"] < 100 and found["images_per_second"] > 0


def test_a_run_of_a_recipe_keeps_what_deviates_from_it(pretrained: Path, classes: Path) -> None:
    config = yaml.safe_load((pretrained / "config.yaml").read_text())
    assert config["recipe"] == "builtin/pretrain-fashion"
    assert config["resolved"]["deviations"] == [
        {"name": "data", "source": "our own", "theirs": "builtin:fashion", "yours": str(classes)},
        {"name": "epochs", "source": "our own", "theirs": 24.0, "yours": "steps 40"},
        {"name": "batch_size", "source": "our own", "theirs": 128, "yours": 64},
    ]
    page = (pretrained / "report.html").read_text()
    assert "Deviations from it" in page and "batch_size our own 128, yours 64" in page


def test_a_run_folder_explains_itself(whole: Path, result: dict[str, Any], flat: Path) -> None:
    config = yaml.safe_load((whole / "config.yaml").read_text())
    assert config["format"] == 1 and config["verb"] == "pretrain" and config["data"] == str(flat)
    resolved = config["resolved"]
    assert resolved["precision"] == "fp32" and resolved["micro_batch"] == 8 and resolved["images"] == 40
    assert len(resolved["mean"]) == len(resolved["std"]) == 1 and 0 < resolved["mean"][0] < 1
    steps = [json.loads(line)["step"] for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert steps == [3, 6, 9, 12]
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["step-12", "step-8"]
    assert {path.name for path in (whole / "reconstructions").glob("*.png")} >= {"reconstructions.png"}
    for picture in (whole / "reconstructions").glob("*.png"):
        Image.open(picture).verify()
    page = (whole / "report.html").read_text()
    assert page.lstrip().startswith("<!") and 'src="http' not in page
    assert any((whole / "events").iterdir()) and (whole / "encoder.safetensors").stat().st_size > 1000
    assert not [path for path in whole.rglob(".tmp*")]
    assert checkpoint.load(whole / "checkpoints" / "step-12").sha256() == result["state_sha256"]


def test_the_command_and_the_function_give_the_same_bits(maekit: Run, words: list[str], result: dict[str, Any]) -> None:
    done = maekit(*words)
    assert (
        done.code == 0 and done.json["state_sha256"] == result["state_sha256"] and done.json["loss"] == result["loss"]
    )


@pytest.mark.parametrize(
    "workers", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_the_number_of_workers_changes_no_bit(
    maekit: Run, words: list[str], result: dict[str, Any], workers: int
) -> None:
    done = maekit(*words, "--workers", workers)
    assert done.code == 0 and done.json["state_sha256"] == result["state_sha256"]
    assert "Warning" not in done.stderr


def test_stopping_and_going_on_gives_the_same_bits_and_lines(
    maekit: Run, words: list[str], result: dict[str, Any], whole: Path, tmp_path: Path, records: Run
) -> None:
    for at in (5, 11):
        stopped = maekit(*words, "--stop-at", at)
        assert stopped.code == 75 and stopped.json["steps"] == at and "Traceback" not in stopped.stderr
    done = maekit(*words)
    assert (
        done.code == 0 and done.json["state_sha256"] == result["state_sha256"] and done.json["loss"] == result["loss"]
    )
    assert records(tmp_path / "run") == records(whole)
    assert "going on" in done.stderr


def test_stopping_in_bf16_with_averaged_weights_and_odd_parts_gives_the_same_bits(
    flat: Path, tiny: dict[str, Any], tmp_path: Path, records: Run
) -> None:
    settings = {**tiny, "data": str(flat), "precision": "bf16", "ema": 0.9, "clip_grad": 0.1, "drop_path": 0.5}
    settings |= {"depth": 2, "batch_size": 9, "micro_batch": 3}
    straight = package.pretrain({**settings, "out": tmp_path / "straight"})
    for at in (2, 7):
        assert package.pretrain({**settings, "out": tmp_path / "parts", "stop_at": at}).exit_code == 75
    done = package.pretrain({**settings, "out": tmp_path / "parts"})
    assert done.metrics["state_sha256"] == straight.metrics["state_sha256"]
    assert records(tmp_path / "parts") == records(tmp_path / "straight")


@pytest.mark.slow
def test_stopping_at_every_step_gives_the_same_bits_and_lines(
    flat: Path, tiny: dict[str, Any], result: dict[str, Any], whole: Path, tmp_path: Path, records: Run
) -> None:
    """F20, the whole trainer."""
    for at in range(1, 12):
        settings = {**tiny, "data": str(flat), "out": tmp_path / str(at)}
        assert package.pretrain({**settings, "stop_at": at}).exit_code == 75
        assert package.pretrain(settings).metrics["state_sha256"] == result["state_sha256"]
        assert records(tmp_path / str(at)) == records(whole)


def test_a_finished_run_does_nothing_and_says_the_same(
    flat: Path, tiny: dict[str, Any], whole: Path, result: dict[str, Any]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    again = package.pretrain({**tiny, "data": str(flat), "out": whole})
    assert again.exit_code == 0 and again.metrics == result
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_save_interval_and_micro_batch_change_nothing_but_rounding(
    flat: Path, tiny: dict[str, Any], result: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**tiny, "data": str(flat)}
    rarely = package.pretrain({**settings, "out": tmp_path / "rarely", "save_every": 100, "keep": 1})
    assert rarely.metrics["state_sha256"] == result["state_sha256"]
    parts = package.pretrain({**settings, "out": tmp_path / "parts", "micro_batch": 2})
    assert parts.metrics["loss"] == pytest.approx(result["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("changed", "value"), [("mask_ratio", 0.5), ("seed", 4), ("batch_size", 4), ("steps", 13), ("base_lr", 0.02)]
)
def test_another_run_in_the_same_folder_is_refused(
    flat: Path, tiny: dict[str, Any], whole: Path, changed: str, value: Any
) -> None:
    with pytest.raises(MaekitError, match=f"{changed} .* -> {value}") as caught:
        package.pretrain({**tiny, "data": str(flat), "out": whole, changed: value})
    assert caught.value.code == "E-CONFIG-RUN" and caught.value.exit_code == 2


def test_resume_may_be_insisted_on_or_ruled_out(
    flat: Path, tiny: dict[str, Any], tmp_path: Path, result: dict[str, Any]
) -> None:
    settings = {**tiny, "data": str(flat), "out": tmp_path / "run"}
    with pytest.raises(MaekitError, match="found no run, expected a run to go on with") as caught:
        package.pretrain({**settings, "resume": True})
    assert caught.value.code == "E-CONFIG-OUT" and not (tmp_path / "run").exists()
    assert package.pretrain({**settings, "resume": False, "stop_at": 5}).exit_code == 75
    with pytest.raises(MaekitError, match="found a run, expected a new folder"):
        package.pretrain({**settings, "resume": False})
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert config["resume"] is None and config["stop_at"] is None
    assert package.pretrain({**settings, "resume": True}).metrics["state_sha256"] == result["state_sha256"]


def test_a_result_that_cannot_be_read_counts_as_none(
    flat: Path, tiny: dict[str, Any], tmp_path: Path, result: dict[str, Any]
) -> None:
    settings = {**tiny, "data": str(flat), "out": tmp_path / "run"}
    package.pretrain(settings)
    (tmp_path / "run/result.json").write_text("{")
    assert package.pretrain(settings).metrics["state_sha256"] == result["state_sha256"]


def test_a_folder_with_foreign_files_is_left_alone(tiny: dict[str, Any], flat: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(MaekitError) as caught:
        package.pretrain({**tiny, "data": str(flat), "out": tmp_path})
    assert caught.value.code == "E-CONFIG-OUT" and [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_a_kill_left_before_the_first_step_is_no_foreign_file(
    tiny: dict[str, Any], flat: Path, tmp_path: Path, result: dict[str, Any]
) -> None:
    for name in (".tmp-write", ".tmp-config.yaml"):
        (tmp_path / name).write_text("half of")
    done = package.pretrain({**tiny, "data": str(flat), "out": tmp_path})
    assert done.metrics["state_sha256"] == result["state_sha256"]


def test_what_a_kill_left_is_deleted_but_not_what_another_run_is_writing_inside(
    tiny: dict[str, Any], flat: Path, tmp_path: Path
) -> None:
    settings = {**tiny, "data": str(flat), "out": tmp_path}
    package.pretrain({**settings, "stop_at": 5})
    inner = tmp_path / "another run"
    inner.mkdir()
    (tmp_path / "reconstructions").mkdir(exist_ok=True)
    for path in (tmp_path / ".tmp-1", tmp_path / "reconstructions/.tmp-2", inner / ".tmp-3", inner / ".lock"):
        path.write_text("half of")
    package.pretrain(settings)
    assert list(tmp_path.rglob(".tmp-*")) == [inner / ".tmp-3"]


def until_done(background: Run, words: list[str], run: Path, moments: random.Random, kills: int) -> Any:
    """Kill the command again and again at random moments, then let it finish."""
    for _ in range(kills):
        command = background(*words)
        time.sleep(moments.uniform(0, 1.2))
        command.send(signal.SIGKILL)
        command.wait()
        if (run / "result.json").exists():
            break
    return background(*words).wait()


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))])
def test_kills_at_random_moments_change_no_bit(
    background: Run, words: list[str], result: dict[str, Any], whole: Path, tmp_path: Path, records: Run, seed: int
) -> None:
    """F1."""
    done = until_done(background, [*words, "--save-every", "1"], tmp_path / "run", random.Random(seed), 4)
    assert done.code == 0 and done.json["state_sha256"] == result["state_sha256"], done.stderr
    assert records(tmp_path / "run") == records(whole)
    assert not list((tmp_path / "run").rglob(".tmp*")) and (tmp_path / "run/report.html").exists()


def group_is_gone(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(
    ("kind", "delay"),
    [
        (signal.SIGTERM, 0.0),
        *(pytest.param(signal.SIGINT, i / 5, marks=pytest.mark.slow) for i in range(4)),
        *(pytest.param(signal.SIGTERM, i / 5, marks=pytest.mark.slow) for i in range(1, 5)),
    ],
)
def test_a_signal_to_the_group_saves_and_the_same_command_goes_on(
    background: Run, until: Run, words: list[str], tmp_path: Path, kind: signal.Signals, delay: float
) -> None:
    words = [*words, "--workers", "2", "--steps", "400", "--save-every", "1"]
    command = background(*words)
    until(lambda: any((tmp_path / "run/checkpoints").glob("step-*")))
    time.sleep(delay)
    command.send(kind)
    command.wait()
    assert command.code == 75, command.stderr
    assert "Traceback" not in command.stderr and kind.name in command.stderr
    until(lambda: group_is_gone(command.pid))  # no worker is left
    step = command.json["steps"]
    saved = checkpoint.newest(tmp_path / "run/checkpoints")
    assert saved is not None and saved.step == step
    straight = background(*words, "--out", tmp_path / "straight", "--workers", "0", "--stop-at", step + 5).wait()
    done = background(*words, "--stop-at", step + 5).wait()
    assert done.code == 75 and done.json["state_sha256"] == straight.json["state_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kinds", "gap"),
    [
        ((signal.SIGUSR1,), 0.0),
        ((signal.SIGUSR1, signal.SIGTERM), 0.05),
        ((signal.SIGINT, signal.SIGINT), 0.0),
        ((signal.SIGINT, signal.SIGINT), 0.3),
    ],
)
def test_usr1_or_a_second_signal_to_the_group_ends_a_run_no_other_way(
    background: Run, until: Run, words: list[str], tmp_path: Path, kinds: tuple[signal.Signals, ...], gap: float
) -> None:
    """F13: SLURM's warning reaches the loader workers and what serves them too; people press ctrl-C twice."""
    words = [*words, "--workers", "2", "--steps", "400"]
    command = background(*words)
    until((tmp_path / "run/metrics.jsonl").exists)
    time.sleep(gap)
    for kind in kinds:
        with contextlib.suppress(ProcessLookupError):  # it has ended of the first
            command.send(kind)
        time.sleep(gap)
    command.wait()
    assert command.code == 75, command.stderr
    assert "Traceback" not in command.stderr and "resource_tracker" not in command.stderr, command.stderr
    assert command.group_is_gone(10)
    step = command.json["steps"]
    saved = checkpoint.newest(tmp_path / "run/checkpoints")
    assert saved is not None and saved.step == step
    straight = background(*words, "--out", tmp_path / "straight", "--workers", "0", "--stop-at", step + 2).wait()
    done = background(*words, "--stop-at", step + 2).wait()
    assert done.code == 75 and done.json["state_sha256"] == straight.json["state_sha256"]


@pytest.mark.parametrize(
    ("kind", "nproc"),
    [
        (signal.SIGTERM, 1),
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow),
    ],
)
def test_signals_without_end_stop_a_run_as_the_first_one_does(
    background: Run, until: Run, storm: Run, words: list[str], tmp_path: Path, kind: signal.Signals, nproc: int
) -> None:
    """One in every millisecond until the last process is gone: there is no moment at which another one counts."""
    for run in (tmp_path / "1", tmp_path / "2", tmp_path / "3"):
        command = background(*words, "--steps", "4000", "--nproc", nproc, "--out", run)
        until((run / "metrics.jsonl").exists)
        storm(command, kind)
        assert command.wait().code == 75 and "Traceback" not in command.stderr, command.stderr
        saved = checkpoint.newest(run / "checkpoints")
        assert saved is not None and saved.step == command.json["steps"] and not (run / ".lock").exists()


@pytest.mark.parametrize("kind", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sign", ["going on from", "events"])
def test_a_signal_outside_of_the_loop_ends_a_run_with_a_checkpoint_in_the_same_way(
    background: Run, until: Run, words: list[str], tmp_path: Path, kind: signal.Signals, sign: str,
    result: dict[str, Any],
) -> None:  # fmt: skip
    """Before the first step of a relaunch, and while the report is made after the last."""
    run = tmp_path / "run"
    stopped_at = 4 if sign == "going on from" else 11
    assert background(*words, "--stop-at", stopped_at).wait().code == 75
    command = background(*words)
    if sign == "going on from":
        until(lambda: sign in command.stderr or (run / "result.json").exists())
    else:
        until(lambda: (run / "checkpoints/step-12").exists())
    command.send(kind)
    command.wait()
    assert command.code in (0, 75) and "Traceback" not in command.stderr, command.stderr
    if command.code == 75:
        assert command.json["steps"] >= stopped_at
    done = background(*words).wait()
    assert done.code == 0 and done.json["state_sha256"] == result["state_sha256"], done.stderr


def test_a_second_process_in_the_same_folder_is_refused(
    background: Run, maekit: Run, until: Run, words: list[str], tmp_path: Path
) -> None:
    command = background(*words, "--steps", "100000")
    until(lambda: any((tmp_path / "run/checkpoints").glob("step-*")))
    second = maekit(*words, "--steps", "100000")
    assert second.code == 5 and "error[E-ENV-BUSY]" in second.stderr and f"pid {command.pid}" in second.stderr
    command.send(signal.SIGTERM)
    assert command.wait().code == 75 and not (tmp_path / "run/.lock").exists()


def test_a_lock_that_its_holder_has_just_deleted_is_not_taken(
    flat: Path, tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: dict[str, Any]
) -> None:
    """Between opening the file and locking it another process may have ended, and a third begun with a new file."""
    settings, real = {**tiny, "data": str(flat), "out": tmp_path / "run"}, fcntl.flock

    def late(*words: Any) -> None:
        real(*words)
        (tmp_path / "run/.lock").unlink()

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", late)
        with pytest.raises(MaekitError, match="E-ENV-BUSY"):
            package.pretrain(settings)
    assert package.pretrain(settings).metrics["state_sha256"] == result["state_sha256"]


def test_a_finished_run_needs_its_images_no_more(
    flat: Path, tiny: dict[str, Any], tmp_path: Path, result: dict[str, Any]
) -> None:
    data = tmp_path / "data"
    data.symlink_to(flat)
    settings = {**tiny, "data": str(data), "out": tmp_path / "run"}
    first = package.pretrain(settings)
    data.unlink()
    again = package.pretrain(settings)
    assert again.exit_code == 0 and again.metrics == first.metrics
    assert first.metrics["state_sha256"] == result["state_sha256"]


def test_a_short_last_batch_is_trained_and_dropped_where_asked(
    flat: Path, tiny: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**tiny, "data": str(flat), "steps": None, "epochs": 2, "batch_size": 16}
    assert package.pretrain({**settings, "out": tmp_path / "short"}).metrics["steps"] == 6
    assert package.pretrain({**settings, "out": tmp_path / "drop", "drop_last": True}).metrics["steps"] == 4


def test_the_micro_batch_may_change_when_a_run_goes_on(
    flat: Path, tiny: dict[str, Any], tmp_path: Path, result: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """As the message of a run that is out of memory says."""
    settings = {**tiny, "data": str(flat), "out": tmp_path / "run"}
    assert package.pretrain({**settings, "stop_at": 6}).exit_code == 75
    done = package.pretrain({**settings, "micro_batch": 2})
    assert done.metrics["loss"] == pytest.approx(result["loss"], rel=1e-4)
    assert "micro_batch 8 -> 2" in caplog.text


def test_crops_may_be_resized_on_the_device(
    maekit: Run, words: list[str], result: dict[str, Any], tmp_path: Path
) -> None:
    done = maekit(*words, "--resize-on", "device", "--workers", 1)
    assert done.code == 0 and done.json["loss"] == pytest.approx(result["loss"], rel=0.01)
    assert done.json["state_sha256"] != result["state_sha256"]
    for other in (["--crop", "centre"], ["--color-jitter", "0.4"], ["--crop-scale", "1", "1"]):
        done = maekit(*words, "--resize-on", "device", *other, "--out", tmp_path / "wrong")
        assert done.code == 2 and "E-CONFIG-IDLE" in done.stderr and not (tmp_path / "wrong").exists()


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_what_was_compiled_is_kept_for_the_next_run_in_a_folder_of_this_user(
    maekit: Run, words: list[str], tmp_path: Path
) -> None:
    environment = {"TMPDIR": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "kept")}
    found = []
    for name in ("first", "second"):
        done = maekit(*words, "--compile", "--out", tmp_path / name, environment=environment)
        assert done.code == 0 and re.search(r"first step done, compiled: \d+ s since the start", done.stderr)
        found.append({path.name: path.stat().st_mtime_ns for path in tmp_path.glob("kept/**/*.so")})
    assert found[0] and found[0] == found[1]
    (folder,) = tmp_path.glob("torchinductor_*")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_compiled_code_of_somebody_else_is_not_loaded(maekit: Run, words: list[str], tmp_path: Path) -> None:
    torchs = tmp_path / Path(default_cache_dir()).name
    torchs.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    run = tmp_path / "run"
    done = maekit(*words, "--compile", "--out", run, environment={"TMPDIR": str(tmp_path)})
    assert done.code == 5 and f"E-ENV-COMPILER]: {torchs}" in done.stderr and "TMPDIR=" in done.stderr
    assert not run.exists()


def test_compile_without_a_compiler_says_what_to_install_and_leaves_nothing(
    flat: Path, tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MaekitError, match=r"E-ENV-COMPILER.*apt-get install g\+\+, or --no-compile"):
        package.pretrain({**tiny, "data": str(flat), "out": tmp_path / "run", "compile": True})
    assert not (tmp_path / "run").exists()


def test_workers_end_when_the_main_process_is_killed(
    background: Run, until: Run, words: list[str], tmp_path: Path
) -> None:
    command = background(*words, "--workers", "2", "--steps", "100000")
    until(lambda: any((tmp_path / "run/checkpoints").glob("step-*")))
    os.kill(command.pid, signal.SIGKILL)
    command.wait()
    killed = time.monotonic()
    until(lambda: group_is_gone(command.pid))
    assert time.monotonic() - killed <= 10  # F43


def test_two_processes_see_the_same_samples(
    maekit: Run, words: list[str], result: dict[str, Any], tmp_path: Path
) -> None:
    done = maekit(*words, "--nproc", "2")
    assert done.code == 0, done.stderr
    assert done.json["loss"] == pytest.approx(result["loss"], rel=1e-4) and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_a_foreign_torchrun_sees_the_same_samples_also_in_a_short_batch(
    maekit: Run, words: list[str], tmp_path: Path, processes: int
) -> None:
    """40 images in batches of 13: the fourth has one, so that all processes but one have none."""
    words = [*words, "--batch-size", "13"]
    alone = maekit(*words, "--out", tmp_path / "alone")
    assert alone.code == 0, alone.stderr
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m", "maekit"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["loss"] == pytest.approx(alone.json["loss"], rel=1e-4) and done.stdout.count("state_sha256") == 1


@pytest.mark.slow
def test_a_signal_to_two_processes_saves_and_the_same_command_goes_on(
    background: Run, until: Run, words: list[str], tmp_path: Path
) -> None:
    words = [*words, "--nproc", "2", "--steps", "2000", "--save-every", "1"]
    command = background(*words)
    until(lambda: any((tmp_path / "run/checkpoints").glob("step-*")))
    command.send(signal.SIGTERM)
    command.wait()
    assert command.code == 75 and "Traceback" not in command.stderr, command.stderr
    step = command.json["steps"]
    done = background(*words, "--stop-at", step + 3).wait()
    assert done.code == 75 and done.json["steps"] == step + 3


def group(leader: int) -> list[Path]:
    """Return the folders in /proc of a process group."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((place / "stat").read_text().rpartition(")")[2].split()[2]) == leader:
                found.append(place)
    return found


def listened_at(leader: int) -> set[str]:
    """Return the addresses, as the kernel writes them, at which a process group waits for connections."""
    sockets = set()
    for place in group(leader):
        with contextlib.suppress(OSError):
            sockets |= {os.readlink(file) for file in (place / "fd").iterdir()}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="asks Linux")
def test_two_processes_listen_to_this_machine_alone(
    background: Run, until: Run, words: list[str], tmp_path: Path
) -> None:
    """T12: nothing of a run can be reached from the network; torchrun's store could, and was read with pickle."""
    command = background(*words, "--nproc", "2", "--steps", "2000")
    seen: set[str] = set()

    def ready() -> bool:
        seen.update(listened_at(command.pid))
        return (tmp_path / "run/metrics.jsonl").exists()

    until(ready)
    seen |= listened_at(command.pid)
    command.send(signal.SIGTERM)
    command.wait()
    assert command.code == 75, command.stderr
    assert seen == {"0100007F"}  # 127.0.0.1, where tensors are exchanged


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_before_two_processes_are_ready_ends_them_with_its_code(
    background: Run, words: list[str], kind: signal.Signals
) -> None:
    """F13."""
    command = background(*words, "--nproc", "2")
    time.sleep(1)  # they import torch
    command.send(kind)
    command.wait()
    assert command.code == 128 + kind, command.stderr
    assert "Traceback" not in command.stderr and command.group_is_gone(10)


@pytest.mark.slow
def test_the_exit_code_of_one_of_two_processes_is_that_of_the_command(
    maekit: Run, words: list[str], tmp_path: Path
) -> None:
    done = maekit(*words, "--nproc", "2", "--stop-at", "3")
    assert done.code == 75 and done.json["steps"] == 3, done.stderr
    none = tmp_path / "no images"
    none.mkdir()
    for mistake, code in ((("--mask-ratio", "0.5"), "E-CONFIG-RUN"), (("--data", none), "E-DATA")):
        done = maekit(
            *words, "--nproc", "2", *mistake, "--out", tmp_path / ("run" if code == "E-CONFIG-RUN" else "new")
        )
        assert done.code in (2, 3) and "Traceback" not in done.stderr
        assert done.stderr.count("error[") == done.stderr.count(f"error[{code}") == 1, done.stderr
        assert "Terminating" not in done.stderr


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_goes_on(
    maekit: Run, words: list[str], result: dict[str, Any], tmp_path: Path, whole: Path, records: Run
) -> None:
    """The limit stands for a full disk: from step 4 on the optimizer's state no longer fits."""
    assert maekit(*words, "--stop-at", "4").code == 75
    saved = tmp_path / "run/checkpoints/step-4"
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    full = maekit(*words, file_size=(saved / "model.safetensors").stat().st_size - 1)
    assert full.code == 75 and "error[E-STOP-DISK]" in full.stderr and "Traceback" not in full.stderr, full.stderr
    assert "step-4" in full.stderr and {file.name: file.read_bytes() for file in saved.iterdir()} == before
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-4"]
    assert checkpoint.load(saved).step == 4
    done = maekit(*words)
    assert done.code == 0 and done.json["state_sha256"] == result["state_sha256"]
    assert records(tmp_path / "run") == records(whole)


def test_a_full_disk_before_the_first_checkpoint_is_said(maekit: Run, words: list[str], tmp_path: Path) -> None:
    full = maekit(*words, file_size=8000)
    assert full.code == 5 and full.stderr.count("error[E-ENV-DISK]") == 1 and "Traceback" not in full.stderr
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_init_goes_on_from_weights_of_encoder_and_decoder(
    whole: Path, flat: Path, tiny: dict[str, Any], tmp_path: Path, records: Run
) -> None:
    settings = {**tiny, "data": str(flat), "steps": 1, "log_every": 1, "seed": 9}
    cold: Any = package.pretrain({**settings, "out": tmp_path / "cold"}).metrics["loss"]
    warm: Any = package.pretrain({**settings, "out": tmp_path / "warm", "init": whole}).metrics["loss"]
    assert warm < 0.9 * cold
    start = package.pretrain({**settings, "out": tmp_path / "start", "init": whole, "lr": 1e-30, "base_lr": None})
    assert start.exit_code == 0
    old, new = load_model(whole).state_dict(), load_model(tmp_path / "start").state_dict()
    assert old.keys() == new.keys() and all(torch.allclose(old[name], new[name]) for name in old)


def test_init_from_an_encoder_alone_leaves_the_decoder_as_it_was_drawn(
    whole: Path, flat: Path, tiny: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**tiny, "data": str(flat), "steps": 1, "lr": 1e-30, "base_lr": None, "decoder_depth": 2}
    start = package.pretrain({**settings, "out": tmp_path / "start", "init": whole / "encoder.safetensors"})
    assert start.exit_code == 0
    package.pretrain({**settings, "out": tmp_path / "cold"})
    old, new, cold = (load_model(run) for run in (whole, tmp_path / "start", tmp_path / "cold"))
    for model, other in ((new.encoder, old.encoder), (new.decoder, cold.decoder)):
        assert all(torch.allclose(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_averaged_weights_are_kept_and_can_be_used(flat: Path, tiny: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert package.pretrain({**tiny, "data": str(flat), "out": run, "ema": 0.5}).exit_code == 0
    saved = checkpoint.newest(run / "checkpoints")
    average = load_model(run / "encoder-ema.safetensors").encoder.state_dict()
    assert saved is not None
    for name, value in saved.tensors["ema"].items():
        if name.startswith("encoder."):
            assert torch.equal(average[name.removeprefix("encoder.")], value)
    last = load_model(run / "encoder.safetensors").encoder.state_dict()
    assert not torch.equal(average["blocks.0.mlp.fc1.weight"], last["blocks.0.mlp.fc1.weight"])


def test_init_of_another_shape_is_refused(whole: Path, flat: Path, tiny: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(MaekitError) as caught:
        package.pretrain({**tiny, "data": str(flat), "out": tmp_path / "run", "init": whole, "embed_dim": 32})
    assert caught.value.code == "E-CKPT-MODEL" and not (tmp_path / "run").exists()


def test_arrays_of_five_channels_that_are_not_square(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    generator = np.random.default_rng(0)
    for i in range(12):
        np.save(tmp_path / f"data/{i}.npy", generator.normal(i, 2, (20, 30, 5)).astype(np.float32))
    settings = {**tiny, "data": str(tmp_path / "data"), "img_size": [16, 28], "patch_size": 4, "channels": None}
    done = package.pretrain({**settings, "out": tmp_path / "run", "steps": 3, "crop_scale": [0.5, 1]})
    assert done.exit_code == 0 and 0 < float(str(done.metrics["loss"])) < 100
    model = load_model(tmp_path / "run")
    assert model.grid == (4, 7) and len(model.mean) == 5 and model.mean[0] == pytest.approx(5.5, abs=0.2)


class Clothes:
    """What a user might have: images and labels by index."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.open(self.files[index]).convert("L"), index % 2


@pytest.mark.parametrize("channels", [1, 3])
def test_a_data_set_of_ones_own(tiny: dict[str, Any], flat: Path, tmp_path: Path, channels: int) -> None:
    settings = {**tiny, "out": tmp_path / "run", "steps": 4, "channels": channels}
    assert package.pretrain({**settings, "stop_at": 2}, dataset=Clothes(flat)).exit_code == 75
    done = package.pretrain(settings, dataset=Clothes(flat))
    assert done.exit_code == 0 and done.metrics["steps"] == 4


def test_a_data_set_and_its_files_give_the_same_bits(
    tiny: dict[str, Any], flat: Path, tmp_path: Path, result: dict[str, Any]
) -> None:
    done = package.pretrain({**tiny, "out": tmp_path / "run"}, dataset=Clothes(flat))
    assert done.metrics["state_sha256"] == result["state_sha256"]


def test_a_few_unreadable_images_are_skipped_and_listed_once(
    tiny: dict[str, Any], flat: Path, tmp_path: Path, maekit: Run, flags: Run
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for file in flat.iterdir():
        (data / file.name).write_bytes(file.read_bytes())
    for name in ("07.png", "08.png"):
        (data / name).write_bytes(b"<html>")
    settings = {**tiny, "data": data, "steps": 20}
    found = []
    for workers in (0, 2):
        run = tmp_path / str(workers)
        assert maekit("pretrain", *flags({**settings, "out": run, "workers": workers, "stop_at": 11})).code == 75
        done = maekit("pretrain", *flags({**settings, "out": run, "workers": workers}), "--json")
        assert done.code == 0 and "skipped" in done.stderr
        listed = [json.loads(line) for line in (run / "bad_files.jsonl").read_text().splitlines()]
        assert sorted(entry["id"] for entry in listed) == ["07.png", "08.png"]
        found.append(done.json["state_sha256"])
    assert found[0] == found[1]


def test_too_many_unreadable_images_stop_before_the_first_step(
    tiny: dict[str, Any], flat: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number, file in enumerate(sorted(flat.iterdir())):
        (data / file.name).write_bytes(file.read_bytes() if number > 5 else b"")
    with pytest.raises(MaekitError) as caught:
        package.pretrain({**tiny, "data": str(data), "out": tmp_path / "run"})
    assert caught.value.code == "E-DATA-BAD" and caught.value.exit_code == 3 and not (tmp_path / "run").exists()


def test_repeats_go_on_to_the_same_bits_and_the_batch_is_divisible(
    flat: Path, tiny: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**tiny, "data": str(flat), "repeats": 4}
    whole = package.pretrain({**settings, "out": tmp_path / "whole"})
    package.pretrain({**settings, "out": tmp_path / "run", "stop_at": 5})
    again = package.pretrain({**settings, "out": tmp_path / "run"})
    assert again.metrics["state_sha256"] == whole.metrics["state_sha256"]
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert records[-1]["epoch"] == 12 / 20  # 40 images, 4 samples of each, batches of 8
    with pytest.raises(MaekitError, match=r"E-CONFIG-BATCH.*--batch-size 9"):
        package.pretrain({**settings, "out": tmp_path / "wrong", "repeats": 3})
    assert not (tmp_path / "wrong").exists()
