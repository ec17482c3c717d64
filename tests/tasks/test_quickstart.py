"""Quickstart from end to end on a user's own folders, kept to seconds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def labelled(classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of six images without parts: what is held out is chosen by quickstart."""
    root = tmp_path_factory.mktemp("labelled")
    for folder in sorted((classes / "train").iterdir())[:2]:
        (root / folder.name).mkdir()
        for file in sorted(folder.iterdir())[:6]:
            (root / folder.name / file.name).write_bytes(file.read_bytes())
    return root


@pytest.mark.slow
def test_a_labelled_folder_gives_a_report_with_scores_and_a_relaunch_goes_on(
    maekit: Run, labelled: Path, tmp_path: Path
) -> None:
    words = [
        "quickstart",
        "--data",
        labelled,
        "--minutes",
        "0.05",
        "--out",
        tmp_path / "q",
        "--device",
        "cpu",
        "--json",
    ]
    done = maekit(*words)
    assert done.code == 0 and "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr
    assert "recipe:" in done.stderr and Path(done.json["report"]).exists()
    assert set(done.json["knn"]) == {"MAE encoder", "random encoder", "raw pixels"}
    assert all(len(values) == 3 for values in done.json["few_labels"].values())
    page = (tmp_path / "q/report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and 'src="http' not in page
    for text in ("kNN", "from scratch", "Reconstructions", "Nearest neighbours", "maekit reconstruct"):
        assert text in page
    stages = sorted(path.name for path in (tmp_path / "q").iterdir() if path.is_dir())
    assert stages == sorted(
        ["pretrain", *(f"finetune-{arm}-{seed}" for arm in ("mae", "scratch") for seed in range(3))]
    )
    again = maekit(*words)
    assert again.code == 0 and again.json["state_sha256"] == done.json["state_sha256"]
    assert again.json == done.json and "finished already" in again.stderr
    for change in (["--seed", "7"], ["--img-size", "56"], ["--minutes", "0.1"]):
        other = maekit(*words, *change)
        assert other.code == 2 and "error[E-CONFIG-RUN]" in other.stderr, other.stderr


def test_a_folder_without_labels_gives_pictures_only(maekit: Run, flat: Path, tmp_path: Path) -> None:
    words = ["quickstart", "--data", flat, "--minutes", "0.02", "--out", tmp_path / "q", "--device", "cpu", "--json"]
    done = maekit(*words)
    assert done.code == 0 and "Traceback" not in done.stderr, done.stderr
    assert (
        "knn" not in done.json
        and (tmp_path / "q/report.html").exists()
        and (tmp_path / "q/reconstructions.png").exists()
    )


def test_other_images_in_the_same_folder_are_refused(maekit: Run, flat: Path, labelled: Path, tmp_path: Path) -> None:
    words = ["quickstart", "--minutes", "0.02", "--out", tmp_path / "q", "--device", "cpu", "--json"]
    stage = tmp_path / "q" / "pretrain"
    assert maekit(*words, "--data", flat).code == 0
    (tmp_path / "q" / "result.json").unlink()  # as if it had been stopped after its first stage
    before = (stage / "config.yaml").read_bytes()
    other = maekit(*words, "--data", labelled)
    assert other.code == 3 and "error[E-DATA-CHANGED]" in other.stderr, other.stderr
    assert (stage / "config.yaml").read_bytes() == before
