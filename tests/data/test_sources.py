import io
import json
import os
import pickle
import re
import socket
import threading
import time
from collections import Counter
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

from maekit.data import parquet
from maekit.data.source import LISTED_FROM, MAX_FILE_BYTES, DatasetSource, FileSource, Source, absent
from maekit.data.sources import hold_out, label_subset, open_source, other_files, parts_of
from maekit.errors import MaekitError


def png(shade: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("L", (8, 8), shade).save(out, "PNG")
    return out.getvalue()


def fill(root: Path, *names: str) -> Path:
    for shade, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(shade))
    return root


def write_parquet(path: Path, rows: int = 4, **columns: Any) -> Path:
    pq.write_table(pa.table({"image": pa.array([png(i) for i in range(rows)], pa.binary()), **columns}), path)
    return path


def refusal(path: str | Path, code: str, split: Any = None, **options: Any) -> str:
    with pytest.raises(MaekitError) as caught:
        open_source(path, split, **options)
    assert caught.value.code == code and caught.value.exit_code == 3
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    return str(caught.value)


def names_of(source: Source) -> list[str]:
    assert source.labels is not None and source.classes is not None
    return [source.classes[label] for label in source.labels]


def listed(count: int, classes: int) -> FileSource:
    """A labelled source whose files need not exist."""
    ids = [f"{i:06d}.png" for i in range(count)]
    return FileSource("here", ids, ids, [i % classes for i in range(count)], [f"class {i}" for i in range(classes)])


# ---- folders


def test_first_level_folders_are_classes_when_every_image_lies_in_one(tmp_path: Path) -> None:
    source = open_source(fill(tmp_path, "dog/2.png", "cat/deep/er/1.PNG", "cat /3.jpeg"))
    assert source.ids == ["cat /3.jpeg", "cat/deep/er/1.PNG", "dog/2.png"]
    assert source.classes == ["cat", "cat ", "dog"] and source.labels == [1, 0, 2]
    assert source.read(2) == png(0)


def test_one_image_beside_the_folders_makes_the_set_unlabelled(tmp_path: Path) -> None:
    source = open_source(fill(tmp_path, "dog/2.png", "cat/1.png", "0.png"))
    assert source.ids == ["0.png", "cat/1.png", "dog/2.png"] and source.labels is None and source.classes is None


def test_hidden_entries_and_other_files_are_passed_over_and_counted(tmp_path: Path) -> None:
    fill(tmp_path, "a.png", ".b.png", ".hidden/c.png", "d/.e.png")
    for name in ("notes.txt", "x.HEIC", "y.heic", "README"):
        (tmp_path / name).write_text("")
    assert open_source(tmp_path).ids == ["a.png"]
    assert other_files(tmp_path) == {".heic": 2, ".txt": 1, "without suffix": 1}


def test_the_order_is_that_of_the_names_whatever_the_disk_says(tmp_path: Path) -> None:
    names = [f"{i * 7919 % 101}/{i}.png" for i in range(101)]
    assert open_source(fill(tmp_path, *names)).ids == sorted(names)


def test_links_are_followed_and_loops_of_links_end(tmp_path: Path) -> None:
    fill(tmp_path, "here/a.png", "elsewhere/b.png")
    (tmp_path / "here/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "here/again").symlink_to(tmp_path / "here")
    (tmp_path / "elsewhere/up").symlink_to(tmp_path / "here")
    assert open_source(tmp_path / "here").ids == ["a.png", "linked/b.png"]


def test_things_that_are_no_files_are_listed_and_refused_when_read_without_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "good.png")
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    source, started = open_source(tmp_path), time.monotonic()
    assert source.ids == [f"{n}.png" for n in ("fifo", "folder", "gone", "good", "loop", "socket", "sparse", "zero")]
    for i, name in enumerate(source.ids):
        if name != "good.png":
            with pytest.raises(MaekitError, match=re.escape(name)) as caught:
                source.read(i)
            assert caught.value.code == "E-DATA-IMAGE"
    assert time.monotonic() - started < 2 and len(source.fingerprint()) == 64


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_a_bad_image(tmp_path: Path) -> None:
    fill(tmp_path, "a.png")
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(MaekitError, match="Permission denied"):
        open_source(tmp_path).read(0)


