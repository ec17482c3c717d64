"""The models that are compared, with weights in which nothing is zero, one or symmetric."""

from typing import Any

import torch
from torch import Tensor, nn

from maekit.model.mae import MaskedAutoencoder, create_model

MODELS: dict[str, dict[str, Any]] = {
    "ViT-B/16, 224 px": {"name": "vit_base_patch16_224"},
    # ViT-H's patch and its head width of 80, in two blocks
    "patch 14, 112 px": {
        "name": "vit_huge_patch14_224",
        "img_size": 112,
        "embed_dim": 160,
        "depth": 2,
        "num_heads": 2,
        "decoder_dim": 64,
        "decoder_depth": 2,
        "decoder_heads": 4,
    },
    "tiny, 5 channels": {
        "name": "vit_tiny_patch16_224",
        "img_size": 48,
        "patch_size": 8,
        "in_chans": 5,
        "embed_dim": 48,
        "depth": 3,
        "num_heads": 3,
        "decoder_dim": 32,
        "decoder_depth": 2,
        "decoder_heads": 4,
    },
}


def build(name: str, target: str = "norm_pixel", dtype: torch.dtype = torch.float64) -> MaskedAutoencoder:
    torch.manual_seed(0)
    model = create_model(**MODELS[name], target=target)
    stir(model)
    return model.to(dtype)


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Move every parameter: at the start biases are 0 and norms 1, which would hide a tensor in the wrong place."""
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)


def inputs(model: MaskedAutoencoder, dtype: torch.dtype, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Return images and noise, the same values in every precision (float32 ones)."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, model.encoder.in_chans, *model.img_size, generator=generator)
    noise = torch.rand(batch, model.num_patches, generator=generator)
    return images.to(dtype), noise.to(dtype)
