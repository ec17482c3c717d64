"""Layers, sources, one validator for text from anywhere, and files that are not what they should be."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maekit.config import dump_yaml, explain_yaml, groups, load_yaml, resolve
from maekit.errors import MaekitError
from maekit.settings import Finetune, Knn, Pretrain, Settings


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def fault(cls: type[Settings] = Pretrain, **layers: Any) -> MaekitError:
    with pytest.raises(MaekitError) as caught:
        resolve(cls, **layers)
    assert "\n" not in str(caught.value)
    return caught.value


def test_nothing_said_gives_the_defaults_of_the_settings_class() -> None:
    settings, sources = resolve(Pretrain)
    assert settings == Pretrain()
    assert set(sources.values()) == {"default"}
    assert list(sources) == list(Pretrain.model_fields)


def test_flag_beats_file_beats_recipe_beats_default(tmp_path: Path) -> None:
    file = written(tmp_path, "batch_size: 64\nweight_decay: 0.1\nseed: 3\n")
    settings, sources = resolve(Pretrain, recipe="paper/pretrain-vit-l16", file=file, flags={"seed": "7"})
    assert (settings.seed, settings.batch_size, settings.model) == (7, 64, "vit_large_patch16_224")
    assert sources["seed"] == "flag"
    assert sources["batch_size"] == f"config {file}"
    assert sources["model"] == "recipe paper/pretrain-vit-l16"
    assert sources["keep"] == "default"


def test_a_setting_replaces_its_rival_from_lower_layers(tmp_path: Path) -> None:
    file = written(tmp_path, "steps: 50\nlr: 1e-3\n")
    settings, sources = resolve(Pretrain, recipe="paper/pretrain-vit-b16", file=file)
    assert (settings.steps, settings.epochs, settings.lr, settings.base_lr) == (50, None, 1e-3, None)
    assert sources["epochs"] == f"config {file}"
    settings, _ = resolve(Pretrain, file=file, flags={"epochs": "2"})
    assert (settings.steps, settings.epochs) == (None, 2.0)


def test_rivals_in_one_layer_are_refused_and_none_beside_one_is_not() -> None:
    assert fault(flags={"steps": "5", "epochs": "2"}).code == "E-CONFIG-BOTH"
    for order in ({"steps": "5", "epochs": "none"}, {"epochs": "none", "steps": "5"}):
        assert resolve(Pretrain, flags=order)[0].steps == 5


def test_a_run_of_no_length_is_refused() -> None:
    error = fault(flags={"epochs": "none"})
    assert error.code == "E-CONFIG-VALUE"
    assert "epochs and steps" in str(error)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("base_lr", "1e-4", 1e-4),
        ("base_lr", "1.0e-06", 1e-6),
        ("epochs", "1_000", 1000.0),
        ("seed", "010", 10),
        ("seed", "-0", 0),
        ("flip", "no", False),
        ("flip", "off", False),
        ("flip", "true", True),
        ("data", "no", "no"),
        ("data", "1:30", "1:30"),
        ("data", "2024-01-01", "2024-01-01"),
        ("data", "${HOME}", "${HOME}"),
        ("data", "__import__('os').getcwd()", "__import__('os').getcwd()"),
        ("clip_grad", "none", None),
        ("clip_grad", "null", None),
        ("micro_batch", "auto", "auto"),
        ("micro_batch", "8", 8),
        ("img_size", "96", (96, 96)),
    ],
)
def test_text_means_the_same_in_a_file_and_as_a_flag(tmp_path: Path, name: str, text: str, value: object) -> None:
    from_file, _ = resolve(Pretrain, file=written(tmp_path, f"{name}: {text}\n"))
    from_flag, _ = resolve(Pretrain, flags={name: text})
    assert getattr(from_file, name) == getattr(from_flag, name) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("seed", "true"),
        ("seed", "-1"),
        ("seed", str(2**64)),
        ("epochs", "nan"),
        ("epochs", ".inf"),
        ("epochs", "0"),
        ("base_lr", "-1"),
        ("mask_ratio", "1"),
        ("mask_ratio", "0"),
        ("batch_size", "0"),
        ("batch_size", "2.5"),
        ("workers", "-1"),
        ("workers", "1000000"),
        ("micro_batch", "0"),
        ("target", "pixels"),
        ("precision", "half"),
        ("flip", "maybe"),
        ("betas", "[0.9]"),
        ("betas", "[0.9, 0.95, 0.99]"),
        ("img_size", "[1, 2, 3]"),
        ("seed", "{a: 1}"),
        ("keep", "null"),
    ],
)
def test_a_value_out_of_range_or_of_another_kind_is_refused_by_name(tmp_path: Path, name: str, text: str) -> None:
    error = fault(file=written(tmp_path, f"{name}: {text}\n"))
    assert error.code == "E-CONFIG-VALUE"
    assert error.exit_code == 2
    assert f"setting {name} (config " in str(error)


def test_true_is_no_number_even_from_python() -> None:
    assert "setting seed" in str(fault(flags={"seed": True}))


def test_all_faults_of_all_layers_are_listed_together(tmp_path: Path) -> None:
    file = written(tmp_path, "mask_ration: 0.6\nepohcs: 3\nweight_decay: heavy\n")
    message = str(fault(file=file, flags={"batch_size": "0", "steps": "1", "epochs": "1"}))
    for part in ("'mask_ratio'", "'epochs'", "weight_decay", "batch_size", "epochs and steps", "5 faults"):
        assert part in message


def test_an_unknown_setting_is_answered_with_the_nearest() -> None:
    error = fault(flags={"mask_rato": "0.5"})
    assert error.code == "E-CONFIG-KEY"
    assert "did you mean 'mask_ratio'?" in str(error)


def test_a_recipe_of_another_verb_is_refused() -> None:
    error = fault(Finetune, recipe="paper/pretrain-vit-b16")
    assert error.code == "E-CONFIG-RECIPE"
    assert "a recipe for pretrain" in str(error)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# only a comment\n",
        "- a list\n",
        "just text\n",
        "seed: 1\nseed: 2\n",
        "a: &x 1\nb: *x\n",
        "data: !!python/object/apply:os.system [ls]\n",
        "data: !local x\n",
        "seed:\t1\n\tkeep: 2\n",
        "seed: [\n",
        "data: " + "[" * 10_000 + "]" * 10_000,
        "? [a]\n: 1\n",
        "1\x00: 2\n",
        "a: 1\n---\nb: 2\n",
        b"data: \xff\xfe\n",
    ],
)
def test_a_file_that_is_no_plain_mapping_is_refused_with_one_line(tmp_path: Path, text: str | bytes) -> None:
    with pytest.raises(MaekitError) as caught:
        load_yaml(written(tmp_path, text))
    assert caught.value.code == "E-CONFIG-YAML"
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_and_carriage_returns_do_no_harm(tmp_path: Path) -> None:
    assert load_yaml(written(tmp_path, b"\xef\xbb\xbfseed: 1\r\nkeep: 2\r\n")) == {"seed": "1", "keep": "2"}


def test_a_file_that_is_missing_large_or_a_folder_is_refused(tmp_path: Path) -> None:
    large = written(tmp_path, "#" * 100_001)
    for path in (tmp_path / "none.yaml", tmp_path, Path("/dev/zero"), Path("a\0b"), large):
        with pytest.raises(MaekitError) as caught:
            load_yaml(path)
        assert caught.value.code == "E-CONFIG-FILE"


def test_a_file_of_a_newer_format_or_another_verb_is_refused(tmp_path: Path) -> None:
    assert fault(file=written(tmp_path, "format: 99\nseed: 1\n")).code == "E-CONFIG-FORMAT"
    assert fault(file=written(tmp_path, "verb: knn\nseed: 1\n")).code == "E-CONFIG-VERB"


def test_a_written_config_is_a_config_file_again(tmp_path: Path) -> None:
    settings, _ = resolve(Pretrain, recipe="builtin/pretrain-fashion", flags={"out": "runs/ä b", "micro_batch": "4"})
    text = dump_yaml(settings, {"mean": (0.5,), "classes": ["a", "none", "1"], "precision": "fp32"})
    again, _ = resolve(Pretrain, file=written(tmp_path, text))
    assert again == settings
    header = load_yaml(tmp_path / "c.yaml")
    assert header["format"] == "1"
    assert header["resolved"] == {"mean": ["0.5"], "classes": ["a", "none", "1"], "precision": "fp32"}


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20)


@given(data=words, temperature=st.floats(1e-30, 1e30), k=st.integers(1, 10**12), raw=st.booleans())
def test_any_settings_survive_the_way_through_a_file(
    tmp_path_factory: pytest.TempPathFactory, data: str, temperature: float, k: int, raw: bool
) -> None:
    settings = Knn(data=data, temperature=[temperature], k=[k, 3], raw_pixels=raw)
    folder = tmp_path_factory.mktemp("yaml")
    for text in (dump_yaml(settings), explain_yaml(settings, dict.fromkeys(Knn.model_fields, "flag"))):
        assert resolve(Knn, file=written(folder, text))[0] == settings


def test_every_setting_stands_in_exactly_one_group() -> None:
    for cls in (Pretrain, Finetune, Knn):
        names = [name for group in groups(cls).values() for name in group]
        assert sorted(["recipe", *names]) == sorted(cls.model_fields)
    assert "epochs" in groups(Pretrain)["Training"]
    assert groups(Finetune)["Finetune"][0] == "run"
