import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maekit.errors import MaekitError
from maekit.settings import Data
from maekit.tasks.data import run


def fill(root: Path, *names: str) -> Path:
    for shade, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8 + shade, 9), (shade, 0, 255)).save(root / name)
    return root


def parts(path: Path | str, **options: Any) -> tuple[dict[str, Any], list[str], str]:
    result = run(Data(data=str(path), **options))
    metrics: Any = json.loads(json.dumps(result.metrics))
    assert result.exit_code == 0
    return metrics["parts"], metrics["notes"], result.text


def test_a_folder_with_parts_is_told_part_by_part(tmp_path: Path) -> None:
    found, notes, text = parts(fill(tmp_path, "train/a/1.png", "train/b/2.jpg", "val/a/3.png", "val/b/4.bmp"))
    assert found["train"]["images"] == 2 and found["train"]["classes"] == {"a": 1, "b": 1}
    assert found["val"]["formats"] == {"PNG": 1, "BMP": 1} and found["val"]["sizes"]["smallest"] == [9, 10]
    assert found["train"]["mean"][2] == pytest.approx(1, abs=0.02) and len(found["train"]["fingerprint"]) == 64
    assert notes == [] and "train" in text.splitlines()[1] and "  b  " in text


def test_bad_files_are_listed_and_are_no_failure(tmp_path: Path) -> None:
    fill(tmp_path, "good.png")
    (tmp_path / "bad\n\x1b[2J.jpg").write_bytes(b"<html>")
    os.mkfifo(tmp_path / "fifo.png")
    found, notes, text = parts(tmp_path)
    assert [bad["id"] for bad in found["all"]["bad"]] == ["bad\n\x1b[2J.jpg", "fifo.png"]
    assert "would be skipped:" in text and "HTML" in text and "\x1b" not in text and "bad\\n" in text
    assert not any("E-DATA-BAD" in note for note in notes)


def test_the_table_is_whole_even_where_training_would_stop(tmp_path: Path) -> None:
    fill(tmp_path, "good.png")
    for i in range(30):
        (tmp_path / f"bad{i}.png").write_bytes(b"")
    found, notes, text = parts(tmp_path)
    assert len(found["all"]["bad"]) == 30 and found["all"]["formats"] == {"PNG": 1}
    assert any("E-DATA-BAD: 30 of 31" in note for note in notes) and "… 10 more" in text and "height x width" in text


def test_a_set_of_nothing_but_bad_files_has_a_table(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"")
    found, notes, _ = parts(tmp_path)
    assert found["all"]["sizes"]["smallest"] is None and found["all"]["mean"] == [] and "E-DATA-BAD" in notes[0]


def test_duplicates_within_and_between_parts_are_found(tmp_path: Path) -> None:
    fill(tmp_path, "train/1.png", "train/2.png", "val/3.png")
    for copy in ("train/4.png", "val/5.png"):
        (tmp_path / copy).write_bytes((tmp_path / "train/1.png").read_bytes())
    found, notes, text = parts(tmp_path)
    assert found["train"]["duplicates"] == [["1.png", "4.png"]] and "the same bytes:" in text
    assert any("1 images of val are in train too" in note for note in notes)


def test_what_would_mislead_is_noted(tmp_path: Path) -> None:
    fill(tmp_path, "train/cat/1.png", "train/dog/3.png", "val/cat /2.png")
    (tmp_path / "train/cat/photo.heic").write_bytes(b"")
    _, notes, _ = parts(tmp_path)
    assert any("1 .heic" in note for note in notes) and any("E-DATA-CLASSES" in note for note in notes)
    assert any("val has one class only" in note for note in notes)
    assert any("held out" in note for note in parts(tmp_path / "train")[1])


def test_arrays_and_settings_are_read_as_training_reads_them(tmp_path: Path) -> None:
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", np.full((8, 8, 5), i, np.uint8))
    assert parts(tmp_path)[0]["all"]["channels"] == 5
    assert len(parts(tmp_path, channels=4)[0]["all"]["bad"]) == 3


def test_the_builtin_set_has_nothing_to_complain_about() -> None:
    found, notes, text = parts("builtin:fashion")
    assert notes == [] and found["train"]["images"] == 10_000 and found["val"]["images"] == 2_000
    assert set(found["val"]["classes"].values()) == {200} and not found["train"]["duplicates"]
    assert found["train"]["mean"] == pytest.approx([0.2857] * 3, abs=1e-4) and "Ankle boot" in text


@pytest.mark.skipif("MAEKIT_DATA" not in os.environ, reason="MAEKIT_DATA names no folder of real photographs")
def test_real_photographs_are_all_read() -> None:
    found, _, _ = parts(Path(os.environ["MAEKIT_DATA"]) / "photos")
    assert found["all"]["bad"] == [] and found["all"]["formats"] == {"JPEG": found["all"]["images"]}


def test_no_path_is_a_usage_error_and_no_data_a_data_error(tmp_path: Path) -> None:
    for settings, code, exit_code in ((Data(), "E-USAGE-DATA", 2), (Data(data=str(tmp_path)), "E-DATA-EMPTY", 3)):
        with pytest.raises(MaekitError) as caught:
            run(settings)
        assert caught.value.code == code and caught.value.exit_code == exit_code
