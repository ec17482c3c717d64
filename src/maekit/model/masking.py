"""Which patches are removed: noise per patch, sorted; the lowest stay (paper section 3, "Simple implementation").

    >>> noise = torch.tensor([[0.6, 0.9, 0.4, 0.7, 0.8]])
    >>> masking = random_masking(noise, 3)
    >>> masking.ids_shuffle.tolist()
    [[2, 0, 3, 4, 1]]
    >>> masking.ids_keep.tolist()
    [[2, 0, 3]]
    >>> masking.ids_restore.tolist()
    [[1, 4, 0, 2, 3]]
    >>> masking.mask.long().tolist()
    [[0, 1, 0, 0, 1]]

Polarity, once and for all: ``mask`` is bool and True means *removed* (as 1 in the official code; Hiera's 1 is kept).
Ratios are of patch tokens: class and register tokens never count.

B batch, N patches, K kept patches.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from maekit.errors import MaekitError


@dataclass(frozen=True)
class Masking:
    """One draw of masks.

    Attributes:
        ids_shuffle: (B, N) patches in the order of their noise: first those kept, then those removed.
        num_keep: K, the same in every row.
    """

    ids_shuffle: Tensor
    num_keep: int

    @property
    def ids_keep(self) -> Tensor:
        """Patches that stay (B, K), in shuffled order."""
        return self.ids_shuffle[:, : self.num_keep]

    @property
    def ids_masked(self) -> Tensor:
        """Patches that are removed (B, N-K), in shuffled order."""
        return self.ids_shuffle[:, self.num_keep :]

    @property
    def ids_restore(self) -> Tensor:
        """Place of each patch in the shuffled order (B, N); the inverse permutation, without a second sort."""
        places = torch.arange(self.ids_shuffle.shape[1], device=self.ids_shuffle.device)
        return torch.empty_like(self.ids_shuffle).scatter(1, self.ids_shuffle, places.expand_as(self.ids_shuffle))

    @property
    def mask(self) -> Tensor:
        """Bool (B, N) in image order, True = removed."""
        everywhere = torch.ones_like(self.ids_shuffle, dtype=torch.bool)
        return everywhere.scatter(1, self.ids_keep, False)


def len_keep(num_patches: int, mask_ratio: float) -> int:
    """Return how many patches stay: ``int(N * (1 - r) + 1e-6)``.

    The official rule ``int(N * (1 - r))`` loses a patch to float dust on some grids (100 patches at .9 keep 9, not 10);
    the 1e-6 removes the dust and changes nothing else.

    Raises:
        MaekitError: E-CONFIG-MASK if none or all would stay.
    """
    keep = int(num_patches * (1 - mask_ratio) + 1e-6) if 0 < mask_ratio < 1 else -1
    if not 0 < keep < num_patches:
        low, high = 1 / num_patches, (num_patches - 1) / num_patches
        raise MaekitError(
            "E-CONFIG-MASK",
            f"mask_ratio keeps {'no' if mask_ratio > 0 and keep <= 0 else 'every'} patch",
            found=f"{mask_ratio} of {num_patches} patches",
            expected="at least one patch kept and one removed",
            hint=f"a ratio from {low:.2g} to {high:.2g}" if num_patches > 1 else "a smaller patch_size",
        )
    return keep


def random_masking(noise: Tensor, keep: int) -> Masking:
    """Keep the `keep` patches of lowest noise in each row.

    The sort is stable, so equal noise gives equal masks on every device.

    Args:
        noise: (B, N).
        keep: K.
    """
    return Masking(torch.argsort(noise, dim=1, stable=True), keep)


def given_masking(mask: Tensor) -> Masking:
    """Use a mask as it is; kept patches come in image order.

    Costs one wait for the device: K must be known to the host.

    Args:
        mask: bool (B, N), True = removed.

    Raises:
        MaekitError: E-CONFIG-MASK if rows keep different numbers, or none, or all.
    """
    kept = (~mask).sum(1)
    fewest, most = int(kept.min()), int(kept.max())
    if fewest != most or not 0 < most < mask.shape[1]:
        raise MaekitError(
            "E-CONFIG-MASK",
            "argument mask (True = removed)",
            found=f"rows that keep {fewest}"
            + (f" to {most}" if most != fewest else "")
            + f" of {mask.shape[1]} patches",
            expected="the same number in every row, at least one kept and one removed",
        )
    return Masking(torch.argsort(mask.to(torch.uint8), dim=1, stable=True), most)
