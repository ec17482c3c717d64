"""Names and shapes of other libraries' files, written out here once more and without the package's own tables.

From the published models (arXiv 2111.06377; vit_base/large/huge of models_mae.py and models_vit.py), the files of
transformers' hub and what its versions write, ViTDet's backbone in detectron2.
"""

import re
from typing import Any

from torch import Tensor

from maekit.model.mae import MaskedAutoencoder, create_model

SIZES = {"B": (768, 12, 12, 16), "L": (1024, 24, 16, 16), "H": (1280, 32, 16, 14)}
"""Width, blocks, heads, patch."""
Shapes = dict[str, tuple[int, ...]]


def blocks(prefix: str, depth: int, width: int) -> Shapes:
    shapes: Shapes = {}
    for number in range(depth):
        for name, shape in (
            ("norm1.weight", (width,)),
            ("norm1.bias", (width,)),
            ("attn.qkv.weight", (3 * width, width)),
            ("attn.qkv.bias", (3 * width,)),
            ("attn.proj.weight", (width, width)),
            ("attn.proj.bias", (width,)),
            ("norm2.weight", (width,)),
            ("norm2.bias", (width,)),
            ("mlp.fc1.weight", (4 * width, width)),
            ("mlp.fc1.bias", (4 * width,)),
            ("mlp.fc2.weight", (width, 4 * width)),
            ("mlp.fc2.bias", (width,)),
        ):
            shapes[f"{prefix}.{number}.{name}"] = shape
    return shapes


def official(width: int, depth: int, patch: int, side: int = 224, decoder: tuple[int, int] | None = (512, 8)) -> Shapes:
    """Pre-trained files: with the decoder ("full") or, as released, without."""
    places, values = (side // patch) ** 2 + 1, patch * patch * 3
    shapes: Shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, places, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        **blocks("blocks", depth, width),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    if decoder is not None:
        narrow, few = decoder
        shapes |= {
            "mask_token": (1, 1, narrow),
            "decoder_pos_embed": (1, places, narrow),
            "decoder_embed.weight": (narrow, width),
            "decoder_embed.bias": (narrow,),
            **blocks("decoder_blocks", few, narrow),
            "decoder_norm.weight": (narrow,),
            "decoder_norm.bias": (narrow,),
            "decoder_pred.weight": (values, narrow),
            "decoder_pred.bias": (values,),
        }
    return shapes


def official_finetuned(width: int, depth: int, patch: int, classes: int = 1000) -> Shapes:
    """Fine-tuned files: mean pooling, so fc_norm takes the place of norm."""
    shapes = official(width, depth, patch, decoder=None)
    renamed = {f"fc_{name}" if name.startswith("norm.") else name: shape for name, shape in shapes.items()}
    return renamed | {"head.weight": (classes, width), "head.bias": (classes,)}


def as_hub(official_file: dict[str, Any]) -> dict[str, Any]:
    """Give the names of transformers' hub, which 4.x writes: split query, key, value."""
    found: dict[str, Any] = {}
    for name, value in official_file.items():
        name = re.sub(r"^decoder_blocks\.", "decoder.decoder_layers.", name)
        name = re.sub(r"^blocks\.", "vit.encoder.layer.", name)
        name = re.sub(r"^(decoder_embed|mask_token|decoder_pos_embed|decoder_norm|decoder_pred)", r"decoder.\1", name)
        name = re.sub(r"^patch_embed\.proj", "vit.embeddings.patch_embeddings.projection", name)
        name = re.sub(r"^cls_token$", "vit.embeddings.cls_token", name)
        name = re.sub(r"^pos_embed$", "vit.embeddings.position_embeddings", name)
        name = re.sub(r"^norm\.", "vit.layernorm.", name)
        name = re.sub(r"^head\.", "classifier.", name)
        name = name.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after")
        name = name.replace("attn.proj", "attention.output.dense")
        name = name.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
        if "attn.qkv" not in name:
            found[name] = value
            continue
        for at, part in enumerate(("query", "key", "value")):
            key = name.replace("attn.qkv", f"attention.attention.{part}")
            found[key] = third(value, at)
    return found


def third(value: Any, at: int) -> Any:
    """Return one third of a fused tensor, or its shape."""
    if isinstance(value, tuple):
        return (value[0] // 3, *value[1:])
    rows = len(value) // 3
    return value[at * rows : (at + 1) * rows].clone()


def as_files_of_5(hub: dict[str, Any]) -> dict[str, Any]:
    """Give the names that transformers 5 writes (D23)."""
    return {name.replace("decoder.decoder_layers.", "decoder.decoder_encoder.layer."): v for name, v in hub.items()}


def as_memory_of_5(hub: dict[str, Any]) -> dict[str, Any]:
    """Give the names that transformers 5 has in memory."""
    names = {
        "vit.encoder.layer.": "vit.layers.",
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
    found = {}
    for name, value in hub.items():
        for old, new in names.items():
            name = name.replace(old, new)
        found[name] = value
    return found


def as_detectron2(official_file: dict[str, Any]) -> dict[str, Any]:
    """Keep what ViTDet's backbone has, under its names."""
    kept = ("pos_embed", "patch_embed.", "blocks.")
    return {f"backbone.net.{name}": value for name, value in official_file.items() if name.startswith(kept)}


def as_split(official_file: dict[str, Any], ending: str) -> dict[str, Any]:
    """Take the fused qkv apart: attn.q or attn.q_proj."""
    found: dict[str, Any] = {}
    for name, value in official_file.items():
        if "attn.qkv" in name:
            found |= {name.replace("qkv", f"{one}{ending}"): third(value, at) for at, one in enumerate("qkv")}
        else:
            found[name] = value
    return found


def small(**changes: Any) -> MaskedAutoencoder:
    """Return a ViT-Ti of two blocks on images of 32 pixels, a decoder of one block, every weight another number."""
    import torch

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8, "depth": 2,
        "decoder_dim": 64, "decoder_depth": 1, "decoder_heads": 2,
    }  # fmt: skip
    model = create_model(**{**settings, **changes}).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if not name.endswith("pos_embed"):
                value += 0.05 * torch.randn_like(value)
    return model


def official_of(model: MaskedAutoencoder, *, decoder: bool = True) -> dict[str, Tensor]:
    """Return a model's weights under the authors' names."""
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name.startswith("encoder."):
            found[name.removeprefix("encoder.")] = value
        elif decoder:
            short = name.removeprefix("decoder.")
            found[short if short == "mask_token" else f"decoder_{short}"] = value
    return found
