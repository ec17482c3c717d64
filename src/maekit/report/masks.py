"""What the kinds of masks look like: one row an image, one column a kind, each with its count.

Every column draws from the same noise of the image, as training would. A kind that a grid cannot have (`grid` at 75 %
on 7 x 7 patches, units that do not divide it) is left out and named underneath.
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from maekit.errors import MaekitError
from maekit.model.masking import Masking, draw_masking
from maekit.model.patches import patchify, unpatchify
from maekit.report import views
from maekit.report.grids import MAX_SIDE, reconstruction_grid, shown_channels
from maekit.report.reconstruction import mask_noise, percent

EXAMPLES: tuple[tuple[str, float, int], ...] = (
    ("random", 0.75, 1),
    ("block", 0.5, 1),
    ("block", 0.75, 1),
    ("grid", 0.75, 1),
    ("grid", 0.5, 1),
    ("centre", 0.25, 1),
    ("random", 0.75, 2),
    ("block", 0.75, 2),
    ("random", 0.9, 1),
)
"""Kind, ratio and unit of each column: paper Fig. 6 is random 75, block 50 and grid 75."""


def mask_figure(
    images: Tensor,
    grid: tuple[int, int],
    seed: int = 0,
    names: Sequence[str] | None = None,
    examples: Sequence[tuple[str, float, int]] = EXAMPLES,
    max_side: int = MAX_SIDE,
) -> Image.Image:
    """Draw each kind of mask over each image; removed patches are grey.

    Args:
        images: (B, C, H, W), uint8 or float 0..1, whose sides the grid divides into square patches.
        grid: rows and columns of patches.
        seed: chooses the masks; those of image i depend on (seed, i) alone.
        names: a label for each row.
        examples: kind, ratio and unit of each column.
        max_side: longest side of a shown picture.

    Raises:
        MaekitError: E-CONFIG-MASK if the grid can have none of them.
    """
    scaled = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    patch = images.shape[2] // grid[0]
    assert (grid[0] * patch, grid[1] * patch) == tuple(images.shape[2:]), "whole square patches"
    noise = mask_noise(seed, len(images), grid[0] * grid[1])
    drawn, left_out = _drawn(noise, grid, examples)
    patches = patchify(scaled, patch)
    columns = [unpatchify(views.hide(patches, masking.mask), patch, grid) for _, masking in drawn]
    count = grid[0] * grid[1]
    headers = [f"{name}: {count - masking.num_keep} of {count}" for name, masking in drawn]
    notes = [f"Not on {grid[0]} x {grid[1]} patches: {', '.join(left_out)}."] if left_out else []
    channels = shown_channels(images.shape[1])
    return reconstruction_grid(
        [[scaled[i], *(column[i] for column in columns)] for i in range(len(images))],
        ["original", *headers],
        names,
        notes=[*([channels] if channels else []), "Removed patches are grey.", *notes],
        max_side=max_side,
    )


def _drawn(
    noise: Tensor, grid: tuple[int, int], examples: Sequence[tuple[str, float, int]]
) -> tuple[list[tuple[str, Masking]], list[str]]:
    """Return the masks that this grid can have, with their names, and the names of the others."""
    drawn, left_out, refusal = [], [], None
    for kind, ratio, unit in examples:
        name = f"{kind} {percent(ratio)}" + (f" in {unit} x {unit}" if unit > 1 else "")
        try:
            drawn.append((name, draw_masking(kind, noise, grid, ratio, unit)))
        except MaekitError as error:
            left_out.append(name)
            refusal = error
    if not drawn and refusal is not None:
        raise refusal
    return drawn, left_out
