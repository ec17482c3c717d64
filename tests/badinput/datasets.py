"""Family 3.2: data sets, by `maekit data`, which opens and reads them exactly as training does."""

import io
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .case import Case
from .images import encoded, npy

PICTURE = encoded(np.arange(64, dtype=np.uint8).reshape(8, 8), "PNG")
OTHER = encoded(np.arange(64, 128, dtype=np.uint8).reshape(8, 8), "PNG")
GOOD = {"set/a.png": PICTURE, "set/b.png": OTHER}
DATA = "data HERE/set"
TINY = (
    "--model vit_tiny_patch16_224 --img-size 8 --patch-size 4 --channels 1 --embed-dim 8 --depth 1 --num-heads 2 "
    "--decoder-dim 8 --decoder-depth 1 --decoder-heads 2 --device cpu --workers 0 --batch-size 2 --steps 2"
)
PRETRAIN = f"pretrain --data HERE/set --out HERE/new {TINY}"
PAYLOAD = b"\x80\x04cos\nmkdir\nX\x06\0\0\0it-ran\x85R."


def table(**columns: Any) -> bytes:
    """A parquet file of columns."""
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue()


def cases() -> list[Case]:
    """Return every case."""
    return [*paths(), *folders(), *lists(), *annotations(), *parquet(), *targets(), *masks()]


def paths() -> list[Case]:
    """What is no place with images; T5: an archive is none, and is not unpacked to see."""
    urls = (
        "https://example.org/images",
        "http://127.0.0.1:9/x.parquet",
        "s3://bucket/images",
        "gs://bucket/x",
        "hf://datasets/x",
        "file:///etc/passwd",
        "ftp://host/x",
        "pipe:cat",
        "pipe:touch\xa0it-ran",
        "|touch",
        "-",
    )
    kinds = {
        "a tar": ("x.tar", b"a" * 512),
        "a zip": ("x.zip", b"PK\x03\x04"),
        "a pickle": ("x.pkl", PAYLOAD),
        "weights": ("x.pt", PAYLOAD),
        "an npz": ("x.npz", b"PK\x03\x04"),
        "YAML": ("x.yaml", "a: 1"),
        "one image": ("x.png", PICTURE),
        "no suffix": ("x", b""),
        "a gzipped list": ("x.csv.gz", b"\x1f\x8b"),
        "an array": ("x.npy", npy(np.zeros((9, 9), np.uint8))),
    }
    return [
        *(Case(f"{url!r} as data", {}, f"data {url}", "E-DATA-PATH", "nothing is fetched") for url in urls),
        *(
            Case(f"{kind} as data", {f"set/{name}": content}, f"{DATA}/{name}", "E-DATA-PATH", "a file of another kind")
            for kind, (name, content) in kinds.items()
        ),
        Case("no data named", {}, "data", "E-USAGE-DATA", "no images named", 2),
        Case("two sets named", {}, "data a b", "E-USAGE-WORD", "unexpected word 'b'", 2),
        Case("a path that is not there", {}, "data HERE/none", "E-DATA-PATH", "none: found No such file"),
        Case("a path below a file", GOOD, "data HERE/set/a.png/x", "E-DATA-PATH", "Not a directory"),
        Case("a name of 300 letters", {}, f"data HERE/{'x' * 300}", "E-DATA-PATH", "File name too long"),
        Case("a name with NUL", {}, "data HERE/a\0b", "E-DATA-PATH", r"\\x00"),
        Case("a name with terminal codes", {}, "data HERE/\x1b[31mred\x07", "E-DATA-PATH", r"\\x1b\[31mred\\x07"),
        Case("a name from right to left", {}, "data HERE/\u202egnp.exe", "E-DATA-PATH", r"\\u202e"),
        Case("an unknown built-in set", {}, "data builtin:mnist", "E-DATA-PATH", "builtin:fashion"),
        Case("a built-in set without a name", {}, "data builtin:", "E-DATA-PATH", "builtin:fashion"),
        Case("a built-in set that climbs", {}, "data builtin:../../etc", "E-DATA-PATH", "builtin:fashion"),
        Case("a device", {}, "data /dev/zero", "E-DATA-PATH", "another kind"),
        Case("a link to itself", lambda here: (here / "set").symlink_to(here / "set"), DATA, "E-DATA-PATH", "symbolic"),
        Case("a pipe as a list", lambda here: os.mkfifo(here / "x.txt"), "data HERE/x.txt", "E-DATA-LIST", "regular"),
        Case(
            "a pipe as a table",
            lambda here: os.mkfifo(here / "x.parquet"),
            "data HERE/x.parquet",
            "E-DATA-PATH",
            "regular",
        ),
        Case(
            "a device as a list",
            lambda here: (here / "x.csv").symlink_to("/dev/zero"),
            "data HERE/x.csv",
            "E-DATA-LIST",
            "regular",
        ),
    ]