def test_a_file_that_grows_while_it_is_read_never_runs_away(tmp_path: Path) -> None:
    path, stop = fill(tmp_path, "a.png") / "a.png", threading.Event()

    def grow() -> None:
        with path.open("ab") as file:
            while not stop.is_set():
                file.write(b"x" * 4096)
                file.flush()
                time.sleep(1e-4)

    writer = threading.Thread(target=grow)
    writer.start()
    try:
        source = open_source(tmp_path)
        for _ in range(50):
            try:
                source.read(0)
            except MaekitError as error:
                assert "changed while it was read" in str(error)
    finally:
        stop.set()
        writer.join()


def test_strange_names_are_read_and_their_ids_can_be_written_anywhere(tmp_path: Path) -> None:
    names = [
        "new\nline.png",
        "\x1b[31mred.png",
        "-dash.png",
        "ü.png",
        "Case.png",
        "case.png",
        "..png.png",
        "a" * 251 + ".png",
    ]
    for name in names:
        (tmp_path / name).write_bytes(png(7))
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/latin\xff.png"))).write_bytes(png(7))
    source = open_source(tmp_path)
    assert len(set(source.ids)) == len(source) == 1 + len([name for name in names if name[0] != "."])
    assert "latin\\xff.png" in source.ids and "".join(source.ids).encode()
    assert all(source.read(i) == png(7) for i in range(len(source)))
    (tmp_path / "new\nline.png").unlink()
    with pytest.raises(MaekitError) as caught:
        source.read(source.ids.index("new\nline.png"))
    assert "new\\nline.png" in str(caught.value)


def test_nothing_to_read_is_refused_and_what_is_there_is_named(tmp_path: Path) -> None:
    assert "no visible file" in refusal(tmp_path, "E-DATA-EMPTY")
    (tmp_path / "class").mkdir()
    fill(tmp_path, ".hidden.png")
    assert "no visible file" in refusal(tmp_path, "E-DATA-EMPTY")
    (tmp_path / "class/photo.heic").write_text("")
    assert "1 .heic" in refusal(tmp_path, "E-DATA-EMPTY")


@pytest.mark.parametrize("path", ["https://example.org/x", "s3://bucket/x", "pipe:cat x", "| cat", "-", "file:///etc"])
def test_urls_and_commands_are_refused(path: str) -> None:
    assert "not a path" in refusal(path, "E-DATA-PATH")


def test_paths_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "missing\n\x1b[2J", "E-DATA-PATH")
    refusal("nul\0byte", "E-DATA-PATH")
    (tmp_path / "x.tar").write_bytes(b"")
    assert "another kind" in refusal(tmp_path / "x.tar", "E-DATA-PATH")
    os.mkfifo(tmp_path / "x.parquet")
    refusal(tmp_path / "x.parquet", "E-DATA-PATH")
    for name in ("builtin:nothing", "builtin:", "builtin:../builtin/fashion", "builtin:.."):
        assert "builtin:fashion" in refusal(name, "E-DATA-PATH")


# ---- parts


@pytest.mark.parametrize("held", ["val", "valid", "validation", "test"])
def test_train_and_val_folders_are_the_parts(tmp_path: Path, held: str) -> None:
    fill(tmp_path, "train/a/1.png", "train/b/2.png", f"{held}/a/3.png", f"{held}/b/4.png")
    assert open_source(tmp_path, "train").ids == ["a/1.png", "b/2.png"]
    assert open_source(tmp_path, "val").ids == open_source(tmp_path, "val-or-all").ids == ["a/3.png", "b/4.png"]
    everything = open_source(tmp_path)
    assert len(everything) == 4 and everything.classes == ["a", "b"]


