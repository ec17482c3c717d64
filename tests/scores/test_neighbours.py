"""Neighbours are those of a plain sort, votes those of scikit-learn, whatever the sizes."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.nn import functional as F

from maekit.scores import neighbours
from maekit.scores.neighbours import Neighbours, knn_sweep, knn_top1, nearest, vote

Part = tuple[Tensor, Tensor]


def digits() -> tuple[Part, Part]:
    data: Any = load_digits()
    values, labels = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    return (values[order[:900]], labels[order[:900]]), (values[order[900:]], labels[order[900:]])


def oracle(train: Part, val: Part, k: int, temperature: float) -> np.ndarray:
    weights: Any = lambda distance: np.exp((1 - distance) / temperature)  # noqa: E731
    model = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights)
    return model.fit(train[0].numpy(), train[1].numpy()).predict(val[0].numpy())


@pytest.mark.parametrize(("k", "temperature"), [(20, 0.07), (1, 0.07), (5, 1.0), (200, 0.02)])
def test_the_vote_is_that_of_scikit_learn(k: int, temperature: float) -> None:
    train, val = digits()
    found = vote(nearest(train[0], val[0], k), train[1], 10, k=k, temperature=temperature)
    expected = torch.from_numpy(oracle(train, val, k, temperature))
    assert int((found != expected).sum()) <= 1 and (found == val[1]).float().mean() > 0.9


def test_a_sweep_votes_as_each_look_up_does() -> None:
    train, val = digits()
    swept = knn_sweep(train, val, 10, ks=[1, 5, 20], temperatures=[0.07, 1.0])
    assert list(swept) == [(k, t) for k in (1, 5, 20) for t in (0.07, 1.0)]
    assert all(score == knn_top1(train, val, 10, k=k, temperature=t) for (k, t), score in swept.items())


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 2000), k=st.integers(1, 40), seed=st.integers(0, 99))
def test_the_neighbours_are_those_of_a_plain_sort(rows: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bank, queries = torch.randn(rows, 6, generator=generator), torch.randn(5, 6, generator=generator)
    found = nearest(bank, queries, k)
    similarity = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
    assert torch.equal(found.similarity, similarity.sort(1, descending=True).values[:, :k])
    assert torch.equal(similarity.gather(1, found.index), found.similarity)
    assert all(len(set(row)) == len(row) for row in found.index.tolist())


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    train, val = digits()
    whole = nearest(train[0], val[0], 7)
    monkeypatch.setattr(neighbours, "SIMILARITIES", 900 * 13)
    parts = nearest(train[0], val[0], 7)
    assert torch.allclose(parts.similarity, whole.similarity, atol=1e-6)


def test_more_neighbours_than_images_are_all_of_them() -> None:
    train, val = digits()
    few = (train[0][:10], train[1][:10])
    assert knn_top1(few, val, 10, k=20, temperature=0.07) == knn_top1(few, val, 10, k=10, temperature=0.07)


def test_a_tiny_temperature_does_not_overflow() -> None:
    train, val = digits()
    one = knn_top1(train, val, 10, k=1, temperature=0.07)
    assert knn_top1(train, val, 10, k=20, temperature=1e-4) == pytest.approx(one, abs=0.01)


def test_the_smaller_class_wins_a_tie() -> None:
    found = Neighbours(torch.ones(1, 4), torch.tensor([[0, 1, 2, 3]]))
    assert vote(found, torch.tensor([2, 1, 2, 1]), 3, k=4, temperature=1.0).tolist() == [1]
