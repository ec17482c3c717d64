"""Any plain timm VisionTransformer, run on a subset of its patches from the first operation on.

The encoder stays timm's own module, untouched: ``encoder(images)`` is the full-length path, and `encode` is the same
arithmetic with the removed patches never computed. This holds only if a patch's token depends on that patch alone, so
convolutional stems, overlapping patches and relative positions are refused by name.

B batch, P patch side, C channels, N patches, K kept patches, D token width, T tokens with prefix.
"""

import difflib
from functools import cache
from typing import Any, NamedTuple

import timm
import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from maekit.errors import MaekitError
from maekit.model.patches import place, sincos_2d

HOMES = ("vision_transformer", "deit")
"""timm's modules whose models are plain VisionTransformers (the class is checked, too)."""


class Geometry(NamedTuple):
    """What a timm name stands for when nothing is overridden."""

    patch: int
    width: int
    heads: int
    has_class_token: bool


def create_encoder(
    name: str,
    *,
    img_size: tuple[int, int],
    patch_size: int | None = None,
    in_chans: int = 3,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    drop_path: float = 0.0,
    class_tokens: int | None = None,
    num_classes: int = 0,
    pool: str = "cls",
) -> VisionTransformer:
    """Build a timm VisionTransformer with the method's initial weights and sin-cos positions.

    Args:
        name: timm's name, without a tag.
        img_size: H, W in pixels.
        patch_size: side in pixels; None: the name's own, as for the other geometry.
        in_chans: channels per image.
        embed_dim: token width.
        depth: number of blocks.
        num_heads: attention heads per block.
        drop_path: stochastic depth of the last block, rising linearly from 0.
        class_tokens: 0 | 1 | n, from the second on as register tokens; None: the name's own.
        num_classes: 0 for none: the head is an identity.
        pool: "cls": final norm on every token; "mean": norm on the mean of patch tokens (``fc_norm``), which takes
            the place of the final norm. Without class token and head the output is not pooled.

    Raises:
        MaekitError: E-CONFIG-MODEL, -SIZE, -PATCH, -CHANNELS, -WIDTH, -DEPTH, -HEADS, -DROP-PATH.
    """
    known = geometry(name)
    patch, width, heads = (
        own if given is None else given
        for given, own in ((patch_size, known.patch), (embed_dim, known.width), (num_heads, known.heads))
    )
    _check_sizes(img_size, patch, in_chans, drop_path)
    check_block("encoder", width, 1 if depth is None else depth, heads)
    has_class_token = known.has_class_token if class_tokens is None else class_tokens > 0
    tokens: dict[str, Any] = {}
    if class_tokens is not None:
        tokens = {"class_token": has_class_token, "reg_tokens": max(0, class_tokens - 1), "no_embed_class": False}
    encoder = timm.create_model(
        name,
        pretrained=False,
        img_size=img_size,
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        drop_path_rate=drop_path,
        num_classes=num_classes,
        global_pool="avg" if pool == "mean" else "token" if has_class_token else "",
        fc_norm=pool == "mean",
        **tokens,
        weight_init="skip",  # every weight is set below
    )
    assert isinstance(encoder, VisionTransformer)
    initialise(encoder)
    return encoder


@cache
def geometry(name: str) -> Geometry:
    """Look a timm name up without allocating its weights.

    Raises:
        MaekitError: E-CONFIG-MODEL for an unknown name, a tag, or anything but a plain VisionTransformer.
    """
    if not timm.is_model(name) or "." in name or ":" in name:
        raise _unknown(name)
    if not timm.models.is_model_in_modules(name, HOMES):
        raise _refused(name, "another architecture")
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    if reason := _why_not(model):
        raise _refused(name, reason)
    assert isinstance(model, VisionTransformer)
    heads = next(part.num_heads for part in model.blocks.modules() if isinstance(getattr(part, "num_heads", None), int))
    assert isinstance(heads, int)
    return Geometry(model.patch_embed.patch_size[0], model.embed_dim, heads, model.has_class_token)


