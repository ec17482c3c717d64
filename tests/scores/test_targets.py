"""Measures of tags and numbers against scikit-learn and scipy, and by hand where they are not defined."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics

from maekit.scores import targets as m


def drawn(seed: int, n: int, k: int, *, rough: bool) -> m.Answers:
    """Answers with a tag and an image without it in every column; `rough`: many equal scores."""
    generator = torch.Generator().manual_seed(seed)
    truth = (torch.rand(n, k, generator=generator) < 0.3).double()
    truth[0], truth[1] = 1, 0
    said = torch.randn(n, k, generator=generator, dtype=torch.double) * 2 + truth
    return m.Answers(torch.arange(n), truth, said.round() if rough else said)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 80), k=st.integers(2, 6), rough=st.booleans())
def test_measures_of_tags_are_scikit_learns(seed: int, n: int, k: int, rough: bool) -> None:
    answers = drawn(seed, n, k, rough=rough)
    truth, said = answers.truth.int().numpy(), answers.said.numpy()
    found, whole = m.per_tag(answers), m.tag_measures(answers)
    for i in range(k):
        assert float(found.ap[i]) == pytest.approx(metrics.average_precision_score(truth[:, i], said[:, i]))
        assert float(found.auroc[i]) == pytest.approx(metrics.roc_auc_score(truth[:, i], said[:, i]))
    yes = (said >= 0).astype(int)
    theirs = metrics.precision_recall_fscore_support(truth, yes, zero_division=0)  # type: ignore[arg-type]
    mine = (found.precision, found.recall, found.f1, found.support)
    for one, other in zip(mine, theirs, strict=True):
        assert one.numpy() == pytest.approx(other)
    assert whole["map"] == pytest.approx(metrics.average_precision_score(truth, said))
    assert whole["macro_auroc"] == pytest.approx(metrics.roc_auc_score(truth, said))
    for kind in ("micro", "macro"):
        theirs = metrics.f1_score(truth, yes, average=kind, zero_division=0)  # type: ignore[arg-type]
        assert whole[f"{kind}_f1"] == pytest.approx(theirs)
    assert whole["exact_match"] == pytest.approx(metrics.accuracy_score(truth, yes))
    losses = [metrics.log_loss(truth[:, i], 1 / (1 + math.e ** -said[:, i]), labels=[0, 1]) for i in range(k)]
    assert whole["val_loss"] == pytest.approx(sum(losses) / k)


def test_a_tag_that_no_image_has_counts_in_no_mean_and_one_that_all_have_in_no_auroc() -> None:
    truth = torch.tensor([[0, 1, 1], [0, 1, 0]]).double()
    answers = m.Answers(torch.arange(2), truth, torch.tensor([[-1, 2, 1], [-2, -1, 3]]).double())
    found, whole = m.per_tag(answers), m.tag_measures(answers)
    assert found.ap.isnan().tolist() == [True, False, False] and found.auroc.isnan().tolist() == [True, True, False]
    assert whole["map"] == pytest.approx((1 + 0.5) / 2) and whole["macro_auroc"] == 0.0
    assert whole["macro_f1"] == pytest.approx((2 / 3 + 2 / 3) / 2) and whole["exact_match"] == 0.5
    nothing = m.tag_measures(m.Answers(torch.arange(2), torch.zeros(2, 1).double(), -torch.ones(2, 1).double()))
    assert nothing["map"] == nothing["micro_f1"] == nothing["macro_f1"] == 0.0 and nothing["exact_match"] == 1.0


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), n=st.integers(3, 60), k=st.integers(1, 4))
def test_measures_of_numbers_are_scikit_learns_and_scipys(seed: int, n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(-3, 4, (n, k), generator=generator).double() * 10
    truth[0], truth[1] = 0, 10
    said = truth / 2 + torch.randn(n, k, generator=generator, dtype=torch.double)
    found = m.per_number(m.Answers(torch.arange(n), truth, said))
    for i in range(k):
        one, other = truth[:, i].numpy(), said[:, i].numpy()
        assert float(found.mae[i]) == pytest.approx(metrics.mean_absolute_error(one, other))
        assert float(found.rmse[i]) == pytest.approx(metrics.root_mean_squared_error(one, other))
        assert float(found.r2[i]) == pytest.approx(metrics.r2_score(one, other))
        assert float(found.pearson[i]) == pytest.approx(stats.pearsonr(one, other)[0])
        assert float(found.spearman[i]) == pytest.approx(stats.spearmanr(one, other)[0])


def test_numbers_that_are_the_same_of_all_images_have_no_undefined_measure() -> None:
    truth = torch.full((3, 2), 5.0).double()
    said = torch.tensor([[5, 5], [5, 6], [5, 7]]).double()
    found = m.per_number(m.Answers(torch.arange(3), truth, said))
    assert found.r2.tolist() == [1.0, 0.0] and found.pearson.tolist() == found.spearman.tolist() == [0.0, 0.0]


def test_errors_of_several_numbers_have_no_mean() -> None:
    answers = m.Answers(torch.arange(3), torch.eye(3).double(), torch.zeros(3, 3).double())
    std = torch.ones(3).double()
    found = m.number_measures(answers, ["a", "b", "c"], std)
    assert "mae" not in found and found["targets"]["b"]["mae"] == pytest.approx(1 / 3)  # type: ignore[index]
    one = m.Answers(answers.index, answers.truth[:, :1], answers.said[:, :1])
    assert m.number_measures(one, ["a"], 2 * std[:1])["mae"] == pytest.approx(1 / 3)
    assert m.number_measures(one, ["a"], 2 * std[:1])["val_loss"] == pytest.approx(1 / 12)
    assert m.number_measures(one, ["a"], 2 * std[:1], "huber")["val_loss"] == pytest.approx(1 / 24)


def test_rows_of_processes_come_into_order_and_count_once() -> None:
    rows = torch.tensor([[4, 0.5], [0, 0.25], [2, 0.75], [2, 0.875]]).double()
    found = m.Answers.of_rows(rows, torch.arange(5.0)[:, None])
    assert found.index.tolist() == [0, 2, 4] and found.said[:, 0].tolist() == [0.25, 0.75, 0.5]
    assert found.truth[:, 0].tolist() == [0, 2, 4]


def test_the_worst_answer_of_each_image_comes_first() -> None:
    answers = m.Answers(
        torch.arange(3),
        torch.tensor([[1, 0], [1, 0], [0, 1]]).double(),
        torch.tensor([[-1, 2], [3, -3], [4, 4]]).double(),
    )
    assert m.worst_tags(answers, 5) == [(2, 0), (0, 1)]
    assert m.worst_numbers(answers, torch.tensor([1.0, 10.0]).double(), 2) == [(2, 0), (0, 0)]
