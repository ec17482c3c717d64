"""Rows of the paper's tables at three scales: what each run of a row is.

"paper" is the published recipe. "small" and "tiny" keep what a row varies and shrink the rest: small images, an encoder
of 4 blocks, a schedule of so many steps whatever the set, plain AdamW fine-tuning with part of the labels, and the
linear probe solved instead of trained. What a row gives as a number of the paper's size (epochs, decoder width, image
and patch side) becomes the same multiple of the scale's own; its label says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

from maekit.errors import MaekitError
from maekit.recipes.tables import Row, Table, finetune_recipe, pretrain_recipe, probe_recipe
from maekit.settings import Finetune, Pretrain, Settings

MODEL = "vit_tiny_patch16_224"
Name = Literal["paper", "small", "tiny"]


@dataclass(frozen=True)
class Scale:
    """What stands in the place of the paper's base.

    Attributes:
        told: what it changes, for people.
        sizes: width and blocks of the encoders in the place of ViT-B, ViT-L and ViT-H.
        pretrain: of the pre-training, beside geometry and encoder.
        finetune: of the fine-tuning.
        scratch: what training from scratch has otherwise.
        tokenizer: of the tokenizer, where a target needs one.
        labels: part of the labels unless another is asked for.
    """

    told: str
    sizes: Mapping[str, tuple[int, int]]
    pretrain: Mapping[str, Any]
    finetune: Mapping[str, Any]
    scratch: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    labels: str | None = "10%"


_PRETRAIN: dict[str, Any] = {
    "model": MODEL, "num_heads": 4, "decoder_dim": 64, "decoder_depth": 2, "decoder_heads": 4, "target": "pixel",
    "mask_ratio": 0.75, "crop_scale": (0.5, 1.0),
}  # fmt: skip
_FINETUNE: dict[str, Any] = {
    "batch_size": 128, "base_lr": 4e-3, "layer_decay": 0.75, "drop_path": 0.1, "mixup": 0.0, "cutmix": 0.0,
    "auto_augment": None, "random_erasing": 0.0, "crop_scale": (0.4, 1.0), "crop_pct": 1.0, "eval_every": 10_000,
}  # fmt: skip
SCALES: dict[str, Scale] = {
    "small": Scale(
        "images of 32 px (28 where they are smaller), an encoder 128 wide with 4 blocks, a decoder 64 wide with 2, "
        "2,000 steps of 256 images; 600 steps of fine-tuning and a solved probe with 10 % of the labels",
        {"b": (96, 4), "l": (128, 4), "h": (192, 6)},
        _PRETRAIN | {"steps": 2000, "batch_size": 256, "base_lr": 1e-3},
        _FINETUNE | {"steps": 600},
        {"layer_decay": 1.0},
        {"steps": 2000},
    ),
    "tiny": Scale(
        "images of 32 px (28 where they are smaller), an encoder 96 wide with 4 blocks, a decoder 64 wide with 2, "
        "800 steps of 128 images; 200 steps of fine-tuning and a solved probe with 10 % of the labels",
        {"b": (64, 3), "l": (96, 4), "h": (128, 5)},
        _PRETRAIN | {"steps": 800, "batch_size": 128, "base_lr": 2e-3},
        _FINETUNE | {"steps": 200},
        {"layer_decay": 1.0},
        {"steps": 800},
    ),
}
"""Chosen for this package: a row of "tiny" is minutes of a CPU core, one of "small" tens of minutes."""
NAMES = ("paper", *SCALES)
TOLD = {"paper": "the published recipes, on ImageNet-1K as FOLDER"} | {name: s.told for name, s in SCALES.items()}
REFERENCE = {"decoder_dim": 512, "img_size": 224, "patch_size": 16}
"""Settings whose values in a row are multiples of these, as epochs are of `length_of`."""
RELATIVE = {"epochs", *REFERENCE}


@dataclass(frozen=True)
class Plan:
    """What is run for a row at a scale; settings of the machine, of data and of seeds are not decided here.

    Attributes:
        label: of the row at this scale.
        pretrain: settings of the pre-training; None: from scratch.
        finetune: of the fine-tuning.
        probe: of the linear probe; None where the table has none.
        tokenizer: of the tokenizer, where the target is token.
        absent: why the row cannot be run at this scale; the rest is empty then.
    """

    label: str
    pretrain: dict[str, Any] | None = None
    finetune: dict[str, Any] = field(default_factory=dict)
    probe: dict[str, Any] | None = None
    tokenizer: dict[str, Any] = field(default_factory=dict)
    absent: str = ""


def plan(
    table: Table, row: Row, scale: str, *, side: int = 32, channels: int | None = None,
    pretrain: Mapping[str, Any] | None = None, finetune: Mapping[str, Any] | None = None,
) -> Plan:  # fmt: skip
    """Return what a row is at a scale.

    Args:
        table: whose row.
        row: the row.
        scale: "paper" | "small" | "tiny".
        side: of the images, in pixels: what decides the geometry at "small" and "tiny".
        channels: of the images where they are not 3.
        pretrain: changes of the base for every row, below what the row itself decides.
        finetune: the same for the fine-tuning.

    Raises:
        MaekitError: E-CONFIG-BOTH for a change of what the rows decide.
    """
    changes, tuned = dict(pretrain or {}), dict(finetune or {})
    _refuse_decided(table, changes, tuned, scale)
    if row.refused or table.refused:
        return Plan(row.label, absent=row.refused or table.refused)
    with_probe = "probe" in table.measures and row.pretrain is not None
    if scale == "paper":
        return Plan(
            row.label,
            None if row.pretrain is None else _decided(pretrain_recipe(table, row).settings, changes),
            _decided(finetune_recipe(table, row).settings, tuned),
            _decided(probe_recipe(row).settings) if with_probe else None,
            {"vocabulary": 8192},  # as DALL-E's dVAE, whose tokens are the paper's
        )
    chosen = SCALES[scale]
    base = _base(table, row, chosen, side, channels, changes)
    if (absent := _absent(row, base)) is not None:
        return Plan(row.label, absent=absent)
    scaled = {name: _scaled(name, value, base) for name, value in (row.pretrain or {}).items() if name != "epochs"}
    values = base | scaled
    if "epochs" in (row.pretrain or {}):
        values |= _scaled_length((row.pretrain or {})["epochs"] / length_of(table), base)
    scratch = {} if row.pretrain is not None else chosen.scratch
    fine = _changed(Finetune, {**chosen.finetune, **scratch}, tuned) | dict(row.finetune)
    if row.pretrain is None:
        names = ("model", "img_size", "patch_size", "channels", "embed_dim", "depth", "num_heads")
        fine = {name: values[name] for name in names if name in values} | fine | {"from_scratch": True}
    label = _label(table, row, values, base)
    probe = {"pool": "mean"} if with_probe else None
    return Plan(label, None if row.pretrain is None else values, fine, probe, dict(chosen.tokenizer))


def default_of(table: Table, scale: str) -> str:
    """Return the row that is the base: at the smaller scales another than the paper's where their base is lighter."""
    if scale == "paper":
        return table.default
    base = SCALES[scale].pretrain
    equal = [
        row.name for row in table.rows
        if row.pretrain and row.pretrain.keys() <= base.keys() - RELATIVE
        and all(base[name] == value for name, value in row.pretrain.items())
    ]  # fmt: skip
    return equal[0] if equal else table.default


