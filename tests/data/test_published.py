"""Data sets in the layouts in which they are published, in miniature: nothing is downloaded."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from maekit.data.sources import open_source
from maekit.errors import MaekitError


def images(root: Path, *names: str) -> None:
    for at, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 20 * at, np.uint8)).save(root / name)


def refused(code: str, path: Path, **options: Any) -> str:
    with pytest.raises(MaekitError) as caught:
        open_source(path, **options)
    assert caught.value.code == code and "\n" not in str(caught.value), caught.value
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ iNaturalist

CATEGORIES = [{"id": 2, "name": "c", "supercategory": "Aves"}, {"id": 0, "name": "a"}, {"id": 10, "name": "b"}]


def inaturalist(root: Path, year: int, part: str, labels: dict[str, int], **changes: Any) -> Path:
    """Write a part as the competition has it: train_val2018/Aves/12/x.jpg, train2018.json, val2018.json."""
    files = [f"train_val{year}/{name}" for name in labels]
    images(root, *files)
    text: dict[str, Any] = {
        "info": {"year": year},
        "images": [{"id": 7 * at, "file_name": file, "width": 8, "height": 8} for at, file in enumerate(files)],
        "annotations": [{"id": at, "image_id": 7 * at, "category_id": c} for at, c in enumerate(labels.values())],
        "categories": CATEGORIES,
        "licenses": [],
    }
    path = root / f"{part}{year}.json"
    path.write_text(json.dumps({key: value for key, value in (text | changes).items() if value is not None}))
    return path


@pytest.mark.parametrize("year", [2017, 2018, 2019])
def test_inaturalist_is_its_folder_or_its_json(tmp_path: Path, year: int) -> None:
    train = {"Aves/2/x.jpg": 2, "Mammalia/0/y.jpg": 0, "Aves/10/z.jpg": 10, "Aves/10/a.jpg": 10}
    file = inaturalist(tmp_path, year, "train", train)
    other = inaturalist(tmp_path, year, "val", {"Aves/2/v.jpg": 2, "Aves/0/v.jpg": 0, "Aves/10/v.jpg": 10})
    source = open_source(file)
    assert source.classes == ["a", "c", "b"], "in the order of the ids"
    names = [["a", "c", "b"][label] for label in source.labels or []]
    assert dict(zip(source.ids, names, strict=True)) == {
        f"train_val{year}/{name}": {2: "c", 0: "a", 10: "b"}[label] for name, label in train.items()
    }
    assert source.ids == sorted(source.ids) and source.read(0)
    for split, of in (("train", file), ("val", other)):
        part = open_source(tmp_path, split)  # type: ignore[arg-type]
        assert part.ids == open_source(of).ids and part.classes == source.classes
    assert open_source(other, "val-or-all", classes=source.classes).labels == [0, 2, 1]


def test_a_class_that_no_image_has_keeps_its_number(tmp_path: Path) -> None:
    source = open_source(inaturalist(tmp_path, 2018, "val", {"x.jpg": 10, "y.jpg": 2}))
    assert source.classes == ["a", "c", "b"] and source.labels == [2, 1]


def test_a_test_part_has_images_and_no_labels(tmp_path: Path) -> None:
    source = open_source(inaturalist(tmp_path, 2019, "test", {"x.jpg": 0}, annotations=None, categories=None))
    assert len(source) == 1 and source.labels is None


def test_names_that_two_categories_share_are_told_apart(tmp_path: Path) -> None:
    both = [{"id": 0, "name": "oak"}, {"id": 1, "name": "oak"}]
    source = open_source(inaturalist(tmp_path, 2018, "val", {"x.jpg": 0, "y.jpg": 1}, categories=both))
    assert source.classes == ["0 oak", "1 oak"]


@pytest.mark.parametrize(
    "changes",
    [
        {"images": None},
        {"images": [{"id": 0}]},
        {"images": 3},
        {"annotations": [{"image_id": 0, "category_id": 99}]},
        {"annotations": [{"image_id": 0, "category_id": 0}] * 2},
        {"annotations": [{"image_id": 5, "category_id": 0}]},
        {"annotations": [{"image_id": 0}]},
        {"categories": None},
        {"images": [{"id": 0, "file_name": "nowhere.jpg"}]},
        {
            "images": [{"id": 0, "file_name": "train_val2018/x.jpg"}, {"id": 1, "file_name": "train_val2018/x.jpg"}],
            "annotations": [{"image_id": 0, "category_id": 0}, {"image_id": 1, "category_id": 0}],
        },
    ],
)
def test_annotations_that_cannot_be_right_are_one_line(tmp_path: Path, changes: dict[str, Any]) -> None:
    refused("E-DATA-LIST", inaturalist(tmp_path, 2018, "train", {"x.jpg": 0}, **changes))


def test_json_that_is_none_is_one_line(tmp_path: Path) -> None:
    for at, text in enumerate(("", "[]", "{", "[" * 5000)):
        (tmp_path / f"{at}.json").write_text(text)
        refused("E-DATA-LIST", tmp_path / f"{at}.json")
    refused("E-DATA-COLUMN", tmp_path / "0.json", label_column="category_id")


# ----------------------------------------------------------------------------------------------------- Places


def test_places365_lists_start_at_the_folder_beside_them(tmp_path: Path) -> None:
    images(tmp_path / "data_256", "a/airfield/00000001.jpg", "z/zen_garden/00000009.jpg", "b/bar/1.jpg")
    images(tmp_path / "val_256", "Places365_val_00000001.jpg", "Places365_val_00000002.jpg")
    train, val = tmp_path / "places365_train_standard.txt", tmp_path / "places365_val.txt"
    train.write_text("/a/airfield/00000001.jpg 0\n/z/zen_garden/00000009.jpg 364\n/b/bar/1.jpg 34\n")
    val.write_text("Places365_val_00000001.jpg 364\nPlaces365_val_00000002.jpg 34\n")
    source = open_source(train)
    assert source.ids == ["a/airfield/00000001.jpg", "b/bar/1.jpg", "z/zen_garden/00000009.jpg"]
    assert source.classes == ["0", "34", "364"] and source.labels == [0, 1, 2] and source.read(2)
    assert open_source(val, "val-or-all", classes=source.classes).labels == [2, 1]


def test_places205_is_a_csv_without_a_header(tmp_path: Path) -> None:
    images(tmp_path / "images256", "a/abbey/gsun_1.jpg", "y/yard/gsun_2.jpg")
    (tmp_path / "train_places205.csv").write_text("a/abbey/gsun_1.jpg,0\ny/yard/gsun_2.jpg,204\n")
    source = open_source(tmp_path / "train_places205.csv")
    assert source.classes == ["0", "204"] and source.read(1)


def test_an_image_in_two_folders_beside_the_list_is_refused(tmp_path: Path) -> None:
    for folder in ("data_256", "data_large"):
        images(tmp_path / folder, "a/airfield/1.jpg")
    (tmp_path / "l.txt").write_text("/a/airfield/1.jpg 0\n")
    assert "data_256, data_large" in refused("E-DATA-LIST", tmp_path / "l.txt")


def test_a_list_whose_first_image_is_there_and_another_is_not_names_the_line(tmp_path: Path) -> None:
    images(tmp_path / "data_256", "a/1.jpg")
    (tmp_path / "l.txt").write_text("/a/1.jpg 0\n/b/2.jpg 1\n")
    assert "line 2" in refused("E-DATA-LIST", tmp_path / "l.txt")


# --------------------------------------------------------------------------------------------- Oxford, ImageNet


def test_oxford_pets_are_named_by_their_lists(tmp_path: Path) -> None:
    images(tmp_path / "images", "Abyssinian_1.jpg", "great_pyrenees_12.jpg", "great_pyrenees_3.jpg", "Bombay_2.jpg")
    (tmp_path / "annotations").mkdir()
    train, test = tmp_path / "annotations" / "trainval.txt", tmp_path / "annotations" / "test.txt"
    train.write_text("#Image CLASS-ID SPECIES BREED ID\nBombay_2 4 1 3\nAbyssinian_1 1 1 1\ngreat_pyrenees_12 15 2 9\n")
    test.write_text("great_pyrenees_3 15 2 9\n")
    source = open_source(train)
    assert source.classes == ["Abyssinian", "Bombay", "great_pyrenees"] and source.labels == [0, 1, 2]
    assert source.ids[2] == "images/great_pyrenees_12.jpg" and source.read(2)
    assert open_source(test, classes=source.classes).labels == [2]
    train.write_text("Bombay_2 4 1 3\nBombay_9 4 1 3\n")
    assert "line 2" in refused("E-DATA-LIST", train)


def test_imagenet_folders_are_train_and_val_by_wordnet_id(tmp_path: Path) -> None:
    for part in ("train", "val"):
        images(tmp_path / part, "n01440764/x.JPEG", "n01443537/y.JPEG")
    train = open_source(tmp_path, "train")
    assert train.classes == ["n01440764", "n01443537"] and open_source(tmp_path, "val").ids == [
        "n01440764/x.JPEG",
        "n01443537/y.JPEG",
    ]


def hub_parquet(path: Path, column: str, labels: list[int], names: list[str], image: str = "image") -> None:
    """Write a part as the hub's datasets do: image {bytes, path}, ClassLabel names in the metadata."""
    rng = np.random.default_rng(0)
    rows = []
    for at in range(len(labels)):
        file = path.parent / "x.png"
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(file)
        rows.append({"bytes": file.read_bytes(), "path": f"{at}.png"})
        file.unlink()
    features = {image: {"_type": "Image"}, column: {"names": names, "_type": "ClassLabel"}}
    table = pa.table({image: rows, column: pa.array(labels, pa.int64())})
    said = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(said), path)


