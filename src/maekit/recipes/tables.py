"""The tables and figures of the paper: rows, each a deviation from one base, beside the published figures.

A `Row` says what it changes of its table's base and what the paper found. At scale "paper" the base is ViT-L/16 on
ImageNet-1K: of section 4.1 and Table 1 (800 epochs, plain pixels) or, where `Table.main`, of Table 3 (1600 epochs,
normalised pixels); these are recipes by the name ``paper/TABLE/ROW``. At the scales "small" and "tiny" the same rows
stand on a base for small images (`maekit.recipes.scales`).

Figures: arXiv 2111.06377; accuracies as fractions of 1. Points of its curves that could not be
checked have none here, and what its text says of the order stands in `Table.says`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from maekit.recipes import cost, paper
from maekit.recipes.cited import OURS, Cited, Recipe, recipe
from maekit.settings import Finetune, Pretrain, Probe

GROUP = "paper"
MODELS = {"b": "b16", "l": "l16", "h": "h14"}
NAMES = {"b": "ViT-B/16", "l": "ViT-L/16", "h": "ViT-H/14"}
PRETRAIN = {"b": paper.pretrain_vit_b16, "l": paper.pretrain_vit_l16, "h": paper.pretrain_vit_h14}
FINETUNE = {"b": paper.finetune_vit_b16_paper, "l": paper.finetune_vit_l16_paper, "h": paper.finetune_vit_h14_paper}
PROBE = {"b": paper.probe_vit_b16, "l": paper.probe_vit_l16, "h": paper.probe_vit_h14}
SCRATCH = {"b": paper.scratch_vit_b16, "l": paper.scratch_vit_l16, "h": paper.scratch_vit_h14}


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: of the recipe ``paper/TABLE/NAME`` and of folders.
        label: for people.
        pretrain: what it changes of the base's pre-training; None: there is none, trained from scratch.
        finetune: what it changes of the fine-tuning.
        paper: measure -> published figure: "finetune" and "probe" are top-1, "hours" those of 128 TPU-v3 cores.
        size: "b" | "l" | "h", the paper's encoder.
        x: where the row stands on a numeric axis.
        reference: name of the row that its speed-up is relative to; "": the default row.
        note: what a reader of the figure has to know.
        refused: why it cannot be trained by `maekit ablate`, and what can be done; "": it can.
    """

    name: str
    label: str
    pretrain: Mapping[str, Any] | None = field(default_factory=dict)
    finetune: Mapping[str, Any] = field(default_factory=dict)
    paper: Mapping[str, float] = field(default_factory=dict)
    size: str = "l"
    x: float | None = None
    reference: str = ""
    note: str = ""
    refused: str = ""


@dataclass(frozen=True)
class Table:
    """A table or figure.

    Attributes:
        name: ``table1a-decoder-depth``.
        title: what is varied.
        source: of the deviations and figures.
        default: name of the row that is the paper's default; "" where none is.
        axis: what the numeric x axis is; "": rows are categories.
        measures: what each row is scored by.
        main: the base is that of Table 3 and not of Table 1.
        says: (measure, better row, worse row) that the paper's text or curve states without figures.
        refused: why none of its rows can be trained by `maekit ablate`.
    """

    name: str
    title: str
    source: str
    rows: tuple[Row, ...]
    default: str = ""
    axis: str = ""
    measures: tuple[str, ...] = ("finetune", "probe")
    main: bool = False
    says: tuple[tuple[str, str, str], ...] = ()
    refused: str = ""

    def row(self, name: str) -> Row:
        """Return the row of a name that is there."""
        return next(row for row in self.rows if row.name == name)


def _scores(finetune: float | None = None, probe: float | None = None, **more: float) -> dict[str, float]:
    """Return per cents as fractions; what is unknown is left out."""
    given = {"finetune": finetune, "probe": probe}
    return {name: round(value / 100, 5) for name, value in given.items() if value is not None} | more


def _rising(measure: str, *names: str) -> tuple[tuple[str, str, str], ...]:
    """Say that each row is better than the one before."""
    return tuple((measure, better, worse) for worse, better in pairwise(names))


BEIT_LIKE = {
    "encoder_mask_token": True, "decoder_depth": 0, "target": "token", "mask_kind": "block", "mask_ratio": 0.4,
}  # fmt: skip
"""As in BEiT (arXiv 2106.08254): mask tokens in the encoder, a linear head on it, visual tokens, blocks of 40 %."""
PIXEL, NORM = {"target": "pixel"}, {"target": "norm_pixel"}
OTHER_METHOD = "another method, not trained here"
NO_DENSE = "detection and segmentation are not in this package"


