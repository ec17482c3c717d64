"""Verdicts on a published order, by numbers made by hand."""

import math

import pytest

from maekit.scores.ordering import APART, judge, ordering, stated_pairs, summary


@pytest.mark.parametrize(
    ("better", "worse", "verdict"),
    [
        ({0: 0.80, 1: 0.82, 2: 0.81}, {0: 0.70, 1: 0.715, 2: 0.712}, "confirmed"),
        ({0: 0.70, 1: 0.715, 2: 0.712}, {0: 0.80, 1: 0.82, 2: 0.81}, "contradicted"),
        ({0: 0.80, 1: 0.70, 2: 0.75}, {0: 0.75, 1: 0.74, 2: 0.75}, "within the spread"),
        ({0: 0.75, 1: 0.75}, {0: 0.75, 1: 0.75}, "within the spread"),
        ({0: 0.75, 1: 0.75}, {0: 0.5, 1: 0.5}, "no verdict"),  # a spread of none knows nothing of chance
        ({0: 0.8}, {0: 0.7}, "as published, one seed"),
        ({0: 0.7, 1: 0.9}, {0: 0.8}, "the other way, one seed"),
        ({0: 0.7}, {0: 0.7}, "equal, one seed"),
        ({0: 0.7}, {1: 0.7}, "no verdict"),
    ],
)
def test_a_pair_is_judged_by_the_seeds_that_both_have(
    better: dict[int, float], worse: dict[int, float], verdict: str
) -> None:
    found, said = judge(better, worse)
    assert said == verdict
    common = better.keys() & worse.keys()
    if common:
        assert math.isclose(found.mean, sum(better[s] - worse[s] for s in common) / len(common), abs_tol=1e-12)


def test_two_seeds_need_a_difference_far_beyond_their_spread() -> None:
    assert judge({0: 0.80, 1: 0.81}, {0: 0.70, 1: 0.709})[1] == "confirmed"  # .100 and .101: t 201 of 12.7
    assert judge({0: 0.80, 1: 0.90}, {0: 0.70, 1: 0.709})[1] == "within the spread"  # .100 and .191: t 3.2


def test_only_what_the_publication_tells_apart_is_a_pair() -> None:
    found = stated_pairs({"a": 0.849, "b": 0.848, "c": 0.840}, [("d", "a"), ("c", "a")])
    assert found == [("a", "c", pytest.approx(0.009)), ("b", "c", pytest.approx(0.008)), ("d", "a", None)]
    assert 0.001 < APART < 0.003


def test_a_sentence_counts_the_verdicts() -> None:
    published = {"a": 0.9, "b": 0.8, "c": 0.7}
    scores = {"a": {0: 0.6, 1: 0.62}, "b": {0: 0.5, 1: 0.521}, "c": {0: 0.55, 1: 0.48}}
    pairs = ordering(published, scores)
    assert [(pair.better, pair.worse, pair.verdict) for pair in pairs] == [
        ("a", "b", "confirmed"), ("a", "c", "within the spread"), ("b", "c", "within the spread"),
    ]  # fmt: skip
    assert summary("probe", pairs) == (
        "probe: of 3 pairs that the paper tells apart, 1 confirmed, 2 within the spread."
    )
    single = ordering({"a": 0.9, "b": 0.8}, {"a": {0: 0.6}, "b": {0: 0.5}})
    assert summary("probe", single) == (
        "probe: of 1 pair that the paper tells apart, 1 as published, one seed; one seed says nothing of the spread."
    )
    assert "none of these rows" in summary("probe", ordering({"a": 0.9}, {"a": {0: 0.6}}))
    assert summary("probe", [], 2) == "probe: 2 pairs that the paper tells apart without a score."
    assert summary("probe", single, 1).endswith("; one seed says nothing of the spread; 1 more without a score.")
    assert ordering(published, {"a": {0: 0.6}, "b": {}}) == []
