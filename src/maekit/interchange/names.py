"""Which tensor is called what in which library; nothing else differs between the layouts.

A layout says three things: names of what stands once, where lists of blocks live, and how a block's parts are called.
maekit's own names, timm's under ``encoder.`` and the decoder's under ``decoder.``, stand on the right. From the same
table names are read and written.

Sources: official, the released files and models_mae.py; transformers, the files on its hub (also what 4.57 writes),
what 5.x writes, and what 5.x calls its modules in memory: three namings of one model; detectron2, ViTDet's backbone;
torchvision, its VisionTransformer.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

PARTS = {
    part: part for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
}  # as in timm and the official files
QKV = ("q", "k", "v")


@dataclass(frozen=True)
class Layout:
    """The names of one library.

    Attributes:
        name: of the layout.
        once: their name -> ours, without ``.weight`` and ``.bias``.
        lists: their prefix of a list of blocks -> ours.
        parts: their part of a block -> ours; a list of three stands for a qkv that is split.
        split: their names of query, key and value, in this order; empty if fused.
    """

    name: str
    once: dict[str, str]
    lists: dict[str, str]
    parts: dict[str, str]
    split: tuple[str, ...] = ()


_ENCODER = {
    "cls_token": "encoder.cls_token",
    "pos_embed": "encoder.pos_embed",
    "patch_embed.proj": "encoder.patch_embed.proj",
    "norm": "encoder.norm",
}
_HEAD = {"fc_norm": "encoder.fc_norm", "head": "encoder.head"}

MAEKIT = Layout(
    "maekit",
    {
        **{ours: ours for ours in (*_ENCODER.values(), *_HEAD.values())},
        **{f"decoder.{n}": f"decoder.{n}" for n in ("embed", "mask_token", "pos_embed", "norm", "pred")},
    },
    {"encoder.blocks": "encoder.blocks", "decoder.blocks": "decoder.blocks"},
    PARTS,
)
TIMM = Layout("timm", {**_ENCODER, **_HEAD, "reg_token": "encoder.reg_token"}, {"blocks": "encoder.blocks"}, PARTS)
OFFICIAL = Layout(
    "official",
    {
        **_ENCODER,
        **_HEAD,
        "decoder_embed": "decoder.embed",
        "mask_token": "decoder.mask_token",
        "decoder_pos_embed": "decoder.pos_embed",
        "decoder_norm": "decoder.norm",
        "decoder_pred": "decoder.pred",
    },
    {"blocks": "encoder.blocks", "decoder_blocks": "decoder.blocks"},
    PARTS,
)
DETECTRON2 = Layout(
    "detectron2",
    {
        f"backbone.net.{theirs}": ours
        for theirs, ours in _ENCODER.items()
        if theirs in ("pos_embed", "patch_embed.proj")
    },
    {"backbone.net.blocks": "encoder.blocks"},
    PARTS,
)
_HF_ONCE = {
    "vit.embeddings.cls_token": "encoder.cls_token",
    "vit.embeddings.position_embeddings": "encoder.pos_embed",
    "vit.embeddings.patch_embeddings.projection": "encoder.patch_embed.proj",
    "vit.layernorm": "encoder.norm",
    "classifier": "encoder.head",
    "decoder.decoder_embed": "decoder.embed",
    "decoder.mask_token": "decoder.mask_token",
    "decoder.decoder_pos_embed": "decoder.pos_embed",
    "decoder.decoder_norm": "decoder.norm",
    "decoder.decoder_pred": "decoder.pred",
}
_HF_PARTS = {
    "layernorm_before": "norm1",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_HF_SPLIT = tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))
TRANSFORMERS = Layout(
    "transformers",
    _HF_ONCE,
    {"vit.encoder.layer": "encoder.blocks", "decoder.decoder_layers": "decoder.blocks"},
    _HF_PARTS,
    _HF_SPLIT,
)
"""As on the hub and as 4.57 writes; what we write, since every version reads it (D23)."""
TRANSFORMERS_FILES_5 = Layout(
    "transformers",
    _HF_ONCE,
    {"vit.encoder.layer": "encoder.blocks", "decoder.decoder_encoder.layer": "decoder.blocks"},
    _HF_PARTS,
    _HF_SPLIT,
)
TRANSFORMERS_MEMORY_5 = Layout(
    "transformers",
    _HF_ONCE,
    {"vit.layers": "encoder.blocks", "decoder.decoder_layers": "decoder.blocks"},
    {
        "layernorm_before": "norm1",
        "attention.o_proj": "attn.proj",
        "layernorm_after": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
    tuple(f"attention.{name}_proj" for name in QKV),
)
TORCHVISION = Layout(
    "torchvision",
    {
        "conv_proj": "encoder.patch_embed.proj",
        "class_token": "encoder.cls_token",
        "encoder.pos_embedding": "encoder.pos_embed",
        "encoder.ln": "encoder.norm",
        "heads.head": "encoder.head",
    },
    {"encoder.layers.encoder_layer": "encoder.blocks"},
    {
        "ln_1": "norm1",
        "self_attention.in_proj": "attn.qkv",
        "self_attention.out_proj": "attn.proj",
        "ln_2": "norm2",
        "mlp.0": "mlp.fc1",
        "mlp.3": "mlp.fc2",
        "mlp.linear_1": "mlp.fc1",
        "mlp.linear_2": "mlp.fc2",
    },
)
TIMM_SPLIT = tuple(
    Layout(
        "timm",
        {**OFFICIAL.once, "reg_token": "encoder.reg_token"},
        OFFICIAL.lists,
        {part: part for part in PARTS if part != "attn.qkv"},
        tuple(f"attn.{name}{ending}" for name in QKV),
    )
    for ending in ("", "_proj")
)
"""Ports of timm's block with query, key and value apart."""