def test_val_is_preferred_to_test(tmp_path: Path) -> None:
    fill(tmp_path, "train/1.png", "val/2.png", "test/3.png")
    assert open_source(tmp_path, "val").ids == ["2.png"]


def test_a_class_called_train_is_a_class(tmp_path: Path) -> None:
    fill(tmp_path, "train/1.png", "bus/2.png", "train/3.png", "bus/4.png")
    assert parts_of(tmp_path) == {} and open_source(tmp_path).classes == ["bus", "train"]


def test_train_alone_has_its_val_held_out_of_it(tmp_path: Path) -> None:
    fill(tmp_path, *(f"train/{label}/{i}.png" for label in "ab" for i in range(10)))
    train, val = open_source(tmp_path, "train"), open_source(tmp_path, "val")
    assert Counter(names_of(train)) == {"a": 8, "b": 8} and Counter(names_of(val)) == {"a": 2, "b": 2}
    assert len(open_source(tmp_path, "train-or-all")) == 20 and not set(train.ids) & set(val.ids)


def test_parts_with_different_classes_are_refused_with_their_names(tmp_path: Path) -> None:
    fill(tmp_path, "train/cat/1.png", "train/dog/2.png", "val/cat /3.png", "val/dog/4.png")
    for split in ("train", "val"):
        assert "1 classes not in train: found 'cat '" in refusal(tmp_path, "E-DATA-CLASSES", split)
    assert len(open_source(tmp_path, "train-or-all")) == 2  # without labels it does not matter
    fill(tmp_path / "2", "train/cat/1.png", "train/dog/2.png", "val/dog/4.png")
    assert "1 classes not in val: found 'cat'" in refusal(tmp_path / "2", "E-DATA-CLASSES", "train")
    fill(tmp_path / "3", "train/cat/1.png", "val/4.png")
    assert "val of" in refusal(tmp_path / "3", "E-DATA-CLASSES", "val")


def test_an_empty_val_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "train/a/1.png")
    (tmp_path / "val").mkdir()
    refusal(tmp_path, "E-DATA-EMPTY", "val")


def test_labels_are_numbered_like_the_classes_given(tmp_path: Path) -> None:
    fill(tmp_path, "b/1.png", "c/2.png")
    source = open_source(tmp_path, "val-or-all", classes=["c", "a", "b"])
    assert source.labels == [2, 0] and source.classes == ["c", "a", "b"]
    assert "'c'" in refusal(tmp_path, "E-DATA-CLASSES", classes=["a", "b"])


# ---- lists


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.txt", "a.png cat\nb c.png dog\n"),
        ("list.txt", "a.png\tcat\r\n\r\nb c.png\tdog"),
        ("list.txt", "b c.png, dog\ra.png, cat"),
        ("list.csv", "a.png,cat\nb c.png,dog\n"),
        ("list.csv", "\ufeffpath,label\r\na.png,cat\r\nb c.png,dog\r\n"),
        ("list.csv", 'id,Label,filename\n7,cat,./a.png\n8,dog,"b c.png"\n'),
        ("list.tsv", "class\tpath\ncat\ta.png\ndog\tb c.png\n"),
    ],
)
def test_a_list_of_any_style_gives_paths_and_labels(tmp_path: Path, name: str, text: str) -> None:
    fill(tmp_path, "a.png", "b c.png")
    (tmp_path / name).write_bytes(text.encode())
    source = open_source(tmp_path / name)
    assert source.ids == ["a.png", "b c.png"] and names_of(source) == ["cat", "dog"]
    assert [source.read(i) for i in (0, 1)] == [png(0), png(1)]


@pytest.mark.parametrize(("name", "text"), [("list.txt", "x/a.png\nb c.png"), ("list.csv", "path\nb c.png\nx/a.png\n")])
def test_a_list_without_labels_is_unlabelled(tmp_path: Path, name: str, text: str) -> None:
    fill(tmp_path, "x/a.png", "b c.png")
    (tmp_path / name).write_text(text)
    source = open_source(tmp_path / name)
    assert source.ids == ["b c.png", "x/a.png"] and source.labels is None


