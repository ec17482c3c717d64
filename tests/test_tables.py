"""The paper's tables: figures typed in anew, recipes that build, scales that say what they change, cost."""

import json
import re
from typing import Any

import pytest
import torch

from maekit import cli, recipes
from maekit.config import resolve
from maekit.errors import MaekitError
from maekit.model.masking import check_masking
from maekit.recipes import cost, paper
from maekit.recipes.scales import SCALES, default_of, plan
from maekit.recipes.tables import TABLES, Row, Table, hours, named, row_recipe
from maekit.settings import Autoencoder, Finetune, Masks, Pretrain, Probe
from maekit.tasks.pretrain import new_model

GROUPS = {
    "table1a-decoder-depth", "table1b-decoder-width", "table1c-mask-token", "table1d-target", "table1e-augmentation",
    "table1f-mask-sampling", "fig5-mask-ratio", "fig7-schedule", "table2-wallclock", "table3-comparison",
    "fig8-scaling", "fig9-partial", "table-transfer", "table-robustness", "long-seq", "loss-on-all", "pretext",
    "pixels-or-tokens",
}  # fmt: skip
# arXiv 2111.06377: fine-tuned, linear probe, in per cent; nothing here is read from the tables of the package.
PUBLISHED: dict[str, dict[str, tuple[float | None, ...]]] = {
    "table1a-decoder-depth": {
        "1": (84.8, 65.5), "2": (84.9, 70.0), "4": (84.9, 71.9), "8": (84.9, 73.5), "12": (84.4, 73.3),
    },
    "table1b-decoder-width": {
        "128": (84.9, 69.1), "256": (84.8, 71.3), "512": (84.9, 73.5), "768": (84.4, 73.1), "1024": (84.3, 73.1),
    },
    "table1c-mask-token": {"with": (84.2, 59.6), "without": (84.9, 73.5)},
    "table1d-target": {"pixel": (84.9, 73.5), "norm-pixel": (85.4, 73.9), "pca": (84.6, 72.3), "token": (85.3, 71.6)},
    "table1e-augmentation": {
        "none": (84.0, 65.7), "crop-fixed": (84.7, 73.1), "crop-random": (84.9, 73.5), "crop-jitter": (84.3, 71.9),
    },
    "table1f-mask-sampling": {
        "random-75": (84.9, 73.5), "block-50": (83.9, 72.3), "block-75": (82.8, 63.9), "grid-75": (84.0, 66.0),
    },
    "fig5-mask-ratio": {"10": (None, 54.6), "75": (84.9, 73.5)},
    "fig9-partial": {"0": (73.5,), "0.5": (79.1,), "1": (81.0,)},
    "table3-comparison": {
        "scratch-b": (82.3,), "scratch-l": (82.6,), "scratch-h": (83.1,), "dino-b": (82.8,), "moco-v3-b": (83.2,),
        "moco-v3-l": (84.1, 77.6), "beit-b": (83.2,), "beit-l": (85.2, 52.1), "mae-b": (83.6, 68.0),
        "mae-l": (85.9, 75.8), "mae-h": (86.9, 76.6), "mae-h448": (87.8,),
    },
    "pixels-or-tokens": {
        "pixel-b": (83.3,), "pixel-l": (85.1,), "pixel-h": (86.2,), "norm-pixel-b": (83.6,), "norm-pixel-l": (85.9,),
        "norm-pixel-h": (86.9,), "token-b": (83.6,), "token-l": (85.7,), "token-h": (86.9,),
    },
}  # fmt: skip
WALL_CLOCK = {"l-with": 42.4, "l-d8": 15.4, "l-d1": 11.6, "h-with": 119.6, "h-d8": 34.5, "h-d1": 29.3}
TRAINED = list(named())


def row_of(name: str) -> tuple[Table, Row]:
    return named()[name]


