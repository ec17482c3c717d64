"""Measures against scikit-learn, and by hand where they are small."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)

from maekit.scores import measures as m


def judged(probabilities: list[list[float]], labels: list[int]) -> m.Judged:
    return m.judge(
        torch.tensor(probabilities, dtype=torch.double).log(), torch.tensor(labels), torch.arange(len(labels))
    )


def drawn(seed: int, n: int, classes: int) -> tuple[torch.Tensor, torch.Tensor, m.Judged]:
    generator = torch.Generator().manual_seed(seed)
    logs = torch.randn(n, classes, generator=generator, dtype=torch.double).mul(2).log_softmax(1)
    labels = torch.randint(0, classes, (n,), generator=generator)
    return logs.exp(), labels, m.judge(logs, labels, torch.arange(n))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 200), classes=st.integers(2, 12))
def test_all_measures_are_scikit_learns(seed: int, n: int, classes: int) -> None:
    probabilities, labels, found = drawn(seed, n, classes)
    every, truth, said = list(range(classes)), labels.numpy(), probabilities.argmax(1).numpy()
    matrix = m.confusion(found, classes)
    assert np.array_equal(matrix.numpy(), confusion_matrix(truth, said, labels=every))
    one = m.per_class(matrix)
    theirs = precision_recall_fscore_support(truth, said, labels=every, zero_division=0.0)  # type: ignore[arg-type]
    for mine, other in zip((one.precision, one.recall, one.f1, one.support), theirs, strict=True):
        assert mine.numpy() == pytest.approx(other)
    got = m.measures(found, classes)
    assert got["top1"] == pytest.approx((truth == said).mean())
    assert got["macro_f1"] == pytest.approx(f1_score(truth, said, average="macro", zero_division=0.0))  # type: ignore[arg-type]
    if set(said) <= set(truth) and len(set(truth)) > 1:  # scikit-learn warns of the others
        assert got["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, said))
    assert got["val_loss"] == pytest.approx(log_loss(truth, probabilities.numpy(), labels=every))
    if classes > 5:
        top5 = top_k_accuracy_score(truth, probabilities.numpy(), k=5, labels=every)
        assert got["top5"] == pytest.approx(top5)
    else:
        assert "top5" not in got


def test_the_calibration_error_by_hand() -> None:
    """Two bins of four: (.25, .5] holds .4 right; (.75, 1] holds .8 wrong, 1.0 right, .9 right."""
    found = judged([[0.4, 0.3, 0.3], [0.8, 0.1, 0.1], [1.0, 0.0, 0.0], [0.05, 0.9, 0.05]], [0, 1, 0, 1])
    bins = m.reliability(found, bins=4)
    assert bins.count.tolist() == [0, 1, 0, 3]
    assert bins.confidence.tolist() == pytest.approx([0, 0.4, 0, 0.9])
    assert bins.accuracy.tolist() == pytest.approx([0, 1.0, 0, 2 / 3])
    assert bins.ece == pytest.approx(0.25 * 0.6 + 0.75 * (0.9 - 2 / 3))


def test_a_confidence_on_an_edge_belongs_to_the_bin_below() -> None:
    """Intervals are open below and closed above: .5 of two bins is in the first, 1 in the last."""
    found = judged([[0.5, 0.5], [1.0, 0.0]], [0, 0])
    assert m.reliability(found, bins=2).count.tolist() == [1, 1]


def test_a_classifier_that_is_as_often_right_as_it_says_is_calibrated() -> None:
    sure = judged([[0.75, 0.25]] * 4, [0, 0, 0, 1])
    assert m.reliability(sure).ece == pytest.approx(0.0)
    boasting = judged([[1.0, 0.0]] * 4, [0, 0, 0, 1])
    assert m.reliability(boasting).ece == pytest.approx(0.25)


def test_ties_go_to_the_lower_class_in_prediction_and_rank_alike() -> None:
    found = judged([[0.25] * 4] * 4, [0, 1, 2, 3])
    assert found.predicted.tolist() == [0, 0, 0, 0] and found.rank.tolist() == [0, 1, 2, 3]
    assert m.top_k(found, 1) == 0.25 and m.top_k(found, 2) == 0.5


def test_rows_of_several_processes_come_back_in_order_and_each_image_once() -> None:
    _, _, found = drawn(0, 11, 4)
    table = found.table()
    shuffled = torch.cat([table[0::3], table[1::3], table[2::3], table[4:5]])
    again = m.Judged.of_table(shuffled)
    for name in ("index", "labels", "predicted", "rank", "confidence", "loss"):
        assert torch.equal(getattr(again, name), getattr(found, name)), name


def test_absent_classes_weigh_nothing_in_the_means() -> None:
    found = judged([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]], [0, 1])
    assert m.macro_f1(m.confusion(found, 3)) == 1.0 and m.balanced_accuracy(m.confusion(found, 3)) == 1.0


def test_a_class_held_for_all_but_impossible_costs_a_finite_loss() -> None:
    found = m.judge(torch.tensor([[900.0, 0.0]]).log_softmax(1), torch.tensor([1]), torch.tensor([0]))
    assert float(found.loss[0]) == 900.0 and float(found.confidence[0]) == 1.0 and m.top_k(found, 1) == 0.0


def test_the_worst_mistakes_are_the_most_confident_ones() -> None:
    found = judged([[0.6, 0.4], [0.9, 0.1], [0.7, 0.3], [0.9, 0.1]], [1, 1, 0, 1])
    assert m.worst_mistakes(found, 2).tolist() == [1, 3] and m.worst_mistakes(found, 9).tolist() == [1, 3, 0]
