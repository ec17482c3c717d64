"""Losses against torch's own and by hand; no loss depends on how a batch is cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from timm.data.mixup import Mixup
from timm.loss.binary_cross_entropy import BinaryCrossEntropy
from torch.nn import functional as F

from maekit.train.losses import balanced_weights, number_loss, soft_targets, supervised_loss, tag_loss, tag_weights


@settings(deadline=None, max_examples=30)
@given(classes=st.integers(2, 9), count=st.sampled_from([2, 4, 8]), mixup=st.sampled_from([0.0, 0.8]),
       smoothing=st.sampled_from([0.0, 0.1]), prob=st.sampled_from([0.3, 1.0]))  # fmt: skip
def test_targets_sum_to_one_mixed_or_not(classes: int, count: int, mixup: float, smoothing: float, prob: float) -> None:
    labels = torch.arange(count) % classes
    plain = soft_targets(labels, classes, smoothing)
    torch.testing.assert_close(plain.sum(1), torch.ones(count))
    mix = Mixup(mixup_alpha=mixup, cutmix_alpha=1.0, prob=prob, label_smoothing=smoothing, num_classes=classes)
    _, targets = mix(torch.randn(count, 3, 8, 8), labels)
    torch.testing.assert_close(targets.sum(1), torch.ones(count))


def test_soft_targets_give_the_smoothed_cross_entropy_of_torch() -> None:
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    mine = supervised_loss(logits, soft_targets(labels, 5, 0.1), kind="cross-entropy")
    torch.testing.assert_close(mine, F.cross_entropy(logits, labels, label_smoothing=0.1))


def test_bce_is_timms() -> None:
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    mine = supervised_loss(logits, soft_targets(labels, 5, 0.1), kind="bce")
    torch.testing.assert_close(mine, BinaryCrossEntropy(smoothing=0.1)(logits, labels))


def test_balanced_weights_are_scikit_learns_and_average_to_one() -> None:
    labels = [0] * 6 + [1] * 3 + [2]
    weights = balanced_weights(labels, 3)
    theirs = compute_class_weight("balanced", classes=torch.arange(3).numpy(), y=torch.tensor(labels).numpy())
    assert weights.tolist() == pytest.approx(theirs.tolist())
    assert float(weights[labels].mean()) == pytest.approx(1.0)
    assert balanced_weights([0, 0, 2], 3)[1] == 0


@pytest.mark.parametrize("kind", ["cross-entropy", "bce"])
@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 5.0, 0.2])])
def test_the_loss_of_a_batch_is_the_mean_over_its_parts_by_images(kind: str, weights: torch.Tensor | None) -> None:
    logits, labels = torch.randn(7, 3), torch.tensor([0, 0, 1, 2, 2, 1, 0])
    targets = soft_targets(labels, 3, 0.1)
    whole = supervised_loss(logits, targets, kind=kind, weights=weights)
    parts = [supervised_loss(logits[i:j], targets[i:j], kind=kind, weights=weights) * (j - i)
             for i, j in ((0, 2), (2, 3), (3, 7))]  # fmt: skip
    torch.testing.assert_close(whole, torch.stack(parts).sum() / 7)


def test_a_weighted_loss_by_hand() -> None:
    logits = torch.zeros(2, 2)  # every probability is a half
    loss = supervised_loss(logits, soft_targets(torch.tensor([0, 1]), 2, 0.0), kind="cross-entropy",
                           weights=torch.tensor([2.0, 4.0]))  # fmt: skip
    assert float(loss) == pytest.approx((2 + 4) / 2 * 0.693147, rel=1e-5)


def test_the_loss_of_tags_is_binary_cross_entropy_smoothed_towards_one_half() -> None:
    logits, tags = torch.randn(6, 3), torch.randint(0, 2, (6, 3)).float()
    probability, soft = logits.sigmoid(), tags * 0.9 + 0.05
    by_hand = -(soft * probability.log() + (1 - soft) * (1 - probability).log()).mean()
    torch.testing.assert_close(tag_loss(logits, tags, smoothing=0.1), by_hand)
    torch.testing.assert_close(tag_loss(logits, tags), F.binary_cross_entropy(probability, tags))


def test_images_with_a_tag_weigh_as_much_as_those_without() -> None:
    tags = torch.tensor([[1, 0, 1], [0, 0, 1], [0, 0, 1], [0, 0, 1]]).float()
    weights = tag_weights(tags)
    assert weights.tolist() == [3.0, 1.0, 1.0]
    one = tag_loss(torch.zeros(4, 1), tags[:, :1], weights=weights[:1]) * 4 / F.softplus(torch.zeros(())).item()
    torch.testing.assert_close(one, torch.tensor(6.0))


def test_the_loss_of_numbers_is_torchs() -> None:
    said, true = torch.randn(6, 3) * 3, torch.randn(6, 3)
    torch.testing.assert_close(number_loss(said, true, kind="mse"), (said - true).square().mean())
    gap = (said - true).abs()
    torch.testing.assert_close(
        number_loss(said, true, kind="huber"), torch.where(gap < 1, gap.square() / 2, gap - 0.5).mean()
    )
