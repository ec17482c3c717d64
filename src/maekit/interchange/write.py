"""Weights written for other libraries: names from `names`, a configuration where the library reads one, and a proof.

What is written first lies beside the destination; it is compared with ours by running the library itself where that is
installed (`proof`), and only then renamed. A layout that cannot hold something is told so in a row; what would change
what the model computes is refused. No file that exists is replaced.
"""

import errno
import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from maekit.data.augment import default_crop_pct
from maekit.errors import MaekitError, clean
from maekit.interchange.files import Tensors, read_file
from maekit.interchange.foreign import Row
from maekit.interchange.names import DETECTRON2, OFFICIAL, TIMM, TRANSFORMERS, Layout, theirs
from maekit.model.encoder import create_encoder, geometry
from maekit.model.heads import encoder_spec


class Model(NamedTuple):
    """Weights on their way from one layout to another.

    Attributes:
        kind: "mae" | "encoder" | "classifier".
        spec: arguments of `create_model`.
        tensors: state dict of that kind, as in `foreign.Reading`.
        classes: names of a classifier's outputs, may be empty.
        pool: "mean" | "cls" of a classifier.
    """

    kind: str
    spec: dict[str, Any]
    tensors: Tensors
    classes: list[str]
    pool: str | None

    def ours(self) -> Tensors:
        """Return the tensors under the whole model's names."""
        return self.tensors if self.kind == "mae" else {f"encoder.{name}": t for name, t in self.tensors.items()}


def official(model: Model, path: Path) -> list[Row]:
    """Write a file as the authors' code reads it: ``{"model": ...}``, decoder included where there is one.

    Raises:
        MaekitError: E-CKPT-LAYOUT for what the authors' model has no place for; E-ENV-OUT, E-ENV-DISK.
    """
    _only_plain(model, "the authors' model")
    named, rows = _rename(model, OFFICIAL)
    _into(path, lambda place: torch.save({"model": named}, place))
    return rows


def detectron2(model: Model, path: Path) -> list[Row]:
    """Write a file with the names of ViTDet's backbone in detectron2, ``{"model": ...}``.

    Class token, final norm, decoder and head have no place there. The class token's row of positions stays: ViTDet
    strips it (``pretrain_use_cls_token``).

    Raises:
        MaekitError: as `official`.
    """
    _only_plain(model, "ViTDet's backbone")
    named, rows = _rename(model, DETECTRON2)
    _into(path, lambda place: torch.save({"model": named}, place))
    return rows


def timm_folder(model: Model, path: Path) -> list[Row]:
    """Write a folder that ``timm.create_model("local-dir:DIR", pretrained=True)`` loads, encoder and head.

    Its model.safetensors alone is what ``pretrained_cfg_overlay=dict(file=...)`` takes. The decoder has no place there.

    Raises:
        MaekitError: E-ENV-OUT, E-ENV-DISK.
    """
    named, rows = _rename(model, TIMM, keep_unknown=True)
    built = _as_timm(model)
    built.load_state_dict(named)
    spec = model.spec
    size, args = tuple(spec["img_size"]), encoder_spec(spec)
    keep = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads")
    config: dict[str, Any] = {
        "pretrained_cfg": {"label_names": model.classes} if model.classes else {},
        "model_args": {name: args[name] for name in keep if args[name] is not None},
    }
    if model.kind == "classifier":
        config["model_args"] |= {
            "global_pool": "avg" if model.pool == "mean" else "token",
            "fc_norm": model.pool == "mean",
        }
    data = {"mean": tuple(spec["mean"]), "std": tuple(spec["std"]), "interpolation": "bicubic"}
    data |= {"input_size": (spec["in_chans"], *size), "crop_pct": default_crop_pct(size), "crop_mode": "center"}
    into = lambda place: timm.models.save_for_hf(  # noqa: E731
        built, str(place), config, safe_serialization=True, data_config=data
    )
    _into(path, into)
    return rows


def transformers_folder(model: Model, path: Path) -> list[Row]:
    """Write a folder that transformers loads: ViTMAEForPreTraining, ViTMAEModel or ViTForImageClassification.

    Names are those of the hub's files, which 4.57 and 5.x both read (D23). The layer norms' epsilon is 1e-6, which the
    library's own default (1e-12) is not (D3).

    Raises:
        MaekitError: E-CKPT-LAYOUT for a mean-pooled classifier, images that are not square, an encoder without class
            token; E-ENV-OUT, E-ENV-DISK.
    """
    _only_plain(model, "transformers' ViT")
    if model.kind == "classifier" and model.pool != "cls":
        raise MaekitError(
            "E-CKPT-LAYOUT",
            "a mean-pooled classifier as transformers' ViTForImageClassification",
            found="a head on the mean of patch tokens",
            expected="a head on the class token: that class pools nothing else",
            hint="--to timm, or maekit finetune --pool cls",
        )
    if model.spec["img_size"][0] != model.spec["img_size"][1]:
        raise MaekitError(
            "E-CKPT-LAYOUT",
            "images for transformers' ViT",
            found=f"{model.spec['img_size']} pixels",
            expected="square ones",
        )
    named, rows = _rename(model, TRANSFORMERS)
    if model.kind == "encoder":  # ViTMAEModel is the bare encoder
        named = {name.removeprefix("vit."): value for name, value in named.items()}
        rows = [row._replace(theirs=row.theirs.removeprefix("vit.")) for row in rows]

    def write(place: Path) -> None:
        place.mkdir()
        safetensors.torch.save_file(named, place / "model.safetensors", {"format": "pt"})
        _write_json(place / "config.json", _transformers_config(model))
        _write_json(place / "preprocessor_config.json", _preprocessor(model.spec))

    _into(path, write)
    return rows