def test_labels_that_are_numbers_are_ordered_as_numbers(tmp_path: Path) -> None:
    fill(tmp_path, *(f"{i}.png" for i in range(3)))
    (tmp_path / "list.txt").write_text("0.png 10\n1.png 1000000000\n2.png 9\n")
    source = open_source(tmp_path / "list.txt")
    assert source.classes == ["9", "10", "1000000000"] and source.labels == [1, 2, 0]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("list.csv", "a.png,cat\na.png,cat\n", "line 2: found a.png again, expected each image once (line 1)"),
        ("list.csv", "a.png,cat\nb.png,\n", "line 2: found no label for b.png"),
        ("list.csv", "a.png,cat\nb.png\n", "line 2: found no label for b.png"),
        ("list.csv", "path,label\na.png,cat\n\nmissing.png,cat\n", "line 4: found no file missing.png"),
        ("list.csv", "who,what\na.png,cat\n", "line 1: found 'who,what'"),
        ("list.csv", 'a.png,"cat\n', "line 1"),
        ("list.txt", "a.png cat\nno picture here\n", "line 2: found 'no picture here"),
        ("list.txt", "a.png cat\nhttps://example.org/b.png cat\n", "line 2: found no file https:/example.org/b.png"),
        ("list.txt", "a.png cat\nnul\0.png cat\n", "line 2"),
    ],
)
def test_a_doubtful_line_of_a_list_is_refused_with_its_number(tmp_path: Path, name: str, text: str, said: str) -> None:
    fill(tmp_path, "a.png", "b.png")
    (tmp_path / name).write_text(text)
    assert said in refusal(tmp_path / name, "E-DATA-LIST")


def test_a_list_that_is_empty_or_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\n \n")
    refusal(tmp_path / "list.txt", "E-DATA-EMPTY")
    (tmp_path / "list.txt").write_bytes(b"\xff\xfea\0")
    refusal(tmp_path / "list.txt", "E-DATA-LIST")


def test_a_column_of_a_list_can_be_named_and_must_be_there(tmp_path: Path) -> None:
    fill(tmp_path, "a.png")
    (tmp_path / "list.csv").write_text("where,path,kind\na.png,x,cat\n")
    source = open_source(tmp_path / "list.csv", image_column="where", label_column="kind")
    assert source.ids == ["a.png"] and source.classes == ["cat"]
    assert "'genus'" in refusal(tmp_path / "list.csv", "E-DATA-COLUMN", label_column="genus")


# ---- parquet


def test_a_parquet_file_has_an_id_for_every_row(tmp_path: Path) -> None:
    source = open_source(write_parquet(tmp_path / "x.parquet", label=[3, 1, 3, 2]))
    assert source.ids == [f"x.parquet:{i}" for i in range(4)]
    assert source.classes == ["1", "2", "3"] and source.labels == [2, 0, 2, 1]
    assert [source.read(i) for i in range(4)] == [png(i) for i in range(4)]


def test_shards_are_one_set_and_their_names_say_the_part(tmp_path: Path) -> None:
    for part in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write_parquet(tmp_path / f"{part}.parquet", label=["a", "b", "a", "b"])
    assert len(open_source(tmp_path, "train")) == 8 and len(open_source(tmp_path)) == 12
    assert open_source(tmp_path, "val").ids[0] == "test-00000-of-00001.parquet:0"
    assert open_source(tmp_path, "train").read(7) == png(3)


