"""What the decoder must predict, and the loss of each patch.

A target is a frozen module with four things: `num_values` (outputs per patch), a call that makes the target of chosen
patches, `loss` of each patch, and `to_patches`, which turns predictions back into normalised pixels for pictures, or
says that there is no such way. What it has measured (components, a codebook) is its state, and is saved with the
weights; it is never trained, and always in eval mode.

B batch, C channels, H W pixels, N patches, M patches chosen, P patch side, V values per patch (P*P*C).
"""

import math
from typing import Literal, Protocol, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maekit.errors import MaekitError
from maekit.model.patches import patchify, select

Target = Literal["norm_pixel", "pixel", "low_pass", "hog"]
TARGETS: tuple[str, ...] = get_args(Target)
PIXELS = ("norm_pixel", "pixel")
"""The paper's own, which other implementations have too."""
EPS = 1e-6
"""Added to a patch's variance inside the root (official models_mae.py, forward_loss)."""
LOW_PASS = 40 / 224
"""Cycles per pixel that "low_pass" keeps: 40 over a side of 224 (PixMIM, arXiv 2303.02416, section 4.1)."""
HOG_BINS = 9
"""Unsigned orientations of 20 degrees each (MaskFeat, arXiv 2112.09133, section 3)."""


class Objective(Protocol):
    """What a model asks of its target."""

    num_values: int

    def __call__(self, images: Tensor, patches: Tensor, ids: Tensor) -> Tensor:
        """Return the target (B, M, ...) of the patches `ids` (B, M), in float32 or wider.

        Args:
            images: (B, C, H, W), normalised.
            patches: (B, N, V), the same images.
            ids: which patches.
        """
        ...

    def loss(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each patch (B, M) from predictions (B, M, num_values)."""
        ...

    def to_patches(self, pred: Tensor) -> Tensor | None:
        """Return predictions (B, N, num_values) as normalised pixels (B, N, V); None: there is no way back."""
        ...


class Frozen(nn.Module):
    """A module that is never trained and never leaves eval mode."""

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)


class Squared(Frozen):
    """The loss of real-valued targets: the mean of squared errors over a patch's values."""

    num_values: int

    def loss(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return (B, M) from predictions and targets (B, M, num_values), in float32 or wider."""
        return (widen(pred) - target).square().mean(-1)

    def to_patches(self, pred: Tensor) -> Tensor | None:
        """Return the prediction as it is; where patches are normalised, in each patch's own units."""
        return pred


class Pixels(Squared):
    """The patch itself, plain or normalised by its own mean and deviation (paper section 3)."""

    def __init__(self, num_values: int, *, normalised: bool) -> None:
        super().__init__()
        self.num_values, self.normalised = num_values, normalised

    def forward(self, images: Tensor, patches: Tensor, ids: Tensor) -> Tensor:
        """Return (B, M, V)."""
        return target_of(select(patches, ids), "norm_pixel" if self.normalised else "pixel")


class LowPass(Squared):
    """The patch of an image without its high frequencies: an ideal filter that keeps `LOW_PASS` cycles per pixel.

    PixMIM (arXiv 2303.02416, section 4.1): fine texture that nobody could guess is taken out of the question.
    """

    def __init__(self, num_values: int, patch: int) -> None:
        super().__init__()
        self.num_values, self.patch = num_values, patch

    def forward(self, images: Tensor, patches: Tensor, ids: Tensor) -> Tensor:
        """Return (B, M, V)."""
        with torch.autocast(images.device.type, enabled=False):
            return select(patchify(low_pass(widen(images)), self.patch), ids)


class Gradients(Squared):
    """Histograms of oriented gradients of a patch's cells (HOG; MaskFeat, arXiv 2112.09133, section 3).

    Of each channel and cell of half a patch (a whole one where the side is odd or below 8 px): gradient magnitude by
    unsigned orientation in 9 bins, of length 1 in the Euclidean norm. No Gaussian window over the cells.
    """

    def __init__(self, channels: int, patch: int) -> None:
        super().__init__()
        self.patch, self.cell = patch, patch // 2 if patch >= 8 and patch % 2 == 0 else patch
        self.num_values = (patch // self.cell) ** 2 * channels * HOG_BINS

    def forward(self, images: Tensor, patches: Tensor, ids: Tensor) -> Tensor:
        """Return (B, M, num_values)."""
        cells = hog(widen(images), self.cell)
        return select(patchify(cells, self.patch // self.cell), ids)

    def to_patches(self, pred: Tensor) -> None:
        """Return nothing: orientations are no pixels."""


def objective(target: str, *, channels: int, patch: int) -> Squared:
    """Build the target of this name for patches of `patch` pixels.

    Raises:
        MaekitError: E-CONFIG-TARGET for patches too small for it.
    """
    num_values = patch * patch * channels
    too_small = {"norm_pixel": num_values < 2, "hog": patch < 2}
    if too_small.get(target):
        raise MaekitError(
            "E-CONFIG-TARGET", "setting target", found=f"{target} with patches of {patch} px and {channels} channels",
            expected="more than one pixel in a patch", hint="target pixel",
        )  # fmt: skip
    if target == "low_pass":
        return LowPass(num_values, patch)
    if target == "hog":
        return Gradients(channels, patch)
    return Pixels(num_values, normalised=target == "norm_pixel")


def target_of(patches: Tensor, target: str) -> Tensor:
    """Return the pixel target (B, M, V) of patches (B, M, V), in float32 or wider.

    "norm_pixel" is ``(patch - mean) / sqrt(var + 1e-6)`` over all values of a patch, with the *unbiased* variance
    (paper section 3 "Reconstruction target"; official forward_loss uses torch.var's default).
    """
    patches = widen(patches)
    if target == "pixel":
        return patches
    mean, deviation = patch_statistics(patches)
    return (patches - mean) / deviation


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation (..., 1) that "norm_pixel" normalises a patch (..., V) with."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + EPS).sqrt()


def low_pass(images: Tensor, cycles: float = LOW_PASS) -> Tensor:
    """Return images (B, C, H, W) without frequencies above `cycles` per pixel, in any direction."""
    height, width = images.shape[-2:]
    rows = torch.fft.fftfreq(height, device=images.device)
    columns = torch.fft.rfftfreq(width, device=images.device)
    kept = rows[:, None].square() + columns.square() <= cycles**2 + 1e-9
    return torch.fft.irfft2(torch.fft.rfft2(images) * kept, s=(height, width))


def hog(images: Tensor, cell: int) -> Tensor:
    """Return histograms (B, C * 9, H / cell, W / cell) of images (B, C, H, W), each cell's of norm 1 or 0.

    Gradients are central differences, the border mirrored; an orientation belongs to one bin, not to the two nearest.
    """
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect" if min(images.shape[-2:]) > 1 else "replicate")
    across = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    down = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    bins = (torch.atan2(down, across) / math.pi * HOG_BINS).floor().long() % HOG_BINS
    votes = across.square().add(down.square()).sqrt()
    spread = votes.new_zeros(*votes.shape[:2], HOG_BINS, *votes.shape[2:])
    spread.scatter_(2, bins[:, :, None], votes[:, :, None])
    cells = F.avg_pool2d(spread.flatten(1, 2), cell)
    return F.normalize(cells.unflatten(1, (-1, HOG_BINS)), dim=2).flatten(1, 2)


def widen(values: Tensor) -> Tensor:
    """Return at least float32: a mean of squares over half a million values is no task for bfloat16."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
