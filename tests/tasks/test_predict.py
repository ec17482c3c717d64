"""What a classifier says of every image, in files that other tools open; stopped anywhere and gone on with."""

import csv
import io
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image

import maekit as package
from maekit.data.augment import eval_view
from maekit.data.image import read_image
from maekit.data.sources import open_source
from maekit.errors import MaekitError
from maekit.interchange.weights import load_classifier, metadata
from maekit.model.heads import classifier
from maekit.model.mae import create_model
from maekit.tasks import streamed

Run = Callable[..., Any]
NAMES = ["Ankle boot", "Bag", "Coat", "Dress", "Pullover", "Sandal", "Shirt", "Sneaker", "T-shirt-top", "Trouser"]


def weights(path: Path, classes: list[str], seed: int = 0, outputs: int = 0) -> Path:
    """Write a small classifier that says different things of different images."""
    torch.manual_seed(seed)
    model = create_model(
        "vit_tiny_patch16_224", img_size=28, patch_size=7, in_chans=1, embed_dim=16, depth=1, num_heads=2,
        decoder_dim=16, decoder_depth=1, decoder_heads=2,
    )  # fmt: skip
    model.set_statistics((0.3,), (0.35,))
    made = classifier(model, len(classes) or outputs)
    torch.nn.init.normal_(made.head.weight)  # type: ignore[arg-type]
    header = metadata(model, classes=classes or None, pool="mean")
    safetensors.torch.save_file(made.state_dict(), path, header)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights(tmp_path_factory.mktemp("weights") / "classifier.safetensors", NAMES)


@pytest.fixture
def predict(trained: Path, classes: Path, tmp_path: Path) -> Run:
    """``predict("p.parquet", ...)`` -> metrics and file."""

    def run(name: str, **changes: Any) -> tuple[dict[str, Any], Path]:
        base = {"run": trained, "data": str(classes / "val"), "out": tmp_path / name, "device": "cpu", "workers": 0}
        return dict(package.predict({**base, **changes}).metrics), tmp_path / name

    return run


def probabilities(path: Path, data: bytes) -> torch.Tensor:
    """Compute by hand what a classifier says of one image."""
    found = load_classifier(path)
    image = eval_view(read_image(data, channels=1), (28, 28)) / 255
    with torch.no_grad():
        return found.model((image[None] - 0.3) / 0.35).softmax(1)[0]


def lines_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8"))))


def test_parquet_holds_every_image_in_order(predict: Run, trained: Path, classes: Path) -> None:
    metrics, file = predict("p.parquet")
    table, source = pq.read_table(file), open_source(classes / "val")
    assert table["id"].to_pylist() == list(range(100)) and table["path"].to_pylist() == source.ids
    assert source.labels is not None and table["label"].to_pylist() == source.labels
    assert table["label_name"].to_pylist() == [NAMES[label] for label in source.labels]
    shares = torch.tensor(table["probabilities"].to_pylist())
    for i in (0, 42, 99):
        expected = probabilities(trained, bytes(source.read(i)))  # type: ignore[arg-type]
        torch.testing.assert_close(shares[i], expected, rtol=1e-5, atol=1e-6)
    predicted = shares.argmax(1).tolist()
    assert len(set(predicted)) > 3
    assert table["predicted_index"].to_pylist() == predicted
    assert table["predicted"].to_pylist() == [NAMES[i] for i in predicted]
    assert table["probability"].to_pylist() == shares.max(1).values.tolist()
    about = json.loads((table.schema.metadata or {})[b"maekit"])
    assert about == {"format": 1, "classes": NAMES, "probabilities": "all"}
    assert metrics["images"] == 100 and metrics["skipped"] == 0
    assert metrics["classes"] == {name: predicted.count(i) for i, name in enumerate(NAMES)}
    assert metrics["top1"] == np.mean(np.equal(predicted, source.labels))
    assert [path.name for path in file.parent.iterdir()] == ["p.parquet"]


