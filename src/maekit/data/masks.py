"""Masks that users bring, for `mask_kind` given: a score for every patch, the highest are removed first.

Two forms: one .npy file, for all images or with a row for each, or a folder of pictures (or .npy files) named like the
images, as saliency methods write them. What is given for each image belongs to the whole image, so it fits views that
show the whole image only (`per_image`).

Files are opened when a sample is made, so that `Masks` is cheap to send to loader workers; arrays are mapped into
memory, and a pickle is never loaded.
"""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maekit.data.image import SUFFIXES, read_image
from maekit.data.source import Source, read_regular_file
from maekit.errors import MaekitError

FORMS = (".npy", ".png")
"""Suffixes of the files in a folder; where both are there, the first counts."""
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Masks:
    """Scores of patches by image.

    Attributes:
        path: the .npy file, or the folder.
        grid: rows and columns of patches.
        per_image: each image has its own, of the whole image; otherwise one is laid over what the model sees.
        files: in a folder, the file of each image.
    """

    path: Path
    grid: tuple[int, int]
    per_image: bool
    files: list[str] | None = field(default=None, repr=False)

    def scores(self, index: int) -> Tensor:
        """Return the scores of image `index`, float32 (N,) in image order.

        Raises:
            MaekitError: E-DATA-MASK if its file in the folder cannot be used.
        """
        if self.files is not None:
            return _from_file(self.path / self.files[index], self.grid)
        values = _open(self.path)
        return torch.from_numpy(_floats(values[index] if self.per_image else values)).flatten()


def open_masks(path: Path | str, source: Source, grid: tuple[int, int]) -> Masks:
    """Look at a file or folder of masks and say what fits.

    Args:
        path: an .npy file of shape (N,) or (rows, columns), for all images, or (images, N) or (images, rows, columns),
            in the order of `source`; bool or numbers. Or a folder with a .png or .npy for each image, named by its id
            (suffix left out): greys of any size, averaged to the grid.
        source: the images.
        grid: rows and columns of patches.

    Raises:
        MaekitError: E-DATA-MASK for a file of another shape or type or with numbers that are not finite, and a folder
            that lacks some image's.
    """
    path = Path(path)
    if path.is_dir():
        return Masks(path, grid, per_image=True, files=_named_like(source, path))
    if not path.is_file():
        raise MaekitError("E-DATA-MASK", f"cannot read {path}", found="no such file or folder", hint="--mask-from PATH")
    values = _open(path)
    count = grid[0] * grid[1]
    each = [(len(source), count), (len(source), *grid)]
    if values.shape not in [(count,), grid, *each]:
        raise MaekitError(
            "E-DATA-MASK",
            f"masks in {path}",
            found=f"shape {values.shape}",
            expected=f"{(count,)} or {grid} for all images, {each[0]} or {each[1]} for each of the {len(source)}",
        )
    if values.dtype.kind == "f":
        _check_finite(values, path)
    return Masks(path, grid, per_image=values.shape in each and values.shape != grid)


def _open(path: Path) -> np.ndarray:
    """Map an .npy file of bool or numbers into memory."""
    try:
        values = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # hostile bytes in a header make numpy raise anything: TokenError, MemoryError
        found = "Python objects (a pickle)" if "Python objects" in str(error) else error
        raise MaekitError("E-DATA-MASK", f"cannot read {path}", found=found, expected="an .npy array") from None
    return _numbers(values, path)


def _numbers(values: np.ndarray, path: Path) -> np.ndarray:
    if values.dtype.kind not in "buif":
        raise MaekitError("E-DATA-MASK", f"masks in {path}", found=f"type {values.dtype}", expected="bool or numbers")
    return values


def _check_finite(values: np.ndarray, path: Path) -> None:
    for first in range(0, len(values), ROWS_AT_ONCE):
        if not (good := np.isfinite(_floats(values[first : first + ROWS_AT_ONCE]))).all():
            place = (first + int(np.argwhere(~good)[0][0]), *np.argwhere(~good)[0][1:].tolist())
            found = f"{values[place]} at {list(place)}"
            raise MaekitError("E-DATA-MASK", f"masks in {path}", found=found, expected="finite numbers")


def _floats(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # too large for 32 bits: infinite, and refused as such
        return np.array(values, dtype=np.float32)


def _named_like(source: Source, folder: Path) -> list[str]:
    """Return the file of each image.

    Raises:
        MaekitError: E-DATA-MASK if the folder holds no mask, or not that of every image.
    """
    there = set(_files(folder))
    if not there:
        raise MaekitError(
            "E-DATA-MASK", f"masks in {folder}", found="no .png and no .npy file", expected="one an image"
        )
    names = [_stem(one) for one in source.ids]
    chosen = [next((name + form for form in FORMS if name + form in there), None) for name in names]
    missing = [name for name, file in zip(names, chosen, strict=True) if file is None]
    if missing:
        some = ", ".join(f"{name}.png" for name in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise MaekitError(
            "E-DATA-MASK",
            f"masks in {folder}",
            found=f"none for {len(missing)} of {len(names)} images: {some}",
            expected="one for each, named like it, .png or .npy",
        )
    return [file for file in chosen if file is not None]


def _files(folder: Path) -> Iterator[str]:
    for root, _, names in os.walk(folder):
        for name in names:
            if name.endswith(FORMS):
                yield Path(root, name).relative_to(folder).as_posix()


def _stem(name: str) -> str:
    """Return an image's id without its suffix; a row of parquet (``file.parquet:3``) has none."""
    path = PurePosixPath(*(part for part in PurePosixPath(name).parts if part not in ("/", "..")))
    return str(path.with_suffix("") if path.suffix.lower() in SUFFIXES else path)


def _from_file(path: Path, grid: tuple[int, int]) -> Tensor:
    """Read one image's mask and average it to the grid, cut in the middle to its aspect as the image is."""
    try:
        data = read_regular_file(str(path))
        if path.suffix == ".npy":
            values = torch.from_numpy(_floats(_numbers(np.load(io.BytesIO(data), allow_pickle=False), path)))
        else:
            values = read_image(data, channels=1, name=str(path))[0].float() / 255
    except Exception as error:  # a pickle, no array, a broken picture, hostile bytes in a header
        if isinstance(error, MaekitError) and error.code == "E-DATA-MASK":
            raise
        found = error.args[0] if isinstance(error, MaekitError) else error
        raise MaekitError("E-DATA-MASK", f"cannot read mask {path}", found=found) from error
    if values.shape == (grid[0] * grid[1],):
        values = values.reshape(grid)
    usable = values.ndim == 2 and values.numel()
    if not usable or not values.isfinite().all():
        found = "numbers that are not finite" if usable else f"shape {tuple(values.shape)}"
        raise MaekitError("E-DATA-MASK", f"mask {path}", found=found, expected="(H, W) of finite numbers")
    high, wide = values.shape
    tall, broad = min(high, max(1, round(wide * grid[0] / grid[1]))), min(wide, max(1, round(high * grid[1] / grid[0])))
    top, left = (high - tall) // 2, (wide - broad) // 2
    return F.adaptive_avg_pool2d(values[None, top : top + tall, left : left + broad], grid).flatten()
