"""Tags and numbers from lists and parquet: what is read, and one line for everything doubtful."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from maekit.data.augment import EvalView
from maekit.data.loader import Loader
from maekit.data.source import FileSource, Source, Targets
from maekit.data.sources import Form, hold_out, label_subset, open_source
from maekit.data.targets import read_targets
from maekit.errors import MaekitError

PNG = (lambda out: Image.new("L", (4, 4)).save(out, "PNG") or out.getvalue())(io.BytesIO())
TAGS, NUMBERS = Form("multilabel"), Form("regression")


def listed(root: Path, text: str, name: str = "list.csv") -> Path:
    for i in range(4):
        (root / f"{i}.png").write_bytes(PNG)
    (root / name).write_text(text)
    return root / name


def parquet(root: Path, metadata: dict[str, Any] | None = None, **columns: Any) -> Path:
    table = pa.table({"image": pa.array([PNG] * 4, pa.binary()), **columns})
    if metadata:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": metadata}})})
    pq.write_table(table, root / "data.parquet")
    return root / "data.parquet"


def table(source: Source) -> dict[str, list[float]]:
    assert source.targets is not None and source.labels is None and source.classes is None
    return {name: column.tolist() for name, column in zip(source.targets.names, source.targets.values.T, strict=True)}


def refused(path: Path, form: Form, code: str = "E-DATA-TARGETS", **more: Any) -> str:
    with pytest.raises(MaekitError) as caught:
        open_source(path, form=form, **more)
    assert caught.value.code == code and caught.value.exit_code == 3 and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["list.csv", "list.tsv"])
def test_tags_of_a_list_are_names_at_a_separator_and_nothing_is_none_of_them(tmp_path: Path, name: str) -> None:
    lines = ["path,label", "0.png,cat|dog", "1.png,", "2.png, dog ", "3.png,bird | cat"]
    text = "\n".join(lines) if name == "list.csv" else "\n".join(lines).replace(",", "\t")
    expected = {"bird": [0, 0, 0, 1], "cat": [1, 0, 0, 1], "dog": [1, 0, 1, 0]}
    assert table(open_source(listed(tmp_path, text, name), form=TAGS)) == expected


def test_another_separator_and_a_txt(tmp_path: Path) -> None:
    path = listed(tmp_path, "0.png haze primary\n1.png primary\n2.png\n3.png haze", "list.txt")
    found = table(open_source(path, form=Form("multilabel", " ")))
    assert found == {"haze": [1, 0, 0, 1], "primary": [1, 1, 0, 0]}


def test_columns_of_0_and_1_are_a_tag_each(tmp_path: Path) -> None:
    path = listed(tmp_path, "Path,Edema,Other,Nodule\n0.png,1,7,0\n1.png,0.0,,1\n3.png,1.0,x,1")
    assert table(open_source(path, form=TAGS, label_column="edema, Nodule")) == {
        "Edema": [1, 0, 1],
        "Nodule": [0, 1, 1],
    }
    assert table(open_source(path, form=TAGS, label_column="Nodule,Nodule,")) == {"Nodule": [0, 1, 1]}


def test_numbers_are_read_as_double_in_the_order_of_the_paths(tmp_path: Path) -> None:
    path = listed(tmp_path, "path,x,y\n3.png,1700000000.5,-1e-3\n0.png, 2 ,0")
    found = open_source(path, form=NUMBERS, label_column="y,x")
    assert found.ids == ["0.png", "3.png"] and table(found) == {"y": [0, -1e-3], "x": [2, 1700000000.5]}


def test_parquet_holds_lists_of_names_numbers_and_the_hubs_lists_of_classes(tmp_path: Path) -> None:
    names = pa.array([["b", "a"], [], ["a"], ["c"]])
    path = parquet(tmp_path, labels=names, age=pa.array([1.5, 2, 3, 4]), flag=pa.array([True, False, True, True]))
    assert table(open_source(path, form=TAGS)) == {"a": [1, 0, 1, 0], "b": [1, 0, 0, 0], "c": [0, 0, 0, 1]}
    assert table(open_source(path, form=NUMBERS, label_column="age")) == {"age": [1.5, 2, 3, 4]}
    assert table(open_source(path, form=TAGS, label_column="flag")) == {"flag": [1, 0, 1, 1]}
    for feature in (
        {"feature": {"names": ["z", "y", "never"], "_type": "ClassLabel"}, "_type": "Sequence"},
        [{"names": ["z", "y", "never"], "_type": "ClassLabel"}],
    ):
        path = parquet(tmp_path, {"labels": feature}, labels=pa.array([[0], [0, 1], [], [1]]))
        assert table(open_source(path, form=TAGS)) == {"z": [1, 1, 0, 0], "y": [0, 1, 0, 1], "never": [0, 0, 0, 0]}


def test_a_part_to_score_on_keeps_the_order_of_the_tags_and_has_no_others(tmp_path: Path) -> None:
    for part, names in (("train", ["b", "a|b", "", "c"]), ("val", ["b", "c", "b", ""])):
        pq.write_table(pa.table({"image": pa.array([PNG] * 4), "label": names}), tmp_path / f"{part}.parquet")
    train, val = (open_source(tmp_path, part, form=TAGS) for part in ("train", "val"))
    assert list(table(train)) == list(table(val)) == ["a", "b", "c"] and table(val)["b"] == [1, 0, 1, 0]
    pq.write_table(pa.table({"image": pa.array([PNG] * 2), "label": ["b", "new"]}), tmp_path / "val.parquet")
    with pytest.raises(MaekitError, match="'new'") as caught:
        open_source(tmp_path, "val", form=TAGS)
    assert caught.value.code == "E-DATA-CLASSES"


@pytest.mark.parametrize(
    ("text", "form", "column", "said"),
    [
        ("path,label\n0.png,3\n1.png,old", NUMBERS, None, "list.csv line 3, column 'label': found 'old'"),
        ("path,label\n0.png,3\n1.png,", NUMBERS, None, "line 3, column 'label': found an empty cell"),
        ("path,label\n0.png,nan", NUMBERS, None, "expected a finite number"),
        ("path,label\n0.png,inf", NUMBERS, None, "expected a finite number"),
        ("path,label\n0.png,1_000", NUMBERS, None, "found '1_000'"),
        ("path,x,y\n0.png,1,2\n1.png,1", NUMBERS, "x,y", "line 3, column 'y': found an empty cell"),
        ("path,x,y\n0.png,1,0\n1.png,1,-1", TAGS, "x,y", "line 3, column 'y': found '-1', expected 0 or 1"),
        ("path,label\n0.png,cat|dog|cat", TAGS, None, "line 2: found 'cat' twice"),
        ("path,label\n0.png,\n1.png,|", TAGS, None, "no tag of any image"),
    ],
)
def test_doubtful_cells_are_refused_with_file_and_line(
    tmp_path: Path, text: str, form: Form, column: str | None, said: str
) -> None:
    assert said in refused(listed(tmp_path, text), form, label_column=column)


def test_what_has_no_columns_is_refused(tmp_path: Path) -> None:
    text = "path,age\n0.png,3"
    assert "column called label" in refused(listed(tmp_path, text), NUMBERS, "E-DATA-COLUMN")
    assert "column 'size'" in refused(tmp_path / "list.csv", NUMBERS, "E-DATA-COLUMN", label_column="age,size")
    assert "no header" in refused(listed(tmp_path, "0.png 3", "a.txt"), NUMBERS, "E-DATA-COLUMN", label_column="age")
    (tmp_path / "folder" / "a").mkdir(parents=True)
    (tmp_path / "folder" / "a" / "1.png").write_bytes(PNG)
    assert "--task regression: found a folder of images" in refused(tmp_path / "folder", NUMBERS)
    assert "found a folder of images" in refused(tmp_path / "folder", TAGS)
    path = parquet(tmp_path, label=pa.array([[1.0, 2.0]] * 4), empty=pa.array(["a", None, "b", "c"]))
    assert "row 0, column 'label'" in refused(path, NUMBERS)
    assert "row 1: found no value" in refused(path, TAGS, label_column="empty")
    assert "column 'nothing'" in refused(path, TAGS, "E-DATA-COLUMN", label_column="nothing")
    with pytest.raises(MaekitError, match="classes, which have names"):
        open_source("builtin:fashion", form=NUMBERS)


def test_a_list_of_0_and_1_for_every_tag_is_not_taken_for_names(tmp_path: Path) -> None:
    path = parquet(tmp_path, label=pa.array([[0, 0, 1]] * 4))
    assert "'0' twice, expected each tag once; for 0 and 1 of every tag, a column for each" in refused(path, TAGS)


def test_names_of_images_taken_for_tags_are_refused_before_they_take_all_memory() -> None:
    cells = [(f"image {i}",) for i in range(70_000)]
    with pytest.raises(MaekitError, match="70000 names for 70000 images"):
        read_targets(TAGS, ["label"], cells, str, known=None, what="here")


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sets(st.sampled_from(["a", "b", "cc", "d e"])), min_size=1, max_size=30))
def test_every_tag_of_every_image_is_read(tags: list[set[str]]) -> None:
    if not any(tags):
        return
    found = read_targets(TAGS, ["label"], [("|".join(sorted(each)),) for each in tags], str, known=None, what="here")
    assert [{found.names[i] for i in np.flatnonzero(row)} for row in found.values] == tags


def made(count: int) -> FileSource:
    ids = [f"{i}.png" for i in range(count)]
    values = np.arange(2.0 * count).reshape(count, 2)
    return FileSource("made", ids, ids, targets=Targets(["x", "y"], values))


def test_parts_are_drawn_by_the_same_hash_and_take_their_targets_along() -> None:
    source = made(200)
    train, val = hold_out(source)
    assert (len(train), len(val)) == (160, 40) and not set(train.ids) & set(val.ids)
    for part in (train, val):
        assert part.targets is not None
        assert [f"{int(x) // 2}.png" for x in part.targets.values[:, 0]] == part.ids
    small, large = label_subset(source, "5%"), label_subset(source, "50")
    assert len(small) == 10 and len(large) == 50 and set(small) < set(large) and label_subset(source, "100%", 3)[199]
    assert label_subset(source, "10", 1) != label_subset(source, "10", 0)
    for spec, code in (("5/class", "E-USAGE-LABELS"), ("300", "E-DATA-LABELS"), ("x", "E-USAGE-LABELS")):
        with pytest.raises(MaekitError) as caught:
            label_subset(source, spec)
        assert caught.value.code == code


def test_another_value_is_another_fingerprint(tmp_path: Path) -> None:
    first, other = (
        open_source(listed(tmp_path, f"path,age\n0.png,{age}"), form=NUMBERS, label_column="age").fingerprint()
        for age in (1, 2)
    )
    assert first != other != open_source(tmp_path / "list.csv").fingerprint()


def test_batches_hold_the_targets_of_their_images(tmp_path: Path) -> None:
    path = listed(tmp_path, "path,x,y\n0.png,1,2\n1.png,3,4\n2.png,5,6\n3.png,7,8")
    source = open_source(path, form=NUMBERS, label_column="x,y")
    loader = Loader(source, EvalView((4, 4), 1.0), batch_size=4, micro_batch=3, mean=(0.0,), std=(1.0,))
    assert source.targets is not None
    for batch in next(loader.steps(0, 1)):
        expected = torch.from_numpy(source.targets.values)[batch["ids"]].float()
        assert torch.equal(batch["targets"], expected) and batch["targets"].dtype == torch.float32
    assert "targets" not in next(Loader(
        open_source(path), EvalView((4, 4), 1.0), batch_size=4, micro_batch=3, mean=(0.0,), std=(1.0,)
    ).sweep())  # fmt: skip