def test_imagenet_of_the_hub_is_read_and_its_unlabelled_test_part_left_alone(tmp_path: Path) -> None:
    names = ["tench, Tinca tinca", "goldfish, Carassius auratus"]
    for part, labels in (
        ("train-00000-of-00002", [0, 1]),
        ("train-00001-of-00002", [1]),
        ("validation-00000-of-00001", [1, 0]),
    ):
        hub_parquet(tmp_path / f"{part}.parquet", "label", labels, names)
    hub_parquet(tmp_path / "test-00000-of-00001.parquet", "label", [-1], names)
    train, val = open_source(tmp_path, "train"), open_source(tmp_path, "val")
    assert train.classes == names and train.labels == [0, 1, 1] and val.labels == [1, 0] and val.read(1)


def test_cifar_100_of_the_hub_takes_the_fine_labels(tmp_path: Path) -> None:
    hub_parquet(tmp_path / "train-00000-of-00001.parquet", "fine_label", [1, 0], ["apple", "aquarium_fish"], "img")
    source = open_source(tmp_path / "train-00000-of-00001.parquet")
    assert source.classes == ["apple", "aquarium_fish"] and source.labels == [1, 0]


@pytest.mark.parametrize("names", [("data_batch_1", "batches.meta"), ("train", "test", "meta")])
def test_the_pickles_of_cifar_are_refused_unopened(tmp_path: Path, names: tuple[str, ...]) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "opened").touch, ())

    for name in names:
        (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    assert "pickles hold code" in refused("E-DATA-EMPTY", tmp_path)
    assert not (tmp_path / "opened").exists()
