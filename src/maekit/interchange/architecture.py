"""The architecture behind foreign weights: read off shapes, completed by a configuration, by hints, by what is usual.

Width, depth, patch, channels, grid, decoder stand in the shapes. Heads, target and statistics of the images do not:
they come from hints of the caller, from the configuration beside the weights, or else from what is published of models
of that width, and then a note says so. What has no place in a plain ViT is never left out where it would change what
the encoder computes.
"""

import math
import re
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from maekit.errors import MaekitError, clean
from maekit.interchange.files import File, Tensors, read_json
from maekit.interchange.names import Row
from maekit.interchange.reading import Hints, Reading, check, expected_tensors, some
from maekit.model.encoder import create_encoder, geometry
from maekit.model.patches import sincos_2d
from maekit.model.targets import TARGETS

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
DECODER_HEAD_WIDTH = 32
"""Width per head of the official decoder: 512 / 16 (models_mae.py)."""
EPSILON = 1e-6
"""Of every layer norm of the authors' models, timm's and ours."""
KNOWN_ARGS = {
    "img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "num_classes", "global_pool", "fc_norm",
    "class_token", "drop_path_rate", "drop_rate", "weight_init",
}  # fmt: skip
"""timm's ``model_args`` that stand in the shapes, are read here, or matter in training only; another could change what
the model computes."""


def complete(file: File, layout: str, found: Tensors, rows: list[Row], hints: Hints) -> Reading:
    """Find the architecture of tensors in maekit's names, make what their layout has no place for, and check all.

    Args:
        file: that the tensors come from.
        layout: its name.
        found: by the names of a whole autoencoder; a head is ``encoder.head``.
        rows: of the tensors so far; completed in place.
        hints: of the caller.

    Raises:
        MaekitError: E-CKPT-HEADS if only a hint can tell them; E-CKPT-LAYOUT for a head or a norm that maekit has not;
            E-CKPT-KEYS, E-CKPT-SHAPE, E-CKPT-NAN.
    """
    reader = _Reader(file, found, hints)
    kind, pool = reader.kind(), reader.pool()
    has_decoder = kind == "mae"
    spec = reader.spec(has_decoder)
    reader.refuse_other_arithmetic()
    created = reader.fill(spec, kind, rows)
    tensors = reader.found if has_decoder else _inside(reader.found, "encoder.")
    expected = _built(file, spec, kind, pool, len(reader.found.get("encoder.head.weight", ())))
    _take_extra(file, expected, tensors, rows, kind)
    check(file.path, tensors, expected, f"{spec['name']} ({kind})")
    reader.note_positions(spec)
    classes = reader.classes(len(tensors["head.weight"]) if kind == "classifier" else 0)
    return Reading(
        file.path, file.container, layout, kind, spec, tensors, classes, pool, [*rows, *created], reader.notes,
        file.facts, file.beside,
    )  # fmt: skip


def position_convention(table: Tensor, grid: tuple[int, int]) -> str:
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


