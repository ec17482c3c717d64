"""Measures of tags (average precision, AUROC, F1) and of numbers (errors, R2, correlations).

n images, K tags or numbers. Pure functions on double tensors of the CPU; scikit-learn's and scipy's rules.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Answers:
    """What a model said of n images with K targets each.

    Attributes:
        index: (n,) long, place of each image in its source.
        truth: (n, K) double: 0 and 1 of tags, or numbers.
        said: (n, K) double: log-odds of tags, or numbers in the same units.
    """

    index: Tensor
    truth: Tensor
    said: Tensor

    @staticmethod
    def of_rows(rows: Tensor, values: Tensor) -> "Answers":
        """Put rows (m, 1 + K), image and what was said of it, into the order of the images; each counts once.

        Args:
            rows: double, of all processes; one that stood in for an unreadable image comes twice.
            values: (N, K), the truth of all images of the source.
        """
        _, inverse = torch.unique(rows[:, 0].long(), return_inverse=True)
        first = torch.full((int(inverse.max()) + 1,), len(rows)).scatter_reduce(
            0, inverse, torch.arange(len(rows)), "amin"
        )
        index = rows[first, 0].long()
        return Answers(index, values[index].double(), rows[first, 1:])


@dataclass(frozen=True)
class PerTag:
    """Measures of each tag, (K,) double, NaN where they are not defined.

    Attributes:
        support: images that have the tag.
        ap: average precision; not defined without such images.
        auroc: not defined without images of both kinds.
        precision: of a probability of at least one half, as recall and f1; 0 where nothing can be divided.
    """

    support: Tensor
    ap: Tensor
    auroc: Tensor
    precision: Tensor
    recall: Tensor
    f1: Tensor


def per_tag(answers: Answers) -> PerTag:
    """Return the measures of each tag."""
    true, said = answers.truth > 0.5, answers.said >= 0
    hits = (true & said).sum(0).double()
    support, positive = true.sum(0).double(), said.sum(0).double()
    ranked = [_ranked(score, each) for score, each in zip(answers.said.T, true.T, strict=True)]
    ap, auroc = torch.tensor(ranked, dtype=torch.double).reshape(-1, 2).T
    f1 = _share(2 * hits, support + positive)
    return PerTag(support, ap, auroc, _share(hits, positive), _share(hits, support), f1)


def precision_recall(score: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Return precision and recall at every distinct score, the highest first; images of one score come together."""
    order = torch.argsort(score, descending=True)
    score, true = score[order], true[order].double()
    last = torch.ones(len(score), dtype=torch.bool)
    last[:-1] = score[1:] != score[:-1]
    hits = true.cumsum(0)[last]
    return hits / (torch.nonzero(last).squeeze(1) + 1), hits / true.sum()


def _ranked(score: Tensor, true: Tensor) -> tuple[float, float]:
    """Return average precision and AUROC of one tag.

    Average precision is the sum of precision times the step of recall, without interpolation, AUROC the share of pairs
    of an image with and one without that are in the right order, ties counting half (Mann and Whitney).
    """
    with_it, without = int(true.sum()), int((~true).sum())
    if not with_it:
        return float("nan"), float("nan")
    precision, recall = precision_recall(score, true)
    ap = float((precision * recall.diff(prepend=torch.zeros(1, dtype=torch.double))).sum())
    if not without:
        return ap, float("nan")
    above = float(ranks(score)[true].sum()) - with_it * (with_it + 1) / 2
    return ap, above / (with_it * without)


def tag_measures(answers: Answers) -> dict[str, float]:
    """Return all measures by name: map, macro_auroc, micro_f1, macro_f1, exact_match, val_loss.

    map and macro_auroc are means over the tags for which they are defined, macro_f1 over those that are true or said
    somewhere; exact_match is the share of images of which every tag is right; the loss is in nats.
    """
    found, true, said = per_tag(answers), answers.truth > 0.5, answers.said >= 0
    hits, both = float((true & said).sum()), float(true.sum() + said.sum())
    seen = (true | said).any(0)
    return {
        "map": _mean(found.ap[~found.ap.isnan()]),
        "macro_auroc": _mean(found.auroc[~found.auroc.isnan()]),
        "micro_f1": 2 * hits / both if both else 0.0,
        "macro_f1": _mean(found.f1[seen]),
        "exact_match": float((true == said).all(1).double().mean()),
        "val_loss": float(F.binary_cross_entropy_with_logits(answers.said, answers.truth)),
    }


