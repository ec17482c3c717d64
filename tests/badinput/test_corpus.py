"""The corpus of section 3: more than 800 inputs, each with what comes of it, none with what must never happen.

Every case runs in this process through the front door; `test_the_command_says_the_same` runs a few of each family
through the real command. Images are tried alone, in a folder and in parquet, as they are in training.
"""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maekit.cli import main
from maekit.data.image import read_image
from maekit.errors import MaekitError

from . import checkpoints, commands, datasets, images
from .case import SENTINEL, check, judge, tree, watched

PICTURES = images.cases()
FAMILIES = {"data sets": datasets.cases(), "commands": commands.cases(), "checkpoints": checkpoints.cases()}
CASES = {f"{family}: {case.name}": case for family, cases in FAMILIES.items() for case in cases}
SOME = [name for name in CASES if "data sets" not in name][::14] + [name for name in CASES if "data sets" in name][::14]
"""Through the real command: more than 40."""


def test_the_corpus_has_its_size_and_no_name_twice() -> None:
    assert len(CASES) == sum(map(len, FAMILIES.values()))
    assert len(SOME) >= 40
    root, said = (
        Path(__file__).parents[2],
        {"SECURITY.md": r"\((\d+) inputs\)", "docs/reliability.md": r"bad inputs \((\d+)\)"},
    )
    numbers = [int(n) for name, told in said.items() for n in re.findall(told, (root / name).read_text("utf-8"))]
    assert numbers == [len(PICTURES) + len(CASES)] * 2


@pytest.mark.parametrize("name", PICTURES)
def test_an_image_is_refused_for_its_reason_or_read_to_its_pixels(name: str) -> None:
    picture = PICTURES[name]
    with watched(seconds=5, megabytes=100):
        if picture.said is not None:
            with pytest.raises(MaekitError, match=picture.said) as caught:
                read_image(picture.data, channels=3, name="folder/one.jpg")
            assert caught.value.code == "E-DATA-IMAGE" and "folder/one.jpg" in str(caught.value)
            assert str(caught.value).isprintable()
            return
        pixels = read_image(picture.data, channels=3, name=picture.name).numpy()
    assert pixels.shape[0] == 3
    right = picture.pixels(pixels) if callable(picture.pixels) else np.array_equal(pixels, picture.pixels)  # type: ignore[arg-type]
    assert right


def test_memory_and_code_of_a_case_are_seen_whatever_was_before_it() -> None:
    def fill() -> None:
        np.ones(2**26, np.uint8)  # 64 MB, given back at once

    with watched(megabytes=100):
        fill()
    for _ in range(2):  # the second time too: the peak begins anew
        with pytest.raises(AssertionError, match="too much memory"), watched(megabytes=50):
            fill()
    with pytest.raises(AssertionError, match=r"pickle\.find_class"), watched():
        pickle.loads(pickle.dumps(Path))


@pytest.mark.parametrize("form", ["folder", "parquet"])
def test_in_a_folder_and_in_parquet_the_same_images_are_skipped(
    form: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = set()
    if form == "folder":
        place = tmp_path / "set"
        place.mkdir()
        for number, picture in enumerate(PICTURES.values()):
            file = place / f"{number}{Path(picture.name).suffix}"
            file.write_bytes(picture.data)
            bad |= {file.name} if picture.said else set()
    else:
        place = tmp_path / "set.parquet"
        pq.write_table(pa.table({"image": [picture.data for picture in PICTURES.values()]}), place)
        bad = {f"set.parquet:{number}" for number, picture in enumerate(PICTURES.values()) if picture.said}
    before = tree(tmp_path)
    assert main(["data", str(place), "--channels", "3", "--json"]) == 0
    out, err = capfd.readouterr()
    part = json.loads(out.splitlines()[-1])["parts"]["all"]
    assert {one["id"] for one in part["bad"]} == bad
    assert part["seen"] == len(PICTURES) and "Traceback" not in err and tree(tmp_path) == before


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_gets_its_line_and_nothing_that_must_never_happen(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    check(CASES[name], tmp_path, monkeypatch, capfd)
    assert not (tmp_path / "cwd" / SENTINEL).exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SOME if "\0" not in CASES[name].words])
def test_the_command_says_the_same(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    for folder in ("given", "cwd"):
        (tmp_path / folder).mkdir()
    case.lay(tmp_path / "given")
    before = tree(tmp_path / "given")
    words = [sys.executable, "-m", "maekit", *case.argv(tmp_path / "given")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=tmp_path / "cwd")
    judge(case, done.returncode, done.stdout, done.stderr)
    assert tree(tmp_path / "given") == before and not list((tmp_path / "cwd").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PICTURES)[:: len(PICTURES) // 5 + 1])
def test_the_command_says_the_same_of_an_image_alone(name: str, tmp_path: Path) -> None:
    picture = PICTURES[name]
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / f"x{Path(picture.name).suffix}").write_bytes(picture.data)
    words = [sys.executable, "-m", "maekit", "data", str(tmp_path / "given"), "--channels", "3", "--json"]
    before = tree(tmp_path)
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr and tree(tmp_path) == before, done.stderr
    (bad,) = json.loads(done.stdout.splitlines()[-1])["parts"]["all"]["bad"] or [None]
    assert (bad is None) == (picture.said is None)
    assert bad is None or re.search(str(picture.said), bad["reason"])