def folders() -> list[Case]:
    """Folders with nothing to read, with odd entries, of odd shape."""

    def odd(make: Callable[[Path], object]) -> Callable[[Path], None]:
        def lay(here: Path) -> None:
            Case("", GOOD, "", "").lay(here)
            make(here / "set")

        return lay

    def sparse(folder: Path) -> None:
        with (folder / "huge.jpg").open("wb") as file:
            file.truncate(2**40)

    def local_socket(folder: Path) -> None:
        held, before = socket.socket(socket.AF_UNIX), os.getcwd()
        os.chdir(folder)  # the path of a socket may have a hundred letters
        held.bind("s.jpg")
        held.close()
        os.chdir(before)

    def circle(folder: Path) -> None:
        (folder / "again").symlink_to(folder)

    skipped = r"skipped +1\b"
    names = {
        "a line feed": "a\nb.jpg",
        "terminal codes": "\x1b[31m.jpg",
        "a leading dash": "-rf.jpg",
        "blanks": " .jpg",
        "right to left": "\u202egpj.exe.jpg",
        "255 bytes": "x" * 251 + ".jpg",
        "a quote": "';DROP.jpg",
        "dots": "a..jpg",
        "accents of two kinds": "e\u0301.jpg",
        "HTML": "<b onclick=x>.jpg",
        "a percent": "%00%s.jpg",
        "a brace": "{0}${x}.jpg",
    }
    odd_names = [
        Case(f"a broken image with {what} in its name", {**GOOD, f"set/{name}": b"no image"}, DATA, "", skipped)
        for what, name in names.items()
    ]
    entries: dict[str, tuple[Callable[[Path], object], str]] = {
        "a pipe": (lambda here: os.mkfifo(here / "p.jpg"), "p.jpg: cannot read p.jpg: found not a regular file"),
        "a socket": (local_socket, "s.jpg"),
        "a link to a device": (lambda here: (here / "z.jpg").symlink_to("/dev/zero"), "not a regular file"),
        "a link to itself": (lambda here: (here / "l.jpg").symlink_to("l.jpg"), "symbolic links"),
        "a link to nothing": (lambda here: (here / "l.jpg").symlink_to("gone"), "No such file"),
        "a folder": (lambda here: (here / "d.jpg").mkdir(), "not a regular file|Is a directory"),
        "a terabyte of nothing": (sparse, "1099511627776 bytes, more than"),
        "an empty file": (lambda here: (here / "e.jpg").touch(), "an empty file"),
        "a pickle": (lambda here: (here / "p.jpg").write_bytes(PAYLOAD), "expected one of JPEG"),
        "an array of objects": (
            lambda here: (here / "o.npy").write_bytes(npy(np.array([[{}]]), allow_pickle=True)),
            "array of object",
        ),
    }
    odd_entries = [
        Case(f"{what} among images", odd(make), DATA, "", f"(?s){skipped}.*{said}")
        for what, (make, said) in entries.items()
    ]
    others = [
        Case("an empty folder", {"set/": b""}, DATA, "E-DATA-EMPTY", "no visible file"),
        Case("only hidden files", {"set/.a.png": PICTURE, "set/.git/b.png": PICTURE}, DATA, "E-DATA-EMPTY", "no vis"),
        Case("only class folders", {"set/cat/": b"", "set/dog/": b""}, DATA, "E-DATA-EMPTY", "no visible file"),
        Case(
            "only other files",
            {"set/a.txt": "x", "set/b.mov": "x", "set/c.mov": "x"},
            DATA,
            "E-DATA-EMPTY",
            r"2 \.mov, 1 \.txt",
        ),
        Case(
            "CIFAR's pickles",
            {"set/data_batch_1": PAYLOAD, "set/batches.meta": PAYLOAD},
            DATA,
            "E-DATA-EMPTY",
            "pickles hold code",
        ),
        Case("a val without images", {"set/train/x/a.png": PICTURE, "set/val/": b""}, DATA, "E-DATA-EMPTY", "val"),
        Case("a train without images", {"set/train/": b"", "set/val/x/a.png": PICTURE}, DATA, "E-DATA-EMPTY", "train"),
        Case(
            "other classes in val",
            {"set/train/cats/a.png": PICTURE, "set/train/dogs/b.png": OTHER, "set/val/cat/c.png": PICTURE},
            DATA,
            "",
            "tasks with labels would stop: error.E-DATA-CLASSES.*'cat'",
        ),
        Case(
            "a class without images in val",
            {"set/train/a/a.png": PICTURE, "set/train/b/b.png": OTHER, "set/val/a/c.png": PICTURE},
            DATA,
            "",
            "train of .* has 1 classes not in val",
        ),
        Case("one class", {"set/a/a.png": PICTURE, "set/a/b.png": OTHER}, DATA, "", "one class only"),
        Case(
            "images of val in train too",
            {
                "set/train/a/a.png": PICTURE,
                "set/train/b/b.png": OTHER,
                "set/val/a/c.png": PICTURE,
                "set/val/b/d.png": OTHER,
            },
            DATA,
            "",
            "2 images of val are in train too",
        ),
        Case("an image twice", {"set/a.png": PICTURE, "set/b.png": PICTURE}, DATA, "", "a.png = b.png"),
        Case("flat beside class folders", {**GOOD, "set/cat/c.png": PICTURE}, DATA, "", r"classes +none"),
        Case("deep folders", {"set/" + "d/" * 60 + "a.png": PICTURE}, DATA, "", r"images +1\b"),
        Case("a circle of links", odd(circle), DATA, "", r"images +2\b"),
        Case("names that differ in case", {"set/a.png": PICTURE, "set/A.PNG": OTHER}, DATA, "", r"images +2\b"),
        Case(
            "a name that is no UTF-8",
            odd(lambda here: Path(os.fsdecode(os.fsencode(here) + b"/\xff\xfe.png")).write_bytes(PICTURE)),
            DATA,
            "",
            r"images +3\b",
        ),
        Case("a column of a folder", GOOD, f"{DATA} --label-column kind", "E-DATA-COLUMN", "label_column"),
        Case(
            "a training on nothing but rubbish",
            {f"set/{i}.jpg": b"no image %d" % i for i in range(9)},
            PRETRAIN,
            "E-DATA-BAD",
            "no readable image",
        ),
        Case(
            "a training with six bad images",
            {**GOOD, **{f"set/x{i}.jpg": b"no image %d" % i for i in range(6)}},
            PRETRAIN,
            "E-DATA-BAD",
            "6 of 8",
        ),
        Case("a training on an empty folder", {"set/": b""}, PRETRAIN, "E-DATA-EMPTY", "no images"),
        Case("channels that no picture has", GOOD, PRETRAIN.replace("--channels 1", "--channels 5"), "E-", "5", 2),
        Case("out in the data", GOOD, PRETRAIN.replace("HERE/new", "HERE/set/new"), "E-CONFIG-OUT", "a place in", 2),
    ]
    return [*odd_names, *odd_entries, *others]


