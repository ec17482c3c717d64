"""A model card says what is known, names no place of this machine, and its lines to load with do load."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

import maekit
from maekit.config import resolve
from maekit.errors import MaekitError
from maekit.interchange.card import MARK, Origin, card, origin, write_card
from maekit.interchange.reading import Reading
from maekit.interchange.weights import load_model, read_weights, save_encoder, save_model, save_reading
from maekit.model.heads import classifier
from maekit.model.mae import MaskedAutoencoder, create_model
from maekit.settings import Convert, Pretrain
from maekit.tasks.convert import convert
from maekit.tasks.pretrain import pretrain

KINDS = ("mae", "encoder", "cls", "mean")


def small(**changes: Any) -> MaskedAutoencoder:
    torch.manual_seed(0)
    settings = {
        "name": "vit_base_patch16_224", "img_size": (16, 16), "patch_size": 8, "embed_dim": 24, "depth": 1,
        "num_heads": 3, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2,
    }  # fmt: skip
    return create_model(**{**settings, **changes})


def write(path: Path, kind: str = "mae", **changes: Any) -> Reading:
    """Write weights of a kind, "cls" and "mean" being classifiers, and return them as they are read."""
    model = small(**changes)
    (save_encoder if kind == "encoder" else save_model)(model, path)
    if kind in ("cls", "mean"):
        head = dict(classifier(model, 2, pool=kind, drop_path=0.0, pretrained=True).state_dict())
        reading = read_weights(path)._replace(kind="classifier", tensors=head, pool=kind, classes=["a|b", "ü\n## c"])
        save_reading(reading, path)
    return read_weights(path)


def parsed(text: str) -> dict[str, Any]:
    """Read the front matter of a card as the hub does."""
    return ModelCard(text).data.to_dict()


def snippets(text: str) -> dict[str, str]:
    """Return the code of each library."""
    return dict(re.findall(r"^(\w+):\n```python\n(.*?)\n```", text, re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps of a recipe on a folder of pictures, with some values of one's own."""
    place = tmp_path_factory.mktemp("secret-place")
    for at in range(8):
        picture = Image.frombytes("L", (28, 28), bytes((at * 31 + i) % 256 for i in range(28 * 28)))
        (place / "my pictures").mkdir(exist_ok=True)
        picture.save(place / "my pictures" / f"{at}.png")
    flags = {
        "data": str(place / "my pictures"), "out": str(place / "run"), "steps": "2", "batch_size": "4", "workers": "0",
        "embed_dim": "24", "depth": "1", "device": "cpu",
    }  # fmt: skip
    settings, _ = resolve(Pretrain, recipe="builtin/pretrain-fashion", flags=flags)
    assert pretrain(settings).exit_code == 0
    return place / "run"


# --- the licence


@pytest.mark.parametrize("licence", ["", "  ", "\n"])
def test_a_card_without_licence_is_refused_and_nothing_is_written(tmp_path: Path, licence: str) -> None:
    with pytest.raises(MaekitError) as caught:
        save_model(small(), tmp_path / "m.safetensors", card=True, licence=licence)
    assert caught.value.code == "E-CONFIG-LICENCE"
    assert caught.value.exit_code == 2
    assert "--licence" in str(caught.value)
    assert not list(tmp_path.iterdir())
    write(tmp_path / "m.safetensors")
    asked = Convert(src=tmp_path / "m.safetensors", dst=tmp_path / "timm", to="timm", licence=licence)
    with pytest.raises(MaekitError) as caught:
        convert(asked)
    assert caught.value.code == "E-CONFIG-LICENCE"
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize(
    "given", [{"licence": "mit"}, {"data": "cells"}, {"recipe": "mine"}, {"run": "runs/a"}], ids=str
)
def test_what_only_a_card_would_say_is_refused_without_one(tmp_path: Path, given: dict[str, Any]) -> None:
    with pytest.raises(MaekitError) as caught:
        save_model(small(), tmp_path / "m.safetensors", **given)
    assert caught.value.code == "E-CONFIG-CARD"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("licence", "found"),
    [("mit", "mit"), ("Apache-2.0", "apache-2.0"), (" cc-by-nc-4.0 ", "cc-by-nc-4.0"), ("a: [b\n---\n# c", None)],
    ids=str,
)
def test_the_front_matter_is_what_hubs_read(tmp_path: Path, licence: str, found: str | None) -> None:
    text = card(write(tmp_path / "m.safetensors"), licence, Origin())
    data = parsed(text)
    assert data["license"] == (found or licence.lower())
    assert data["library_name"] == "maekit"
    assert data["pipeline_tag"] == "image-feature-extraction"
    assert "masked-autoencoder" in data["tags"]
    assert isinstance(yaml.safe_load(text.split("---\n")[1]) if found else {}, dict)


