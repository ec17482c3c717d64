"""The sound files that mutants are made of, and the doors of the package through which they go.

An `Original` is small (a few kilobytes), so that thousands of mutants a second can be read. Where a checksum stands
before what it protects, every mutant would end there; so there are originals whose sums are mended after the damage
(PNG, the pickle in an archive, a checkpoint's manifest), beside the same without.
"""

import contextlib
import hashlib
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from maekit.config import dump_yaml, resolve
from maekit.data.image import MAX_PIXELS, num_frames, read_image
from maekit.data.masks import open_masks
from maekit.data.parquet import PACKED, Packed
from maekit.data.pixels import PixelSource
from maekit.data.sources import Form, open_source
from maekit.errors import MaekitError
from maekit.interchange.files import read_file
from maekit.interchange.reading import Hints
from maekit.interchange.targets import load_target, save_target
from maekit.interchange.weights import as_model, load_classifier, read_weights, save_model
from maekit.model.mae import create_model
from maekit.model.pca import PatchPCA
from maekit.settings import Pretrain
from maekit.train import checkpoint

SENTINEL = "it-ran"
"""What a payload makes in the folder where it is read, if it ever runs."""


@dataclass(frozen=True)
class Original:
    """A sound file and its way into the package.

    Attributes:
        name: of the form.
        data: what is hurt.
        read: takes the (hurt) bytes and a folder of its own to lay them in; reads them as the package does.
        finish: mends after the damage what would otherwise end every mutant at the same place.
    """

    name: str
    data: bytes
    read: Callable[[bytes, Path], object]
    finish: Callable[[bytes], bytes] = bytes


# ------------------------------------------------------------------------------------------------------ decode


def _decode(data: bytes, folder: Path) -> None:
    """Read an image in each way that a caller may want it."""
    for channels in (None, 1):
        with contextlib.suppress(MaekitError):
            image = read_image(data, channels=channels, name="mutant")
            assert image.ndim == 3 and image.shape[1] * image.shape[2] <= MAX_PIXELS, image.shape
            assert image.dtype in (torch.uint8, torch.float32), image.dtype
            assert num_frames(data) >= 1
    read_image(data, name="mutant")


def images() -> list[Original]:
    """Return pictures in every format that is read, plain and with what the format allows."""
    y, x = np.mgrid[0:24, 0:32]
    colour = np.stack([127 + 100 * np.sin(x / 9), 127 + 100 * np.cos(y / 7), (x * y) % 256], -1).astype(np.uint8)
    grey, deep = colour[..., 0], (colour[..., 0].astype(np.uint16) * 257)
    alpha = np.concatenate([colour, grey[..., None]], -1)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "seen from above"
    two = {"save_all": True, "append_images": [Image.fromarray(colour[::-1])]}
    made = {
        "jpeg": _encoded(colour, "JPEG", exif=exif, comment=b"a comment"),
        "jpeg, progressive": _encoded(colour, "JPEG", progressive=True, icc_profile=bytes(64)),
        "jpeg, grey": _encoded(grey, "JPEG", restart_marker_blocks=1),
        "jpeg, four inks": _encoded(Image.fromarray(colour).convert("CMYK"), "JPEG"),
        "png": _encoded(colour, "PNG", exif=exif),
        "png, alpha": _encoded(alpha, "PNG"),
        "png, palette": _encoded(Image.fromarray(colour).quantize(16), "PNG", transparency=3),
        "png, 16 bits": _encoded(deep, "PNG"),
        "png, animated": _encoded(colour, "PNG", **two),
        "webp": _encoded(colour, "WEBP", exif=exif),
        "webp, lossless": _encoded(alpha, "WEBP", lossless=True),
        "webp, animated": _encoded(colour, "WEBP", **two),
        "bmp": _encoded(colour, "BMP"),
        "bmp, palette": _encoded(Image.fromarray(colour).quantize(16), "BMP"),
        "tiff": _encoded(colour, "TIFF"),
        "tiff, packed": _encoded(colour, "TIFF", compression="tiff_lzw"),
        "tiff, jpeg": _encoded(colour, "TIFF", compression="jpeg"),
        "tiff, fax": _encoded(Image.fromarray(grey).convert("1"), "TIFF", compression="group4"),
        "tiff, floats": _encoded((grey / 255).astype(np.float32), "TIFF"),
        "tiff, pages": _encoded(colour, "TIFF", compression="tiff_adobe_deflate", **two),
        "gif": _encoded(Image.fromarray(colour).quantize(32), "GIF", comment=b"a comment"),
        "gif, animated": _encoded(colour, "GIF", **two),
        "npy": _array(colour),
        "npy, floats": _array(np.asfortranarray(colour / 255.0)),
    }
    mended = [
        Original(f"{name}, sums mended", data, _decode, _mend_png) for name, data in made.items() if name[:3] == "png"
    ]
    return [Original(name, data, _decode) for name, data in made.items()] + mended


