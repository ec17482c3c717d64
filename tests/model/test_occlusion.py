"""Occlusion against the plain model, against pictures made by hand, and its nesting."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

from maekit.errors import MaekitError
from maekit.model.encoder import create_encoder
from maekit.model.occlusion import blacken, drop, shuffle

N = 16


@pytest.fixture(scope="module", params=["mean", "cls"])
def classifier(request: pytest.FixtureRequest) -> VisionTransformer:
    torch.manual_seed(0)
    return create_encoder(
        "vit_tiny_patch16_224", img_size=(16, 16), patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=5,
        pool=request.param,
    ).eval()  # fmt: skip


@torch.no_grad()
def test_dropping_nothing_is_the_plain_model(classifier: VisionTransformer) -> None:
    images, noise = torch.randn(3, 3, 16, 16), torch.rand(3, N)
    torch.testing.assert_close(drop(classifier, images, noise, 0.0), classifier(images))


@torch.no_grad()
def test_what_is_dropped_has_no_influence_and_what_is_kept_has(classifier: VisionTransformer) -> None:
    images = torch.randn(1, 3, 16, 16)
    noise = torch.arange(N, dtype=torch.float)[None]  # the last go first: at a half, the lower two rows of patches
    other = images.clone()
    other[:, :, 8:] = 7.0
    assert torch.equal(drop(classifier, images, noise, 0.5), drop(classifier, other, noise, 0.5))
    other[:, :, :4] = 7.0
    assert not torch.allclose(drop(classifier, images, noise, 0.5), drop(classifier, other, noise, 0.5))


@torch.no_grad()
def test_dropping_is_the_classifier_on_the_tokens_that_are_left(classifier: VisionTransformer) -> None:
    """Oracle: timm's own pieces, with the removed tokens cut out after the positions were added."""
    images, noise = torch.randn(2, 3, 16, 16), torch.rand(2, N)
    kept = noise.argsort(1)[:, :4]
    tokens = classifier._pos_embed(classifier.patch_embed(images))
    rows = [torch.cat([tokens[b, :1], tokens[b, 1:][kept[b]]]) for b in range(2)]
    expected = classifier.forward_head(classifier.norm(classifier.blocks(torch.stack(rows))))
    torch.testing.assert_close(drop(classifier, images, noise, 0.75), expected)


def test_black_patches_and_places_by_hand() -> None:
    images = torch.arange(4.0).reshape(1, 1, 2, 2)  # four patches of one pixel
    noise = torch.tensor([[0.1, 0.9, 0.2, 0.8]])  # 1 and 3 go at a half, in the order 3, 1
    assert blacken(images, noise, 0.5, 1, torch.tensor([-5.0])).flatten().tolist() == [0, -5, 2, -5]
    assert shuffle(images, noise, 0.5, 1).flatten().tolist() == [0, 3, 2, 1]


def test_black_is_black_in_every_channel() -> None:
    images, black = torch.rand(2, 3, 8, 8), torch.tensor([-1.0, -2.0, -3.0])
    found = blacken(images, torch.rand(2, 4), 0.75, 4, black)
    changed = (found != images).any(1)
    assert changed.sum() == 2 * 3 * 16
    assert torch.equal(found.permute(0, 2, 3, 1)[changed], black.expand(96, 3))


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 0.9), st.integers(0, 99))
def test_shuffling_keeps_every_patch_and_moves_just_the_fraction(fraction: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.arange(float(N)).reshape(1, 1, 4, 4)
    found = shuffle(images, torch.rand(1, N, generator=generator), fraction, 1).flatten()
    moved = int((found != images.flatten()).sum())
    gone = N - int(N * (1 - fraction) + 1e-6)
    assert sorted(found.tolist()) == list(range(N)) and moved == (gone if gone > 1 else 0)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.05, 0.45), st.integers(0, 99))
def test_what_is_gone_at_a_smaller_fraction_is_gone_at_a_larger(fraction: float, seed: int) -> None:
    noise = torch.rand(2, N, generator=torch.Generator().manual_seed(seed))
    images = torch.ones(2, 1, 4, 4)
    small, large = (blacken(images, noise, f, 1, torch.zeros(1)) == 0 for f in (fraction, 2 * fraction))
    assert not (small & ~large).any()


def test_a_fraction_that_leaves_nothing_is_refused(classifier: VisionTransformer) -> None:
    with pytest.raises(MaekitError, match="E-CONFIG-MASK"):
        drop(classifier, torch.randn(1, 3, 16, 16), torch.rand(1, N), 0.99)
