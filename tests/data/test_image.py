"""Pixels of good images; what is refused, and why, is in tests/badinput/images.py."""

import io
import os
import resource
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
import torch
from PIL import Image

from maekit.data.image import MAX_PIXELS, num_frames, read_image
from maekit.errors import MaekitError

RNG = np.random.default_rng(0)


def picture(height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth colour picture (H, W, 3), so that lossy formats come close."""
    y, x = np.mgrid[0:height, 0:width]
    waves = (np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 11))
    return np.stack([127 + 100 * wave for wave in waves], -1).astype(np.uint8)


def encoded(image: Image.Image | np.ndarray, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(out, form, **options)
    return out.getvalue()


def npy(array: np.ndarray, **options: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


def png(width: int, height: int, *chunks: tuple[bytes, bytes], depth: int = 8, colour: int = 0) -> bytes:
    """A PNG that says what it is told to say."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)), *chunks, (b"IEND", b"")]
    body = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def refusal(data: bytes, **options: Any) -> str:
    with pytest.raises(MaekitError) as caught:
        read_image(data, name="folder/one.jpg", **options)
    assert caught.value.code == "E-DATA-IMAGE" and caught.value.exit_code == 3
    assert "folder/one.jpg" in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


JPEG = encoded(picture(), "JPEG", quality=95)
PROGRESSIVE = encoded(picture(), "JPEG", quality=95, progressive=True)


def start_of_frame(data: bytes, height: int, width: int, precision: int = 8, marker: int = 0xC0) -> bytes:
    """Rewrite the frame header of a baseline JPEG."""
    at = data.index(b"\xff\xc0")
    return data[:at] + bytes((0xFF, marker)) + data[at + 2 : at + 4] + struct.pack(
        ">BHH", precision, height, width
    ) + data[at + 9 :]  # fmt: skip


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP", "TIFF"])
def test_a_lossless_file_of_any_format_gives_its_exact_pixels(form: str) -> None:
    data = encoded(picture(), form, **({"lossless": True} if form == "WEBP" else {}))
    assert torch.equal(read_image(data), torch.from_numpy(picture()).permute(2, 0, 1))


@pytest.mark.parametrize("data", [JPEG, PROGRESSIVE, encoded(picture(), "WEBP", quality=95)])
def test_a_lossy_file_comes_close_to_its_picture(data: bytes) -> None:
    image = read_image(data)
    assert image.dtype == torch.uint8 and image.shape == (3, 48, 64)
    assert (image.float() - torch.from_numpy(picture()).permute(2, 0, 1).float()).abs().mean() < 4


def photographs() -> list[Path]:
    """Those that scikit-learn brings, and $MAEKIT_DATA/photos where it is set."""
    place = Path(sklearn.datasets.__file__).parent / "images"
    more = Path(os.environ["MAEKIT_DATA"], "photos").iterdir() if "MAEKIT_DATA" in os.environ else []
    return sorted(place.glob("*.jpg")) + sorted(more)


def test_the_fast_jpeg_path_gives_the_pixels_of_pillow_to_the_bit() -> None:
    sizes = [JPEG, PROGRESSIVE, *(encoded(picture(31, 45), "JPEG", quality=80, subsampling=s) for s in (0, 1, 2))]
    for data in sizes + [path.read_bytes() for path in photographs()]:
        colour = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(read_image(data).permute(1, 2, 0).numpy(), colour)
        image = Image.open(io.BytesIO(data))
        image.draft("L", None)
        assert np.array_equal(read_image(data, channels=1)[0].numpy(), np.array(image))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "BMP", "GIF"])
def test_grey_becomes_three_equal_channels_or_stays_one(form: str) -> None:
    data = encoded(picture()[..., 0], form)
    colour, grey = read_image(data), read_image(data, channels=1)
    assert colour.shape == (3, 48, 64) and grey.shape == (1, 48, 64)
    assert torch.equal(colour[0], colour[2]) and torch.equal(colour[:1], grey)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_colour_becomes_grey_by_luma(form: str) -> None:
    green = encoded(np.full((16, 16, 3), (0, 255, 0), np.uint8), form)
    assert read_image(green, channels=1).float().mean() == pytest.approx(0.587 * 255, abs=2)


def test_images_give_one_or_three_channels_only() -> None:
    assert "cannot give 5 channels" in refusal(JPEG, channels=5)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composed_on_white(mode: str) -> None:
    red = Image.new("RGBA", (8, 8), (255, 0, 0, 0)).convert(mode)
    assert (read_image(encoded(red, "PNG")) == 255).all()
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    assert set(read_image(encoded(half, "PNG")).unique().tolist()) <= {127, 128}


def test_a_transparent_palette_entry_is_white_and_others_keep_their_colour() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(0, (0, 0, 4, 8))
    pixels = read_image(encoded(image, "PNG", transparency=0))
    assert pixels[:, 0, 0].tolist() == [255, 255, 255] and pixels[:, 0, 7].tolist() == [0, 0, 255]


