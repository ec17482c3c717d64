"""Memory that was freed is kept: counted in page faults of a process of its own, not in time."""

import subprocess
import sys
from pathlib import Path

import pytest

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FAULTS = """
import resource, sys, torch
from maekit.train.allocator import keep_freed_memory

torch.set_num_threads(1)
if sys.argv[1] == "kept":
    assert keep_freed_memory()

def step():
    held = [torch.ones(2**18 * n) for n in (1, 2, 3, 40)]  # MiB; the last is always mapped by itself
    return sum(float(one[0]) for one in held)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

before = faults()
step()
first = faults() - before
step()
at = faults()
for _ in range(10):
    assert step() == 4
print(first, faults() - at)
"""


def counted(how: str) -> tuple[int, int]:
    """Return the faults of the first step, and of ten more after the second."""
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    first, rest = done.stdout.split()
    return int(first), int(rest)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the GNU C library")
def test_a_step_takes_the_memory_of_the_step_before() -> None:
    (plain, as_it_comes), (first, kept) = counted("as it comes"), counted("kept")
    large = LARGE_PAGES.read_text() if LARGE_PAGES.exists() else "[never]"
    if "[always]" not in large:
        assert as_it_comes >= 10 * 40 * 256  # pages of 4 KiB, in every step
    assert kept < 10 * 256  # at most once some of it
    if "[madvise]" in large:
        assert first < plain / 2