def lists() -> list[Case]:
    """List files with a line that is wrong, or odd."""
    wrong = {
        "a file that is not there": ("x.txt", "a.png cat\nnone.png cat\n", "line 2: found no file none.png"),
        "a file twice": ("x.txt", "a.png x\nb.png x\na.png x\n", "line 3: found a.png again.*line 1"),
        "a file twice in other words": ("x.txt", "a.png x\n./a.png x\n", "line 2: found a.png again"),
        "a line without a label": ("x.csv", "a.png,cat\nb.png,\n", "line 2: found no label"),
        "a line that is no image": ("x.txt", "a.png\nnotes.doc\n", "line 2"),
        "a comment": ("x.txt", "# mine\na.png\n", "line 1"),
        "a command": ("x.txt", "$(touch it-ran)\n", "line 1"),
        "a URL": ("x.csv", "http://example.org/a.png,cat\n", "line 1: found no file http:/example.org/a.png"),
        "a path to elsewhere": ("x.txt", "/etc/none.png\n", "no file /etc/none.png"),
        "a path upwards": ("x.txt", "../../none.png\n", "no file ../../none.png"),
        "NUL": ("x.csv", "a\0.png,cat\n", r"line 1"),
        "terminal codes": ("x.csv", "\x1b[31m.png,cat\n", r"\\x1b\[31m.png"),
        "a quote that does not end": ("x.csv", 'a.png,"cat\nb.png,dog\n', "line"),
        "a cell of a million letters": ("x.csv", "a.png," + "x" * 10**6 + "\n", "field larger"),
        "no image column": ("x.csv", "name,label\nfoo,1\n", "line 1"),
        "nothing": ("x.csv", "", "lists no images"),
        "only blanks": ("x.txt", "  \n\n", "lists no images"),
        "only a header": ("x.csv", "path,label\n", "lists no images"),
        "another encoding": ("x.txt", "a.png caf\xe9\n".encode("latin-1"), "a list in UTF-8"),
        "UTF-16": ("x.csv", "a.png,cat\n".encode("utf-16"), "a list in UTF-8"),
        "a pickle": ("x.txt", PAYLOAD, "UTF-8"),
        "an image": ("x.csv", PICTURE, "UTF-8"),
    }
    right = {
        "a byte order mark": ("x.csv", "\ufeffpath,label\na.png,cat\nb.png,dog\n", r"classes +2"),
        "carriage returns": ("x.csv", "path,label\r\na.png,cat\r\nb.png,dog\r\n", r"classes +2"),
        "old Macintosh lines": ("x.txt", "a.png cat\rb.png dog\r", r"classes +2"),
        "a label of a billion": ("x.csv", "a.png,1000000000\nb.png,2\n", r"classes +2"),
        "labels that look like code": ("x.csv", "a.png,__import__('os')\nb.png,${x}\n", r"classes +2"),
        "labels with terminal codes": ("x.csv", "a.png,\x1b[31m\nb.png,dog\n", r"\\x1b\[31m"),
        "quoted cells": ("x.csv", '"a.png","a, b"\n"b.png","c ""d"""\n', r"classes +2"),
        "no last line end": ("x.txt", "a.png cat\nb.png dog", r"classes +2"),
        "columns of other things": ("x.csv", "id,path,width,label\n7,a.png,8,cat\n8,b.png,8,dog\n", r"classes +2"),
        "no labels": ("x.txt", "a.png\nb.png\n", r"classes +none"),
    }
    places = {"set/a.png": PICTURE, "set/b.png": OTHER}
    return [
        *(
            Case(f"a list with {what}", {**places, f"set/{name}": text}, f"{DATA}/{name}", "E-DATA-", said)
            for what, (name, text, said) in wrong.items()
        ),
        *(
            Case(f"a list with {what}", {**places, f"set/{name}": text}, f"{DATA}/{name}", "", said)
            for what, (name, text, said) in right.items()
        ),
        Case(
            "a column that the list has not",
            {**places, "set/x.csv": "path,label\na.png,1\n"},
            f"{DATA}/x.csv --label-column kind",
            "E-DATA-COLUMN",
            "'kind'",
        ),
        Case(
            "an image column that the list has not",
            {**places, "set/x.csv": "path,label\na.png,1\n"},
            f"{DATA}/x.csv --image-column kind",
            "E-DATA-COLUMN",
            "'kind'",
        ),
    ]


