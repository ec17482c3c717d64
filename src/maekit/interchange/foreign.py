"""Weights of other libraries, read into maekit's names: which layout, which architecture, what became of each tensor.

A file is taken for the layout that names most of its tensors. The architecture is read off the shapes (width, depth,
patch, channels, grid, decoder); what shapes cannot tell (heads, target, statistics) comes from the configuration beside
the weights, from hints of the caller, or from what is published of models of that width, and each of these is noted.
Nothing is dropped silently: `Reading.rows` has one row for every tensor of the file and every tensor that was made.
"""

import difflib
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from maekit.errors import MaekitError, clean
from maekit.interchange.files import File, Tensors, read_file, read_json
from maekit.interchange.names import LAYOUTS, QKV, Layout, Place, place, theirs
from maekit.model.encoder import create_encoder, geometry
from maekit.model.mae import create_model
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
NO_CLASS_TOKEN = "vit_base_patch16_gap_224"
"""timm's plain ViT without class token; its width, depth and heads are set."""
DECODER_HEADS = 32
"""Width per head of the official decoder: 512 / 16 (models_mae.py)."""


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


class Hints(NamedTuple):
    """What a file may not say by itself.

    Attributes:
        model: timm's name of the architecture.
        num_heads: of the encoder.
        decoder_heads: of the decoder.
        target: "norm_pixel" | "pixel".
        img_size: H, W in pixels, for grids that are not square.
    """

    model: str | None = None
    num_heads: int | None = None
    decoder_heads: int | None = None
    target: str | None = None
    img_size: tuple[int, int] | None = None


class Reading(NamedTuple):
    """Foreign weights in maekit's names.

    Attributes:
        file: as it lies on the disk.
        layout: "official" | "timm" | "transformers" | "detectron2" | "torchvision" | "maekit" (names alone).
        kind: "mae" | "encoder" | "classifier".
        spec: arguments of `create_model`.
        tensors: the state dict of that kind: whole model, encoder alone, or timm's model with its head.
        classes: names of a classifier's outputs, empty if it has none.
        pool: "mean" | "cls" of a classifier.
        rows: one for each tensor.
        notes: what was taken for granted, in words.
    """

    file: File
    layout: str
    kind: str
    spec: dict[str, Any]
    tensors: Tensors
    classes: list[str]
    pool: str | None
    rows: list[Row]
    notes: list[str]


def read(path: Path, hints: Hints = Hints()) -> Reading:  # noqa: B008  (immutable)
    """Read weights of any layout but maekit's own.

    Raises:
        MaekitError: as `files.read_file`; E-CKPT-LAYOUT for names that no layout has (with the nearest ones);
            E-CKPT-KEYS, E-CKPT-SHAPE, E-CKPT-NAN as for maekit's own; E-CKPT-HEADS if only a hint can tell them.
    """
    return recognise(read_file(path), hints)


def recognise(file: File, hints: Hints = Hints()) -> Reading:  # noqa: B008
    """Find layout and architecture of tensors that are in memory already.

    Raises:
        MaekitError: as `read`.
    """
    layout = find_layout(file)
    found, rows = _gather(file, layout)
    name = "timm" if layout.name == "official" and _is_timm(file) else layout.name
    state, notes = _Architecture(file, found, hints).build(name, rows)
    return state._replace(layout=name, rows=rows, notes=notes)


def find_layout(file: File) -> Layout:
    """Return the layout that names most of a file's tensors, at best without a wrapper before the names.

    Raises:
        MaekitError: E-CKPT-LAYOUT.
    """
    names = list(file.tensors)

    def score(layout: Layout) -> tuple[int, int]:
        found = {name: there for name in names if (there := place(layout, name))}
        return len(found), sum(name in theirs(layout, there.ours) for name, there in found.items())

    scores = [score(layout) for layout in LAYOUTS]
    best = LAYOUTS[scores.index(max(scores))]
    there = {found.ours for name in names if (found := place(best, name))}
    if "encoder.patch_embed.proj.weight" not in there or not any(
        name.startswith("encoder.blocks.0.") for name in there
    ):
        raise _unknown(file, best, max(scores)[0])
    return best


