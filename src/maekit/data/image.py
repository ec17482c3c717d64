"""read_image(): bytes in, pixels out; every format and every refusal in one place.

The content decides the format, never the name. JPEG goes through simplejpeg, which reports damage that Pillow
passes over in silence; what it cannot do (CMYK, arithmetic coding) goes to Pillow once. PNG, WebP, BMP, TIFF and GIF
go to exactly that one Pillow plugin, so no other decoder ever sees the bytes. Size is checked in the header, before
any pixel is decoded. What is not an image that can be used is refused with E-DATA-IMAGE; the caller decides.

Rules that hold for every image, in training, evaluation and display alike (docs/images.md: with the reasons):
    EXIF orientation    not applied
    colour profiles     not applied; broken ones do no harm
    transparency        composed on white: alpha, palette entries, colour keys
    16 bits             scaled by 1/257; 32-bit integers only within 0..65535, 32-bit floats only within 0..1
    CMYK, YCCK, Lab     to RGB by Pillow, Adobe's inverted inks known
    animation, pages    first frame
    truncation          refused, and so is damage that the decoder sees; a JPEG that lacks only its end marker is whole
    bombs               at most `MAX_PIXELS` by the header, `MAX_SCANS` of a progressive JPEG, `MAX_ARRAY_BYTES`
    smallest side       `MIN_SIDE` pixels
The fast JPEG path gives Pillow's pixels to the bit, unless a size that suffices is named (`--dct-scaling`).
"""

import io
import warnings
from collections.abc import Callable

import numpy as np
import simplejpeg
import torch
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor

from maekit.errors import MaekitError

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".npy"))
"""Lower-case suffixes of the files that a folder is searched for."""

MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"\x93NUMPY": "npy",
}
"""First bytes -> format; WebP (``RIFF....WEBP``) has a gap and is told apart in `sniff`."""

FORMATS = ("JPEG", "PNG", "WebP", "BMP", "TIFF", "GIF", "npy")

STRANGERS = {
    b"version https://git-lfs": "a git-lfs pointer (fetch the real files with: git lfs pull)",
    b"\0\0\0\x0cjP": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"8BPS": "a Photoshop file",
    b"%!PS": "PostScript",
    b"%PDF": "PDF",
    b"<svg": "SVG",
    b"icns": "ICNS",
    b"\xd7\xcd\xc6\x9a": "WMF",
    b"\xd0\xcf\x11\xe0": "an OLE file (FPX?)",
    b"\xff\x0a": "JPEG XL",
    b"<": "text (HTML or XML?)",
    b"{": "text (JSON?)",
    b"PK\x03\x04": "a zip file",
    b"\x1f\x8b": "a gzip file",
}
"""First bytes of what is often found under an image's name -> what to call it; the first match counts."""

MAX_PIXELS = 64 * 2**20
"""Pixels per image: 8192 x 8192. Pillow's own limit only warns up to 179 million (824 MB for 21 kB of PNG)."""
MIN_SIDE = 4
"""Pixels; below this a file is a tracking pixel or a rule, not a picture."""
MAX_SCANS = 1000
"""Scans of a progressive JPEG; real ones have about ten, and each costs a pass over all coefficients."""
MAX_SCAN_PIXELS = 2**30
"""Scans times pixels of one JPEG: 16 scans of the largest image."""
ROWS = 64
"""Rows that are scaled at a time."""
MAX_ARRAY_BYTES = 2**29
"""Bytes of one .npy array."""

_PLUGINS: dict[str, Callable[[io.BytesIO], Image.Image]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WebP": WebPImageFile,
    "BMP": BmpImageFile,
    "TIFF": TiffImageFile,
    "GIF": GifImageFile,
}
# The plugin classes skip Image.open's own size check, which warns; `_check_size` is stricter and stays silent.

# What plugins and numpy warn of in an image that they then read (a tag too long, a header of Python 2) is nothing that
# a user can act on, and thousands of such lines hide those that are.
warnings.filterwarnings("ignore", module=r"PIL\.(Bmp|Gif|Jpeg|Png|Tiff|WebP)ImagePlugin")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # of a frame of a GIF; MAX_PIXELS is less
warnings.filterwarnings("ignore", category=SyntaxWarning, module="<unknown>")  # a header is read as a Python literal
warnings.filterwarnings("ignore", message="Reading `.npy` or `.npz` file required additional header parsing")


