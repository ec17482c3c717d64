"""Picture grids as PIL images: columns with headers, rows with labels, and notes underneath.

Small pictures are enlarged by whole factors without smoothing, so that a pixel stays a square of that very colour;
large ones are reduced. Every grid is on white with dark text, so it reads the same on a light and a dark page. PNG
files carry no metadata; equal pictures give equal bytes.
"""

import base64
import io
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from maekit.errors import clean
from maekit.report.files import write_whole

Picture = Tensor | np.ndarray
"""Tensor (C, H, W), uint8 or float 0..1; or array (H, W) or (H, W, C), uint8."""

INK, MUTED, WARNING, RULE = (24, 27, 33), (98, 105, 117), (176, 32, 32), (206, 210, 217)
"""Text, notes, what must not be believed, lines."""
TARGET_SIDE = 128
"""Small pictures are enlarged to at most this many pixels."""
MAX_SIDE = 256
BUDGET = 24_000_000
"""Pixels of all cells together: hundreds of pictures are shown smaller."""
GAP, GROUP_GAP, MARGIN, LABEL_WIDTH, MIN_WIDTH = 6, 20, 16, 132, 480


@dataclass(frozen=True)
class _Layout:
    """Where things are, in pixels."""

    cell: tuple[int, int]
    columns: list[int]
    left: int
    top: int
    width: int


def picture(image: Picture) -> Image.Image:
    """Turn one image into RGB: 1 channel grey, 3 as they are, otherwise the first three, of two the first."""
    pixels = _bytes(image)
    channels = pixels.shape[2]
    shown = pixels[:, :, :3] if channels >= 3 else np.repeat(pixels[:, :, :1], 3, axis=2)
    return Image.fromarray(np.ascontiguousarray(shown))


def _bytes(image: Picture) -> np.ndarray:
    """Return (H, W, C) uint8."""
    if isinstance(image, Tensor):
        values = image.detach().cpu()
        if values.dtype != torch.uint8:
            values = values.float().nan_to_num().clamp(0, 1).mul(255).round().to(torch.uint8)
        return values.permute(1, 2, 0).numpy()
    assert image.dtype == np.uint8 and image.ndim in (2, 3), (image.dtype, image.shape)
    return image[:, :, None] if image.ndim == 2 else image


def shown_channels(channels: int) -> str:
    """Say which channels `picture` shows; empty when all."""
    if channels in (1, 3):
        return ""
    which = "the first three" if channels > 3 else "the first"
    return f"Shown: {which} of {channels} channels."


def reconstruction_grid(
    rows: Sequence[Sequence[Picture]],
    headers: Sequence[str],
    row_labels: Sequence[str] | None = None,
    *,
    groups: Sequence[tuple[str, int]] = (),
    warn: Collection[int] = (),
    notes: Sequence[str] = (),
    max_side: int = MAX_SIDE,
) -> Image.Image:
    """Lay pictures of one size out as a table.

    Args:
        rows: one list of pictures per row, as long as `headers`.
        headers: text over each column, wrapped to its width.
        row_labels: text left of each row, cut where it is too long.
        groups: (title, number of columns) from the left; groups stand apart.
        warn: columns whose header is red.
        notes: lines under the grid, wrapped to its width.
        max_side: longest side of a shown picture; larger ones are reduced.
    """
    assert rows and all(len(row) == len(headers) for row in rows), "one picture per header"
    pictures = [[picture(image) for image in row] for row in rows]
    cell = cell_size(pictures[0][0].size, len(rows) * len(headers), max_side)
    layout = _layout(cell, len(headers), groups, labelled=bool(row_labels), least=MIN_WIDTH if notes else 0)
    heads = [_wrap(header, cell[0], _font(12)) for header in headers]
    head_height = max(len(lines) for lines in heads) * 15 + 8
    group_height = 26 if any(title for title, _ in groups) else 0
    first = layout.top + group_height + head_height
    foot = [line for note in notes for line in _wrap(note, layout.width - 2 * MARGIN, _font(12))]
    bottom = first + len(rows) * (cell[1] + GAP)
    canvas = Image.new("RGB", (layout.width, bottom + (len(foot) * 16 + 8 if foot else 0) + MARGIN - GAP), "white")
    draw = ImageDraw.Draw(canvas)
    _draw_groups(draw, layout, groups)
    for column, lines in enumerate(heads):
        _draw_header(draw, lines, layout, column, first, WARNING if column in warn else INK)
    for at, row in enumerate(pictures):
        y = first + at * (cell[1] + GAP)
        if row_labels:
            _draw_label(draw, row_labels[at], y, cell[1])
        for column, image in enumerate(row):
            canvas.paste(_fitted(image, cell), (layout.columns[column], y))
    for at, line in enumerate(foot):
        draw.text((MARGIN, bottom + 8 + at * 16), line, fill=MUTED, font=_font(12))
    return canvas


