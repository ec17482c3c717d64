"""What holds for all tests: one thread, no GPU tests without a GPU."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch; subprocesses inherit it
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none; torch is imported only to find out."""
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
