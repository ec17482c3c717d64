"""Departures from the paper's default row from end to end: settings to run folder, and what is refused before it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import maekit
from maekit.errors import MaekitError
from maekit.interchange.weights import load_model, read_weights


def settings(tiny: dict[str, Any], flat: Path, out: Path, **more: Any) -> dict[str, Any]:
    return {**tiny, "data": str(flat), "out": out, **more}


VARIANTS: list[dict[str, Any]] = [
    {
        "mask_kind": "block",
        "mask_ratio": 0.5,
        "mask_ratio_max": 0.8,
        "add_noise": 0.2,
        "checkpointing": True,
        "checkpointing_encoder": 2,
    },
    {"encoder_mask_token": True, "decoder_depth": 0, "target": "hog", "class_tokens": 0},
    {"decoder_kind": "cross", "decode_ratio": 0.25, "positions": "learned", "color_jitter": 0.4, "crop": "fixed"},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=["drawn ratios", "beit-like", "crossmae-like"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(
    tiny: dict[str, Any], flat: Path, tmp_path: Path, variant: dict[str, Any]
) -> None:
    whole = maekit.pretrain(settings(tiny, flat, tmp_path / "whole", **variant))
    assert maekit.pretrain(settings(tiny, flat, tmp_path / "parts", stop_at=2, **variant)).exit_code == 75
    parts = maekit.pretrain(settings(tiny, flat, tmp_path / "parts", **variant))
    assert parts.metrics["state_sha256"] == whole.metrics["state_sha256"]
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "Other than the paper" in page
    model = load_model(tmp_path / "whole")
    assert model.variant.departures().items() <= {**variant}.items()
    assert read_weights(tmp_path / "whole" / "encoder.safetensors").kind == "encoder"
    assert "no pixels" in page if variant.get("target") == "hog" else "PSNR" in page


def test_denoising_reports_noise_in_place_of_masks(tiny: dict[str, Any], flat: Path, tmp_path: Path) -> None:
    more = {"mask_kind": "none", "add_noise": 0.5, "loss_on": "all"}
    maekit.pretrain(settings(tiny, flat, tmp_path / "run", **more))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Nothing is removed" in page and "add_noise 0.5" in page
    assert [file.name for file in (tmp_path / "run" / "reconstructions").glob("reconstruction-*")] == [
        "reconstruction-0.png"
    ]


def test_components_are_fitted_predicted_and_kept_with_the_run(
    tiny: dict[str, Any], flat: Path, tmp_path: Path
) -> None:
    same = {name: tiny[name] for name in ("img_size", "patch_size", "channels", "seed") if name in tiny}
    maekit.pca({**same, "data": str(flat), "out": tmp_path / "pca", "components": 6, "patches": 500})
    more = {"target": "pca", "target_from": tmp_path / "pca"}
    maekit.pretrain(settings(tiny, flat, tmp_path / "run", **more))
    model = load_model(tmp_path / "run")
    assert model.target == "pca" and model.decoder.pred.out_features == 6
    maekit.pca({**same, "data": str(flat), "out": tmp_path / "pca2", "components": 6, "patches": 300})
    with pytest.raises(MaekitError, match=r"E-CKPT-MODEL.*another pca target"):
        maekit.pretrain(
            settings(tiny, flat, tmp_path / "no", target="pca", target_from=tmp_path / "pca2", init=tmp_path / "run")
        )
    other = tmp_path / "other"
    other.mkdir()
    for file in sorted(flat.iterdir())[:8]:
        (other / file.name).write_bytes(file.read_bytes())
    with pytest.raises(MaekitError, match=r"E-CONFIG-TARGET.*other images"):
        maekit.pretrain(settings(tiny, other, tmp_path / "no", **more))
    assert not (tmp_path / "no").exists()


def test_given_masks_decide_what_is_removed(tiny: dict[str, Any], flat: Path, tmp_path: Path) -> None:
    model = load_model_of(tiny, flat, tmp_path)
    scores = np.zeros(model.grid, np.float32)
    scores[:, : model.grid[1] // 2] = 1.0
    np.save(tmp_path / "left.npy", scores)
    more = {"mask_kind": "given", "mask_from": tmp_path / "left.npy", "mask_ratio": 0.5}
    left = maekit.pretrain(settings(tiny, flat, tmp_path / "left", **more))
    np.save(tmp_path / "right.npy", 1 - scores)
    right = maekit.pretrain(settings(tiny, flat, tmp_path / "right", **{**more, "mask_from": tmp_path / "right.npy"}))
    assert left.metrics["loss"] != right.metrics["loss"]


def load_model_of(tiny: dict[str, Any], flat: Path, tmp_path: Path) -> Any:
    maekit.pretrain(settings(tiny, flat, tmp_path / "plain"))
    return load_model(tmp_path / "plain")


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"mask_kind": "grid", "mask_ratio": 0.6}, "E-CONFIG-MASK", "a ratio that a regular pattern has"),
        ({"mask_unit": 5}, "E-CONFIG-MASK", "--mask-unit"),
        ({"mask_kind": "given"}, "E-CONFIG-MASK", "without mask_from"),
        ({"mask_from": "masks.npy"}, "E-CONFIG-MASK", "with mask_from"),
        ({"mask_ratio_max": 0.5}, "E-CONFIG-MASK", "a larger ratio"),
        ({"mask_ratio_max": 0.9, "compile": True}, "E-CONFIG-MASK", "--no-compile"),
        ({"target": "pca"}, "E-CONFIG-TARGET", "maekit pca makes one"),
        ({"target": "token"}, "E-CONFIG-TARGET", "maekit tokenizer makes one"),
        ({"target_from": "runs/pca"}, "E-CONFIG-TARGET", "with target_from"),
        ({"decode_ratio": 0.9}, "E-CONFIG-DECODER", "the number removed"),
        ({"decoder_depth": 0}, "E-CONFIG-DEPTH", "--encoder-mask-token"),
        ({"mask_kind": "none"}, "E-CONFIG-VARIANT", "--loss-on all"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tiny: dict[str, Any], flat: Path, tmp_path: Path, changes: dict[str, Any], code: str, words: str
) -> None:
    with pytest.raises(MaekitError) as caught:
        maekit.pretrain(settings(tiny, flat, tmp_path / "run", **changes))
    assert caught.value.code == code and words in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_masks_of_whole_images_want_whole_views(tiny: dict[str, Any], flat: Path, tmp_path: Path) -> None:
    model = load_model_of(tiny, flat, tmp_path)
    np.save(tmp_path / "each.npy", np.random.default_rng(0).random((len(list(flat.iterdir())), model.num_patches)))
    more = {"mask_kind": "given", "mask_from": tmp_path / "each.npy"}
    with pytest.raises(MaekitError, match=r"E-CONFIG-MASK.*--crop-scale 1 1 --no-flip"):
        maekit.pretrain(settings(tiny, flat, tmp_path / "no", **more))
    done = maekit.pretrain(settings(tiny, flat, tmp_path / "yes", **more, crop_scale=(1, 1), flip=False))
    assert json.loads((tmp_path / "yes" / "result.json").read_text())["loss"] == done.metrics["loss"]


@pytest.mark.parametrize(
    "variant", [{"class_tokens": 3}, {"class_tokens": 0, "positions": "learned"}, {"target": "pca"}]
)
def test_encoders_of_every_kind_go_to_timm(
    tiny: dict[str, Any], flat: Path, tmp_path: Path, variant: dict[str, Any]
) -> None:
    if variant.get("target") == "pca":
        same = {name: tiny[name] for name in ("img_size", "patch_size", "channels", "seed") if name in tiny}
        maekit.pca({**same, "data": str(flat), "out": tmp_path / "pca", "components": 6, "patches": 500})
        variant = {**variant, "target_from": tmp_path / "pca"}
    maekit.pretrain(settings(tiny, flat, tmp_path / "run", **variant))
    maekit.convert({"src": tmp_path / "run", "dst": tmp_path / "timm", "to": "timm"})
    ours, again = load_model(tmp_path / "run").encoder, load_model(tmp_path / "timm").encoder
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in again.state_dict().items()
    }
    assert all(bool((value == again.state_dict()[name]).all()) for name, value in ours.state_dict().items())


def test_an_autoencoder_that_others_have_no_decoder_for_goes_nowhere_else(
    tiny: dict[str, Any], flat: Path, tmp_path: Path
) -> None:
    maekit.pretrain(settings(tiny, flat, tmp_path / "run", decoder_kind="cross"))
    with pytest.raises(MaekitError, match=r"E-CKPT-LAYOUT.*decoder_kind.*--to timm"):
        maekit.convert({"src": tmp_path / "run", "dst": tmp_path / "official.pth", "to": "official"})