def _table1() -> Iterator[Table]:
    yield Table(
        "table1a-decoder-depth",
        "Decoder depth in blocks",
        "paper Table 1a",
        tuple(
            Row(str(n), f"{n} block{'s' * (n > 1)}", {"decoder_depth": n}, paper=_scores(*found), x=n)
            for n, found in {
                1: (84.8, 65.5),
                2: (84.9, 70.0),
                4: (84.9, 71.9),
                8: (84.9, 73.5),
                12: (84.4, 73.3),
            }.items()
        ),
        default="8",
        axis="decoder blocks",
    )
    yield Table(
        "table1b-decoder-width",
        "Decoder width",
        "paper Table 1b",
        tuple(
            Row(str(n), f"{n} wide", {"decoder_dim": n}, paper=_scores(*found), x=n)
            for n, found in {
                128: (84.9, 69.1), 256: (84.8, 71.3), 512: (84.9, 73.5), 768: (84.4, 73.1), 1024: (84.3, 73.1),
            }.items()
        ),
        default="512",
        axis="decoder width",
    )  # fmt: skip
    yield Table(
        "table1c-mask-token",
        "Mask tokens in the encoder",
        "paper Table 1c",
        (
            Row("with", "encoder with mask tokens", {"encoder_mask_token": True}, paper=_scores(84.2, 59.6)),
            Row("without", "encoder without mask tokens", paper=_scores(84.9, 73.5)),
        ),
        default="without",
    )
    yield Table(
        "table1d-target",
        "Reconstruction target",
        "paper Table 1d",
        (
            Row("pixel", "pixels", PIXEL, paper=_scores(84.9, 73.5)),
            Row("norm-pixel", "normalised pixels", NORM, paper=_scores(85.4, 73.9)),
            Row("pca", "PCA coefficients", {"target": "pca"}, paper=_scores(84.6, 72.3)),
            Row(
                "token", "tokens", {"target": "token"}, paper=_scores(85.3, 71.6),
                note="the paper's tokens are those of DALL-E's dVAE; ours of a tokenizer of the same images",
            ),
        ),
        default="pixel",
    )  # fmt: skip
    yield Table(
        "table1e-augmentation",
        "Augmentation of the pre-training",
        "paper Table 1e",
        (
            Row("none", "none (centre crop)", {"crop": "centre", "flip": False}, paper=_scores(84.0, 65.7)),
            Row("crop-fixed", "crop of fixed size", {"crop": "fixed"}, paper=_scores(84.7, 73.1)),
            Row("crop-random", "crop of random size", paper=_scores(84.9, 73.5)),
            Row(
                "crop-jitter", "crop of random size + colour jitter", {"color_jitter": 0.4}, paper=_scores(84.3, 71.9),
                note="the paper does not state the strength of its jitter; ours is .4",
            ),
        ),
        default="crop-random",
    )  # fmt: skip
    yield Table(
        "table1f-mask-sampling",
        "Mask sampling",
        "paper Table 1f",
        (
            Row("random-75", "random, 75 %", {"mask_kind": "random", "mask_ratio": 0.75}, paper=_scores(84.9, 73.5)),
            Row("block-50", "block-wise, 50 %", {"mask_kind": "block", "mask_ratio": 0.5}, paper=_scores(83.9, 72.3)),
            Row("block-75", "block-wise, 75 %", {"mask_kind": "block", "mask_ratio": 0.75}, paper=_scores(82.8, 63.9)),
            Row("grid-75", "grid-wise, 75 %", {"mask_kind": "grid", "mask_ratio": 0.75}, paper=_scores(84.0, 66.0)),
        ),
        default="random-75",
    )


