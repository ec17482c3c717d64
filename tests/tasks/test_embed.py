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
from maekit.interchange.weights import load_model

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
