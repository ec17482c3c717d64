"""Recipes against the published numbers, digit by digit; where each value is from; what is said of a deviation."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maekit import cli
from maekit.config import Deviation, deviations, dump_yaml, origins, resolve
from maekit.errors import MaekitError
from maekit.recipes import RECIPES, find
from maekit.settings import Finetune, Loop, Pretrain, Probe, Settings
from maekit.train.schedule import schedule

GOLDEN = Path(__file__).parent / "golden" / "recipes.json"
RENEW = "make golden"
IMAGENET = 1_281_167
"""Training images of ImageNet-1K."""
EPOCHS = (0, 5, 10, 20, 40, 50, 100, 420, 820)


def resolved(name: str) -> Settings:
    return resolve(type(find(name)[1].settings), recipe=name)[0]


def maekit(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "maekit", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


# ------------------------------------------------------------------------------------------ against the papers

# arXiv 2111.06377, appendix A, tables 8 to 11, and FINETUNE.md, typed in anew: nothing here is read from the recipes.
T8 = {"base_lr": 1.5e-4, "weight_decay": 0.05, "betas": (0.9, 0.95), "batch_size": 4096, "warmup_epochs": 40}
T9 = {
    "weight_decay": 0.05, "betas": (0.9, 0.999), "batch_size": 1024, "warmup_epochs": 5, "label_smoothing": 0.1,
    "mixup": 0.8, "cutmix": 1.0, "auto_augment": "rand-m9-mstd0.5-inc1", "min_lr": 1e-6, "crop_scale": (0.08, 1.0),
    "pool": "mean", "clip_grad": None, "ema": None, "from_scratch": False,
}  # fmt: skip
T10 = {
    "protocol": "lars", "base_lr": 0.1, "weight_decay": 0.0, "batch_size": 16384, "warmup_epochs": 10, "epochs": 90,
    "pool": "cls", "crop_scale": (0.08, 1.0), "flip": True, "micro_batch": 512,
}  # fmt: skip
T11 = {
    "base_lr": 1e-4, "weight_decay": 0.3, "betas": (0.9, 0.95), "batch_size": 4096, "warmup_epochs": 20,
    "label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0, "auto_augment": "rand-m9-mstd0.5-inc1", "ema": 0.9999,
    "from_scratch": True, "layer_decay": 1.0, "random_erasing": 0.0,
}  # fmt: skip
PRETRAIN = T8 | {
    "epochs": 1600, "target": "norm_pixel", "mask_ratio": 0.75, "crop_scale": (0.2, 1.0), "flip": True, "min_lr": 0.0,
    "decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16, "stats": "imagenet", "drop_path": 0.0,
    "clip_grad": None, "ema": None, "drop_last": True,
}  # fmt: skip


def _differing(*values: float) -> dict[str, float]:
    names = ("epochs", "base_lr", "layer_decay", "drop_path", "random_erasing")
    return dict(zip(names, values, strict=True))


PUBLISHED: dict[str, dict[str, Any]] = {
    "pretrain-vit-b16": PRETRAIN | {"model": "vit_base_patch16_224", "img_size": (224, 224)},
    "pretrain-vit-l16": PRETRAIN | {"model": "vit_large_patch16_224", "img_size": (224, 224)},
    "pretrain-vit-h14": PRETRAIN | {"model": "vit_huge_patch14_224", "img_size": (224, 224)},
    "pretrain-vit-h14-448": PRETRAIN | {"model": "vit_huge_patch14_224", "img_size": (448, 448)},
    "finetune-vit-b16-paper": T9 | _differing(100, 1e-3, 0.75, 0.1, 0.0),
    "finetune-vit-l16-paper": T9 | _differing(50, 1e-3, 0.75, 0.1, 0.0),
    "finetune-vit-h14-paper": T9 | _differing(50, 1e-3, 0.75, 0.2, 0.0),
    "finetune-vit-h14-448-paper": T9 | _differing(50, 1e-3, 0.75, 0.2, 0.0) | {"img_size": (448, 448)},
    "finetune-vit-b16-repo": T9 | _differing(100, 5e-4, 0.65, 0.1, 0.25),
    "finetune-vit-l16-repo": T9 | _differing(50, 1e-3, 0.75, 0.2, 0.25),
    "finetune-vit-h14-repo": T9 | _differing(50, 1e-3, 0.75, 0.3, 0.25),
    "finetune-vit-h14-448-repo": T9 | _differing(50, 1e-3, 0.75, 0.3, 0.25) | {"img_size": (448, 448)},
    "probe-vit-b16": T10,
    "probe-vit-l16": T10,
    "probe-vit-h14": T10,
    "scratch-vit-b16": T11 | {"epochs": 300, "drop_path": 0.1},
    "scratch-vit-l16": T11 | {"epochs": 200, "drop_path": 0.2},
    "scratch-vit-h14": T11 | {"epochs": 200, "drop_path": 0.2},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_recipes_are_its_tables(name: str) -> None:
    chosen = resolved(name)
    assert {key: getattr(chosen, key) for key in PUBLISHED[name]} == PUBLISHED[name]


def test_every_model_of_the_paper_has_each_kind_of_recipe() -> None:
    kinds = ("pretrain-vit-{}", "finetune-vit-{}-paper", "finetune-vit-{}-repo", "probe-vit-{}", "scratch-vit-{}")
    assert {f"paper/{kind.format(model)}" for kind in kinds for model in ("b16", "l16", "h14")} <= RECIPES.keys()
    extra = {name.removeprefix("paper/") for name in RECIPES if name.startswith("paper/")} - PUBLISHED.keys()
    assert extra == {"pretrain-vit-ti16", "pretrain-vit-s16"}  # which the paper has not


@pytest.mark.parametrize(
    ("name", "epoch", "lr"),
    [
        ("pretrain-vit-b16", 0, 0.0),
        ("pretrain-vit-b16", 20, 1.2e-3),
        ("pretrain-vit-b16", 40, 2.4e-3),
        ("pretrain-vit-b16", 820, 1.2e-3),
        ("pretrain-vit-b16", 1600, 0.0),
        ("finetune-vit-b16-repo", 5, 2e-3),
        ("finetune-vit-b16-paper", 5, 4e-3),
        ("finetune-vit-l16-paper", 50, 1e-6),
        ("probe-vit-b16", 10, 6.4),
        ("probe-vit-b16", 50, 3.2),
        ("scratch-vit-b16", 20, 1.6e-3),
    ],
)
def test_the_learning_rate_is_the_one_that_table_and_batch_give(name: str, epoch: int, lr: float) -> None:
    assert rates(name)(epoch) == pytest.approx(lr, rel=1e-9, abs=1e-15)


def rates(name: str, **changes: Any) -> Any:
    """Return the learning rate at the start of an epoch of ImageNet-1K."""
    chosen = resolved(name)
    names = ("epochs", "batch_size", "base_lr", "warmup_epochs", "min_lr")
    loop = Loop(**({key: getattr(chosen, key) for key in names if hasattr(chosen, key)} | changes))
    timing = schedule(loop, IMAGENET // loop.batch_size, loop.batch_size)
    return lambda epoch: timing.lr(min(round(epoch * timing.steps_per_epoch), timing.total))


def test_800_epochs_peak_after_40_and_are_half_way_down_at_420() -> None:
    lr = rates("pretrain-vit-l16", epochs=800)
    assert [lr(epoch) for epoch in (20, 40, 420, 800)] == pytest.approx([1.2e-3, 2.4e-3, 1.2e-3, 0.0], abs=1e-15)


# ------------------------------------------------------------------------------------------------------ golden


def frozen() -> dict[str, Any]:
    """Return every value of every recipe and, of the paper's, the learning rate at named epochs."""
    values = {name: resolved(name).model_dump(mode="json") for name in RECIPES}
    papers = [name for name in RECIPES if name.startswith("paper/")]
    curves = {
        name: {f"lr at epoch {epoch}": rates(name)(epoch) for epoch in EPOCHS if epoch <= values[name]["epochs"]}
        for name in papers
    }
    return {name: values[name] | curves.get(name, {}) for name in RECIPES}


