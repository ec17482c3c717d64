"""A data set written once as something that reads fast: images resized and encoded, in verified parquet files.

`pack_image` makes the packed form of one image; what is small enough already stays the file that it was, byte for byte,
so that no JPEG is compressed twice. `write_shard` writes a run of images: columns ``id`` (the source's, so that parts
drawn by a hash of the id are the same ones), ``image``, ``label``, ``label_name``, in row groups of about a megabyte:
reading one of them costs 0.1 ms, and an image is read with its group. With format raw the pixels lie in a plain array
beside (`maekit.data.pixels`): parquet would be copied into the memory of every process, arrays are mapped and shared.

What is packed is what `read_image` reads, in its orientation and colours; it is decoded again, to see that it can be
and how far it is from the pixels before.
"""

import errno
import hashlib
import io
import json
import math
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from maekit.data.augment import resize_to_cover
from maekit.data.image import read_image
from maekit.data.parquet import PACKED, Packed
from maekit.data.source import Source
from maekit.disk import put
from maekit.errors import MaekitError
from maekit.failpoints import reach

GROUP_BYTES = 2**20
"""Bytes of a row group, which is what is read for one image."""
MOST_IN_GROUP = 1000
"""Rows of a group of tiny images."""

Format = Literal["jpeg", "webp", "png", "raw"]


@dataclass(frozen=True)
class Way:
    """How images are packed; the settings of ``maekit pack`` that change bytes.

    Attributes:
        format: of what is encoded.
        quality: of jpeg and webp.
        short_side: largest shorter side in pixels; None: any.
        square: whether the centre is cut out.
        channels: as in `read_image`.
        recompress: whether what is small enough is encoded all the same.
    """

    format: Format
    quality: int
    short_side: int | None
    square: bool
    channels: int | None
    recompress: bool


@dataclass(frozen=True)
class Piece:
    """A packed image.

    Attributes:
        data: the encoded image, or with format raw its pixels (H, W, C).
        before: bytes that it had.
        kept: whether `data` is what it was, byte for byte.
        noise: mean square error of what `data` decodes to, in levels of 255; 0: every pixel is what it was.
    """

    data: bytes | np.ndarray
    before: int
    kept: bool
    noise: float

    @property
    def size(self) -> int:
        """Bytes of `data`."""
        return len(self.data) if isinstance(self.data, bytes) else self.data.nbytes


def pack_image(data: bytes | Tensor, way: Way, name: str) -> Piece:
    """Pack one image.

    Raises:
        MaekitError: E-DATA-IMAGE for what cannot be used, or not be held by format raw.
    """
    image = data if isinstance(data, Tensor) else read_image(data, channels=way.channels, name=name)
    before = len(data) if isinstance(data, bytes) else data.numel() * data.element_size()
    wanted = resized(image, way)
    if way.format == "raw":
        if wanted.dtype != torch.uint8:
            raise MaekitError("E-DATA-IMAGE", f"cannot pack {name} as raw", found="an array of floats",
                              expected="8 bits", hint="another --format: arrays stay arrays then")  # fmt: skip
        return Piece(np.ascontiguousarray(wanted.permute(1, 2, 0).numpy()), before, kept=False, noise=0.0)
    if isinstance(data, bytes) and wanted is image and not way.recompress:
        return Piece(data, before, kept=True, noise=0.0)
    try:
        encoded = encode(wanted, way)
    except (OSError, ValueError) as error:  # a JPEG has at most 65500 pixels a side, a WebP 16383
        raise MaekitError("E-DATA-IMAGE", f"cannot encode {name}", found=f"{tuple(wanted.shape[1:])}: {error}",
                          hint="--format png") from error  # fmt: skip
    again = read_image(encoded, channels=len(wanted), name=f"{name}, packed")
    return Piece(encoded, before, kept=False, noise=_noise(wanted, again))


def resized(image: Tensor, way: Way) -> Tensor:
    """Return (C, H, W) resized so that the shorter side is `way.short_side`, never enlarged; as it is if that is none.

    Bicubic and antialiased, as every view resizes.
    """
    if way.short_side is not None and min(image.shape[-2:]) > way.short_side:
        image = resize_to_cover(image, (way.short_side, way.short_side), 1.0)
    if way.square and image.shape[-2] != image.shape[-1]:
        image = F.center_crop(image, [min(image.shape[-2:])] * 2)
    return image


