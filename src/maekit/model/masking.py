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

Other kinds of masks give each patch a value (`mask_kinds`) and remove the highest; the noise decides between equal
ones. So every kind has the exact number of patches that the ratio asks for, in every row.

Polarity, once and for all: ``mask`` is bool and True means *removed* (as 1 in the official code; Hiera's 1 is kept).
Ratios are of patch tokens: class and register tokens never count.

B batch, N patches, K kept patches, U units of k x k patches.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from maekit.errors import MaekitError
from maekit.model import mask_kinds
from maekit.seeds import mix

KINDS = ("random", "block", "grid", "centre", "given")
"""What `draw_masking` can draw."""


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


def draw_masking(
    kind: str,
    noise: Tensor,
    grid: tuple[int, int],
    mask_ratio: float,
    unit: int = 1,
    scores: Tensor | None = None,
) -> Masking:
    """Draw masks of one kind, each a function of its own row of `noise` (and of `scores`).

    Args:
        kind: "random", uniform; "block", rectangles as in BEiT; "grid", a regular pattern; "centre", one block in the
            middle; "given", the patches of highest score.
        noise: (B, N), uniform in 0..1.
        grid: rows and columns of patches.
        mask_ratio: share removed.
        unit: k: whole units of k x k patches are removed; drawn on the grid of units from the first U values of noise.
            Scores of a unit are averaged.
        scores: (B, N), for "given" only.

    Raises:
        MaekitError: E-CONFIG-MASK, as `check_masking`; scores missing, of another shape or not asked for.
    """
    units, keep = _counts(kind, grid, mask_ratio, unit)
    wanted = tuple(noise.shape) if kind == "given" else None
    if wanted != (None if scores is None else tuple(scores.shape)):
        found = "none" if scores is None else f"shape {tuple(scores.shape)}"
        expected = f"(B, N) = {wanted}" if wanted else f"none with masks of kind {kind}"
        raise MaekitError("E-CONFIG-MASK", "argument scores", found=found, expected=expected)
    count = units[0] * units[1]
    drawn = noise[:, :count]
    if kind == "random":
        order = random_masking(drawn, keep).ids_shuffle
    else:
        order = _order(_values(kind, drawn, units, count - keep, scores), drawn)
    return Masking(_patches_of(order, units, unit), keep * unit**2)


def _values(kind: str, noise: Tensor, units: tuple[int, int], removed: int, scores: Tensor | None) -> Tensor:
    """Return what decides which units go (B, U), the highest first."""
    if scores is not None:
        high, wide = units
        side = math.isqrt(scores.shape[1] // (high * wide))
        return scores.reshape(-1, high, side, wide, side).mean((2, 4)).flatten(1)
    draw = {"block": mask_kinds.block, "grid": mask_kinds.regular, "centre": mask_kinds.centre}[kind]
    return draw(noise, units, removed)


def _order(values: Tensor, noise: Tensor) -> Tensor:
    """Return ids (B, U) from the lowest value to the highest, equal ones from the lowest noise to the highest."""
    by_noise = torch.argsort(noise, dim=1, stable=True)
    return by_noise.gather(1, torch.argsort(values.gather(1, by_noise), dim=1, stable=True))


def _patches_of(order: Tensor, units: tuple[int, int], unit: int) -> Tensor:
    """Replace each unit (B, U) by its patches (B, N)."""
    if unit == 1:
        return order
    columns = units[1] * unit
    first = order // units[1] * (unit * columns) + order % units[1] * unit
    inside = torch.arange(unit, device=order.device)
    return (first[:, :, None] + (inside[:, None] * columns + inside).flatten()).flatten(1)


def check_masking(kind: str, grid: tuple[int, int], mask_ratio: float, unit: int = 1) -> None:
    """Refuse what `draw_masking` could not draw.

    Raises:
        MaekitError: E-CONFIG-MASK for an unknown kind, a unit that does not divide both sides of the grid, a ratio that
            keeps none or all, and one that no regular pattern of this grid has.
    """
    _counts(kind, grid, mask_ratio, unit)


def _counts(kind: str, grid: tuple[int, int], mask_ratio: float, unit: int) -> tuple[tuple[int, int], int]:
    """Return the grid of units and how many units stay."""
    if kind not in KINDS:
        raise MaekitError("E-CONFIG-MASK", "setting mask_kind", found=kind, expected=", ".join(KINDS))
    sides = [side for side in mask_kinds.divisors(grid) if grid != (side, side)]
    if unit not in sides:
        raise MaekitError(
            "E-CONFIG-MASK",
            "setting mask_unit",
            found=f"{unit} on {grid[0]} x {grid[1]} patches",
            expected="a divisor of both sides that leaves more than one unit",
            hint="--mask-unit " + " or ".join(map(str, sides)),
        )
    units = (grid[0] // unit, grid[1] // unit)
    keep = len_keep(units[0] * units[1], mask_ratio)
    if kind == "grid" and units[0] * units[1] - keep not in mask_kinds.patterns(units):
        ratios = grid_ratios(units)
        raise MaekitError(
            "E-CONFIG-MASK",
            "setting mask_ratio of mask_kind grid",
            found=f"{mask_ratio:g} of {units[0]} x {units[1]} {'patches' if unit == 1 else 'units'}",
            expected="a ratio that a regular pattern has: " + (", ".join(map(str, ratios)) or "this grid has none"),
            hint=f"--mask-ratio {min(ratios, key=lambda ratio: abs(ratio - mask_ratio))}"
            if ratios
            else "another mask_kind",
        )
    return units, keep


def grid_ratios(grid: tuple[int, int]) -> list[float]:
    """Return the ratios of regular patterns on a grid, each in the fewest digits that give its count."""
    count = grid[0] * grid[1]
    ratios = []
    for removed in mask_kinds.patterns(grid):
        exact = removed / count
        near = (move(exact * 10**digits) / 10**digits for digits in range(2, 12) for move in (round, math.floor))
        ratios.append(next(r for r in near if 0 < r < 1 and int(count * (1 - r) + 1e-6) == count - removed))
    return ratios


def ratio_of_step(low: float, high: float, seed: int, step: int) -> float:
    """Return the mask ratio of one global batch: uniform from `low` to `high`, a function of (seed, step) alone."""
    return low + (high - low) * (mix(seed, step, -1) >> 11) / 2**53  # -1: no sample of any epoch has this seed