def _figures() -> Iterator[Table]:
    printed = {10: _scores(probe=54.6), 75: _scores(84.9, 73.5)}
    yield Table(
        "fig5-mask-ratio",
        "Mask ratio",
        "paper Fig. 5",
        tuple(
            Row(str(n), f"{n} %", {"mask_ratio": n / 100}, paper=printed.get(n, {}), x=n)
            for n in (10, 20, 30, 40, 50, 60, 70, 75, 80, 90)
        ),
        default="75",
        axis="mask ratio, %",
        says=_rising("probe", "10", "20", "30", "40", "50", "60", "70", "75"),
    )
    known = {800: _scores(84.9, 73.5), 1600: _scores(85.1)}
    yield Table(
        "fig7-schedule",
        "Length of the pre-training",
        "paper Fig. 7",
        tuple(
            Row(str(n), f"{n} epochs", {"epochs": n}, paper=known.get(n, {}), x=n) for n in (100, 200, 400, 800, 1600)
        ),
        default="800",
        axis="epochs",
        says=tuple(s for m in ("finetune", "probe") for s in _rising(m, "100", "200", "400", "800", "1600")),
    )
    yield Table(
        "loss-on-all",
        "Loss on the removed patches or on all",
        "paper section 4.1",
        (
            Row("masked", "removed patches", {"loss_on": "masked"}, paper=_scores(84.9, 73.5)),
            Row("all", "all patches", {"loss_on": "all"}, paper=_scores(84.4), note="a footnote says: about 0.5 lower"),
            Row("visible", "visible patches", {"loss_on": "visible"}, note="not in the paper"),
        ),
        default="masked",
    )
    yield Table(
        "pretext",
        "Masking beside other corruptions",
        OURS,
        (
            Row("masking", "random masking, 75 %", paper=_scores(84.9, 73.5)),
            Row(
                "noise", "denoising: Gaussian noise, nothing removed",
                {"mask_kind": "none", "add_noise": 0.5, "loss_on": "all"}, note="not in the paper",
            ),
            Row(
                "centre-block", "one block in the centre, 25 %", {"mask_kind": "centre", "mask_ratio": 0.25},
                note="as context encoders remove it (arXiv 1604.07379); not in the paper",
            ),
        ),
        default="masking",
    )  # fmt: skip
    yield Table(
        "fig9-partial",
        "Blocks that are fine-tuned",
        "paper Fig. 9",
        tuple(
            Row(
                f"{n:g}", f"{n:g} block{'s' * (n > 1)}", finetune={"tune_blocks": "all" if n == 24 else n},
                paper=_scores(found), x=n,
            )
            for n, found in {
                0: 73.5, 0.5: 79.1, 1: 81.0, 2: None, 4: None, 6: None, 12: None, 18: None, 24: 84.9,
            }.items()
        ),
        default="24",
        axis="blocks fine-tuned",
        measures=("finetune",),
        says=_rising("finetune", "1", "2", "4"),
    )  # fmt: skip