def test_csv_and_the_five_likeliest_say_the_same(predict: Run) -> None:
    table = pq.read_table(predict("p.parquet")[1])
    rows = lines_of(predict("p.csv")[1])
    assert [row["path"] for row in rows] == table["path"].to_pylist()
    shares = np.array(table["probabilities"].to_pylist())
    found = np.array([[float(row[f"p_{name}"]) for name in NAMES] for row in rows])
    np.testing.assert_allclose(found, shares, rtol=1e-6)
    top = pq.read_table(predict("top.parquet", probabilities="top")[1])
    assert top["predicted"].to_pylist() == [row["predicted"] for row in rows]
    order = np.array(top["top_index"].to_pylist())
    np.testing.assert_array_equal(order, np.argsort(-shares, 1, kind="stable")[:, :5])
    np.testing.assert_array_equal(np.array(top["top_probability"].to_pylist()), np.take_along_axis(shares, order, 1))
    lines = lines_of(predict("top.csv", probabilities="top")[1])
    assert [line["top3"] for line in lines] == [NAMES[i] for i in order[:, 2]]


def test_unlabelled_unknown_and_unreadable_images(predict: Run, flat: Path, tmp_path: Path) -> None:
    for name in ("=1+1.png", "@a.png", "b.png", "c.png"):
        (tmp_path / "flat").mkdir(exist_ok=True)
        (tmp_path / "flat" / name).write_bytes((flat / "00.png").read_bytes())
    (tmp_path / "flat/c.png").write_bytes(b"")
    metrics, file = predict("p.csv", data=str(tmp_path / "flat"))
    rows = lines_of(file)
    assert [row["path"] for row in rows] == ["'=1+1.png", "'@a.png", "b.png"]  # no formula for a spreadsheet
    assert {row["label"] for row in rows} == {""} and metrics["skipped"] == 1 and "top1" not in metrics
    for name in ("Bag", "Hat"):
        (tmp_path / "own" / name).mkdir(parents=True)
        (tmp_path / "own" / name / "0.png").write_bytes((flat / "00.png").read_bytes())
    metrics, file = predict("p.parquet", data=str(tmp_path / "own"))
    table = pq.read_table(file)
    assert table["label"].to_pylist() == [NAMES.index("Bag"), None] and "top1" not in metrics
    assert table["label_name"].to_pylist() == ["Bag", "Hat"]


def test_a_classifier_without_names_takes_those_of_as_many_classes(predict: Run, tmp_path: Path, flat: Path) -> None:
    bare = weights(tmp_path / "bare.safetensors", [], outputs=10)
    assert "top1" in predict("p.parquet", run=bare)[0]
    assert set(pq.read_table(tmp_path / "p.parquet")["predicted"].to_pylist()) <= set(NAMES)
    predict("p.parquet", run=bare, data=str(flat))
    assert set(pq.read_table(tmp_path / "p.parquet")["predicted"].to_pylist()) <= set(map(str, range(10)))


def test_the_picture_shows_some_of_the_images(predict: Run, tmp_path: Path) -> None:
    metrics, _ = predict("p.parquet", grid=tmp_path / "g.png", count=5, tta="flip", limit=40)
    assert metrics["images"] == 40 and metrics["grid"] == str(tmp_path / "g.png")
    picture = Image.open(tmp_path / "g.png")
    assert picture.width > 5 * 110 and len(picture.convert("L").getcolors() or []) > 50


