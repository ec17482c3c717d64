"""Pictures that stay decoded in memory: the same batches, one copy for all processes, and none waits for a dead one."""

import logging
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from maekit.data.augment import CropsView, EvalView, FinetuneView, PretrainView, ProbeView
from maekit.data.decoded import Decoded, room_for
from maekit.data.loader import Batch, Loader
from maekit.data.source import FileSource
from maekit.data.sources import open_source

COUNT, BATCH, STEPS = 24, 8, 9
"""Three epochs."""
ROOM = 2**20


class Counting:
    """A source that counts, in its process, how often each image is read."""

    def __init__(self, source: FileSource) -> None:
        self.source, self.read_of = source, Counter[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["source"], name)

    def __len__(self) -> int:
        return len(self.source)

    def __reduce__(self) -> Any:
        return Counting, (self.source,)

    def read(self, index: int) -> bytes:
        self.read_of[index] += 1
        return self.source.read(index)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> FileSource:
    """Pictures of several sizes and formats, grey ones and one with transparency among them; one is broken."""
    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(COUNT):
        shape = (24 + i % 5, 30, 3) if i % 3 else (24, 20 + i % 7)
        picture = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))
        picture.save(root / f"{i:02d}.{('png', 'jpg', 'webp')[i % 3]}")
    (root / "05.webp").write_bytes(b"<html>")
    opened = open_source(root)
    assert isinstance(opened, FileSource)
    return opened


def loader(source: Any, **changes: Any) -> Loader:
    settings: dict[str, Any] = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "seed": 7, "num_noise": 4}
    settings |= {"batch_size": BATCH, "micro_batch": BATCH, "decoded_bytes": ROOM} | changes
    return Loader(source, settings.pop("view", PretrainView((16, 16))), **settings)


def batches(subject: Loader) -> list[Batch]:
    return [batch for step in subject.steps(0, STEPS) for batch in step]


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a[name], b[name]) for a, b in zip(left, right, strict=True) for name in a
    )


@pytest.mark.parametrize(
    "view",
    [
        PretrainView((16, 16), color_jitter=0.4),
        PretrainView((16, 16), scale=(1.0, 1.0), flip=False),
        PretrainView((16, 16), crop="fixed"),
        PretrainView((16, 16), flip=False, cut_only=True),
        ProbeView((16, 16)),
        FinetuneView((16, 16), auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4),
        FinetuneView((16, 16), auto_augment="tensor-m9-n2"),
        EvalView((24, 30), 1.0),
        CropsView((16, 16), 0.875),
    ],
    ids=lambda view: type(view).__name__,
)
def test_batches_are_the_same_and_each_picture_is_decoded_once(source: FileSource, view: Any) -> None:
    """All views: none of them changes what is kept."""
    plain = batches(loader(source, view=view, decoded_bytes=0))
    counting = Counting(source)
    assert same(batches(loader(counting, view=view)), plain)
    assert set(counting.read_of) == set(range(COUNT))
    assert {index for index, times in counting.read_of.items() if times > 1} == {5}  # the broken one


def test_what_one_worker_has_decoded_every_process_has(source: FileSource) -> None:
    """F22: and the batches are those of no worker."""
    subject = loader(source, workers=2)
    assert same(batches(subject), batches(loader(source, decoded_bytes=0)))
    decoded, counting = subject.samples.decoded, Counting(source)
    assert decoded is not None and [i for i in range(COUNT) if decoded.get(i) is None] == [5]
    subject.samples.source, subject.workers = counting, 0  # type: ignore[assignment]
    batches(subject)
    assert set(counting.read_of) == {5}


def picture(value: int, side: int = 10) -> Tensor:
    return torch.full((3, side, side), value, dtype=torch.uint8)


def test_where_not_all_pictures_fit_none_is_kept() -> None:
    subject = Decoded(100, 100 * 299)
    for i in range(100):
        subject.offer(i, picture(i))
    assert subject.expected is None and all(subject.get(i) is None for i in range(100))


def test_pictures_that_turn_out_larger_than_the_first_never_take_more_than_is_allowed() -> None:
    subject = Decoded(10, 3000)
    for i in range(10):
        subject.offer(i, picture(i, 10 if i < 5 else 20))
    kept = [i for i in range(10) if (found := subject.get(i)) is not None and torch.equal(found, picture(i))]
    assert kept == [0, 1, 2, 3, 4] and subject.expected is None


def test_no_memory_and_arrays_of_floats_mean_that_nothing_is_kept() -> None:
    subject = Decoded(2, 10_000)
    subject.offer(0, picture(1).float())
    assert subject.get(0) is None and subject.expected is None
    assert room_for(2, 0) is None and room_for(2, 10_000) is not None


LIMITED = """
import resource
from maekit.data.augment import PretrainView
from maekit.data.loader import Loader
from maekit.data.sources import open_source

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
    statistics = {"mean": (0.3,), "std": (0.3,), "decoded_bytes": 2**30, "workers": 1}
    source = open_source("builtin:fashion")
    loader = Loader(source, PretrainView((28, 28)), batch_size=8, micro_batch=8, **statistics)
    print(loader.samples.decoded, len(next(next(loader.steps(0, 1)))["ids"]))
"""


def test_where_no_file_may_be_so_large_pictures_and_names_are_not_shared(tmp_path: Path) -> None:
    """As under ``ulimit -f``: slower, and nothing else."""
    (tmp_path / "program.py").write_text(LIMITED)
    done = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, timeout=120)
    assert done.stdout == "None 8\n", done.stderr


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_dies_while_it_takes_space_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """F29: SIGKILL between taking space and announcing the picture."""
    subject = Decoded(4, 4 * 300)
    child = os.fork()
    if not child:
        monkeypatch.setattr(Decoded, "expected", property(lambda _: os.kill(os.getpid(), signal.SIGKILL)))
        subject.offer(0, picture(1))
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert subject.get(0) is None
    subject.offer(1, picture(2))
    found = subject.get(1)
    assert found is not None and torch.equal(found, picture(2))


def test_it_is_said_once_that_pictures_stay_in_memory(source: FileSource, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "maekit"):
        subject = loader(source)
        for each in (subject, subject, loader(source, decoded_bytes=COUNT * 100)):
            batches(each)
    told = [line for line in caplog.messages if "stay in memory" in line]
    assert told == [f"decoded images stay in memory: 0 MB for all {COUNT}"]


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="no /proc")
def test_room_that_is_not_used_takes_no_memory() -> None:
    def held() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = held()
    subject = Decoded(1_300_000, 2**30)
    assert subject.get(1_200_000) is None and held() - before < 2**24
