"""The architecture behind foreign weights: read off shapes, completed by what is `said` beside them.

Width, depth, patch, channels, grid and decoder stand in the shapes. What has no place in a plain ViT is never left out
where it would change what the encoder computes, and what a layout has no place for is made where the method fixes it.
"""

import math
import re
from typing import Any

import torch
from torch import Tensor

from maekit.errors import MaekitError, clean
from maekit.interchange.files import File, Tensors
from maekit.interchange.names import Row
from maekit.interchange.reading import Hints, Reading, check, expected_tensors
from maekit.interchange.said import Said, Size, contradiction
from maekit.model.encoder import create_encoder
from maekit.model.patches import sincos_2d

NAMES = {
    192: ("vit_tiny_patch16_224", 3),
    384: ("vit_small_patch16_224", 6),
    768: ("vit_base_patch16_224", 12),
    1024: ("vit_large_patch16_224", 16),
    1280: ("vit_huge_patch14_224", 16),
}
"""Width -> timm's name and heads of the published ViTs (arXiv 2010.11929, table 1; DeiT for the small ones)."""
ANY_WIDTH = "vit_base_patch16_224"
"""timm's plain ViT whose width, depth, heads and patch are set."""
NO_CLASS_TOKEN = "vit_base_patch16_gap_224"
"""The same without class token."""
COMPUTES = re.compile(
    r"(^|\.)((blocks|layers?|encoder_layer)[._]\d+|norm_pre|patch_embed|attn_pool|pre_logits|head_dist|dist_token"
    r"|distillation_token|reg_token|register_tokens|rope|rel_pos\w*|relative_position\w*)(\.|$)"
)
"""Parts of an encoder, or between it and its head, that change what is computed wherever they stand."""


def complete(file: File, layout: str, found: Tensors, rows: list[Row], hints: Hints) -> Reading:
    """Find the architecture of tensors in maekit's names, make what their layout has no place for, and check all.

    Args:
        file: that the tensors come from.
        layout: its name.
        found: by the names of a whole autoencoder; a head is ``encoder.head``.
        rows: of the tensors so far; completed in place.
        hints: of the caller.

    Raises:
        MaekitError: E-CKPT-HEADS if only a hint can tell them; E-CKPT-LAYOUT for what computes otherwise than ours;
            E-CONFIG-HINT for a hint that the file contradicts; E-CKPT-KEYS, E-CKPT-SHAPE, E-CKPT-NAN.
    """
    said = Said(file, hints)
    said.refuse_other_arithmetic()
    if said.name() is None:
        _refuse_computing(file, rows)
    shapes = _Shapes(file, found, said)
    kind, pool = shapes.kind, shapes.pool()
    if kind == "classifier":
        _leave_decoder_out(shapes.found, rows)
    spec = shapes.spec()
    made = shapes.fill(spec, rows)
    tensors = shapes.found if kind == "mae" else _inside(shapes.found, "encoder.")
    expected = _built(file, spec, kind, pool, len(found.get("encoder.head.weight", ())))
    _take_extra(file, expected, tensors, rows, kind)
    check(
        file.path, tensors, expected, f"{spec['name']} ({kind})",
        hint="another file, or --model NAME of inspect and convert: timm's name of its architecture",
    )  # fmt: skip
    shapes.note_positions(spec)
    classes = said.classes(len(tensors["head.weight"]) if kind == "classifier" else 0)
    return Reading(
        file.path, file.container, layout, kind, spec, tensors, classes, pool, [*rows, *made], said.notes,
        file.facts, file.beside, said.task() if kind == "classifier" else "classes",
    )  # fmt: skip