def _main() -> Iterator[Table]:
    yield Table(
        "table2-wallclock",
        "Wall-clock time of the pre-training, mask tokens in the encoder or not",
        "paper Table 2",
        tuple(
            Row(
                f"{size}-{'with' if tokens else f'd{depth}'}",
                f"{NAMES[size]}, {'mask tokens in the encoder, ' if tokens else ''}decoder of {depth} "
                f"block{'s' * (depth > 1)}",
                {"decoder_depth": depth} | ({"encoder_mask_token": True} if tokens else {}),
                paper=_scores(finetune, hours=hours),
                size=size,
                reference=f"{size}-with",
            )
            for size, tokens, depth, finetune, hours in (
                ("l", True, 8, 84.2, 42.4), ("l", False, 8, 84.9, 15.4), ("l", False, 1, 84.8, 11.6),
                ("h", True, 8, None, 119.6), ("h", False, 8, 85.8, 34.5), ("h", False, 1, 85.9, 29.3),
            )
        ),
        default="l-d8",
        measures=("finetune",),
    )  # fmt: skip
    scratch = [
        Row(f"scratch-{size}", f"{NAMES[size]}, from scratch", None, paper=_scores(found), size=size,
            note="top-1 of the averaged weights (T11)")
        for size, found in (("b", 82.3), ("l", 82.6), ("h", 83.1))
    ]  # fmt: skip
    mae = [
        Row(f"mae-{size}", f"{NAMES[size]}, MAE", paper=_scores(*found), size=size)
        for size, found in (("b", (83.6, 68.0)), ("l", (85.9, 75.8)), ("h", (86.9, 76.6)))
    ]
    large = Row(
        "mae-h448", "ViT-H/14, MAE, fine-tuned at 448 px", finetune={"img_size": (448, 448)}, paper=_scores(87.8),
        size="h",
    )  # fmt: skip
    others = [
        Row(f"{name}-{size}", f"{NAMES[size]}, {told}", paper=_scores(found, probe), size=size, refused=OTHER_METHOD)
        for name, told, size, found, probe in (
            ("dino", "DINO", "b", 82.8, None), ("moco-v3", "MoCo v3", "b", 83.2, None),
            ("moco-v3", "MoCo v3", "l", 84.1, 77.6), ("beit", "BEiT", "b", 83.2, None),
            ("beit", "BEiT", "l", 85.2, 52.1),
        )
    ]  # fmt: skip
    beit_like = [
        Row(
            f"beit-like-{size}", f"{NAMES[size]}, BEiT-like", {**BEIT_LIKE, "epochs": 800}, size=size,
            note="BEiT's corruption, head and kind of target in this loop; its own figures stand at beit",
        )
        for size in "bl"
    ]  # fmt: skip
    yield Table(
        "table3-comparison",
        "MAE, training from scratch and other methods",
        "paper Table 3",
        (*scratch, *others, *beit_like, *mae, large),
        default="mae-l",
        main=True,
    )
    yield Table(
        "fig8-scaling",
        "Size of the encoder, from MAE and from scratch",
        "paper Fig. 8",
        (*scratch, *mae),
        default="mae-l",
        main=True,
        measures=("finetune",),
    )
    yield Table(
        "pixels-or-tokens",
        "Pixels or tokens as target, by size",
        "paper section 5",
        tuple(
            Row(f"{name}-{size}", f"{NAMES[size]}, {told}", deviation, paper=_scores(found), size=size)
            for name, told, deviation, scores in (
                ("pixel", "pixels", PIXEL, (83.3, 85.1, 86.2)),
                ("norm-pixel", "normalised pixels", NORM, (83.6, 85.9, 86.9)),
                ("token", "tokens", {"target": "token"}, (83.6, 85.7, 86.9)),
            )
            for size, found in zip("blh", scores, strict=True)
        ),
        default="norm-pixel-l",
        main=True,
        measures=("finetune",),
    )
    yield Table(
        "long-seq",
        "Longer sequences of patches",
        OURS,
        (
            Row("224-16", "224 px, patch 16: 196 patches", NORM),
            Row(
                "448-16", "448 px, patch 16: 784 patches, masks of 2 x 2 patches",
                {**NORM, "img_size": (448, 448), "mask_unit": 2, "checkpointing": True},
            ),
            Row(
                "448-16-unit1", "448 px, patch 16: 784 patches, masks of single patches",
                {**NORM, "img_size": (448, 448), "checkpointing": True},
            ),
            Row(
                "224-8", "224 px, patch 8: 784 patches, masks of 2 x 2 patches",
                {**NORM, "patch_size": 8, "mask_unit": 2, "checkpointing": True},
            ),
        ),
        default="224-16",
    )  # fmt: skip


def _elsewhere() -> Iterator[Table]:
    transfer = {
        "inat17": ("iNaturalist 2017", (70.5, 75.7, 79.3, 83.4)),
        "inat18": ("iNaturalist 2018", (75.4, 80.1, 83.0, 86.8)),
        "inat19": ("iNaturalist 2019", (80.5, 83.4, 85.7, 88.3)),
        "places205": ("Places205", (63.9, 65.8, 65.9, 66.8)),
        "places365": ("Places365", (57.9, 59.4, 59.8, 60.3)),
    }
    sizes = (("b", "ViT-B/16"), ("l", "ViT-L/16"), ("h", "ViT-H/14"), ("h448", "ViT-H/14 at 448 px"))
    rows = [
        Row(
            f"{name}-{short}", f"{told}, {model}", None, paper=_scores(found), size=short[0],
            refused=f"maekit finetune RUN --recipe transfer/finetune-{name} --data FOLDER",
        )
        for name, (told, scores) in transfer.items()
        for (short, model), found in zip(sizes, scores, strict=True)
    ]  # fmt: skip
    dense = {
        "coco-box": ("COCO, AP of boxes", (50.3, 53.3)),
        "coco-mask": ("COCO, AP of masks", (44.9, 47.2)),
        "ade20k": ("ADE20K, mIoU", (48.1, 53.6)),
    }
    rows += [
        Row(f"{name}-{size}", f"{told}, {NAMES[size]}", None, paper={"points": found}, size=size, refused=NO_DENSE)
        for name, (told, scores) in dense.items()
        for size, found in zip("bl", scores, strict=True)
    ]
    yield Table(
        "table-transfer",
        "Other data sets",
        "paper Table 4, Table 5 and Table 6",
        tuple(rows),
        measures=("finetune", "points"),
        main=True,
        refused="every row is a data set of its own, scored by a command of its own",
    )
    published = {
        "mae": ("MAE", (("b", (51.7, 35.9, 48.3, 34.5)), ("l", (41.8, 57.1, 59.9, 45.3)),
                        ("h", (33.8, 68.2, 64.4, 49.6)), ("h448", (36.8, 76.7, 66.5, 50.9)))),
        "supervised": ("supervised", (("b", (45.8, 27.2, 49.4, 35.6)), ("l", (42.3, 29.6, 50.9, 37.5)),
                                      ("h", (41.3, 33.1, 50.3, 38.0)))),
    }  # fmt: skip
    yield Table(
        "table-robustness",
        "ImageNet-C, -A, -R and -Sketch: mCE (lower is better) and top-1",
        "paper T13",
        tuple(
            Row(
                f"{name}-{short}", f"{dict(sizes)[short]}, {told}", None, size=short[0],
                paper={"in-c": found[0]}
                | {f"in-{kind}": round(value / 100, 5) for kind, value in zip("ars", found[1:], strict=True)},
                refused="maekit robustness CLASSIFIER --protocol in-c --data FOLDER; in-a, in-r, in-sketch likewise",
            )
            for name, (told, by_size) in published.items()
            for short, found in by_size
        ),
        measures=("in-c", "in-a", "in-r", "in-s"),
        main=True,
        refused="it scores classifiers that are there already, on images published for that",
    )  # fmt: skip