def test_pictures_in_hugging_faces_structs_are_found_with_their_class_names(tmp_path: Path) -> None:
    pictures = pa.array([{"bytes": png(1), "path": "x.png"}, None, {"bytes": None, "path": "y.png"}])
    feature = {"label": {"names": ["zebra", "ant"], "_type": "ClassLabel"}}
    meta = {"huggingface": json.dumps({"info": {"features": feature}})}
    table = pa.table({"pic": pictures, "label": [1, 0, 1]}).replace_schema_metadata(meta)
    pq.write_table(table, tmp_path / "x.parquet")
    source = open_source(tmp_path / "x.parquet")
    assert (
        source.read(0) == png(1) and names_of(source) == ["ant", "zebra", "ant"] and source.classes == ["zebra", "ant"]
    )
    for i in (1, 2):
        with pytest.raises(MaekitError, match=rf"x\.parquet:{i}.*empty cell"):
            source.read(i)
    pq.write_table(table.set_column(1, "label", pa.array([[0, 2, 1]]).flatten()), tmp_path / "y.parquet")
    assert "label 2" in refusal(tmp_path / "y.parquet", "E-DATA-LABELS")


def test_of_several_binary_columns_the_one_with_images_is_taken(tmp_path: Path) -> None:
    masks = pa.array([b"not an image"] * 4, pa.binary())
    pq.write_table(pa.table({"a": masks, "b": pa.array([png()] * 4, pa.large_binary())}), tmp_path / "x.parquet")
    assert open_source(tmp_path / "x.parquet").read(0) == png()
    assert open_source(tmp_path / "x.parquet", image_column="a").read(0) == b"not an image"


def test_wrong_columns_are_refused_with_those_that_exist(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", score=[0.5] * 4)
    assert "score (double)" in refusal(path, "E-DATA-COLUMN", image_column="picture")
    assert "'score'" in refusal(path, "E-DATA-COLUMN", label_column="score")
    assert open_source(path).labels is None
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "y.parquet")
    assert "text (string)" in refusal(tmp_path / "y.parquet", "E-DATA-COLUMN")


def test_missing_labels_are_refused_and_all_negative_ones_are_none(tmp_path: Path) -> None:
    assert "row 2" in refusal(write_parquet(tmp_path / "x.parquet", label=[1, 2, None, 3]), "E-DATA-LABELS")
    assert open_source(write_parquet(tmp_path / "y.parquet", label=[-1] * 4)).labels is None


def test_parquet_files_that_are_broken_or_empty_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    refusal(tmp_path / "x.parquet", "E-DATA-PATH")
    refusal(write_parquet(tmp_path / "y.parquet", rows=0), "E-DATA-EMPTY")


def test_a_parquet_page_that_is_damaged_is_a_bad_image(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet")
    source, data = open_source(path), bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    with pytest.raises(MaekitError) as caught:
        source.read(0)
    assert caught.value.code == "E-DATA-IMAGE"


def test_embeddings_beside_images_do_not_hide_the_images(tmp_path: Path) -> None:
    pq.write_table(pa.table({"embedding": [[0.5, 1.0]]}), fill(tmp_path, "a.png") / "features.parquet")
    assert open_source(tmp_path).ids == ["a.png"]


def test_row_groups_leave_memory_when_the_cache_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.parquet"
    pictures = pa.array([np.random.default_rng(i).bytes(1000) for i in range(40)], pa.binary())
    pq.write_table(pa.table({"image": pictures}), path, row_group_size=4)
    monkeypatch.setattr(parquet, "CACHE_BYTES", 10_000)
    source = open_source(path)
    assert isinstance(source, parquet.ParquetSource)
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(40), 3))
    assert all(source.read(int(i)) == pictures[int(i)].as_py() for i in order)
    assert source._rows is not None and 1 <= len(source._rows.kept) <= 3


def test_threads_may_share_a_parquet_source(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": pa.array([png(i) for i in range(200)], pa.binary())}), path, row_group_size=7)
    source = open_source(path)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, range(200))) == [png(i) for i in range(200)]


# ---- what all sources do