def moved(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line for each recipe that came or went and each value that is another; rates to 1e-12."""
    lines = [f"{name}: {'new' if name in now else 'gone'}" for name in sorted(before.keys() ^ now.keys())]
    for name in before.keys() & now.keys():
        for key in sorted(before[name].keys() | now[name].keys()):
            old, new = before[name].get(key, "nothing"), now[name].get(key, "nothing")
            near = key.startswith("lr at") and old == pytest.approx(new, rel=1e-12, abs=1e-18)
            if old != new and not near:
                lines.append(f"{name}: {key} {old} -> {new}")
    return lines


def test_golden_no_value_of_any_recipe_moves_unnoticed() -> None:
    now = json.loads(json.dumps(frozen()))
    if os.environ.get("MAEKIT_GOLDEN") == "renew":
        GOLDEN.write_text(json.dumps(now, indent=1) + "\n")
    lines = moved(json.loads(GOLDEN.read_text()), now)
    assert not lines, "\n".join([*lines, f"meant so? {RENEW}, and say why in the change"])


def test_the_golden_test_says_which_value_moved() -> None:
    before = json.loads(GOLDEN.read_text())
    now = before | {"paper/pretrain-vit-b16": before["paper/pretrain-vit-b16"] | {"base_lr": 1e-3}}
    del now["paper/probe-vit-h14"]
    lines = moved(before, now)
    assert lines == ["paper/probe-vit-h14: gone", "paper/pretrain-vit-b16: base_lr 0.00015 -> 0.001"]


# ----------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("name", RECIPES)
def test_every_value_that_a_recipe_sets_has_a_source(name: str) -> None:
    made = RECIPES[name]()
    rivals = {name for names in type(made.settings).one_of for name in names}  # which a set one sets to none
    assert made.cited.keys() <= made.settings.model_fields_set <= made.cited.keys() | rivals
    for key, cited in made.cited.items():
        for source in (cited.source, *cited.others):
            assert re.match(r"paper (T\d+|Table \d|Fig\. \d|section \d|A\.\d)|repo\b|our own$", source), (key, source)
        assert cited.value not in cited.others.values(), key


def test_where_paper_and_code_disagree_each_names_the_other() -> None:
    lines = {}
    for variant in ("paper", "repo"):
        chosen, sources = resolve(Finetune, recipe=f"finetune-vit-b16-{variant}")
        lines[variant] = origins(chosen, sources)
    assert lines["paper"]["base_lr"] == "paper T9: 0.001; repo: 0.0005"
    assert lines["repo"]["base_lr"] == "repo (FINETUNE.md): 0.0005; paper T9: 0.001"
    assert lines["repo"]["epochs"] == "paper T9 and repo"
    assert lines["repo"]["weight_decay"] == "paper T9"
    assert lines["repo"]["keep"] == "default"


def test_a_name_is_taken_with_its_group_or_without() -> None:
    assert (
        find("finetune-vit-b16-paper")[0] == find("paper/finetune-vit-b16-paper")[0] == "paper/finetune-vit-b16-paper"
    )
    assert len({name.partition("/")[2] for name in RECIPES}) == len(RECIPES)
    for wrong in ("", "paper", "paper/", "vit-b16", "/pretrain-vit-b16"):
        with pytest.raises(MaekitError, match="unknown recipe"):
            find(wrong)
    with pytest.raises(MaekitError, match=re.escape("did you mean 'paper/pretrain-vit-b16'?")):
        find("paper/pretrain-vit-b")


# -------------------------------------------------------------------------------------------------- deviations

CHANGES: dict[str, Any] = {
    "base_lr": 1e-3, "weight_decay": 0.1, "mask_ratio": 0.5, "betas": (0.9, 0.99), "clip_grad": 1.0, "flip": False,
}  # fmt: skip


@given(st.sets(st.sampled_from(sorted(CHANGES))))
def test_exactly_what_was_changed_deviates(names: set[str]) -> None:
    chosen, sources = resolve(Pretrain, recipe="pretrain-vit-b16", flags={name: CHANGES[name] for name in names})
    found = deviations("pretrain-vit-b16", chosen)
    assert {deviation.name for deviation in found} == names
    lines = origins(chosen, sources)
    assert all(("yours: " in lines[name]) == (name in names) for name in CHANGES)


def test_a_deviation_says_source_theirs_and_yours() -> None:
    flags = {"base_lr": "1e-3", "seed": "3", "data": "photos", "keep": "5"}
    chosen, sources = resolve(Pretrain, recipe="paper/pretrain-vit-b16", flags=flags)
    assert deviations("paper/pretrain-vit-b16", chosen) == [Deviation("base_lr", "paper T8", 0.00015, 0.001)]
    assert str(Deviation("base_lr", "paper T8", 0.00015, 0.001)) == "base_lr paper T8 0.00015, yours 0.001"
    assert origins(chosen, sources)["base_lr"] == "paper T8: 0.00015; yours: 0.001 (flag)"
    assert origins(chosen, sources)["seed"] == "flag"


def test_a_setting_that_takes_anothers_place_is_named() -> None:
    chosen, _ = resolve(Pretrain, recipe="pretrain-vit-b16", flags={"steps": "40", "lr": "1e-3"})
    found = {deviation.name: deviation.yours for deviation in deviations("pretrain-vit-b16", chosen)}
    assert found == {"epochs": "steps 40", "base_lr": "lr 0.001", "warmup_epochs": None}


def test_the_same_value_given_again_is_no_deviation() -> None:
    chosen, sources = resolve(Pretrain, recipe="pretrain-vit-b16", flags={"base_lr": "1.5e-4", "img_size": "224"})
    assert deviations("pretrain-vit-b16", chosen) == []
    assert origins(chosen, sources)["base_lr"] == "paper T8"


def test_a_recipe_of_another_verb_has_no_deviations_to_tell() -> None:
    with pytest.raises(MaekitError, match="a recipe for probe, expected one for pretrain"):
        deviations("probe-vit-b16", Pretrain())


def test_a_config_file_may_name_its_recipe_and_a_flag_another(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("recipe: pretrain-vit-l16\nbatch_size: 64\n")
    chosen, sources = resolve(Pretrain, file=file)
    assert (chosen.recipe, chosen.model, chosen.batch_size) == ("paper/pretrain-vit-l16", "vit_large_patch16_224", 64)
    assert sources["model"] == "recipe paper/pretrain-vit-l16"
    assert resolve(Pretrain, recipe="pretrain-vit-b16", file=file)[0].recipe == "paper/pretrain-vit-b16"
    assert resolve(Pretrain, file=file, flags={"recipe": "pretrain-vit-h14"})[0].model == "vit_huge_patch14_224"
    file.write_text("recipe: pretrain-vit-x\n")
    with pytest.raises(MaekitError, match="unknown recipe"):
        resolve(Pretrain, file=file)
    file.write_text("recipe: [a]\n")
    with pytest.raises(MaekitError, match="setting recipe"):
        resolve(Pretrain, file=file)


def test_the_file_of_a_run_keeps_its_values_and_remembers_its_recipe(tmp_path: Path) -> None:
    first, _ = resolve(Pretrain, recipe="pretrain-vit-b16", flags={"steps": "40", "mask_ratio": "0.5"})
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(first, {"images": 3}))
    again, sources = resolve(Pretrain, file=file)
    assert again == first and sources["base_lr"] == f"config {file}"
    assert [deviation.name for deviation in deviations(again.recipe or "", again)] == [
        "mask_ratio", "epochs", "warmup_epochs",
    ]  # fmt: skip
    file.write_text(file.read_text().replace("paper/pretrain-vit-b16", "paper/one-that-is-gone"))
    assert resolve(Pretrain, file=file)[0] == first.model_copy(update={"recipe": None})


# ----------------------------------------------------------------------------------------------- the front door


def test_recipes_show_prints_a_config_file_with_the_source_of_each_value(tmp_path: Path) -> None:
    run = maekit("recipes", "show", "pretrain-vit-b16", "--base-lr", "1e-3")
    assert run.returncode == 0 and run.stderr == ""
    assert run.stdout.startswith("# paper/pretrain-vit-b16   (maekit pretrain)\n")
    assert all(f"#   {label}" in run.stdout for label in ("source: ", "cost:   ", "expect: "))
    assert re.search(r"^base_lr: 0\.001 +# paper T8: 0\.00015; yours: 0\.001 \(flag\)$", run.stdout, re.M)
    assert re.search(r"^batch_size: 4096 +# paper T8$", run.stdout, re.M)
    assert re.search(r"^seed: 0 +# default$", run.stdout, re.M)
    file = tmp_path / "c.yaml"
    file.write_text(run.stdout)
    assert resolve(Pretrain, file=file)[0] == resolve(Pretrain, recipe="pretrain-vit-b16", flags={"base_lr": 1e-3})[0]
    shown = maekit("config", "show", "--verb", "pretrain", "--recipe", "pretrain-vit-b16", "--base-lr", "1e-3")
    assert run.stdout.endswith(shown.stdout)
    found = json.loads(maekit("recipes", "show", "pretrain-vit-b16", "--base-lr", "1e-3", "--json").stdout)
    assert found["recipe"]["name"] == "paper/pretrain-vit-b16" and found["settings"]["base_lr"] == 1e-3
    assert found["deviations"] == [{"name": "base_lr", "source": "paper T8", "theirs": 1.5e-4, "yours": 1e-3}]


def test_recipes_show_of_a_wrong_name_is_one_line() -> None:
    run = maekit("recipes", "show", "finetune-vit-b16-papr")
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert "error[E-CONFIG-RECIPE]: unknown recipe" in run.stderr
    assert "did you mean 'paper/finetune-vit-b16-paper'?" in run.stderr


def test_config_diff_prints_only_what_differs() -> None:
    run = maekit("config", "diff", "finetune-vit-b16-paper", "paper/finetune-vit-b16-repo")
    assert run.returncode == 1 and run.stderr == ""
    rows = [line.split() for line in run.stdout.splitlines()]
    assert rows == [
        ["finetune-vit-b16-paper", "paper/finetune-vit-b16-repo"],
        ["base_lr", "0.001", "0.0005"], ["layer_decay", "0.75", "0.65"], ["random_erasing", "0", "0.25"],
    ]  # fmt: skip
    found = json.loads(maekit("config", "diff", "probe-vit-b16", "probe-vit-h14", "--json").stdout)
    assert found == {"a": "probe-vit-b16", "b": "probe-vit-h14", "differences": {}}


def diff(*words: str) -> tuple[int, str]:
    result = cli._run(["config", "diff", *words])
    return result.exit_code, result.text


def test_config_diff_takes_run_folders_files_and_recipes(tmp_path: Path) -> None:
    for name, flags in (("a", {}), ("b", {}), ("c", {"mask_ratio": "0.6", "betas": ["0.9", "0.99"]})):
        chosen, _ = resolve(Pretrain, recipe="pretrain-vit-b16", flags={"out": f"runs/{name}", **flags})
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(dump_yaml(chosen, {"images": 3}))
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert diff(a, b) == diff(a, f"{b}/config.yaml") == diff(a, "pretrain-vit-b16") == (0, "no differences")
    code, text = diff("pretrain-vit-b16", c)
    assert code == 1
    assert sorted(line.split() for line in text.splitlines()[1:]) == [
        ["betas", "0.9", "0.95", "0.9", "0.99"], ["mask_ratio", "0.75", "0.6"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        ("pretrain-vit-b16 probe-vit-b16", "E-CONFIG-VERB", "those of pretrain and of probe"),
        ("pretrain-vit-b16 pretrain-vit-b17", "E-CONFIG-RECIPE", "did you mean 'paper/pretrain-vit-b16'?"),
        ("runs/nowhere pretrain-vit-b16", "E-CONFIG-RECIPE", "no run, config file or recipe 'runs/nowhere'"),
        ("pretrain-vit-b16", "E-USAGE-WORD", "twice"),
        ("a b c", "E-USAGE-WORD", "unexpected word 'c'"),
        ("pretrain-vit-b16 pretrain-vit-l16 --jsn", "E-USAGE-WORD", "--json"),
    ],
)
def test_config_diff_of_what_cannot_be_compared_is_one_line(words: str, code: str, part: str) -> None:
    with pytest.raises(MaekitError) as caught:
        diff(*words.split())
    assert caught.value.code == code and part in str(caught.value) and "\n" not in str(caught.value)


def test_config_diff_of_a_file_without_a_verb_asks_for_one(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("seed: 1\n")
    with pytest.raises(MaekitError, match="verb: pretrain"):
        diff(str(tmp_path / "c.yaml"), "pretrain-vit-b16")
    run = maekit("config", "diff", str(tmp_path / "c.yaml"), "pretrain-vit-b16")
    assert run.returncode == 2 and run.stderr.startswith("maekit: error[E-CONFIG-VERB]")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("recipes show", "E-USAGE-WORD"),
        ("recipes show --json", "E-USAGE-WORD"),
        ("recipes show pretrain-vit-b16 --base-lrr 1", "E-USAGE-FLAG"),
        ("recipes show pretrain-vit-b16 --recipe pretrain-vit-l16", "E-USAGE-FLAG"),
        ("recipes show pretrain-vit-b16 --mask-ratio 2", "E-CONFIG-VALUE"),
    ],
)
def test_a_wrong_line_to_recipes_show_is_refused(words: str, code: str) -> None:
    with pytest.raises(MaekitError) as caught:
        cli._run(words.split())
    assert caught.value.code == code


def test_the_probes_settings_of_training_are_those_that_only_trained_protocols_have() -> None:
    shared = {name for base in Probe.__mro__[1:] for name in getattr(base, "__annotations__", {})}
    own = set(Probe.__annotations__) - shared - {"positional", "only_trained"}
    assert own - set(Probe.only_trained) == {"run", "out", "protocol", "pool", "layers", "random_init"}
