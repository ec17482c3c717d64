"""Where a model is most wrong, and what those patches have in common.

The error of a removed patch is what training minimises (the loss of that patch). Its properties are measured on the
true patch and on the mask, in ranks: neither a skewed error nor the unit of a property plays a part.

B batch, M removed patches, N patches, P patch side, C channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from maekit.model.mae import MaskedAutoencoder
from maekit.model.patches import patchify, unpatchify
from maekit.report.gallery import SHOWN_SIDE, Part, framed, heat, shown
from maekit.report.grids import captioned_grid, reconstruction_grid
from maekit.report.page import Cell, Table
from maekit.report.reconstruction import mask_noise, percent, reconstruct_images, seen_by, shows_pixels
from maekit.report.views import hide
from maekit.scores.targets import ranks

FINE = 0.25
"""Cycles per pixel from which a frequency is called high: half of the highest that pixels can hold."""
CONTEXT = 1
"""Patches around a worst patch that are shown with it, on each side."""
STRIP_SIDE = 110
"""Pixels to which a worst patch and its neighbours are enlarged, by a whole factor."""
PER_IMAGE = 2
"""Worst patches taken of one image, lest one picture fill the page."""


@dataclass(frozen=True)
class Errors:
    """Losses of many images.

    Attributes:
        loss: (B, N), NaN where nothing was asked of the model.
        mask: (B, N), True = removed.
        properties: name -> (B, N) of every patch.
        ratio: share of patches removed.
        asked: (B, N), the removed patches; all where none are, the visible ones of a model that learned those only.
    """

    loss: Tensor
    mask: Tensor
    properties: dict[str, Tensor]
    ratio: float
    asked: Tensor

    @property
    def of_image(self) -> Tensor:
        """Mean loss of each image (B,)."""
        return self.loss.nanmean(1)

    def worst_images(self, count: int) -> list[int]:
        """Return the images of largest mean loss, the worst first."""
        return torch.argsort(self.of_image, descending=True, stable=True)[:count].tolist()

    def worst_patches(self, count: int, per_image: int = PER_IMAGE) -> list[tuple[int, int]]:
        """Return (image, patch) of the largest losses, the worst first, at most `per_image` of one image."""
        order = torch.argsort(self.loss.nan_to_num(-1.0).flatten(), descending=True, stable=True)
        found: list[tuple[int, int]] = []
        for at in order[: int(self.asked.sum())].tolist():
            image, patch = divmod(at, self.loss.shape[1])
            if sum(image == other for other, _ in found) < per_image:
                found.append((image, patch))
            if len(found) == count:
                break
        return found


@torch.no_grad()
def find_errors(model: MaskedAutoencoder, images: Tensor, ratio: float, seed: int = 0, batch: int = 16) -> Errors:
    """Mask, predict and keep the loss of each patch asked for.

    Args:
        model: in eval mode, on any device.
        images: (B, C, H, W), 0..1.
        ratio: share of patches removed.
        seed: chooses the masks: those of `reconstruct_images`.
        batch: images at once.

    Raises:
        MaekitError: E-CONFIG-MASK.
    """
    device = next(model.parameters()).device
    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (model.mean, model.std))
    noise = mask_noise(seed, len(images), model.num_patches)
    losses, masks = [], []
    for part, its_noise in zip(images.split(batch), noise.split(batch), strict=True):
        inputs = (part.to(device) - mean) / std
        out = model(inputs, ratio, noise=its_noise.to(device), seen=seen_by(model, inputs, its_noise))
        everywhere = torch.arange(model.num_patches, device=device).expand(len(part), -1)
        target = model.objective(inputs, patchify(inputs, model.patch), everywhere)
        losses.append(model.objective.loss(out.pred, target).float().cpu())
        masks.append(out.mask.cpu())
    mask = torch.cat(masks)
    asked = {"none": torch.ones_like(mask), "visible": ~mask}.get(_asked(model), mask)
    loss = torch.cat(losses).masked_fill(~asked, torch.nan)
    return Errors(loss, mask, properties(images, mask, model.grid, model.patch), ratio, asked)


def _asked(model: MaskedAutoencoder) -> str:
    return "none" if model.variant.mask_kind == "none" else model.variant.loss_on


def properties(images: Tensor, mask: Tensor, grid: tuple[int, int], patch: int) -> dict[str, Tensor]:
    """Return what may make a patch hard to guess, by name, (B, N) each.

    Args:
        images: (B, C, H, W), 0..1.
        mask: (B, N), True = removed.
        grid: rows and columns of patches.
        patch: side in pixels.
    """
    patches = patchify(images, patch)
    fine, share = _frequencies(images.mean(1, keepdim=True), patch)
    return {
        "high-frequency energy": fine,
        "share of high frequencies": share,
        "contrast (deviation)": patches.std(-1, unbiased=False),
        "brightness": patches.mean(-1),
        "distance from the border": _border(grid).expand(len(images), -1),
        "visible neighbours": visible_neighbours(mask, grid),
    }


def _frequencies(grey: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Return energy above `FINE` cycles per pixel, a mean square per pixel, and its share of all but the mean."""
    squares = patchify(grey, patch).unflatten(-1, (patch, patch))
    power = torch.fft.fft2(squares, norm="ortho").abs().square() / patch**2
    rate = torch.fft.fftfreq(patch).abs()
    radius = (rate[:, None].square() + rate[None].square()).sqrt()
    fine = (power * (radius >= FINE)).sum((-2, -1))
    varying = (power * (radius > 0)).sum((-2, -1))
    return fine, torch.where(varying > 1e-10, fine / varying.clamp(min=1e-10), 0.0)


