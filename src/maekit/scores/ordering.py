"""Whether runs are in the order that a publication states, pair by pair."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from maekit.scores.spread import Difference, paired_over_seeds

APART = 0.0023
"""Published accuracies nearer than this state no difference: four seeds of the authors' ViT-B deviate by .0008
(FINETUNE.md), and the difference of two such runs is beyond this in one of twenty cases (1.96 * 2**.5 * .0008)."""
VERDICTS = ("confirmed", "contradicted", "within the spread", "as published, one seed", "the other way, one seed",
            "equal, one seed", "no verdict")  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """Two rows of which one is stated to be better.

    Attributes:
        better: the row that the publication has ahead.
        worse: the other.
        published: its difference; None where it is stated without figures.
        found: ours, of the better minus the worse.
        verdict: one of `VERDICTS`.
    """

    better: str
    worse: str
    published: float | None
    found: Difference
    verdict: str


def stated_pairs(
    published: Mapping[str, float], says: Sequence[tuple[str, str]] = ()
) -> list[tuple[str, str, float | None]]:
    """Return (better, worse, difference) of all pairs of rows that published figures or words tell apart.

    Args:
        published: row -> figure, higher is better.
        says: (better, worse) that are stated without figures.
    """
    found: dict[frozenset[str], tuple[str, str, float | None]] = {}
    for one, other in combinations(published, 2):
        gap = published[one] - published[other]
        if abs(gap) > APART:
            better, worse = (one, other) if gap > 0 else (other, one)
            found[frozenset((one, other))] = (better, worse, abs(gap))
    for better, worse in says:
        found.setdefault(frozenset((better, worse)), (better, worse, None))
    return list(found.values())


def judge(better: Mapping[int, float], worse: Mapping[int, float]) -> tuple[Difference, str]:
    """Return our difference of two rows, and what it says of the stated order.

    With two or more seeds of both a paired t-test decides at p < .05, not corrected for the number of pairs.

    Args:
        better: seed -> score of the row that is stated to be better.
        worse: the same of the other.
    """
    seeds = sorted(better.keys() & worse.keys())
    pairs = [better[seed] for seed in seeds], [worse[seed] for seed in seeds]
    if len(seeds) > 1:
        found = paired_over_seeds(*pairs)
        if found.p is None:
            return found, "within the spread" if found.mean == 0 else "no verdict"
        if found.p >= 0.05:
            return found, "within the spread"
        return found, "confirmed" if found.mean > 0 else "contradicted"
    if not seeds:
        return Difference(float("nan"), pairs=0), "no verdict"
    found = Difference(pairs[0][0] - pairs[1][0])
    sign = (found.mean > 0) - (found.mean < 0)
    return found, ("equal, one seed", "as published, one seed", "the other way, one seed")[sign]


def ordering(
    published: Mapping[str, float], scores: Mapping[str, Mapping[int, float]], says: Sequence[tuple[str, str]] = ()
) -> list[Pair]:
    """Judge every stated pair of which both rows were scored.

    Args:
        published: as for `stated_pairs`.
        scores: row -> seed -> score.
        says: as for `stated_pairs`.
    """
    return [
        Pair(better, worse, gap, *judge(scores[better], scores[worse]))
        for better, worse, gap in stated_pairs(published, says)
        if scores.get(better) and scores.get(worse) and scores[better].keys() & scores[worse].keys()
    ]


def summary(measure: str, pairs: Sequence[Pair], unscored: int = 0) -> str:
    """Return one sentence: how many of the stated differences were found.

    Args:
        unscored: stated pairs of which a row has no score, or not yet.
    """
    left = f"{unscored} pair{'s' * (unscored > 1)} that the paper tells apart" if unscored else ""
    if not pairs:
        return (
            f"{measure}: {left} without a score." if left else f"{measure}: the paper tells none of these rows apart."
        )
    counts = Counter(pair.verdict for pair in pairs)
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    single = all("one seed" in pair.verdict for pair in pairs)
    return (
        f"{measure}: of {len(pairs)} pair{'s' * (len(pairs) > 1)} that the paper tells apart, {told}"
        + ("; one seed says nothing of the spread" if single else "")
        + (f"; {unscored} more without a score." if unscored else ".")
    )
