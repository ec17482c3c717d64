"""Pages of pictures: what all parts of a gallery share, and the page itself.

A part is a section of ``index.html``; each of its pictures is also a PNG file of its own. `attention`, `features` and
`failures` compute what they show in `maekit.report.gallery_attention` and so on.

B batch, C channels, H W pixels, P patch side, N patches, gh gw rows and columns of the grid.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from PIL import Image
from torch import Tensor

from maekit.report.grids import write_png
from maekit.report.page import Figure, Section, Table, write_report

SHOWN_SIDE = 160
"""Longest side of a picture in most grids of a gallery."""
BOX = torch.tensor([0.0, 0.9, 1.0]).view(3, 1, 1)
"""Colour of the frame around a chosen patch: none that photographs or the colour map are full of."""


@dataclass(frozen=True)
class Part:
    """One section of the gallery.

    Attributes:
        pictures: file name -> picture and what is to be seen on it.
        plots: ``<svg>`` text -> what is to be seen; they stand in the page only.
    """

    heading: str
    text: Sequence[str] = ()
    pictures: Mapping[str, tuple[Image.Image, str]] = field(default_factory=dict[str, tuple[Image.Image, str]])
    tables: Sequence[Table] = ()
    plots: Mapping[str, str] = field(default_factory=dict[str, str])


def write_gallery(out: Path, *, title: str, intro: Sequence[str], parts: Sequence[Part]) -> list[Path]:
    """Write ``OUT/index.html`` and the pictures of every part; return their paths, the page first.

    Raises:
        MaekitError: E-ENV-OUT if the place cannot be written.
    """
    files = [out / "index.html"]
    sections = []
    for part in parts:
        figures = [Figure(drawn, told) for drawn, told in part.plots.items()]
        for name, (image, told) in part.pictures.items():
            write_png(out / name, image)
            files.append(out / name)
            figures.append(Figure(image, f"{told} `{name}`"))
        sections.append(Section(part.heading, text=part.text, figures=figures, tables=part.tables))
    write_report(files[0], title=title, intro=intro, sections=sections)
    return files


def heat(values: Tensor, grid: tuple[int, int], patch: int, *, top: Tensor | float | None = None) -> Tensor:
    """Colour one number per patch (B, N): black where it is 0, by way of red to pale yellow at the top.

    Args:
        values: not negative; NaN is drawn grey.
        grid: gh, gw.
        patch: side in pixels, of which each patch is drawn.
        top: what is brightest, for all (a number) or for each image (B,); None: the largest of each image.

    Returns:
        (B, 3, H, W), 0..1.
    """
    highest = values.nan_to_num().amax(1) if top is None else torch.as_tensor(top, dtype=values.dtype)
    scaled = values / highest.expand(len(values)).clamp(min=1e-12)[:, None]
    colours = torch.tensor(matplotlib.colormaps["inferno"](torch.linspace(0, 1, 256).numpy())[:, :3]).float()
    painted = colours[(scaled.nan_to_num().clamp(0, 1) * 255).round().long()]  # (B, N, 3)
    painted = torch.where(values.isnan()[..., None], torch.full_like(painted, 0.5), painted)
    return blocks_of(painted, grid, patch)


def blocks_of(colours: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Draw one colour per patch (B, N, 3) as images (B, 3, H, W)."""
    small = colours.transpose(1, 2).unflatten(2, grid)
    return small.repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def framed(image: Tensor, place: tuple[int, int], patch: int) -> Tensor:
    """Draw a frame just inside a patch (row, column) of an image (C, H, W), 0..1; the result has three channels."""
    picture = shown(image).clone()
    line = max(1, patch // 8)
    top, left = place[0] * patch, place[1] * patch
    inside = picture[:, top + line : top + patch - line, left + line : left + patch - line].clone()
    picture[:, top : top + patch, left : left + patch] = BOX
    picture[:, top + line : top + patch - line, left + line : left + patch - line] = inside
    return picture


def shown(image: Tensor) -> Tensor:
    """Return three channels of an image (C, H, W): its first three, or its first thrice."""
    return image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)


def spaced(count: int, most: int) -> list[int]:
    """Return up to `most` whole numbers of 0..count-1, evenly spaced, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(at * (count - 1) / (most - 1)) for at in range(most)})
