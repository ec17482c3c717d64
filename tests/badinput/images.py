"""Family 3.1: images, alone, in a folder and in parquet: refused for a stated reason, or read to stated pixels.

A made file is a few kilobytes at most. `said` is a pattern of the refusal; where it is None the image is accepted, and
`pixels` says what it must hold.
"""

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

Check = Callable[[np.ndarray], object]


@dataclass(frozen=True)
class Picture:
    """A file under an image's name.

    Attributes:
        data: its bytes.
        said: pattern of the reason for which it is refused; None: it is accepted.
        pixels: of an accepted one, what its (3, H, W) values must be: an array, or a condition.
        name: of the file.
    """

    data: bytes
    said: str | None = None
    pixels: "np.ndarray | Check | None" = None
    name: str = "x.jpg"


def encoded(image: Image.Image | np.ndarray, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(stream, form, **options)
    return stream.getvalue()


def npy(array: object, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.asarray(array), **options)
    return stream.getvalue()


def claiming(header: bytes, body: bytes = bytes(16)) -> bytes:
    """An .npy file with a header of any text."""
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header) + 1) + header + b"\n" + body


def png(width: int, height: int, *chunks: tuple[bytes, bytes], depth: int = 8, colour: int = 0) -> bytes:
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)), *chunks, (b"IEND", b"")]
    body = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def frame(data: bytes, height: int, width: int, precision: int = 8, marker: int = 0xC0) -> bytes:
    """Rewrite the frame header of a baseline JPEG."""
    at = data.index(b"\xff\xc0")
    size = struct.pack(">BHH", precision, height, width)
    return data[:at] + bytes((0xFF, marker)) + data[at + 2 : at + 4] + size + data[at + 9 :]


def planar(array: np.ndarray) -> np.ndarray:
    array = np.atleast_3d(array)
    return np.moveaxis(array.repeat(3, 2) if array.shape[2] == 1 else array, 2, 0)


def near(target: np.ndarray, most: float) -> Check:
    return lambda pixels: np.abs(pixels.astype(float) - planar(target)).mean() <= most


Y, X = np.mgrid[0:24, 0:32]
COLOUR = np.stack([127 + 100 * np.sin(X / 9), 127 + 100 * np.cos(Y / 7), 127 + 100 * np.sin((X + Y) / 11)], -1)
COLOUR = COLOUR.astype(np.uint8)
GREY = COLOUR[..., 0]
NOISE = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
JPEG = encoded(COLOUR, "JPEG", quality=95)
PROGRESSIVE = encoded(COLOUR, "JPEG", quality=95, progressive=True)
DEEP = np.linspace(0, 65535, 24 * 32).reshape(24, 32)
DEEP8 = np.round(DEEP.astype(np.uint16) / 257).astype(np.uint8)


def cases() -> dict[str, Picture]:
    """Return every case by its name."""
    made: dict[str, Picture] = {}
    for part in (strangers, cut, sides, bombs, modes, depths, jpegs, metadata, frames, arrays):
        for name, picture in part().items():
            assert name not in made, name
            made[name] = picture
    return made