def test_a_subset_is_a_source_of_the_same_kind(tmp_path: Path) -> None:
    sources: list[Source] = [
        open_source(fill(tmp_path / "f", "a/0.png", "b/1.png", "c/2.png")),
        open_source(write_parquet(tmp_path / "x.parquet", 3, label=["a", "b", "c"])),
    ]
    for source in sources:
        part = source.subset([2, 0])
        assert type(part) is type(source) and len(part) == 2 and part.classes == ["a", "b", "c"]
        assert part.labels == [2, 0] and part.ids == [source.ids[2], source.ids[0]]
        assert [part.read(0), part.read(1)] == [png(2), png(0)] and part.fingerprint() != source.fingerprint()
        again = pickle.loads(pickle.dumps(part))
        assert again.read(0) == png(2) and again.fingerprint() == part.fingerprint()


def test_the_fingerprint_tells_when_files_come_go_or_change_size_and_not_where_they_lie(tmp_path: Path) -> None:
    first = open_source(fill(tmp_path / "x", "a.png", "b.png")).fingerprint()
    assert open_source(fill(tmp_path / "y", "a.png", "b.png")).fingerprint() == first
    (tmp_path / "x/a.png").write_bytes(png() + b"more")
    changed = open_source(tmp_path / "x").fingerprint()
    (tmp_path / "x/a.png").rename(tmp_path / "x/c.png")
    assert len({first, changed, open_source(tmp_path / "x").fingerprint()}) == 3


def test_twenty_thousand_files_are_listed_in_seconds(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for i in range(20_000):
        (tmp_path / f"a/{i}.png").touch()
    started = time.monotonic()
    assert len(open_source(tmp_path)) == 20_000 and time.monotonic() - started < 10


class Pairs:
    """A data set like torchvision's."""

    def __init__(self, image: Any, **attributes: Any) -> None:
        self.image = image
        self.__dict__ |= attributes

    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> Any:
        return self.image, i


@pytest.mark.parametrize(
    ("image", "channels"),
    [
        (Image.new("L", (6, 5)), 3),
        (Image.new("RGBA", (6, 5)), 3),
        (np.zeros((5, 6), np.uint8), 1),
        (np.zeros((5, 6, 4), np.float32), 4),
        (torch.zeros(2, 5, 6), 2),
    ],
)
def test_any_map_style_dataset_is_a_source_of_decoded_images(image: Any, channels: int) -> None:
    source = DatasetSource(Pairs(image))
    assert source.read(1).shape == (channels, 5, 6) and source.labels is None and source.ids == ["0", "1", "2"]
    assert DatasetSource([image]).subset([0]).read(0).shape == (channels, 5, 6)


def test_a_datasets_targets_and_classes_become_labels() -> None:
    source = DatasetSource(Pairs(None, targets=[1, 0, 1], classes=["x", "y"])).subset([2, 1])
    assert source.labels == [1, 0] and source.classes == ["x", "y"]
    assert DatasetSource(Pairs(None, targets=torch.tensor([0, 2, 1]))).classes == ["0", "1", "2"]


@pytest.mark.parametrize("image", [None, "x.png", np.zeros(3), np.zeros((4, 4), complex), torch.zeros(4, 4)])
def test_an_item_of_a_dataset_that_is_no_image_is_refused(image: Any) -> None:
    with pytest.raises(MaekitError, match="item 0"):
        DatasetSource(Pairs(image)).read(0)


def test_a_broken_file_below_a_dataset_is_a_bad_image() -> None:
    class Broken(Pairs):
        def __getitem__(self, i: int) -> Any:
            return Image.open(io.BytesIO(b"broken"))

    with pytest.raises(MaekitError, match="item 1"):
        DatasetSource(Broken(None)).read(1)


# ---- draws


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 200), st.integers(1, 10), st.randoms())
def test_holding_out_is_per_class_and_does_not_depend_on_the_order(count: int, classes: int, random: Any) -> None:
    source = listed(count, min(classes, count // 2))
    train, val = hold_out(source)
    assert sorted([*train.ids, *val.ids]) == source.ids and set(names_of(val)) == set(names_of(train))
    members, held = Counter(names_of(source)), Counter(names_of(val))
    assert all(held[name] == max(1, round(0.2 * members[name])) for name in members)
    order = list(range(count))
    random.shuffle(order)
    assert set(hold_out(source.subset(order))[1].ids) == set(val.ids)


def test_one_image_cannot_be_split() -> None:
    with pytest.raises(MaekitError, match="2 or more"):
        hold_out(listed(1, 1))


def test_a_label_subset_is_even_and_grows_by_adding() -> None:
    source = listed(1000, 10)
    assert source.labels is not None
    previous: set[int] = set()
    for spec, each in (("1%", 1), ("2/class", 2), ("50", 5), ("10/class", 10), ("50%", 50), ("100%", 100)):
        indices = label_subset(source, spec, 0)
        assert indices == sorted(indices) and previous <= set(indices)
        assert Counter(source.labels[i] for i in indices) == dict.fromkeys(range(10), each)
        previous = set(indices)
    assert label_subset(source, None, 0) == list(range(1000))
    assert label_subset(source, "10/class", 1) != label_subset(source, "10/class", 0)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 60))