def test_every_group_is_there_and_every_published_figure_stands_at_its_row() -> None:
    assert set(TABLES) == GROUPS
    for table, rows in PUBLISHED.items():
        for row, figures in rows.items():
            found = TABLES[table].row(row).paper
            expected = {
                name: figure for name, figure in zip(("finetune", "probe"), figures, strict=False) if figure is not None
            }
            assert {name: 100 * found[name] for name in expected} == pytest.approx(expected), (table, row)
    assert {row.name: row.paper["hours"] for row in TABLES["table2-wallclock"].rows} == WALL_CLOCK


def test_the_rows_of_table_1_and_its_figures_are_complete() -> None:
    for name, rows in PUBLISHED.items():
        if name.startswith("table1"):
            assert {row.name for row in TABLES[name].rows} == rows.keys()
    assert [row.name for row in TABLES["fig5-mask-ratio"].rows] == [*map(str, (10, 20, 30, 40, 50, 60, 70, 75, 80, 90))]
    for table in TABLES.values():
        names = [row.name for row in table.rows]
        assert len(set(names)) == len(names) and all(re.fullmatch(r"[\w.-]+", name) for name in names)
        assert not table.default or table.default in names
        for measure, better, worse in table.says:
            assert measure in table.measures and {better, worse} <= set(names)


@pytest.mark.parametrize("name", TRAINED)
def test_a_rows_recipe_resolves_to_the_base_and_what_the_row_changes(name: str) -> None:
    table, row = row_of(name)
    kind = Finetune if row.pretrain is None else Pretrain
    chosen, sources = resolve(kind, recipe=name)
    assert chosen.recipe == name and f"recipe {name}" in sources.values()
    for key, value in ((row.finetune if row.pretrain is None else row.pretrain) or {}).items():
        assert getattr(chosen, key) == value, key
    if isinstance(chosen, Pretrain):
        assert row.pretrain is not None
        main = table.main
        assert chosen.epochs == row.pretrain.get("epochs", 1600 if main else 800)
        assert chosen.target == row.pretrain.get("target", "norm_pixel" if main else "pixel")
        assert chosen.model == paper.MODELS[{"b": "b16", "l": "l16", "h": "h14"}[row.size]]
        assert (chosen.batch_size, chosen.base_lr, chosen.stats) == (4096, 1.5e-4, "imagenet")
    for cited in row_recipe(table, row).cited.values():
        for source in (cited.source, *cited.others):
            assert re.match(
                r"paper (T\d+|Table \d|Fig\. \d|section \d|A\.\d|, default)|paper, |repo\b|our own$", source
            )
        assert cited.value not in cited.others.values()


def test_the_default_rows_are_all_the_same_run() -> None:
    base = row_recipe(*row_of("paper/table1a-decoder-depth/8")).settings
    names = (
        "table1b-decoder-width", "table1c-mask-token", "table1d-target", "table1e-augmentation",
        "table1f-mask-sampling", "fig5-mask-ratio", "fig7-schedule", "loss-on-all", "fig9-partial", "pretext",
    )  # fmt: skip
    for name in names:
        table = TABLES[name]
        assert row_recipe(table, table.row(table.default)).settings == base, name


@pytest.mark.parametrize("scale", ["paper", "small", "tiny"])
def test_models_and_masks_of_every_row_can_be_built(scale: str) -> None:
    built: set[str] = set()
    for table, row in named().values():
        found = plan(table, row, scale)
        if found.absent or found.pretrain is None:
            continue
        chosen = Pretrain.model_validate(found.pretrain)
        key = chosen.model_dump_json(include={*Autoencoder.model_fields, *Masks.model_fields, "img_size"} - {"target"})
        if key in built or chosen.target in ("pca", "token"):  # whose outputs are those of what was fitted
            continue
        built.add(key)
        with torch.device("meta"):
            model = new_model(chosen, 3)
        if chosen.mask_kind != "none":
            check_masking(chosen.mask_kind, model.grid, chosen.mask_ratio, chosen.mask_unit)
    assert len(built) > 20


