"""What the encoder tells patches apart by: the first three principal components of its tokens as red, green and blue.

One analysis over all patches of all images shown, so that a colour means the same in every image of a column; columns
(blocks) are analysed apart. No foreground is cut out.

B batch, N patches, D width.
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from maekit.model.mae import MaskedAutoencoder
from maekit.report.gallery import SHOWN_SIDE, Part, blocks_of, shown
from maekit.report.grids import reconstruction_grid
from maekit.report.page import Table

CUT = 0.01
"""Share of values at either end of a component that are drawn darkest and brightest: outliers take no contrast."""


def pca_colours(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens (B, N, D) as colours (B, N, 3), 0..1, and the share of variance of each component (3,).

    The sign of a component is free; its loading of largest size is made positive, so equal tokens give equal colours.
    With fewer than three components the rest is mid grey.
    """
    rows = tokens.flatten(0, 1).double()
    rows = rows - rows.mean(0)
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    vectors = vectors[:3]
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    projected = rows @ (vectors * largest.sign()).T
    low, high = projected.quantile(CUT, 0), projected.quantile(1 - CUT, 0)
    flat = high - low < 1e-9 * values[0].clamp(min=1e-12)
    colours = torch.where(flat, 0.5, (projected - low) / torch.where(flat, 1.0, high - low)).clamp(0, 1)
    share = values.square()[:3] / values.square().sum().clamp(min=1e-300)
    missing = 3 - len(vectors)
    colours = torch.nn.functional.pad(colours, (0, missing), value=0.5)
    return colours.unflatten(0, tokens.shape[:2]).float(), torch.nn.functional.pad(share, (0, missing)).float()


@torch.no_grad()
def features_part(
    model: MaskedAutoencoder,
    images: Tensor,
    inputs: Tensor,
    blocks: Sequence[int],
    names: Sequence[str],
    prefix: str = "",
) -> Part:
    """Draw the components of chosen blocks.

    Args:
        model: in eval mode.
        images: (B, C, H, W), 0..1.
        inputs: the same, normalised, on the model's device.
        blocks: counted from 1.
        names: of the images.
        prefix: of the file's name.
    """
    layers = model.layer_features(inputs, [(block, "tokens") for block in blocks])
    tokens = {
        block: each[:, model.encoder.num_prefix_tokens :].float().cpu()
        for block, each in zip(blocks, layers, strict=True)
    }
    found = {block: pca_colours(each) for block, each in tokens.items()}
    told = "The first three principal components of the patch tokens after each block, as red, green and blue."
    pictures = {f"{prefix}features.png": (_figure(model, images, found, names), told)}
    if len(images) > 1:
        rest = {block: pca_colours(without_place(each)) for block, each in tokens.items()}
        told = (
            "The same after the mean token of each place over these images was taken away: what differs among them. "
            "Where colours above are the same gradient in every image, the strongest components are of place."
        )
        pictures[f"{prefix}features-without-place.png"] = (_figure(model, images, rest, names), told)
    rows = [
        [block, *(f"{100 * each:.1f} %" for each in share.tolist()), f"{100 * share.sum():.1f} %"]
        for block, (_, share) in found.items()
    ]
    note = (
        "Share of the variance of all tokens that each component of the first picture holds. One analysis for all "
        f"images of a block; colours reach from the lowest to the highest {100 * CUT:g} % of the patches."
    )
    table = Table(["block", "red", "green", "blue", "together"], rows, note=note)
    text = ["Patches of like colour are alike to the encoder. Nothing is removed."]
    return Part("Features", text=text, pictures=pictures, tables=[table])


def without_place(tokens: Tensor) -> Tensor:
    """Take the mean over images of each place away from tokens (B, N, D)."""
    return tokens - tokens.mean(0)


def _figure(
    model: MaskedAutoencoder, images: Tensor, found: dict[int, tuple[Tensor, Tensor]], names: Sequence[str]
) -> Image.Image:
    drawn = [blocks_of(colours, model.grid, model.patch) for colours, _ in found.values()]
    return reconstruction_grid(
        [[shown(images[i]), *(each[i] for each in drawn)] for i in range(len(images))],
        ["image", *(f"block {block}" for block in found)], names, max_side=SHOWN_SIDE if len(drawn) < 7 else 112,
    )  # fmt: skip