@pytest.mark.parametrize(("mode", "key"), [("RGB", (255, 0, 0)), ("L", 76)])
def test_a_transparent_colour_key_is_white(mode: str, key: Any) -> None:
    image = Image.new(mode, (8, 8), key)
    assert (read_image(encoded(image, "PNG", transparency=key)) == 255).all()


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(form: str) -> None:
    values = np.linspace(0, 65535, 16 * 16).reshape(16, 16).astype(np.uint16)
    image = read_image(encoded(values, form), channels=1)[0].numpy()
    assert np.array_equal(image, np.round(values / 257).astype(np.uint8))


def test_sixteen_bit_grey_of_the_other_byte_order_is_scaled() -> None:
    values = np.linspace(0, 65535, 256).reshape(16, 16).astype(">u2")
    tags = {256: 16, 257: 16, 258: 16, 259: 1, 262: 1, 273: 8, 277: 1, 278: 16, 279: 512}
    entries = b"".join(struct.pack(">HHI", t, 4 if t in (273, 279) else 3, 1) + (
        struct.pack(">I", v) if t in (273, 279) else struct.pack(">HH", v, 0)) for t, v in tags.items())  # fmt: skip
    data = b"MM\0*" + struct.pack(">I", 8 + 512) + values.tobytes() + struct.pack(">H", len(tags)) + entries + bytes(4)
    assert np.array_equal(read_image(data, channels=1)[0].numpy(), np.round(values / 257.0).astype(np.uint8))


def test_sixteen_bit_colour_keeps_its_high_byte() -> None:
    row = b"\0" + struct.pack(">HHH", 0x1234, 0x8000, 0xFF00) * 8
    data = png(8, 8, (b"IDAT", zlib.compress(row * 8)), depth=16, colour=2)
    assert read_image(data)[:, 3, 3].tolist() == [0x12, 0x80, 0xFF]


def test_integers_within_sixteen_bits_are_scaled_and_others_refused() -> None:
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.int32)
    assert torch.equal(
        read_image(encoded(values, "TIFF"))[0], torch.from_numpy(np.round(values / 257).astype(np.uint8))
    )
    assert "-1 to" in refusal(encoded(values - 1, "TIFF")) and "65536" in refusal(encoded(values + 1, "TIFF"))


def test_floats_within_one_are_scaled_and_others_refused() -> None:
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    assert torch.equal(
        read_image(encoded(values, "TIFF"))[0], torch.from_numpy(np.round(values * 255).astype(np.uint8))
    )
    for wrong in (2, -1, np.nan, np.inf):
        values[3, 3] = wrong
        assert "float pixels" in refusal(encoded(values, "TIFF"))


def test_cmyk_inks_become_the_right_colours_with_and_without_adobes_inversion() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    for data in (encoded(red, "JPEG", quality=100), encoded(red, "TIFF")):
        assert (read_image(data).float().mean((1, 2)) - torch.tensor([255.0, 0, 0])).abs().max() < 4


def test_ycck_is_told_from_cmyk_by_adobes_marker() -> None:
    cyan = encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=100)
    at = cyan.index(b"Adobe") + 11
    ycck = cyan[:at] + b"\x02" + cyan[at + 1 :]
    pillow = torch.from_numpy(np.array(Image.open(io.BytesIO(ycck)).convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(read_image(ycck), pillow) and not torch.equal(read_image(ycck), read_image(cyan))


def test_orientation_is_not_applied_and_broken_exif_does_not_matter() -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert torch.equal(read_image(encoded(picture(), "JPEG", quality=95, exif=exif)), read_image(JPEG))
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"):
        assert torch.equal(read_image(encoded(picture(), "JPEG", quality=95, exif=exif)), read_image(JPEG))


def test_an_endless_chain_of_tiff_pages_does_not_hang() -> None:
    data = bytearray(encoded(picture(), "TIFF"))
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    struct.pack_into("<I", data, start + 2 + 12 * count, start)
    assert read_image(bytes(data)).shape == (3, 48, 64) and num_frames(bytes(data)) >= 1


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_read(form: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "lime")]
    data = encoded(
        frames[0], form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "WEBP" else {})
    )
    assert read_image(data)[:, 8, 8].tolist() == [255, 0, 0]
    assert num_frames(data) == 3 and num_frames(JPEG) == 1


@pytest.mark.parametrize("data", [JPEG, PROGRESSIVE])
def test_a_jpeg_that_lacks_only_its_end_marker_is_whole(data: bytes) -> None:
    assert torch.equal(read_image(data[:-2]), read_image(data))


def test_a_jpeg_with_rubbish_in_its_scan_is_refused_though_pillow_reads_it() -> None:
    data = encoded(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8), "JPEG", quality=90)
    for rubbish in (bytes(100), RNG.bytes(100)):
        hurt = data[:2000] + rubbish + data[2100:]
        assert Image.open(io.BytesIO(hurt)).convert("RGB").size == (64, 64)
        assert "Corrupt JPEG data" in refusal(hurt)


