"""Our weights in transformers' models, by a mapping written out name by name.

Deliberately apart from maekit.interchange: this is the oracle that its conversions are tested against. The names are
those that the models of transformers 5 have in memory.
"""

import re
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

from maekit.model.mae import MaskedAutoencoder

Tensors = dict[str, Tensor]
Names = dict[str, tuple[str, ...]]
"""Our name -> theirs. Three names: our fused matrix holds query, key and value one under the other."""

MAE: Names = {
    "encoder.cls_token": ("vit.embeddings.cls_token",),
    "encoder.pos_embed": ("vit.embeddings.position_embeddings",),
    "encoder.patch_embed.proj.weight": ("vit.embeddings.patch_embeddings.projection.weight",),
    "encoder.patch_embed.proj.bias": ("vit.embeddings.patch_embeddings.projection.bias",),
    "encoder.norm.weight": ("vit.layernorm.weight",),
    "encoder.norm.bias": ("vit.layernorm.bias",),
    "decoder.embed.weight": ("decoder.decoder_embed.weight",),
    "decoder.embed.bias": ("decoder.decoder_embed.bias",),
    "decoder.mask_token": ("decoder.mask_token",),
    "decoder.pos_embed": ("decoder.decoder_pos_embed",),
    "decoder.norm.weight": ("decoder.decoder_norm.weight",),
    "decoder.norm.bias": ("decoder.decoder_norm.bias",),
    "decoder.pred.weight": ("decoder.decoder_pred.weight",),
    "decoder.pred.bias": ("decoder.decoder_pred.bias",),
}

CLASSIFIER: Names = {
    "cls_token": ("vit.embeddings.cls_token",),
    "pos_embed": ("vit.embeddings.position_embeddings",),
    "patch_embed.proj.weight": ("vit.embeddings.patch_embeddings.projection.weight",),
    "patch_embed.proj.bias": ("vit.embeddings.patch_embeddings.projection.bias",),
    "norm.weight": ("vit.layernorm.weight",),
    "norm.bias": ("vit.layernorm.bias",),
    "head.weight": ("classifier.weight",),
    "head.bias": ("classifier.bias",),
}

BLOCK: Names = {
    "norm1.weight": ("layernorm_before.weight",),
    "norm1.bias": ("layernorm_before.bias",),
    "attn.qkv.weight": ("attention.q_proj.weight", "attention.k_proj.weight", "attention.v_proj.weight"),
    "attn.qkv.bias": ("attention.q_proj.bias", "attention.k_proj.bias", "attention.v_proj.bias"),
    "attn.proj.weight": ("attention.o_proj.weight",),
    "attn.proj.bias": ("attention.o_proj.bias",),
    "norm2.weight": ("layernorm_after.weight",),
    "norm2.bias": ("layernorm_after.bias",),
    "mlp.fc1.weight": ("mlp.fc1.weight",),
    "mlp.fc1.bias": ("mlp.fc1.bias",),
    "mlp.fc2.weight": ("mlp.fc2.weight",),
    "mlp.fc2.bias": ("mlp.fc2.bias",),
}

STACKS = {"encoder.blocks": "vit.layers", "decoder.blocks": "decoder.decoder_layers", "blocks": "vit.layers"}


def names_of(ours: nn.Module) -> Names:
    """Return where each of our tensors stands in their model; fails on a tensor that the mapping does not know."""
    fixed = CLASSIFIER if isinstance(ours, VisionTransformer) else MAE
    names: Names = {}
    for name in ours.state_dict():
        if found := re.fullmatch(r"((?:encoder\.|decoder\.)?blocks)\.(\d+)\.(.+)", name):
            stack, number, rest = found.groups()
            names[name] = tuple(f"{STACKS[stack]}.{number}.{theirs}" for theirs in BLOCK[rest])
        else:
            names[name] = fixed[name]
    return names


def fill(theirs: nn.Module, ours: nn.Module) -> None:
    """Copy every tensor of ours into theirs; both must be used up, position tables included."""
    mine = ours.state_dict()
    weights: Tensors = {}
    for name, places in names_of(ours).items():
        weights |= dict(zip(places, mine[name].chunk(len(places)), strict=True))
    theirs.load_state_dict(weights, strict=True)


def gradients(model: nn.Module) -> Tensors:
    """Return the gradient of every parameter; one without a gradient is an error."""
    found: Tensors = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return found


def in_our_layout(theirs: Tensors, ours: nn.Module) -> Tensors:
    """Return their tensors under our names, with query, key and value fused; all of theirs are used up."""
    names = names_of(ours)
    assert {place for places in names.values() for place in places} == theirs.keys()
    return {name: torch.cat([theirs[place] for place in places]) for name, places in names.items()}


def vit_mae(ours: MaskedAutoencoder, mask_ratio: float, attention: str) -> ViTMAEForPreTraining:
    """Build their masked autoencoder of our geometry, with our weights and every parameter trainable.

    Their default ``layer_norm_eps`` is 1e-12; the official code and ours use 1e-6.
    """
    block, decoder = ours.encoder.blocks[0].mlp, ours.decoder.blocks[0].mlp
    assert ours.img_size[0] == ours.img_size[1]
    settings: dict[str, Any] = {
        **_geometry(ours.encoder, ours.num_heads, block.fc1.out_features, attention),
        "decoder_hidden_size": ours.spec["decoder_dim"],
        "decoder_num_hidden_layers": ours.spec["decoder_depth"],
        "decoder_num_attention_heads": ours.spec["decoder_heads"],
        "decoder_intermediate_size": decoder.fc1.out_features,
        "mask_ratio": mask_ratio,
        "norm_pix_loss": ours.target == "norm_pixel",
    }
    model = ViTMAEForPreTraining(ViTMAEConfig(**settings)).to(ours.decoder.pos_embed.dtype)
    fill(model, ours)
    return model.requires_grad_(True)


def vit_mae_encoder(ours: MaskedAutoencoder, attention: str) -> ViTMAEModel:
    """Return their encoder with our weights; a ratio of 0 keeps every patch, in the order of the noise."""
    return vit_mae(ours, 0.0, attention).vit


def vit_classifier(ours: VisionTransformer, heads: int, attention: str) -> ViTForImageClassification:
    """Build their class-token classifier with our weights."""
    settings = _geometry(ours, heads, ours.blocks[0].mlp.fc1.out_features, attention)
    model = ViTForImageClassification(ViTConfig(**settings, num_labels=ours.num_classes)).to(ours.cls_token.dtype)
    fill(model, ours)
    return model


def _geometry(encoder: VisionTransformer, heads: int, hidden: int, attention: str) -> dict[str, Any]:
    embed = encoder.patch_embed
    assert embed.img_size is not None
    return {
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": heads,
        "intermediate_size": hidden,
        "image_size": embed.img_size[0],
        "patch_size": embed.patch_size[0],
        "num_channels": encoder.in_chans,
        "layer_norm_eps": 1e-6,
        "attn_implementation": attention,
    }
