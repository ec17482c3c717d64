"""F42: thousands of steps need no more memory, files, threads and shared memory than hundreds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "long_life.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_thousand_steps_need_no_more_than_their_first_fifth() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--steps", "2000", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["processes"]["most"] == 3 and not found["grown"]