def encode(encoder: VisionTransformer, patches: Tensor, ids: Tensor, mask_token: Tensor | None = None) -> Tensor:
    """Run the encoder on some patches of each image; what is not handed in is never seen.

    Order of the official forward_encoder: embed, add positions, prepend the class token (with its own position, zero
    at the start), blocks, final norm. Register tokens follow the class token, as in timm.

    Args:
        encoder: from `create_encoder`.
        patches: (B, K, P*P*C), channel fastest.
        ids: (B, K) place of each in the image.
        mask_token: (1, 1, D) to stand at all other places (paper table 1c, as in BEiT); then all of them are run.

    Returns:
        latent (B, T, D), T = prefix tokens + K; with a mask token prefix tokens + N, in image order.
    """
    assert encoder.pos_embed is not None
    num_rows = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
    positions = encoder.pos_embed[0]
    tokens = embed_patches(encoder, patches)
    if mask_token is None:
        tokens = tokens + F.embedding(ids, positions[num_rows:])
    else:
        places = positions[num_rows:]
        tokens = place(tokens.to(mask_token.dtype), ids, mask_token, len(places)) + places
    prefix: list[Tensor] = [token for token in (encoder.cls_token, encoder.reg_token) if token is not None]
    if prefix:
        first = torch.cat(prefix, dim=1)
        first = first + positions[:num_rows] if num_rows else first
        tokens = torch.cat([first.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], dim=1)
    tokens = encoder.norm_pre(encoder.pos_drop(tokens))
    if encoder.grad_checkpointing and encoder.training:
        tokens = checkpoint_seq(encoder.blocks, tokens, every=int(encoder.grad_checkpointing))
    else:
        tokens = encoder.blocks(tokens)
    return encoder.norm(tokens)


def embed_patches(encoder: VisionTransformer, patches: Tensor) -> Tensor:
    """Project patches (B, K, P*P*C) to tokens (B, K, D) with the weights of timm's patch convolution.

    A convolution whose stride is its kernel is a linear map of each patch; its weight has the channel slowest.
    """
    projection = encoder.patch_embed.proj
    weight = projection.weight
    if weight.shape[1] > 1:  # one channel is in order as it is; DDP would warn of the strides of a permuted gradient
        weight = weight.permute(0, 2, 3, 1)
    return encoder.patch_embed.norm(F.linear(patches, weight.flatten(1), projection.bias))


@torch.no_grad()
def initialise(encoder: VisionTransformer) -> None:
    """Set the method's initial weights (official models_mae.py, initialize_weights).

    The patch convolution is drawn like a linear layer, Xavier over the flattened kernel; its bias keeps torch's
    default. Class and register tokens are N(0, .02). Positions are fixed sin-cos with zero rows for the prefix.
    """
    embed, positions = encoder.patch_embed, encoder.pos_embed
    assert positions is not None
    nn.init.xavier_uniform_(embed.proj.weight.flatten(1))  # a view: draws into the kernel itself
    for token in (encoder.cls_token, encoder.reg_token):
        if token is not None:
            nn.init.normal_(token, std=0.02)
    prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
    positions.copy_(sincos_2d(encoder.embed_dim, embed.grid_size, prefix))
    positions.requires_grad_(False)
    encoder.blocks.apply(initialise_linear)


