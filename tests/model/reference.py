"""The masked autoencoder written as the paper tells it: slow, obvious, nothing clever.

Takes the weights of a `MaskedAutoencoder` and goes the long way: embeds the whole image with the convolution, adds
positions, shuffles everything, drops the tail; the decoder gets mask tokens appended and unshuffled, predicts every
patch, and the loss is masked afterwards. The fast path must equal it in outputs and in every gradient.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from maekit.model.mae import MaskedAutoencoder


@dataclass(frozen=True)
class Expected:
    loss: Tensor
    pred: Tensor
    mask: Tensor
    ids_restore: Tensor
    latent: Tensor


def reference(model: MaskedAutoencoder, images: Tensor, noise: Tensor, keep: int) -> Expected:
    ids_shuffle = torch.argsort(noise, dim=1)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    latent = _encode(model, images, ids_shuffle, keep)
    pred = _decode(model, latent, ids_restore, keep)
    mask = torch.ones_like(noise)
    mask[:, :keep] = 0
    mask = _rows(mask.unsqueeze(-1), ids_restore).squeeze(-1)
    error = ((pred - _target(model, images)) ** 2).mean(dim=-1)
    loss = (error * mask).sum() / mask.sum()
    return Expected(loss, pred, mask.bool(), ids_restore, latent)


def flatten_patches(images: Tensor, patch: int) -> Tensor:
    """Cut by loops: patches row by row; in a patch row, column, channel."""
    _, _, height, width = images.shape
    flat = []
    for top in range(0, height, patch):
        for left in range(0, width, patch):
            square = images[:, :, top : top + patch, left : left + patch]
            flat.append(square.permute(0, 2, 3, 1).reshape(len(images), -1))
    return torch.stack(flat, dim=1)


def _rows(tokens: Tensor, ids: Tensor) -> Tensor:
    return torch.stack([row[order] for row, order in zip(tokens, ids, strict=True)])


def _encode(model: MaskedAutoencoder, images: Tensor, ids_shuffle: Tensor, keep: int) -> Tensor:
    encoder = model.encoder
    assert encoder.pos_embed is not None
    tokens = encoder.patch_embed.proj(images).flatten(2).transpose(1, 2)
    tokens = encoder.patch_embed.norm(tokens)
    # rows of the table that belong to prefix tokens
    placed = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
    tokens = tokens + encoder.pos_embed[:, placed:]
    tokens = _rows(tokens, ids_shuffle)[:, :keep]
    front: list[Tensor] = [token for token in (encoder.cls_token, encoder.reg_token) if token is not None]
    if front:
        prefix = torch.cat(front, dim=1)
        if placed:
            prefix = prefix + encoder.pos_embed[:, :placed]
        tokens = torch.cat([prefix.expand(len(images), -1, -1), tokens], dim=1)
    tokens = encoder.norm_pre(tokens)
    for block in encoder.blocks:
        tokens = block(tokens)
    return encoder.norm(tokens)


def _decode(model: MaskedAutoencoder, latent: Tensor, ids_restore: Tensor, keep: int) -> Tensor:
    decoder, prefix = model.decoder, model.encoder.num_prefix_tokens
    tokens = decoder.embed(latent)
    removed = ids_restore.shape[1] - keep
    appended = torch.cat([tokens[:, prefix:], decoder.mask_token.repeat(len(latent), removed, 1)], dim=1)
    tokens = torch.cat([tokens[:, :prefix], _rows(appended, ids_restore)], dim=1)
    tokens = tokens + decoder.pos_embed
    for block in decoder.blocks:
        tokens = block(tokens)
    return decoder.pred(decoder.norm(tokens))[:, prefix:]


def _target(model: MaskedAutoencoder, images: Tensor) -> Tensor:
    patches = flatten_patches(images, model.patch)
    if model.target == "pixel":
        return patches
    mean = patches.mean(dim=-1, keepdim=True)
    variance = ((patches - mean) ** 2).sum(dim=-1, keepdim=True) / (patches.shape[-1] - 1)
    return (patches - mean) / (variance + 1e-6) ** 0.5