LAYOUTS = (
    MAEKIT,
    OFFICIAL,
    TIMM,
    TRANSFORMERS,
    TRANSFORMERS_FILES_5,
    TRANSFORMERS_MEMORY_5,
    DETECTRON2,
    TORCHVISION,
    *TIMM_SPLIT,
)
"""In the order of preference where two fit equally well."""

WRAPPERS = (
    "module.", "_orig_mod.", "model.", "backbone.net.", "backbone.", "net.", "encoder.", "vit.", "student.", "teacher.",
)  # fmt: skip
"""What wrappers and training frames put before a name: DataParallel, torch.compile, Lightning, heads on a backbone."""


class Row(NamedTuple):
    """What became of one tensor.

    Attributes:
        theirs: its name in the file; empty for one that was made.
        ours: its name in maekit; empty for one that is left out.
        what: "used" | "renamed" | "reshaped" | "created" | "left out".
        note: why, or how.
    """

    theirs: str
    ours: str
    what: str
    note: str = ""


class Place(NamedTuple):
    """Where a tensor of a file belongs.

    Attributes:
        ours: the name, with ``.weight`` or ``.bias``.
        third: 0, 1, 2 for query, key, value; None for a whole tensor.
    """

    ours: str
    third: int | None = None


def place(layout: Layout, name: str) -> Place | None:
    """Return where a name of `layout` belongs, with any wrappers before it; None if it does not say."""
    for stripped in _unwrapped(name, 4):
        for candidate in (stripped, f"vit.{stripped}"):  # transformers' bare encoder has no prefix
            if found := _place(layout, candidate):
                return found
    return None


def _unwrapped(name: str, most: int) -> Iterable[str]:
    """Yield a name, then the same without one wrapper after the other, up to that many."""
    yield name
    for wrapper in WRAPPERS if most else ():
        if name.startswith(wrapper):
            yield from _unwrapped(name.removeprefix(wrapper), most - 1)


def _place(layout: Layout, name: str) -> Place | None:
    if name in layout.once:
        return Place(layout.once[name])
    stem, _, ending = name.rpartition(".")
    if stem.endswith("self_attention") and ending.startswith("in_proj_"):  # torchvision's only name with an underscore
        stem, ending = f"{stem}.in_proj", ending.removeprefix("in_proj_")
    if ending not in ("weight", "bias"):
        return None
    if stem in layout.once:
        return Place(f"{layout.once[stem]}.{ending}")
    for theirs, ours in layout.lists.items():
        found = re.fullmatch(rf"{re.escape(theirs)}[._](\d{{1,4}})\.(.+)", stem)
        if found is None:
            continue
        number, part = found.groups()
        if part in layout.parts:
            return Place(f"{ours}.{number}.{layout.parts[part]}.{ending}")
        if part in layout.split:
            return Place(f"{ours}.{number}.attn.qkv.{ending}", layout.split.index(part))
    return None


def theirs(layout: Layout, ours: str) -> list[str]:
    """Return what `layout` calls one of our tensors: one name, three for a qkv that it splits, none if it has none."""
    for their_name, our_name in layout.once.items():
        if ours == our_name:
            return [their_name]
        if ours in (f"{our_name}.weight", f"{our_name}.bias"):
            return [their_name + ours.removeprefix(our_name)]
    for their_list, our_list in layout.lists.items():
        found = re.fullmatch(rf"{re.escape(our_list)}\.(\d+)\.(.+)\.(weight|bias)", ours)
        if found is None:
            continue
        number, part, ending = found.groups()
        if part == "attn.qkv" and layout.split:
            return [f"{their_list}.{number}.{name}.{ending}" for name in layout.split]
        for their_part, our_part in layout.parts.items():
            if part == our_part:
                return [f"{their_list}.{number}.{their_part}.{ending}"]
    return []