def read_image(
    data: bytes, *, channels: int | None = None, name: str = "image", enough: tuple[int, int] | None = None
) -> Tensor:
    """Decode one image into (C, H, W).

    Args:
        data: the whole file.
        channels: 3 (RGB) or 1 (grey by luma) for pictures, 3 when None; for .npy the number that the array must
            hold, any when None.
        name: what to call the image in messages.
        enough: height and width that suffice: a larger JPEG is decoded at 1/2, 1/4 or 1/8 of its size, by leaving
            high frequencies out (DCT scaling), but not below this. None: whole.

    Returns:
        uint8; float32 for .npy arrays of uint16 (divided by 65535) or floats (as they are). Memory may lie in
        (H, W, C) order.

    Raises:
        MaekitError: E-DATA-IMAGE, for whatever is not such an image.
    """
    kind = sniff(data)
    try:
        if kind == "npy":
            return _read_array(data, channels)
        if channels not in (None, 1, 3):
            raise _Refusal(f"{kind or 'this'} image cannot give {channels} channels", "an .npy array (H, W, C)")
        if kind == "JPEG":
            return _read_jpeg(data, channels or 3, enough)
        if kind is None:
            raise _Refusal(_describe(data), f"one of {', '.join(FORMATS)}")
        return _read_pillow(data, kind, channels or 3)
    except _Refusal as refusal:
        found, expected = refusal.args
        raise MaekitError("E-DATA-IMAGE", f"cannot use {name}", found=found, expected=expected) from None
    except Exception as error:
        # A decoder fed with hostile bytes raises anything (struct.error, KeyError, zlib.error, ...): one bad image.
        raise MaekitError("E-DATA-IMAGE", f"cannot decode {name}", found=_reason(kind, error)) from error


def sniff(data: bytes) -> str | None:
    """Return which of `FORMATS` the first bytes announce, None when none."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    return next((kind for magic, kind in MAGIC.items() if data.startswith(magic)), None)


def num_frames(data: bytes) -> int:
    """Return the number of frames or pages that the file declares; only the first one is ever used."""
    kind = sniff(data)
    if kind not in ("PNG", "WebP", "GIF", "TIFF"):
        return 1
    try:
        return getattr(_PLUGINS[kind](io.BytesIO(data)), "n_frames", 1)
    except Exception:  # as in read_image: hostile bytes; that they are broken is read_image's to say
        return 1


class _Refusal(Exception):
    """Found, expected: becomes a MaekitError where the image's name is known."""


def _describe(data: bytes) -> str:
    """Say what the bytes are instead of an image."""
    if not data:
        return "an empty file"
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"mif1", b"avif", b"avis", b"hevc"):
        return "HEIC or AVIF, which is not supported"
    start = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n")
    return next((what for magic, what in STRANGERS.items() if start.startswith(magic)), f"bytes {data[:8]!r}")


def _reason(kind: str | None, error: Exception) -> str:
    """Say in a few words what a decoder complained about."""
    return f"damaged {kind} ({type(error).__name__}: {error})"


def _check_size(width: int, height: int) -> None:
    """Refuse by the header what is too large to decode or too small to be a picture."""
    if width * height > MAX_PIXELS:
        raise _Refusal(f"{width} x {height} pixels", f"at most {MAX_PIXELS} (64 Mpx)")
    if min(width, height) < MIN_SIDE:
        raise _Refusal(f"{width} x {height} pixels", f"both sides at least {MIN_SIDE}")