def position_convention(table: Tensor, grid: Size) -> str:
    """Name the convention of a table of positions (1, prefix + N, D).

    Sin-cos tables come with the width first (official, although its variable is called emb_h) or the height first.
    """
    places = table[0, table.shape[1] - grid[0] * grid[1] :].double()
    if not bool(places.any()):
        return "all zero, no position information"
    width, half = table.shape[2], table.shape[2] // 2
    if width % 4 == 0:
        ours = sincos_2d(width, grid).double()
        swapped = torch.cat([ours[:, half:], ours[:, :half]], dim=1)
        for name, one in (("width first", ours), ("height first", swapped)):
            if bool(torch.allclose(places, one, rtol=0, atol=1e-4)):
                return f"sin-cos, {name}"
    return "learned, or another table"


class _Shapes:
    """Reads an architecture off the shapes of tensors, and completes them."""

    def __init__(self, file: File, found: Tensors, said: Said) -> None:
        self.file, self.found, self.said = file, dict(found), said
        self.has_class_token = "encoder.cls_token" in found
        self.torso = not any(f"encoder.{name}" in found for name in ("cls_token", "norm.weight", "fc_norm.weight"))
        """ViTDet's backbone: class token and final norm are missing because that layout has no place for them."""
        decoder = any(name.startswith("decoder.") for name in found)
        self.kind = "classifier" if "encoder.head.weight" in found else "mae" if decoder else "encoder"

    def pool(self) -> str | None:
        if self.kind != "classifier":
            return None
        return self.said.pool(has_fc_norm="encoder.fc_norm.weight" in self.found, has_class_token=self.has_class_token)

    def spec(self) -> dict[str, Any]:
        width, channels, patch, patch_w = self._shape("encoder.patch_embed.proj.weight", 4)
        if patch != patch_w:
            raise MaekitError(
                "E-CKPT-SHAPE", f"patches of {self.file.path}", found=f"{patch} x {patch_w}", expected="square ones"
            )
        name, heads = self._name_and_heads(width)
        grid = self._grid(patch)
        mean, std = self.said.statistics(channels)
        count = self.said.class_tokens()
        variant = {} if count is None else {"variant": {"class_tokens": count}}
        return {
            "name": name,
            "img_size": [grid[0] * patch, grid[1] * patch],
            "patch_size": patch,
            "in_chans": channels,
            "embed_dim": width,
            "depth": self._depth("encoder.blocks"),
            "num_heads": heads,
            "drop_path": 0.0,
            **self._decoder(),
            "target": self.said.target(self.kind == "mae"),
            "mean": mean,
            "std": std,
            **variant,
        }

    def _shape(self, name: str, dims: int) -> tuple[int, ...]:
        value = self.found.get(name)
        if value is None or value.ndim != dims or 0 in value.shape:
            found = "none" if value is None else f"shape {tuple(value.shape)}"
            raise MaekitError(
                "E-CKPT-SHAPE", f"tensor {name} of {self.file.path}", found=found, expected=f"{dims} dimensions"
            )
        return tuple(value.shape)

    def _depth(self, prefix: str) -> int:
        numbers = {int(name.split(".")[2]) for name in self.found if name.startswith(f"{prefix}.")}
        missing = next(at for at in range(len(numbers) + 1) if at not in numbers)
        if missing < len(numbers) or not numbers:
            raise MaekitError(
                "E-CKPT-KEYS", f"{prefix} of {self.file.path}", found=f"no block {missing}", expected="each block"
            )
        return len(numbers)

    def _name_and_heads(self, width: int) -> tuple[str, int]:
        heads = self.said.heads()
        if (name := self.said.name()) is not None:
            return name, heads or self.said.geometry(name).heads
        usual, usual_heads = NAMES.get(width, (ANY_WIDTH, None))
        if heads is None and usual_heads is None:
            raise MaekitError(
                "E-CKPT-HEADS",
                f"attention heads of {self.file.path}",
                found=f"a width of {width}, which no published ViT has, and no configuration",
                expected="the number of heads: shapes do not tell it",
                hint="maekit inspect or convert with --num-heads N",
            )
        if heads is None:
            self.said.notes.append(
                f"{usual_heads} heads, those of the published ViT of width {width}: the file does not say"
            )
        return usual if self.has_class_token else NO_CLASS_TOKEN, heads or usual_heads or 1

    def _decoder(self) -> dict[str, int]:
        """Return size and heads; without a decoder the paper's, which `load_model` draws anew."""
        if self.kind != "mae":
            if self.said.hints.decoder_heads is not None:
                raise contradiction(
                    "decoder_heads", self.said.hints.decoder_heads, f"none: no decoder in {self.file.path}"
                )
            return {"decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16}
        dim = self._shape("decoder.embed.weight", 2)[0]
        heads = self.said.decoder_heads(dim)
        return {"decoder_dim": dim, "decoder_depth": self._depth("decoder.blocks"), "decoder_heads": heads}

    def _num_prefix(self) -> int:
        registers = self.found.get("encoder.reg_token")
        return self.has_class_token + (registers.shape[1] if registers is not None and registers.ndim == 3 else 0)

    def _grid(self, patch: int) -> Size:
        """Return rows and columns of patches; the file tells only how many places there are.

        Raises:
            MaekitError: E-CKPT-SHAPE where neither a square nor a size that was said fits them.
        """
        places, prefix = self._shape("encoder.pos_embed", 3)[1], self._num_prefix()
        size, must_fit = self.said.size()
        counts = {places - prefix, places} | ({places - 1} if self.torso or self.has_class_token else set[int]())
        if size and size[0] % patch == size[1] % patch == 0 and size[0] * size[1] // patch**2 in counts:
            return size[0] // patch, size[1] // patch
        if size and must_fit:
            raise MaekitError(
                "E-CKPT-SHAPE",
                f"positions of {self.file.path}",
                found=f"{places} places for patches of {patch} pixels",
                expected=f"those of images of {size[0]} x {size[1]} pixels, as was said",
            )
        for before in dict.fromkeys((1 if self.torso else prefix, 0)):
            side, sure = math.isqrt(max(0, places - before)), before == prefix and not self.torso
            if side and side * side == places - before and (sure or self._begins_with(before, side)):
                return side, side
        raise MaekitError(
            "E-CKPT-SHAPE",
            f"positions of {self.file.path}",
            found=f"{places} places, which make no square grid",
            expected="a square grid, or the size of the images",
            hint="maekit inspect or convert with --source-size HEIGHT WIDTH",
        )

    def _begins_with(self, rows: int, side: int) -> bool:
        """Say whether a table has that many rows before its places, though the tokens that are there say otherwise.

        5 x 5 places may be 4 x 6 and a class token's row. That row is zero in the method; and a table without it is
        recognised by what it holds, or by an architecture that is known to have none.
        """
        table = self.found["encoder.pos_embed"]
        if self.torso:
            return (not bool(table[0, 0].any())) == (rows == 1)
        return self._no_embed_class() or position_convention(table, (side, side)).startswith("sin-cos")

    def _no_embed_class(self) -> bool:
        """Say whether the named architecture adds positions to its patches alone."""
        name = self.said.name()
        if name is None:
            return False
        with torch.device("meta"):
            return bool(create_encoder(name, img_size=(224, 224), patch_size=16).no_embed_class)

    def fill(self, spec: dict[str, Any], rows: list[Row]) -> list[Row]:
        """Make what the layout had no place for: a torso's norm, zero rows, the decoder's positions; note each."""
        width, patch = spec["embed_dim"], spec["patch_size"]
        grid = (spec["img_size"][0] // patch, spec["img_size"][1] // patch)
        made: list[Row] = []

        def make(name: str, value: Tensor, note: str) -> None:
            self.found[name] = value
            made.append(Row("", name, "created", note))

        if self.torso:
            self._table(
                "encoder.pos_embed", rows, grid, "the class token's row left out: this layout has no such token"
            )
            make("encoder.norm.weight", torch.ones(width), "ones: the layout has none")
            make("encoder.norm.bias", torch.zeros(width), "zeros: the layout has none")
            self.said.notes.append(
                "neither class token nor final norm there; here tokens are normalised, without weights"
            )
        elif self.has_class_token and not self._no_embed_class():
            self._table("encoder.pos_embed", rows, grid, "a row of zeros put before, for the class token")
        if self.kind == "mae" and "decoder.pos_embed" not in self.found:
            table = sincos_2d(spec["decoder_dim"], grid, self._num_prefix())[None]
            make("decoder.pos_embed", table, "sin-cos, width first: fixed in the method")
            self.said.notes.append("decoder positions made anew: the file has none")
        elif self.kind == "mae" and self.has_class_token:
            self._table("decoder.pos_embed", rows, grid, "a row of zeros put before, for the class token")
        return made

    def _table(self, name: str, rows: list[Row], grid: Size, how: str) -> None:
        """Give a table the row of the class token, which is zero in the method, or take it away."""
        table, count = self.found[name], grid[0] * grid[1]
        if table.ndim != 3 or table.shape[1] != count + self.torso:
            return
        changed = table[:, 1:] if self.torso else torch.cat([table.new_zeros(1, 1, table.shape[2]), table], dim=1)
        self.found[name] = changed.contiguous()
        self.said.notes.append(f"{name}: {how}")
        for at, row in enumerate(rows):
            if row.ours == name:
                rows[at] = row._replace(what="reshaped", note=how)

    def note_positions(self, spec: dict[str, Any]) -> None:
        """Say which tables the positions are; another convention is kept, since the weights were trained on it."""
        patch = spec["patch_size"]
        grid = (spec["img_size"][0] // patch, spec["img_size"][1] // patch)
        for part in ("encoder", "decoder"):
            if (table := self.found.get(f"{part}.pos_embed")) is not None:
                self.said.notes.append(f"{part} positions: {position_convention(table, grid)}")


def _leave_decoder_out(found: Tensors, rows: list[Row]) -> None:
    for name in [name for name in found if name.startswith("decoder.")]:
        del found[name]
    for at, row in enumerate(rows):
        if row.ours.startswith("decoder."):
            rows[at] = row._replace(what="left out", note="a classifier has no decoder")


def _built(file: File, spec: dict[str, Any], kind: str, pool: str | None, num_classes: int) -> Tensors:
    try:
        return expected_tensors(spec, kind, pool, num_classes)
    except MaekitError as error:
        code = error.code.replace("E-CONFIG", "E-CKPT")
        raise MaekitError(code, f"architecture read off {file.path}", found=error.args[0]) from error


def _take_extra(file: File, expected: Tensors, tensors: Tensors, rows: list[Row], kind: str) -> None:
    """Take what a named architecture has beyond a plain ViT (layer scale), under timm's own names.

    Raises:
        MaekitError: E-CKPT-KEYS for part of the encoder that would be left out.
    """
    for at, row in enumerate(rows):
        if row.what == "left out" and kind != "mae" and row.theirs in expected:
            tensors[row.theirs] = file.tensors[row.theirs].float()
            rows[at] = Row(row.theirs, row.theirs, "used")
    _refuse_computing(file, rows)
    for at, row in enumerate(rows):
        if row.what == "left out" and not row.note:
            rows[at] = row._replace(note="no part of encoder, decoder or head")


def _refuse_computing(file: File, rows: list[Row]) -> None:
    """Refuse to leave out what changes what the encoder computes.

    Raises:
        MaekitError: E-CKPT-KEYS.
    """
    for row in rows:
        if row.what == "left out" and not row.ours and COMPUTES.search(row.theirs) and not _elsewhere(row.theirs):
            raise MaekitError(
                "E-CKPT-KEYS",
                f"tensors of {file.path}",
                found=f"{clean(row.theirs, 80)}, which a plain ViT does not have",
                expected="what the encoder computes without it would differ, so it cannot be left out",
                hint="maekit inspect or convert with --model NAME, timm's name of this architecture",
            )


def _elsewhere(name: str) -> bool:
    """Say whether a block belongs to another part of a detector or a language model, not to the encoder."""
    return name.startswith(("roi_heads.", "proposal_generator.", "text_", "language_"))


def _inside(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
