"""Which patches are removed: ranks of random noise, one draw per image (arXiv 2111.06377 section 3).

The field's worked example: noise for five patches of which three are kept.

>>> chosen = by_noise(torch.tensor([[.6, .9, .4, .7, .8]]), keep=3)
>>> chosen.ids_shuffle.tolist(), chosen.ids_restore.tolist()
([[2, 0, 3, 4, 1]], [[1, 4, 0, 2, 3]])
>>> chosen.ids_keep.tolist(), chosen.mask.int().tolist()
([[2, 0, 3]], [[0, 1, 0, 0, 1]])
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from maekit.errors import MaekitError


@dataclass(frozen=True)
class Masking:
    """One choice per image.

    Attributes:
        ids_shuffle: (B, N) patches in the order of their noise: the first `keep` stay.
        ids_restore: (B, N) where each patch went in that order; inverse of `ids_shuffle`.
        keep: K, patches that stay.
    """

    ids_shuffle: Tensor
    ids_restore: Tensor
    keep: int

    @property
    def ids_keep(self) -> Tensor:
        """Return the visible patches, (B, K)."""
        return self.ids_shuffle[:, : self.keep]

    @property
    def ids_masked(self) -> Tensor:
        """Return the removed patches, (B, N - K)."""
        return self.ids_shuffle[:, self.keep :]

    @property
    def mask(self) -> Tensor:
        """Return (B, N) bool, True = removed."""
        return self.ids_restore >= self.keep


def len_keep(num_patches: int, mask_ratio: float) -> int:
    """Return how many patches stay: int(N * (1 - ratio)), the official rule, without its dust.

    In float64 100 * (1 - .9) is 9.999...98, which int() makes 9; a millionth mends that and changes nothing else.
    The class token never counts.

    Raises:
        MaekitError: E-CONFIG-MASK if none or all would stay.
    """
    keep = int(num_patches * (1 - mask_ratio) + 1e-6)
    if not 0 < keep < num_patches:
        raise MaekitError(
            "E-CONFIG-MASK",
            "setting mask_ratio",
            found=f"{mask_ratio}, which keeps {keep} of {num_patches} patches",
            expected=f"between {1 / num_patches:.3g} and {1 - 1 / num_patches:.3g}",
            hint="--mask-ratio 0.75, or a smaller --patch-size",
        )
    return keep


def by_noise(noise: Tensor, keep: int) -> Masking:
    """Keep the `keep` patches of lowest noise in every row of (B, N)."""
    ids_shuffle = noise.argsort(dim=1, stable=True)  # stable: equal noise gives the same mask on every device
    ids_restore = torch.empty_like(ids_shuffle)
    ids_restore.scatter_(1, ids_shuffle, torch.arange(noise.shape[1], device=noise.device).expand_as(ids_shuffle))
    return Masking(ids_shuffle, ids_restore, keep)


def by_mask(mask: Tensor) -> Masking:
    """Remove exactly the True patches of (B, N) bool; the kept ones stay in image order.

    Raises:
        MaekitError: E-CONFIG-MASK if it is not bool, rows differ in number, or one keeps none or all.
    """
    if mask.dtype != torch.bool or mask.ndim != 2:
        raise MaekitError("E-CONFIG-MASK", "mask", found=f"{mask.dtype} {tuple(mask.shape)}", expected="bool (B, N), True = removed")
    counts = (~mask).sum(1)
    keep, most = int(counts.min()), int(counts.max())
    if keep != most or not 0 < keep < mask.shape[1]:
        raise MaekitError(
            "E-CONFIG-MASK", "mask", found=f"rows that keep {keep} to {most} of {mask.shape[1]} patches", expected="the same number in every row, not none or all"
        )
    return by_noise(mask.float(), keep)
