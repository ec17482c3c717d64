"""What one image costs in floating-point operations, counted from shapes: nothing is run.

Counted are matrix products (linear layers and attention), two operations per multiplication and addition; norms,
activations, softmax and the loss are left out, as everywhere in the literature (ViT-L: below 1 %). The backward pass
costs twice the forward one, a product for the gradient of each factor; only the projection of the patches has no
gradient of its input. So the sum of both is what "model FLOPs" means in a utilisation (MFU): kernels that compute
attention again while going backward, and activation checkpointing, do more work and not more of this.

K kept patches, N patches, T tokens, D width.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from maekit.model.decoder import CrossBlock
from maekit.model.mae import MaskedAutoencoder, create_model
from maekit.model.masking import len_keep


@dataclass(frozen=True)
class Passes:
    """Operations of one part on one image."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Both passes: what a step of training costs."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Flops:
    """Operations on one image; a multiplication and an addition are two."""

    encoder: Passes
    decoder: Passes

    @property
    def forward(self) -> int:
        """Of encoder and decoder."""
        return self.encoder.forward + self.decoder.forward

    @property
    def backward(self) -> int:
        """Of encoder and decoder."""
        return self.encoder.backward + self.decoder.backward

    @property
    def total(self) -> int:
        """Of a training step, without the optimizer's few operations per weight."""
        return self.forward + self.backward


def flops(model: MaskedAutoencoder, mask_ratio: float = 0.75, *, every_patch: bool = False) -> Flops:
    """Count what `MaskedAutoencoder.loss` costs for one image; what makes the target is not counted.

    Args:
        model: of any variant, on any device, meta too.
        mask_ratio: share of patches removed; no part where nothing is ever removed.
        every_patch: count as the authors' code computes: all patches are projected before they are masked, and the
            decoder's last block and the prediction are made of every token, the prefix too. ViT-L: 1.3 % more.

    Raises:
        MaekitError: E-CONFIG-MASK for a ratio that keeps no patch or all, E-CONFIG-DECODER for one that removes fewer
            than are decoded.
    """
    encoder, decoder = model.encoder, model.decoder
    keep, scored = _counts(model, mask_ratio)
    latent, decoded = _tokens(model, keep, scored)
    embedding = _weights(encoder.patch_embed) * (model.num_patches if every_patch else keep)
    encoding = _blocks(encoder.blocks, latent)
    if decoder.depth == 0:
        decoding = 0
    elif decoder.cross:
        decoding = _weights(decoder.embed) * latent + _cross_blocks(decoder.blocks, decoded, latent)
    else:
        decoding = _weights(decoder.embed) * latent + _blocks(decoder.blocks, decoded)
        if scored < model.num_patches and not every_patch:
            decoding -= _spared(decoder.blocks[-1], decoded, scored)
    decoding += _weights(decoder.pred) * (decoded if every_patch else scored)
    return Flops(Passes(2 * (encoding + embedding), 2 * (2 * encoding + embedding)), Passes(2 * decoding, 4 * decoding))


def attention_flops(model: MaskedAutoencoder, mask_ratio: float = 0.75) -> int:
    """Count, of the total of `flops`, the products among tokens: what grows with the square of their number.

    Raises:
        MaekitError: as `flops`.
    """
    decoder = model.decoder
    keep, scored = _counts(model, mask_ratio)
    latent, decoded = _tokens(model, keep, scored)
    pairs = latent**2 * sum(map(_attention_width, model.encoder.blocks))
    if decoder.cross:
        pairs += (
            decoded * latent * sum(block.q.out_features for block in decoder.blocks if isinstance(block, CrossBlock))
        )
    elif decoder.depth:
        pairs += decoded**2 * sum(map(_attention_width, decoder.blocks))
        if scored < model.num_patches:
            pairs -= (decoded - scored) * decoded * _attention_width(decoder.blocks[-1])
    return 3 * 2 * 2 * pairs  # passes; operations; queries with keys and weights with values


def _tokens(model: MaskedAutoencoder, keep: int, scored: int) -> tuple[int, int]:
    """Return how many tokens of an image run through the encoder and through the decoder."""
    decoder, prefix = model.decoder, model.encoder.num_prefix_tokens
    latent = prefix + (model.num_patches if model.variant.full_length else keep)
    if decoder.depth == 0:
        return latent, latent
    if decoder.cross:
        return latent, scored
    return latent, prefix + (keep + scored if decoder.parts else model.num_patches)


def _counts(model: MaskedAutoencoder, mask_ratio: float) -> tuple[int, int]:
    """Return how many patches of an image the encoder is given, and how many enter the loss."""
    variant, count = model.variant, model.num_patches
    if variant.mask_kind == "none":
        return count, count
    model.check_decode_ratio(mask_ratio)
    keep = len_keep(count // variant.mask_unit**2, mask_ratio) * variant.mask_unit**2
    removed = count - keep if variant.decode_ratio is None else int(count * variant.decode_ratio + 1e-6)
    return keep, {"masked": removed, "all": count, "visible": keep}[variant.loss_on]


def flops_of(mask_ratio: float = 0.75, *, every_patch: bool = False, **spec: Any) -> Flops:
    """Count for a model that `create_model` would build with `spec`; no weights are allocated.

    Args:
        mask_ratio: share of patches removed.
        every_patch: as for `flops`.
        spec: arguments of `create_model`.

    Raises:
        MaekitError: as `create_model` and `flops`.
    """
    with torch.device("meta"):
        return flops(create_model(**spec), mask_ratio, every_patch=every_patch)


def encoder_flops(model: MaskedAutoencoder) -> int:
    """Count a forward pass of the whole encoder on one whole image, as for features or a classifier without head."""
    num_patches, prefix = model.num_patches, model.encoder.num_prefix_tokens
    embedding = _weights(model.encoder.patch_embed) * num_patches
    return 2 * (embedding + _blocks(model.encoder.blocks, prefix + num_patches))


def _blocks(blocks: Iterable[nn.Module], tokens: int) -> int:
    """Return the multiplications of Transformer blocks: every linear layer per token, and all pairs of tokens twice."""
    return sum(_weights(block) * tokens + 2 * tokens**2 * _attention_width(block) for block in blocks)


def _spared(block: nn.Module, tokens: int, wanted: int) -> int:
    """Return the multiplications that a block is spared where only some of its tokens are wanted of it."""
    width = _attention_width(block)
    keys_and_values = _weights(block.get_submodule("attn.qkv")) * 2 // 3
    return (tokens - wanted) * (_weights(block) - keys_and_values + 2 * tokens * width)


def _cross_blocks(blocks: Iterable[nn.Module], tokens: int, seen: int) -> int:
    """Return the multiplications of blocks whose tokens attend to what was seen and not to one another."""
    total = 0
    for block in blocks:
        assert isinstance(block, CrossBlock)
        looked_at = _weights(block.kv)
        total += looked_at * seen + (_weights(block) - looked_at) * tokens + 2 * tokens * seen * block.q.out_features
    return total


def _attention_width(block: nn.Module) -> int:
    """Return the width of all heads together, that of queries and keys."""
    width = block.get_submodule("attn").attn_dim
    assert isinstance(width, int)
    return width


def _weights(module: nn.Module) -> int:
    """Return the multiplications of a module's linear maps for one token."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d))