def decided_by_rows(table: Table) -> tuple[set[str], set[str]]:
    """Return the settings of pre-training and fine-tuning that rows of a table decide."""
    return {n for row in table.rows for n in row.pretrain or {}}, {n for row in table.rows for n in row.finetune}


def _refuse_decided(table: Table, changes: Mapping[str, Any], tuned: Mapping[str, Any], scale: str) -> None:
    of_rows, of_finetune = decided_by_rows(table)
    if scale != "paper":  # multiples of the base: a change of that is one of all rows
        of_rows -= RELATIVE
    for verb, given, decided in (("pretrain", changes, of_rows), ("finetune", tuned, of_finetune)):
        if wrong := sorted(given.keys() & decided):
            raise MaekitError(
                "E-CONFIG-BOTH", f"setting {verb}", found=f"{', '.join(wrong)}, which the rows of {table.name} decide",
                expected="settings that are the same in every row",
            )  # fmt: skip


def _decided(settings: Settings, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the values that a recipe decides with changes over them."""
    values = {name: getattr(settings, name) for name in settings.model_fields_set}
    return _changed(type(settings), values, changes or {})


def _changed(kind: type[Settings], values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with changes over them; a rival of a changed one falls away, as in `maekit.config.resolve`."""
    found = dict(values)
    for name in changes:
        for rivals in kind.one_of:
            if name in rivals:
                found |= dict.fromkeys(rivals)
        for lost in kind.takes_along.get(name, ()):
            found[lost] = None
    return {**found, **changes}


def _base(
    table: Table, row: Row, scale: Scale, side: int, channels: int | None, changes: Mapping[str, Any]
) -> dict[str, Any]:
    width, depth = scale.sizes[row.size]
    geometry = {"img_size": (28, 28), "patch_size": 7} if side < 32 else {"img_size": (32, 32), "patch_size": 4}
    base: dict[str, Any] = {**scale.pretrain, **geometry, "embed_dim": width, "depth": depth}
    base |= {"target": "norm_pixel"} if table.main else {}
    base |= {} if channels is None else {"channels": channels}
    base["steps"] *= 2 if table.main else 1  # 1600 epochs where Table 1 has 800
    return _changed(Pretrain, base, changes)


def _absent(row: Row, base: Mapping[str, Any]) -> str | None:
    blocks = row.finetune.get("tune_blocks")
    if blocks is not None and blocks != "all" and blocks >= base["depth"]:
        return f"the encoder of this scale has {base['depth']} blocks: the last row trains all of them"
    if "img_size" in row.finetune:
        return "small images have no more to show at twice the side"
    if "patch_size" in (row.pretrain or {}) and _multiple("patch_size", row.pretrain["patch_size"], base) is None:  # type: ignore[index]
        return f"patches of {base['patch_size']} px cannot be halved"
    return None


def _multiple(name: str, value: Any, base: Mapping[str, Any]) -> int | None:
    """Return the same multiple of the base's value as the row's is of the paper's; None where it is no whole number."""
    own = base[name][0] if isinstance(base[name], tuple) else base[name]
    found = Fraction(value[0] if isinstance(value, tuple) else value) / Fraction(REFERENCE[name]) * own
    return int(found) if found.denominator == 1 else None


def _scaled(name: str, value: Any, base: Mapping[str, Any]) -> Any:
    if name not in REFERENCE:
        return value
    found = _multiple(name, value, base)
    if found is None:
        raise MaekitError(
            "E-CONFIG-VALUE", f"setting pretrain: {name} {base[name]}", expected="one of which the rows are multiples"
        )  # fmt: skip
    return (found, found) if name == "img_size" else found


def _scaled_length(multiple: float, base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the length of a row: of steps or epochs, whichever the base has."""
    if base.get("epochs") is not None:
        return {"epochs": base["epochs"] * multiple}
    return {"steps": max(1, round(base["steps"] * multiple))}


def length_of(table: Table) -> int:
    """Return the epochs that the paper's base of a table has."""
    return 1600 if table.main else 800


def _label(table: Table, row: Row, values: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """Return the row's label with what stands here for the paper's sizes."""
    told = []
    for name, value in (row.pretrain or {}).items():
        if name in RELATIVE:
            reference = length_of(table) if name == "epochs" else REFERENCE[name]
            number = Fraction(value[0] if isinstance(value, tuple) else value) / Fraction(reference)
            own = "steps" if name == "epochs" and values.get("epochs") is None else name
            shown = values[own][0] if isinstance(values[own], tuple) else values[own]
            told.append(f"x{number}: {own} {shown:g}")
    if row.size != "l" or row.label.startswith("ViT"):
        told.append(f"encoder {base['embed_dim']} wide, {base['depth']} blocks")
    return f"{row.label} (here {'; '.join(told)})" if told else row.label