def test_views_are_averaged(predict: Run, classes: Path, trained: Path) -> None:
    table = pq.read_table(predict("p.parquet", tta="flip", limit=1)[1])
    image = read_image((classes / "val" / table["path"][0].as_py()).read_bytes(), channels=1)
    found = load_classifier(trained).model
    views = torch.stack([image, image.flip(-1)]) / 255
    with torch.no_grad():
        expected = found((views - 0.3) / 0.35).softmax(1).mean(0)
    torch.testing.assert_close(torch.tensor(table["probabilities"][0].as_py()), expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------- in parts


def test_killed_and_stopped_it_goes_on_to_the_same_bytes(
    background: Run, maekit: Run, trained: Path, tmp_path: Path, until: Run
) -> None:
    words = [
        "predict",
        trained,
        "--data",
        "builtin:fashion",
        "--limit",
        8192,
        "--workers",
        0,
        "--device",
        "cpu",
        "--out",
    ]
    parts = tmp_path / ".p.parquet.parts"
    for kind, code, least in ((signal.SIGKILL, -9, 1), (signal.SIGINT, 75, 3)):
        running = background(*words, tmp_path / "p.parquet")
        until(lambda least=least: len(list(parts.glob("part-*"))) >= least)
        running.send(kind)
        assert running.wait().code == code, running.stderr
        assert not (tmp_path / "p.parquet").exists()
    done = maekit(*words, tmp_path / "p.parquet", "--json")
    assert done.code == 0 and done.json["images"] == 8192 and "going on after" in done.stderr
    assert not parts.exists()
    assert maekit(*words, tmp_path / "q.parquet").code == 0
    assert (tmp_path / "p.parquet").read_bytes() == (tmp_path / "q.parquet").read_bytes()


def test_on_a_full_disk_it_stops_and_goes_on(maekit: Run, trained: Path, tmp_path: Path) -> None:
    words = ["predict", trained, "--data", "builtin:fashion", "--limit", 2048, "--workers", 0, "--device", "cpu"]
    words += ["--out", tmp_path / "p.parquet"]
    done = maekit(*words, file_size=80_000)  # enough for a part
    assert done.code == 75 and "E-STOP-DISK" in done.stderr and "same command goes on" in done.stderr, done.stderr
    assert not (tmp_path / "p.parquet").exists()
    done = maekit(*words)
    assert done.code == 0 and "going on after 2048 of 2048" in done.stderr
    assert pq.read_table(tmp_path / "p.parquet").num_rows == 2048
    assert [path.name for path in tmp_path.iterdir()] == ["p.parquet"]


def left_behind(predict: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Leave both parts of 100 images behind: the picture cannot be written."""
    monkeypatch.setattr(streamed, "PART_ROWS", 64)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(MaekitError, match="cannot write"):
        predict("p.parquet", grid=tmp_path / "file/g.png")
    parts = tmp_path / ".p.parquet.parts"
    assert len(list(parts.iterdir())) == 3
    return parts


def test_parts_of_other_work_are_not_taken(
    predict: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left_behind(predict, monkeypatch, tmp_path)
    other = weights(tmp_path / "other.safetensors", NAMES, seed=1)
    _, file = predict("p.parquet", run=other)
    assert "begun anew" in caplog.text and "weights differs" in caplog.text
    assert pq.read_table(file).equals(pq.read_table(predict("q.parquet", run=other)[1]))


def test_a_damaged_part_is_computed_anew(
    predict: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = left_behind(predict, monkeypatch, tmp_path)
    file = parts / "part-000001.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))
    (parts / "part-000000.safetensors").write_bytes(b"")
    _, made = predict("p.parquet")
    assert caplog.text.count("computed anew") == 2
    assert pq.read_table(made).equals(pq.read_table(predict("q.parquet")[1]))


def test_an_unreadable_image_at_the_end_of_a_part(
    predict: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, classes: Path
) -> None:
    monkeypatch.setattr(streamed, "PART_ROWS", 64)
    source = open_source(classes / "val")
    (tmp_path / "data").mkdir()
    for i in range(100):
        (tmp_path / f"data/{i:02d}.png").write_bytes(bytes(source.read(i)) if i not in (63, 99) else b"")  # type: ignore[arg-type]
    metrics, file = predict("p.parquet", data=str(tmp_path / "data"))
    assert metrics["skipped"] == 2
    assert pq.read_table(file)["id"].to_pylist() == [i for i in range(100) if i not in (63, 99)]


@pytest.mark.slow
def test_each_image_once_at_two_processes(maekit: Run, trained: Path, classes: Path, tmp_path: Path) -> None:
    for name, more in (("one.parquet", []), ("two.parquet", ["--nproc", 2])):
        done = maekit("predict", trained, "--data", classes / "val", "--out", tmp_path / name, "--device", "cpu", *more)
        assert done.code == 0, done.stderr
    one, two = (pq.read_table(tmp_path / name) for name in ("one.parquet", "two.parquet"))
    assert one["id"].equals(two["id"]) and one["predicted"].equals(two["predicted"])
    np.testing.assert_allclose(one["probability"], two["probability"], rtol=1e-5)