def initialise_linear(module: nn.Module) -> None:
    """Draw a linear layer's weight Xavier uniform, a fused qkv as the one matrix it is; biases 0.

    Norms are left alone: they are built as 1 and 0.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def check_block(part: str, width: int, depth: int, heads: int) -> None:
    """Refuse widths, depths and heads that cannot work together.

    Args:
        part: "encoder" | "decoder", for the message.
        width: token width.
        depth: number of blocks.
        heads: attention heads per block.

    Raises:
        MaekitError: E-CONFIG-WIDTH, E-CONFIG-DEPTH, E-CONFIG-HEADS.
    """
    names = (
        ("decoder_dim", "decoder_depth", "decoder_heads") if part == "decoder" else ("embed_dim", "depth", "num_heads")
    )
    if width < 4 or width % 4:
        raise MaekitError(
            "E-CONFIG-WIDTH",
            f"setting {names[0]}",
            found=width,
            expected="a multiple of 4 (sine and cosine of x and of y)",
            hint=f"{names[0]} {max(4, round(width / 4) * 4)}",
        )
    if depth < 1:
        raise MaekitError("E-CONFIG-DEPTH", f"setting {names[1]}", found=depth, expected="at least 1 block")
    if heads < 1 or width % heads:
        fits = [n for n in range(1, width + 1) if width % n == 0]
        nearest = min(fits, key=lambda n: abs(n - heads))
        raise MaekitError(
            "E-CONFIG-HEADS",
            f"setting {names[2]}",
            found=f"{heads} heads",
            expected=f"a divisor of the width {width}",
            hint=f"{names[2]} {nearest}",
        )


def check_patches(img_size: tuple[int, int], patch: int) -> None:
    """Refuse images that patches do not fill.

    Raises:
        MaekitError: E-CONFIG-SIZE.
    """
    if any(side < patch or side % patch for side in img_size):
        fits = [max(patch, round(side / patch) * patch) for side in img_size]
        raise MaekitError(
            "E-CONFIG-SIZE",
            "setting img_size",
            found=f"{img_size[0]} x {img_size[1]} pixels",
            expected=f"multiples of the patch side {patch}",
            hint=f"img_size {fits[0]} {fits[1]}, or another patch_size",
        )


def _check_sizes(img_size: tuple[int, int], patch: int, channels: int, drop_path: float) -> None:
    if patch < 1:
        raise MaekitError("E-CONFIG-PATCH", "setting patch_size", found=patch, expected="at least 1 pixel")
    check_patches(img_size, patch)
    if channels < 1:
        raise MaekitError("E-CONFIG-CHANNELS", "setting channels", found=channels, expected="at least 1")
    if not 0 <= drop_path < 1:
        raise MaekitError("E-CONFIG-DROP-PATH", "setting drop_path", found=drop_path, expected="0 up to below 1")


def _why_not(model: nn.Module) -> str | None:
    """Return why a model cannot run on a subset of its patches exactly, or None if it can."""
    if type(model) is not VisionTransformer:
        return f"class {type(model).__name__}"
    embed = model.patch_embed
    if type(embed) is not PatchEmbed:
        return f"a stem of class {type(embed).__name__}"
    if model.pos_embed is None:
        return "no absolute positions"
    if model.dynamic_img_size:
        return "an image size decided at run time"
    if embed.patch_size[0] != embed.patch_size[1]:
        return f"patches of {embed.patch_size[0]} x {embed.patch_size[1]}"
    return None


def _unknown(name: str) -> MaekitError:
    plain = name.split(".")[0]
    if plain != name and timm.is_model(plain):
        return MaekitError(
            "E-CONFIG-MODEL",
            "setting model",
            found=f"{name}, a name with a tag of timm's weights",
            expected="the architecture's name alone: weights are not taken from timm",
            hint=plain,
        )
    names = [known for home in HOMES for known in timm.list_models(module=home)]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return MaekitError(
        "E-CONFIG-MODEL",
        "setting model",
        found=f"{name!r}, which timm does not know",
        expected="a plain timm VisionTransformer",
        hint=f"did you mean {near[0]!r}?" if near else "vit_base_patch16_224",
    )


def _refused(name: str, reason: str) -> MaekitError:
    return MaekitError(
        "E-CONFIG-MODEL",
        "setting model",
        found=f"{name}, which has {reason}",
        expected="a plain timm VisionTransformer (others would leak masked pixels, or know no fixed places)",
        hint="vit_small_patch16_224 or vit_base_patch16_224",
    )
