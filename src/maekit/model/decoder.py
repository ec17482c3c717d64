"""The light Transformer that sees all places: latent where a patch was kept, the mask token where it was removed.

Used in pre-training only; its width and depth are free of the encoder's (paper section 4.1: 8 blocks of 512). Every
prefix token of the encoder (class token, registers, none) goes through the decoder as well, with a position of zeros,
and gives no prediction.

B batch, N patches, K kept patches, M masked ones, D encoder width, Dd decoder width, T tokens with prefix.
"""

from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from maekit.model.encoder import check_block, initialise_linear
from maekit.model.patches import sincos_2d


class Decoder(nn.Module):
    """Project, put every token in its place, add positions, run the blocks; `predict` what is asked for.

    Args:
        embed_dim: D, the encoder's width.
        dim: Dd, a multiple of 4.
        depth: number of blocks.
        num_heads: must divide Dd.
        grid: rows and columns of patches.
        num_prefix: tokens before the patches.
        num_values: values per patch to predict, P*P*C.

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
    ) -> None:
        super().__init__()
        check_block("decoder", dim, depth, num_heads)
        self.num_prefix = num_prefix
        norm: Any = partial(nn.LayerNorm, eps=1e-6)  # official models_mae.py; torch's default is 1e-5
        self.embed = nn.Linear(embed_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_2d(dim, grid, num_prefix)[None], requires_grad=False)
        self.blocks = nn.Sequential(
            *(Block(dim, num_heads, mlp_ratio=4, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        )
        self.norm = norm(dim)
        self.pred = nn.Linear(dim, num_values)
        self.apply(initialise_linear)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, ids_keep: Tensor) -> Tensor:
        """Return tokens of all patches in image order (B, N, Dd), before the final norm.

        Args:
            latent: (B, prefix + K, D).
            ids_keep: (B, K) the place of each kept patch.
        """
        # Under autocast the projection is bfloat16; the sum of blocks starts in the precision of the weights.
        tokens = self.embed(latent).to(self.pos_embed.dtype)
        prefix, kept = tokens.split([self.num_prefix, ids_keep.shape[1]], dim=1)
        tokens = torch.cat([prefix, self.place(kept, ids_keep)], dim=1)
        return self.blocks(tokens + self.pos_embed)[:, self.num_prefix :]

    def place(self, kept: Tensor, ids_keep: Tensor) -> Tensor:
        """Put kept tokens (B, K, Dd) where they belong among mask tokens: (B, N, Dd).

        One scatter in place of the paper's append and unshuffle; the same values and gradients.
        """
        num_patches = self.pos_embed.shape[1] - self.num_prefix
        everywhere = self.mask_token.expand(kept.shape[0], num_patches, -1)
        return everywhere.scatter(1, ids_keep[:, :, None].expand_as(kept), kept)

    def predict(self, tokens: Tensor) -> Tensor:
        """Return predictions (B, M, P*P*C) for any selection of tokens (B, M, Dd)."""
        return self.pred(self.norm(tokens))