def test_a_count_of_labels_is_met_exactly(count: int, classes: int, total: int) -> None:
    source = listed(count, min(classes, count)).subset([*range(count), *range(0, count, 3)])
    assert source.labels is not None and source.classes is not None
    if len(source.classes) <= total <= len(source):
        held = Counter(source.labels[i] for i in label_subset(source, str(total), 3))
        members = Counter(source.labels)
        assert held.total() == total
        open_classes = [held[c] for c in members if held[c] < members[c]]
        assert max(open_classes, default=0) - min(open_classes, default=0) <= 1


@pytest.mark.parametrize("spec", ["0", "-1", "0%", "101%", "1.5", "2.5/class", "ten", "10/klass", "", "1e3", "nan%"])
def test_a_label_subset_that_means_nothing_is_a_usage_error(spec: str) -> None:
    with pytest.raises(MaekitError) as caught:
        label_subset(listed(100, 10), spec, 0)
    assert caught.value.code == "E-USAGE-LABELS"


@pytest.mark.parametrize("spec", ["11/class", "101", "9"])
def test_more_labels_than_there_are_or_fewer_than_classes_are_refused(spec: str) -> None:
    with pytest.raises(MaekitError) as caught:
        label_subset(listed(100, 10), spec, 0)
    assert caught.value.code == "E-DATA-LABELS"


def test_a_source_without_labels_has_no_label_subset() -> None:
    with pytest.raises(MaekitError, match="no labels"):
        label_subset(FileSource("here", ["a"], ["a"]), "1%", 0)


def test_a_builtin_part_and_all_of_it() -> None:
    assert [len(open_source("builtin:fashion", part)) for part in ("train", "val", None)] == [10_000, 2_000, 12_000]
    assert len(open_source("builtin:fashion", "train-or-all")) == 10_000


@given(
    folders=st.lists(st.sampled_from(["", "a/", "a/b/", "é/", "/nowhere/", "/"]), min_size=1, max_size=5),
    there=st.sets(st.integers(0, 99)),
)
@settings(deadline=None, max_examples=20)
def test_what_a_list_names_in_vain_is_found_as_by_asking_for_each(
    tmp_path_factory: pytest.TempPathFactory, folders: list[str], there: set[int]
) -> None:
    """In folders that are listed, of many paths, and in others; in any order; a NUL byte names nothing."""
    root = tmp_path_factory.mktemp("named")
    paths = [f"{folder}{i % 100}.png" for i, folder in enumerate(folders * LISTED_FROM)]
    for folder in {"", "a/", "a/b/", "é/"}:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in there:
            (root / folder / f"{i}.png").touch()
    for asked in (paths, sorted(paths), [f"{folder}\0.png" for folder in folders]):
        naive = [i for i, path in enumerate(asked) if "\0" in path or not os.path.lexists(os.path.join(root, path))]
        assert list(absent(root, asked)) == naive
