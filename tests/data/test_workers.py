"""Loader processes are killed, hang and crash: the batches stay the same, or one line says what is wrong."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from maekit.data import samples
from maekit.data.augment import EvalView
from maekit.data.loader import Batch, Loader
from maekit.data.sources import open_source
from maekit.data.workers import MOST_DEATHS
from maekit.errors import MaekitError

COUNT, BATCH = 24, 4
STEPS = 18
"""Three epochs."""


class Images:
    """Images by index, of which some do something else than being read; `marks` is a folder for what was done."""

    labels = targets = None

    def __init__(self, marks: Path, what: str = "", at: tuple[int, ...] = (), times: int = 10**6) -> None:
        self.ids = [f"{i}.png" for i in range(COUNT)]
        self.marks, self.what, self.at, self.times = marks, what, at, times

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> Tensor:
        if index in self.at and self._often_enough(index):
            self._do()
        return torch.full((3, 8, 8), index, dtype=torch.uint8)

    def _often_enough(self, index: int) -> bool:
        done = len(list(self.marks.glob(f"{index}-*")))
        (self.marks / f"{index}-{done}").touch()
        return done < self.times

    def _do(self) -> None:
        if self.what == "hang":
            time.sleep(3600)
        elif self.what in errno.errorcode.values():
            raise OSError(getattr(errno, self.what), os.strerror(getattr(errno, self.what)))
        elif self.what == "bad":
            raise MaekitError("E-DATA-IMAGE", "cannot use it")
        else:
            os.kill(os.getpid(), getattr(signal, self.what))


def loader(source: Any, workers: int = 2, **more: Any) -> Loader:
    settings: dict[str, Any] = {"batch_size": BATCH, "micro_batch": BATCH, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    return Loader(source, EvalView((8, 8), 1.0), workers=workers, num_noise=4, **(settings | more))


def batches(subject: Loader, stop: int = STEPS) -> list[Batch]:
    return [batch for step in subject.steps(0, stop) for batch in step]


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a[name], b[name]) for a, b in zip(left, right, strict=True) for name in a
    )


@pytest.fixture
def plain(tmp_path: Path) -> list[Batch]:
    return batches(loader(Images(tmp_path), workers=0))


def victims(before: set[Any]) -> list[int]:
    return sorted(child.pid for child in set(multiprocessing.active_children()) - before if child.pid)


@pytest.mark.parametrize(
    "kind", ["SIGKILL", *(pytest.param(x, marks=pytest.mark.slow) for x in ("SIGSEGV", "SIGTERM"))]
)
def test_a_worker_that_is_killed_is_replaced_and_the_batches_are_the_same(
    tmp_path: Path, plain: list[Batch], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """F29."""
    before, found, killed = set(multiprocessing.active_children()), [], 0
    for step in loader(Images(tmp_path)).steps(0, STEPS):
        found += list(step)
        if len(found) == 2:
            killed = victims(before)[0]
            os.kill(killed, getattr(signal, kind))
    # the batches that it had sent before its death are lost with it or not
    assert same(found, plain) and set(multiprocessing.active_children()) <= before
    told = [line for line in caplog.messages if "is lost" in line]
    assert len(told) <= 1 and all(f"pid {killed} was ended by {kind} at " in line for line in told)


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [1, 2])
def test_how_far_workers_are_ahead_changes_nothing(
    tmp_path: Path, plain: list[Batch], ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F22."""
    monkeypatch.setattr("maekit.data.workers.PREFETCH", ahead)
    assert same(batches(loader(Images(tmp_path))), plain)


def test_three_deaths_within_an_epoch_stop_with_the_last_one_named(tmp_path: Path) -> None:
    """F29: not the images' fault, for each is another one."""
    before, pids = set(multiprocessing.active_children()), []
    with pytest.raises(MaekitError, match="died 3 times in an epoch: found the last: pid") as caught:
        for step in loader(Images(tmp_path), workers=1, batch_size=1, micro_batch=1).steps(0, 1000):
            list(step)
            if len(pids) < MOST_DEATHS and (pid := victims(before)[-1]) not in pids:
                pids.append(pid)
                os.kill(pid, signal.SIGKILL)
    assert caught.value.code == "E-ENV-WORKER" and caught.value.exit_code == 5
    assert f"pid {pids[-1]} was ended by SIGKILL at " in str(caught.value) and len(pids) == MOST_DEATHS