def test_a_scale_keeps_multiples_and_says_so() -> None:
    table = TABLES["table1b-decoder-width"]
    found = {row.name: plan(table, row, "tiny") for row in table.rows}
    assert [one.pretrain["decoder_dim"] for one in found.values() if one.pretrain] == [16, 32, 64, 96, 128]
    assert found["128"].label == "128 wide (here x1/4: decoder_dim 16)"
    table = TABLES["fig7-schedule"]
    steps = [plan(table, row, "tiny").pretrain for row in table.rows]
    assert [each["steps"] for each in steps if each] == [100, 200, 400, 800, 1600]
    changed = plan(table, table.row("100"), "tiny", pretrain={"epochs": 8.0}).pretrain
    assert changed is not None and changed["epochs"] == 1.0 and changed["steps"] is None
    table = TABLES["fig8-scaling"]
    assert plan(table, table.row("mae-l"), "tiny").pretrain == {
        **SCALES["tiny"].pretrain, "steps": 1600, "target": "norm_pixel", "img_size": (32, 32), "patch_size": 4,
        "embed_dim": 96, "depth": 4,
    }  # fmt: skip
    scratch = plan(table, table.row("scratch-h"), "tiny")
    assert scratch.pretrain is None and scratch.finetune["from_scratch"] and scratch.finetune["embed_dim"] == 128
    assert scratch.probe is None


def test_rows_that_a_scale_cannot_have_are_absent_with_a_reason() -> None:
    partial = TABLES["fig9-partial"]
    absent = {row.name: plan(partial, row, "tiny").absent for row in partial.rows}
    assert {name for name, why in absent.items() if not why} == {"0", "0.5", "1", "2", "24"}
    assert "has 4 blocks" in absent["18"]
    assert "halved" in plan(TABLES["long-seq"], TABLES["long-seq"].row("224-8"), "tiny", side=28).absent
    assert plan(TABLES["table3-comparison"], TABLES["table3-comparison"].row("dino-b"), "paper").absent
    assert default_of(TABLES["table1a-decoder-depth"], "tiny") == "2"
    assert default_of(TABLES["table1a-decoder-depth"], "paper") == "8"


def test_what_rows_decide_cannot_be_changed_for_all() -> None:
    table = TABLES["fig5-mask-ratio"]
    with pytest.raises(MaekitError, match="mask_ratio, which the rows of fig5-mask-ratio decide"):
        plan(table, table.rows[0], "tiny", pretrain={"mask_ratio": 0.5})
    with pytest.raises(MaekitError, match="epochs, which the rows"):
        plan(TABLES["fig7-schedule"], TABLES["fig7-schedule"].rows[0], "paper", pretrain={"epochs": 5})
    found = plan(table, table.row("50"), "paper", pretrain={"steps": 40, "batch_size": 64}).pretrain
    assert found is not None and (found["steps"], found["epochs"], found["warmup_epochs"]) == (40, None, None)
    chosen = Pretrain.model_validate(found)
    assert (chosen.steps, chosen.batch_size, chosen.mask_ratio) == (40, 64, 0.5)


def test_settings_of_every_plan_are_settings_of_the_verbs() -> None:
    for scale in ("paper", "small", "tiny"):
        for table, row in named().values():
            found = plan(table, row, scale)
            if not found.absent:
                Finetune.model_validate(found.finetune)
                Probe.model_validate(found.probe or {})


