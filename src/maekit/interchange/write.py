"""Weights written for other libraries: the names of `names`, and a configuration where the library reads one.

A layout that has no place for a tensor is told so in a row; what would change what the model computes is refused. The
place that is written to does not exist yet: `staged` gives one beside the destination, renames it when all is proved
and removes it when anything fails. No file that exists is replaced.
"""

import contextlib
import errno
import io
import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from maekit.data.augment import default_crop_pct
from maekit.disk import put
from maekit.errors import MaekitError, clean
from maekit.interchange.files import Tensors
from maekit.interchange.names import DETECTRON2, OFFICIAL, TIMM, TRANSFORMERS, Layout, Row, theirs
from maekit.interchange.reading import Reading
from maekit.interchange.said import EPSILON, PROBLEMS
from maekit.model.encoder import create_encoder, geometry
from maekit.model.heads import encoder_spec
from maekit.model.targets import PIXELS
from maekit.model.variant import Variant


def official(reading: Reading, place: Path) -> list[Row]:
    """Write a file as the authors' code reads it: ``{"model": ...}``, decoder included where there is one.

    ``args`` beside it says image size and target as their training script does; a plain dictionary, since a Namespace
    would ask every reader to allow its class.

    Raises:
        MaekitError: E-CKPT-LAYOUT for what the authors' model has no place for.
    """
    _only_plain(reading, "the authors' model")
    named, rows = _rename(reading, OFFICIAL)
    height, width = reading.spec["img_size"]
    args = {"input_size": height if height == width else [height, width]}  # as their script names its arguments
    args |= {"norm_pix_loss": reading.spec["target"] == "norm_pixel"} if reading.kind == "mae" else {}
    _torch_save({"model": named, "args": args}, place)
    return rows


def detectron2(reading: Reading, place: Path) -> list[Row]:
    """Write a file with the names of ViTDet's backbone in detectron2, ``{"model": ...}``.

    Class token, final norm, decoder and head have no place there. The class token's row of positions stays: ViTDet
    strips it (``pretrain_use_cls_token``).

    Raises:
        MaekitError: as `official`.
    """
    _only_plain(reading, "ViTDet's backbone")
    named, rows = _rename(reading, DETECTRON2)
    _torch_save({"model": named}, place)
    return rows


def timm_folder(reading: Reading, place: Path) -> list[Row]:
    """Write a folder that ``timm.create_model("local-dir:DIR", pretrained=True)`` loads, encoder and head.

    Its model.safetensors alone is what ``pretrained_cfg_overlay=dict(file=...)`` takes. The decoder has no place there:
    a file with a ``mask_token`` is taken for DINOv2's by timm's own conversion.
    """
    named, rows = _rename(reading, TIMM, keep_unknown=True)
    built = _as_timm(reading)
    built.load_state_dict(named)
    size = (reading.spec["img_size"][0], reading.spec["img_size"][1])
    data: dict[str, Any] = {"mean": tuple(reading.spec["mean"]), "std": tuple(reading.spec["std"])}
    data |= {"input_size": (reading.spec["in_chans"], *size), "interpolation": "bicubic"}
    data |= {"crop_pct": default_crop_pct(size), "crop_mode": "center"}
    config = {"label_names": reading.classes} if reading.classes else {}
    timm.models.save_for_hf(built, str(place), config, safe_serialization=True, data_config=data)
    return rows


