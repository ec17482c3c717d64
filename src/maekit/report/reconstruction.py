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
from maekit.model.masking import check_masking, len_keep
from maekit.model.patches import patchify, unpatchify
from maekit.model.variant import PAPER, Variant
from maekit.report import views
from maekit.report.grids import MAX_SIDE, reconstruction_grid, shown_channels
from maekit.seeds import mix

CHUNK_PIXELS = 16 * 224 * 224
"""Pixels that go through the model at once."""
LEAK = "uses the true patch mean/variance: leaks"

UNTRAINED = "Removed patches are grey. Where a patch was visible, the prediction carries no loss and is untrained."
TRAINED = {
    "all": "Removed patches are grey. The prediction was trained on visible patches, too.",
    "visible": "Removed patches are grey. The prediction was trained on visible patches only.",
}
NOISY = "Nothing is removed: the model sees the image under noise, and predicts it without. Scores are over all pixels."
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
        psnr_fill: psnr of a fill with the visible neighbours' mean colour: the baseline without a model; where nothing
            is removed, of the noisy image itself.
        variant: of the model.
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
    variant: Variant = PAPER


def check_ratios(ratios: Sequence[float], model: MaskedAutoencoder) -> list[float]:
    """Return mask ratios given in per cent as shares, each once; 0 alone for a model that has nothing removed.

    Raises:
        MaekitError: E-CONFIG-MASK for one that keeps none or all of the patches, that the model's kind of mask cannot
            have, or that looks like a share.
    """
    num_patches = model.num_patches
    if model.variant.mask_kind == "none":
        return [0.0]
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
            check_ratio(model, ratio / 100)
        except MaekitError as error:
            if model.variant != PAPER:
                raise
            raise MaekitError(
                "E-CONFIG-MASK",
                "setting ratios",
                found=f"{ratio:g} per cent of {num_patches} patches, which keeps none or all",
                expected=f"between {100 / num_patches:.3g} and {100 - 100 / num_patches:.3g}",
            ) from error
    return [ratio / 100 for ratio in dict.fromkeys(ratios)]


def check_ratio(model: MaskedAutoencoder, ratio: float) -> None:
    """Refuse a share that the model's kind of mask cannot remove, or not enough for what it decodes.

    Raises:
        MaekitError: E-CONFIG-MASK, E-CONFIG-DECODER.
    """
    if model.variant.mask_kind != "none":
        check_masking(model.variant.mask_kind, model.grid, ratio, model.variant.mask_unit)
        model.check_decode_ratio(ratio)


def possible_ratios(ratios: Sequence[float], model: MaskedAutoencoder) -> list[float]:
    """Return those of some per cents that keep at least one patch and remove one, as shares."""
    possible = []
    for ratio in ratios:
        try:
            possible += check_ratios([ratio], model)
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
        MaekitError: E-CONFIG-MASK, E-CONFIG-SIZE; E-CONFIG-TARGET for a model whose predictions are no pixels.
    """
    if not shows_pixels(model):
        raise MaekitError(
            "E-CONFIG-TARGET", f"a model of target {model.target}", found="predictions that are no pixels",
            expected="pixels to show", hint="maekit gallery RUN --only features,attention shows what it learned",
        )  # fmt: skip
    check_ratio(model, ratio)
    scaled = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    noise = mask_noise(seed, len(scaled), model.num_patches) if noise is None else noise
    low, high = window(scaled)
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
        pictures.get("raw"), pictures.get("leaking"), loss, mse, views.psnr(mse), views.psnr(fill), model.variant,
    )  # fmt: skip


def shows_pixels(model: MaskedAutoencoder) -> bool:
    """Return whether the model's predictions can be shown as pixels."""
    device = next(model.parameters()).device
    return model.objective.to_patches(torch.zeros(1, 1, model.objective.num_values, device=device)) is not None


