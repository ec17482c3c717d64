"""What a run goes on with, what it refuses (F27), whom it lets in (F10); surroundings change no bit (F12, F14, F24)."""

import errno
import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import maekit as package
from maekit.config import resolve
from maekit.errors import MaekitError
from maekit.settings import Finetune, Pretrain, Settings
from maekit.tasks.run_folder import LOCK, Resolved, alone, describe, open_run

Run = Callable[..., Any]
KINDS: list[tuple[type[Settings], str]] = [(Pretrain, "pretrain"), (Finetune, "finetune")]
NAMES = [(kind, verb, name) for kind, verb in KINDS for name in kind.model_fields]


def members(annotation: Any) -> list[Any]:
    """Return the types and literal values that an annotation is made of."""
    parts = typing.get_args(annotation)
    return [one for part in parts for one in members(part)] if parts else [annotation]


def another(settings: Settings, name: str) -> Any:
    """Return a value of the setting's kind that it does not have."""
    annotation = type(settings).model_fields[name].annotation
    value, kinds = getattr(settings, name), members(annotation)
    if value is None and "tuple" in str(annotation):
        return (7, 7)
    if isinstance(value, bool) or (value is None and bool in kinds):
        return not value
    if isinstance(value, tuple):
        return tuple(part + 1 for part in value)
    if isinstance(value, list):
        return [*value, "more"]
    words = [one for one in kinds if isinstance(one, str) and one != value]
    if isinstance(value, str) and words:
        return words[0]
    numbers = [kind for kind in (int, float) if kind in kinds]
    if numbers:
        return numbers[0](7) if value is None or isinstance(value, str) else value + 1
    return words[0] if words else Path("elsewhere") if Path in kinds else "other"


@pytest.mark.parametrize(("kind", "verb", "name"), NAMES)
def test_each_setting_may_change_or_is_named_as_changed(
    kind: type[Settings], verb: str, name: str, tmp_path: Path
) -> None:
    given = {"steps": 3, "batch_size": 8, "base_lr": 1e-3, "warmup_steps": 1}
    before = resolve(kind, flags={**given, "data": "builtin:fashion"})[0]
    run = open_run(tmp_path / "run", verb, before)
    describe(run, before, Resolved(images=1, fingerprint=""))
    now = before.model_copy(update={name: another(before, name)})
    extra = kind.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    if name == "resume":
        return
    if extra["resume"] == "free":
        assert open_run(tmp_path / "run", verb, now).resolved is not None
    else:
        with pytest.raises(MaekitError, match=rf"E-CONFIG-RUN.*\b{name} .* -> "):
            open_run(tmp_path / "run", verb, now)


@pytest.mark.slow
@pytest.mark.parametrize("grace", [20.0, 0.0])
def test_a_scheduler_that_warns_and_then_kills(
    background: Run, until: Run, words: list[str], tmp_path: Path, grace: float
) -> None:
    """F14, as ``srun --signal``: USR1, some time, TERM, KILL."""
    run = tmp_path / "run"
    words = [*words, "--steps", "4000", "--save-every", "50"]
    command = background(*words)
    until(lambda: any((run / "checkpoints").glob("step-*")))
    command.send(signal.SIGUSR1)
    end = time.monotonic() + grace
    while time.monotonic() < end and not command.group_is_gone():
        time.sleep(0.05)
    for kind in (signal.SIGTERM, signal.SIGKILL):
        if not command.group_is_gone():
            command.send(kind)
    code = command.wait().code
    assert code == 75 if grace else code in (75, -9)
    again = background(*words, "--stop-at", "2").wait()  # goes on from where it was, which is further
    assert again.code == 75 and again.json["steps"] >= 50


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"TZ": "Asia/Kathmandu", "LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8"},
        {"HOME": "/nonexistent", "USER": "somebody", "LOGNAME": "somebody", "HOSTNAME": "elsewhere"},
        {"COLUMNS": "1", "TERM": "dumb", "NO_COLOR": "1"},
    ],
)
def test_surroundings_change_no_bit(
    background: Run, words: list[str], result: dict[str, Any], environment: dict[str, str]
) -> None:
    done = background(*words, environment=environment).wait()
    assert done.code == 0 and done.json["state_sha256"] == result["state_sha256"], done.stderr