IMAGE_WORDS = (
    b"\xff\xd8\xff\xe0", b"\xff\xd9", b"\xff\xda", b"\xff\xc0", b"\xff\xc2", b"\xff\xc4", b"\xff\xdb",
    b"\xff\xdd\0\4", b"\xff\xd0", b"\xff\xee\0\x0eAdobe", b"Exif\0\0II*\0\x08\0\0\0", b"\x89PNG\r\n\x1a\n", b"IHDR",
    b"IDAT", b"IEND", b"PLTE", b"tRNS", b"zTXt", b"iTXt", b"iCCP", b"acTL", b"fcTL", b"fdAT", b"eXIf", b"RIFF",
    b"WEBP", b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANMF", b"EXIF", b"GIF89a", b"\x21\xf9\x04",
    b"\x21\xff\x0bNETSCAPE2.0", b"\x2c\0\0\0\0", b"II*\0", b"MM\0*", b"II+\0", b"\x01\x01\4\0\1\0\0\0",
    b"\x03\x01\3\0\1\0\0\0", b"BM", b"\x28\0\0\0", b"\x93NUMPY\x01\0", b"'descr': '|O'",
    b"'shape': (8000, 8000, 8000)", b"True", b"<f8",
)  # fmt: skip


def _encoded(image: Image.Image | np.ndarray, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(stream, form, **options)
    return stream.getvalue()


def _array(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def _mend_png(data: bytes) -> bytes:
    """Set the checksum of every chunk that is still one."""
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        (size,) = struct.unpack_from(">I", out, at)
        if at + 12 + size > len(out):
            break
        struct.pack_into(">I", out, at + 8 + size, zlib.crc32(out[at + 4 : at + 8 + size]))
        at += 12 + size
    return bytes(out)


# ----------------------------------------------------------------------------------------------------- parquet


def _open(data: bytes, folder: Path, file: str, form: Form | None = None) -> None:
    """Open a file of data as training does, and read all that it lists."""
    (folder / file).write_bytes(data)
    source = open_source(folder / file, form=form)
    assert len(source) == len(source.ids) == len(set(source.ids))
    for i in range(min(len(source), 4)):
        with contextlib.suppress(MaekitError):
            content = source.read(i)
            if isinstance(source, PixelSource):
                assert isinstance(content, Tensor) and content.dtype == torch.uint8
                continue
            assert isinstance(content, bytes), type(content)
            read_image(content, name=source.ids[i])
    source.fingerprint()


def tables() -> list[Original]:
    """Return parquet files of images: with classes, names of classes, tags, compression, nested columns."""
    picture = _encoded(np.zeros((4, 4), np.uint8), "PNG")
    names = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    plain = pa.table({"image": [picture] * 3, "label": [0, 1, 1], "label_name": ["cat", "dog", "dog"]})
    nested = pa.table({"image": [{"bytes": picture, "path": "a.png"}] * 3, "label": [0, 1, 1]})
    tagged = pa.table({"jpg": [picture] * 3, "label": [["a"], ["a", "b"], []], "thumb": [b"x"] * 3})
    worded = pa.table({"img": [picture] * 3, "class": pa.array(["a", "b", "a"]).dictionary_encode()})
    nested = nested.replace_schema_metadata({"huggingface": json.dumps(names)})
    named = pa.table({"id": ["a/1.png", "a/2.png", "b/3.png"], "image": [picture] * 3, "label": [0, 0, 1]})
    named = named.replace_schema_metadata({PACKED: Packed("train").to_json()})
    beside = named.drop_columns(["image"]).replace_schema_metadata({PACKED: Packed("train", (4, 5, 3)).to_json()})
    pixels = _array(np.zeros((3, 4, 5, 3), np.uint8))
    none: Any = "none"

    def read(data: bytes, folder: Path) -> None:
        _open(data, folder, "mutant.parquet")

    def read_tags(data: bytes, folder: Path) -> None:
        _open(data, folder, "mutant.parquet", Form("multilabel"))

    def read_beside(data: bytes, folder: Path) -> None:
        (folder / "mutant.npy").write_bytes(pixels)
        _open(data, folder, "mutant.parquet")

    def read_pixels(data: bytes, folder: Path) -> None:
        (folder / "mutant.npy").write_bytes(data)
        _open(_table(beside, compression=none), folder, "mutant.parquet")

    return [
        Original("plain", _table(plain, compression=none), read),
        Original("packed", _table(plain, compression="snappy", row_group_size=1), read),
        Original("nested", _table(nested, compression=none), read),
        Original("words", _table(worded, compression=none, data_page_version="2.0"), read),
        Original("tags", _table(tagged, compression=none), read_tags),
        Original("with ids", _table(named, compression=none), read),
        Original("with pixels beside", _table(beside, compression=none), read_beside),
        Original("pixels", pixels, read_pixels),
    ]


TABLE_WORDS = (
    b"PAR1", b"PARE", b"image", b"label", b"bytes", b"path", b"schema", b"huggingface", b"maekit", b"ARROW:schema",
    b"\x15\x04", b"\x15\x00", b"\x15\x0c", b"\x19\x1c", b"\x19\x3c", b"\x2c", b"\x26\x08", b"\x1c\x15", b"\x00\x00\x00",
    b"\x80\x80\x80\x80\x80\x01", b"\xff" * 9,
)  # fmt: skip


def _table(table: pa.Table, **options: Any) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream, **options)
    return stream.getvalue()


# ------------------------------------------------------------------------------------------- lists and masks


def lists() -> list[Original]:
    """Return lists of images in each of their forms, and arrays of masks."""

    def read(file: str, form: Form | None = None) -> Callable[[bytes, Path], None]:
        def opened(data: bytes, folder: Path) -> None:
            for name in ("a.png", "b c.png", "d.png"):
                if not (folder / name).exists():
                    (folder / name).write_bytes(_PICTURE)
            _open(data, folder, file, form)

        return opened

    said = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "d.png"}],
        "annotations": [{"image_id": 1, "category_id": 7}, {"image_id": 2, "category_id": 9}],
        "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
    }
    return [
        Original("txt", b"a.png cat\nb c.png\tdog\r\nd.png, cat\n", read("mutant.txt")),
        Original("csv", b'\xef\xbb\xbfpath,label\na.png,cat\n"b c.png","dog"\n', read("mutant.csv")),
        Original("tsv", b"a.png\t1\nd.png\t10\n", read("mutant.tsv")),
        Original("tags", b"path,label\na.png,x|y\nd.png,\n", read("mutant.csv", Form("multilabel"))),
        Original("numbers", b"path,label\na.png,1.5\nd.png,-2e3\n", read("mutant.csv", Form("regression"))),
        Original("json", json.dumps(said).encode(), read("mutant.json")),
        Original("masks", _array(np.arange(16, dtype=np.float32)), _masks),
    ]