def window(images: Tensor) -> tuple[float, float]:
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
    seen = seen_by(model, inputs, noise)
    out = model(inputs, ratio, noise=noise.to(device), seen=seen)
    mask, pred = out.mask.cpu(), model.objective.to_patches(out.pred.float())
    assert pred is not None, model.target
    pred, whole = pred.cpu(), model.variant.mask_kind == "none"
    normalised = patchify(seen.cpu() if whole else inputs.cpu(), model.patch)

    def pixels(patches: Tensor) -> Tensor:
        return (views.to_pixels(patches, model.mean, model.std) - low) / (high - low)

    truth = patchify((images - low) / (high - low), model.patch)
    noisy = pixels(patchify(seen.cpu(), model.patch)) if model.variant.add_noise else truth
    more: dict[str, Tensor] = {}
    if model.target == "norm_pixel":
        honest = pixels(views.denormalise(pred, views.neighbour_statistics(normalised, mask, model.grid)))
        more["raw"] = views.raw(pred)
        more["leaking"] = views.paste(pixels(views.denormalise(pred, views.patch_statistics(normalised))), truth, mask)
    else:
        honest = pixels(pred)
    fill = noisy if whole else views.neighbour_fill(truth, mask, model.grid, len(model.mean))
    mask = torch.ones_like(mask) if whole else mask
    shown = {
        "original": truth,
        "masked": noisy if whole else views.hide(noisy, mask),
        "pasted": views.paste(honest, truth, mask),
        "prediction": honest,
        **more,
    }
    pictures = {name: unpatchify(patches, model.patch, model.grid) for name, patches in shown.items()}
    mse = views.masked_mse(honest.clamp(0, 1), truth, mask)
    return pictures | {"_loss": out.loss.cpu(), "_mse": mse, "_fill": views.masked_mse(fill, truth, mask)}


def seen_by(model: MaskedAutoencoder, inputs: Tensor, noise: Tensor) -> Tensor:
    """Return what the encoder sees of normalised images (B, C, H, W): with noise on them where the model is so.

    That is drawn anew for each image from its mask's noise (B, N): the same in every picture of it.
    """
    return torch.cat([model.corrupt(x, _drawn_as(n)) for x, n in zip(inputs.split(1), noise, strict=True)])


def _drawn_as(noise: Tensor) -> torch.Generator:
    """Return a generator that depends on the noise (N,) of an image's mask alone, as that does on place and seed."""
    return torch.Generator().manual_seed(int(noise.double().sum() * 2**32))


def ratio_figure(
    shown: Reconstruction, names: Sequence[str] | None = None, max_side: int = MAX_SIDE, notes: bool = True
) -> Image.Image:
    """Return every view at one ratio, one row per image; `notes`: say underneath what is to be seen."""
    normalised = shown.raw is not None and shown.leaking is not None
    guess = " (neighbours' statistics)" if normalised else ""
    columns: list[tuple[str, Tensor]] = [
        ("original", shown.original),
        (_seen(shown), shown.masked),
        ("prediction in place" + guess, shown.pasted),
        ("prediction" + guess, shown.prediction),
    ]
    if shown.raw is not None and shown.leaking is not None:
        columns += [("raw prediction (normalised)", shown.raw), (f"in place, {LEAK}", shown.leaking)]
    return reconstruction_grid(
        [[images[i] for _, images in columns] for i in range(len(shown.original))],
        [header for header, _ in columns],
        names,
        groups=[("", 1), (removed(shown), 3), *([("two other views", 2)] if normalised else [])],
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
        ["original", *[_seen(shown[0]), "prediction in place", "prediction"] * len(shown)],
        names,
        groups=[("", 1), *((removed(one), 3) for one in shown)],
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
    variant = shown[0].variant
    if variant.mask_kind == "none":
        return [*([channels] if channels else []), NOISY]
    trained = TRAINED.get(variant.loss_on, UNTRAINED)
    return [*([channels] if channels else []), trained, *([HONEST] if shown[0].raw is not None else [])]


def _seen(shown: Reconstruction) -> str:
    return "with noise" if shown.variant.mask_kind == "none" else "masked"


def removed(shown: Reconstruction) -> str:
    """Return how much of the images is gone: 75 % removed, or noise."""
    if shown.variant.mask_kind == "none":
        return f"noise of {shown.variant.add_noise:g} deviations"
    return f"{percent(shown.ratio)} removed"
