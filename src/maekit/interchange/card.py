"""The model card that travels with weights: what they are, from which images and recipe, which licence, how to load.

The front matter is what model hubs read; huggingface_hub writes it, so that it is theirs to the letter. Nothing is
guessed: what nobody said stands there as not said. The licence is the owner's to name. A folder of data is named by its
last part only, since paths tell more of a machine than of its data.
"""

from pathlib import Path
from typing import Any, NamedTuple

from maekit import __version__
from maekit.config import Deviation, load_yaml, spell
from maekit.disk import own_file
from maekit.errors import MaekitError, clean
from maekit.interchange.names import TRANSFORMERS, theirs
from maekit.interchange.reading import Reading

MARK = "<!-- written by maekit -->"
"""A README.md that has it may be written again; any other is the user's own."""
PAPER = "https://arxiv.org/abs/2111.06377"
GRAPHS = {
    "onnx": ("onnxruntime", 'import onnxruntime\nsession = onnxruntime.InferenceSession("{}")'),
    "pt2": ("torch", 'import torch\nmodel = torch.export.load("{}").module()'),
}
"""What runs a graph, and how."""


class Origin(NamedTuple):
    """Where weights come from, as far as it was said.

    Attributes:
        data: what they were trained on.
        recipe: name of the recipe.
        training: settings that matter, name and value.
        deviations: a line for each setting that differs from the recipe.
    """

    data: str = ""
    recipe: str = ""
    training: tuple[tuple[str, str], ...] = ()
    deviations: tuple[str, ...] = ()


def origin(path: Path) -> Origin:
    """Read data, recipe, training and deviations from the run folder that weights lie in; empty for any other file."""
    for folder in (path, *path.parents[:3]):
        if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
            return _of_run(load_yaml(folder / "config.yaml"))
    return Origin()


def card(reading: Reading, licence: str, said: Origin, *, to: str = "safetensors", name: str = "DIR") -> str:
    """Return the text of a model card.

    Args:
        reading: the weights.
        licence: as the hub knows it: "mit", "apache-2.0", "cc-by-nc-4.0", or a name of your own.
        said: where they come from.
        to: layout in which the weights lie beside the card.
        name: of the file or folder, for the commands.

    Raises:
        MaekitError: E-CONFIG-LICENCE for an empty licence.
    """
    if not licence.strip():
        raise MaekitError(
            "E-CONFIG-LICENCE",
            "model card",
            found="no licence",
            expected="the licence of these weights",
            hint="--licence mit, apache-2.0, cc-by-nc-4.0 ... : yours to choose, within what the images allow",
        )
    from huggingface_hub import ModelCardData  # only here: it costs every command a tenth of a second

    library = to if to in ("timm", "transformers", "onnx") else "maekit"
    front = ModelCardData(
        license=licence.strip().lower(),
        library_name=library,
        pipeline_tag="image-classification" if reading.kind == "classifier" else "image-feature-extraction",
        tags=["masked-autoencoder", "mae", "self-supervised"],
    )
    sections = [
        f"---\n{front.to_yaml()}\n---\n{MARK}",
        f"# {_title(reading)}",
        _what(reading),
        "## Training",
        _training(said, reading),
        "## How to load",
        _loading(reading, to, name),
        "## Citing\nThe method: He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022, "
        f"[arXiv 2111.06377]({PAPER}).",
    ]
    return "\n\n".join(sections) + "\n"


def refuse_other_card(folder: Path) -> None:
    """Refuse a folder whose README.md is not a card of ours: it stays as it is.

    Raises:
        MaekitError: E-ENV-OUT.
    """
    path = folder / "README.md"
    try:
        other = path.exists() and MARK not in path.read_text("utf-8", errors="replace")
    except OSError as error:
        raise MaekitError("E-ENV-OUT", f"cannot read {path}", found=error.strerror or error) from error
    if other:
        raise MaekitError(
            "E-ENV-OUT", f"{path}", found="a README.md that is no model card of maekit", expected="a folder without"
        )


def write_card(folder: Path, text: str) -> Path:
    """Write README.md into a folder; one that is not a card of ours stays.

    Raises:
        MaekitError: E-ENV-OUT.
    """
    path = folder / "README.md"
    refuse_other_card(folder)
    try:
        with open(path, "w", encoding="utf-8", opener=own_file) as file:
            file.write(text)
    except OSError as error:
        raise MaekitError("E-ENV-OUT", f"cannot write {path}", found=error.strerror or error) from error
    return path


def _of_run(config: dict[str, Any]) -> Origin:
    resolved = config.get("resolved")
    resolved = resolved if isinstance(resolved, dict) else {}
    names = ("epochs", "steps", "batch_size", "mask_ratio", "base_lr", "lr", "weight_decay", "crop_scale", "seed")
    training = tuple((name, spell(config[name])) for name in names if config.get(name) is not None)
    data, images = _last_part("data", str(config.get("data") or "")), resolved.get("images")
    lines = tuple(_line(one) for one in resolved.get("deviations") or () if isinstance(one, dict))
    return Origin(data + (f", {images} images" if images else ""), str(config.get("recipe") or ""), training, lines)


