"""What the loader delivers and what decoding costs: counts, pixels and refusals, never how fast it was."""

import multiprocessing
from pathlib import Path

import pytest
import sklearn.datasets
import torch

from maekit.bench.data import CUT, OURS, PAPERS, SCALED, Rate, decode_rates, loader_rates, workers_needed
from maekit.data.augment import PretrainView
from maekit.data.loader import Loader
from maekit.data.sources import open_source
from maekit.errors import MaekitError

PHOTOS = sorted((Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg"))


def test_our_pixels_are_those_of_the_papers_recipe_within_a_tenth_of_a_level(tmp_path: Path) -> None:
    """Oracle: Pillow and torchvision v1, on two photographs; of DCT scaling the difference is larger, and said."""
    (tmp_path / "broken.jpg").write_bytes(b"<html>")
    threads = torch.get_num_threads()
    rows = decode_rates([*PHOTOS, tmp_path / "broken.jpg"], size=64, seconds=0)
    assert [row.pipeline for row in rows] == [PAPERS, OURS, CUT, SCALED] and torch.get_num_threads() == threads
    assert rows[0].ratio == 1 and rows[0].difference == 0 and rows[1].difference <= 0.1 < rows[3].difference < 4
    assert 0 < rows[2].difference <= 0.1  # resized elsewhere, in floats
    assert all(row.images_per_second > 0 and row.ratio > 0 for row in rows)
    assert [row.pipeline for row in decode_rates(PHOTOS[:1], size=224, seconds=0)] == [PAPERS, OURS, CUT]
    with pytest.raises(MaekitError, match="found 1 files, none readable"):
        decode_rates([tmp_path / "broken.jpg"])


def test_rates_of_loaders_and_the_workers_that_a_step_needs() -> None:
    source = open_source("builtin:fashion", "val")

    def make(workers: int) -> Loader:
        return Loader(
            source, PretrainView((28, 28)), batch_size=64, micro_batch=32, mean=(0.3,), std=(0.3,), workers=workers
        )

    before = set(multiprocessing.active_children())
    rates = loader_rates(make, [0, 1], seconds=0.1, turns=2)
    assert set(multiprocessing.active_children()) <= before
    assert [rate.workers for rate in rates] == [0, 1]
    assert all(0 < rate.lowest <= rate.images_per_second <= rate.highest for rate in rates)
    made = [Rate(4, 900, 800, 950), Rate(1, 300, 290, 310), Rate(2, 580, 570, 590)]
    assert [workers_needed(made, need) for need in (10, 300, 301, 900, 901)] == [1, 1, 2, 4, None]