def encode(image: Tensor, way: Way) -> bytes:
    """Encode (C, H, W). What is no picture (floats, other channels than 1 and 3) becomes .npy; grey is kept as grey."""
    if image.dtype != torch.uint8 or len(image) not in (1, 3):
        file = io.BytesIO()
        np.save(file, np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
        return file.getvalue()
    if len(image) == 3 and torch.equal(image[0], image[1]) and torch.equal(image[0], image[2]):
        image = image[:1]
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    if way.format == "jpeg":
        colours, sampling = ("GRAY", "Gray") if len(image) == 1 else ("RGB", "444" if way.quality >= 95 else "420")
        return simplejpeg.encode_jpeg(pixels, way.quality, colours, sampling)
    file, picture = io.BytesIO(), Image.fromarray(pixels[..., 0] if len(image) == 1 else pixels)
    if way.format == "webp":
        picture.save(file, "WebP", quality=way.quality)
    else:
        picture.save(file, "PNG")
    return file.getvalue()


def _noise(image: Tensor, again: Tensor) -> float:
    assert image.shape == again.shape
    if torch.equal(image, again):
        return 0.0
    return float((image.double() - again.double()).square().mean())


def psnr(noise: float) -> float:
    """Return the peak signal-to-noise ratio in dB of a mean square error in levels of 255."""
    return 10 * math.log10(255**2 / noise)


@dataclass(frozen=True)
class Shard:
    """A run of images of one part.

    Attributes:
        part: its name on the disk.
        number: of this file, of so many.
        rows: its images in the source.
    """

    part: str
    number: int
    of: int
    rows: range

    @property
    def stem(self) -> str:
        """Its files' name, as the hub's data sets have them."""
        return f"{self.part}-{self.number:05d}-of-{self.of:05d}"


def cut(part: str, images: int, rows: int) -> list[Shard]:
    """Cut a part into shards of so many images."""
    count = math.ceil(images / rows)
    return [Shard(part, n, count, range(n * rows, min((n + 1) * rows, images))) for n in range(count)]


def write_shard(
    folder: Path, shard: Shard, source: Source, pieces: Sequence[tuple[int, Piece]], shape: tuple[int, int, int] | None
) -> dict[str, str]:
    """Write the files of a shard, each whole and read back, or not at all.

    Args:
        pieces: index in the source and packed image, in order.
        shape: height, width, channels with format raw.

    Returns:
        SHA-256 of each file by name.

    Raises:
        OSError: if a file cannot be written, or what is read back is not what was written.
    """
    chosen, packed = [i for i, _ in pieces], Packed(shard.part, shape)
    columns = {"id": pa.array([source.ids[i] for i in chosen], pa.string())}
    files = {}
    if shape is None:
        columns["image"] = pa.array([piece.data for _, piece in pieces], pa.binary())
    else:
        array = np.stack([piece.data for _, piece in pieces]) if pieces else np.zeros((0, *shape), np.uint8)
        file = io.BytesIO()
        np.save(file, array)
        files[f"{shard.stem}.npy"] = file.getbuffer()
    more, metadata = _labels(source, chosen)
    table = pa.table({**columns, **more}).replace_schema_metadata({PACKED: packed.to_json(), **metadata})
    files[f"{shard.stem}.parquet"] = _parquet(table, sum(piece.size for _, piece in pieces) if shape is None else 0)
    return {name: write_verified(folder / name, data) for name, data in files.items()}


def _labels(source: Source, chosen: list[int]) -> tuple[dict[str, pa.Array], dict[bytes, str]]:
    """Return the columns of class, tags or numbers, and metadata that keep the order of tags.

    Raises:
        MaekitError: E-DATA-COLUMN for numbers called as another column is.
    """
    if source.labels is not None and source.classes is not None:
        labels = [source.labels[i] for i in chosen]
        names = pa.array([source.classes[label] for label in labels], pa.string())
        return {"label": pa.array(labels, pa.int64()), "label_name": names}, {}
    if source.targets is None:
        return {}, {}
    names, values = source.targets.names, source.targets.values[chosen]
    if values.dtype == np.uint8:
        tags = pa.array([np.flatnonzero(row).tolist() for row in values], pa.list_(pa.int64()))
        known = {"info": {"features": {"label": [{"names": names, "_type": "ClassLabel"}]}}}
        return {"label": tags}, {b"huggingface": json.dumps(known)}
    if taken := {"id", "image"} & set(names):
        raise MaekitError("E-DATA-COLUMN", f"numbers of {source.name}", found=f"a column {taken.pop()!r}",
                          expected="another name: packed files have it")  # fmt: skip
    return {name: pa.array(values[:, k], pa.float64()) for k, name in enumerate(names)}, {}


def _parquet(table: pa.Table, size: int) -> memoryview:
    each = max(1, size // max(1, len(table)))
    rows = MOST_IN_GROUP if not size else min(MOST_IN_GROUP, max(1, GROUP_BYTES // each))
    sink = pa.BufferOutputStream()
    options: dict[str, Any] = {
        "compression": {name: "NONE" if name == "image" else "ZSTD" for name in table.column_names},
        "use_dictionary": [name for name in table.column_names if name not in ("image", "id")],
    }
    pq.write_table(table, sink, row_group_size=rows, write_statistics=False, **options)
    return memoryview(sink.getvalue())


def write_verified(path: Path, data: bytes | memoryview) -> str:
    """Write a file beside, read it back from the disk, rename it; return its SHA-256.

    Raises:
        OSError: if it cannot be written, EIO if what was read back is not what was written.
    """
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
    digest = hashlib.sha256(data).hexdigest()
    try:
        with temporary.open("xb") as file:
            reach("pack-write")
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # so that what is read comes from the disk
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if reach("pack-read-back") or digest_of(temporary) != digest:
            raise OSError(errno.EIO, "what was read back is not what was written", str(path))
        put(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
