"""Every command and every program of the README runs; the quickstart shows what it claims."""

import json
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from maekit.data.sources import open_source

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
COMMANDS = [line[2:] for block in re.findall(r"```console\n(.*?)```", README, re.S) for line in block.splitlines()]
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.S)
SHORTER = {
    "--minutes 30": "--minutes 0.05",
    "--epochs 100": "--epochs 1",
    "--batch-size 64": "--batch-size 8",
}
"""What makes a command of hours one of seconds; everything else runs as it stands."""


def test_the_tests_that_promises_stand_on_are_there() -> None:
    root = Path(__file__).parent.parent
    named, held = (
        re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
        for text in ((root / "docs/reliability.md").read_text(encoding="utf-8"), README.split("## Five promises")[1])
    )
    assert len(named) > 20
    rows = README.split("## Five promises")[1].split("```")[0].splitlines()
    assert [bool(re.search(r"`tests/[\w/]+\.py::\w+`", row)) for row in rows if row.startswith("| **")] == [True] * 5
    assert {test for _, test in held} <= {test for _, test in named}
    for file, test in named:
        assert (root / file).is_file() and (not test or f"def {test}(" in (root / file).read_text()), (file, test)


def run(command: str, where: Path) -> str:
    words = shlex.split(command)
    assert words[0] == "maekit"
    done = subprocess.run([sys.executable, "-m", *words], cwd=where, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


def small_folder(place: Path, per_class: int = 12) -> Path:
    """Write real images into class folders."""
    source = open_source("builtin:fashion", "val")
    assert source.labels is not None and source.classes is not None
    for label in (0, 1):
        folder = place / source.classes[label].replace("/", "-")
        folder.mkdir(parents=True)
        chosen = [i for i, own in enumerate(source.labels) if own == label][:per_class]
        for i in chosen:
            data = source.read(i)
            assert isinstance(data, bytes)
            (folder / f"{i}.webp").write_bytes(data)
    return place


@pytest.mark.slow
def test_every_command_runs_in_order(tmp_path: Path) -> None:
    own = small_folder(tmp_path / "own")
    for command in COMMANDS:
        if "PATH" in command:
            command = command.replace("PATH", str(own))
            for long, short in SHORTER.items():
                command = command.replace(long, short)
        assert run(command, tmp_path).strip(), f"{command} says nothing"
    assert (tmp_path / "runs/tour/report.html").exists()
    assert (tmp_path / "runs/tour/features.parquet").exists()


def test_every_verb_stands_in_the_table_and_in_the_tour_or_below() -> None:
    from maekit.cli import VERBS

    verbs = {*VERBS, "recipes", "config"}
    assert set(re.findall(r"^\| `(\w+)` \|", README, re.M)) == verbs
    assert {command.split()[1] for command in COMMANDS} == verbs


def test_every_file_of_the_tree_exists_and_every_module_stands_in_it() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    named = set(re.findall(r"\b(\w+\.py)\b", tree))
    rooms = Path(__file__).parent.parent / "src" / "maekit"
    there = {path.name for path in rooms.rglob("*.py") if not path.name.startswith("__")}
    assert named <= there
    described = {"data", "model", "train"}
    assert {p.name for room in described for p in (rooms / room).glob("[a-z]*.py")} <= named


def test_the_programs_run(tmp_path: Path) -> None:
    assert len(PROGRAMS) == 1
    for program in PROGRAMS:
        file = tmp_path / "program.py"
        file.write_text(program)
        done = subprocess.run([sys.executable, str(file)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert re.match(r"loss \d\.\d+ torch\.Size\(\[64, 192\]\)", done.stdout), done.stdout


@pytest.mark.slow
def test_the_quickstart_beats_scratch_by_more_than_the_spread_of_its_seeds(tmp_path: Path) -> None:
    found = json.loads(run("maekit quickstart --device cpu --json --out q", tmp_path).splitlines()[-1])
    mae, scratch = found["few_labels"]["from MAE"], found["few_labels"]["from scratch"]
    gain = statistics.mean(mae) - statistics.mean(scratch)
    assert gain > max(statistics.stdev(mae), statistics.stdev(scratch))
    assert found["knn"]["MAE encoder"] > found["knn"]["random encoder"]
    assert found["probe"]["MAE encoder"] > found["probe"]["random encoder"]
    assert (tmp_path / "q" / "report.html").stat().st_size > 100_000