LIST_WORDS = (
    b"a.png", b"b c.png", b"d.png", b"path", b"label", b",", b"\t", b"\n", b"\r", b'"', b"|", b"\0", b"\xef\xbb\xbf",
    b"../", b"/", b".jpg", b"cat", b"nan", b"inf", b"1e999", b"-", b"[", b"{", b"]", b"}", b"null", b'"images"',
    b'"annotations"', b'"categories"', b'"file_name"', b'"id"', b'"category_id"', b"9" * 5000, b"True", b"\x1b[31m",
    b"\xe2\x80\xae", b"\xff\xfe", b"\x93NUMPY", b"'|O'", b"(8000, 8000, 8000)",
)  # fmt: skip
_PICTURE = _encoded(np.zeros((4, 4), np.uint8), "PNG")


def _masks(data: bytes, folder: Path) -> None:
    (folder / "mutant.npy").write_bytes(data)
    if not (folder / "list.txt").exists():
        (folder / "a.png").write_bytes(_PICTURE)
        (folder / "list.txt").write_text("a.png\n")
    masks = open_masks(folder / "mutant.npy", open_source(folder / "list.txt"), (4, 4))
    assert masks.scores(0).shape == (16,)


# ------------------------------------------------------------------------------------------------------ config


def configs() -> list[Original]:
    """Return config files: by hand, and the whole one of a run."""
    hand = b"# mine\nrecipe: pretrain-vit-b16\nmask_ratio: 0.6\nbetas: [0.9, 0.95]\nimg_size: 224\nflip: no\nlr: none\n"
    whole = dump_yaml(Pretrain(data="photos"), {"images": 3, "classes": ["a", "b"], "mean": [0.5]}).encode()
    return [Original("by hand", hand, _config), Original("of a run", whole, _config)]


