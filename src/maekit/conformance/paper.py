"""The method's arithmetic, written out from the paper and its tables, on tensors under the authors' names.

Independent of `maekit.model`: the model under audit, maekit's own included, is compared with this. Options name the
ways in which implementations are known to differ; the defaults are the method's.

B batch, C channels, P patch side, N patches, K kept patches, D token width, T tokens with prefix.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Tensors = Mapping[str, Tensor]


def sincos(dim: int, grid: tuple[int, int], *, first: str = "x", endpoint: bool = False, flip: bool = False) -> Tensor:
    """Return the position table (N, dim) of a grid of rows and columns, without prefix (official util/pos_embed.py).

    Args:
        dim: token width.
        grid: rows and columns.
        first: which coordinate the first half of the channels holds: "x", the column, in the method.
        endpoint: frequencies over dim / 4 - 1 (MoCo v3, big_vision) in place of dim / 4.
        flip: [cos | sin] in place of [sin | cos].
    """
    quarter = dim // 4
    table = np.zeros((grid[0] * grid[1], dim))
    for row in range(grid[0]):
        for column in range(grid[1]):
            places = (column, row) if first == "x" else (row, column)
            for half, place in enumerate(places):
                for i in range(quarter):
                    angle = place / 10000 ** (i / (quarter - endpoint or 1))
                    pair = (math.sin(angle), math.cos(angle))
                    at = half * 2 * quarter + i
                    table[row * grid[1] + column, [at, at + quarter]] = pair[::-1] if flip else pair
    return torch.from_numpy(table)


def num_keep(num_patches: int, mask_ratio: float) -> int:
    """Return how many patches stay: N (1 - r) rounded down, without float dust (official L130; trap 4.1)."""
    return math.floor(round(num_patches * (1 - mask_ratio), 9))


def encode(
    tensors: Tensors,
    images: Tensor,
    ids_keep: Tensor,
    heads: int,
    *,
    eps: float = 1e-6,
    positions: str = "before masking",
    norm: bool = True,
) -> Tensor:
    """Return the latent (B, T, D): positions, then masking, then the class token, blocks, norm (L147-170)."""
    weight = tensors["patch_embed.proj.weight"]
    tokens = F.conv2d(images, weight, tensors["patch_embed.proj.bias"], stride=weight.shape[2])
    tokens = tokens.flatten(2).transpose(1, 2)
    class_token, table = tensors.get("cls_token"), tensors["pos_embed"]
    prefix = table.shape[1] - tokens.shape[1]
    if positions == "before masking":
        tokens = tokens + table[:, prefix:]
    tokens = rows(tokens, ids_keep)
    if positions == "after masking":
        tokens = tokens + table[:, prefix : prefix + tokens.shape[1]]
    if class_token is not None:
        first = class_token + table[:, :1] if prefix and positions != "never" else class_token
        tokens = torch.cat([first.expand(len(tokens), -1, -1), tokens], 1)
    tokens = blocks(tensors, "blocks", tokens, heads, eps)
    return layer_norm(tensors, "norm", tokens, eps) if norm else tokens


def decode(
    tensors: Tensors,
    latent: Tensor,
    ids_keep: Tensor,
    heads: int,
    *,
    eps: float = 1e-6,
    positions: bool = True,
    class_token: bool = True,
    norm: bool = True,
) -> Tensor:
    """Return predictions (B, N, P*P*C): project, mask tokens, unshuffle, positions, blocks, norm, predict."""
    tokens = linear(tensors, "decoder_embed", latent)
    table = tensors["decoder_pos_embed"]
    prefix = latent.shape[1] - ids_keep.shape[1]
    places = table.shape[1] - prefix
    first, kept = tokens[:, :prefix], tokens[:, prefix:]
    everywhere = tensors["mask_token"].expand(len(latent), places, -1)
    tokens = everywhere.scatter(1, ids_keep[:, :, None].expand_as(kept), kept)
    if class_token:
        tokens = torch.cat([first, tokens], 1)
    if positions:
        tokens = tokens + table[:, table.shape[1] - tokens.shape[1] :]
    tokens = blocks(tensors, "decoder_blocks", tokens, heads, eps)
    if norm:
        tokens = layer_norm(tensors, "decoder_norm", tokens, eps)
    return linear(tensors, "decoder_pred", tokens)[:, prefix if class_token else 0 :]


def loss(
    images: Tensor,
    pred: Tensor,
    mask: Tensor,
    *,
    order: str = "channel fastest",
    target: str = "normalised",
    variance: str = "unbiased",
    eps: str = "1e-6 inside the root",
    over: str = "masked",
) -> Tensor:
    """Return the loss of predictions: mean squared error to each patch's own normalised pixels (L198-213)."""
    wanted = patches(images, pred.shape[1], order)
    if target == "normalised":
        mean = wanted.mean(-1, keepdim=True)
        spread = wanted.var(-1, keepdim=True, correction=int(variance == "unbiased"))
        amount = float(eps.split()[0])
        wanted = (wanted - mean) / ((spread + amount).sqrt() if "inside" in eps else spread.sqrt() + amount)
    error = (pred - wanted).square().mean(-1)
    chosen = {"masked": mask, "visible": ~mask, "all": torch.ones_like(mask)}[over]
    return (error * chosen).sum() / chosen.sum()


