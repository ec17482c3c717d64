"""Masked, predicted and original images of one model, as numbers (`reconstruct_images`) and as pictures.

The mask of an image comes from (seed, place of the image) alone, and every ratio ranks the same noise: what is removed
at 75 % is also removed at 85 %, so the columns of a figure differ in how much is missing and in nothing else.

A model of normalised patches is shown in the three ways of `views`; the one that scores count is the honest one, which
never reads a removed pixel.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from maekit.errors import MaekitError
from maekit.model.mae import MaskedAutoencoder
from maekit.model.masking import len_keep
from maekit.model.patches import patchify, unpatchify
from maekit.report import views
from maekit.report.grids import MAX_SIDE, reconstruction_grid, shown_channels
from maekit.seeds import mix

CHUNK_PIXELS = 16 * 224 * 224
"""Pixels that go through the model at once."""
LEAK = "uses the true patch mean/variance: leaks"

UNTRAINED = "Removed patches are grey. Where a patch was visible, the prediction carries no loss and is untrained."
HONEST = (
    "Prediction: this model predicts patches normalised by their own mean and deviation. Both are guessed here from "
    "the visible patches, each weighted by 1 / distance³; no removed pixel is read."
)
RAW = (
    "Raw: what the model says, nothing added; 0 is mid grey, "
    f"{views.RAW_SPAN / 2:g} deviations below is black, above is white."
)
LEAKING = (
    "Red: the removed patch's own mean and variance are put back. They belong to the answer, so this looks too good."
)


@dataclass(frozen=True)
class Reconstruction:
    """One mask ratio; pictures (B, C, H, W) on the CPU, values 0..1 of the window from black to white.

    Attributes:
        ratio: share of patches removed.
        pasted: the prediction where patches were removed, the image elsewhere; for models of normalised patches
            with the visible neighbours' statistics, likewise `prediction`.
        raw: normalised values around mid grey; None for models of plain pixels.
        leaking: pasted with the true statistics; None for models of plain pixels.
        loss: mean of the training loss.
        mse: mean squared error of `pasted` over removed pixels.
        psnr: of that, in dB.
        psnr_fill: psnr of a fill with the visible neighbours' mean colour: the baseline without a model.
    """

    ratio: float
    original: Tensor
    masked: Tensor
    pasted: Tensor
    prediction: Tensor
    raw: Tensor | None
    leaking: Tensor | None
    loss: float
    mse: float
    psnr: float
    psnr_fill: float


def check_ratios(ratios: Sequence[float], num_patches: int) -> list[float]:
    """Return mask ratios given in per cent as shares, each once.

    Raises:
        MaekitError: E-CONFIG-MASK for one that keeps none or all of the patches, or looks like a share.
    """
    if not ratios:
        raise MaekitError(
            "E-CONFIG-MASK", "setting ratios", found="none", expected="per cents", hint="--ratios 75 85 95"
        )
    for ratio in ratios:
        if not 1 <= ratio < 100:
            raise MaekitError(
                "E-CONFIG-MASK",
                "setting ratios",
                found=f"{ratio:g}",
                expected="per cents between 1 and 100",
                hint="--ratios 75 85 95",
            )
        try:
            len_keep(num_patches, ratio / 100)
        except MaekitError as error:
            raise MaekitError(
                "E-CONFIG-MASK",
                "setting ratios",
                found=f"{ratio:g} per cent of {num_patches} patches, which keeps none or all",
                expected=f"between {100 / num_patches:.3g} and {100 - 100 / num_patches:.3g}",
            ) from error
    return [ratio / 100 for ratio in dict.fromkeys(ratios)]


def possible_ratios(ratios: Sequence[float], num_patches: int) -> list[float]:
    """Return those of some per cents that keep at least one patch and remove one, as shares."""
    possible = []
    for ratio in ratios:
        try:
            possible += check_ratios([ratio], num_patches)
        except MaekitError:
            continue
    return list(dict.fromkeys(possible))


def mask_noise(seed: int, count: int, num_patches: int) -> Tensor:
    """Return (count, N) noise; row i depends on (seed, i) only."""
    generators = (torch.Generator().manual_seed(mix(seed, i) >> 1) for i in range(count))
    return torch.stack([torch.rand(num_patches, generator=generator) for generator in generators])


@torch.no_grad()
def reconstruct_images(
    model: MaskedAutoencoder, images: Tensor, ratio: float, seed: int = 0, *, noise: Tensor | None = None
) -> Reconstruction:
    """Mask, predict and compare.

    Args:
        model: on any device; its training mode is left as found.
        images: (B, C, H, W) of the model's size, uint8, or float as read (not normalised).
        ratio: share of patches removed.
        seed: chooses the masks.
        noise: (B, N) that the masks are drawn from, in place of `seed`.

    Raises:
        MaekitError: E-CONFIG-MASK, E-CONFIG-SIZE.
    """
    len_keep(model.num_patches, ratio)
    scaled = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    noise = mask_noise(seed, len(scaled), model.num_patches) if noise is None else noise
    low, high = _window(scaled)
    was_training = model.training
    model.eval()
    try:
        parts = [_views(model, x, n, ratio, low, high) for x, n in _chunks(scaled, noise)]
    finally:
        model.train(was_training)
    pictures = {
        name: torch.cat([part[name].clamp(0, 1) for part in parts]) for name in parts[0] if not name.startswith("_")
    }
    sizes = torch.tensor([float(len(part["original"])) for part in parts], dtype=torch.float64)
    loss, mse, fill = (
        float((torch.stack([part[name].double() for part in parts]) * sizes).sum() / sizes.sum())
        for name in ("_loss", "_mse", "_fill")
    )
    return Reconstruction(
        ratio, pictures["original"], pictures["masked"], pictures["pasted"], pictures["prediction"],
        pictures.get("raw"), pictures.get("leaking"), loss, mse, views.psnr(mse), views.psnr(fill),
    )  # fmt: skip


def _window(images: Tensor) -> tuple[float, float]:
    """Return the values shown black and white: 0 and 1, or the images' own range where they exceed it."""
    low, high = float(images.min()), float(images.max())
    return (0.0, 1.0) if low >= 0 and high <= 1 else (low, max(high, low + 1e-6))


