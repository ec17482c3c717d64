"""Measures of a classifier: accuracy, F1, balanced accuracy, confusion, calibration.

n images, C classes. All run on the CPU, on what `judge` keeps of each image: six numbers, whatever C is.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

BINS = 15
"""Bins of the calibration error (Guo et al. 2017, arXiv 1706.04599, section 5)."""


@dataclass(frozen=True)
class Judged:
    """What a classifier said of n images.

    Attributes:
        index: (n,) long, place of each image in its source.
        labels: (n,) long, the true class.
        predicted: (n,) long, the class of the highest probability.
        rank: (n,) long, how many classes were held for likelier than the true one.
        confidence: (n,) double, probability of the predicted class.
        loss: (n,) double, minus the logarithm of the true class's probability.
    """

    index: Tensor
    labels: Tensor
    predicted: Tensor
    rank: Tensor
    confidence: Tensor
    loss: Tensor

    @property
    def right(self) -> Tensor:
        """(n,) bool."""
        return self.predicted == self.labels

    def table(self) -> Tensor:
        """Return (n, 6) double, one row per image: exact, since no whole number here reaches 2**53."""
        return torch.stack([getattr(self, field.name).double() for field in fields(self)], 1)

    @staticmethod
    def of_table(table: Tensor) -> "Judged":
        """Read rows of `table` back, in order of the images; one that is there twice counts once.

        Processes strided over a source give rows in another order, and an image that stood in for an unreadable one
        comes twice.
        """
        order = torch.argsort(table[:, 0], stable=True)
        table = table[order]
        first = torch.ones(len(table), dtype=torch.bool)
        first[1:] = table[1:, 0] != table[:-1, 0]
        *whole, confidence, loss = table[first].unbind(1)
        index, labels, predicted, rank = (column.long() for column in whole)
        return Judged(index, labels, predicted, rank, confidence, loss)


def judge(log_probabilities: Tensor, labels: Tensor, index: Tensor) -> Judged:
    """Judge logarithms of probabilities (n, C), on any device, against labels (n,).

    Logarithms, so that the loss of a class held for all but impossible stays finite. Where two classes are equally
    likely the one with the lower number comes first.
    """
    values = log_probabilities.double().cpu()
    labels, index = labels.cpu(), index.cpu()
    mine = values.gather(1, labels[:, None])
    before = torch.arange(values.shape[1]) < labels[:, None]
    rank = ((values > mine) | ((values == mine) & before)).sum(1)
    highest = values.max(1).values
    predicted = (values == highest[:, None]).int().argmax(1)
    return Judged(index, labels, predicted, rank, highest.exp(), -mine[:, 0])


def top_k(judged: Judged, k: int) -> float:
    """Return the share of images whose true class is among the `k` likeliest."""
    return float((judged.rank < k).double().mean())


def confusion(judged: Judged, num_classes: int) -> Tensor:
    """Return (C, C) long: images of each true class (row) by predicted class (column)."""
    cells = torch.bincount(judged.labels * num_classes + judged.predicted, minlength=num_classes**2)
    return cells.view(num_classes, num_classes)


@dataclass(frozen=True)
class PerClass:
    """Precision, recall and F1 of each class, (C,) double; 0 where nothing can be divided. `support`: (C,) images."""

    precision: Tensor
    recall: Tensor
    f1: Tensor
    support: Tensor


def per_class(matrix: Tensor) -> PerClass:
    """Return the measures of each class from a confusion matrix (C, C)."""
    hits, said, support = matrix.diagonal().double(), matrix.sum(0), matrix.sum(1)
    return PerClass(_share(hits, said), _share(hits, support), _share(2 * hits, said + support), support)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole.clamp(min=1), 0.0)


def macro_f1(matrix: Tensor) -> float:
    """Return the mean F1 over the classes that are true or predicted somewhere (as scikit-learn's ``macro``)."""
    seen = (matrix.sum(0) + matrix.sum(1)) > 0
    return float(per_class(matrix).f1[seen].mean())


def balanced_accuracy(matrix: Tensor) -> float:
    """Return the mean recall over the classes that have images: each class weighs the same."""
    classes = per_class(matrix)
    return float(classes.recall[classes.support > 0].mean())


@dataclass(frozen=True)
class Reliability:
    """Bins of confidence, lowest first, those without images included.

    Attributes:
        count: (bins,) long.
        confidence: (bins,) double, mean in the bin; 0 in an empty one.
        accuracy: (bins,) double, share of right predictions in it; 0 in an empty one.
    """

    count: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def ece(self) -> float:
        """Expected calibration error: mean distance of confidence and accuracy, by images (arXiv 1706.04599, eq. 3)."""
        gap = (self.confidence - self.accuracy).abs()
        return float((self.count * gap).sum() / self.count.sum())


def reliability(judged: Judged, bins: int = BINS) -> Reliability:
    """Sort predictions into `bins` equal intervals of confidence, each with its upper end (arXiv 1706.04599, eq. 2)."""
    place = ((judged.confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    count = torch.bincount(place, minlength=bins)
    sums = [torch.bincount(place, values.double(), bins) for values in (judged.confidence, judged.right)]
    return Reliability(count, *(_share(total, count) for total in sums))


def measures(judged: Judged, num_classes: int) -> dict[str, float]:
    """Return all measures by name: top1, top5 where there are more than five classes, macro_f1, ...

    Fractions, but `val_loss`, the mean cross-entropy in nats.
    """
    matrix = confusion(judged, num_classes)
    return {
        "top1": top_k(judged, 1),
        **({"top5": top_k(judged, 5)} if num_classes > 5 else {}),
        "macro_f1": macro_f1(matrix),
        "balanced_accuracy": balanced_accuracy(matrix),
        "ece": reliability(judged).ece,
        "val_loss": float(judged.loss.mean()),
    }


def worst_mistakes(judged: Judged, count: int) -> Tensor:
    """Return up to `count` rows of wrong predictions, (m,) long: the most confident first, then by index."""
    wrong = torch.nonzero(~judged.right).squeeze(1)
    order = torch.argsort(judged.confidence[wrong], descending=True, stable=True)
    return wrong[order][:count]