CONFIG_WORDS = (
    b"mask_ratio", b"betas", b"img_size", b"recipe", b"format", b"verb", b"resolved", b": ", b"- ", b"[", b"]", b"{",
    b"}", b"&a ", b"*a", b"!!", b"!!python/object/apply:os.mkdir [it-ran]", b"!!python/name:os.system", b"<<: ",
    b"%YAML 1.1\n", b"---\n", b"...\n", b"|", b">", b"'", b'"', b"\t", b"\0", b"\x85", b"\xe2\x80\xa8",
    b"\xef\xbb\xbf", b"\xff\xfe", b"null", b"~", b"yes", b"0x10", b"1e999", b".nan", b"1:30", b"_target_: ", b"${",
    b"? ", b"9" * 5000, b"[" * 200, b"\\x", b"# ",
)  # fmt: skip


def _config(data: bytes, folder: Path) -> None:
    (folder / "mutant.yaml").write_bytes(data)
    settings, _ = resolve(Pretrain, file=folder / "mutant.yaml")
    assert resolve(Pretrain, flags=settings.model_dump(exclude={"recipe"}))[0]


# ----------------------------------------------------------------------------------------- weights, checkpoints


def weights() -> list[Original]:
    """Return files of weights: our own, torch's archive and its pickle, its older format, a target, a payload."""
    torch.manual_seed(0)
    model = create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, in_chans=1, embed_dim=8, depth=1, num_heads=2,
        decoder_dim=8, decoder_depth=1, decoder_heads=2,
    )  # fmt: skip
    with TemporaryDirectory() as place:
        file = Path(place, "model.safetensors")
        save_model(model, file)
        ours = file.read_bytes()
        spec = {"patch": 4, "channels": 1, "values": 16, "components": 3}
        target = PatchPCA(**spec)
        for value in target.state_dict().values():
            value.copy_(torch.linspace(0.1, 1, value.numel()).view_as(value))
        save_target(file, target, spec, "pca", mean=[0.5], std=[0.2], fingerprint="0")
        pca = file.read_bytes()
    size = 8 + int.from_bytes(ours[:8], "little")
    state = {name: value.half() for name, value in model.encoder.state_dict().items()}
    few = {"model": {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2).half()}, "epoch": 3, "args": {"lr": 0.1}}
    return [
        Original("safetensors", ours, _weights("mutant.safetensors")),
        Original("header", ours[8:size], _weights("mutant.safetensors"), lambda text: _with_header(text, ours[size:])),
        Original("torch", _saved(few), _weights("mutant.pth", whole=False)),
        Original("torch, old", _saved(few, old=True), _weights("mutant.pth", whole=False)),
        Original(
            "pickle in the archive",
            _pickle_of(few),
            _weights("mutant.pth", whole=False),
            lambda raw: _archived(few, raw),
        ),
        Original(
            "timm's encoder", _pickle_of(state), _weights("mutant.pth", num_heads=2), lambda raw: _archived(state, raw)
        ),
        Original("payload", PAYLOAD, _weights("mutant.pth", whole=False), lambda raw: _archived(few, raw)),
        Original("index", json.dumps({"weight_map": {"a": "one.safetensors"}}).encode(), _index),
        Original("target", pca, _target),
    ]


WEIGHT_WORDS = (
    b'"dtype":"F32"', b'"F16"', b'"F64"', b'"I64"', b'"BOOL"', b'"F8_E4M3"', b'"shape":[', b'"data_offsets":[',
    b"__metadata__", b"maekit", b'"spec"', b'"kind"', b'"encoder"', b'"classifier"', b'"format"', b"img_size",
    b"embed_dim", b"depth", b"num_heads", b"patch_size", b"-1", b"0", b"65536", b"4294967296", b"1e999", b"null",
    b"true", b"[]", b"{}", b'"', b"\\u0000", b"NaN", b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"\x80\x02",
    b"cos\nmkdir\n", b"cbuiltins\nexec\n", b"X\x06\0\0\0it-ran", b"\x85R.", b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch\nFloatStorage\n", b"cargparse\nNamespace\n", b"ccollections\nOrderedDict\n", b"\x8a\x08" + b"\xff" * 8,
    b"J\xff\xff\xff\x7f", b"data.pkl", b"../", b"one.safetensors", b"blocks.0.attn.qkv.weight", b"pos_embed",
    b"cls_token", b"decoder_", b"module.", b"_orig_mod.",
)  # fmt: skip


