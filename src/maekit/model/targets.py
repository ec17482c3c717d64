"""What the decoder must predict, and how far off it is."""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Target = Literal["norm_pixel", "pixel"]
EPS = 1e-6
"""Inside the root of the patch's standard deviation (official models_mae.py)."""


def make_target(patches: Tensor, kind: Target) -> Tensor:
    """Return (B, M, P*P*C): the patches themselves, or each normalised by its own mean and *unbiased* variance."""
    if kind == "pixel":
        return patches
    variance = patches.var(dim=-1, keepdim=True, unbiased=True)
    return (patches - patches.mean(dim=-1, keepdim=True)) / (variance + EPS).sqrt()


def reconstruction_loss(pred: Tensor, patches: Tensor, kind: Target) -> Tensor:
    """Return the mean squared error over the given patches, a scalar, in float32 also under autocast.

    Given the removed patches only, it is the paper's loss: every image removes the same number, so the mean over
    patches equals sum(mask * error) / sum(mask).
    """
    wide = patches if patches.dtype.itemsize > 4 else patches.float()
    return F.mse_loss(pred.to(wide.dtype), make_target(wide, kind))
