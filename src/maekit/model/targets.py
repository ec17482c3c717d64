"""What the decoder must predict, and the loss of each patch.

A target is a frozen module with four things: `num_values` (outputs per patch), a call that makes the target of chosen
patches, `loss` of each patch, and `to_patches`, which turns predictions back into normalised pixels for pictures, or
says that there is no such way. What it has measured (components, a codebook) is its state, and is saved with the
weights; it is never trained, and always in eval mode.

B batch, C channels, H W pixels, N patches, M patches chosen, P patch side, V values per patch (P*P*C).
"""

import math
from typing import Any, Literal, Protocol, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maekit.errors import MaekitError
from maekit.model.patches import patchify, select
from maekit.model.pca import PatchPCA
from maekit.model.tokenizer import DalleEncoder, VQTokenizer, create_tokenizer, per_channel

Target = Literal["norm_pixel", "pixel", "pca", "token", "low_pass", "hog"]
TARGETS: tuple[str, ...] = get_args(Target)
PIXELS = ("norm_pixel", "pixel")
"""The paper's own, which other implementations have too."""
MADE = ("pca", "token")
"""Those that are fitted or trained beforehand, and say how many values they have in a ``target_spec``."""
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


class Components(Squared):
    """The first coefficients of a patch in principal components of patches (paper section 4.1, "PCA")."""

    def __init__(self, pca: PatchPCA) -> None:
        super().__init__()
        self.made, self.num_values = pca, pca.spec["components"]

    def forward(self, images: Tensor, patches: Tensor, ids: Tensor) -> Tensor:
        """Return (B, M, num_values)."""
        return self.made.encode(select(patches, ids))

    def to_patches(self, pred: Tensor) -> Tensor:
        """Return the pixels that coefficients stand for."""
        return self.made.decode(pred)


class Tokens(Frozen):
    """The code that a discrete tokenizer gives a patch's place (paper section 4.1, "dVAE token"; BEiT).

    Attributes:
        mean: what images are normalised with, per channel; the tokenizer looks at values in 0..1.
        std: as `mean`.
    """

    def __init__(self, tokenizer: VQTokenizer | DalleEncoder, patch: int) -> None:
        super().__init__()
        self.made, self.patch = tokenizer.requires_grad_(False), patch
        self.num_values = tokenizer.vocabulary
        self.mean = self.std = (0.5,) * tokenizer.channels

    def forward(self, images: Tensor, patches: Tensor, ids: Tensor) -> Tensor:
        """Return codes (B, M), int64."""
        mean, std = (per_channel(values, images) for values in (self.mean, self.std))
        return self.made.codes((images * std + mean).clamp(0, 1)).gather(1, ids)

    def loss(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy of each patch (B, M) from logits (B, M, vocabulary), in float32 or wider."""
        return F.cross_entropy(widen(pred).transpose(1, 2), target, reduction="none")

    def to_patches(self, pred: Tensor) -> Tensor | None:
        """Return what the tokenizer's decoder makes of the likeliest codes; None where it has no decoder."""
        if not isinstance(self.made, VQTokenizer):
            return None
        if pred.shape[1] != self.made.num_patches:
            return pred.new_zeros(*pred.shape[:2], self.patch**2 * self.made.channels)
        images = self.made.decode(pred.argmax(-1))
        mean, std = (per_channel(values, images) for values in (self.mean, self.std))
        return patchify((images - mean) / std, self.patch)


def objective(
    target: str, *, channels: int, patch: int, grid: tuple[int, int], spec: dict[str, Any] | None = None
) -> Objective:
    """Build the target of this name for patches of `patch` pixels.

    Args:
        target: its name.
        channels: per image.
        patch: side in pixels.
        grid: rows and columns of patches.
        spec: of a `PatchPCA` or tokenizer, whose tensors are loaded afterwards.

    Raises:
        MaekitError: E-CONFIG-TARGET for patches too small for it, a spec missing or of other patches;
            E-CONFIG-TOKENIZER for a tokenizer of another grid or other channels.
    """
    if (target in MADE) != (spec is not None):
        raise MaekitError(
            "E-CONFIG-TARGET", f"target {target}", found="no target_spec" if spec is None else "a target_spec",
            expected="one for pca and token, and for no other target",
            hint="--target-from FOLDER of maekit pca or maekit tokenizer" if spec is None else f"target {MADE[0]}",
        )  # fmt: skip
    if target == "token":
        tokenizer = create_tokenizer(spec or {})
        return Tokens(tokenizer.at_grid(grid, channels), patch)
    if target == "pca":
        pca = PatchPCA(**(spec or {}))
        if (pca.spec["patch"], pca.spec["channels"]) != (patch, channels):
            raise MaekitError(
                "E-CONFIG-TARGET", "target pca",
                found=f"components of patches of {pca.spec['patch']} px, {pca.spec['channels']} channels",
                expected=f"of {patch} px, {channels} channels", hint="maekit pca with the settings of this run",
            )  # fmt: skip
        return Components(pca)
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