TABLES: dict[str, Table] = {table.name: table for part in (_table1, _figures, _main, _elsewhere) for table in part()}


# -------------------------------------------------------------------------------------------- as recipes of the paper


def base_of(table: Table, size: str = "l") -> dict[str, Cited]:
    """Return the pre-training that the rows of a table deviate from, at the scale of the paper."""
    values = dict(PRETRAIN[size]().cited)
    if table.main:
        return values
    return values | {
        "target": Cited("pixel", "paper Table 1", {"paper Table 3": "norm_pixel"}),
        "epochs": Cited(800, "paper section 4.1", {"paper Table 3": 1600}),
    }


def pretrain_recipe(table: Table, row: Row) -> Recipe[Pretrain]:
    """Return the pre-training of a row as the paper ran it; ``target_from`` is left to the user."""
    assert row.pretrain is not None
    values = base_of(table, row.size)
    for name, value in row.pretrain.items():
        before = values.get(name)
        default = {"paper, default row": before.value} if before and before.value != value else {}
        values[name] = Cited(value, OURS if name in ("color_jitter", "checkpointing") else table.source, default)
    return recipe(Pretrain, values)


def finetune_recipe(table: Table, row: Row) -> Recipe[Finetune]:
    """Return the fine-tuning of a row, or its training from scratch."""
    values = dict((SCRATCH if row.pretrain is None else FINETUNE)[row.size]().cited)
    return recipe(Finetune, values | {name: Cited(value, table.source) for name, value in row.finetune.items()})


def probe_recipe(row: Row) -> Recipe[Probe]:
    """Return the linear probe of a row."""
    return PROBE[row.size]()


def row_recipe(table: Table, row: Row) -> Recipe[Any]:
    """Return the recipe ``paper/TABLE/ROW``: the pre-training, or of a row without one the training from scratch."""
    return finetune_recipe(table, row) if row.pretrain is None else pretrain_recipe(table, row)


def named() -> dict[str, tuple[Table, Row]]:
    """Return table and row by ``paper/TABLE/ROW``, of all rows that can be trained."""
    return {
        f"{GROUP}/{table.name}/{row.name}": (table, row)
        for table in TABLES.values()
        if not table.refused
        for row in table.rows
        if not row.refused
    }


def hours(table: Table, row: Row) -> dict[str, float]:
    """Estimate GPU-hours of a row at the scale of the paper (`maekit.recipes.cost`), by what is done."""
    found: dict[str, float] = {}
    if row.pretrain is not None:
        chosen = pretrain_recipe(table, row).settings
        found["pretrain"] = cost.gpu_hours(sum(cost.pretraining_macs(chosen)), (chosen.epochs or 0) * cost.IMAGENET)
    tuned = finetune_recipe(table, row).settings
    found["finetune"] = cost.gpu_hours(cost.encoder_macs(tuned), (tuned.epochs or 0) * cost.IMAGENET)
    if "probe" in table.measures and row.pretrain is not None:
        seen = (probe_recipe(row).settings.epochs or 0) * cost.IMAGENET
        found["probe"] = cost.gpu_hours(cost.encoder_macs(pretrain_recipe(table, row).settings), seen, trained=False)
    return found