@pytest.mark.parametrize(
    ("to", "library"), [("timm", "timm"), ("transformers", "transformers"), ("official", "maekit"), ("onnx", "onnx")]
)
def test_the_library_of_a_card_is_the_one_that_reads_the_weights(tmp_path: Path, to: str, library: str) -> None:
    assert parsed(card(write(tmp_path / "m.safetensors"), "mit", Origin(), to=to))["library_name"] == library


# --- what it says


def test_a_card_beside_saved_weights_says_where_they_come_from(run: Path, tmp_path: Path) -> None:
    save_model(load_model(run), tmp_path / "m.safetensors", card=True, licence="mit", run=run)
    text = (tmp_path / "README.md").read_text()
    assert MARK in text
    assert "| data | my pictures, 8 images |" in text
    assert "| recipe | builtin/pretrain-fashion |" in text
    for line in ("| steps | 2 |", "| batch_size | 4 |", "| mask_ratio | 0.6 |", "| crop_scale | 0.5 1.0 |"):
        assert line in text
    for line in ("- batch_size our own 128, yours 4", "- embed_dim our own 96, yours 24", "- depth our own 4, yours 1",
                 "- data our own builtin:fashion, yours my pictures"):  # fmt: skip
        assert line in text
    assert "target | pixel" in text
    assert f"Written by maekit {maekit.__version__}" in text
    assert "arxiv.org/abs/2111.06377" in text


@pytest.mark.parametrize("to", ["safetensors", "timm", "transformers", "official", "detectron2"])
def test_no_card_names_a_place_of_this_machine(run: Path, tmp_path: Path, to: str) -> None:
    dst = tmp_path / {"safetensors": "m.safetensors", "official": "m.pth", "detectron2": "m.pth"}.get(to, "folder")
    convert({"src": run, "dst": dst, "to": to, "licence": "mit"})
    text = ((dst if dst.is_dir() else tmp_path) / "README.md").read_text()
    assert "my pictures" in text
    for place in (str(tmp_path), str(run.parent), "secret-place", str(Path.home())):
        assert place not in text
    assert not re.search(r"(?<![\w/:.])/\w+/\w+", text)


@pytest.mark.parametrize("place", ["/home/me/secret/cats", "../secret/cats", "secret/cats/", "~/secret/cats"])
def test_folders_are_called_by_their_last_part_also_among_deviations(tmp_path: Path, place: str) -> None:
    (tmp_path / "checkpoints").mkdir()
    line = f"{{name: data, source: our own, theirs: 'builtin:fashion', yours: '{place}'}}"
    labels = "{name: labels, source: our own, theirs: 10/class, yours: 1/class}"
    (tmp_path / "config.yaml").write_text(f"data: '{place}'\nresolved: {{deviations: [{line}, {labels}]}}\n")
    found = origin(tmp_path)
    assert found.data == "cats"
    assert found.deviations == (
        "data our own builtin:fashion, yours cats",
        "labels our own 10/class, yours 1/class",
    )


@pytest.mark.parametrize("inside", [".", "checkpoints", "checkpoints/step-2", "checkpoints/step-2/model.safetensors"])
def test_a_run_is_found_from_anything_in_it(run: Path, inside: str) -> None:
    assert (run / inside).exists()
    assert origin(run / inside).recipe == "builtin/pretrain-fashion"
    assert len(origin(run / inside).deviations) >= 5