def transformers_folder(reading: Reading, place: Path) -> list[Row]:
    """Write a folder that transformers loads: ViTMAEForPreTraining, ViTMAEModel or ViTForImageClassification.

    Names are those of the hub's files, which 4.57 and 5.x both read (D23). The layer norms' epsilon is 1e-6, which the
    library's own default (1e-12) is not (D3).

    Raises:
        MaekitError: E-CKPT-LAYOUT for a mean-pooled classifier, images that are not square, an encoder without class
            token.
    """
    _only_plain(reading, "transformers' ViT")
    if reading.kind == "classifier" and reading.pool != "cls":
        raise MaekitError(
            "E-CKPT-LAYOUT",
            "a mean-pooled classifier as transformers' ViTForImageClassification",
            found="a head on the mean of patch tokens",
            expected="a head on the class token: that class pools nothing else",
            hint="--to timm, or maekit finetune --pool cls",
        )
    height, width = reading.spec["img_size"]
    if height != width:
        raise MaekitError(
            "E-CKPT-LAYOUT",
            "images for transformers' ViT",
            found=f"{height} x {width} pixels",
            expected="square ones",
            hint="--img-size SIDE, or --to timm",
        )
    named, rows = _rename(reading, TRANSFORMERS)
    if reading.kind == "encoder":  # ViTMAEModel is the bare encoder
        named = {name.removeprefix("vit."): value for name, value in named.items()}
        rows = [row._replace(theirs=row.theirs.removeprefix("vit.")) for row in rows]
    place.mkdir()
    safetensors.torch.save_file(named, place / "model.safetensors", {"format": "pt"})
    _write_json(place / "config.json", _transformers_config(reading))
    _write_json(place / "preprocessor_config.json", _preprocessor(reading.spec))
    return rows


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Give a place beside `path` to write to; it becomes `path` if the block ends well, and is gone if not.

    Raises:
        MaekitError: E-ENV-OUT if `path` exists or cannot be written, E-ENV-DISK if the disk is full.
    """
    refuse_existing(path)
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        put(temporary, path)
    except OSError as error:
        code = "E-ENV-DISK" if error.errno == errno.ENOSPC else "E-ENV-OUT"
        raise MaekitError(code, f"cannot write {path}", found=error.strerror or error) from error
    except safetensors.SafetensorError as error:
        code = "E-ENV-DISK" if "os error 28" in str(error) else "E-ENV-OUT"
        raise MaekitError(code, f"cannot write {path}", found=clean(error, 200)) from error
    finally:
        discard(temporary)


def refuse_existing(path: Path) -> None:
    """Refuse a destination that is there.

    Raises:
        MaekitError: E-ENV-OUT.
    """
    try:
        there = path.exists() or path.is_symlink()
    except OSError as error:  # a name too long, a folder that may not be entered
        raise MaekitError("E-ENV-OUT", f"cannot write {path}", found=error.strerror or error) from error
    if there:
        raise MaekitError("E-ENV-OUT", f"{path}", found="it exists", expected="a new name: nothing is replaced")


def discard(path: Path) -> None:
    """Remove a file or folder of ours, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _transformers_config(reading: Reading) -> dict[str, Any]:
    spec, tensors = reading.spec, reading.whole()
    known = geometry(spec["name"])
    config: dict[str, Any] = {
        "model_type": "vit" if reading.kind == "classifier" else "vit_mae",
        "hidden_size": spec["embed_dim"] or known.width,
        "num_hidden_layers": 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.blocks.")),
        "num_attention_heads": spec["num_heads"] or known.heads,
        "intermediate_size": len(tensors["encoder.blocks.0.mlp.fc1.weight"]),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": EPSILON,
        "image_size": spec["img_size"][0],
        "patch_size": spec["patch_size"] or known.patch,
        "num_channels": spec["in_chans"],
        "qkv_bias": True,
        "torch_dtype": "float32",
    }
    if reading.kind == "classifier":
        said = {task: word for word, task in PROBLEMS.items() if task != "classes"}
        problem = {"problem_type": said[reading.task]} if reading.task in said else {}
        names = reading.classes or [f"LABEL_{at}" for at in range(reading.num_classes())]
        labels = {"id2label": {str(at): name for at, name in enumerate(names)}}
        return {
            "architectures": ["ViTForImageClassification"],
            **config,
            **labels,
            **problem,
            "label2id": {name: at for at, name in enumerate(names)},
        }
    decoder = {
        "decoder_hidden_size": spec["decoder_dim"],
        "decoder_num_hidden_layers": spec["decoder_depth"],
        "decoder_num_attention_heads": spec["decoder_heads"],
        "decoder_intermediate_size": 4 * spec["decoder_dim"],
        "mask_ratio": 0.75,
        "norm_pix_loss": spec["target"] == "norm_pixel",
    }
    name = "ViTMAEForPreTraining" if reading.kind == "mae" else "ViTMAEModel"
    return {"architectures": [name], **config, **decoder}


