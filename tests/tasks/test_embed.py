"""Features in files that other tools open."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import maekit as package
from maekit.data.image import read_image
from maekit.data.sources import open_source
from maekit.errors import MaekitError
from maekit.interchange.weights import load_model
from maekit.tasks import features, streamed

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def settings(pretrained: Path, classes: Path) -> dict[str, Any]:
    return {"run": pretrained, "data": str(classes / "val"), "device": "cpu", "workers": 0}


def feature(run: Path, data: bytes, pool: str) -> torch.Tensor:
    model = load_model(run).eval()
    image = read_image(data, channels=1).unsqueeze(0) / 255
    with torch.no_grad():
        return model.features((image - model.mean[0]) / model.std[0], pool=pool)[0]


def test_parquet_holds_every_image_in_order(maekit: Run, pretrained: Path, classes: Path, tmp_path: Path) -> None:
    done = maekit(
        "embed", pretrained, "--data", classes / "val", "--out", tmp_path / "f.parquet", "--device", "cpu", "--json"
    )
    assert done.code == 0 and done.json["images"] == 100 and done.json["shape"] == [100, 96], done.stderr
    table = pq.read_table(tmp_path / "f.parquet")
    source = open_source(classes / "val")
    assert {"id", "path", "label", "embedding"} <= set(table.column_names)
    assert table["id"].to_pylist() == list(range(100)) and table["path"].to_pylist() == source.ids
    assert table["label"].to_pylist() == source.labels and source.classes is not None and source.labels is not None
    assert table["label_name"].to_pylist() == [source.classes[label] for label in source.labels]
    for i in (0, 42, 99):
        expected = feature(pretrained, bytes(source.read(i)), "mean")  # type: ignore[arg-type]
        torch.testing.assert_close(torch.tensor(table["embedding"][i].as_py()), expected, rtol=1e-4, atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["f.parquet"]


def test_an_array_has_its_ids_beside_it(settings: dict[str, Any], tmp_path: Path, classes: Path) -> None:
    package.embed({**settings, "out": tmp_path / "f.npy", "pool": "cls"})
    values = np.load(tmp_path / "f.npy")
    source = open_source(classes / "val")
    assert values.shape == (100, 96) and values.dtype == np.float32
    assert (tmp_path / "f.ids.txt").read_text().splitlines() == source.ids
    expected = feature(settings["run"], bytes(source.read(7)), "cls")  # type: ignore[arg-type]
    np.testing.assert_allclose(values[7], expected, rtol=1e-4, atol=1e-4)


def test_all_tokens(settings: dict[str, Any], tmp_path: Path, classes: Path) -> None:
    result = package.embed({**settings, "out": tmp_path / "f.npy", "pool": "tokens"})
    values = np.load(tmp_path / "f.npy")
    assert list(values.shape) == result.metrics["shape"] == [100, 17, 96]
    source = open_source(classes / "val")
    np.testing.assert_allclose(
        values[3],
        feature(settings["run"], bytes(source.read(3)), "tokens"),
        rtol=1e-4,
        atol=1e-4,  # type: ignore[arg-type]
    )


def test_images_without_labels_have_none(settings: dict[str, Any], flat: Path, tmp_path: Path) -> None:
    package.embed({**settings, "data": str(flat), "out": tmp_path / "f.parquet"})
    assert pq.read_table(tmp_path / "f.parquet")["label"].to_pylist() == [None] * 40


def test_an_unreadable_image_has_no_row_of_another(settings: dict[str, Any], flat: Path, tmp_path: Path) -> None:
    """A row must never hold the features of another image than the one it names."""
    for file in sorted(flat.iterdir())[:8]:
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "data/03.png").write_bytes(b"")
    package.embed({**settings, "data": str(tmp_path / "data"), "out": tmp_path / "f.parquet"})
    paths = pq.read_table(tmp_path / "f.parquet")["path"].to_pylist()
    assert paths == [f"{i:02d}.png" for i in (0, 1, 2, 4, 5, 6, 7)]


def test_many_parts_make_the_file_that_one_makes(
    settings: dict[str, Any], tmp_path: Path, classes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in sorted((classes / "val").rglob("*.png")):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / file.name).write_bytes(file.read_bytes())
    broken = sorted((tmp_path / "data").iterdir())[23]
    broken.write_bytes(b"")
    settings = {**settings, "data": str(tmp_path / "data")}
    for pool in ("mean", "tokens"):
        package.embed({**settings, "pool": pool, "out": tmp_path / f"{pool}.npy"})
    package.embed({**settings, "out": tmp_path / "one.parquet"})
    monkeypatch.setattr(streamed, "PART_ROWS", 8)
    monkeypatch.setattr(features, "PATCHES_PER_PASS", 8 * 16)
    for pool in ("mean", "tokens"):
        result = package.embed({**settings, "pool": pool, "out": tmp_path / f"{pool}-parts.npy"})
        one, many = (np.load(tmp_path / name) for name in (f"{pool}.npy", f"{pool}-parts.npy"))
        assert result.metrics["shape"] == [99, *one.shape[1:]] == list(many.shape)
        np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-5)
    package.embed({**settings, "out": tmp_path / "many.parquet"})
    one, many = (pq.read_table(tmp_path / name) for name in ("one.parquet", "many.parquet"))
    assert many.schema == one.schema and many["path"].equals(one["path"])
    assert many["id"].to_pylist() == [i for i in range(100) if i != 23]
    assert (tmp_path / "mean-parts.ids.txt").read_text().splitlines() == many["path"].to_pylist()
    np.testing.assert_array_equal(
        np.array(many["embedding"].to_pylist(), np.float32), np.load(tmp_path / "mean-parts.npy")
    )


def test_a_stopped_file_is_gone_on_with(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(streamed, "PART_ROWS", 8)
    monkeypatch.setattr(features, "PATCHES_PER_PASS", 8 * 16)
    (tmp_path / "f.ids.txt").mkdir()  # stops it at the very end
    with pytest.raises(MaekitError, match="cannot write"):
        package.embed({**settings, "out": tmp_path / "f.npy"})
    (tmp_path / "f.ids.txt").rmdir()
    assert not (tmp_path / "f.npy").exists()
    parts = tmp_path / ".f.npy.parts"
    for path in sorted(parts.glob("part-*"))[5:]:
        path.unlink()
    caplog.set_level("INFO")
    package.embed({**settings, "out": tmp_path / "f.npy"})
    assert "going on after 40 of 100 images" in caplog.text and not parts.exists()
    package.embed({**settings, "out": tmp_path / "g.npy"})
    assert (tmp_path / "f.npy").read_bytes() == (tmp_path / "g.npy").read_bytes()


def test_a_name_of_several_lines_stays_one_line(pretrained: Path, flat: Path, tmp_path: Path) -> None:
    for name, image in zip(("a.png", "b\nc.png", "d.png"), sorted(flat.iterdir()), strict=False):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / name).write_bytes(image.read_bytes())
    out = tmp_path / "f.npy"
    package.embed({"run": pretrained, "data": str(tmp_path / "images"), "out": out, "device": "cpu", "workers": 0})
    assert out.with_suffix(".ids.txt").read_text().splitlines() == ["a.png", "b\\nc.png", "d.png"]
    assert len(np.load(out)) == 3
