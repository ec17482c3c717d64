"""The light Transformer that fills in: latent where a patch was kept, the mask token where it was removed.

Used in pre-training only; its width and depth are free of the encoder's (paper section 4.1: 8 blocks of 512). Every
prefix token of the encoder (class token, registers, none) goes through the decoder as well, with a position of zeros,
and gives no prediction.

Departures from the paper's default row: a latent of full length brings no mask token (paper table 1c); no blocks at
all are a linear head on such a latent, as BEiT's; "cross" lets mask tokens attend to the latent and not to one another,
so that each place is decoded by itself (CrossMAE, arXiv 2401.14391).

In training only some patches are asked for, and what the last block makes of the others goes nowhere: there they are
attended to, and that is all. The numbers are the same.

B batch, N patches, K kept patches, M patches wanted, D encoder width, Dd decoder width, T tokens with prefix.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from maekit.errors import MaekitError
from maekit.model.encoder import check_block, initialise_linear
from maekit.model.patches import place, select, sincos_2d
from maekit.model.variant import PAPER, Variant


class Decoder(nn.Module):
    """Project, put every token in its place, add positions, run the blocks; `predict` what is asked for.

    Args:
        embed_dim: D, the encoder's width.
        dim: Dd, a multiple of 4; without blocks it plays no part, nor do heads.
        depth: number of blocks; 0: a linear head on the latent, which has to be of full length.
        num_heads: must divide Dd.
        grid: rows and columns of patches.
        num_prefix: tokens before the patches.
        num_values: values per patch to predict.
        variant: whether the latent is of full length, what attends to what, what positions are.

    Attributes:
        parts: whether only the patches that are wanted are decoded, in place of all.
        checkpointing: blocks whose activations are computed anew together in the backward pass; 0: none.

    Raises:
        MaekitError: E-CONFIG-WIDTH, E-CONFIG-DEPTH, E-CONFIG-HEADS.
    """

    def __init__(
        self,
        embed_dim: int,
        dim: int,
        depth: int,
        num_heads: int,
        *,
        grid: tuple[int, int],
        num_prefix: int,
        num_values: int,
        variant: Variant = PAPER,
    ) -> None:
        super().__init__()
        self.num_prefix, self.num_patches = num_prefix, grid[0] * grid[1]
        self.depth, self.full_length, self.cross = depth, variant.full_length, variant.decoder_kind == "cross"
        self.parts = self.cross or variant.decode_ratio is not None
        self.checkpointing = 0
        if depth == 0:
            _check_head_alone(variant)
            self.pred = nn.Linear(embed_dim, num_values)
            self.apply(initialise_linear)
            return
        check_block("decoder", dim, depth, num_heads)
        norm: Any = partial(nn.LayerNorm, eps=1e-6)  # official models_mae.py; torch's default is 1e-5
        self.embed = nn.Linear(embed_dim, dim)
        if not self.full_length:
            self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        prefix = 0 if self.cross else num_prefix  # nobody asks what a prefix token looks like
        self.pos_embed = nn.Parameter(sincos_2d(dim, grid, prefix)[None], requires_grad=False)
        if self.cross:
            self.blocks = nn.ModuleList(CrossBlock(dim, num_heads) for _ in range(depth))
        else:
            self.blocks = nn.Sequential(
                *(Block(dim, num_heads, mlp_ratio=4, qkv_bias=True, norm_layer=norm) for _ in range(depth))
            )
        self.norm = norm(dim)
        self.pred = nn.Linear(dim, num_values)
        self.apply(initialise_linear)
        if not self.full_length:
            nn.init.normal_(self.mask_token, std=0.02)
        if variant.positions == "learned":
            nn.init.normal_(self.pos_embed, std=0.02)
            self.pos_embed.requires_grad_(True)

    def forward(self, latent: Tensor, ids_keep: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return tokens of patches (B, M, Dd), before the final norm.

        Args:
            latent: (B, prefix + K, D); of full length: (B, prefix + N, D) in image order.
            ids_keep: (B, K) the place of each kept patch.
            ids: (B, M) the patches wanted; None: all, in image order.
        """
        if self.depth == 0:
            return _wanted(latent[:, self.num_prefix :], ids)
        # Under autocast the projection is bfloat16; the sum of blocks starts in the precision of the weights.
        tokens = self.embed(latent).to(self.pos_embed.dtype)
        if self.cross:
            return self._ask(tokens, ids)
        prefix, kept = tokens.split([self.num_prefix, tokens.shape[1] - self.num_prefix], dim=1)
        if self.parts and ids is not None:
            return self._decode_some(prefix, kept, ids_keep, ids)
        if not self.full_length:
            tokens = torch.cat([prefix, place(kept, ids_keep, self.mask_token, self.num_patches)], dim=1)
        tokens = tokens + self.pos_embed
        if ids is None or ids.shape[1] == self.num_patches:
            return _wanted(self._blocks(tokens)[:, self.num_prefix :], ids)
        return self._blocks(tokens, ids + self.num_prefix)

    def predict(self, tokens: Tensor) -> Tensor:
        """Return predictions (B, M, values) for any selection of tokens (B, M, Dd)."""
        return self.pred(tokens if self.depth == 0 else self.norm(tokens))

    def _decode_some(self, prefix: Tensor, kept: Tensor, ids_keep: Tensor, ids: Tensor) -> Tensor:
        """Decode the wanted places beside those that were kept; the other removed ones are left out."""
        first, places = self.pos_embed[0].split([self.num_prefix, self.num_patches])
        asked = self.mask_token.expand(ids.shape[0], ids.shape[1], -1) + F.embedding(ids, places)
        tokens = torch.cat([prefix + first, kept + F.embedding(ids_keep, places), asked], dim=1)
        last = torch.arange(tokens.shape[1] - ids.shape[1], tokens.shape[1], device=ids.device)
        return self._blocks(tokens, last.expand_as(ids))

    def _ask(self, memory: Tensor, ids: Tensor | None) -> Tensor:
        """Let a mask token for each wanted place attend to what the encoder saw."""
        places = self.pos_embed[0]
        asked = places.expand(memory.shape[0], -1, -1) if ids is None else F.embedding(ids, places)
        tokens = self.mask_token + asked
        blocks = [*self.blocks]
        if not (self.checkpointing and self.training):
            return _through(blocks, tokens, memory)
        for start in range(0, len(blocks), self.checkpointing):
            some = blocks[start : start + self.checkpointing]
            tokens = checkpoint(_through, some, tokens, memory, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
        return tokens

    def _blocks(self, tokens: Tensor, ids: Tensor | None = None) -> Tensor:
        """Run the blocks, the last one only as far as tokens (B, M) of `ids` need it."""
        assert isinstance(self.blocks, nn.Sequential)
        anew = self.checkpointing if self.training else 0
        blocks, last = (self.blocks, None) if ids is None else (self.blocks[:-1], self.blocks[-1])
        tokens = checkpoint_seq(blocks, tokens, every=anew) if anew and len(blocks) else blocks(tokens)
        if last is None:
            return tokens
        if anew:
            tokens = checkpoint(_some_of_block, last, tokens, ids, use_reentrant=False)
            assert isinstance(tokens, Tensor)
            return tokens
        return _some_of_block(last, tokens, ids)


def _through(blocks: Sequence[nn.Module], tokens: Tensor, memory: Tensor) -> Tensor:
    for block in blocks:
        tokens = block(tokens, memory)
    return tokens


class CrossBlock(nn.Module):
    """Attention from wanted places to what the encoder saw, then an MLP; no attention among the wanted ones.

    CrossMAE (arXiv 2401.14391, section 3.2).
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, tokens: Tensor, memory: Tensor) -> Tensor:
        """Return tokens (B, M, Dd) after they looked at memory (B, T, Dd)."""
        query = _heads(self.q(self.norm1(tokens)), self.num_heads)
        key, value = (_heads(part, self.num_heads) for part in self.kv(memory).chunk(2, dim=-1))
        seen = F.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.proj(seen.transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.norm2(tokens))


def _some_of_block(block: nn.Module, tokens: Tensor, ids: Tensor | None) -> Tensor:
    """Return what one of the decoder's blocks makes of some of its tokens: (B, M, Dd) of tokens (B, T, Dd).

    timm's block without what the decoder does not use (layer scale, drop path, norms of queries and keys).
    """
    assert isinstance(block, Block) and isinstance(block.attn, Attention) and ids is not None
    attend, normed = block.attn, block.norm1(tokens)
    (w_query, w_rest), (b_query, b_rest) = (
        part.split([attend.attn_dim, 2 * attend.attn_dim]) for part in (attend.qkv.weight, attend.qkv.bias)
    )
    query = _heads(F.linear(select(normed, ids), w_query, b_query), attend.num_heads)
    rest = F.linear(normed, w_rest, b_rest).chunk(2, dim=-1)
    key, value = (_heads(part, attend.num_heads) for part in rest)
    seen = F.scaled_dot_product_attention(query, key, value)
    chosen = select(tokens, ids) + attend.proj(seen.transpose(1, 2).flatten(2))
    return chosen + block.mlp(block.norm2(chosen))


def _heads(tokens: Tensor, num_heads: int) -> Tensor:
    """Return (B, heads, T, width of one) of tokens (B, T, D)."""
    return tokens.unflatten(2, (num_heads, -1)).transpose(1, 2)


def _wanted(tokens: Tensor, ids: Tensor | None) -> Tensor:
    return tokens if ids is None else select(tokens, ids)


def _check_head_alone(variant: Variant) -> None:
    if not variant.full_length:
        raise MaekitError(
            "E-CONFIG-DEPTH", "setting decoder_depth", found="0, a linear head, for an encoder of visible patches",
            expected="an encoder that runs on all places: a head alone cannot know what was removed",
            hint="--encoder-mask-token, or --decoder-depth 1",
        )  # fmt: skip
