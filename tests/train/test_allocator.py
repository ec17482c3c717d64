"""Memory that was freed is kept: counted in page faults of a process of its own, not in time."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from maekit.train.allocator import keep_freed_memory

torch.set_num_threads(1)
if sys.argv[1] == "kept":
    assert keep_freed_memory()

def step():
    held = [torch.ones(2**18 * n) for n in (1, 2, 3, 24)]  # 1, 2, 3 and 24 MiB
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
    (_, as_it_comes), (first, kept) = counted("as it comes"), counted("kept")
    assert as_it_comes > 10 * 1024  # a page of 4 KiB for most of 30 MiB, again and again
    assert kept < as_it_comes / 20
    assert first < 30 * 256  # large pages, unless this system has none
