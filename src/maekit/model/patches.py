"""Images as rows of patches, and where each patch sits.

One layout everywhere: patches run row by row over the grid, and inside a patch the channel runs fastest, then x,
then y (official models_mae.py). Whoever needs another order converts at the border.

B batch, C channels, H W pixels, P patch side, N patches, D token width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

Pair = tuple[int, int]


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else value


def patchify(images: Tensor, patch: int | Pair) -> Tensor:
    """Cut images (B, C, H, W) into patches (B, N, P*P*C), channel fastest.

    H and W must be multiples of the patch side.
    """
    (height, width), (batch, channels, rows, columns) = _pair(patch), images.shape
    grid = images.reshape(batch, channels, rows // height, height, columns // width, width)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, height * width * channels)


def unpatchify(patches: Tensor, patch: int | Pair, grid: Pair) -> Tensor:
    """Put patches (B, N, P*P*C) back together to images (B, C, H, W); the exact inverse of `patchify`.

    Args:
        patches: row by row over the grid, channel fastest.
        patch: side in pixels, or height and width.
        grid: rows and columns of patches.
    """
    (height, width), (rows, columns) = _pair(patch), grid
    batch, _, values = patches.shape
    channels = values // (height * width)
    cells = patches.reshape(batch, rows, columns, height, width, channels)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, rows * height, columns * width)


def select(rows: Tensor, ids: Tensor) -> Tensor:
    """Take rows (B, N, X) by index (B, M) within each image: (B, M, X)."""
    return rows.gather(1, ids[:, :, None].expand(-1, -1, rows.shape[2]))


def place(kept: Tensor, ids_keep: Tensor, mask_token: Tensor, num_patches: int) -> Tensor:
    """Put kept tokens (B, K, D) where they belong among mask tokens (1, 1, D): (B, N, D).

    One scatter in place of the paper's append and unshuffle; the same values and gradients.
    """
    everywhere = mask_token.expand(kept.shape[0], num_patches, -1)
    return everywhere.scatter(1, ids_keep[:, :, None].expand_as(kept), kept)


def sincos_2d(dim: int, grid: Pair, prefix: int = 0) -> Tensor:
    """Return fixed 2-D sine-cosine positions (prefix + N, dim), float32.

    The first half of the channels encodes x (the column), the second y (the row), each as [sin | cos] over dim / 4
    frequencies 10000^(-i / (dim / 4)) computed in float64 (official util/pos_embed.py, where the first half is called
    emb_h but is fed the column). MoCo v3 and big_vision divide by dim / 4 - 1 instead: another table, up to 0.25 off.

    Args:
        dim: token width, a multiple of 4.
        grid: rows and columns of patches.
        prefix: rows of zeros put before, one for each token that has no place in the image.
    """
    assert dim % 4 == 0, dim
    rows, columns = grid
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    x = _sincos_1d(torch.arange(columns, dtype=torch.float64), omega)
    y = _sincos_1d(torch.arange(rows, dtype=torch.float64), omega)
    table = torch.cat([x.expand(rows, -1, -1), y[:, None].expand(-1, columns, -1)], dim=2).reshape(-1, dim)
    return torch.cat([table.new_zeros(prefix, dim), table]).float()


def resample_positions(table: Tensor, old: Pair, new: Pair) -> Tensor:
    """Return positions (1, prefix + N, D) of another grid: bicubic, the rows of the prefix kept.

    As official util/pos_embed.py, interpolate_pos_embed: bicubic, align_corners False, no antialiasing.
    """
    prefix = table.shape[1] - old[0] * old[1]
    first, places = table[:, :prefix], table[:, prefix:]
    grid = places.reshape(1, *old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    return torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1)


def _sincos_1d(positions: Tensor, omega: Tensor) -> Tensor:
    angles = torch.outer(positions, omega)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