@pytest.mark.parametrize("what", ["SIGSEGV", pytest.param("hang", marks=pytest.mark.slow)])
def test_an_image_in_which_workers_die_or_hang_twice_is_an_unreadable_image(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """F29, F30: two of them, more than three deaths, and each is explained by its image."""
    (tmp_path / "other").mkdir()
    expected = batches(loader(Images(tmp_path / "other", "bad", at=(5, 9)), workers=0))
    subject = loader(Images(tmp_path, what, at=(5, 9)), read_timeout=1, bad_log=tmp_path / "bad.jsonl")
    assert same(batches(subject), expected)
    how = "hung for more than 1 s" if what == "hang" else "was ended by SIGSEGV"
    listed = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert sorted(entry["id"] for entry in listed) == ["5.png", "9.png"]
    assert all(f"loader processes {how} in it, 2 times" in entry["reason"] for entry in listed)
    assert any(f"{how} at 5.png" in line for line in caplog.messages)


def test_an_image_that_hangs_once_is_read_again(tmp_path: Path, plain: list[Batch]) -> None:
    """F30."""
    subject = loader(Images(tmp_path, "hang", at=(7,), times=1), read_timeout=1)
    assert same(batches(subject), plain) and not subject.bad.found


@pytest.mark.slow
def test_workers_that_are_at_nothing_and_send_nothing_are_replaced(tmp_path: Path, plain: list[Batch]) -> None:
    """F30: as after a SIGSTOP between two images."""
    before, found = set(multiprocessing.active_children()), []
    for step in loader(Images(tmp_path), read_timeout=0.5).steps(0, STEPS):
        found += list(step)
        if len(found) == 3:  # both have started
            for pid in victims(before):
                os.kill(pid, signal.SIGSTOP)
    assert same(found, plain) and set(multiprocessing.active_children()) <= before


@pytest.mark.parametrize(
    ("what", "workers"),
    [("EIO", 0), ("ESTALE", 0), ("ENOENT", 0), ("EACCES", 0), pytest.param("EIO", 2, marks=pytest.mark.slow)],
)
def test_an_error_of_the_file_system_that_passes_changes_nothing(
    tmp_path: Path, plain: list[Batch], what: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F32: three more tries."""
    monkeypatch.setattr(samples, "WAITS", (0.01, 0.01, 0.01))
    subject = loader(Images(tmp_path, what, at=(3, 8), times=3), workers=workers)
    assert same(batches(subject), plain) and not subject.bad.found


def test_an_error_that_stays_makes_an_unreadable_image_and_is_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F32."""
    monkeypatch.setattr(samples, "WAITS", (0.01, 0.01, 0.01))
    (tmp_path / "other").mkdir()
    source = Images(tmp_path, "ESTALE", at=(3,))
    subject = loader(source, workers=0)
    expected = batches(loader(Images(tmp_path / "other", "bad", at=(3,)), workers=0))
    assert same(batches(subject), expected)
    assert "Stale file handle" in subject.bad.found["3.png"] and len(list(tmp_path.glob("3-*"))) == 4 + 1 + 1


def test_a_file_that_is_away_for_a_moment_is_read(tmp_path: Path) -> None:
    """F32, with a real file: it comes back between the first and the second try."""
    for i in range(4):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    subject = loader(open_source(tmp_path), workers=0)
    (tmp_path / "2.png").rename(tmp_path / "2.away")
    back = subprocess.Popen(["sh", "-c", f"sleep 0.2; mv {tmp_path}/2.away {tmp_path}/2.png"])
    (batch,) = batches(subject, 1)
    assert back.wait() == 0 and sorted(batch["ids"].tolist()) == [0, 1, 2, 3] and not subject.bad.found


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_slow_image_gets_one_line_and_no_alarm(
    tmp_path: Path, plain: list[Batch], workers: int, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """F32."""
    for module in ("samples", "workers"):
        monkeypatch.setattr(f"maekit.data.{module}.SLOW_AFTER", 0.2)

    subject = loader(Slow(tmp_path), workers=workers)
    assert same(batches(subject), plain) and not subject.bad.found
    told = [line for line in caplog.messages if line.startswith("slow: ")]
    assert len(told) == sum(batch["ids"].tolist().count(6) for batch in plain)  # one each time that it is read
    assert all("6.png" in line for line in told)


class Slow(Images):
    """One image takes seconds."""

    def read(self, index: int) -> Tensor:
        if index == 6:
            time.sleep(2.5)
        return super().read(index)


# ------------------------------------------------------------------------------------------- F31: many bad images


def photos(folder: Path, count: int, bad: int) -> Path:
    """Write small pictures of which `bad`, evenly spread, are empty, cut, text, of strange bytes or folders."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    spoilt = {i * count // bad: i % 5 for i in range(bad)} if bad else {}
    for i in range(count):
        file = folder / f"{i:04d}.png"
        if spoilt.get(i) == 4:
            file.mkdir()
            continue
        Image.fromarray(pixels[i]).save(file)
        if i in spoilt:
            data = file.read_bytes()
            file.write_bytes([b"", data[: len(data) // 2], b"<html>", bytes(range(256))][spoilt[i]])
    return folder


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("bad", [1, 10])
def test_a_thousandth_or_a_hundredth_of_bad_images_is_passed_over(tmp_path: Path, bad: int, workers: int) -> None:
    """F31."""
    source = open_source(photos(tmp_path / "images", 1000, bad))
    more = {"batch_size": 100, "micro_batch": 50, "bad_log": tmp_path / "bad.jsonl", "looked_at": 1000}
    subject = loader(source, workers, **more)
    found = batches(subject, 20)
    seen = Counter(i for batch in found for i in batch["ids"].tolist())
    assert len(seen) == 1000 - bad and sorted(seen.values()) == [2] * (1000 - 2 * bad) + [4] * bad
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == len(subject.bad.found) == bad
    assert all(batch["images"].isfinite().all() for batch in found)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("bad", [20, 100])
def test_a_fifth_or_all_of_the_images_bad_stops(tmp_path: Path, bad: int, workers: int) -> None:
    """F31."""
    subject = loader(open_source(photos(tmp_path / "images", 100, bad)), workers)
    with pytest.raises(MaekitError) as caught:
        batches(subject, 25)
    assert caught.value.code == "E-DATA-BAD" and caught.value.exit_code == 3 and len(subject.bad.found) <= 6 + BATCH


def test_a_run_that_goes_on_stops_at_the_same_bad_image_as_one_that_was_not_interrupted(tmp_path: Path) -> None:
    """F31: stopped after every number of steps, also when a kill threw later steps away."""
    source = open_source(photos(tmp_path / "images", 100, 8))

    def steps_of(name: str, *stops: int) -> int:
        for start, stop in zip((0, *stops), (*stops, 25), strict=True):
            subject = loader(source, 0, bad_log=tmp_path / name)
            done = start
            try:
                for step in subject.steps(start, min(stop + 2, 25)):  # two steps of each launch are lost
                    list(step)
                    done += 1
            except MaekitError:
                if done < stop:
                    return done
        return 25

    whole = steps_of("whole.jsonl")
    assert 5 < whole < 25
    assert [steps_of(f"{stop}.jsonl", stop) for stop in range(1, whole)] == [whole] * (whole - 1)
    assert steps_of("often.jsonl", *range(1, whole)) == whole


def test_the_first_bad_image_stops_where_that_is_asked_for(tmp_path: Path) -> None:
    subject = loader(open_source(photos(tmp_path / "images", 100, 1)), 0, bad_images="stop")
    with pytest.raises(MaekitError, match=r"unreadable image: .*0000\.png.*--bad-images skip") as caught:
        batches(subject, 25)
    assert caught.value.exit_code == 3


# ------------------------------------------------------------------------------ F33, F34: what the machine allows

PROGRAM = """
import sys, torch
torch.set_num_threads(2)
torch.rand(512, 512) @ torch.rand(512, 512)  # F34: OpenMP has run; a forked child could hang in its first product
from maekit.data.augment import PretrainView
from maekit.data.loader import Loader
from maekit.data.sources import open_source
from maekit.errors import MaekitError

if __name__ == "__main__":
    side = int(sys.argv[1])
    view, statistics = PretrainView((side, side)), {"mean": (0.3,), "std": (0.3,)}
    loader = Loader(open_source("builtin:fashion"), view, batch_size=64, micro_batch=64, workers=2, **statistics)
    try:
        for step in loader.steps(0, 3):
            print(len(next(step)["ids"]))
    except MaekitError as error:
        print(error)
"""


@pytest.fixture
def program(tmp_path: Path) -> Any:
    (tmp_path / "program.py").write_text(PROGRAM)

    def run(before: str, side: int) -> str:
        command = f"{before} {sys.executable} {tmp_path}/program.py {side}"
        environment = os.environ | {"OMP_NUM_THREADS": "2"}
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, env=environment)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_few_open_files_are_said_before_the_first_batch(program: Any) -> None:
    """F33: a hard limit cannot be raised, a soft one is. F34: and no worker hangs after OpenMP has run."""
    told = program("ulimit -n 64;", 28)
    assert "E-ENV-FILES" in told and "found at most 64 allowed" in told and "ulimit -n 1024, or --workers 0" in told
    assert program("ulimit -Sn 64;", 28) == "64\n64\n64\n"


LARGE = """
import resource, sys
import numpy as np
from PIL import Image
from maekit.data.augment import PretrainView
from maekit.data.loader import Loader
from maekit.data.sources import open_source
from maekit.errors import MaekitError

for i in range(2):
    Image.fromarray(np.zeros((8000, 8000), np.uint8)).save(f"{sys.argv[1]}/{i}.png")
view, statistics = PretrainView((8, 8)), {"mean": (0.3,) * 3, "std": (0.3,) * 3}
loader = Loader(open_source(sys.argv[1]), view, batch_size=2, micro_batch=2, **statistics)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, used + 2**26))
try:
    next(next(loader.steps(0, 1)))
except MaekitError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_an_image_that_memory_does_not_hold_is_no_bad_image(tmp_path: Path) -> None:
    """F33: 64 MB for 192 MB of pixels."""
    done = subprocess.run([sys.executable, "-c", LARGE, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "error[E-ENV-MEMORY]" in done.stdout and "0.png" in done.stdout, done.stderr
    assert "fewer --workers" in done.stdout and done.stdout.count("Try:") == 1


@pytest.mark.slow
def test_little_shared_memory_is_said_before_the_first_batch(program: Any) -> None:
    """F33: /dev/shm of 1 MB."""
    inside = "mount -t tmpfs -o size=1m none /dev/shm &&"
    if subprocess.run(["unshare", "-rm", "sh", "-c", f"{inside} true"], capture_output=True).returncode:
        pytest.skip("no mounts of one's own here")
    told = program(f"exec unshare -rm bash -c '{inside} exec \"$@\"' -", 224)
    assert "E-ENV-SHM" in told and "found 1.0 MB free" in told and "--shm-size" in told
    assert program(f"exec unshare -rm bash -c '{inside} exec \"$@\"' -", 28) == "64\n64\n64\n"


IMPORTS = "import os, time; print(os.getpid(), flush=True); {}; import maekit.data.orphan; time.sleep(60)"
PARENT = """
import os, subprocess, sys
os.environ["MAEKIT_PARENT"] = str(os.getpid())
subprocess.run([sys.executable, "-c", sys.argv[1]])
"""


@pytest.mark.parametrize("first", ["0", "time.sleep(0.5)"])
def test_a_fork_server_that_still_imports_ends_with_its_parent(first: str) -> None:
    """F43: when busy it imports for longer than it may outlive a kill -9 of its parent, also of one long gone."""
    command = [sys.executable, "-c", PARENT, IMPORTS.format(first)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        server = int(parent.stdout.readline())
        parent.kill()
        end = time.monotonic() + 10
        while _runs(server):
            assert time.monotonic() < end
            time.sleep(0.05)


SERVED = """
import time
from multiprocessing import forkserver, resource_tracker
from maekit.data.workers import start_server
start_server()
print(resource_tracker._resource_tracker._pid, forkserver._forkserver._forkserver_pid, flush=True)
time.sleep(60)
"""


def test_no_signal_to_the_whole_group_ends_what_serves_the_workers() -> None:
    """F13: nor at their very start; a tracker started anew would print a traceback for what it does not know."""
    with subprocess.Popen([sys.executable, "-c", SERVED], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        servers = [int(word) for word in parent.stdout.readline().split()]
        for kind in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            for server in servers:
                os.kill(server, kind)
        time.sleep(1)
        assert all(map(_runs, servers))
        parent.kill()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
