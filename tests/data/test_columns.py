"""Names and numbers of a million images: as any list of the same values, in little memory, in no process twice."""

import pickle
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maekit.data.columns import Names, Numbers, RowNames
from maekit.data.loader import Loader
from maekit.data.manifest import manifest
from maekit.data.source import FileSource, Source
from maekit.data.sources import open_source

MANY = 200_000
OF_ALL = 300e6 / 1.3e6
"""Bytes that one image of 1.3 million may take where all take 300 MB."""


def named(count: int) -> Iterator[list[str]]:
    """Yield paths as ImageNet has them, a thousand at a time."""
    for start in range(0, count, 1000):
        folder = f"train/n{start:08d}"
        yield [f"{folder}/n{start:08d}_{i}.JPEG" for i in range(min(1000, count - start))]


texts = st.lists(st.text(st.characters(codec="utf-8"), max_size=5), max_size=30)


@settings(max_examples=100, deadline=None)
@given(texts, st.data())
def test_names_are_a_sequence_of_the_same_strings(names: list[str], data: st.DataObject) -> None:
    subject = Names.of(names)
    assert subject == names and list(subject) == names and len(subject) == len(names) and subject.readable == names
    places = data.draw(st.lists(st.integers(0, len(names) - 1), max_size=40)) if names else []
    assert subject.take(places) == [names[i] for i in places]
    part = slice(*data.draw(st.tuples(*[st.none() | st.integers(-5, 40)] * 2)))
    assert subject[part] == names[part] and subject[part].take([]) == []
    assert pickle.loads(pickle.dumps(subject)) == names
    assert subject.readable.arrow.to_pylist() == names
    if names:
        assert subject[-1] == names[-1] and names[0] in subject and subject.index(names[0]) == names.index(names[0])
    with pytest.raises(IndexError):
        subject[len(names)]


def test_names_that_are_no_utf_8_find_their_file_and_can_be_written() -> None:
    subject = Names.of(["a.png", "latin\udcff.png"])
    assert subject[1].encode("utf-8", "surrogateescape") == b"latin\xff.png"
    assert list(subject.readable) == subject.readable.arrow.to_pylist() == ["a.png", "latin\\xff.png"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-(2**40), 2**40), max_size=30))
def test_numbers_are_a_sequence_of_the_same_integers(values: list[int]) -> None:
    subject = Numbers(values)
    assert subject == values and subject[1:] == values[1:] and all(type(value) is int for value in subject)
    assert pickle.loads(pickle.dumps(subject)) == values and np.array_equal(np.asarray(subject), values)


def test_names_of_rows_are_made_when_they_are_asked_for() -> None:
    subject = RowNames(Numbers(range(5)), ["empty.parquet", "a.parquet", "b.parquet"], [0, 0, 2])
    assert subject == ["a.parquet:0", "a.parquet:1", "b.parquet:0", "b.parquet:1", "b.parquet:2"]
    assert subject.take([4, 0]) == ["b.parquet:2", "a.parquet:0"] and RowNames(Numbers([3, 1])) == ["3", "1"]


def test_a_million_images_would_take_less_than_300_mb_at_the_start() -> None:
    """Names, labels, the manifest and the order of an epoch: all that a run makes of them, at the peak."""
    tracemalloc.start()
    try:
        keys = Names.of(named(MANY))
        source = FileSource("many", keys.readable, keys, Numbers(np.arange(MANY) // 1000), ["x"] * (MANY // 1000))
        object.__setattr__(source, "_sizes", Numbers(np.arange(MANY)))  # none of them is there
        source.fingerprint()
        kept = loader(source).order(0), source.subset(range(0, MANY, 2))
        held, peak = tracemalloc.get_traced_memory()
        manifest({"train": source})
        assert held < 0.6 * OF_ALL * MANY and max(peak, tracemalloc.get_traced_memory()[1]) < OF_ALL * MANY
        assert len(kept[1]) == MANY // 2
    finally:
        tracemalloc.stop()


class Made(Source):
    """Images that nothing has to be read for."""

    def read(self, i: int) -> Tensor:
        assert self.ids[i].endswith(".JPEG") and self.labels is not None and self.labels[i] == 7
        return torch.zeros(1, 4, 4)

    def sizes(self) -> list[int]:
        return []


class Held:
    """A view that shows how much memory its process has for itself, in kB."""

    def __call__(self, image: Tensor) -> Tensor:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return torch.tensor([[[sum(float(line.split()[1]) for line in lines if line.startswith("Private_"))]]])


def loader(source: Any, view: Any = None, **more: Any) -> Loader:
    return Loader(source, view, batch_size=1, micro_batch=1, mean=(0.0,), std=(1.0,), **more)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="no /proc")
def test_a_worker_holds_no_copy_of_the_names() -> None:
    held = []
    for count in (1000, MANY):
        keys = Names.of(named(count))
        source = Made("made", keys.readable, keys, Numbers(np.full(count, 7)))
        held.append(float(next(next(loader(source, Held(), workers=1).steps(0, 1)))["images"]))
    assert held[1] - held[0] < 2048, "their text alone takes 7 MB, strings of it 20"


def test_a_tree_is_listed_in_the_order_of_its_paths(tmp_path: Path) -> None:
    """Oracle: all paths sorted; names that end where others go on, folders between files."""
    names = [
        "a.png",
        "a/b.png",
        "a/c/d.png",
        "a/c.png",
        "a-b/x.png",
        "a b.png",
        "a.d/x.png",
        "ä/ö.png",
        "z.png",
        "aa/y.png",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "note.txt").touch()
    assert open_source(tmp_path).ids == sorted(names)
