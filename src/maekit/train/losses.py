"""Losses of a classifier: soft targets, smoothed, weighted by class; of tags, and of numbers.

B batch, C classes, K tags or numbers. Every loss is the mean over images of a sum or mean over classes, so that it does
not depend on how a batch is cut into micro-batches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def soft_targets(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Return (B, C) rows that sum to 1: 1 - smoothing for the label, and smoothing / C for every class."""
    return F.one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes


def balanced_weights(labels: Sequence[int], num_classes: int) -> Tensor:
    """Return a weight (C,) for each class, n / (C * images of it), so that all classes weigh the same together.

    A class without images, which no image asks for, weighs 0. Averaged over the images the weights are 1 (the rule of
    scikit-learn's ``balanced``).
    """
    counts = torch.bincount(torch.tensor(list(labels)), minlength=num_classes).float()
    return torch.where(counts > 0, len(labels) / (num_classes * counts.clamp(min=1)), 0.0)


def supervised_loss(logits: Tensor, targets: Tensor, *, kind: str, weights: Tensor | None = None) -> Tensor:
    """Return the mean loss over a batch.

    Args:
        logits: (B, C).
        targets: (B, C) soft targets.
        kind: "cross-entropy", or "bce": binary cross-entropy of each class by itself, the mean over classes (as in
            ResNet strikes back, arXiv 2110.00476, section 2.1).
        weights: (C,) of each class; None: 1.
    """
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(logits.float(), targets, weight=weights)
    return F.cross_entropy(logits, targets, weight=weights)


def tag_weights(tags: Tensor) -> Tensor:
    """Return a weight (K,) for images with a tag, those without / those with, so that both weigh the same together.

    Args:
        tags: (n, K), 0 and 1 of all training images; a tag that none or all have weighs 1.
    """
    count = tags.double().sum(0)
    without = len(tags) - count
    return torch.where((count > 0) & (without > 0), without / count.clamp(min=1), 1.0).float()


def tag_loss(logits: Tensor, targets: Tensor, *, smoothing: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """Return the mean binary cross-entropy over images and tags.

    Args:
        logits: (B, K).
        targets: (B, K), 0 to 1; mixed images have shares.
        smoothing: part by which targets move towards 1/2.
        weights: (K,), of images with the tag.
    """
    return F.binary_cross_entropy_with_logits(
        logits.float(), targets * (1 - smoothing) + smoothing / 2, pos_weight=weights
    )


def number_loss(said: Tensor, targets: Tensor, *, kind: str) -> Tensor:
    """Return the mean over images and numbers, both in standard deviations.

    Args:
        said: (B, K).
        targets: (B, K).
        kind: "mse", or "huber": half the square up to 1, linear beyond (Huber 1964), so that few wild values in the
            labels pull less.
    """
    return F.huber_loss(said.float(), targets) if kind == "huber" else F.mse_loss(said.float(), targets)
