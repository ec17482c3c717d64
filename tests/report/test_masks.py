"""The picture of mask kinds shows, pixel by pixel, the masks that training would draw."""

import numpy as np
import pytest
import torch

from maekit.errors import MaekitError
from maekit.model.masking import draw_masking
from maekit.report.grids import GAP, MARGIN
from maekit.report.masks import EXAMPLES, mask_figure
from maekit.report.reconstruction import mask_noise

GRID, PATCH, SIDE = (8, 8), 4, 128
IMAGES = torch.full((2, 3, 32, 32), 255, dtype=torch.uint8)
"""White, so that a patch is either white or the grey of removed ones; shown four times as large."""


def test_every_cell_shows_its_mask() -> None:
    pixels = np.asarray(mask_figure(IMAGES, GRID, seed=3))
    # white pictures on white: grey pixels of the first row begin under the headers
    noise = mask_noise(3, 2, 64)
    bottom = pixels.shape[0]
    for column, (kind, ratio, unit) in enumerate(EXAMPLES, 1):
        masks = draw_masking(kind, noise, GRID, ratio, unit).mask.view(2, *GRID).numpy()
        left = MARGIN + column * (SIDE + GAP)
        wanted = np.ones((2 * SIDE + GAP, SIDE), dtype=bool)
        for row in range(2):
            wanted[row * (SIDE + GAP) :][:SIDE] = ~masks[row].repeat(16, 0).repeat(16, 1)
        strip = pixels[:, left : left + SIDE]
        white = (strip == 255).all(2)
        found = [top for top in range(bottom - len(wanted)) if np.array_equal(white[top : top + len(wanted)], wanted)]
        assert len(found) == 1, (kind, ratio, unit)
        assert (strip[found[0] : found[0] + len(wanted)][~wanted] == 128).all()


def test_what_a_grid_cannot_have_is_left_out_and_named() -> None:
    whole = mask_figure(torch.zeros(1, 1, 28, 28), (7, 7))
    fewer = mask_figure(torch.zeros(1, 1, 28, 28), (7, 7), examples=EXAMPLES[:2])
    # 7 x 7 has neither chessboard nor 2 x 2: the original and five kinds remain
    assert whole.width == 2 * MARGIN + 6 * (112 + GAP) - GAP
    assert whole.height > fewer.height
    with pytest.raises(MaekitError, match="regular pattern"):
        mask_figure(torch.zeros(1, 1, 28, 28), (7, 7), examples=[("grid", 0.75, 1)])


def test_the_seed_alone_chooses_the_masks() -> None:
    images = torch.rand(3, 5, 16, 24, generator=torch.Generator().manual_seed(0))
    one, other = (mask_figure(images[:1], (4, 6), seed) for seed in (1, 1))
    assert one.tobytes() == other.tobytes()
    assert one.tobytes() != mask_figure(images[:1], (4, 6), 2).tobytes()