def _border(grid: tuple[int, int]) -> Tensor:
    """Return how many patches lie between each patch and the nearest border (1, N)."""
    rows, columns = (torch.minimum(torch.arange(n), n - 1 - torch.arange(n)) for n in grid)
    return torch.minimum(rows[:, None], columns[None]).reshape(1, -1).float()


def visible_neighbours(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return how many of the eight patches around each one were visible (B, N)."""
    seen = (~mask).float().unflatten(1, grid)[:, None]
    around = torch.ones(1, 1, 3, 3)
    around[..., 1, 1] = 0
    return F.conv2d(seen, around, padding=1).flatten(1)


def in_common(errors: Errors) -> Table:
    """Return the rank correlation of each property with the loss, and the loss of its lowest and highest quarter."""
    loss = errors.loss[errors.asked]
    rows: list[list[Cell]] = []
    for name, values in errors.properties.items():
        own = values[errors.asked]
        low, high = _quarters(own, loss)
        rows.append([name, f"{rank_correlation(own, loss):+.2f}", f"{low:.4f}", f"{high:.4f}"])
    return Table(
        ["of the patch", "rank correlation", "loss, lowest quarter", "loss, highest quarter"],
        rows,
        note=f"{len(loss):,} patches of {len(errors.mask):,} images, {percent(errors.ratio)} removed. Spearman's "
        "correlation with the loss of the patch. High: from a quarter of a cycle a pixel. A correlation is no "
        "cause: contrast, frequency and place go together in most pictures.",
    )


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Return Spearman's correlation of two (n,); 0 where one of them is constant."""
    first, second = ((each - each.mean()) for each in (ranks(one), ranks(other)))
    norm = (first.square().sum() * second.square().sum()).sqrt()
    return float((first * second).sum() / norm) if norm > 0 else 0.0


def _quarters(values: Tensor, loss: Tensor) -> tuple[float, float]:
    """Return the mean loss of the patches of lowest and of highest value; those as low as the quarter's last count."""
    ordered = values.sort().values
    low, high = ordered[(len(ordered) - 1) // 4], ordered[-1 - (len(ordered) - 1) // 4]
    return float(loss[values <= low].mean()), float(loss[values >= high].mean())


# ------------------------------------------------------------------------------------------------ the pictures


def failures_part(
    model: MaskedAutoencoder, images: Tensor, names: Sequence[str], errors: Errors, count: int, seed: int = 0,
    prefix: str = "",
) -> Part:  # fmt: skip
    """Draw the worst images and patches beside what was predicted.

    Args:
        model: whose errors they are.
        images: (B, C, H, W), 0..1, all that were looked through.
        names: of the images.
        errors: from `find_errors` with the same seed.
        count: images drawn; as many patches twice.
        seed: that of the masks.
        prefix: of the files' names.
    """
    worst, patches = errors.worst_images(count), errors.worst_patches(2 * count)
    wanted = sorted({*worst, *(image for image, _ in patches)})
    views = dict(zip(wanted, _views(model, images, wanted, errors, seed), strict=True))
    pictures = {
        f"{prefix}failures-images.png": (
            _images_figure(model, errors, worst, views, names),
            f"The {len(worst)} images of largest loss among {len(images):,}. Error: loss of each patch, one scale "
            "for all; grey: not asked for.",
        ),
        f"{prefix}failures-patches.png": (
            _patches_figure(model, errors, patches, views, names),
            f"The {len(patches)} patches of largest loss, at most {PER_IMAGE} of an image, framed among their "
            "neighbours.",
        ),
    }
    losses = errors.of_image
    text = [
        f"The loss of an image is {losses.median():.4f} in the median, {losses.min():.4f} to {losses.max():.4f} over "
        f"{len(images):,} images."
    ]
    return Part("Failures", text=text, pictures=pictures, tables=[in_common(errors)])


View = dict[str, Tensor]
"""original, masked and, of a model that predicts pixels, prediction in place: (C, H, W), 0..1."""


def _views(model: MaskedAutoencoder, images: Tensor, wanted: Sequence[int], errors: Errors, seed: int) -> list[View]:
    """Return the pictures of some of the images, with the mask that each has among all of them."""
    chosen = images[list(wanted)]
    if not shows_pixels(model):
        seen = hide(patchify(chosen, model.patch), errors.mask[list(wanted)])
        both = zip(chosen, unpatchify(seen, model.patch, model.grid), strict=True)
        return [{"original": one, "masked": two} for one, two in both]
    noise = mask_noise(seed, len(images), model.num_patches)[list(wanted)]
    found = reconstruct_images(model, chosen, errors.ratio, noise=noise)
    return [
        {"original": one, "masked": two, "prediction in place": three}
        for one, two, three in zip(found.original, found.masked, found.pasted, strict=True)
    ]


def _images_figure(
    model: MaskedAutoencoder, errors: Errors, worst: Sequence[int], views: Mapping[int, View], names: Sequence[str]
) -> Image.Image:
    maps = heat(errors.loss[worst], model.grid, model.patch, top=float(errors.loss[worst].nan_to_num().max()))
    rows = [[*map(shown, views[image].values()), maps[at]] for at, image in enumerate(worst)]
    labels = [f"{errors.of_image[image]:.3f} {names[image]}" for image in worst]
    return reconstruction_grid(rows, [*views[worst[0]], "error"], labels, max_side=SHOWN_SIDE)


def _patches_figure(
    model: MaskedAutoencoder,
    errors: Errors,
    patches: Sequence[tuple[int, int]],
    views: Mapping[int, View],
    names: Sequence[str],
) -> Image.Image:
    """Draw each patch among its neighbours: as it is, as the model saw it, as it was filled in."""
    strips, captions = [], []
    for image, patch in patches:
        place = divmod(patch, model.grid[1])
        strips.append(_strip([_around(shown(each), place, model) for each in views[image].values()]))
        captions.append(f"{errors.loss[image, patch]:.3f}, row {place[0]} column {place[1]} of {names[image]}")
    return captioned_grid(strips, captions, columns=3, max_side=336)


def _strip(pictures: Sequence[Tensor]) -> Tensor:
    """Set pictures (3, H, W) side by side, a little white between them."""
    gap = torch.ones(3, pictures[0].shape[1], max(1, pictures[0].shape[2] // 24))
    return torch.cat([part for picture in pictures for part in (picture, gap)][:-1], dim=2)


def _around(image: Tensor, place: tuple[int, int], model: MaskedAutoencoder) -> Tensor:
    """Cut a patch and its neighbours out of an image (3, H, W), enlarge them and frame the patch.

    At a border the window moves inwards.
    """
    sizes = [min(2 * CONTEXT + 1, count) for count in model.grid]
    starts = [min(max(at - CONTEXT, 0), count - size) for at, count, size in zip(place, model.grid, sizes, strict=True)]
    cut = image
    for axis, (start, size) in enumerate(zip(starts, sizes, strict=True), 1):
        cut = cut.narrow(axis, start * model.patch, size * model.patch)
    factor = max(1, STRIP_SIDE // (max(sizes) * model.patch))
    large = cut.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    return framed(large, (place[0] - starts[0], place[1] - starts[1]), model.patch * factor)