def _unknown(file: File, best: Layout, count: int) -> MaekitError:
    """List the ten names of the file that come nearest to a layout's, and the best guess."""
    known = [*best.once, *(f"{prefix}.0.{part}" for prefix in best.lists for part in best.parts)]

    def distance(name: str) -> float:
        stem = re.sub(r"\d+", "0", name.rpartition(".")[0] or name)
        return -max(difflib.SequenceMatcher(None, stem, one).ratio() for one in known)

    names = sorted(file.tensors, key=distance)[:10] if len(file.tensors) <= 5000 else sorted(file.tensors)[:10]
    guess = f"{best.name} ({count} of {len(file.tensors)} names)" if count else "none: not a vision transformer's"
    return MaekitError(
        "E-CKPT-LAYOUT",
        f"layout of {file.path}",
        found=f"{', '.join(clean(name, 60) for name in names)}; best guess {guess}",
        expected="names of official, timm, transformers, detectron2 or torchvision files",
        hint="maekit inspect FILE on a file that works shows what they look like",
    )


def _is_timm(file: File) -> bool:
    return "architecture" in file.config or (
        file.container.endswith("safetensors") and "mask_token" not in file.tensors
    )


def _gather(file: File, layout: Layout) -> tuple[Tensors, list[Row]]:
    """Rename all tensors, put split qkv together, and write down what became of each."""
    found: Tensors = {}
    rows: list[Row] = []
    thirds: dict[str, dict[int, str]] = {}
    for name, value in file.tensors.items():
        where = place(layout, name)
        if where is None:
            rows.append(Row(name, "", "left out", ""))
        elif where.third is not None:
            thirds.setdefault(where.ours, {})[where.third] = name
        else:
            _once(file, found, where, name)
            found[where.ours] = value
            rows.append(_row(name, where.ours, value))
    for ours, parts in thirds.items():
        if len(parts) < 3 or ours in found:
            lacks = " and ".join(QKV[third] for third in range(3) if third not in parts) or "nothing: it is there twice"
            raise MaekitError("E-CKPT-KEYS", f"{ours} of {file.path}", found=f"query, key and value without {lacks}")
        found[ours] = torch.cat([file.tensors[parts[third]] for third in range(3)])
        rows += [Row(parts[third], ours, "reshaped", f"{QKV[third]} of the fused qkv") for third in range(3)]
    return {name: _float(file, name, value, rows) for name, value in found.items()}, rows


def _once(file: File, found: Tensors, where: Place, name: str) -> None:
    if where.ours in found:
        raise MaekitError(
            "E-CKPT-KEYS", f"{file.path}", found=f"two tensors for {where.ours}, one {clean(name, 80)}", expected="one"
        )


def _row(name: str, ours: str, value: Tensor) -> Row:
    same = name in (ours, ours.removeprefix("encoder."))
    return Row(name, ours, "used" if same else "renamed", "x".join(map(str, value.shape)))


def _float(file: File, name: str, value: Tensor, rows: list[Row]) -> Tensor:
    """Return float32; say so where it was another type, refuse what is no number of that kind."""
    if value.dtype == torch.float32:
        return value
    if not value.is_floating_point():
        raise MaekitError("E-CKPT-SHAPE", f"tensor {name} of {file.path}", found=value.dtype, expected="float")
    for at, row in enumerate(rows):
        if row.ours == name and row.what != "left out":
            rows[at] = row._replace(what="reshaped", note=f"{value.dtype} to float32".replace("torch.", ""))
    return value.float()


# ---------------------------------------------------------------------------------------------- architecture