def worst_tags(answers: Answers, count: int) -> list[tuple[int, int]]:
    """Return up to `count` (row, tag) of wrong answers, of each image the most confident; those of most first."""
    wrong = (answers.truth > 0.5) != (answers.said >= 0)
    sure = torch.where(wrong, answers.said.abs(), -1.0)
    most, tag = sure.max(1)
    order = torch.argsort(most, descending=True, stable=True)[:count]
    return [(row, int(tag[row])) for row in order.tolist() if most[row] >= 0]


@dataclass(frozen=True)
class PerNumber:
    """Measures of each number, (K,) double.

    Attributes:
        mae: mean absolute error in the number's units.
        rmse: root of the mean squared error, likewise.
        r2: part of the variance that is explained, 1 - squared error / squared error of the mean; 0 for a number that
            is the same of all images, unless it is said exactly.
        pearson: correlation; 0 where one side is constant, as spearman.
        spearman: correlation of ranks.
    """

    mae: Tensor
    rmse: Tensor
    r2: Tensor
    pearson: Tensor
    spearman: Tensor


def per_number(answers: Answers) -> PerNumber:
    """Return the measures of each number."""
    error = answers.said - answers.truth
    spread = (answers.truth - answers.truth.mean(0)).square().sum(0)
    square = error.square().sum(0)
    constant = torch.where(square == 0, 1.0, 0.0)
    r2 = torch.where(spread > 0, 1 - square / torch.where(spread > 0, spread, 1.0), constant)
    said, true = (torch.stack([ranks(column) for column in values.T], 1) for values in (answers.said, answers.truth))
    return PerNumber(
        error.abs().mean(0),
        error.square().mean(0).sqrt(),
        r2,
        _correlation(answers.said, answers.truth),
        _correlation(said, true),
    )


def number_measures(answers: Answers, names: list[str], std: Tensor, kind: str = "mse") -> dict[str, object]:
    """Return all measures by name: r2, pearson, spearman, val_loss, and targets: those of each number.

    The first three are means over the numbers. Errors of several numbers in units of their own have no mean: mae and
    rmse stand at the top for one number only.

    Args:
        std: (K,) double, by which the loss divides errors.
        kind: of `maekit.train.losses.number_loss`.
    """
    found = per_number(answers)
    each = {
        name: {measure: float(getattr(found, measure)[at]) for measure in ("mae", "rmse", "r2", "pearson", "spearman")}
        for at, name in enumerate(names)
    }
    scaled = (answers.said - answers.truth) / std
    loss = F.huber_loss if kind == "huber" else F.mse_loss
    top = {"mae": float(found.mae[0]), "rmse": float(found.rmse[0])} if len(names) == 1 else {}
    means = {name: float(getattr(found, name).mean()) for name in ("r2", "pearson", "spearman")}
    return {**means, **top, "val_loss": float(loss(scaled, torch.zeros_like(scaled))), "targets": each}


def worst_numbers(answers: Answers, std: Tensor, count: int) -> list[tuple[int, int]]:
    """Return `count` (row, number) of the largest errors in units of `std`, of each image the largest."""
    most, place = ((answers.said - answers.truth) / std).abs().max(1)
    order = torch.argsort(most, descending=True, stable=True)[:count]
    return [(row, int(place[row])) for row in order.tolist()]


def ranks(values: Tensor) -> Tensor:
    """Return the ranks (n,) double, from 1; equal values share their mean rank."""
    _, inverse, count = torch.unique(values, return_inverse=True, return_counts=True)
    end = count.cumsum(0).double()
    return (end - (count.double() - 1) / 2)[inverse]


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    one, other = one - one.mean(0), other - other.mean(0)
    norm = (one.square().sum(0) * other.square().sum(0)).sqrt()
    return torch.where(norm > 0, (one * other).sum(0) / torch.where(norm > 0, norm, 1.0), 0.0)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole.clamp(min=1), 0.0)


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0