def captioned_grid(
    pictures: Sequence[Picture], captions: Sequence[str], *, columns: int = 6, max_side: int = 160
) -> Image.Image:
    """Lay pictures of one size out in rows, each with a few lines of text underneath.

    Args:
        captions: one per picture, wrapped to its width and cut after three lines.
        columns: pictures in a row.
        max_side: longest side of a shown picture; larger ones are reduced.
    """
    shown = [picture(image) for image in pictures]
    cell = cell_size(shown[0].size, len(shown), max_side)
    cell_width = max(cell[0], 110)
    lines = [_wrap(caption, cell_width, _font(12))[:3] for caption in captions]
    height = cell[1] + 15 * max(map(len, lines)) + 12
    rows, columns = math.ceil(len(shown) / columns), min(columns, len(shown))
    size = (2 * MARGIN + columns * (cell_width + GAP) - GAP, 2 * MARGIN + rows * height - 12)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for at, (image, text) in enumerate(zip(shown, lines, strict=True)):
        x, y = MARGIN + at % columns * (cell_width + GAP), MARGIN + at // columns * height
        canvas.paste(_fitted(image, cell), (x, y))
        for number, line in enumerate(text):
            draw.text((x, y + cell[1] + 3 + 15 * number), _cut(line, cell_width, _font(12)), fill=INK, font=_font(12))
    return canvas


def cell_size(size: tuple[int, int], cells: int, max_side: int = MAX_SIDE) -> tuple[int, int]:
    """Return the shown (width, height) of pictures of `size`: whole factors up, any factor down."""
    longest = max(size)
    limit = min(max_side, max(32, math.isqrt(BUDGET // max(1, cells))))
    if longest <= limit:
        factor = max(1, min(TARGET_SIDE, limit) // longest)
        return size[0] * factor, size[1] * factor
    return max(1, round(size[0] * limit / longest)), max(1, round(size[1] * limit / longest))


def _fitted(image: Image.Image, cell: tuple[int, int]) -> Image.Image:
    if image.size == cell:
        return image
    smaller = cell[0] < image.size[0] or cell[1] < image.size[1]
    return image.resize(cell, Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST)


def _layout(
    cell: tuple[int, int], columns: int, groups: Sequence[tuple[str, int]], *, labelled: bool, least: int
) -> _Layout:
    left = MARGIN + (LABEL_WIDTH if labelled else 0)
    ends, end = set(), 0
    for _, count in groups:
        end += count
        ends.add(end)
    xs, x = [], left
    for column in range(columns):
        xs.append(x)
        x += cell[0] + (GROUP_GAP if column + 1 in ends and column + 1 < columns else GAP)
    return _Layout(cell, xs, left, MARGIN - 4, max(least, x - GAP + MARGIN))


def _draw_groups(draw: ImageDraw.ImageDraw, layout: _Layout, groups: Sequence[tuple[str, int]]) -> None:
    start = 0
    for title, count in groups:
        x, end = layout.columns[start], layout.columns[start + count - 1] + layout.cell[0]
        if title:
            draw.text((x, layout.top), _cut(title, end - x, _font(14, bold=True)), fill=INK, font=_font(14, bold=True))
            draw.line([(x, layout.top + 21), (end - 1, layout.top + 21)], fill=RULE)
        start += count


def _draw_header(
    draw: ImageDraw.ImageDraw, lines: list[str], layout: _Layout, column: int, first: int, fill: tuple[int, int, int]
) -> None:
    """Write a header just above its column."""
    for at, line in enumerate(lines):
        y = first - 6 - 15 * (len(lines) - at)
        draw.text((layout.columns[column], y), line, fill=fill, font=_font(12))


def _draw_label(draw: ImageDraw.ImageDraw, text: str, y: int, height: int) -> None:
    room = LABEL_WIDTH - 12
    lines = _wrap(text, room, _font(12))[: max(1, min(4, height // 15))]
    for at, line in enumerate(lines):
        place = (MARGIN, y + (height - 15 * len(lines)) // 2 + 15 * at)
        draw.text(place, _cut(line, room, _font(12)), fill=MUTED, font=_font(12))


@lru_cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans from matplotlib's own folder: the same on every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


_PIECE = re.compile(r"[^\s_/-]*[_/-]*\s*")
"""Where a line may end: after spaces, and after the marks that file names have in place of them."""


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Break into lines of `width` pixels, inside a word only where it is wider than a line."""
    lines = [""]
    for piece in _PIECE.findall(clean(text, 1000)):
        if font.getlength((lines[-1] + piece).rstrip()) <= width:
            lines[-1] += piece
            continue
        while font.getlength(piece.rstrip()) > width and len(piece) > 1:
            fits = max(n for n in range(1, len(piece) + 1) if n == 1 or font.getlength(piece[:n]) <= width)
            lines.append(piece[:fits])
            piece = piece[fits:]
        lines.append(piece)
    return [line.strip() for line in lines if line.strip()] or [""]


def _cut(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    text = clean(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def png_bytes(image: Image.Image) -> bytes:
    """Encode as PNG without metadata (no time, no software, no colour profile)."""
    plain = image.copy()
    plain.info = {}
    stream = io.BytesIO()
    plain.save(stream, "PNG", compress_level=9)
    return stream.getvalue()


def data_uri(image: Image.Image) -> str:
    """Return the picture as a ``data:`` address for a self-contained page."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode("ascii")


def write_png(path: Path, image: Image.Image) -> None:
    """Write a picture; the file is whole or absent."""
    write_whole(path, png_bytes(image))