class _Reader:
    """Reads an architecture off tensors, configuration and hints, and notes what it assumes."""

    def __init__(self, file: File, found: Tensors, hints: Hints) -> None:
        self.file, self.found, self.hints = file, dict(found), hints
        self.notes: list[str] = []
        self.args = _mapping(file.facts, "args")
        self.model_args = _mapping(file.config, "model_args")
        self.torso = self._is_torso()

    # ------------------------------------------------------------------------------------------------- what it is

    def kind(self) -> str:
        if "encoder.head.weight" in self.found:
            return "classifier"
        return "mae" if any(name.startswith("decoder.") for name in self.found) else "encoder"

    def pool(self) -> str | None:
        """Return how a classifier pools; refuse a way that maekit's classifiers do not have.

        Raises:
            MaekitError: E-CKPT-LAYOUT.
        """
        if "encoder.head.weight" not in self.found:
            return None
        has_fc_norm = "encoder.fc_norm.weight" in self.found
        said = self.model_args.get("global_pool", self.file.config.get("global_pool"))
        usual = {"avg": True, "token": False}.get(said, has_fc_norm) if isinstance(said, str) else has_fc_norm
        if usual != has_fc_norm or not (has_fc_norm or "encoder.cls_token" in self.found):
            raise MaekitError(
                "E-CKPT-LAYOUT",
                f"head of {self.file.path}",
                found=f"global_pool {said or 'avg'} {'with' if has_fc_norm else 'without'} fc_norm",
                expected="a head on the class token after norm, or on the mean of patch tokens before fc_norm",
            )
        return "mean" if has_fc_norm else "cls"

    def spec(self, has_decoder: bool) -> dict[str, Any]:
        width, channels, patch, patch_w = self._shape("encoder.patch_embed.proj.weight", 4)
        if patch != patch_w:
            raise MaekitError(
                "E-CKPT-SHAPE", f"patches of {self.file.path}", found=f"{patch} x {patch_w}", expected="square ones"
            )
        name, heads = self._name_and_heads(width)
        grid = self._grid(patch)
        mean, std = self._statistics(channels)
        return {
            "name": name,
            "img_size": [grid[0] * patch, grid[1] * patch],
            "patch_size": patch,
            "in_chans": channels,
            "embed_dim": width,
            "depth": self._depth("encoder.blocks"),
            "num_heads": heads,
            "drop_path": 0.0,
            **self._decoder(has_decoder),
            "target": self._target(has_decoder),
            "mean": mean,
            "std": std,
        }

    def refuse_other_arithmetic(self) -> None:
        """Refuse what the configuration says of a model that computes otherwise, where no tensor would show it.

        Raises:
            MaekitError: E-CKPT-LAYOUT.
        """
        config = self.file.config
        other = sorted(self.model_args.keys() - KNOWN_ARGS)
        if config.get("hidden_act", "gelu") != "gelu":
            other.append(f"hidden_act {config['hidden_act']}")
        if other:
            raise MaekitError(
                "E-CKPT-LAYOUT",
                f"configuration beside {self.file.path}",
                found=some(map(str, other)),
                expected="a plain ViT: with it the encoder would compute otherwise than ours",
            )
        epsilon = config.get("layer_norm_eps")
        if isinstance(epsilon, float) and epsilon != EPSILON:
            self.notes.append(
                f"layer norms: an epsilon of {epsilon:g} in the configuration, {EPSILON:g} here, as in the authors' "
                "code (D3)"
            )

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
        config = self.file.config
        heads = self.hints.num_heads or _count(config.get("num_attention_heads") or self.model_args.get("num_heads"))
        if name := self._said_name():
            try:
                return name, heads or geometry(name).heads
            except MaekitError as error:
                if self.hints.model:
                    raise
                where = f"configuration beside {self.file.path}"
                raise MaekitError(
                    "E-CKPT-LAYOUT", where, found=error.args[0], hint="maekit inspect or convert with --model NAME"
                ) from error
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
            said = f"{usual_heads} heads, those of the published ViT of width {width}: the file does not say"
            self.notes.append(said)
        return usual if self._has_class_token() else NO_CLASS_TOKEN, heads or usual_heads or 1

    def _said_name(self) -> str | None:
        name = self.hints.model or self.file.config.get("architecture")
        return name.split(".")[0] if isinstance(name, str) else None

    def _has_class_token(self) -> bool:
        return "encoder.cls_token" in self.found or self.torso

    def _is_torso(self) -> bool:
        """Say whether class token and final norm are missing because the layout has no place for them (ViTDet's)."""
        return not any(f"encoder.{name}" in self.found for name in ("cls_token", "norm.weight", "fc_norm.weight"))

    def _grid(self, patch: int) -> tuple[int, int]:
        """Return rows and columns of patches; the file tells only how many places there are."""
        places, prefix = self._shape("encoder.pos_embed", 3)[1], self._num_prefix()
        size = self.hints.img_size or self._said_size()
        if size and (size[0] // patch) * (size[1] // patch) in (places, places - 1, places - prefix):
            return size[0] // patch, size[1] // patch
        for before in dict.fromkeys((prefix, 1, 0)):
            side = math.isqrt(max(0, places - before))
            if side and side * side == places - before:
                return side, side
        raise MaekitError(
            "E-CKPT-SHAPE",
            f"positions of {self.file.path}",
            found=f"{places} places, which make no square grid",
            expected="a square grid, or the size of the images",
            hint="maekit inspect or convert with --source-size HEIGHT WIDTH",
        )

    def _num_prefix(self) -> int:
        registers = self.found.get("encoder.reg_token")
        return self._has_class_token() + (registers.shape[1] if registers is not None and registers.ndim == 3 else 0)

    def _said_size(self) -> tuple[int, int] | None:
        inside = self.model_args.get("img_size") or _mapping(self.file.config, "pretrained_cfg").get("input_size")
        size = self.file.config.get("image_size") or inside or self.args.get("input_size")
        if isinstance(size, int):
            return size, size
        if not isinstance(size, list) or len(size) not in (2, 3) or not all(isinstance(side, int) for side in size):
            return None
        return size[-2], size[-1]

    def _statistics(self, channels: int) -> tuple[list[float], list[float]]:
        """Return mean and deviation of the images, in units of 0..1."""
        beside = self.file.path.parent / "preprocessor_config.json"
        said = _mapping(self.file.config, "pretrained_cfg")
        mean, std = said.get("mean"), said.get("std")
        if "model_type" in self.file.config and beside.is_file():
            processor = read_json(beside)
            mean, std = processor.get("image_mean"), processor.get("image_std")
        mean, std = _numbers(mean, channels), _numbers(std, channels)
        if mean and std and min(std) > 0:
            return mean, std
        if channels == 3:
            self.notes.append("images normalised with ImageNet's mean and deviation: the file does not say")
            return list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
        self.notes.append("images normalised with mean .5 and deviation .5: the file does not say")
        return [0.5] * channels, [0.5] * channels

    def _decoder(self, has_decoder: bool) -> dict[str, int]:
        """Return size and heads; without a decoder the paper's, which `load_model` draws anew."""
        if not has_decoder:
            return {"decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16}
        dim = self._shape("decoder.embed.weight", 2)[0]
        heads = self.hints.decoder_heads or _count(self.file.config.get("decoder_num_attention_heads"))
        if heads is None:
            heads = max(1, dim // DECODER_HEAD_WIDTH)
            self.notes.append(
                f"{heads} decoder heads, {DECODER_HEAD_WIDTH} values each as in the official decoder: "
                "the file does not say"
            )
        return {"decoder_dim": dim, "decoder_depth": self._depth("decoder.blocks"), "decoder_heads": heads}

    def _target(self, has_decoder: bool) -> str:
        if self.hints.target:
            return self.hints.target
        said = self.args.get("norm_pix_loss", self.file.config.get("norm_pix_loss"))
        if isinstance(said, bool):
            return "norm_pixel" if said else "pixel"
        if has_decoder:
            self.notes.append(
                "target norm_pixel, the paper's best: the file does not say (the authors' demo weights predict pixels)"
            )
        return TARGETS[0]

    def classes(self, count: int) -> list[str]:
        """Return the names of the classes where the configuration has all of them."""
        labels = _mapping(self.file.config, "id2label")
        names: Any = [labels.get(str(at)) for at in range(count)]
        if not labels:
            inside = _mapping(self.file.config, "pretrained_cfg")
            names = inside.get("label_names") or self.file.config.get("label_names")
        good = isinstance(names, list) and len(names) == count and all(isinstance(name, str) for name in names)
        return [clean(name, 200) for name in names] if good and names[:1] != ["LABEL_0"] else []

    # -------------------------------------------------------------------------------------------- what is made

    def fill(self, spec: dict[str, Any], kind: str, rows: list[Row]) -> list[Row]:
        """Make what the layout had no place for: a torso's class token and norm, zero rows, the decoder's positions."""
        width, patch = spec["embed_dim"], spec["patch_size"]
        grid = (spec["img_size"][0] // patch, spec["img_size"][1] // patch)
        created: list[Row] = []

        def create(name: str, value: Tensor, note: str) -> None:
            self.found[name] = value
            created.append(Row("", name, "created", note))

        if self.torso:
            create("encoder.cls_token", torch.zeros(1, 1, width), "zeros: the layout has none")
            create("encoder.norm.weight", torch.ones(width), "ones: the layout has none")
            create("encoder.norm.bias", torch.zeros(width), "zeros: the layout has none")
        if geometry(spec["name"]).has_class_token:
            self._zero_row("encoder.pos_embed", grid, rows)
        if kind == "mae" and "decoder.pos_embed" not in self.found:
            table = sincos_2d(spec["decoder_dim"], grid, self._num_prefix())[None]
            create("decoder.pos_embed", table, "sin-cos, width first: fixed in the method")
        elif kind == "mae" and "encoder.cls_token" in self.found:
            self._zero_row("decoder.pos_embed", grid, rows)
        return created

    def _zero_row(self, name: str, grid: tuple[int, int], rows: list[Row]) -> None:
        """Put the class token's row before a table that has only those of the patches; it is zero in the method."""
        table = self.found[name]
        if table.ndim != 3 or table.shape[1] != grid[0] * grid[1] or self._no_embed_class():
            return
        self.found[name] = torch.cat([table.new_zeros(1, 1, table.shape[2]), table], dim=1)
        for at, row in enumerate(rows):
            if row.ours == name:
                rows[at] = row._replace(what="reshaped", note="a row of zeros put before, for the class token")

    def _no_embed_class(self) -> bool:
        """Say whether the named architecture adds positions to its patches alone."""
        name = self._said_name()
        if name is None:
            return False
        with torch.device("meta"):
            return bool(create_encoder(name, img_size=(224, 224), patch_size=16).no_embed_class)

    def note_positions(self, spec: dict[str, Any]) -> None:
        """Say which tables the positions are; another convention is kept, since the weights were trained on it."""
        patch = spec["patch_size"]
        grid = (spec["img_size"][0] // patch, spec["img_size"][1] // patch)
        for part in ("encoder", "decoder"):
            if (table := self.found.get(f"{part}.pos_embed")) is not None:
                self.notes.append(f"{part} positions: {position_convention(table, grid)}")


def _built(file: File, spec: dict[str, Any], kind: str, pool: str | None, num_classes: int) -> Tensors:
    try:
        return expected_tensors(spec, kind, pool, num_classes)
    except MaekitError as error:
        code = error.code.replace("E-CONFIG", "E-CKPT")
        raise MaekitError(code, f"architecture read off {file.path}", found=error.args[0]) from error


def _take_extra(file: File, expected: Tensors, tensors: Tensors, rows: list[Row], kind: str) -> None:
    """Take what a named architecture has beyond a plain ViT (layer scale), under timm's own names.

    Raises:
        MaekitError: E-CKPT-KEYS for part of a block that would be left out.
    """
    for at, row in enumerate(rows):
        if row.what != "left out":
            continue
        if kind != "mae" and row.theirs in expected:
            tensors[row.theirs] = file.tensors[row.theirs].float()
            rows[at] = Row(row.theirs, row.theirs, "used")
        elif re.search(r"(^|\.)(blocks|layers?|encoder_layer)[._]\d+\.", row.theirs) and not _elsewhere(row.theirs):
            raise MaekitError(
                "E-CKPT-KEYS",
                f"tensors of {file.path}",
                found=f"{clean(row.theirs, 80)}, which a plain ViT does not have",
                expected="what the encoder computes without it would differ, so it cannot be left out",
                hint="maekit inspect or convert with --model NAME, timm's name of this architecture",
            )
        else:
            rows[at] = row._replace(note="no part of encoder, decoder or head")


def _elsewhere(name: str) -> bool:
    """Say whether a block belongs to another part of a detector or a language model, not to the encoder."""
    return name.startswith(("roi_heads.", "proposal_generator.", "text_", "language_"))


def _inside(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _mapping(config: dict[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _numbers(value: object, count: int) -> list[float]:
    """Return a list of that many finite numbers, or none of them."""
    if not isinstance(value, list) or len(value) != count:
        return []
    good = all(isinstance(one, int | float) and math.isfinite(one) for one in value)
    return [float(one) for one in value] if good else []
