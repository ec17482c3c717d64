"""The light Transformer from latent and mask tokens to predictions; thrown away after pre-training."""

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from maekit.errors import MaekitError
from maekit.model.encoder import initialise
from maekit.model.masking import Masking
from maekit.model.patches import sincos_2d


class Decoder(nn.Module):
    """Project, put mask tokens where patches were removed, add positions, attend, predict.

    All prefix tokens of the encoder (class token, registers) go through the blocks and are dropped after them, as
    the class token in the official code. Every LayerNorm has eps 1e-6.
    """

    def __init__(
        self, embed_dim: int, grid: tuple[int, int], prefix: int, values: int, *, dim: int, depth: int, heads: int
    ) -> None:
        """Build for tokens of width `embed_dim` and patches of `values` numbers.

        Raises:
            MaekitError: E-CONFIG-SIZE if heads do not divide the width, or 4 does not.
        """
        super().__init__()
        if dim % 4 or dim % heads:
            raise MaekitError(
                "E-CONFIG-SIZE", "settings decoder_dim and decoder_heads", found=f"{dim} and {heads}", expected="a width divisible by 4 and by the heads"
            )
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.prefix = prefix
        self.embed = nn.Linear(embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_2d(dim, grid, prefix)[None], requires_grad=False)
        self.blocks = nn.Sequential(*(Block(dim, heads, mlp_ratio=4, qkv_bias=True, norm_layer=norm) for _ in range(depth)))
        self.norm = norm(dim)
        self.pred = nn.Linear(dim, values)
        initialise(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, masking: Masking, ids: Tensor | None = None) -> Tensor:
        """Predict patches: latent (B, prefix + K, D) -> (B, N, P*P*C) in image order, or those of `ids` (B, M) only.

        Each token is placed by one gather from [visible | mask token]: position n takes the visible token that
        stands for it, or the mask token.
        """
        tokens = self.embed(latent)
        pool = torch.cat([tokens[:, self.prefix :], self.mask_token.to(tokens.dtype).expand(len(tokens), -1, -1)], dim=1)
        places = masking.ids_restore.clamp(max=masking.keep)
        full = torch.cat([tokens[:, : self.prefix], take(pool, places)], dim=1)
        full = self.blocks(full + self.pos_embed)[:, self.prefix :]
        return self.pred(self.norm(full if ids is None else take(full, ids)))


def take(tokens: Tensor, ids: Tensor) -> Tensor:
    """Return rows `ids` (B, M) of (B, N, D) as (B, M, D)."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