PAYLOAD = b"\x80\x02cos\nmkdir\nX\x06\0\0\0it-ran\x85R."
"""A pickle that makes the folder `SENTINEL` where it is read, if it ever runs."""


def _weights(file: str, *, whole: bool = True, num_heads: int | None = None) -> Callable[[bytes, Path], None]:
    def read(data: bytes, folder: Path) -> None:
        (folder / file).write_bytes(data)
        with contextlib.suppress(MaekitError):
            read_weights(folder / file)  # without a hint
        read_file(folder / file)
        if not whole:
            return
        reading = read_weights(folder / file, Hints(num_heads=num_heads))
        total = sum(value.numel() for value in reading.tensors.values())
        assert total < 10 * len(data), total
        load_classifier(folder / file) if reading.kind == "classifier" else as_model(reading)

    return read


def _index(data: bytes, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_bytes(data)
    if not (folder / "one.safetensors").exists():
        (folder / "one.safetensors").write_bytes(
            _with_header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4))
        )
    with contextlib.suppress(MaekitError):
        read_weights(folder / "model.safetensors.index.json")
    read_file(folder / "model.safetensors.index.json")


def _target(data: bytes, folder: Path) -> None:
    (folder / "mutant.safetensors").write_bytes(data)
    load_target(folder / "mutant.safetensors").module()


def _with_header(text: bytes, data: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def _saved(value: object, *, old: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=not old)
    return stream.getvalue()


def _pickle_of(value: object) -> bytes:
    with zipfile.ZipFile(io.BytesIO(_saved(value))) as archive:
        return archive.read("archive/data.pkl")


def _archived(value: object, raw: bytes) -> bytes:
    """Return what torch.save writes of `value`, with another pickle in it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_saved(value))) as old, zipfile.ZipFile(stream, "w") as new:
        for name in old.namelist():
            new.writestr(name, raw if name == "archive/data.pkl" else old.read(name))
    return stream.getvalue()


def checkpoints() -> list[Original]:
    """Return the files of a checkpoint, each hurt beside the others, with and without a manifest that vouches."""
    tensors = {"model": {"w": torch.arange(4.0)}, "optimizer": {"w/exp_avg": torch.zeros(4)}}
    state = {"window": [1.5], "loss": 0.5, "scaler": {"scale": 2.0, "_growth_tracker": 0}}
    with TemporaryDirectory() as place:
        folder = checkpoint.save(Path(place), 5, tensors, state, metadata={}, keep=1)
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    plain = [Original(name, data, _checkpoint(files, name, vouched=False)) for name, data in files.items()]
    vouched = [
        Original(f"{name}, vouched for", data, _checkpoint(files, name, vouched=True))
        for name, data in files.items()
        if name != checkpoint.MANIFEST
    ]
    return plain + vouched


def _checkpoint(files: dict[str, bytes], name: str, *, vouched: bool) -> Callable[[bytes, Path], None]:
    def read(data: bytes, folder: Path) -> None:
        place = folder / "step-5"
        place.mkdir(exist_ok=True)
        hurt = files | {name: data}
        if vouched:
            manifest = json.loads(files[checkpoint.MANIFEST])
            manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            hurt[checkpoint.MANIFEST] = json.dumps(manifest).encode()
        for file, content in hurt.items():
            (place / file).write_bytes(content)
        found = checkpoint.load(place)
        assert found.step == 5
        found.sha256()

    return read


CHECKPOINT_WORDS = (
    b'"format"', b'"step"', b'"files"', b'"bytes"', b'"sha256"', b'"window"', b'"loss"', b'"scaler"',
    b"model.safetensors", b"state.json", b"../", b"\\u0000", b"null", b"true", b"-1", b"1e999", b"NaN", b"9" * 5000,
    b"[" * 2000, b"{}", b"[]", b'"', b",", b":", b'"dtype":"F16"', b'"shape":[', b"__metadata__",
)  # fmt: skip

KINDS: dict[str, tuple[Callable[[], list[Original]], tuple[bytes, ...]]] = {
    "decode": (images, IMAGE_WORDS),
    "parquet": (tables, TABLE_WORDS),
    "lists": (lists, LIST_WORDS),
    "config": (configs, CONFIG_WORDS),
    "weights": (weights, WEIGHT_WORDS),
    "checkpoint": (checkpoints, CHECKPOINT_WORDS),
}
"""Kind -> what makes its originals, words of its formats."""