def strangers() -> dict[str, Picture]:
    """What is no image, and magic bytes alone."""
    texts = {
        "nothing": (b"", "an empty file"),
        "one byte": (b"\xff", "bytes"),
        "half a magic": (b"GIF", "bytes"),
        "a web page": (b"<!DOCTYPE html><html>not found</html>", "HTML"),
        "XML": (b"<?xml version='1.0'?><Error/>", "HTML or XML"),
        "JSON": (b'{"error": 404}', "JSON"),
        "JSON with a mark": (b'\xef\xbb\xbf {"error": 404}', "JSON"),
        "an LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git lfs pull"),
        "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(20), "JPEG 2000"),
        "a JPEG 2000 stream": (b"\xff\x4f\xff\x51\0\x29" + bytes(20), "JPEG 2000"),
        "Photoshop": (b"8BPS\0\x01" + bytes(20), "Photoshop"),
        "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
        "PDF": (b"%PDF-1.7\n", "PDF"),
        "FPX": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(20), "FPX"),
        "WMF": (b"\xd7\xcd\xc6\x9a\0\0" + bytes(20), "WMF"),
        "ICNS": (b"icns\0\0\0\x08", "ICNS"),
        "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "SVG"),
        "JPEG XL": (b"\xff\x0a" + bytes(20), "JPEG XL"),
        "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC or AVIF"),
        "AVIF": (b"\0\0\0\x1cftypavif\0\0\0\0", "HEIC or AVIF"),
        "a zip": (b"PK\x03\x04" + bytes(20), "zip"),
        "gzip": (b"\x1f\x8b\x08" + bytes(20), "gzip"),
        "a pickle": (b"\x80\x04cos\nsystem\n(X\1\0\0\0xtR.", "bytes"),
        "a program": (b"\x7fELF\x02\x01" + bytes(20), "bytes"),
        "zeros": (bytes(500), "bytes"),
        "control characters": (b"\x1b[31m\nred\x07", r"bytes b'\\x1b"),
        "PPM": (b"P6\n4 4\n255\n" + bytes(48), "bytes"),
        "ICO": (b"\0\0\1\0\1\0" + bytes(30), "bytes"),
        "a tar": (b"a.png" + bytes(252) + b"ustar", "bytes"),
    }
    magic = {
        "JPEG": b"\xff\xd8\xff",
        "PNG": b"\x89PNG\r\n\x1a\n",
        "GIF": b"GIF89a",
        "old GIF": b"GIF87a",
        "BMP": b"BM",
        "TIFF": b"II*\0",
        "big-endian TIFF": b"MM\0*",
        "BigTIFF": b"II+\0",
        "WebP": b"RIFF\0\0\0\0WEBP",
        "npy": b"\x93NUMPY",
    }
    alone = {f"only the magic of {form}": Picture(data, "damaged|bytes") for form, data in magic.items()}
    found = {f"{name} as an image": Picture(data, said) for name, (data, said) in texts.items()}
    right = "a PNG named .JPEG", Picture(encoded(COLOUR, "PNG"), None, planar(COLOUR), "n02105855_2933.JPEG")
    return found | alone | dict([right])