def _preprocessor(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the method's evaluation as an image processor: short side resized, centre crop, normalised.

    CLIP's processor is the one of transformers that resizes the short side and crops; ViT's own squeezes the image.
    """
    side = spec["img_size"][0]
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": spec["in_chans"] == 3,
        "do_resize": True,
        "size": {"shortest_edge": round(side / default_crop_pct((side, side)))},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec["mean"]),
        "image_std": list(spec["std"]),
    }


def _only_plain(reading: Reading, what: str) -> None:
    """Refuse what a plain ViT with a class token does not have: leaving it out would change every feature.

    Of an autoencoder also what the paper's default row has not: its decoder would be another one there.
    """
    if reading.kind == "mae" and (other := _other_decoder(reading.spec)):
        raise MaekitError(
            "E-CKPT-LAYOUT", f"this autoencoder as {what}", found=other,
            expected="the paper's decoder, of pixels",
            hint="--to timm for the encoder, or --to safetensors, which holds everything",
        )  # fmt: skip
    tensors = reading.whole()
    extra = [name for name in tensors if name.startswith("encoder.") and not theirs(OFFICIAL, name)]
    missing = [name for name in ("encoder.cls_token", "encoder.pos_embed") if name not in tensors]
    if not extra and not missing and tensors["encoder.pos_embed"].shape[1] != _num_patches(reading.spec) + 1:
        missing = ["position of the class token"]
    if extra or missing:
        raise MaekitError(
            "E-CKPT-LAYOUT",
            f"this encoder as {what}",
            found=clean(extra[0], 60) if extra else f"no {missing[0]}",
            expected="a plain ViT with a class token",
            hint="--to timm or --to safetensors, which hold everything of an encoder",
        )


def _other_decoder(spec: dict[str, Any]) -> str:
    """Return what makes a decoder one that only this package has, or an empty string."""
    variant = Variant.of(spec.get("variant"))
    if variant.full_length or variant.decoder_kind == "cross":
        return "a decoder of another kind: " + ", ".join(map(str, variant.departures()))
    return f"target {spec['target']}" if spec["target"] not in PIXELS else ""


def _num_patches(spec: dict[str, Any]) -> int:
    patch = spec["patch_size"] or geometry(spec["name"]).patch
    return (spec["img_size"][0] // patch) * (spec["img_size"][1] // patch)


def _rename(reading: Reading, layout: Layout, *, keep_unknown: bool = False) -> tuple[Tensors, list[Row]]:
    """Return tensors under a layout's names, and a row for each of ours."""
    named: Tensors = {}
    rows: list[Row] = []
    for ours, value in reading.whole().items():
        names = theirs(layout, ours)
        if not names and keep_unknown and ours.startswith("encoder."):
            names = [ours.removeprefix("encoder.")]
        if not names:
            rows.append(Row("", ours, "left out", f"{layout.name} has no place for it"))
        parts: list[Tensor] = list(value.chunk(len(names))) if names else []
        for name, part in zip(names, parts, strict=True):
            named[name] = part.contiguous().clone()
            what = "reshaped" if len(names) > 1 else "used" if name in (ours, ours[8:]) else "renamed"
            rows.append(Row(name, ours, what, "one third of the fused qkv" if len(names) > 1 else ""))
    return named, rows


def _as_timm(reading: Reading) -> VisionTransformer:
    """Build the empty timm model that holds an encoder or a classifier."""
    spec = encoder_spec(reading.spec)
    return create_encoder(**spec, num_classes=reading.num_classes(), pool=reading.pool or "cls")


def _torch_save(value: dict[str, Any], place: Path) -> None:
    """Save through memory: given a file name, torch raises RuntimeError without a reason when the disk is full."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    place.write_bytes(buffer.getbuffer())


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
