"""The regression is scikit-learn's: the same objective, its minimum, its classes."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional as F

from maekit.errors import MaekitError
from maekit.scores.regression import STRENGTHS, UNCHOSEN, Problem, choose, spare, standardise


def digits(count: int = 900, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data: Any = load_digits()
    order = torch.randperm(len(data.data), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(data.data, dtype=dtype)[order], torch.tensor(data.target)[order]
    train, val = standardise(x[:count], x[count:])
    return train, y[:count], val, y[count:]


def theirs(x: Tensor, y: Tensor, strength: float) -> LogisticRegression:
    """Solve by Newton's method: scikit-learn's own L-BFGS stops where the loss no longer moves."""
    return LogisticRegression(C=strength, solver="newton-cholesky", tol=1e-10, max_iter=1000).fit(x.numpy(), y.numpy())


@pytest.mark.parametrize("strength", [1e-4, 1e-2, 1.0, 30.0])
def test_the_minimum_is_that_of_scikit_learn(strength: float) -> None:
    x, y, val, _ = digits()
    ours, oracle = Problem(x, y, 10).solve(strength, tolerance=1e-12), theirs(x, y, strength)
    weight = torch.from_numpy(oracle.coef_.T)
    assert torch.allclose(ours.weight, weight, atol=2e-5 * float(weight.abs().max()) + 1e-7)
    penalty = weight.square().sum() / (2 * strength * len(x))
    loss = F.cross_entropy(x @ weight + torch.from_numpy(oracle.intercept_), y) + penalty
    assert ours.loss == pytest.approx(float(loss), rel=1e-8) and ours.gradient <= 1e-12
    probabilities = torch.from_numpy(oracle.predict_proba(val.numpy()))
    assert torch.allclose(ours.logits(val).softmax(1), probabilities, atol=1e-5)


@pytest.mark.parametrize("strength", [1e-3, 1.0])
def test_two_classes_are_scikit_learns_single_vector(strength: float) -> None:
    data: Any = load_breast_cancer()
    x, y = torch.from_numpy(StandardScaler().fit_transform(data.data)), torch.from_numpy(data.target)
    ours, oracle = Problem(x, y, 2).solve(strength, tolerance=1e-9), theirs(x, y, strength)
    difference = ours.weight[:, 1] - ours.weight[:, 0]
    assert torch.allclose(difference, torch.from_numpy(oracle.coef_[0]), atol=1e-5)
    assert float(ours.bias[1] - ours.bias[0]) == pytest.approx(np.asarray(oracle.intercept_)[0], abs=1e-5)


def test_single_precision_finds_the_same_answers() -> None:
    x, y, val, _ = digits()
    exact = Problem(x, y, 10).solve(1.0, tolerance=1e-9)
    single = Problem(x.float(), y, 10).solve(1.0)
    assert single.gradient <= 1e-5 and single.loss == pytest.approx(exact.loss, rel=1e-3)
    same = single.logits(val.float()).argmax(1) == exact.logits(val).argmax(1)
    assert same.double().mean() > 0.995


def test_where_it_starts_does_not_matter_but_saves_iterations() -> None:
    x, y, *_ = digits()
    problem = Problem(x, y, 10)
    cold = problem.solve(0.1, tolerance=1e-8)
    warm = problem.solve(0.1, start=problem.solve(0.05, tolerance=1e-8), tolerance=1e-8)
    assert torch.allclose(cold.weight, warm.weight, atol=1e-5) and warm.iterations < cold.iterations


def test_features_that_are_not_centred_have_the_same_minimum() -> None:
    x, y, *_ = digits(300)
    shifted = Problem(x + 3, y, 10).solve(0.1, tolerance=1e-9)
    assert torch.allclose(shifted.weight, Problem(x, y, 10).solve(0.1, tolerance=1e-9).weight, atol=1e-6)


def test_fewer_samples_than_features_and_equal_features_are_solved() -> None:
    x, y, *_ = digits(40)
    ours, oracle = Problem(x, y, 10).solve(1.0, tolerance=1e-9), theirs(x, y, 1.0)
    assert np.allclose(ours.weight[:, oracle.classes_].T, oracle.coef_, atol=1e-5)


def test_a_class_without_a_sample_is_never_the_answer() -> None:
    x, y, val, _ = digits()
    some = y != 3
    ours = Problem(x[some], y[some], 10).solve(0.1)
    assert 3 not in ours.logits(val).argmax(1) and ours.bias[3] == float("-inf")
    with pytest.raises(MaekitError, match="E-DATA-CLASSES"):
        Problem(x[y == 3], y[y == 3], 10)


def test_separable_data_end() -> None:
    x, y = torch.tensor([[-1.0], [-2.0], [1.0], [2.0]]), torch.tensor([0, 0, 1, 1])
    ours = Problem(x, y, 2).solve(1e5)
    assert ours.top1(x, y) == 1.0 and torch.isfinite(ours.weight).all()


def test_standardised_features_are_those_of_scikit_learn() -> None:
    data: Any = load_digits()  # has pixels that are always 0
    x = torch.tensor(data.data)
    scaler = StandardScaler().fit(data.data[:900])
    for ours, part in zip(standardise(x[:900], x[900:]), (data.data[:900], data.data[900:]), strict=True):
        assert np.allclose(ours.numpy(), scaler.transform(part), atol=1e-12)


def test_a_fifth_of_each_class_is_spared_and_a_single_sample_is_not() -> None:
    y = torch.tensor([0] * 20 + [1] * 3 + [2])
    held = spare(y, 5)
    assert [int(held[y == label].sum()) for label in range(3)] == [4, 1, 0]
    assert torch.equal(held, spare(y, 5)) and not torch.equal(held, spare(y, 6))


def test_the_chosen_strength_does_best_on_labels_held_out_of_training() -> None:
    x, y, val, val_y = digits()
    choice = choose(x, y, 10, seed=0)
    held = spare(y, 0)
    losses = {}
    for strength in STRENGTHS[8:13]:
        probabilities = torch.from_numpy(theirs(x[~held], y[~held], strength).predict_proba(x[held].numpy()))
        losses[strength] = float(F.nll_loss(probabilities.log(), y[held]))
    assert choice.solved.strength == min(losses, key=lambda strength: losses[strength])
    assert choice.held_loss == pytest.approx(min(losses.values()), rel=1e-3)
    assert choice.solved.top1(val, val_y) > 0.94
    again = theirs(x, y, choice.solved.strength)
    assert choice.solved.top1(val, val_y) == pytest.approx(again.score(val.numpy(), val_y.numpy()), abs=0.005)


def test_one_label_a_class_leaves_nothing_to_choose_by() -> None:
    x, y, val, val_y = digits()
    first = torch.stack([(y == label).nonzero()[0, 0] for label in range(10)])
    choice = choose(x[first], y[first], 10, seed=0)
    assert choice.held_top1 is choice.held_loss is None and choice.solved.strength == UNCHOSEN
    assert choice.solved.top1(val, val_y) > 0.4