def cut() -> dict[str, Picture]:
    """Files that end too early, have rubbish inside, or lack only what does not matter."""
    found = {}
    for form in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"):
        data = encoded(NOISE, form)
        for share in (10, 50, 99):
            said = None if form == "BMP" else "damaged"
            if said:
                found[f"{form} cut at {share} %"] = Picture(data[: len(data) * share // 100], said)
    bmp = encoded(NOISE, "BMP")
    found["BMP cut at 10 %"] = Picture(bmp[: len(bmp) // 10], "damaged")
    found["BMP cut at 99 %"] = Picture(bmp[: len(bmp) * 99 // 100], "damaged")
    for share in (10, 50, 90, 99):
        found[f"progressive JPEG cut at {share} %"] = Picture(PROGRESSIVE[: len(PROGRESSIVE) * share // 100], "damaged")
    noisy = encoded(NOISE, "JPEG", quality=90)
    png_data = bytearray(encoded(COLOUR, "PNG"))
    png_data[png_data.index(b"IDAT") + 40] ^= 1
    flipped = bytearray(npy(COLOUR))
    flipped[-5] ^= 1
    changed = COLOUR.copy().reshape(-1)
    changed[-5] ^= 1
    return found | {
        "JPEG lacking only its end": Picture(JPEG[:-2], None, near(COLOUR, 4)),
        "progressive JPEG lacking only its end": Picture(PROGRESSIVE[:-2], None, near(COLOUR, 4)),
        "JPEG with zeros in its scan": Picture(noisy[:1500] + bytes(100) + noisy[1600:], "Corrupt JPEG data"),
        "JPEG with bytes behind its end": Picture(JPEG + b"appended" * 100, None, near(COLOUR, 4)),
        "PNG with bytes behind its end": Picture(encoded(COLOUR, "PNG") + b"x" * 99, None, planar(COLOUR)),
        "PNG with a byte flipped": Picture(bytes(png_data), "damaged"),
        "npy with a byte flipped": Picture(bytes(flipped), None, planar(changed.reshape(COLOUR.shape)), "x.npy"),
        "PNG without its picture": Picture(png(8, 8), "damaged"),
        "PNG without its head": Picture(encoded(COLOUR, "PNG")[:8] + encoded(COLOUR, "PNG")[33:], "damaged"),
        "two JPEGs in one": Picture(JPEG + encoded(NOISE, "JPEG"), None, near(COLOUR, 4)),
        "JPEG behind another's head": Picture(JPEG[:20] + JPEG, "damaged"),
    }


def sides() -> dict[str, Picture]:
    """Pictures too small, and the smallest that are read."""
    found = {}
    for width, height in ((1, 1), (1, 100), (100, 1), (3, 100), (100, 3), (3, 3)):
        plain = np.zeros((height, width), np.uint8)
        found[f"{width} x {height} PNG"] = Picture(encoded(plain, "PNG"), f"{width} x {height} pixels")
    for form in ("JPEG", "WEBP", "BMP", "TIFF", "GIF"):
        found[f"1 x 9 {form}"] = Picture(encoded(np.zeros((9, 1), np.uint8), form), "1 x 9 pixels")
        found[f"4 x 4 {form}"] = Picture(encoded(np.zeros((4, 4, 3), np.uint8), form), None, lambda p: p.max() < 9)
    return found | {
        "1 x 65000 PNG": Picture(encoded(np.zeros((65000, 1), np.uint8), "PNG"), "1 x 65000 pixels"),
        "65000 x 1 JPEG": Picture(encoded(np.zeros((1, 65000), np.uint8), "JPEG"), "65000 x 1 pixels"),
        "4 x 4 PNG": Picture(encoded(np.full((4, 4), 9, np.uint8), "PNG"), None, lambda p: (p == 9).all()),
        "PNG without width": Picture(png(0, 10, (b"IDAT", zlib.compress(b""))), "pixels|damaged"),
        "JPEG without height": Picture(frame(JPEG, 0, 32), "damaged|pixels"),
        "npy without rows": Picture(npy(np.zeros((0, 9, 3), np.uint8)), "pixels"),
        "all black": Picture(encoded(np.zeros((9, 9), np.uint8), "PNG"), None, lambda p: (p == 0).all()),
        "all white": Picture(encoded(np.full((9, 9), 255, np.uint8), "PNG"), None, lambda p: (p == 255).all()),
    }


def bombs() -> dict[str, Picture]:
    """A few kilobytes that claim gigabytes, or that would compute for hours."""
    webp = bytearray(
        encoded(
            Image.new("RGB", (32, 32)),
            "WEBP",
            save_all=True,
            lossless=True,
            append_images=[Image.new("RGB", (32, 32), "red")],
        )
    )
    webp[24:30] = (12999).to_bytes(3, "little") * 2
    gif, bmp = encoded(GREY, "GIF"), encoded(COLOUR, "BMP")
    scan = PROGRESSIVE[PROGRESSIVE.rindex(b"\xff\xda") : -2]
    head = b"{'descr': '|u1', 'fortran_order': False, 'shape': (8000, 8000, 3)}"
    text = zlib.compress(bytes(30 * 2**20), 9)
    return {
        "PNG of 169 million pixels": Picture(
            png(13000, 13000, (b"IDAT", zlib.compress(bytes(1626 * 999))), depth=1),
            "13000 x 13000 pixels, expected at most",
        ),
        "PNG of 4 x 10^18 pixels": Picture(png(2**31 - 1, 2**31 - 1, (b"IDAT", zlib.compress(b"x"))), "pixels"),
        "JPEG of 4 billion pixels": Picture(frame(JPEG, 65000, 65000), "65000 x 65000 pixels"),
        "JPEG of a row too many": Picture(frame(JPEG, 8193, 8192), "8192 x 8193 pixels, expected at most"),
        "WebP of 169 million pixels": Picture(bytes(webp), "13000 x 13000 pixels"),
        "GIF of 4 billion pixels": Picture(b"GIF89a" + struct.pack("<HH", 65000, 65000) + gif[10:], "65000 x 65000"),
        "BMP of 4 billion pixels": Picture(bmp[:18] + struct.pack("<ii", 65000, 65000) + bmp[26:], "65000 x 65000"),
        "TIFF of 169 million pixels": Picture(
            encoded(Image.new("1", (13000, 13000)), "TIFF", compression="group4"), "13000 x 13000"
        ),
        "JPEG of 20,000 scans": Picture(PROGRESSIVE[:-2] + scan * 20_000 + b"\xff\xd9", "scans"),
        "PNG with 30 MB of text": Picture(
            png(8, 8, (b"zTXt", b"c\0\0" + text), (b"IDAT", zlib.compress(bytes(72)))), "damaged"
        ),
        "PNG with 30 MB of words": Picture(
            png(8, 8, (b"iTXt", b"c\0\1\0\0\0" + text), (b"IDAT", zlib.compress(bytes(72)))), "damaged"
        ),
        "PNG with a profile of 30 MB": Picture(
            png(8, 8, (b"iCCP", b"c\0\0" + text), (b"IDAT", zlib.compress(bytes(72)))), "damaged"
        ),
        "PNG whose picture is longer than it says": Picture(
            png(8, 8, (b"IDAT", zlib.compress(bytes(10**6)))), None, lambda p: (p == 0).all()
        ),
        "npy that claims more than it holds": Picture(claiming(head), "bytes in a file with", name="x.npy"),
        "npy that claims 2^70 rows": Picture(claiming(head.replace(b"8000, 8000", b"%d, 4" % 2**70)), "pixels|bytes"),
    }


def modes() -> dict[str, Picture]:
    """Grey, palettes, transparency on white, inks."""
    red = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    palette = Image.fromarray(COLOUR).quantize(64)
    keyed = Image.new("P", (8, 8), 1)
    keyed.putpalette([255, 0, 0, 0, 0, 255])
    keyed.paste(0, (0, 0, 4, 8))
    white = lambda p: (p == 255).all()  # noqa: E731
    blue = lambda p: p[:, 0, 0].tolist() == [255] * 3 and p[:, 0, 7].tolist() == [0, 0, 255]  # noqa: E731
    inks = lambda p: np.abs(p.mean((1, 2)) - [255, 0, 0]).max() < 4  # noqa: E731
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    bits = Image.fromarray(GREY).convert("1")
    ycck = encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=100)
    at = ycck.index(b"Adobe") + 11
    ycck = ycck[:at] + b"\x02" + ycck[at + 1 :]
    found = {
        f"{form} in colour": Picture(
            encoded(COLOUR, form, **({"lossless": True} if form == "WEBP" else {})), None, planar(COLOUR)
        )
        for form in ("PNG", "WEBP", "BMP", "TIFF")
    }
    found |= {
        f"{form} in grey": Picture(encoded(GREY, form), None, planar(GREY)) for form in ("PNG", "BMP", "TIFF", "GIF")
    }
    found |= {
        f"{form} of {compression}": Picture(encoded(COLOUR, form, compression=compression), None, planar(COLOUR))
        for form, compression in (("TIFF", "tiff_lzw"), ("TIFF", "tiff_adobe_deflate"), ("TIFF", "packbits"))
    }
    return found | {
        "JPEG in colour": Picture(JPEG, None, near(COLOUR, 4)),
        "JPEG in grey": Picture(encoded(GREY, "JPEG", quality=95), None, near(GREY, 3)),
        "progressive JPEG": Picture(PROGRESSIVE, None, near(COLOUR, 4)),
        "clear red RGBA": Picture(encoded(red, "PNG"), None, white),
        "clear red WebP": Picture(encoded(red, "WEBP", lossless=True), None, white),
        "clear LA": Picture(encoded(red.convert("LA"), "PNG"), None, white),
        "clear TIFF": Picture(encoded(red, "TIFF"), None, white),
        "half clear black": Picture(encoded(half, "PNG"), None, lambda p: set(np.unique(p)) <= {127, 128}),
        "palette PNG": Picture(encoded(palette, "PNG"), None, planar(np.array(palette.convert("RGB")))),
        "palette BMP": Picture(encoded(palette, "BMP"), None, planar(np.array(palette.convert("RGB")))),
        "palette GIF": Picture(encoded(palette, "GIF"), None, planar(np.array(palette.convert("RGB")))),
        "palette with a clear entry": Picture(encoded(keyed, "PNG", transparency=0), None, blue),
        "GIF with a clear entry": Picture(encoded(keyed, "GIF", transparency=0), None, blue),
        "clear colour of RGB": Picture(
            encoded(Image.new("RGB", (8, 8), "red"), "PNG", transparency=(255, 0, 0)), None, white
        ),
        "clear grey": Picture(encoded(Image.new("L", (8, 8), 76), "PNG", transparency=76), None, white),
        "one bit PNG": Picture(encoded(bits, "PNG"), None, planar(np.array(bits.convert("L")))),
        "one bit TIFF": Picture(encoded(bits, "TIFF", compression="group4"), None, planar(np.array(bits.convert("L")))),
        "CMYK JPEG": Picture(encoded(cmyk, "JPEG", quality=100), None, inks),
        "CMYK TIFF": Picture(encoded(cmyk, "TIFF"), None, inks),
        "YCCK JPEG": Picture(ycck, None, lambda p: p.shape == (3, 16, 16)),
        "LAB TIFF": Picture(
            encoded(Image.new("LAB", (8, 8), (200, 128, 128)), "TIFF"), None, lambda p: (abs(p - 194) <= 1).all()
        ),
    }


def depths() -> dict[str, Picture]:
    """More than eight bits: scaled, or refused where no scale is known."""
    whole, floats = DEEP.astype(np.int32), (DEEP / 65535).astype(np.float32)
    row = b"\0" + struct.pack(">HHH", 0x1234, 0x8000, 0xFF00) * 8
    nan, big = floats.copy(), floats.copy()
    nan[3, 3], big[3, 3] = np.nan, 2
    return {
        "16-bit grey PNG": Picture(encoded(DEEP.astype(np.uint16), "PNG"), None, planar(DEEP8)),
        "16-bit grey TIFF": Picture(encoded(DEEP.astype(np.uint16), "TIFF"), None, planar(DEEP8)),
        "16-bit colour PNG": Picture(
            png(8, 8, (b"IDAT", zlib.compress(row * 8)), depth=16, colour=2),
            None,
            lambda p: p[:, 3, 3].tolist() == [0x12, 0x80, 0xFF],
        ),
        "2-bit PNG": Picture(
            png(8, 8, (b"IDAT", zlib.compress(b"\0\x1b\x1b" * 8)), depth=2),
            None,
            lambda p: p[0, 0, :4].tolist() == [0, 85, 170, 255],
        ),
        "32-bit TIFF within 16 bits": Picture(encoded(whole, "TIFF"), None, planar(DEEP8)),
        "32-bit TIFF below 0": Picture(encoded(whole - 1, "TIFF"), "integer pixels from -1"),
        "32-bit TIFF above 65535": Picture(encoded(whole + 1, "TIFF"), "integer pixels from 1 to 65536"),
        "float TIFF within 0 and 1": Picture(
            encoded(floats, "TIFF"), None, planar(np.round(floats * 255).astype(np.uint8))
        ),
        "float TIFF with NaN": Picture(encoded(nan, "TIFF"), "float pixels"),
        "float TIFF above 1": Picture(encoded(big, "TIFF"), "float pixels"),
        "float TIFF with infinity": Picture(encoded(np.full((9, 9), np.inf, np.float32), "TIFF"), "float pixels"),
    }


def jpegs() -> dict[str, Picture]:
    """Kinds of JPEG that are legal and rare."""
    noise = encoded(NOISE, "JPEG", quality=90, restart_marker_blocks=2)
    lost = noise.index(b"\xff\xd0")
    return {
        "12-bit JPEG": Picture(frame(JPEG, 24, 32, 12), "damaged"),
        "12-bit extended JPEG": Picture(frame(JPEG, 24, 32, 12, 0xC1), "damaged"),
        "lossless JPEG": Picture(frame(JPEG, 24, 32, 8, 0xC3), "damaged"),
        "JPEG of depth 0": Picture(frame(JPEG, 24, 32, 0), "damaged"),
        "hierarchical JPEG": Picture(frame(JPEG, 24, 32, 8, 0xC5), "damaged"),
        "JPEG of another size than its data": Picture(frame(JPEG, 48, 64), "damaged"),
        "JPEG with restarts": Picture(noise, None, near(NOISE, 60)),
        "JPEG that lost a restart": Picture(noise[:lost] + noise[lost + 2 :], "Corrupt JPEG data"),
        "JPEG without tables, as of a camera's film": Picture(
            JPEG.replace(b"\xff\xc4", b"\xff\xee"), None, near(COLOUR, 4)
        ),
        "JPEG of two components": Picture(
            JPEG.replace(b"\x11\x08\0\x18\0\x20\x03", b"\x11\x08\0\x18\0\x20\x02"), "damaged"
        ),
        "JPEG with a comment": Picture(
            encoded(COLOUR, "JPEG", quality=95, comment=b"<b>\x1b[31m"), None, near(COLOUR, 4)
        ),
        "JPEG at quality 1": Picture(encoded(COLOUR, "JPEG", quality=1), None, lambda p: p.shape == (3, 24, 32)),
        "JPEG without subsampling": Picture(encoded(COLOUR, "JPEG", quality=95, subsampling=0), None, near(COLOUR, 3)),
        "JPEG as RGB": Picture(encoded(COLOUR, "JPEG", quality=95, keep_rgb=True), None, near(COLOUR, 3)),
        "JPEG marker alone": Picture(b"\xff\xd8\xff\xd9", "damaged|bytes"),
    }


def metadata() -> dict[str, Picture]:
    """Orientation and profiles are not applied; broken ones do no harm."""
    found = {}
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        found[f"orientation {orientation}"] = Picture(
            encoded(COLOUR, "JPEG", quality=95, exif=exif), None, near(COLOUR, 4)
        )
        found[f"orientation {orientation} in PNG"] = Picture(encoded(COLOUR, "PNG", exif=exif), None, planar(COLOUR))
    broken = {
        "garbage": b"Exif\0\0garbage",
        "behind the end": b"Exif\0\0II*\0\xff\xff\xff\xff",
        "too many": b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
        "a loop": b"Exif\0\0II*\0\x08\0\0\0\0\0\x08\0\0\0",
    }
    for name, exif in broken.items():
        for form in ("JPEG", "PNG", "WEBP"):
            data = encoded(COLOUR, form, exif=exif, **({"quality": 95} if form != "PNG" else {}))
            found[f"EXIF that is {name}, {form}"] = Picture(data, None, near(COLOUR, 8))
    for name, profile in (("corrupt", b"corrupt"), ("empty", bytes(200))):
        for form in ("JPEG", "PNG", "WEBP", "TIFF"):
            options = {"lossless": True} if form == "WEBP" else {"quality": 95} if form == "JPEG" else {}
            data = encoded(COLOUR, form, icc_profile=profile, **options)
            found[f"{name} profile, {form}"] = Picture(data, None, near(COLOUR, 4))
    return found


def frames() -> dict[str, Picture]:
    """Of several frames or pages the first."""
    colours = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "lime")]
    red = lambda p: p[:, 8, 8].tolist() == [255, 0, 0]  # noqa: E731
    found = {}
    for form in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if form == "WEBP" else {}
        data = encoded(colours[0], form, save_all=True, append_images=colours[1:], **options)
        found[f"three frames of {form}"] = Picture(data, None, red)
    tiff = bytearray(encoded(COLOUR, "TIFF"))
    (start,) = struct.unpack_from("<I", tiff, 4)
    (entries,) = struct.unpack_from("<H", tiff, start)
    struct.pack_into("<I", tiff, start + 2 + 12 * entries, start)
    found["TIFF whose pages are a circle"] = Picture(bytes(tiff), None, planar(COLOUR))
    return found


def arrays() -> dict[str, Picture]:
    """Arrays: three channels of bytes here; what is no picture is refused, a header is never code."""
    wrong = {
        "of objects": (np.array([[{}]], object), "array of object"),
        "of int32": (np.zeros((4, 4), np.int32), "int32"),
        "of bool": (np.zeros((4, 4), bool), "bool"),
        "of complex": (np.zeros((4, 4), complex), "complex"),
        "of text": (np.zeros((4, 4), "S5"), "S5"),
        "of records": (np.zeros((4, 4), [("a", "u1")]), "array of"),
        "of one number": (np.float32(1), r"shape \(\)"),
        "of one row": (np.zeros(16, np.uint8), r"shape \(16,\)"),
        "of four dimensions": (np.zeros((2, 4, 4, 3), np.uint8), "shape"),
        "of half": (np.zeros((4, 4), "f2"), "float16"),
        "with NaN": (np.full((4, 4, 3), np.nan, np.float32), "NaN"),
        "with infinity": (np.full((4, 4, 3), np.inf), "infinite"),
        "above float32": (np.full((4, 4, 3), 1e300), "infinite"),
        "of dates": (np.zeros((4, 4), "M8[s]"), "array of"),
    }
    headers = {
        "that is code": b"__import__('os').mkdir('it-ran')",
        "of braces": b"{" * 100,
        "of brackets": b"(" * 5000,
        "of objects": b"{'descr': '|O', 'fortran_order': False, 'shape': (4, 4)}",
        "that is no text": b"\xff\xfe",
        "with a negative shape": b"{'descr': '|u1', 'fortran_order': False, 'shape': (-4, 4, 3)}",
        "with a shape of floats": b"{'descr': '|u1', 'fortran_order': False, 'shape': (4.0, 4)}",
        "with one key": b"{'descr': '|u1'}",
        "that calls": b"{'descr': print('x'), 'fortran_order': False, 'shape': (4, 4)}",
        "of another type": b"[1, 2, 3]",
        "with a type of records": b"{'descr': [('a', '|O')], 'fortran_order': 0, 'shape': ()}",
    }
    found = {
        f"array {name}": Picture(npy(array, allow_pickle=True), said, name="x.npy")
        for name, (array, said) in wrong.items()
    }
    found |= {
        f"header {name}": Picture(claiming(head), "damaged|array|pixels", name="x.npy")
        for name, head in headers.items()
    }
    return found | {
        "array in rows": Picture(npy(COLOUR), None, planar(COLOUR), "x.npy"),
        "array in columns": Picture(npy(np.asfortranarray(COLOUR)), None, planar(COLOUR), "x.npy"),
        "array of grey, three wanted": Picture(npy(GREY), "1 channels in an array", name="x.npy"),
        "array of five channels, three wanted": Picture(npy(np.zeros((4, 4, 5), np.uint8)), "5 channels", name="x.npy"),
        "array of format 3": Picture(b"\x93NUMPY\x03\0" + bytes(60), r"npy format \(3, 0\)", name="x.npy"),
        "array of format 9": Picture(b"\x93NUMPY\x09\0" + bytes(60), r"npy format", name="x.npy"),
        "array with bytes behind": Picture(npy(COLOUR) + b"x", "bytes in a file with", name="x.npy"),
        "array without its last byte": Picture(npy(COLOUR)[:-1], "bytes in a file with", name="x.npy"),
        "an npz": Picture(b"PK\x03\x04" + bytes(99), "zip", name="x.npy"),
    }
