"""Nearest neighbours by cosine similarity and their votes (DINO, arXiv 2104.14294, appendix F.1).

Neighbours are looked up once, for the largest k; every k and temperature of a sweep votes from the same ones.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SIMILARITIES = 2**26
"""Similarities held at a time: 256 MB of float32, beside which what else is needed is small."""


@dataclass(frozen=True)
class Neighbours:
    """The nearest rows of a bank for each query.

    Attributes:
        similarity: (n, k) cosine, falling.
        index: (n, k) row of the bank.
    """

    similarity: Tensor
    index: Tensor


@torch.no_grad()
def nearest(bank: Tensor, queries: Tensor, k: int) -> Neighbours:
    """Return the `k` rows of `bank` (m, D) with the largest cosine to each of `queries` (n, D).

    Exact, in pieces of `SIMILARITIES`; rows of equal similarity come in any order. More than m neighbours are m.
    """
    k = min(k, len(bank))
    bank = F.normalize(bank, dim=1).T
    rows = max(1, SIMILARITIES // max(1, bank.shape[1]))
    found = [_topk(F.normalize(part, dim=1) @ bank, k) for part in queries.split(rows)]
    similarity, index = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Neighbours(similarity, index)


def _topk(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return what ``similarity.topk(k)`` does, reading long rows once.

    The k largest values of a row lie in those k groups of its columns whose maxima are largest. A maximum over groups
    runs at the speed of memory, where sorting does not.
    """
    size = math.isqrt(similarity.shape[1] // k)  # as many groups as columns in the chosen ones
    if similarity.is_cuda or size < 4:
        found = similarity.topk(k, dim=1)
        return found.values, found.indices
    groups = similarity.shape[1] // size
    whole = groups * size  # group g has columns g, g + groups, ...: neighbours in memory are reduced side by side
    grouped = similarity[:, :whole].unflatten(1, (size, groups))
    chosen = grouped.amax(1).topk(k, dim=1).indices
    inside = grouped.gather(2, chosen[:, None].expand(-1, size, -1)).flatten(1)
    values, places = torch.cat([inside, similarity[:, whole:]], dim=1).topk(k, dim=1)
    columns = places // k * groups + chosen.gather(1, places % k)
    return values, torch.where(places < size * k, columns, places - size * k + whole)


def vote(found: Neighbours, labels: Tensor, num_classes: int, *, k: int, temperature: float) -> Tensor:
    """Return the class (n,) that the first `k` neighbours vote for; the smaller number wins a tie.

    Args:
        found: at least `k` neighbours, or all rows of the bank.
        labels: (m,) class of each row of the bank.
        num_classes: classes there are.
        k: neighbours that vote; 20 in DINO.
        temperature: a neighbour of cosine s weighs exp(s / temperature); 0.07 in DINO.
    """
    similarity, index = found.similarity[:, :k], found.index[:, :k]
    weights = ((similarity - similarity[:, :1]) / temperature).exp()  # of the nearest: 1, so none overflows
    scores = torch.zeros(len(index), num_classes, dtype=weights.dtype, device=weights.device)
    return scores.scatter_add_(1, labels[index], weights).argmax(1)


def knn_top1(
    bank: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor], num_classes: int, *, k: int, temperature: float
) -> float:
    """Return the share of `queries`, features and labels, whose class the neighbours in `bank` vote for."""
    return knn_sweep(bank, queries, num_classes, ks=[k], temperatures=[temperature])[k, temperature]


def knn_sweep(
    bank: tuple[Tensor, Tensor],
    queries: tuple[Tensor, Tensor],
    num_classes: int,
    *,
    ks: list[int],
    temperatures: list[float],
) -> dict[tuple[int, float], float]:
    """Return top-1 by (k, temperature); the neighbours are looked up once.

    Args:
        bank: features (m, D) and labels (m,).
        queries: features (n, D) and labels (n,).
        num_classes: classes there are.
        ks: numbers of neighbours.
        temperatures: of the weights.
    """
    found = nearest(bank[0], queries[0], max(ks))
    return {
        (k, temperature): float(
            (vote(found, bank[1], num_classes, k=k, temperature=temperature) == queries[1]).float().mean()
        )
        for k in ks
        for temperature in temperatures
    }