def test_a_jpeg_with_thousands_of_scans_is_refused_at_once() -> None:
    scan = PROGRESSIVE[PROGRESSIVE.rindex(b"\xff\xda") : -2]
    started = time.monotonic()
    assert "scans" in refusal(PROGRESSIVE[:-2] + scan * 20_000 + b"\xff\xd9")
    at = PROGRESSIVE.index(b"\xff\xc2") + 5
    large = PROGRESSIVE[:at] + struct.pack(">HH", 8000, 8000) + PROGRESSIVE[at + 4 :]
    assert "scans" in refusal(large[:-2] + scan * 20 + b"\xff\xd9")
    assert time.monotonic() - started < 1


def test_the_largest_size_is_allowed_and_one_pixel_row_more_is_not() -> None:
    assert "at most" in refusal(start_of_frame(JPEG, 8193, 8192)) and MAX_PIXELS == 8192 * 8192
    assert "damaged" in refusal(png(8192, 8192, (b"IDAT", zlib.compress(bytes(100)))))


def test_compressed_text_in_a_png_is_not_unpacked_without_bound() -> None:
    text = (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100 * 2**20)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal(png(8, 8, text, (b"IDAT", zlib.compress(bytes(72)))))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_an_array_keeps_its_bytes_and_channels() -> None:
    array = RNG.integers(0, 256, (6, 5, 7), dtype=np.uint8)
    for order in ("C", "F"):
        assert torch.equal(read_image(npy(np.array(array, order=order))), torch.from_numpy(array).permute(2, 0, 1))
    assert read_image(npy(array[..., 0])).shape == (1, 6, 5)


@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f8", ">f8"])
def test_floats_in_an_array_stay_as_they_are(kind: str) -> None:
    array = RNG.normal(size=(6, 5, 4)).astype(kind)
    image = read_image(npy(array), channels=4)
    assert image.dtype == torch.float32
    assert torch.equal(image, torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1))


@pytest.mark.parametrize("kind", ["<u2", ">u2"])
def test_sixteen_bit_arrays_become_shares_of_one(kind: str) -> None:
    image = read_image(npy(np.full((4, 4, 2), 65535, kind)))
    assert image.dtype == torch.float32 and (image == 1).all()


def test_the_tensor_of_an_array_may_be_written_to() -> None:
    read_image(npy(np.zeros((4, 4), np.uint8))).add_(1)


def test_an_array_that_claims_more_than_the_file_holds_is_refused_without_memory() -> None:
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (8000, 8000, 4000), }"
    data = b"\x93NUMPY\x01\0" + struct.pack("<H", 128) + header.ljust(127) + b"\n" + bytes(64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "bytes in a file with" in refusal(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000  # kB


@pytest.mark.parametrize("shape", [(-1, 4, 4), (True, 4), (2**70, 4), (4.0, 4)])
def test_a_strange_shape_in_a_header_is_refused(shape: tuple[Any, ...]) -> None:
    header = repr({"descr": "|u1", "fortran_order": False, "shape": shape}).encode() + b"\n"
    refusal(b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + bytes(16))


def test_an_array_must_hold_the_channels_asked_for() -> None:
    assert "(H, W, 3)" in refusal(npy(np.zeros((4, 4, 5), np.uint8)), channels=3)


def test_names_with_line_ends_and_terminal_codes_are_escaped() -> None:
    with pytest.raises(MaekitError) as caught:
        read_image(b"", name="a\nb\x1b[31m\udcff.jpg")
    assert "a\\nb\\x1b[31m\\udcff.jpg" in str(caught.value) and str(caught.value).encode()


@pytest.mark.parametrize(
    ("height", "width", "enough", "expected"),
    [(480, 640, 60, (60, 80)), (480, 640, 61, (120, 160)), (480, 640, 240, (240, 320)), (480, 640, 241, (480, 640)),
     (50, 500, 60, (50, 500))],
)  # fmt: skip
def test_a_large_jpeg_is_decoded_smaller_where_a_size_suffices(
    height: int, width: int, enough: int, expected: tuple[int, int]
) -> None:
    """And shows what the whole shows, resized."""
    data = encoded(picture(height, width), "JPEG", quality=95)
    for channels in (1, 3):
        whole, small = (read_image(data, channels=channels, enough=e) for e in (None, (enough, enough)))
        assert small.shape == (channels, *expected)
        resized = torch.nn.functional.interpolate(whole[None].float(), expected, mode="area")[0]
        assert (small - resized).abs().mean() < 1.5
    assert torch.equal(read_image(PROGRESSIVE, enough=(48, 64)), read_image(PROGRESSIVE))


def test_a_damaged_jpeg_is_refused_however_it_is_decoded() -> None:
    data = encoded(picture(480, 640), "JPEG", quality=95)
    hurt = data[: len(data) // 2] + bytes(range(256)) + data[len(data) // 2 + 256 :]
    assert "damaged" in refusal(hurt, enough=(60, 60)) and "damaged" in refusal(data[:-500], enough=(60, 60))