def annotations() -> list[Case]:
    """JSON of annotations that is none, or contradicts itself."""
    said: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        "annotations": [{"image_id": 1, "category_id": 7}, {"image_id": 2, "category_id": 9}],
        "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
    }
    wrong: dict[str, tuple[Any, str]] = {
        "an empty object": ({}, "no 'images'"),
        "a list": ([], "cannot read|expected"),
        "a number": (3, "expected"),
        "a name": ("x", "expected"),
        "nothing": (None, "expected"),
        "images that are a number": ({**said, "images": 3}, "expected"),
        "an image without a file": ({**said, "images": [{"id": 1}]}, "file_name"),
        "a file that is a number": ({**said, "images": [{"id": 1, "file_name": 3}]}, "expected"),
        "an image that is not there": ({**said, "images": [{"id": 1, "file_name": "none.png"}]}, "none.png|image 2"),
        "an id that is a list": ({**said, "images": [{"id": [], "file_name": "a.png"}]}, "expected|unhashable"),
        "an unknown category": ({**said, "categories": said["categories"][:1]}, "9"),
        "two annotations of an image": ({**said, "annotations": said["annotations"] * 2}, "two annotations"),
        "an image without an annotation": ({**said, "annotations": said["annotations"][:1]}, ""),
        "two categories of an id": ({**said, "categories": said["categories"] * 2}, ""),
        "a category without a name": ({**said, "categories": [{"id": 7}, {"id": 9}]}, "name"),
    }
    texts = {
        "half a file": json.dumps(said)[:60],
        "brackets without end": "[" * 100_000,
        "a number of 5000 digits": "9" * 5000,
        "two roots": "{}{}",
        "NaN": '{"images": NaN}',
        "a byte order mark alone": "\ufeff",
        "no text": "\0\1\2",
    }
    places = {"set/a.png": PICTURE, "set/b.png": OTHER}
    return [
        *(
            Case(
                f"annotations that are {what}",
                {**places, "set/x.json": json.dumps(value)},
                f"{DATA}/x.json",
                "E-DATA-",
                said_,
            )
            for what, (value, said_) in wrong.items()
        ),
        *(
            Case(f"annotations that are {what}", {**places, "set/x.json": text}, f"{DATA}/x.json", "E-DATA-LIST", "")
            for what, text in texts.items()
        ),
        Case(
            "annotations that are right",
            {**places, "set/x.json": json.dumps(said)},
            f"{DATA}/x.json",
            "",
            r"classes +2",
        ),
    ]


