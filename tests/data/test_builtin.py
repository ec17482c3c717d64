import hashlib
import pickle
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from maekit.data.image import read_image
from maekit.data.sources import BUILTIN, open_source

FASHION = BUILTIN / "fashion"
CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
PIXELS = {
    "train": "0a2de67fb4d1debd4c999d42c21a682835a8338fa7d8b75a7fe6acc1b5496d48",
    "val": "c2f7f68bd274ea70c9dfe3f57340e8232fc83e224524734241bee23d34491693",
}
"""SHA-256 over label and 784 pixel bytes of every row, in order."""


@pytest.mark.parametrize(("split", "per_class"), [("train", 1000), ("val", 200)])
def test_the_builtin_images_are_the_ones_that_were_drawn(split: str, per_class: int) -> None:
    source = open_source("builtin:fashion", split)  # pyright: ignore[reportArgumentType]
    assert source.labels is not None and source.classes == CLASSES
    assert Counter(source.labels) == dict.fromkeys(range(10), per_class)
    digest, distinct = hashlib.sha256(), set[bytes]()
    for i, label in enumerate(source.labels):
        image = read_image(source.read(i), channels=1)  # pyright: ignore[reportArgumentType]
        assert image.shape == (1, 28, 28)
        digest.update(bytes([label]) + image.numpy().tobytes())
        distinct.add(image.numpy().tobytes())
    assert digest.hexdigest() == PIXELS[split] and len(distinct) == len(source)


def test_the_builtin_files_name_their_origin_and_fit_the_package() -> None:
    assert sum(file.stat().st_size for file in FASHION.iterdir()) <= 6_000_000
    table = pq.read_table(FASHION / "test.parquet")
    assert table.column_names == ["image", "label", "label_name", "file"]
    assert table["file"][0].as_py().startswith("t10k/") and len(set(table["file"].to_pylist())) == 2000
    assert [CLASSES[label] for label in table["label"].to_pylist()] == table["label_name"].to_pylist()


def test_the_builtin_notice_has_the_licence_and_says_how_the_subset_was_drawn() -> None:
    notice = (FASHION / "NOTICE").read_text()
    for words in (
        "The MIT License",
        "Copyright (c) 2017 Zalando SE",
        "Permission is hereby granted",
        "SHA-256",
        "1708.07747",
    ):
        assert words in notice


def test_the_same_builtin_image_is_in_one_part_only() -> None:
    train, val = (set(pq.read_table(FASHION / f"{part}.parquet")["image"].to_pylist()) for part in ("train", "test"))
    assert not train & val


def test_a_builtin_source_travels_light_and_reads_the_same_elsewhere() -> None:
    source = open_source("builtin:fashion", "val")
    source.read(0)
    sent = pickle.dumps(source)
    assert len(sent) < 100_000 and pickle.loads(sent).read(1999) == source.read(1999)


def test_reading_a_builtin_image_takes_less_than_a_fifth_of_a_millisecond() -> None:
    source = open_source("builtin:fashion", "val")
    source.read(0)
    started = time.process_time()
    for i in range(1000):
        read_image(source.read(i))  # pyright: ignore[reportArgumentType]
    # 70 microseconds on one core of a 2026 server; 200 leaves room for slow and busy ones
    assert (time.process_time() - started) / 1000 < 200e-6


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/usr/share/datasets/fashion-mnist").is_dir(), reason="needs Debian's package dataset-fashion-mnist"
)
def test_the_script_builds_the_same_bytes_again(tmp_path: Path) -> None:
    import importlib.util

    script = Path(__file__).parents[2] / "scripts/build_fashion.py"
    spec = importlib.util.spec_from_file_location("build_fashion", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.build(tmp_path)
    for name in ("train.parquet", "test.parquet"):
        assert (tmp_path / name).read_bytes() == (FASHION / name).read_bytes()