def patches(images: Tensor, num_patches: int, order: str = "channel fastest") -> Tensor:
    """Cut images into patches (B, N, P*P*C), row by row; inside one: y, x, channel (official patchify)."""
    batch, channels, height, width = images.shape
    side = math.isqrt(height * width // num_patches)
    cut = F.unfold(images, side, stride=side).transpose(1, 2)  # channel slowest
    if order == "channel slowest":
        return cut
    return cut.reshape(batch, num_patches, channels, side * side).transpose(2, 3).flatten(2)


def blocks(tensors: Tensors, name: str, tokens: Tensor, heads: int, eps: float) -> Tensor:
    """Run the pre-norm blocks ``name.0``, ``name.1``, ...; GELU, softmax attention over d ** -.5."""
    for i in range(depth(tensors, name)):
        here = f"{name}.{i}"
        q, k, v = linear(tensors, f"{here}.attn.qkv", layer_norm(tensors, f"{here}.norm1", tokens, eps)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        tokens = tokens + linear(tensors, f"{here}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        hidden = F.gelu(linear(tensors, f"{here}.mlp.fc1", layer_norm(tensors, f"{here}.norm2", tokens, eps)))
        tokens = tokens + linear(tensors, f"{here}.mlp.fc2", hidden)
    return tokens


def depth(tensors: Tensors, name: str) -> int:
    """Return how many blocks stand under ``name``."""
    return len({key.split(".")[1] for key in tensors if key.startswith(f"{name}.")})


def names(deep: int, decoder_deep: int) -> set[str]:
    """Return the names of the authors' pre-training files (method 3.9)."""
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    inner = [f"blocks.{i}.{layer}" for i in range(deep) for layer in layers]
    inner += [f"decoder_blocks.{i}.{layer}" for i in range(decoder_deep) for layer in layers]
    outer = ["patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred"]
    single = {"cls_token", "pos_embed", "mask_token", "decoder_pos_embed"}
    return single | {f"{name}.{kind}" for name in inner + outer for kind in ("weight", "bias")}


def linear(tensors: Tensors, name: str, tokens: Tensor) -> Tensor:
    """Apply the linear layer of that name."""
    return F.linear(tokens, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def layer_norm(tensors: Tensors, name: str, tokens: Tensor, eps: float) -> Tensor:
    """Apply the layer norm of that name."""
    return F.layer_norm(tokens, tokens.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)


def rows(tokens: Tensor, ids: Tensor) -> Tensor:
    """Take rows (B, K) of tokens (B, N, D) within each image."""
    return tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[2]))


def positions_2d(table: Tensor, prefix: int, grid: int) -> Tensor:
    """Resample a table (1, T, D) of a square grid: bicubic over both axes, the prefix kept (pos_embed.py L75-96)."""
    old = math.isqrt(table.shape[1] - prefix)
    square = table[:, prefix:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    square = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :prefix], square.flatten(2).transpose(1, 2)], 1)


def macs(shape: "tuple[int, ...]", masked: bool = True) -> tuple[float, float]:
    """Return GMAC of encoder and decoder for one image at 75 %: matrix products and attention (method 3.1).

    Args:
        shape: D, depth, Dd, decoder depth, N, values per patch, prefix.
        masked: False: the encoder runs on all patches.
    """
    width, deep, decoder_width, decoder_deep, num, values, prefix = shape
    kept = num_keep(num, 0.75) if masked else num
    encoder = num * width * values + stack(width, deep, kept + prefix)
    decoder = (num_keep(num, 0.75) + prefix) * width * decoder_width + stack(decoder_width, decoder_deep, num + prefix)
    decoder += (num + prefix) * decoder_width * values
    return encoder / 1e9, decoder / 1e9


def stack(width: int, deep: int, tokens: int) -> float:
    """Return the products of `deep` blocks: 12 D^2 a token, and T^2 D for scores and for values."""
    return deep * (12 * tokens * width**2 + 2 * tokens**2 * width)