def _line(one: dict[str, Any]) -> str:
    name = str(one.get("name"))
    values = [_last_part(name, one.get(key)) for key in ("theirs", "yours")]
    return str(Deviation(name, str(one.get("source")), *values))


def _last_part(name: str, value: Any) -> Any:
    """Return what a setting says without the folders of this machine."""
    if not isinstance(value, str) or not value or value.startswith("builtin:"):
        return value
    path = Path(value)
    return path.name or "a folder" if name == "data" or path.is_absolute() or value[:1] in ("~", ".") else value


OUTPUTS = {"classes": "classes", "multilabel": "labels, each a sigmoid's", "regression": "numbers"}
"""What the outputs of a head are, by task."""


def _title(reading: Reading) -> str:
    of = {"classes": "classifier", "multilabel": "classifier, several labels an image", "regression": "regression"}
    kinds = {"mae": "masked autoencoder", "encoder": "encoder of a masked autoencoder", "classifier": of[reading.task]}
    return f"{reading.spec['name']}: {kinds[reading.kind]}"


def _what(reading: Reading) -> str:
    spec, count = reading.spec, sum(value.numel() for value in reading.tensors.values())
    height, width = spec["img_size"]
    facts = {
        "images": f"{height} x {width} pixels, {spec['in_chans']} channels",
        "normalised": "value / 255 (uint8), then (value - mean) / std",
        "mean": ", ".join(f"{value:.4g}" for value in spec["mean"]),
        "std": ", ".join(f"{value:.4g}" for value in spec["std"]),
        "parameters": f"{count / 1e6:.2f} M, float32",
    }
    if reading.kind == "mae":
        decoder = f"{spec['decoder_depth']} blocks of width {spec['decoder_dim']}, {spec['decoder_heads']} heads"
        facts |= {"decoder": decoder, "target": spec["target"]}
    if reading.kind == "classifier":
        names = ", ".join(clean(name, 40) for name in reading.classes[:20]) or "without names"
        more = ", ..." if len(reading.classes) > 20 else ""
        facts |= {OUTPUTS[reading.task]: f"{reading.num_classes()}: {names}{more}", "pooling": str(reading.pool)}
    return _table(facts)


def _training(said: Origin, reading: Reading) -> str:
    facts = {"data": said.data or "not said", "recipe": said.recipe or "none named"}
    facts |= dict(said.training)
    if reading.layout != "maekit":
        facts["read from"] = f"a file in the layout of {reading.layout}"
    lines = [_table(facts), f"Deviations from the recipe: {'none' if said.recipe else 'not said'}."]
    if said.deviations:
        lines[1] = "Deviations from the recipe:\n" + "\n".join(f"- {clean(line, 200)}" for line in said.deviations)
    if reading.notes:
        lines.append("Taken for granted, or changed on the way:\n" + "\n".join(f"- {note}" for note in reading.notes))
    return "\n\n".join([*lines, f"Written by maekit {__version__}."])


def _table(facts: dict[str, str]) -> str:
    rows = (f"| {name} | {clean(value, 400).replace('|', '/')} |" for name, value in facts.items())
    return "\n".join(["| | |", "|---|---|", *rows])


def _loading(reading: Reading, to: str, name: str) -> str:
    """Show maekit, timm, transformers and onnxruntime; a layout that is not this one needs a conversion first.

    A graph is no weights: what runs it is all that reads it.
    """
    if to in GRAPHS:
        return _snippet(*GRAPHS[to], name)
    verb = "load_classifier" if reading.kind == "classifier" else "load_model"
    hugging = {
        "classifier": "ViTForImageClassification",
        "encoder": "ViTMAEModel",
        "mae": "ViTMAEForPreTraining",
    }[reading.kind]
    parts = [_snippet("maekit", f'from maekit import {verb}\nmodel = {verb}("{{}}")', name)]
    others = {
        "timm": ("timm-folder", 'import timm\nmodel = timm.create_model("local-dir:{}", pretrained=True)'),
        "transformers": ("hf-folder", f'from transformers import {hugging}\nmodel = {hugging}.from_pretrained("{{}}")'),
        "onnx": ("model.onnx", GRAPHS["onnx"][1]),
    }
    for layout, (other, lines) in others.items():
        library = GRAPHS[layout][0] if layout in GRAPHS else layout
        if layout == to:
            parts.append(_snippet(library, lines, name))
        elif layout == "transformers" and (reason := _not_in_transformers(reading)):
            parts.append(f"{library}: not possible, {reason}.")
        else:
            parts.append(_snippet(library, f"# maekit convert {name} {other} --to {layout}\n{lines}", other))
    return "\n\n".join(parts)


def _snippet(library: str, lines: str, name: str) -> str:
    return f"{library}:\n```python\n{lines.format(name)}\n```"


def _not_in_transformers(reading: Reading) -> str:
    if reading.kind == "classifier" and reading.pool != "cls":
        return "its classifier pools the class token and this one the mean of patch tokens"
    if reading.spec["img_size"][0] != reading.spec["img_size"][1]:
        return "its models take square images"
    tensors = reading.whole()
    if "encoder.cls_token" not in tensors or not all(theirs(TRANSFORMERS, name) for name in tensors):
        return "its models are plain ViTs with a class token"
    return ""