def parquet() -> list[Case]:
    """Parquet files that are none, have not what is needed, or hold what is no image."""
    good = table(image=[PICTURE, OTHER], label=[0, 1])
    named = pa.table({"image": [PICTURE], "label": [5]}).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": {"label": {"names": ["a", "b"]}}}})}
    )
    stream = io.BytesIO()
    pq.write_table(named, stream)
    wrong: dict[str, tuple[bytes, str, str]] = {
        "nothing": (b"", "", "E-DATA-PATH"),
        "only magic": (b"PAR1PAR1", "", "E-DATA-PATH"),
        "text": (b"path,label\n" * 9, "", "E-DATA-PATH"),
        "cut in half": (good[: len(good) // 2], "", "E-DATA-PATH"),
        "cut by a byte": (good[:-1], "", "E-DATA-PATH"),
        "encrypted by its magic": (good[:-4] + b"PARE", "", "E-DATA-PATH"),
        "a footer of 2 GB": (good[:-8] + b"\xff\xff\xff\x7fPAR1", "", "E-DATA-PATH"),
        "a footer of nothing": (good[:-8] + bytes(4) + b"PAR1", "", "E-DATA-PATH"),
        "a pickle": (PAYLOAD, "", "E-DATA-PATH"),
        "without rows": (
            table(image=pa.array([], pa.binary()), label=pa.array([], pa.int64())),
            "no rows",
            "E-DATA-EMPTY",
        ),
        "without bytes": (table(path=["a"], label=[0]), "no column of image bytes", "E-DATA-COLUMN"),
        "with text for images": (table(image=["a.png"], label=[0]), "no column of image bytes", "E-DATA-COLUMN"),
        "with an empty label": (
            table(image=[PICTURE] * 2, label=[0, None]),
            "row 1, column 'label': found no label",
            "E-DATA-LABELS",
        ),
        "with a label that has no name": (stream.getvalue(), "label 5", "E-DATA-LABELS"),
    }
    held = {
        "a pickle": PAYLOAD,
        "text": b"hello",
        "nothing": b"",
        "an empty cell": None,
        "HTML": b"<html>",
        "an array of objects": npy(np.array([[{}]]), allow_pickle=True),
        "half an image": PICTURE[:40],
    }
    return [
        *(
            Case(
                f"a table {what if what[:4] == 'with' else 'that is ' + what}",
                {"set/x.parquet": data},
                f"{DATA}/x.parquet",
                code,
                said,
            )
            for what, (data, said, code) in wrong.items()
        ),
        *(
            Case(
                f"a table with {what} for an image",
                {"set/x.parquet": table(image=[PICTURE, cell, OTHER])},
                f"{DATA}/x.parquet",
                "",
                r"(?s)skipped +1\b.*x.parquet:1",
            )
            for what, cell in held.items()
        ),
        Case(
            "a column that the table has not",
            {"set/x.parquet": good},
            f"{DATA}/x.parquet --image-column kind",
            "E-DATA-COLUMN",
            "'kind'",
        ),
        Case(
            "labels in bytes",
            {"set/x.parquet": good},
            f"{DATA}/x.parquet --label-column image",
            "E-DATA-COLUMN",
            "whole numbers or text",
        ),
        Case(
            "a folder called .parquet", {"set/x.parquet/": b""}, f"{DATA}/x.parquet", "E-DATA-EMPTY", "no visible file"
        ),
        Case(
            "two tables of other columns",
            {"set/a.parquet": good, "set/b.parquet": table(image=[PICTURE], kind=["x"])},
            DATA,
            "E-DATA-",
            "label",
        ),
        Case(
            "a broken table beside a good one",
            {"set/a.parquet": good, "set/b.parquet": good[:99]},
            DATA,
            "",
            r"images +2",
        ),
        Case(
            "labels all -1",
            {"set/x.parquet": table(image=[PICTURE, OTHER], label=[-1, -1])},
            f"{DATA}/x.parquet",
            "",
            r"classes +none",
        ),
        Case(
            "a label of a billion in a table",
            {"set/x.parquet": table(image=[PICTURE, OTHER], label=[10**9, -5])},
            f"{DATA}/x.parquet",
            "",
            r"classes +2",
        ),
        Case("a table that is right", {"set/x.parquet": good}, f"{DATA}/x.parquet", "", r"images +2"),
    ]


def targets() -> list[Case]:
    """Tags and numbers in cells that hold none."""
    words = "finetune --from-scratch --data HERE/set/x.csv --out HERE/new --device cpu --workers 0 --task"
    numbers = {
        "a word": "cat",
        "nothing": "",
        "NaN": "nan",
        "infinity": "inf",
        "1e999": "1e999",
        "1_000": "1_000",
        "a comma": '"1,5"',
        "two numbers": "1 2",
        "hexadecimal": "0x10",
        "code": "__import__('os').mkdir('it-ran')",
    }
    rows = "path,label\na.png,1.5\nb.png,"
    return [
        *(
            Case(
                f"a number that is {what}",
                {**GOOD, "set/x.csv": f"{rows}{cell}\n"},
                f"{words} regression",
                "E-DATA-TARGETS",
                "line 3|x.csv",
            )
            for what, cell in numbers.items()
        ),
        Case(
            "a tag twice",
            {**GOOD, "set/x.csv": "path,label\na.png,x|x\nb.png,y\n"},
            f"{words} multilabel",
            "E-DATA-TARGETS",
            "'x' twice",
        ),
        Case(
            "no tag at all",
            {**GOOD, "set/x.csv": "path,label\na.png,\nb.png,\n"},
            f"{words} multilabel",
            "E-DATA-TARGETS",
            "",
        ),
        Case(
            "a tick that is 2",
            {**GOOD, "set/x.csv": "path,a,b\na.png,0,1\nb.png,2,0\n"},
            f"{words} multilabel --label-column a,b",
            "E-DATA-TARGETS",
            "expected 0 or 1",
        ),
        Case(
            "tags of a folder",
            GOOD,
            f"{words} multilabel".replace("/x.csv", ""),
            "E-DATA-TARGETS",
            "a folder of images",
        ),
        Case(
            "a column of tags that is not there",
            {**GOOD, "set/x.csv": "path,a\na.png,0\n"},
            f"{words} multilabel --label-column a,c",
            "E-DATA-COLUMN",
            "'c'",
        ),
    ]


def masks() -> list[Case]:
    """Masks that users bring: arrays and folders."""
    words = f"{PRETRAIN} --mask-kind given --mask-from HERE/m"
    wrong = {
        "of objects": (npy(np.array([{}] * 4), allow_pickle=True), "pickle"),
        "of text": (npy(np.array(["a"] * 4)), "type"),
        "of another shape": (npy(np.zeros(5)), r"shape \(5,\)"),
        "with NaN": (npy(np.array([1, np.nan, 0, 0])), "finite"),
        "above float32": (npy(np.array([1, 1e300, 0, 0])), "finite|inf"),
        "cut off": (npy(np.zeros(4))[:-3], "cannot read"),
        "empty": (b"", "cannot read"),
        "a pickle": (PAYLOAD, "cannot read"),
        "a zip": (b"PK\x03\x04" + bytes(30), "cannot read"),
        "with a header of code": (
            b"\x93NUMPY\x01\0\x20\0__import__('os').mkdir('it-ran')\n" + bytes(32),
            "cannot read",
        ),
        "with a header that does not end": (b"\x93NUMPY\x01\0\x10\0{'descr': (((((\n" + bytes(32), "cannot read"),
        "that claim 8 TB": (npy(np.zeros(4)).replace(b"(4,)", b"(2**40,)"), "cannot read"),
    }
    return [
        *(
            Case(f"masks {what}", {**GOOD, "m.npy": data}, f"{words}.npy", "E-DATA-MASK", said)
            for what, (data, said) in wrong.items()
        ),
        Case("masks that are not there", GOOD, f"{words}.npy", "E-DATA-MASK", "no such file"),
        Case("a folder without masks", {**GOOD, "m/": b""}, words, "E-DATA-MASK", "no .png"),
        Case("a folder that lacks a mask", {**GOOD, "m/a.png": PICTURE}, words, "E-DATA-MASK", "b.png"),
        Case("given masks that nobody gave", GOOD, f"{PRETRAIN} --mask-kind given", "E-CONFIG-MASK", "", 2),
    ]
