"""A fault happens at the place, the time and in the way that the environment says, and nowhere else."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from maekit import failpoints
from maekit.errors import MaekitError


def in_child(variable: str, program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"from maekit.failpoints import reach\n{program}"],
        env={**os.environ, failpoints.VARIABLE: variable}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_a_fault_happens_at_its_time_only() -> None:
    done = in_child(
        "a:on@2,b:on@2+", "print([reach('a') for _ in range(4)], [reach('b') for _ in range(4)], reach('c'))"
    )
    assert done.stdout.strip() == "[False, True, False, False] [False, True, True, True] False"


@pytest.mark.parametrize(("action", "number"), [("enospc", errno.ENOSPC), ("eio", errno.EIO), ("emfile", errno.EMFILE)])
def test_an_errno_is_raised_as_the_system_would(action: str, number: int) -> None:
    done = in_child(f"a:{action}", "try: reach('a')\nexcept OSError as e: print(e.errno)")
    assert done.stdout.strip() == str(number)


@pytest.mark.parametrize(("action", "number"), [("kill", signal.SIGKILL), ("term", signal.SIGTERM)])
def test_a_signal_reaches_the_process_itself(action: str, number: signal.Signals) -> None:
    assert in_child(f"a:{action}", "reach('a')").returncode == -number


@pytest.mark.parametrize("wrong", ["a", "a:nonsense", ":kill", "a:kill@0", "a:kill@x"])
def test_a_variable_that_says_nothing_known_is_refused(wrong: str) -> None:
    with pytest.raises(MaekitError, match=failpoints.VARIABLE):
        failpoints.read(wrong)
