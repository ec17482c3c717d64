"""Turn weights into another library's: read, change shape where asked, write, prove, and only then keep.

What every tensor became is printed; so is what was taken for granted, and the largest difference between the two
models where the library is installed.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from maekit.errors import MaekitError, clean
from maekit.interchange import reshape, write
from maekit.interchange.card import card, origin, write_card
from maekit.interchange.names import Row
from maekit.interchange.proof import Proof, prove
from maekit.interchange.reading import Reading
from maekit.interchange.weights import as_classifier, as_model, read_weights, save_reading
from maekit.model.encoder import geometry
from maekit.settings import Convert, Graph
from maekit.tasks import Result
from maekit.tasks.inspect import description, hints, table
from maekit.tasks.run_folder import typed

SUFFIXES = {
    "official": (".pth", ".pt"),
    "detectron2": (".pth", ".pt"),
    "safetensors": (".safetensors",),
    "onnx": (".onnx",),
    "pt2": (".pt2",),
}
"""Of the files; timm and transformers want a folder."""
ENCODERS = ("timm", "detectron2")
"""Layouts that have no place for a decoder."""


def convert(settings: Convert | dict[str, Any]) -> Result:
    """Convert weights; the result names each tensor, each assumption and the proof.

    Raises:
        MaekitError: E-USAGE-CONVERT, E-USAGE-OUT; E-CKPT- for what cannot be read, held or proved; E-CONFIG- for a
            change of shape that cannot be; E-ENV-OUT, E-ENV-DISK, E-ENV-IMPORT. Nothing is written then.
    """
    settings = typed(Convert, settings)
    src, dst, to = _places(settings)
    reading = _reshaped(read_weights(src, hints(settings)), settings)
    text = None if settings.licence is None else _card(reading, settings.licence, src, dst, to, settings.what)
    if to in ("onnx", "pt2"):
        rows, proof = _export(reading, dst, to, settings)
    else:
        with write.staged(dst) as place:
            rows = _write(reading, place, to)
            proof = prove(reading, place, to)
    written = [dst]
    if text is not None:
        written.append(write_card(dst if dst.is_dir() else dst.parent, text))
    lost = _lost(reading, to)
    metrics: dict[str, Any] = {
        "src": str(reading.path),
        "from": reading.layout,
        "to": to,
        "kind": reading.kind,
        "written": [str(path) for path in written],
        "notes": reading.notes,
        "not_held": lost,
        "read": [row._asdict() for row in reading.rows],
        "wrote": [row._asdict() for row in rows],
        "proof": proof._asdict(),
    }
    lines = [*description(reading), "", "read:", *table(reading.rows, with_used=False)]
    lines += ["", f"written for {to}:", *table(rows, with_used=False)]
    lines += [f"not held by this layout: {'; '.join(lost)}"] if lost else []
    lines += ["", f"proof: {_said(proof)}", f"written: {', '.join(map(str, written))}"]
    return Result(metrics, "\n".join(lines))


def _places(settings: Convert) -> tuple[Path, Path, str]:
    """Return source, destination and target, when they go together."""
    if settings.src is None or settings.dst is None or settings.to is None:
        missing = [name for name in ("src", "dst", "to") if getattr(settings, name) is None]
        raise MaekitError(
            "E-USAGE-CONVERT", f"no {' and no '.join(missing)} named", hint="maekit convert SRC DST --to timm"
        )
    suffixes = SUFFIXES.get(settings.to)
    if suffixes and settings.dst.suffix not in suffixes:
        raise MaekitError(
            "E-USAGE-OUT", f"setting dst for {settings.to}", found=settings.dst, expected=f"a file FILE{suffixes[0]}"
        )
    write.refuse_existing(settings.dst)
    given = [
        name for name in Graph.model_fields if name in Graph.__annotations__ and getattr(settings, name) is not None
    ]
    if settings.to not in ("onnx", "pt2") and given:
        raise MaekitError(
            "E-USAGE-CONVERT", f"setting {given[0]}", found=f"--to {settings.to}", expected="--to onnx or --to pt2"
        )
    return settings.src, settings.dst, settings.to


def _reshaped(reading: Reading, settings: Convert) -> Reading:
    """Apply the changes that were asked for, the patches before the image, so that its size is the last word."""
    if settings.encoder_only:
        reading = _without_decoder(reading)
    if settings.class_token is not None:
        change = reshape.add_class_token if settings.class_token == "add" else reshape.drop_class_token
        reading = change(reading)
    if settings.channels is not None:
        reading = reshape.to_channels(reading, settings.channels)
    if settings.channel_matrix is not None:
        reading = reshape.with_channel_matrix(reading, _matrix(settings.channel_matrix))
    if settings.patch_size is not None:
        reading = reshape.to_patch(reading, settings.patch_size)
    if settings.img_size is not None:
        reading = reshape.to_size(reading, settings.img_size)
    return reading


def _without_decoder(reading: Reading) -> Reading:
    if reading.kind != "mae":
        raise MaekitError(
            "E-CKPT-KIND", f"{reading.path}", found=f"kind {reading.kind}", expected="a decoder to leave out"
        )
    rows = [
        row._replace(what="left out", note="--encoder-only") if row.ours.startswith("decoder.") else row
        for row in reading.rows
    ]
    tensors = {name[8:]: value for name, value in reading.tensors.items() if name.startswith("encoder.")}
    return reading._replace(kind="encoder", tensors=tensors, rows=rows)


def _matrix(path: Path) -> list[list[float]]:
    try:
        rows = json.loads(path.read_text("utf-8"))
        if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
            raise ValueError("no list of rows")
        return [[float(value) for value in row] for row in rows]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise MaekitError(
            "E-CONFIG-CHANNELS",
            f"setting channel_matrix {path}",
            found=clean(error, 100),
            expected="a JSON list with a list of numbers for each new channel",
        ) from error


def _card(reading: Reading, licence: str, src: Path, dst: Path, to: str, what: str | None) -> str:
    """Return the card of what will be written; refuse a place for it that is taken, before anything is."""
    if to not in ("timm", "transformers"):  # those write a folder of their own
        write.refuse_existing(dst.parent / "README.md")
    encoder = to in ENCODERS or (to in ("onnx", "pt2") and what != "autoencoder")
    held = _without_decoder(reading) if reading.kind == "mae" and encoder else reading
    return card(held, licence, origin(src), to=to, name=dst.name)


def _write(reading: Reading, place: Path, to: str) -> list[Row]:
    if to == "safetensors":
        save_reading(reading, place)
        return [Row(name, name, "used") for name in reading.tensors]
    writers = {
        "official": write.official,
        "timm": write.timm_folder,
        "transformers": write.transformers_folder,
        "detectron2": write.detectron2,
    }
    return writers[to](reading, place)


def _export(reading: Reading, dst: Path, to: str, settings: Convert) -> tuple[list[Row], Proof]:
    """Write a graph; it proves itself."""
    what, size, ratio = settings.what or "encoder", bool(settings.dynamic_size), settings.mask_ratio or 0.75
    _refuse_unheard(reading, settings, what)
    from maekit.interchange.export import TOLERANCE, export_onnx, export_pt2

    export = export_onnx if to == "onnx" else export_pt2
    if reading.kind == "classifier":
        loaded = as_classifier(reading)
        done = export(loaded.model, dst, dynamic_size=size, spec=loaded.spec, classes=loaded.classes, task=loaded.task)
    else:
        model = as_model(reading)
        done = export(model, dst, what=what, pool=settings.pool or "mean", dynamic_size=size, mask_ratio=ratio)
    if size:
        patch = reading.spec["patch_size"] or geometry(reading.spec["name"]).patch
        reading.notes.append(
            f"images of any multiple of {patch} pixels, at least {2 * patch} each way"
            + ("; of others the rest at the right and bottom is left out" if to == "onnx" else "")
        )
    inputs = [Row(f"input {name}", "", "created", text) for name, text in done.inputs.items()]
    outputs = [Row(f"output {name}", "", "created", text) for name, text in done.outputs.items()]
    runner = "onnxruntime" if to == "onnx" else "torch"
    how = f"{runner} {version(runner)}: {', '.join(done.outputs)}, batches of 1, 2 and 3"
    return [*inputs, *outputs], Proof(how, max(done.differences.values()), TOLERANCE)


def _refuse_unheard(reading: Reading, settings: Convert, what: str) -> None:
    """Refuse settings that would change nothing."""
    classifier, whole = reading.kind == "classifier", what == "autoencoder"
    wrong = {
        "what": classifier and settings.what is not None,
        "pool": (classifier or whole) and settings.pool is not None,
        "mask_ratio": not whole and settings.mask_ratio is not None,
    }
    for name in (name for name, bad in wrong.items() if bad):
        found = "a classifier, which is exported as it is" if classifier else f"--what {what}"
        raise MaekitError("E-USAGE-CONVERT", f"setting {name}", found=found, expected="nothing that would be ignored")
    if whole and reading.kind == "encoder":
        raise MaekitError(
            "E-CKPT-KIND", f"{reading.path}", found="an encoder alone", expected="a decoder for --what autoencoder"
        )


def _lost(reading: Reading, to: str) -> list[str]:
    """Say what besides tensors a layout has no place for; on reading it must be said again, or is guessed."""
    names = {
        "size": "height and width",
        "heads": "number of heads",
        "target": "target",
        "stats": "mean and deviation",
        "classes": "class names",
        "task": "that outputs are labels of their own or numbers",
    }
    kept = {
        "official": {"size", "target"},
        "detectron2": set[str](),
        "timm": {"size", "heads", "stats", "classes"},
        "transformers": {"size", "heads", "target", "stats", "classes", "task"},
    }.get(to, set(names))
    absent = {"target"} if reading.kind != "mae" or to in ENCODERS else set[str]()
    absent |= set[str]() if reading.classes else {"classes"}
    absent |= {"task"} if reading.task == "classes" else set[str]()
    absent |= {"size"} if reading.spec["img_size"][0] == reading.spec["img_size"][1] else set[str]()
    return [text for name, text in names.items() if name not in kept | absent]


def _said(proof: Proof) -> str:
    if proof.tolerance == 0:
        return proof.how
    return (
        f"{proof.how}; largest difference {proof.difference:.1e} of max(1, largest value), allowed {proof.tolerance:g}"
    )