def test_what_nobody_said_stands_as_not_said(tmp_path: Path) -> None:
    assert origin(tmp_path / "m.safetensors") == Origin()
    text = card(write(tmp_path / "m.safetensors"), "mit", Origin())
    assert "| data | not said |" in text
    assert "| recipe | none named |" in text
    assert "Deviations from the recipe: not said." in text


def test_what_is_said_by_hand_wins_over_the_run(run: Path, tmp_path: Path) -> None:
    save_model(
        small(), tmp_path / "m.safetensors", card=True, licence="mit", run=run, data="ImageNet-1k", recipe="mine"
    )
    text = (tmp_path / "README.md").read_text()
    assert "| data | ImageNet-1k |" in text
    assert "| recipe | mine |" in text


def test_a_recipe_followed_to_the_letter_has_no_deviations(tmp_path: Path) -> None:
    text = card(write(tmp_path / "m.safetensors"), "mit", Origin("ImageNet-1k", "paper/pretrain-vit-b16"))
    assert "Deviations from the recipe: none." in text


@pytest.mark.parametrize(
    "config",
    [
        "resolved: text\n",
        "resolved: [a]\n",
        "resolved: {deviations: text}\n",
        "resolved: {deviations: [a, {b: c}]}\n",
        "data: .\nresolved: {images: 3}\n",
        "data: [a, b]\n",
        "data: {a: b}\ncrop_scale: {a: b}\nrecipe: [a]\n",
    ],
)
def test_a_config_that_was_changed_by_hand_gives_a_card_all_the_same(tmp_path: Path, config: str) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text(config)
    text = card(write(tmp_path / "m.safetensors"), "mit", origin(tmp_path / "m.safetensors"))
    assert parsed(text)["license"] == "mit"


def test_names_from_files_cannot_break_the_table_or_add_sections(tmp_path: Path) -> None:
    text = card(write(tmp_path / "m.safetensors", "cls"), "mit", Origin(data="x | y\n# z"))
    assert "| classes | 2: a/b, ü\\n## c |" in text
    assert "\n## c" not in text and "\n# z" not in text
    assert parsed(text)["pipeline_tag"] == "image-classification"
    assert "| pooling | cls |" in text


# --- how to load


@pytest.mark.filterwarnings("ignore")  # of the libraries, to their users
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", ["safetensors", "timm", "transformers"])
def test_every_line_to_load_with_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, to: str) -> None:
    if (kind, to) == ("mean", "transformers"):
        return  # refused, as its card says
    monkeypatch.chdir(tmp_path)
    write(Path("source.safetensors"), kind)
    dst = Path("m.safetensors" if to == "safetensors" else "weights")
    convert({"src": Path("source.safetensors"), "dst": dst, "to": to, "licence": "mit"})
    code = snippets((dst / "README.md" if dst.is_dir() else Path("README.md")).read_text())
    assert code.keys() == {"maekit", "timm", "onnxruntime", "transformers"} - (
        {"transformers"} if kind == "mean" else set()
    )
    for library in code.keys() - {"onnxruntime"}:
        if command := re.match(r"# maekit convert (\S+) (\S+) --to (\S+)\n", code[library]):
            src, other, layout = command.groups()
            convert({"src": Path(src), "dst": Path(other), "to": layout})
        else:
            assert library in (to, "maekit")
        names: dict[str, Any] = {}
        exec(code[library], names)
        loaded = names["model"]
        assert sum(value.numel() for value in getattr(loaded, "model", loaded).parameters()) > 1000
    assert "InferenceSession" in code["onnxruntime"]


def test_a_mean_pooled_classifier_says_why_transformers_cannot_load_it(tmp_path: Path) -> None:
    text = card(write(tmp_path / "m.safetensors", "mean"), "mit", Origin(), to="timm")
    assert "transformers: not possible" in text
    assert "mean of patch tokens" in text
    assert "transformers" not in snippets(text)


