"""timm alone gives our features and logits from the files we write."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from maekit.interchange.weights import metadata, save_encoder
from maekit.model.heads import classifier
from maekit.model.mae import MaskedAutoencoder, create_model

from .comparison import LIMITS, Row, apart, short
from .conftest import Report
from .models import MODELS, inputs, stir

PRECISIONS = [torch.float64, torch.float32]
CASES: dict[str, dict[str, Any]] = {
    **MODELS,
    "not square": {**MODELS["tiny, 5 channels"], "img_size": (32, 56)},
    "no class token": {
        "name": "vit_base_patch16_siglip_gap_224", "img_size": 48, "embed_dim": 48, "depth": 2, "num_heads": 3,
    },
    "registers": {"name": "vit_small_patch14_reg4_dinov2", "img_size": 42, "embed_dim": 48, "depth": 2, "num_heads": 3},
}  # fmt: skip
SLOW = "ViT-B/16, 224 px"


def cases() -> list[object]:
    return [pytest.param(name, marks=pytest.mark.slow) if name == SLOW else name for name in CASES]


def build(name: str) -> MaskedAutoencoder:
    """Return a model in float32, as files hold it; float64 is reached from there."""
    torch.manual_seed(0)
    model = create_model(**CASES[name]).eval()
    stir(model)
    return model


def geometry(model: MaskedAutoencoder) -> dict[str, Any]:
    """Return what timm must be told to build the same encoder."""
    names = ("patch_size", "in_chans", "embed_dim", "depth", "num_heads")
    given = {name: model.spec[name] for name in names if model.spec[name] is not None}
    return {"model_name": model.spec["name"], "img_size": model.img_size, **given}


@pytest.mark.parametrize("dtype", PRECISIONS, ids=short)
@pytest.mark.parametrize("name", cases())
def test_timm_gives_tokens_class_token_and_mean_of_an_encoder_file(
    report: Report, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    ours, file = build(name), tmp_path / "encoder.safetensors"
    save_encoder(ours, file)
    pools = {"tokens": "", "cls": "token", "mean": "avg"}
    if not ours.encoder.has_class_token:
        del pools["cls"]
    ours, images = ours.to(dtype), inputs(ours, dtype)[0]
    rows = []
    for pool, theirs in pools.items():
        kind = {"num_classes": 0, "global_pool": theirs, "fc_norm": False}
        model = timm.create_model(**geometry(ours), **kind, checkpoint_path=str(file)).to(dtype).eval()
        with torch.no_grad():
            found, expected = ours.features(images, pool=pool), model(images)
        rows.append(Row(name, "timm, encoder file", short(dtype), "features", pool, *apart(found, expected), 0.0))
    report([row._replace(limit=LIMITS[dtype]) for row in rows])


@pytest.mark.parametrize("dtype", PRECISIONS, ids=short)
@pytest.mark.parametrize(("pool", "theirs"), [("mean", "avg"), ("cls", "token")])
@pytest.mark.parametrize("name", [name for name in cases() if name != "no class token"])
def test_timm_gives_the_logits_of_a_classifier_file(
    report: Report, tmp_path: Path, name: str, pool: str, theirs: str, dtype: torch.dtype
) -> None:
    """With "mean" the norm stands after the pooling (``fc_norm``), as timm builds it for global_pool "avg"."""
    ours, file = build(name), tmp_path / "model.safetensors"
    head = classifier(ours, 7, pool=pool).eval()
    stir(head)
    safetensors.torch.save_file(head.state_dict(), file, metadata(ours, pool=pool))
    kind = {"num_classes": 7, "global_pool": theirs}
    model = timm.create_model(**geometry(ours), **kind, checkpoint_path=str(file)).to(dtype).eval()
    images = inputs(ours, dtype)[0]
    with torch.no_grad():
        found, expected = head.to(dtype)(images), model(images)
    about = (name, f"timm, global_pool {theirs}", short(dtype))
    report([Row(*about, "logits", "logits", *apart(found, expected), LIMITS[dtype])])


STRANGER = """
import json, sys
sys.modules["maekit"] = None  # from here on an ImportError
import safetensors.torch, timm, torch
file, inputs, outputs, geometry = sys.argv[1:]
images, found = safetensors.torch.load_file(inputs)["images"], {}
for dtype in (torch.float64, torch.float32):
    for name, pool in {"tokens": "", "cls": "token", "mean": "avg"}.items():
        kind = {"num_classes": 0, "global_pool": pool, "fc_norm": False}
        model = timm.create_model(**json.loads(geometry), **kind, checkpoint_path=file).to(dtype).eval()
        with torch.no_grad():
            found[f"{name} {dtype}"] = model(images.to(dtype)).contiguous()
safetensors.torch.save_file(found, outputs)
"""


def test_a_process_without_maekit_gives_the_same_features(report: Report, tmp_path: Path) -> None:
    name = "patch 14, 112 px"
    ours, encoder, sent, back = build(name), *(tmp_path / f"{word}.safetensors" for word in ("encoder", "in", "out"))
    save_encoder(ours, encoder)
    images = inputs(ours, torch.float32)[0]
    safetensors.torch.save_file({"images": images}, sent)
    command = [sys.executable, "-W", "error", "-c", STRANGER, encoder, sent, back, json.dumps(geometry(ours))]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    theirs: dict[str, Tensor] = safetensors.torch.load_file(back)
    rows = []
    for dtype in PRECISIONS:
        ours = ours.to(dtype)
        for pool in ("tokens", "cls", "mean"):
            with torch.no_grad():
                found = ours.features(images.to(dtype), pool=pool)
            difference = apart(found, theirs[f"{pool} {dtype}"])
            about = (name, "timm, a process without maekit", short(dtype))
            rows.append(Row(*about, "features", pool, *difference, LIMITS[dtype]))
    report(rows)