def _transformers_config(model: Model) -> dict[str, Any]:
    spec = model.spec
    known = geometry(spec["name"])
    width, heads = spec["embed_dim"] or known.width, spec["num_heads"] or known.heads
    depth = 1 + max(int(name.split(".")[2]) for name in model.ours() if name.startswith("encoder.blocks."))
    config: dict[str, Any] = {
        "model_type": "vit" if model.kind == "classifier" else "vit_mae",
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": model.ours()["encoder.blocks.0.mlp.fc1.weight"].shape[0],
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-6,
        "image_size": spec["img_size"][0],
        "patch_size": spec["patch_size"] or known.patch,
        "num_channels": spec["in_chans"],
        "qkv_bias": True,
        "torch_dtype": "float32",
    }
    if model.kind == "classifier":
        names = model.classes or [f"LABEL_{at}" for at in range(len(model.tensors["head.weight"]))]
        labels = {"id2label": {str(at): name for at, name in enumerate(names)}}
        labels["label2id"] = {name: at for at, name in enumerate(names)}  # pyright: ignore[reportArgumentType]
        return {"architectures": ["ViTForImageClassification"], **config, **labels}
    decoder = {
        "decoder_hidden_size": spec["decoder_dim"],
        "decoder_num_hidden_layers": spec["decoder_depth"],
        "decoder_num_attention_heads": spec["decoder_heads"],
        "decoder_intermediate_size": 4 * spec["decoder_dim"],
        "mask_ratio": 0.75,
        "norm_pix_loss": spec["target"] == "norm_pixel",
    }
    name = "ViTMAEForPreTraining" if model.kind == "mae" else "ViTMAEModel"
    return {"architectures": [name], **config, **decoder}


def _preprocessor(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the evaluation of the method as an image processor: resize the short side, centre crop, normalise."""
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


def _only_plain(model: Model, what: str) -> None:
    """Refuse what a plain ViT with a class token does not have: leaving it out would change every feature."""
    plain = {f"encoder.{name}" for name in ("cls_token", "pos_embed")}
    extra = [name for name in model.ours() if name.startswith("encoder.") and not theirs(OFFICIAL, name)]
    missing = sorted(plain - model.ours().keys())
    rows, patches = model.ours()["encoder.pos_embed"].shape[1], _num_patches(model.spec)
    if extra or missing or rows != patches + 1:
        found = (
            f"{clean(extra[0], 60)}" if extra else f"no {missing[0]}" if missing else "a class token without position"
        )
        raise MaekitError(
            "E-CKPT-LAYOUT",
            f"this encoder as {what}",
            found=found,
            expected="a plain ViT with a class token",
            hint="--to timm or --to safetensors, which hold everything",
        )


def _num_patches(spec: dict[str, Any]) -> int:
    patch = spec["patch_size"] or geometry(spec["name"]).patch
    return (spec["img_size"][0] // patch) * (spec["img_size"][1] // patch)


def _rename(model: Model, layout: Layout, *, keep_unknown: bool = False) -> tuple[Tensors, list[Row]]:
    """Return tensors under a layout's names, and a row for each of ours."""
    named: Tensors = {}
    rows: list[Row] = []
    for ours, value in model.ours().items():
        names = theirs(layout, ours)
        if not names and keep_unknown and ours.startswith("encoder."):
            names = [ours.removeprefix("encoder.")]
        parts: list[Tensor] = [value] if len(names) == 1 else list(value.chunk(len(names))) if names else []
        for name, part in zip(names, parts, strict=True):
            named[name] = part.contiguous().clone()
            what = "reshaped" if len(names) > 1 else "used" if name == ours.removeprefix("encoder.") else "renamed"
            rows.append(Row(name, ours, what, "one third of the fused qkv" if len(names) > 1 else ""))
        if not names:
            rows.append(Row("", ours, "left out", f"{layout.name} has no place for it"))
    return named, rows


def _as_timm(model: Model) -> VisionTransformer:
    """Build the empty timm model that holds an encoder or a classifier."""
    num_classes = len(model.tensors["head.weight"]) if model.kind == "classifier" else 0
    return create_encoder(**encoder_spec(model.spec), num_classes=num_classes, pool=model.pool or "cls")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def _into(path: Path, write: Callable[[Path], object]) -> None:
    """Write under a name of its own, then rename: whole, or not there."""
    if path.exists():
        raise MaekitError("E-ENV-OUT", f"{path}", found="it exists", expected="a new name: nothing is replaced")
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.rename(path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError when the disk is full
        number = getattr(error, "errno", None)
        code = "E-ENV-DISK" if number == errno.ENOSPC else "E-ENV-OUT"
        raise MaekitError(code, f"cannot write {path}", found=clean(error, 200)) from error
    finally:
        discard(temporary)


def discard(path: Path) -> None:
    """Remove a file or folder of ours, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_tensors(path: Path, expected: Tensors) -> int:
    """Read back what was written and compare it bit by bit; return how many tensors there are."""
    found = read_file(path).tensors
    wrong = [name for name in expected if name not in found or not torch.equal(found[name], expected[name])]
    if wrong or len(found) != len(expected):
        raise MaekitError("E-CKPT-PARITY", f"{path}", found=f"{wrong[:3]} read back otherwise than written")
    return len(found)