@pytest.mark.parametrize(
    "changes",
    [{"img_size": (16, 24)}, {"name": "vit_base_patch16_gap_224"}, {"name": "vit_small_patch14_reg4_dinov2"}],
    ids=["not square", "no class token", "registers"],
)
def test_what_transformers_has_no_place_for_is_not_promised(tmp_path: Path, changes: dict[str, Any]) -> None:
    reading = write(tmp_path / "m.safetensors", **changes)
    assert "transformers: not possible" in card(reading, "mit", Origin())
    with pytest.raises(MaekitError):
        convert({"src": tmp_path / "m.safetensors", "dst": tmp_path / "hf", "to": "transformers"})


@pytest.mark.parametrize(("to", "library"), [("onnx", "onnxruntime"), ("pt2", "torch")])
def test_the_card_of_a_graph_promises_only_what_runs_it(tmp_path: Path, to: str, library: str) -> None:
    text = card(write(tmp_path / "m.safetensors"), "mit", Origin(), to=to, name=f"model.{to}")
    assert snippets(text).keys() == {library}
    assert f"model.{to}" in snippets(text)[library]
    assert "maekit convert" not in text


# --- files that are there


def test_a_readme_of_ones_own_stays_and_then_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# My project\n")
    with pytest.raises(MaekitError) as caught:
        save_model(small(), tmp_path / "m.safetensors", card=True, licence="mit")
    assert caught.value.code == "E-ENV-OUT"
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    write(tmp_path / "source" / "m.safetensors")
    with pytest.raises(MaekitError) as caught:
        convert(
            {
                "src": tmp_path / "source" / "m.safetensors",
                "dst": tmp_path / "m.pth",
                "to": "official",
                "licence": "mit",
            }
        )
    assert caught.value.code == "E-ENV-OUT"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "source"]
    assert (tmp_path / "README.md").read_text() == "# My project\n"
    save_model(small(), tmp_path / "m.safetensors")  # without a card there is nothing to refuse


def test_a_card_of_ours_is_written_again(tmp_path: Path) -> None:
    for licence in ("mit", "apache-2.0"):
        save_model(small(), tmp_path / "m.safetensors", card=True, licence=licence)
        assert parsed((tmp_path / "README.md").read_text())["license"] == licence
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "m.safetensors"]


def test_a_readme_that_appeared_meanwhile_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(MaekitError):
        write_card(tmp_path, MARK)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_folder_called_readme_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "README.md").mkdir()
    with pytest.raises(MaekitError) as caught:
        write_card(tmp_path, MARK)
    assert caught.value.code == "E-ENV-OUT"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("to", ["timm", "transformers"])
def test_a_converted_folder_holds_its_card(tmp_path: Path, to: str) -> None:
    write(tmp_path / "m.safetensors")
    result = convert({"src": tmp_path / "m.safetensors", "dst": tmp_path / "out", "to": to, "licence": "cc-by-nc-4.0"})
    found = ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert (found["license"], found["library_name"]) == ("cc-by-nc-4.0", to)
    assert result.metrics["written"] == [str(tmp_path / "out"), str(tmp_path / "out" / "README.md")]
    assert not (tmp_path / "README.md").exists()
    if to == "timm":
        assert load_model(tmp_path / "out").spec["embed_dim"] == 24  # a README disturbs no reader


def test_without_a_licence_no_card_is_written(tmp_path: Path) -> None:
    write(tmp_path / "m.safetensors")
    convert({"src": tmp_path / "m.safetensors", "dst": tmp_path / "out", "to": "timm"})
    assert not list(tmp_path.rglob("README.md"))


def test_changes_of_shape_stand_in_the_card(tmp_path: Path) -> None:
    write(tmp_path / "m.safetensors")
    convert(
        {"src": tmp_path / "m.safetensors", "dst": tmp_path / "out", "to": "timm", "licence": "mit", "patch_size": 4}
    )
    text = (tmp_path / "out" / "README.md").read_text()
    assert "- patches of 8 to 4 pixels by pseudo-inverse (FlexiViT)" in text
    assert "8 x 8 pixels" in text