class _Architecture:
    """Reads the architecture off tensors in maekit's names, completes and checks them."""

    def __init__(self, file: File, found: Tensors, hints: Hints) -> None:
        self.file, self.found, self.hints = file, found, hints
        self.notes: list[str] = []
        self.args = file.facts.get("args") or {}

    def build(self, layout: str, rows: list[Row]) -> tuple[Reading, list[str]]:
        head = "encoder.head.weight" in self.found
        has_decoder = any(name.startswith("decoder.") for name in self.found)
        spec = self._spec(has_decoder)
        self._complete(spec, rows, head, has_decoder)
        pool = ("mean" if "encoder.fc_norm.weight" in self.found else "cls") if head else None
        kind = "classifier" if head else "mae" if has_decoder else "encoder"
        tensors = self.found if kind == "mae" else _inside(self.found, "encoder.")
        self._take_extra(spec, tensors, rows, kind, pool)
        self._check(spec, tensors, kind, pool)
        self._note_positions(spec)
        classes = self._classes(len(tensors["head.weight"]) if head else 0)
        return Reading(self.file, layout, kind, spec, tensors, classes, pool, rows, []), self.notes

    def _shape(self, name: str, dims: int) -> tuple[int, ...]:
        value = self.found.get(name)
        if value is None or value.ndim != dims or 0 in value.shape:
            found = "none" if value is None else f"shape {tuple(value.shape)}"
            raise MaekitError(
                "E-CKPT-SHAPE", f"tensor {name} of {self.file.path}", found=found, expected=f"{dims} dimensions"
            )
        return tuple(value.shape)

    def _spec(self, has_decoder: bool) -> dict[str, Any]:
        width, channels, patch, patch_w = self._shape("encoder.patch_embed.proj.weight", 4)
        if patch != patch_w:
            raise MaekitError(
                "E-CKPT-SHAPE", f"patches of {self.file.path}", found=f"{patch} x {patch_w}", expected="square ones"
            )
        name, heads = self._name_and_heads(width)
        grid = self._grid(patch)
        mean, std = self._statistics(channels)
        spec: dict[str, Any] = {
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
        return spec

    def _depth(self, prefix: str) -> int:
        numbers = {int(name.split(".")[2]) for name in self.found if name.startswith(f"{prefix}.")}
        if not numbers or numbers != set(range(len(numbers))):
            missing = min(set(range(max(numbers, default=0) + 1)) - numbers, default=0)
            raise MaekitError(
                "E-CKPT-KEYS", f"{prefix} of {self.file.path}", found=f"no block {missing}", expected="each block"
            )
        return len(numbers)

    def _name_and_heads(self, width: int) -> tuple[str, int]:
        config = self.file.config
        name = self.hints.model or config.get("architecture")
        config_heads = config.get("num_attention_heads") or (config.get("model_args") or {}).get("num_heads")
        heads = self.hints.num_heads or (config_heads if isinstance(config_heads, int) else None)
        if name:
            known = geometry(str(name).split(".")[0])
            return str(name).split(".")[0], heads or known.heads
        usual, usual_heads = NAMES.get(width, ("vit_base_patch16_224", None))
        if heads is None and usual_heads is None:
            raise MaekitError(
                "E-CKPT-HEADS",
                f"attention heads of {self.file.path}",
                found=f"a width of {width}, which no published ViT has, and no configuration",
                expected="the number of heads: shapes do not tell it",
                hint="--num-heads N",
            )
        if heads is None:
            self.notes.append(
                f"{usual_heads} heads: those of the published ViT of width {width}; the file does not say"
            )
        has_class_token = "encoder.cls_token" in self.found
        return usual if has_class_token or self._is_torso() else NO_CLASS_TOKEN, heads or usual_heads or 1

    def _is_torso(self) -> bool:
        """Say whether class token and final norm are missing because the layout has no place for them (detectron2)."""
        return "encoder.norm.weight" not in self.found and "encoder.fc_norm.weight" not in self.found

    def _grid(self, patch: int) -> tuple[int, int]:
        """Return rows and columns of patches; the file tells only how many there are."""
        if "encoder.pos_embed" not in self.found:
            raise MaekitError("E-CKPT-KEYS", f"{self.file.path}", found="no encoder positions", expected="pos_embed")
        rows = self._shape("encoder.pos_embed", 3)[1]
        size = self.hints.img_size or self._config_size()
        if size and (size[0] // patch) * (size[1] // patch) in (rows, rows - 1, rows - self._num_prefix()):
            return size[0] // patch, size[1] // patch
        for prefix in dict.fromkeys((self._num_prefix(), 1, 0)):
            side = math.isqrt(max(0, rows - prefix))
            if side and side * side == rows - prefix:
                return side, side
        raise MaekitError(
            "E-CKPT-SHAPE",
            f"positions of {self.file.path}",
            found=f"{rows} places, which make no square grid",
            expected="a square grid, or the size of the images",
            hint="--img-size HEIGHT WIDTH",
        )

    def _num_prefix(self) -> int:
        reg = self.found.get("encoder.reg_token")
        return ("encoder.cls_token" in self.found) + (reg.shape[1] if reg is not None and reg.ndim == 3 else 0)

    def _config_size(self) -> tuple[int, int] | None:
        config = self.file.config
        inside = (config.get("model_args") or {}).get("img_size") or (config.get("pretrained_cfg") or {}).get(
            "input_size"
        )
        size = config.get("image_size") or inside or self.args.get("input_size")
        if isinstance(size, int):
            return size, size
        return (size[-2], size[-1]) if isinstance(size, list) and all(isinstance(n, int) for n in size[-2:]) else None

    def _statistics(self, channels: int) -> tuple[list[float], list[float]]:
        config, folder = self.file.config, self.file.path.parent
        cfg = config.get("pretrained_cfg") or {}
        mean, std = cfg.get("mean"), cfg.get("std")
        if "model_type" in config and (folder / "preprocessor_config.json").is_file():
            beside = read_json(folder / "preprocessor_config.json")
            mean, std = beside.get("image_mean"), beside.get("image_std")
        mean, std = _numbers(mean, channels), _numbers(std, channels)
        if mean and std and min(std) > 0:
            return mean, std
        if channels == 3:
            self.notes.append("images are normalised with ImageNet's mean and deviation; the file does not say")
            return list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
        self.notes.append("images are normalised with mean .5 and deviation .5; the file does not say")
        return [0.5] * channels, [0.5] * channels

    def _decoder(self, has_decoder: bool) -> dict[str, int]:
        if not has_decoder:
            return {"decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16}
        dim = self._shape("decoder.embed.weight", 2)[0]
        heads = self.hints.decoder_heads or self.file.config.get("decoder_num_attention_heads")
        if heads is None:
            heads = max(1, dim // DECODER_HEADS)
            self.notes.append(
                f"{heads} decoder heads: {DECODER_HEADS} values each as in the official decoder; the file does not say"
            )
        return {"decoder_dim": dim, "decoder_depth": self._depth("decoder.blocks"), "decoder_heads": int(heads)}

    def _target(self, has_decoder: bool) -> str:
        said = self.args.get("norm_pix_loss", self.file.config.get("norm_pix_loss"))
        if self.hints.target:
            return self.hints.target
        if isinstance(said, bool):
            return "norm_pixel" if said else "pixel"
        if has_decoder:
            self.notes.append(
                "target norm_pixel, the paper's main one; the file does not say (the authors' demo weights: pixel)"
            )
        return TARGETS[0]

    def _classes(self, count: int) -> list[str]:
        """Return the names of the classes where the configuration has all of them."""
        config = self.file.config
        labels = config.get("id2label") or {}
        names = [labels.get(str(at)) for at in range(count)] if isinstance(labels, dict) else []
        names = names if names else list((config.get("pretrained_cfg") or {}).get("label_names") or [])
        good = len(names) == count and all(isinstance(name, str) for name in names)
        return [clean(name, 200) for name in names] if good and names[:1] != ["LABEL_0"] else []

    def _complete(self, spec: dict[str, Any], rows: list[Row], head: bool, has_decoder: bool) -> None:
        """Make what the layout had no place for: zero rows of positions, a torso's class token and norm."""
        width, grid = spec["embed_dim"], [side // spec["patch_size"] for side in spec["img_size"]]
        count = grid[0] * grid[1]
        if "encoder.cls_token" not in self.found and self._is_torso():
            self._create("encoder.cls_token", torch.zeros(1, 1, width), rows, "zeros: the layout has none")
        if self._is_torso() and not head:
            self._create("encoder.norm.weight", torch.ones(width), rows, "ones: the layout has none")
            self._create("encoder.norm.bias", torch.zeros(width), rows, "zeros: the layout has none")
        if geometry(spec["name"]).has_class_token:
            self._zero_row("encoder.pos_embed", count, rows)
        if has_decoder and "decoder.pos_embed" not in self.found:
            table = sincos_2d(spec["decoder_dim"], (grid[0], grid[1]), self._num_prefix())[None]
            self._create("decoder.pos_embed", table, rows, "sin-cos, width first: fixed in the method")
        elif has_decoder and "encoder.cls_token" in self.found:
            self._zero_row("decoder.pos_embed", count, rows)

    def _create(self, name: str, value: Tensor, rows: list[Row], note: str) -> None:
        self.found[name] = value
        rows.append(Row("", name, "created", note))

    def _zero_row(self, name: str, count: int, rows: list[Row]) -> None:
        """Put the class token's row before a table that has only those of the patches; it is zero in the method."""
        table = self.found[name]
        if table.ndim == 3 and table.shape[1] == count and not self._no_embed_class():
            self.found[name] = torch.cat([table.new_zeros(1, 1, table.shape[2]), table], dim=1)
            for at, row in enumerate(rows):
                if row.ours == name:
                    rows[at] = row._replace(what="reshaped", note="a row of zeros put before, for the class token")

    def _no_embed_class(self) -> bool:
        name = self.hints.model or self.file.config.get("architecture")
        if not name:
            return False
        with torch.device("meta"):
            return bool(create_encoder(str(name).split(".")[0], img_size=(224, 224), patch_size=16).no_embed_class)

    def _take_extra(self, spec: dict[str, Any], tensors: Tensors, rows: list[Row], kind: str, pool: str | None) -> None:
        """Take what the named architecture has beyond a plain ViT (layer scale), under timm's own names."""
        wanted = _expected(spec, kind, pool, self._num_classes(kind))
        for at, row in enumerate(rows):
            if row.what != "left out":
                continue
            if kind != "mae" and row.theirs in wanted:
                tensors[row.theirs] = self.file.tensors[row.theirs].float()
                rows[at] = Row(row.theirs, row.theirs, "used")
            elif re.search(r"(^|\.)(blocks|layers?|encoder_layer)[._]\d+\.", row.theirs) and not _elsewhere(row.theirs):
                raise MaekitError(
                    "E-CKPT-KEYS",
                    f"tensors of {self.file.path}",
                    found=f"{clean(row.theirs, 80)}, which a plain ViT does not have",
                    expected="what the encoder computes without it would differ, so it cannot be left out",
                    hint="--model NAME with timm's name of this architecture",
                )
            else:
                rows[at] = row._replace(note="no part of encoder, decoder or head")

    def _num_classes(self, kind: str) -> int:
        return len(self.found["encoder.head.weight"]) if kind == "classifier" else 0

    def _check(self, spec: dict[str, Any], tensors: Tensors, kind: str, pool: str | None) -> None:
        """Compare names, shapes and values with the architecture, built without memory."""
        expected = _expected(spec, kind, pool, self._num_classes(kind))
        missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        if missing or extra:
            parts = [f"{word} {_some(names)}" for word, names in (("missing", missing), ("unknown", extra)) if names]
            raise MaekitError(
                "E-CKPT-KEYS",
                f"tensors of {self.file.path}",
                found="; ".join(parts),
                expected=f"those of {spec['name']} ({kind})",
            )
        wrong = [name for name, value in tensors.items() if value.shape != expected[name].shape]
        if wrong:
            found = "; ".join(
                f"{name} {tuple(tensors[name].shape)} not {tuple(expected[name].shape)}" for name in wrong[:3]
            )
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise MaekitError(
                "E-CKPT-SHAPE", f"tensors of {self.file.path}", found=found + more, expected=f"those of {spec['name']}"
            )
        bad = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
        if bad:
            raise MaekitError(
                "E-CKPT-NAN",
                f"tensors of {self.file.path}",
                found=f"NaN or infinity in {_some(bad)}",
                expected="finite numbers",
            )

    def _note_positions(self, spec: dict[str, Any]) -> None:
        """Say which tables the positions are; another convention is kept, since the weights were trained on it."""
        grid = (spec["img_size"][0] // spec["patch_size"], spec["img_size"][1] // spec["patch_size"])
        for part in ("encoder", "decoder"):
            if (table := self.found.get(f"{part}.pos_embed")) is not None and table.ndim == 3:
                self.notes.append(f"{part} positions: {position_convention(table, grid)}")


def position_convention(table: Tensor, grid: tuple[int, int]) -> str:
    """Name the convention of a table of positions (1, prefix + N, D).

    Sin-cos tables come width first (official, although its variable is called emb_h), height first, and with
    frequencies divided by D/4 - 1 (MoCo v3, big_vision).
    """
    places = table[0, table.shape[1] - grid[0] * grid[1] :].double()
    if not bool(places.any()):
        return "all zero: no position information"
    width, half = table.shape[2], table.shape[2] // 2
    if width % 4 == 0:
        ours = sincos_2d(width, grid).double()
        swapped = torch.cat([ours[:, half:], ours[:, :half]], dim=1)
        for name, one in (("width first", ours), ("height first", swapped)):
            if bool(torch.allclose(places, one, rtol=0, atol=1e-4)):
                return f"sin-cos, {name}"
    return "learned, or another table"


def _expected(spec: dict[str, Any], kind: str, pool: str | None, num_classes: int) -> Tensors:
    """Return names and shapes of a model, without memory."""
    try:
        with torch.device("meta"):
            if kind == "classifier":
                names = ("name", "patch_size", "in_chans", "embed_dim", "depth", "num_heads")
                geometry_ = {name: spec[name] for name in names}
                size = (spec["img_size"][0], spec["img_size"][1])
                built: nn.Module = create_encoder(
                    **geometry_, img_size=size, num_classes=num_classes, pool=pool or "cls"
                )
            else:
                model = create_model(**spec)
                built = model if kind == "mae" else model.encoder
            return built.state_dict()
    except MaekitError as error:
        raise MaekitError(
            error.code.replace("CONFIG", "CKPT"), f"the architecture read off the file: {error.args[0]}"
        ) from error


def _inside(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _numbers(value: object, count: int) -> list[float]:
    """Return a list of that many numbers, or none of them."""
    good = isinstance(value, list) and len(value) == count and all(isinstance(one, int | float) for one in value)
    return [float(one) for one in value] if good and isinstance(value, list) else []


def _elsewhere(name: str) -> bool:
    """Say whether a block belongs to another part of a detector or a language model, not to the encoder."""
    return name.startswith(("roi_heads.", "proposal_generator.", "text_", "language_"))


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(clean(name, 80) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
