"""Images to flattened patches and back, and the fixed positions of both sides.

B batch, C channels, P patch side, N patches, D token width.
"""

import torch
from torch import Tensor


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut images into flattened patches: (B, C, H, W) -> (B, N, P*P*C), row by row, channel fastest.

    The order inside a patch is (row, column, channel), as in the official code: not the (channel, row, column) of a
    flattened Conv2d kernel.
    """
    b, c, h, w = images.shape
    grid = images.reshape(b, c, h // patch, patch, w // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(patches: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """Put flattened patches together again: (B, N, P*P*C) -> (B, C, H, W)."""
    (b, _, width), (rows, columns) = patches.shape, grid
    c = width // patch**2
    cells = patches.reshape(b, rows, columns, patch, patch, c)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(b, c, rows * patch, columns * patch)


def sincos_2d(dim: int, grid: tuple[int, int], prefix: int = 0) -> Tensor:
    """Return the fixed table of positions, (prefix + N, dim) float32, rows of prefix tokens zero.

    The first half of the channels encodes the column (width first, although the official code calls it emb_h), the
    second the row; each half is [sin | cos] of position * 10000^(-i / (dim / 4)), computed in float64
    (official util/pos_embed.py; the tables of MoCo v3 and big_vision divide by dim / 4 - 1 and differ).
    """
    assert dim % 4 == 0, dim
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [position.reshape(-1, 1) * omega for position in (columns, rows)]
    table = torch.cat([half for angle in angles for half in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([torch.zeros(prefix, dim, dtype=torch.float64), table]).float()