@pytest.mark.slow
def test_the_seed_of_hashes_changes_no_bit(words: list[str], result: dict[str, Any], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "maekit", *words, "--json"], env={**os.environ, "PYTHONHASHSEED": "77"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and result["state_sha256"] in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["with spaces in it", "größe-写真-🙂", "x" * 200, "-dash", "linked"])
def test_a_run_may_lie_anywhere(
    background: Run, words: list[str], result: dict[str, Any], tmp_path: Path, name: str
) -> None:
    if name == "linked":
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "linked").symlink_to(tmp_path / "elsewhere")
    done = background(*words, "--out", f"{tmp_path}/{name}", environment={"TMPDIR": "/dev/shm"}).wait()
    assert done.code == 0 and done.json["state_sha256"] == result["state_sha256"], done.stderr
    assert (tmp_path / name / "report.html").exists()


@pytest.mark.parametrize("mask", [0o077, 0o000])
def test_every_file_of_a_run_has_the_mode_that_the_umask_says(
    mask: int, flat: Path, tiny: dict[str, Any], tmp_path: Path, result: dict[str, Any]
) -> None:
    """F12, F24: and the umask changes no bit."""
    before = os.umask(mask)
    try:
        done = package.pretrain({**tiny, "data": str(flat), "out": tmp_path / "run"})
    finally:
        os.umask(before)
    assert done.metrics["state_sha256"] == result["state_sha256"]
    found = [(path.is_dir(), path.stat().st_mode & 0o777) for path in (tmp_path / "run").rglob("*")]
    assert len(found) > 15 and set(found) == {(True, 0o777 & ~mask), (False, 0o666 & ~mask)}


def test_a_lock_that_cannot_be_read_is_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / LOCK).write_bytes(b"\xff\xfe\x1b[31m")
    with caplog.at_level(logging.WARNING, "maekit"), alone(tmp_path):
        assert "going on in its place" in caplog.text and "\x1b" not in caplog.text
    assert not (tmp_path / LOCK).exists()


def test_a_lock_whose_holder_was_killed_is_taken_over_with_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """F10."""
    (tmp_path / LOCK).write_text("pid 4194999 on elsewhere since 2026-01-01 00:00:00")
    with caplog.at_level(logging.WARNING, "maekit"), alone(tmp_path):
        assert "pid 4194999 on elsewhere" in caplog.text and "going on in its place" in caplog.text
        assert f"pid {os.getpid()}" in (tmp_path / LOCK).read_text()
    assert not (tmp_path / LOCK).exists()


def test_a_lock_that_cannot_be_deleted_does_not_take_the_place_of_what_happened(tmp_path: Path) -> None:
    """F4: a disk that is suddenly read-only; the exit code would say 5 in place of 75."""
    with pytest.raises(KeyboardInterrupt), alone(tmp_path):
        (tmp_path / LOCK).unlink()
        (tmp_path / LOCK).mkdir()
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("holder", "taken"), [("pid 4194999 on HERE", True), ("pid 1 on HERE", False), ("pid 4194999 on elsewhere", False)]
)
def test_where_the_file_system_has_no_locks_the_word_of_the_file_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: str, taken: bool
) -> None:
    """F10: a process of another machine cannot be asked whether it lives."""

    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    (tmp_path / LOCK).write_text(holder.replace("HERE", socket.gethostname()) + " since 2026-01-01 00:00:00")
    monkeypatch.setattr(fcntl, "flock", none)
    if taken:
        with alone(tmp_path):
            pass
    else:
        with pytest.raises(MaekitError, match=r"E-ENV-BUSY.*if it is gone, delete"), alone(tmp_path):
            pass


def test_a_process_may_look_into_the_folder_while_the_main_one_tidies_up(tmp_path: Path) -> None:
    """F18: the main process of a run deletes what a kill left; what another has just tried to write is no error."""
    settings = resolve(Pretrain, flags={"data": "builtin:fashion"})[0]
    ended = threading.Event()

    def tidy() -> None:
        while not ended.is_set():
            for file in tmp_path.glob(".tmp-*"):
                file.unlink(missing_ok=True)

    main = threading.Thread(target=tidy)
    main.start()
    try:
        for _ in range(300):
            assert open_run(tmp_path, "pretrain", settings).resolved is None
    finally:
        ended.set()
        main.join()