def _chunks(images: Tensor, noise: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, CHUNK_PIXELS // (images.shape[-1] * images.shape[-2]))
    return zip(images.split(size), noise.split(size), strict=True)


def _views(
    model: MaskedAutoencoder, images: Tensor, noise: Tensor, ratio: float, low: float, high: float
) -> dict[str, Tensor]:
    """Return every view of one chunk, and the numbers under names that begin with an underscore."""
    device = next(model.parameters()).device
    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (model.mean, model.std))
    inputs = (images.to(device) - mean) / std
    out = model(inputs, ratio, noise=noise.to(device))
    mask, pred = out.mask.cpu(), out.pred.float().cpu()
    normalised = patchify(inputs.cpu(), model.patch)

    def pixels(patches: Tensor) -> Tensor:
        return (views.to_pixels(patches, model.mean, model.std) - low) / (high - low)

    truth = patchify((images - low) / (high - low), model.patch)
    more: dict[str, Tensor] = {}
    if model.target == "norm_pixel":
        honest = pixels(views.denormalise(pred, views.neighbour_statistics(normalised, mask, model.grid)))
        more["raw"] = views.raw(pred)
        more["leaking"] = views.paste(pixels(views.denormalise(pred, views.patch_statistics(normalised))), truth, mask)
    else:
        honest = pixels(pred)
    fill = views.neighbour_fill(truth, mask, model.grid, len(model.mean))
    shown = {
        "original": truth,
        "masked": views.hide(truth, mask),
        "pasted": views.paste(honest, truth, mask),
        "prediction": honest,
        **more,
    }
    pictures = {name: unpatchify(patches, model.patch, model.grid) for name, patches in shown.items()}
    mse = views.masked_mse(honest.clamp(0, 1), truth, mask)
    return pictures | {"_loss": out.loss.cpu(), "_mse": mse, "_fill": views.masked_mse(fill, truth, mask)}


def ratio_figure(
    shown: Reconstruction, names: Sequence[str] | None = None, max_side: int = MAX_SIDE, notes: bool = True
) -> Image.Image:
    """Return every view at one ratio, one row per image; `notes`: say underneath what is to be seen."""
    normalised = shown.raw is not None and shown.leaking is not None
    guess = " (neighbours' statistics)" if normalised else ""
    columns: list[tuple[str, Tensor]] = [
        ("original", shown.original),
        ("masked", shown.masked),
        ("prediction in place" + guess, shown.pasted),
        ("prediction" + guess, shown.prediction),
    ]
    if shown.raw is not None and shown.leaking is not None:
        columns += [("raw prediction (normalised)", shown.raw), (f"in place, {LEAK}", shown.leaking)]
    return reconstruction_grid(
        [[images[i] for _, images in columns] for i in range(len(shown.original))],
        [header for header, _ in columns],
        names,
        groups=[("", 1), (f"{percent(shown.ratio)} removed", 3), *([("two other views", 2)] if normalised else [])],
        warn=[5] if normalised else [],
        notes=ratio_notes(shown) if notes else (),
        max_side=max_side,
    )


def combined_figure(
    shown: Sequence[Reconstruction], names: Sequence[str] | None = None, max_side: int = MAX_SIDE, notes: bool = True
) -> Image.Image:
    """Return original and, for each ratio, masked, prediction in place and prediction: honest views only."""
    views_ = [(one.masked, one.pasted, one.prediction) for one in shown]
    return reconstruction_grid(
        [
            [shown[0].original[i], *(images[i] for three in views_ for images in three)]
            for i in range(len(shown[0].original))
        ],
        ["original", *["masked", "prediction in place", "prediction"] * len(shown)],
        names,
        groups=[("", 1), *((f"{percent(one.ratio)} removed", 3) for one in shown)],
        notes=combined_notes(shown) if notes else (),
        max_side=max_side,
    )


def reconstruction_figure(
    model: MaskedAutoencoder,
    images: Tensor,
    ratios: Sequence[float] | float = 0.75,
    seed: int = 0,
    names: Sequence[str] | None = None,
    max_side: int = MAX_SIDE,
    notes: bool = True,
) -> Image.Image:
    """Reconstruct images (B, C, H, W), uint8 or float 0..1, and draw `combined_figure`; `ratios` are shares."""
    wanted = [ratios] if isinstance(ratios, int | float) else list(ratios)
    return combined_figure([reconstruct_images(model, images, ratio, seed) for ratio in wanted], names, max_side, notes)


def percent(ratio: float) -> str:
    """Return a share as people read it: 75 %."""
    return f"{100 * ratio:.4g} %"


def ratio_notes(shown: Reconstruction) -> list[str]:
    """Say what `ratio_figure` shows."""
    return combined_notes([shown]) + ([RAW, LEAKING] if shown.raw is not None else [])


def combined_notes(shown: Sequence[Reconstruction]) -> list[str]:
    """Say what `combined_figure` shows."""
    channels = shown_channels(shown[0].original.shape[1])
    return [*([channels] if channels else []), UNTRAINED, *([HONEST] if shown[0].raw is not None else [])]