def _read_jpeg(data: bytes, channels: int, enough: tuple[int, int] | None) -> Tensor:
    """Decode strictly; only what simplejpeg does not know goes on to Pillow."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return _read_pillow(data, "JPEG", channels)
    _check_size(int(width), int(height))
    scans = _scans(data)
    if scans > MAX_SCANS or (scans > 1 and scans * int(width) * int(height) > MAX_SCAN_PIXELS):
        raise _Refusal(f"{scans} scans of {width} x {height} pixels", "a JPEG that can be decoded in seconds")
    if colours in ("CMYK", "YCCK"):
        return _read_pillow(data, "JPEG", channels)  # knows Adobe's inverted inks
    try:
        return _decode_jpeg(data, channels, enough)
    except ValueError as error:
        if "Premature end of JPEG file" in str(error):
            return _decode_jpeg(
                data + b"\xff\xd9", channels, enough
            )  # whole but for the end marker; if cut, it says so
        if "Corrupt JPEG data" in str(error):
            raise  # the decoder had to guess pixels; Pillow would hand them out without a word
        return _read_pillow(data, "JPEG", channels)


def _scans(data: bytes) -> int:
    """Count the markers ff da, never inside coded data, where 00 follows ff; bytes.count takes five times as long."""
    if len(data) > 2**24:
        return data.count(b"\xff\xda")  # takes no memory
    values = np.frombuffer(data, np.uint8)
    return int(np.count_nonzero((values[:-1] == 0xFF) & (values[1:] == 0xDA)))


def _decode_jpeg(data: bytes, channels: int, enough: tuple[int, int] | None) -> Tensor:
    """Decode with libjpeg-turbo; its warnings are errors."""
    least = {} if enough is None else {"min_height": enough[0], "min_width": enough[1], "min_factor": 2}
    pixels = simplejpeg.decode_jpeg(data, "GRAY" if channels == 1 else "RGB", strict=True, **least)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _read_pillow(data: bytes, kind: str, channels: int) -> Tensor:
    """Decode the first frame with the one plugin that `kind` names."""
    image = _PLUGINS[kind](io.BytesIO(data))
    _check_size(*image.size)
    image.load()
    return from_pillow(image, channels)


def from_pillow(image: Image.Image, channels: int = 3) -> Tensor:
    """Return a Pillow image as uint8 (C, H, W): 3 channels RGB, 1 grey; see the module for transparency and depth."""
    image = _flatten(image)
    if channels == 1:
        image = image if image.mode == "L" else image.convert("L")
        return torch.from_numpy(np.array(image))[None]
    if image.mode == "L":  # three equal channels, without a detour over Pillow
        return torch.from_numpy(np.array(image)).repeat(3, 1, 1)
    image = image if image.mode == "RGB" else image.convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _flatten(image: Image.Image) -> Image.Image:
    """Return the image as 8-bit L or a mode that converts to RGB without loss of meaning."""
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        return _on_white(image.convert("RGBA"))
    if image.mode == "1":
        return image.convert("L")
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_bytes(np.asarray(image)))
    return image


def _on_white(image: Image.Image) -> Image.Image:
    """Compose on white, the page that most transparent pictures were drawn for."""
    page = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(page, image).convert("RGB")


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """Scale (H, W) of 16-bit values, or of floats within 0..1, to uint8, rounded.

    Pillow clips instead: a 16-bit grey PNG comes out 99.6 % white.
    """
    top, word = (1.0, "float") if values.dtype.kind == "f" else (65535, "integer")
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):  # NaN too
        raise _Refusal(f"{word} pixels from {low} to {high}", f"0 to {top:g}, or an .npy array")
    scaled = np.empty(values.shape, np.uint8)
    for first in range(0, len(values), ROWS):  # in floats a large image would take eight times its memory
        scaled[first : first + ROWS] = values[first : first + ROWS] * (255.0 / top) + 0.5
    return scaled


def _read_array(data: bytes, channels: int | None) -> Tensor:
    """Read an .npy file of (H, W) or (H, W, C) without ever allocating what its header claims."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise _Refusal(f"npy format {version}", "1.0 or 2.0")
    shape, by_column, dtype = readers[version](stream)
    if dtype.str[1:] not in ("u1", "u2", "f4", "f8"):
        raise _Refusal(f"array of {dtype}", "uint8, uint16, float32 or float64")
    _check_shape(shape, channels)
    size, rest = dtype.itemsize * int(np.prod(shape, dtype=object)), len(data) - stream.tell()
    if size != rest or size > MAX_ARRAY_BYTES:
        raise _Refusal(f"array {shape} of {size} bytes in a file with {rest}", f"as many, at most {MAX_ARRAY_BYTES}")
    flat = np.frombuffer(data, dtype, offset=stream.tell())
    array = flat.reshape(shape, order="F" if by_column else "C")
    return torch.from_numpy(_to_pixels(np.atleast_3d(array))).permute(2, 0, 1)


def _check_shape(shape: tuple[int, ...], channels: int | None) -> None:
    """Refuse what is not (H, W) or (H, W, C) with the channels asked for."""
    if len(shape) not in (2, 3):
        raise _Refusal(f"array of shape {shape}", "(H, W) or (H, W, C)")
    _check_size(shape[1], shape[0])
    held = shape[2] if len(shape) == 3 else 1
    if not 1 <= held <= 4096 or channels not in (None, held):
        raise _Refusal(f"{held} channels in an array of shape {shape}", f"(H, W, {channels or 'up to 4096'})")


def _to_pixels(array: np.ndarray) -> np.ndarray:
    """Return a writable copy in this machine's byte order: uint8, or float32 (uint16 becomes 0..1)."""
    if array.dtype == np.uint8:
        return np.array(array, order="C")
    with np.errstate(over="ignore"):  # a float64 that float32 cannot hold becomes infinite and is refused below
        pixels = array.astype(np.float32, order="C")
    if array.dtype.kind == "u":
        return pixels / np.float32(65535)
    if not np.isfinite(pixels).all():
        raise _Refusal("NaN or infinite values", "finite ones")
    return pixels
