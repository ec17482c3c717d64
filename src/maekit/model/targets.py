"""What the decoder must predict: the pixels of a patch, plain or normalised by the patch itself.

B batch, M patches (any selection), P patch side, C channels.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Target = Literal["norm_pixel", "pixel"]
TARGETS: tuple[str, ...] = get_args(Target)
EPS = 1e-6
"""Added to a patch's variance inside the root (official models_mae.py, forward_loss)."""


def target_of(patches: Tensor, target: str) -> Tensor:
    """Return the target (B, M, P*P*C) of patches (B, M, P*P*C), in float32 or wider.

    "norm_pixel" is ``(patch - mean) / sqrt(var + 1e-6)`` over all values of a patch, with the *unbiased* variance
    (paper section 3 "Reconstruction target"; official forward_loss uses torch.var's default).
    """
    patches = widen(patches)
    if target == "pixel":
        return patches
    mean, deviation = patch_statistics(patches)
    return (patches - mean) / deviation


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation (..., 1) that "norm_pixel" normalises a patch (..., P*P*C) with."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + EPS).sqrt()


def reconstruction_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of masked patches (B, M, P*P*C), a scalar in float32 or wider.

    The mean over masked patches of the mean over values: the official ``(loss * mask).sum() / mask.sum()`` over the
    batch, as every row has the same number of masked patches.
    """
    return (widen(pred) - target).square().mean(-1).mean()


def widen(values: Tensor) -> Tensor:
    """Return at least float32: a mean of squares over half a million values is no task for bfloat16."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
