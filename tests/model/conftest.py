"""Small models of every kind that an encoder can be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from maekit.model.mae import MaskedAutoencoder, create_model

TINY: dict[str, Any] = {
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "decoder_dim": 16,
    "decoder_depth": 2,
    "decoder_heads": 4,
}

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8},
    "patch 14": {"name": "vit_huge_patch14_224", "img_size": 42},
    "not square": {"name": "vit_tiny_patch16_224", "img_size": (16, 40), "patch_size": 8},
    "five channels": {"name": "vit_tiny_patch16_224", "img_size": 24, "patch_size": 6, "in_chans": 5},
    "one channel": {"name": "vit_tiny_patch16_224", "img_size": 28, "patch_size": 7, "in_chans": 1},
    "registers and class token": {"name": "vit_small_patch14_reg4_dinov2", "img_size": 42},
    "registers, no class token": {"name": "vit_medium_patch16_reg4_gap_256", "img_size": 48},
    "no class token": {"name": "vit_base_patch16_siglip_gap_224", "img_size": 48},
    "norm before blocks": {"name": "vit_base_patch16_clip_224", "img_size": 48},
    "class token without position": {"name": "deit3_small_patch16_224", "img_size": 48},
}

Build = Callable[..., MaskedAutoencoder]


@pytest.fixture
def build() -> Build:
    """Return a function: name of a kind, changed settings -> a tiny model, the same weights each time."""

    def make(kind: str = "plain", **changes: Any) -> MaskedAutoencoder:
        torch.manual_seed(0)
        return create_model(**{**KINDS[kind], **TINY, **changes})

    return make


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Run the test for every kind of encoder."""
    return request.param
