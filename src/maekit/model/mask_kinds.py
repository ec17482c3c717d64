"""What is removed first in each kind of mask: a value for every place, the highest first, equal ones by their noise.

Whatever is random here is read from the noise of the image itself (`fractions`), so a mask is a function of that row
alone: it is the same in any batch, on any process and after a resume. Only whole-tensor operations, and the device is
never waited for.

B batch, N places of a grid of rows x columns (patches, or units of several patches), in image order.
"""

import math

import torch
from torch import Tensor

ASPECTS = (0.3, 1 / 0.3)
"""Height over width of a block, log-uniform (BEiT, arXiv 2106.08254, algorithm 1)."""
SMALLEST = 16 / 196
"""Share of the grid that a block covers at least, while so much is to be removed (BEiT: 16 of 14 x 14 patches)."""
ROUNDS = 12
"""Blocks of an image at most. On 14 x 14 something is left to fill in 0.2 % of images at a ratio of .75, and in 10 % at
a ratio of .9, there 0.3 patches on average (28 x 28: 2 % and 36 %, 3.4 of 706). The noisiest free places fill it."""


def fractions(noise: Tensor) -> Tensor:
    """Return two further uniform numbers of each one (B, 2N): what follows its first 4 and its first 14 binary digits.

    A float of `torch.rand` has 24. Which patch has the most noise is said nearly by the digits before alone, so the
    rest is nearly independent of it (the noisiest of 196 has a few more leading ones than 4).
    """
    return torch.cat([noise * 2.0**4, noise * 2.0**14], dim=1).remainder(1)


def draw_blocks(noise: Tensor, grid: tuple[int, int], removed: int) -> tuple[Tensor, Tensor]:
    """Draw blocks as BEiT does until `removed` places are covered, all images at once.

    In each round the area is uniform between `SMALLEST` and what is still to be removed, the aspect log-uniform among
    those of `ASPECTS` that fit. No block covers more than is missing, so none is cut. The first lies anywhere with
    equal chance, a later one where it covers the noisiest place still free (BEiT draws anew until one covers more).

    Returns:
        Blocks (B, rounds, 4): top, left, height, width, nothing but 0 once all is covered; and what they cover (B, N),
        at most `removed`: seldom a few less (`ROUNDS`).
    """
    rows, columns = grid
    row, column = _places(grid, noise.device)
    rounds = min(ROUNDS, len(row) // 2)
    chances = fractions(noise)[:, : 4 * rounds].reshape(len(noise), rounds, 4).unbind(1)
    covered, blocks = torch.zeros_like(noise, dtype=torch.bool), []
    for number, chance in enumerate(chances):
        size = _sizes((removed - covered.sum(1)).to(noise.dtype), chance[:, :2], grid)
        last = torch.stack([rows - size[:, 0], columns - size[:, 1]], dim=1)  # of its upper left corner
        low, high = torch.zeros_like(last), last
        if number:
            free = noise.masked_fill(covered, -math.inf).argmax(1)
            through = torch.stack([row[free], column[free]], dim=1)
            low, high = (through - size + 1).clamp(min=0), torch.minimum(through, last)
        corner = low + (chance[:, 2:] * (high - low + 1)).floor()
        top, left, bottom, right = torch.cat([corner, corner + size], dim=1)[:, :, None].unbind(1)
        covered = covered | ((row >= top) & (row < bottom) & (column >= left) & (column < right))
        blocks.append(torch.cat([corner * (size > 0), size], dim=1))
    return torch.stack(blocks, dim=1).long(), covered


def _sizes(missing: Tensor, chance: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return height and width (B, 2) of a block of at most `missing` (B,) places, 0 where that is 0."""
    rows, columns = grid
    area = torch.lerp(missing.clamp(max=SMALLEST * rows * columns), missing, chance[:, 0])
    # of one area, a log-uniform aspect is a log-uniform height
    tall = (area * ASPECTS[1]).sqrt().clamp(max=rows)
    short = torch.minimum(torch.maximum((area * ASPECTS[0]).sqrt(), area / columns), tall).clamp(min=1e-6)
    exact = short * (tall / short) ** chance[:, 1]
    height = torch.minimum(exact.round().clamp(min=1), missing)
    width = (area / exact.clamp(min=1e-6)).round().clamp(1, columns)
    width = torch.minimum(width, (missing / height.clamp(min=1)).floor())
    return torch.stack([height, width], dim=1)


def block(noise: Tensor, grid: tuple[int, int], removed: int) -> Tensor:
    """Return 1 for what `draw_blocks` covers, 0 elsewhere."""
    return draw_blocks(noise, grid, removed)[1].to(noise.dtype)


def centre(noise: Tensor, grid: tuple[int, int], removed: int) -> Tensor:
    """Rank places by how near the middle they are, as shares of the grid's sides: one block of the image's shape.

    Where a block of so many places has an odd side and the grid an even one, or the reverse, it lies half a place off
    the middle, on a side drawn for each image.
    """
    share = math.sqrt(removed / (grid[0] * grid[1]))
    distances = []
    for at, side, other, chance in zip(
        _places(grid, noise.device), grid, grid[::-1], fractions(noise).unbind(1), strict=False
    ):
        off = round(share * side) % 2 != side % 2
        shift = (2 * (chance >= 0.5).to(noise.dtype) - 1) * off
        distances.append((2 * at - (side - 1) + shift[:, None]).abs() * other)
    return -torch.maximum(*distances)


def regular(noise: Tensor, grid: tuple[int, int], removed: int) -> Tensor:
    """Return 1 where a regular pattern removes (paper Fig. 6, right), 0 where it keeps.

    Where in its k x k the pattern (`patterns`) begins is drawn for each image: otherwise the same places would go all
    through training.
    """
    side, kept = patterns(grid)[removed]
    begin = (fractions(noise)[:, :1] * side * side).floor().long()
    row, column = _places(grid, noise.device)
    row, column = row + begin // side, column + begin % side
    if kept == "half":
        return ((row + column) % 2).to(noise.dtype)
    corner = (row % side == 0) & (column % side == 0)
    return (~corner if kept == "one" else corner).to(noise.dtype)


def patterns(grid: tuple[int, int]) -> dict[int, tuple[int, str]]:
    """Return the regular patterns that fill a grid, by the number of places they remove.

    Of every k x k places, k any divisor of both sides, "one" is kept or "rest", all but one; "half": a chessboard.
    """
    count = grid[0] * grid[1]
    sides = divisors(grid)[1:]
    found = {count // side**2: (side, "rest") for side in sides}
    found |= {count - count // side**2: (side, "one") for side in sides}
    if count % 2 == 0:
        found[count // 2] = (2, "half")
    return {removed: found[removed] for removed in sorted(found) if 0 < removed < count}


def _places(grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return row and column (N,) of each place."""
    place = torch.arange(grid[0] * grid[1], device=device)
    return place // grid[1], place % grid[1]


def divisors(grid: tuple[int, int]) -> list[int]:
    """Return the whole numbers that divide both sides."""
    return [side for side in range(1, min(grid) + 1) if grid[0] % side == grid[1] % side == 0]
