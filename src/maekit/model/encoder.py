"""Any plain timm VisionTransformer, run on the visible patches only from the first operation on.

The module stays timm's own, with its names and its own ``forward``: what is here reads its parts. A convolutional
stem would let removed pixels leak into visible tokens, so only the non-overlapping patch projection is taken. That
projection is a linear layer on flattened patches, so patches are gathered first and only K of N are embedded.
"""

import difflib
from typing import Any

import timm
import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from maekit.errors import MaekitError
from maekit.model.patches import sincos_2d


def create_encoder(
    name: str,
    *,
    img_size: tuple[int, int],
    patch_size: int | None,
    in_chans: int,
    embed_dim: int | None,
    depth: int | None,
    num_heads: int | None,
    drop_path: float,
) -> VisionTransformer:
    """Build the encoder with the method's positions and initial weights.

    Raises:
        MaekitError: E-CONFIG-MODEL for anything but a plain VisionTransformer, E-CONFIG-SIZE for sizes that do not
            divide.
    """
    wanted: dict[str, Any] = {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    wanted = {key: value for key, value in wanted.items() if value is not None}
    _check_name(name)
    with torch.device("meta"):
        probe = timm.create_model(name)
    _check_plain(name, probe)
    _check_sizes(probe, img_size, wanted)
    encoder = timm.create_model(
        name,
        img_size=img_size,
        in_chans=in_chans,
        drop_path_rate=drop_path,
        num_classes=0,
        global_pool="token" if probe.has_class_token else "",
        fc_norm=False,
        **wanted,
    )
    assert isinstance(encoder, VisionTransformer) and encoder.pos_embed is not None
    prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
    table = sincos_2d(encoder.embed_dim, encoder.patch_embed.grid_size, prefix)
    encoder.pos_embed = nn.Parameter(table[None], requires_grad=False)
    initialise(encoder)
    # the patch projection starts like the linear layer it is; its bias keeps what PyTorch gives a convolution
    nn.init.xavier_uniform_(encoder.patch_embed.proj.weight.flatten(1))
    for token in (encoder.cls_token, encoder.reg_token):
        if token is not None:
            nn.init.normal_(token, std=0.02)
    return encoder


def initialise(module: nn.Module) -> None:
    """Start all linear layers xavier-uniform with zero bias (the fused qkv as one matrix), all norms as 1 and 0.

    Official models_mae.py; convolutions and LayerScale are left as they are.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


def encode(encoder: VisionTransformer, patches: Tensor, ids_keep: Tensor | None = None) -> Tensor:
    """Embed and encode patches: (B, K, P*P*C) -> latent (B, prefix + K, D), normalised.

    Positions are added before prefix tokens come in front, each prefix token with its own (zero) position.

    Args:
        patches: flattened, channel fastest; only the visible ones.
        ids_keep: (B, K) which patches these are; None: all, in order.
    """
    projection = encoder.patch_embed.proj
    # a Conv2d kernel is (D, C, P, P); our patches have the channel fastest
    weight = projection.weight.permute(0, 2, 3, 1).flatten(1)
    tokens = encoder.patch_embed.norm(F.linear(patches, weight, projection.bias))
    positions = encoder.pos_embed
    assert positions is not None
    prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
    here = positions[0, prefix:]
    tokens = tokens + (here if ids_keep is None else here[ids_keep])
    front = [t.expand(len(tokens), -1, -1) for t in (encoder.cls_token, encoder.reg_token) if t is not None]
    if front:
        begin = torch.cat(front, dim=1)
        tokens = torch.cat([begin + positions[:, :prefix] if prefix else begin, tokens], dim=1)
    tokens = encoder.norm_pre(encoder.pos_drop(tokens))
    return encoder.norm(encoder.blocks(tokens))


def _check_name(name: str) -> None:
    if name.partition(".")[0] not in timm.list_models():
        near = difflib.get_close_matches(name, timm.list_models("vit_*"), n=1)
        raise MaekitError(
            "E-CONFIG-MODEL", "setting model", found=name, expected="a VisionTransformer of timm", hint=near[0] if near else "vit_base_patch16_224"
        )


def _check_sizes(probe: VisionTransformer, img_size: tuple[int, int], wanted: dict[str, Any]) -> None:
    """Refuse what would fail inside timm, or be cut off there, with the numbers that would do."""
    dim = wanted.get("embed_dim", probe.embed_dim)
    heads = wanted.get("num_heads", probe.blocks[0].attn.num_heads)
    patch = wanted.get("patch_size", probe.patch_embed.patch_size[0])
    if dim % 4:
        raise MaekitError(
            "E-CONFIG-SIZE", "setting embed_dim", found=dim, expected="a multiple of 4 (sin-cos positions)", hint=f"--embed-dim {dim + 4 - dim % 4}"
        )
    if dim % heads:
        raise MaekitError("E-CONFIG-SIZE", "setting num_heads", found=heads, expected=f"a divisor of the width {dim}", hint="--num-heads")
    if any(side % patch for side in img_size):
        fits = " ".join(str(max(patch, round(side / patch) * patch)) for side in img_size)
        raise MaekitError(
            "E-CONFIG-SIZE", "setting img_size", found=f"{img_size[0]} {img_size[1]}", expected=f"multiples of the patch side {patch}", hint=f"--img-size {fits}"
        )


def _check_plain(name: str, encoder: nn.Module) -> None:
    def refuse(why: str) -> MaekitError:
        return MaekitError(
            "E-CONFIG-MODEL", f"model {name}", found=why, expected="a plain timm VisionTransformer", hint="--model vit_base_patch16_224"
        )

    if type(encoder) is not VisionTransformer:
        raise refuse(f"a {type(encoder).__name__}")
    embed = encoder.patch_embed
    if type(embed) is not PatchEmbed:
        raise refuse(f"a {type(embed).__name__} stem: removed pixels would leak into visible tokens")
    if encoder.pos_embed is None or encoder.dynamic_img_size:
        raise refuse("no table of positions of fixed size")
    if embed.patch_size[0] != embed.patch_size[1]:
        raise refuse(f"patches of {embed.patch_size}, not square")
