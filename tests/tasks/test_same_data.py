"""F26: a run that goes on sees the images that it began with, or it says which are others."""

import io
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

import maekit as package
from maekit.data.manifest import FILE, difference, manifest
from maekit.data.source import FileSource
from maekit.data.sources import open_source
from maekit.errors import MaekitError


@pytest.fixture(scope="module")
def begun(flat: Path, tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``data/`` with 20 images in two folders, and a run that was stopped after two steps, contents hashed."""
    root = tmp_path_factory.mktemp("begun")
    for at, file in enumerate(sorted(flat.iterdir())[:20]):
        place = root / "data" / "ab"[at % 2] / file.name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    for name, more in (("hashed", {"verify_data": True}), ("plain", {})):
        settings = {**tiny, "data": str(root / "data"), "out": root / name, "stop_at": 2, **more}
        assert package.pretrain(settings).exit_code == 75
    return root


@pytest.fixture
def root(begun: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "root"))


@pytest.fixture
def go_on(root: Path, tiny: dict[str, Any]) -> Callable[..., Any]:
    def run(name: str = "plain", **more: Any) -> Any:
        return package.pretrain({**tiny, "data": str(root / "data"), "out": root / name, "stop_at": 4, **more})

    return run


def add(data: Path) -> None:
    shutil.copy(data / "a/00.png", data / "a/more.png")


def remove(data: Path) -> None:
    (data / "a/02.png").unlink()


def rename(data: Path) -> None:
    (data / "a/02.png").rename(data / "a/zz.png")


def grow(data: Path) -> None:
    with (data / "b/01.png").open("ab") as file:
        file.write(b"\0")


def new_class(data: Path) -> None:
    (data / "c").mkdir()
    for i in range(7):
        shutil.copy(data / "a/00.png", data / f"c/{i}.png")


def other_class(data: Path) -> None:
    (data / "b").rename(data / "d")


def swap(data: Path) -> None:
    """Swap the contents of two images of one size, and put their times back."""
    files = [data / "a/04.png", data / "a/06.png"]
    for file, colour in zip(files, (10, 200), strict=True):
        file.write_bytes(bmp(colour))
    times = [file.stat() for file in files]
    both = [file.read_bytes() for file in files]
    for file, content, old in zip(files, reversed(both), times, strict=True):
        file.write_bytes(content)
        os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns))


def bmp(colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((28, 28), colour, np.uint8)).save(buffer, "BMP")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (add, "found 21 images, 1 added: +a/more.png, expected the same 20"),
        (remove, "found 19 images, 1 removed: -a/02.png"),
        (rename, "found 20 images, 1 added, 1 removed: +a/zz.png, -a/02.png"),
        (grow, "found 20 images, 1 changed: ~b/01.png"),
        (new_class, "found 27 images, 7 added: +c/0.png, +c/1.png, +c/2.png, +c/3.png, +c/4.png, expected"),
        (other_class, "found 20 images, 10 added, 10 removed: +d/01.png, +d/03.png"),
    ],
)
def test_other_images_are_refused_by_name_or_accepted_and_noted(
    root: Path, go_on: Callable[..., Any], change: Callable[[Path], None], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    change(root / "data")
    started = time.monotonic()
    with pytest.raises(MaekitError) as caught:
        go_on()
    assert caught.value.code == "E-DATA-CHANGED" and caught.value.exit_code == 3 and time.monotonic() - started < 5
    assert told in str(caught.value) and "--data-changed accept" in str(caught.value)
    if change not in (add, new_class):
        return
    (root / "plain/bad_files.jsonl").write_text('{"id": "a/00.png", "reason": "mended since", "step": 0}\n')
    assert go_on(data_changed="accept").exit_code == 75 and "going on with other images" in caplog.text
    config = yaml.safe_load((root / "plain/config.yaml").read_text())
    (note,) = config["resolved"]["data_changes"]
    added = 7 if change is new_class else 1
    assert (note["added"], note["images"], len(note["first"])) == (added, 20 + added, min(5, added))
    assert (root / "plain/before-1-bad_files.jsonl").exists() and not (root / "plain/bad_files.jsonl").exists()
    assert config["resolved"]["images"] == note["images"] and config["data_changed"] == "stop"
    assert go_on(stop_at=5).exit_code == 75  # what was accepted is what it is compared with from now on


def test_swapped_contents_of_one_size_are_found_where_that_is_asked_for(
    begun: Path, tmp_path: Path, tiny: dict[str, Any]
) -> None:
    data = Path(shutil.copytree(begun / "data", tmp_path / "data"))
    for name, colour in (("04", 10), ("06", 200)):
        (data / f"a/{name}.png").write_bytes(bmp(colour))
    settings = {**tiny, "data": str(data), "out": tmp_path / "run"}
    assert package.pretrain({**settings, "stop_at": 1, "verify_data": True}).exit_code == 75
    swap(data)
    assert package.pretrain({**settings, "stop_at": 2}).exit_code == 75  # not looked for
    with pytest.raises(MaekitError, match=r"found 20 images, 2 changed: ~a/04.png, ~a/06.png"):
        package.pretrain({**settings, "verify_data": True})
    accepted = package.pretrain({**settings, "verify_data": True, "data_changed": "accept", "stop_at": 3})
    assert accepted.exit_code == 75
    assert package.pretrain({**settings, "verify_data": True, "stop_at": 4}).exit_code == 75


def test_contents_that_were_not_hashed_at_the_start_are_from_then_on(
    root: Path, go_on: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert go_on("hashed", verify_data=True).exit_code == 75 and "were not hashed" not in caplog.text
    assert go_on(verify_data=True).exit_code == 75 and "contents were not hashed when the run began" in caplog.text
    data = (root / "data/a/00.png").read_bytes()
    (root / "data/a/00.png").write_bytes(data[:-1] + b"\1")
    for name in ("plain", "hashed"):
        with pytest.raises(MaekitError, match=r"1 changed: ~a/00\.png"):
            go_on(name, verify_data=True)


def test_a_run_without_the_list_is_compared_by_its_fingerprint(root: Path, go_on: Callable[..., Any]) -> None:
    """Killed before it was written, or begun by an older version."""
    (root / "plain" / FILE).unlink()
    (root / "hashed" / FILE).write_bytes(b"half")
    assert go_on().exit_code == 75 and (root / "plain" / FILE).exists()
    add(root / "data")
    with pytest.raises(MaekitError, match="found 21 images, expected the same 20"):
        go_on("hashed")


def test_masks_belong_to_what_a_run_reads(begun: Path, tmp_path: Path, tiny: dict[str, Any]) -> None:
    np.save(tmp_path / "masks.npy", np.arange(16.0))
    settings = {**tiny, "data": str(begun / "data"), "out": tmp_path / "run", "mask_kind": "given"}
    settings |= {"mask_from": tmp_path / "masks.npy"}
    assert package.pretrain({**settings, "stop_at": 1}).exit_code == 75
    np.save(tmp_path / "masks.npy", np.arange(16.0)[::-1])
    with pytest.raises(MaekitError, match=r"1 changed: ~masks masks.npy"):
        package.pretrain(settings)


def test_images_to_score_on_belong_to_it_and_classes_must_stay(
    classes: Path, tmp_path: Path, tiny: dict[str, Any]
) -> None:
    """F26, F28: a fine-tuning has outputs for the classes that it began with."""
    data = Path(shutil.copytree(classes, tmp_path / "data"))
    settings: dict[str, Any] = {
        name: tiny[name]
        for name in ("model", "img_size", "channels", "patch_size", "embed_dim", "depth", "num_heads", "device")
    }
    settings |= {"from_scratch": True, "data": str(data), "out": tmp_path / "run", "steps": 3, "batch_size": 8}
    settings |= {"workers": 0, "auto_augment": None, "precision": "fp32"}
    assert package.finetune({**settings, "stop_at": 1}).exit_code == 75
    name = next((data / "val").rglob("*.png"))
    name.unlink()
    with pytest.raises(MaekitError, match=rf"1 removed: -val .*{name.name}"):
        package.finetune(settings)
    for part in ("train", "val"):
        shutil.copytree(data / part / "Coat", data / part / "Zebra")
    with pytest.raises(MaekitError, match="E-DATA-CLASSES"):
        package.finetune({**settings, "data_changed": "accept"})


def test_labels_order_and_parquet_files_count_too(tmp_path: Path) -> None:
    def listed(labels: list[int], ids: list[str]) -> pa.Table:
        return manifest({"train": FileSource("x", ids, ids, labels, ["cat", "dog"], str(tmp_path))})

    first = listed([0, 1], ["a", "b"])
    assert not difference(first, listed([0, 1], ["a", "b"]))
    assert difference(first, listed([1, 1], ["a", "b"])).changed == ["a"]
    assert str(difference(first, listed([1, 0], ["b", "a"]))) == "the same ones in another order"
    pq.write_table(pa.table({"image": [bmp(1), bmp(2)]}), tmp_path / "x.parquet")
    before = manifest({"train": open_source(tmp_path / "x.parquet")})
    pq.write_table(pa.table({"image": [bmp(1), bmp(2), bmp(3)]}), tmp_path / "x.parquet")
    found = difference(before, manifest({"train": open_source(tmp_path / "x.parquet")}))
    assert found.added == ["x.parquet:2"] and found.changed == ["x.parquet"]
