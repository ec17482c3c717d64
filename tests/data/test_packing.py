"""Packed images and the files they lie in: the pixels that they had, or as near as is said, under the same ids."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode, Resize

from maekit.data import parquet
from maekit.data.image import read_image
from maekit.data.packing import Shard, Way, cut, encode, pack_image, psnr, write_shard, write_verified
from maekit.data.pixels import PixelSource
from maekit.data.source import FileSource
from maekit.data.sources import open_source
from maekit.errors import MaekitError
from maekit.failpoints import arm

to_32, to_64 = (Resize(side, InterpolationMode.BICUBIC, antialias=True) for side in (32, 64))
PNG = Way("png", 90, 32, square=False, channels=None, recompress=False)


def photo(height: int, width: int, form: str = "PNG", **more: Any) -> bytes:
    """Return an encoded picture: slow waves, and noise as photographs have it."""
    rows, columns = np.mgrid[:height, :width] / 20
    waves = np.stack([np.sin(rows), np.cos(columns), np.sin(rows + columns)], -1) * 90 + 128
    noise = np.random.default_rng(height * width).normal(0, 3, waves.shape)
    file = io.BytesIO()
    Image.fromarray((waves + noise).clip(0, 255).astype(np.uint8)).save(file, form, **more)
    return file.getvalue()


def test_resized_as_torchvision_does_and_never_enlarged() -> None:
    for size in ((96, 60), (60, 96), (40, 40)):
        data = photo(*size)
        piece = pack_image(data, PNG, "x")
        assert isinstance(piece.data, bytes) and not piece.kept and piece.noise == 0
        expected = to_32(read_image(data))
        assert torch.equal(read_image(piece.data), expected) and min(expected.shape[1:]) == 32
    small = photo(20, 32, "JPEG")
    assert pack_image(small, PNG, "x").data == small  # byte for byte
    assert pack_image(small, Way("png", 90, None, False, None, False), "x").data == small
    again = pack_image(small, Way("png", 90, 32, False, None, recompress=True), "x")
    assert isinstance(again.data, bytes) and again.data[:4] == b"\x89PNG"
    assert torch.equal(read_image(again.data), read_image(small))
    square = pack_image(photo(40, 90), Way("raw", 90, 32, True, None, False), "x").data
    assert isinstance(square, np.ndarray) and square.shape == (32, 32, 3)


@pytest.mark.parametrize(("form", "quality", "least"), [("jpeg", 95, 36), ("jpeg", 90, 34), ("webp", 90, 34)])
def test_what_a_lossy_format_costs_is_what_is_said(form: Any, quality: int, least: float) -> None:
    data = photo(96, 80)
    piece = pack_image(data, Way(form, quality, 64, False, None, False), "x")
    assert isinstance(piece.data, bytes)
    before = to_64(read_image(data))
    error = (read_image(piece.data).double() - before.double()).square().mean()
    assert piece.noise == pytest.approx(float(error)) and psnr(piece.noise) > least
    assert piece.size < len(data) and piece.before == len(data)


def test_orientation_is_that_of_the_image_policy() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees: not applied, in training or here
    data = photo(48, 96, "JPEG", exif=exif)
    piece = pack_image(data, PNG, "x")
    assert isinstance(piece.data, bytes) and read_image(piece.data).shape == (3, 32, 64)
    assert not Image.open(io.BytesIO(piece.data)).getexif()  # so that no other program turns it


def test_grey_stays_grey_and_arrays_stay_arrays() -> None:
    grey = torch.randint(256, (1, 40, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for form in ("png", "jpeg"):
        data = encode(grey.repeat(3, 1, 1), Way(form, 95, None, False, None, False))
        assert Image.open(io.BytesIO(data)).mode == "L"
        if form == "png":
            assert torch.equal(read_image(data), grey.repeat(3, 1, 1)) and torch.equal(
                read_image(data, channels=1), grey
            )
    for image in (torch.rand(2, 6, 5), torch.rand(3, 6, 5), torch.randint(256, (5, 6, 5), dtype=torch.uint8)):
        assert torch.equal(read_image(encode(image, PNG)), image)
    file = io.BytesIO()
    np.save(file, np.zeros((8, 8), np.float32))
    with pytest.raises(MaekitError, match="floats"):
        pack_image(file.getvalue(), Way("raw", 90, None, False, None, False), "x")


def test_what_a_format_cannot_hold_is_a_bad_image() -> None:
    wide = photo(4, 17_000)
    for form, found in (("webp", "cannot encode x"), ("jpeg", None)):
        way = Way(form, 90, None, False, None, recompress=True)  # type: ignore[arg-type]
        if found is None:
            assert pack_image(wide, way, "x").size
            continue
        with pytest.raises(MaekitError, match=found):
            pack_image(wide, way, "x")


# ------------------------------------------------------------------------------------------------------- files


def folder_of(place: Path, count: int = 12) -> FileSource:
    """Write pictures into two class folders."""
    for i in range(count):
        (place / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (place / "ab"[i % 2] / f"{i:02d}.png").write_bytes(photo(16, 16 + i))
    source = open_source(place)
    assert isinstance(source, FileSource)
    return source


def packed(place: Path, source: FileSource, way: Way = PNG, rows: int = 5, part: str = "images") -> Path:
    """Write all shards of a source."""
    place.mkdir(exist_ok=True)
    for shard in cut(part, len(source), rows):
        pieces = [(i, pack_image(source.read(i), way, source.ids[i])) for i in shard.rows]
        shape = pieces[0][1].data.shape if way.format == "raw" else None  # type: ignore[union-attr]
        write_shard(place, shard, source, pieces, shape)
    return place


def test_files_hold_ids_labels_and_pixels(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "data")
    found = open_source(packed(tmp_path / "packed", source))
    assert [path.name for path in sorted((tmp_path / "packed").iterdir())] == [
        f"images-{n:05d}-of-00003.parquet" for n in range(3)
    ]
    assert (found.ids, found.labels, found.classes) == (source.ids, source.labels, source.classes)
    assert [found.read(i) for i in range(12)] == [source.read(i) for i in range(12)]


def test_pixels_are_mapped_and_shared_by_copies_for_workers(tmp_path: Path) -> None:
    import pickle

    source = folder_of(tmp_path / "data")
    way = Way("raw", 90, 16, True, None, False)
    found = open_source(packed(tmp_path / "packed", source, way))
    assert isinstance(found, PixelSource) and (found.ids, found.labels) == (source.ids, source.labels)
    for copy in (found, pickle.loads(pickle.dumps(found)), found.subset([7, 3])):
        for i in range(len(copy)):
            image = copy.read(i)
            expected = pack_image(source.read(source.ids.index(copy.ids[i])), way, "x").data
            assert image.dtype == torch.uint8 and np.array_equal(image.permute(1, 2, 0).numpy(), expected)
    assert len(pickle.dumps(found)) < 5000
    array = tmp_path / "packed/images-00001-of-00003.npy"
    assert np.load(array, mmap_mode="r").shape == (5, 16, 16, 3)
    for harm in (lambda: array.write_bytes(array.read_bytes()[:-1]), lambda: np.save(array, np.zeros((5, 2, 2, 3))),
                 array.unlink):  # fmt: skip
        harm()
        with pytest.raises(MaekitError, match=r"E-DATA-PATH.*images-00001"):
            open_source(tmp_path / "packed")


def test_ids_that_are_not_there_or_not_unique_are_refused(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "data", 4)
    packed(tmp_path / "packed", source)
    file = tmp_path / "packed/images-00000-of-00001.parquet"
    table = pq.read_table(file)
    for ids, found in (([None, "a", "b", "c"], "without text"), (["a", "a", "b", "c"], "a twice"), (None, "ids of")):
        changed = table.drop_columns(["id"]) if ids is None else table.set_column(0, "id", pa.array(ids, pa.string()))
        pq.write_table(changed, file)
        with pytest.raises(MaekitError, match=f"E-DATA-COLUMN.*{found}"):
            open_source(file)
    for said in (b"", b"{}", b'{"part": 3, "pixels": null}', b'{"part": "a", "pixels": [1, 2]}', b"[" * 10_000):
        pq.write_table(table.replace_schema_metadata({parquet.PACKED: said}), file)  # rubbish: a file like any other
        assert open_source(file).ids == [f"{file.name}:{row}" for row in range(4)]


def test_files_packed_in_several_ways_are_refused(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "data", 4)
    packed(tmp_path / "packed", source)
    packed(tmp_path / "packed", source, Way("raw", 90, 16, True, None, False), rows=2, part="other")
    with pytest.raises(MaekitError, match="several ways"):
        open_source(tmp_path / "packed")
    for file in (tmp_path / "packed").glob("other*"):
        file.unlink()
    pq.write_table(
        pa.table({"image": [source.read(0)], "label": [0], "label_name": ["a"]}), tmp_path / "packed/other.parquet"
    )
    with pytest.raises(MaekitError, match="or not at all"):
        open_source(tmp_path / "packed")


def test_rows_are_found_with_few_files_open_and_little_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "OPEN_FILES", 2)
    monkeypatch.setattr(parquet, "CACHE_BYTES", 1)
    source = folder_of(tmp_path / "data")
    found = open_source(packed(tmp_path / "packed", source, rows=2))
    order = np.random.default_rng(0).permutation(np.repeat(range(12), 3)).tolist()
    assert [found.read(i) for i in order] == [source.read(i) for i in order]


def test_a_file_is_whole_and_read_back_or_not_there(tmp_path: Path) -> None:
    for fault, error in (("pack-write:enospc", "No space"), ("pack-read-back:on", "read back")):
        arm(fault)
        try:
            with pytest.raises(OSError, match=error):
                write_verified(tmp_path / "x", b"data")
        finally:
            arm("")
        assert not list(tmp_path.iterdir())
    write_verified(tmp_path / "x", b"data")
    assert (tmp_path / "x").read_bytes() == b"data"


def test_a_shard_of_no_readable_image_is_a_file_of_no_rows(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "data", 4)
    packed(tmp_path / "packed", source)
    write_shard(tmp_path / "packed", Shard("images", 7, 8, range(0)), source, [], None)
    assert open_source(tmp_path / "packed").ids == source.ids
    schema = pq.read_schema(tmp_path / "packed/images-00007-of-00008.parquet")
    assert json.loads(schema.metadata[parquet.PACKED]) == {"part": "images", "pixels": None}