# ------------------------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize(
    ("size", "encoder", "decoder", "whole"),
    [("b", 4.41, 5.37, 17.56), ("l", 15.38, 5.38, 61.55), ("h", 41.43, 7.13, 167.29)],
)
def test_multiplications_of_the_papers_models(size: str, encoder: float, decoder: float, whole: float) -> None:
    chosen = row_recipe(*row_of(f"paper/pixels-or-tokens/pixel-{size}")).settings
    found = [macs / 1e9 for macs in cost.pretraining_macs(chosen)]
    shape = cost.encoder_shape(chosen)  # the authors' code embeds the removed patches too
    found[0] += 0.75e-9 * shape.patches * shape.values * shape.width
    tokens = 1 + shape.patches  # ... and the whole last block of the decoder
    found[1] += 1e-9 * (1 + shape.patches // 4) * (10 * 512**2 + 2 * tokens * 512)
    assert found == pytest.approx([encoder, decoder], rel=0.005)
    assert cost.encoder_macs(chosen) / 1e9 == pytest.approx(whole, rel=0.005)


def test_mask_tokens_in_the_encoder_cost_three_times_the_operations() -> None:
    table = TABLES["table1c-mask-token"]
    tokens, default = (
        sum(cost.pretraining_macs(row_recipe(table, table.row(n)).settings)) for n in ("with", "without")
    )
    # 3.22 where removed patches are embedded and the decoder's last block is whole; the paper: 3.3
    assert tokens / default == pytest.approx(3.26, abs=0.01)


def test_the_formula_and_the_count_of_the_model_agree() -> None:
    counted = pytest.importorskip("maekit.model.flops")
    for name in ("paper/table1a-decoder-depth/1", "paper/table1b-decoder-width/1024", "paper/table1c-mask-token/with",
                 "paper/long-seq/448-16", "paper/loss-on-all/all", "paper/pretext/noise"):  # fmt: skip
        chosen = row_recipe(*row_of(name)).settings
        with torch.device("meta"):
            model = new_model(chosen, 3)
        found = counted.flops(model, chosen.mask_ratio)
        macs = cost.pretraining_macs(chosen)
        assert [2 * each for each in macs] == pytest.approx([found.encoder.forward, found.decoder.forward], rel=0.002)


def test_gpu_hours_follow_from_operations() -> None:
    found = hours(*row_of("paper/table1a-decoder-depth/8"))
    # what the authors' code computes, less 147 removed patches embedded and most of the last block for 50 tokens
    spent = 20.76e9 - 147 * 768 * 1024 - 50 * (10 * 512**2 + 2 * 197 * 512)
    assert found["pretrain"] == pytest.approx(6 * spent * 800 * 1_281_167 / (312e12 * 0.3) / 3600, rel=0.002)
    assert found.keys() == {"pretrain", "finetune", "probe"}
    assert hours(*row_of("paper/table3-comparison/scratch-l")).keys() == {"finetune"}


# ----------------------------------------------------------------------------------------------- the front door


def shown(*words: str) -> Any:
    return cli._run(["recipes", *words])


def test_recipes_lists_tables_by_line_and_one_by_its_rows() -> None:
    every = shown()
    for name in TABLES:
        assert f"paper/{name}/ROW" in every.text
    text = shown("table1a").text
    assert re.search(r"^  1 +1 block +0\.848 +0\.655 +[\d,]+ pretrain \+ [\d,]+ finetune \+ [\d,]+ probe$", text, re.M)
    assert "A100-hours" in text and "30%" in text
    row = json.loads(json.dumps(shown("table1d").metrics))["tables"][0]["rows"][3]
    assert (row["name"], row["paper"]) == ("token", {"finetune": 0.853, "probe": 0.716}) and row["note"]
    assert "maekit finetune RUN --recipe transfer/finetune-inat17" in shown("table-transfer").text
    assert "paper/finetune-vit-b16-paper" in shown("paper/finetune").text


def test_a_row_is_shown_and_found_like_any_recipe() -> None:
    text = shown("show", "table1a-decoder-depth/1").text
    assert re.search(r"^decoder_depth: 1 +# paper Table 1a: 1; paper, default row: 8$", text, re.M)
    assert "expect: fine-tuned 0.848 top-1, linear probe 0.655 (paper)" in text
    assert recipes.find("fig8-scaling/scratch-b")[1].settings.from_scratch
    near = {"table1a-decoder-depth/3": "did you mean", "paper/table1a-decoder-dept": "table1a-decoder"}
    for wrong, said in near.items():
        with pytest.raises(MaekitError, match=said):
            recipes.find(wrong)
    with pytest.raises(MaekitError, match="unknown recipe"):
        recipes.find("table3-comparison/dino-b")
