"""Files of every layout are read into the model they came from, and what they do not say is said."""

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maekit.errors import MaekitError
from maekit.interchange.files import File
from maekit.interchange.foreign import recognise
from maekit.interchange.reading import Hints
from maekit.interchange.weights import load_classifier, load_model, read_weights, save_model
from maekit.model.heads import classifier
from maekit.model.mae import MaskedAutoencoder
from maekit.model.patches import sincos_2d

from . import layouts

Tensors = dict[str, Tensor]
HINTS = Hints(decoder_heads=2, target="norm_pixel")


def write(path: Path, tensors: Tensors, **beside: Any) -> Path:
    """Save as the authors' training script does, or as safetensors."""
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    else:
        torch.save({"model": tensors, **beside}, path)
    return path


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    mine, theirs = found.state_dict(), expected.state_dict()
    assert mine.keys() == theirs.keys()
    different = [name for name in theirs if not torch.equal(mine[name], theirs[name])]
    assert not different


def refusal(path: Path, hints: Hints = HINTS) -> MaekitError:
    with pytest.raises(MaekitError) as caught:
        load_model(path, hints=hints)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    return caught.value


# --- each layout, of a small model whose weights are all different


def hub(model: MaskedAutoencoder) -> Tensors:
    return layouts.as_hub(layouts.official_of(model))


WHOLE: dict[str, Callable[[MaskedAutoencoder], Tensors]] = {
    "official": layouts.official_of,
    "hub": hub,
    "written by transformers 5": lambda model: layouts.as_files_of_5(hub(model)),
    "in the memory of transformers 5": lambda model: layouts.as_memory_of_5(hub(model)),
    "split q, k, v": lambda model: layouts.as_split(layouts.official_of(model), ""),
    "split q_proj": lambda model: layouts.as_split(layouts.official_of(model), "_proj"),
    "our names": lambda model: model.state_dict(),
}
PREFIXES = ("", "module.", "_orig_mod.", "model.", "module._orig_mod.")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_autoencoder_comes_back_bit_by_bit(tmp_path: Path, name: str, suffix: str) -> None:
    model = layouts.small()
    path = write(tmp_path / f"weights{suffix}", WHOLE[name](model))
    assert_same(load_model(path, hints=HINTS), model)
    reading = read_weights(path, HINTS)
    assert reading.kind == "mae"
    assert {row.what for row in reading.rows} <= {"used", "renamed", "reshaped"}
    assert {row.theirs for row in reading.rows} == WHOLE[name](model).keys()


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", ["official", "hub", "our names"])
def test_wrappers_before_the_names_are_seen_through(tmp_path: Path, name: str, prefix: str) -> None:
    model = layouts.small()
    tensors = {prefix + key: value for key, value in WHOLE[name](model).items()}
    assert_same(load_model(write(tmp_path / "weights.pth", tensors), hints=HINTS), model)


@pytest.mark.parametrize("prefix", [*PREFIXES, "backbone.", "encoder.", "module.encoder.", "student.backbone."])
def test_an_encoder_inside_something_larger_is_found(tmp_path: Path, prefix: str) -> None:
    model = layouts.small()
    tensors = {prefix + key: value for key, value in layouts.official_of(model, decoder=False).items()}
    tensors["optimizer_step"] = torch.zeros(1)
    reading = read_weights(write(tmp_path / "weights.pth", tensors))
    assert reading.kind == "encoder"
    assert [(row.theirs, row.note) for row in reading.rows if row.what == "left out"] == [
        ("optimizer_step", "no part of encoder, decoder or head")
    ]
    assert_same(load_model(tmp_path / "weights.pth").encoder, model.encoder)


def test_the_authors_training_checkpoint_is_read_with_its_arguments(tmp_path: Path) -> None:
    model = layouts.small(target="pixel")
    args = argparse.Namespace(norm_pix_loss=False, input_size=32, model="mae_vit_tiny", output_dir="out")
    optimizer = torch.optim.AdamW(model.parameters())
    path = write(
        tmp_path / "checkpoint-799.pth", layouts.official_of(model), optimizer=optimizer.state_dict(), epoch=799,
        scaler={"scale": 65536.0}, args=args,
    )  # fmt: skip
    reading = read_weights(path, Hints(decoder_heads=2))
    assert reading.layout == "official"
    assert reading.spec["target"] == "pixel"  # by its own arguments
    assert reading.facts["epoch"] == 799
    assert reading.facts["args"]["norm_pix_loss"] is False
    assert sorted(reading.beside) == ["optimizer", "scaler"]
    assert_same(load_model(path, hints=Hints(decoder_heads=2)), model)


def test_sharded_safetensors_with_an_index_are_one_file(tmp_path: Path) -> None:
    model = layouts.small()
    tensors = hub(model)
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, inside in shards.items():
        safetensors.torch.save_file({name: tensors[name].contiguous() for name in inside}, tmp_path / file)
    places = {name: file for file, inside in shards.items() for name in inside}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        assert_same(load_model(path, hints=HINTS), model)
    assert read_weights(tmp_path, HINTS).container == "sharded safetensors"


def test_half_precision_becomes_float32_and_the_row_says_so(tmp_path: Path) -> None:
    model = layouts.small()
    tensors = {name: value.half() for name, value in layouts.official_of(model).items()}
    reading = read_weights(write(tmp_path / "weights.pth", tensors), HINTS)
    assert {value.dtype for value in reading.tensors.values()} == {torch.float32}
    assert all("float16 to float32" in row.note for row in reading.rows)


def test_vitdets_backbone_gives_an_encoder_and_says_what_was_made(tmp_path: Path) -> None:
    model = layouts.small()
    path = write(tmp_path / "vitdet.pth", layouts.as_detectron2(layouts.official_of(model)))
    reading = read_weights(path)
    assert (reading.layout, reading.kind) == ("detectron2", "encoder")
    made = {row.ours for row in reading.rows if row.what == "created"}
    assert made == {"encoder.norm.weight", "encoder.norm.bias"}
    found, expected = load_model(path).encoder, model.encoder.state_dict()
    for name, value in found.state_dict().items():
        if name == "pos_embed":
            assert torch.equal(value, expected[name][:, 1:])
        elif f"encoder.{name}" not in made:
            assert torch.equal(value, expected[name]), name
    # ViTDet's own arithmetic: patches and positions through the blocks, no class token
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = model.encoder.blocks(model.encoder.patch_embed(images) + expected["pos_embed"][:, 1:])
        normed = torch.nn.functional.layer_norm(tokens, (192,), eps=1e-6)
        torch.testing.assert_close(found.forward_features(images), normed, rtol=1e-5, atol=1e-5)
    assert any("class token" in note for note in reading.notes)


def test_relative_positions_of_a_trained_detector_cannot_be_left_out(tmp_path: Path) -> None:
    tensors = layouts.as_detectron2(layouts.official_of(layouts.small()))
    tensors["backbone.net.blocks.0.attn.rel_pos_h"] = torch.zeros(7, 64)
    error = refusal(write(tmp_path / "detector.pth", tensors))
    assert error.code == "E-CKPT-KEYS"
    assert "rel_pos_h" in str(error)


# --- the libraries themselves as oracles


@pytest.mark.parametrize("form", ["safetensors", "state_dict"])
@torch.no_grad()
def test_transformers_own_autoencoder_gives_its_predictions_here(tmp_path: Path, form: str) -> None:
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTMAEConfig(
        hidden_size=192, num_hidden_layers=2, num_attention_heads=3, intermediate_size=768, image_size=32, patch_size=8,
        decoder_hidden_size=64, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=256, norm_pix_loss=True, layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs = transformers.ViTMAEForPreTraining(config).eval()
    for value in theirs.parameters():
        value += 0.05 * torch.randn_like(value)
    if form == "safetensors":
        theirs.save_pretrained(tmp_path)
        ours = load_model(tmp_path)
    else:
        torch.save(theirs.state_dict(), tmp_path / "weights.bin")
        ours = load_model(tmp_path / "weights.bin", hints=HINTS)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    expected, found = theirs(images, noise=noise), ours(images, 0.75, noise=noise)
    torch.testing.assert_close(found.pred, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.ids_restore, expected.ids_restore)


@torch.no_grad()
def test_transformers_classifier_gives_its_logits_and_class_names_here(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=192, num_hidden_layers=2, num_attention_heads=3, intermediate_size=768, image_size=32, patch_size=8,
        layer_norm_eps=1e-6, id2label={0: "cat", 1: "dog", 2: "owl"},
    )  # fmt: skip
    theirs = transformers.ViTForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    loaded = load_classifier(tmp_path)
    assert loaded.classes == ["cat", "dog", "owl"]
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded.model(images), theirs(images).logits, rtol=1e-5, atol=1e-5)


def test_a_file_named_inside_a_folder_is_read_with_the_configuration_beside_it(tmp_path: Path) -> None:
    model = layouts.small(embed_dim=96, num_heads=4)
    safetensors.torch.save_file(hub(model), tmp_path / "model.safetensors")
    config = {"model_type": "vit_mae", "num_attention_heads": 4, "decoder_num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert_same(load_model(path), model)


def test_another_epsilon_or_activation_in_a_configuration_is_noted_or_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file(hub(layouts.small()), tmp_path / "model.safetensors")
    config = {"model_type": "vit_mae", "num_attention_heads": 3, "decoder_num_attention_heads": 2, "image_size": 32}
    (tmp_path / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-12}))
    assert any("1e-12" in note for note in read_weights(tmp_path).notes)
    others: list[dict[str, Any]] = [
        {"hidden_act": "quick_gelu"}, {"layer_norm_eps": 1e-3}, {"layer_norm_eps": 1}, {"qkv_bias": False},
        {"model_type": "deit"}, {"model_type": "dinov2"},
    ]  # fmt: skip
    for other in others:
        (tmp_path / "config.json").write_text(json.dumps({**config, **other}))
        error = refusal(tmp_path)
        assert error.code == "E-CKPT-LAYOUT"
        assert next(iter(other)) in str(error)


def test_what_a_configuration_of_transformers_leaves_unsaid_is_the_librarys_default(tmp_path: Path) -> None:
    model = layouts.small(embed_dim=192, num_heads=12, decoder_heads=16, target="pixel")
    safetensors.torch.save_file(hub(model), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit_mae", "image_size": 32}))
    reading = read_weights(tmp_path)
    assert (reading.spec["num_heads"], reading.spec["decoder_heads"], reading.spec["target"]) == (12, 16, "pixel")
    assert_same(load_model(tmp_path), model)


@pytest.mark.parametrize(
    ("processor", "mean", "std"),
    [
        ({}, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]),
        ({"do_normalize": False}, [0, 0, 0], [1, 1, 1]),
        ({"do_rescale": False}, [0.1 / 255, 0.2 / 255, 0.3 / 255], [0.4 / 255, 0.5 / 255, 0.6 / 255]),
        ({"rescale_factor": 1 / 127.5}, [0.05, 0.1, 0.15], [0.2, 0.25, 0.3]),
    ],
    ids=["plain", "not normalised", "not rescaled", "to 0..2"],
)
def test_an_image_processor_says_what_images_are_normalised_by(
    tmp_path: Path, processor: dict[str, Any], mean: list[float], std: list[float]
) -> None:
    safetensors.torch.save_file(hub(layouts.small()), tmp_path / "model.safetensors")
    config = {"model_type": "vit_mae", "num_attention_heads": 3, "decoder_num_attention_heads": 2, "image_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], **processor}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    spec = read_weights(tmp_path).spec
    assert spec["mean"] == pytest.approx(mean)
    assert spec["std"] == pytest.approx(std)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"num_classes": 5}),
        ("vit_tiny_patch16_224", {"num_classes": 5, "global_pool": "avg"}),
        ("vit_small_patch14_reg4_dinov2", {"num_classes": 0, "patch_size": 16}),
        ("vit_base_patch16_gap_224", {"embed_dim": 192, "num_heads": 3, "num_classes": 0}),
        ("vit_tiny_patch16_224", {"num_classes": 0, "in_chans": 5}),
    ],
)
@torch.no_grad()
def test_what_timm_saves_computes_the_same_here(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"img_size": 64, "depth": 2, "num_classes": 0, **changes}
    theirs = timm.create_model(name, **settings).eval()
    assert isinstance(theirs, VisionTransformer)
    timm.models.save_for_hf(theirs, str(tmp_path), safe_serialization=True)
    images = torch.randn(2, settings.get("in_chans", 3), 64, 64)
    if settings["num_classes"]:
        loaded = load_classifier(tmp_path)
        torch.testing.assert_close(loaded.model(images), theirs(images), rtol=1e-5, atol=1e-5)
    else:
        ours = load_model(tmp_path).features(images, "tokens")
        torch.testing.assert_close(ours, theirs.forward_features(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", ["avgmax", "max", "map", ""])
def test_a_head_that_pools_otherwise_is_refused(tmp_path: Path, pool: str) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3, global_pool=pool)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    with pytest.raises(MaekitError) as caught:
        load_classifier(tmp_path)
    assert caught.value.code in ("E-CKPT-LAYOUT", "E-CKPT-KEYS")


@pytest.mark.parametrize(
    "extra",
    ["norm_pre.weight", "patch_embed.norm.weight", "attn_pool.q.weight", "head_dist.weight", "dist_token",
     "heads.pre_logits.weight", "vit.embeddings.register_tokens", "rope.freqs"],
)  # fmt: skip
def test_what_would_change_the_features_is_never_left_out(tmp_path: Path, extra: str) -> None:
    tensors = layouts.official_of(layouts.small(), decoder=False) | {extra: torch.ones(192)}
    error = refusal(write(tmp_path / "w.pth", tensors), Hints())
    assert error.code == "E-CKPT-KEYS"
    assert extra in str(error)
    assert "cannot be left out" in str(error)


def test_heads_and_other_parts_after_the_encoder_are_left_out_and_said(tmp_path: Path) -> None:
    extra = {
        "fc.weight": torch.ones(3, 192),
        "head.mlp.0.weight": torch.ones(2, 192),
        "pooler.dense.bias": torch.ones(2),
    }
    reading = read_weights(write(tmp_path / "w.pth", layouts.official_of(layouts.small(), decoder=False) | extra))
    assert {row.theirs for row in reading.rows if row.what == "left out"} == extra.keys()


def test_a_decoder_beside_a_head_is_left_out_and_said(tmp_path: Path) -> None:
    tensors = layouts.official_of(layouts.small()) | {"head.weight": torch.ones(3, 192), "head.bias": torch.ones(3)}
    reading = read_weights(write(tmp_path / "w.pth", tensors))
    assert reading.kind == "classifier"
    left = {row.ours for row in reading.rows if row.what == "left out"}
    assert left == {f"decoder.{name}" for name in layouts.small().decoder.state_dict()}
    assert not any("decoder" in note for note in reading.notes)


def test_an_argument_of_timm_that_changes_what_is_computed_is_refused(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, act_layer="relu", num_classes=0)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    error = refusal(tmp_path)
    assert error.code == "E-CKPT-LAYOUT"
    assert "act_layer" in str(error)


def test_an_average_is_read_where_nothing_else_is_there_and_said(tmp_path: Path) -> None:
    model, other = layouts.small(), layouts.small(target="pixel")
    torch.save({"model_ema": layouts.official_of(model), "epoch": 3}, tmp_path / "ema.pth")
    assert_same(load_model(tmp_path / "ema.pth", hints=HINTS), model)
    assert read_weights(tmp_path / "ema.pth", HINTS).facts["weights under"] == "model_ema"
    both = {"model": {"depth": 2}, "state_dict": layouts.official_of(model), "ema": layouts.official_of(other)}
    torch.save(both, tmp_path / "both.pth")
    assert_same(load_model(tmp_path / "both.pth", hints=HINTS), model)


@torch.no_grad()
def test_torchvisions_vit_computes_the_same_here(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.VisionTransformer(32, 8, 2, 3, 192, 768, num_classes=4).eval()
    nn.init.normal_(theirs.heads.get_parameter("head.weight"))
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    assert read_weights(tmp_path / "vit.pth").layout == "torchvision"
    loaded = load_classifier(tmp_path / "vit.pth")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded.model(images), theirs(images), rtol=1e-5, atol=1e-5)


# --- the published sizes, key by key and shape by shape


def zeros(shapes: layouts.Shapes) -> Tensors:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def read_shapes(shapes: layouts.Shapes, **hints: Any) -> Any:
    return recognise(File(Path("weights.pth"), "torch", zeros(shapes), {}, {}, {}, []), Hints(**hints))


@pytest.mark.parametrize(
    ("size", "form"),
    [
        ("B", "full"),
        ("B", "hub"),
        ("B", "finetuned"),
        *[pytest.param(s, f, marks=pytest.mark.slow) for s in "LH" for f in ("full", "hub", "finetuned")],
        *[pytest.param(s, f, marks=pytest.mark.slow) for s in "BLH" for f in ("encoder", "detectron2")],
    ],
)
def test_the_published_sizes_are_recognised_by_their_shapes(size: str, form: str) -> None:
    width, depth, heads, patch = layouts.SIZES[size]
    full = layouts.official(width, depth, patch)
    shapes = {
        "full": lambda: full,
        "hub": lambda: layouts.as_hub(full),
        "encoder": lambda: layouts.official(width, depth, patch, decoder=None),
        "finetuned": lambda: layouts.official_finetuned(width, depth, patch),
        "detectron2": lambda: layouts.as_detectron2(full),
    }[form]()
    reading = read_shapes(shapes)
    spec = reading.spec
    usual = {"B": "vit_base_patch16_224", "L": "vit_large_patch16_224", "H": "vit_huge_patch14_224"}[size]
    # ViTDet runs without class token; timm has such a plain ViT under one name, of which all sizes are set
    assert spec["name"] == ("vit_base_patch16_gap_224" if form == "detectron2" else usual)
    assert (spec["embed_dim"], spec["depth"], spec["num_heads"], spec["patch_size"]) == (width, depth, heads, patch)
    assert spec["img_size"] == [224, 224]
    assert reading.kind == {"full": "mae", "hub": "mae", "finetuned": "classifier"}.get(form, "encoder")
    if reading.kind == "mae":
        assert (spec["decoder_dim"], spec["decoder_depth"], spec["decoder_heads"]) == (512, 8, 16)
        trained = sum(value.numel() for name, value in reading.tensors.items())
        assert trained == {"B": 111_907_840, "L": 329_541_888, "H": 657_074_508}[size]


def test_448_pixels_are_read_off_the_positions() -> None:
    reading = read_shapes(layouts.official(192, 1, 14, side=448, decoder=(64, 1)))
    assert reading.spec["img_size"] == [448, 448]


# --- what a file does not say


def test_everything_taken_for_granted_is_said(tmp_path: Path) -> None:
    notes = "; ".join(read_weights(write(tmp_path / "w.pth", layouts.official_of(layouts.small()))).notes)
    for words in ("3 heads", "2 decoder heads", "norm_pixel", "ImageNet", "encoder positions: sin-cos, width first"):
        assert words in notes


def test_an_unusual_width_wants_its_heads(tmp_path: Path) -> None:
    model = layouts.small(embed_dim=96, num_heads=4)
    path = write(tmp_path / "w.pth", layouts.official_of(model))
    error = refusal(path)
    assert error.code == "E-CKPT-HEADS"
    assert "--num-heads" in str(error)
    assert_same(load_model(path, hints=HINTS._replace(num_heads=4)), model)
    assert refusal(path, HINTS._replace(num_heads=5)).code == "E-CKPT-HEADS"


def test_a_grid_that_is_not_square_wants_the_size_of_the_images(tmp_path: Path) -> None:
    model = layouts.small(img_size=(16, 40))
    path = write(tmp_path / "w.pth", layouts.official_of(model))
    error = refusal(path)
    assert error.code == "E-CKPT-SHAPE"
    assert "--source-size" in str(error)
    assert_same(load_model(path, hints=HINTS._replace(img_size=(16, 40))), model)
    for wrong in ((32, 40), (20, 40)):
        assert refusal(path, HINTS._replace(img_size=wrong)).code == "E-CKPT-SHAPE"


def test_a_grid_that_would_be_square_with_the_class_tokens_row_is_not_taken_for_one(tmp_path: Path) -> None:
    model = layouts.small(img_size=(32, 48))  # 4 x 6 and a class token are 25, which is 5 x 5 as well
    path = write(tmp_path / "w.pth", layouts.official_of(model))
    assert "--source-size" in str(refusal(path))
    assert_same(load_model(path, hints=HINTS._replace(img_size=(32, 48))), model)
    path = write(tmp_path / "d.pth", layouts.as_detectron2(layouts.official_of(model)))
    assert "--source-size" in str(refusal(path, Hints()))


@pytest.mark.parametrize(
    ("hints", "name"),
    [(Hints(num_heads=4), "num_heads"), (Hints(decoder_heads=4), "decoder_heads"), (Hints(target="pixel"), "target"),
     (Hints(img_size=(64, 64)), "source_size"), (Hints(model="vit_base_patch16_224"), "model")],
)  # fmt: skip
def test_a_hint_that_the_file_contradicts_is_refused(tmp_path: Path, hints: Hints, name: str) -> None:
    model = layouts.small()
    save_model(model, tmp_path / "ours.safetensors")
    (tmp_path / "hf").mkdir()
    safetensors.torch.save_file(hub(model), tmp_path / "hf" / "model.safetensors")
    config = {"model_type": "vit_mae", "num_attention_heads": 3, "decoder_num_attention_heads": 2,
              "norm_pix_loss": True, "image_size": 32}  # fmt: skip
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    for path in (tmp_path / "ours.safetensors", tmp_path / "hf"):
        if name == "model" and path.name == "hf":
            continue  # transformers says no name of timm's; a wrong one shows in the shapes
        with pytest.raises(MaekitError) as caught:
            load_model(path, hints=hints)
        assert caught.value.code == "E-CONFIG-HINT"
        assert name in str(caught.value)
        assert caught.value.exit_code == 2


@pytest.mark.parametrize(("convention", "words"), [("height", "height first"), ("learned", "learned")])
def test_positions_of_another_convention_are_kept_and_named(tmp_path: Path, convention: str, words: str) -> None:
    tensors = layouts.official_of(layouts.small())
    table = sincos_2d(192, (4, 4), 1)
    other = torch.cat([table[:, 96:], table[:, :96]], 1) if convention == "height" else torch.randn(17, 192)
    tensors["pos_embed"] = other[None]
    reading = read_weights(write(tmp_path / "w.pth", tensors), HINTS)
    assert any(f"encoder positions: {'sin-cos, ' * (convention == 'height')}{words}" in note for note in reading.notes)
    assert torch.equal(reading.tensors["encoder.pos_embed"], other[None])


def test_positions_without_a_row_for_the_class_token_get_one_of_zeros(tmp_path: Path) -> None:
    model = layouts.small()
    tensors = layouts.official_of(model)
    for name in ("pos_embed", "decoder_pos_embed"):
        tensors[name] = tensors[name][:, 1:]
    path = write(tmp_path / "w.pth", tensors)
    assert_same(load_model(path, hints=HINTS), model)
    rows = {row.ours: row for row in read_weights(path, HINTS).rows}
    assert "zeros" in rows["encoder.pos_embed"].note
    assert rows["decoder.pos_embed"].what == "reshaped"


def test_a_decoder_without_its_fixed_table_gets_the_methods(tmp_path: Path) -> None:
    model = layouts.small()
    tensors = layouts.official_of(model)
    del tensors["decoder_pos_embed"]
    path = write(tmp_path / "w.pth", tensors)
    assert_same(load_model(path, hints=HINTS), model)
    assert [row.ours for row in read_weights(path, HINTS).rows if row.what == "created"] == ["decoder.pos_embed"]


# --- refusals


def test_an_unknown_layout_names_the_ten_nearest_keys_and_the_best_guess(tmp_path: Path) -> None:
    resnet = torchvision.models.resnet18().state_dict()
    error = refusal(write(tmp_path / "resnet.pth", resnet))
    assert error.code == "E-CKPT-LAYOUT"
    assert str(error).count(", ") >= 9
    assert "best guess" in str(error)
    tensors = {key.replace("patch_embed", "stem"): value for key, value in layouts.official_of(layouts.small()).items()}
    assert "best guess official" in str(refusal(write(tmp_path / "near.pth", tensors)))


def test_the_first_three_shapes_that_disagree_are_named(tmp_path: Path) -> None:
    tensors = layouts.official_of(layouts.small())
    for name in ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight", "blocks.1.mlp.fc1.bias", "norm.bias"):
        tensors[name] = torch.zeros(5, *tensors[name].shape[1:])
    error = refusal(write(tmp_path / "w.pth", tensors))
    assert error.code == "E-CKPT-SHAPE"
    assert str(error).count("(5") == 3
    assert "and 1 more" in str(error)
    assert "not (768, 192)" in str(error)


@pytest.mark.parametrize("gone", ["blocks.0.norm1.weight", "blocks.0.", "norm.", "decoder_pred."])
def test_what_is_missing_is_named(tmp_path: Path, gone: str) -> None:
    tensors = {n: v for n, v in layouts.official_of(layouts.small()).items() if not n.startswith(gone)}
    assert refusal(write(tmp_path / "w.pth", tensors)).code in ("E-CKPT-KEYS", "E-CKPT-LAYOUT", "E-CKPT-SHAPE")


def test_a_key_without_its_value_is_refused(tmp_path: Path) -> None:
    tensors = hub(layouts.small())
    del tensors["vit.encoder.layer.0.attention.attention.value.weight"]
    error = refusal(write(tmp_path / "w.safetensors", tensors))
    assert error.code == "E-CKPT-KEYS"
    assert "without v" in str(error)


def test_a_fine_tuned_file_is_no_autoencoder_and_the_reverse(tmp_path: Path) -> None:
    model = layouts.small()
    tuned = classifier(model, 7)
    finetuned = write(tmp_path / "finetuned.pth", tuned.state_dict())
    error = refusal(finetuned, Hints())
    assert error.code == "E-CKPT-KIND"
    assert "fine-tuned classifier" in str(error)
    assert_same(load_classifier(finetuned).model, tuned)
    for tensors in (layouts.official_of(model), layouts.official_of(model, decoder=False)):
        with pytest.raises(MaekitError, match="pre-trained") as caught:
            load_classifier(write(tmp_path / "pretrained.pth", tensors))
        assert caught.value.code == "E-CKPT-KIND"


def test_an_encoder_without_decoder_gets_one_drawn_anew_and_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "w.pth", layouts.official_of(layouts.small(), decoder=False))
    with caplog.at_level(logging.INFO, "maekit"):
        load_model(path)
    assert "drawn anew" in caplog.text


def test_integers_are_no_weights(tmp_path: Path) -> None:
    tensors = layouts.official_of(layouts.small())
    tensors["norm.bias"] = torch.zeros(192, dtype=torch.int64)
    assert refusal(write(tmp_path / "w.pth", tensors)).code == "E-CKPT-SHAPE"


@pytest.mark.parametrize(
    "config",
    [
        {"architecture": "../../evil"},
        {"architecture": "resnet50"},
        {"architecture": 5},
        {"model_args": []},
        {"pretrained_cfg": "x", "architecture": "vit_tiny_patch16_224"},
        {"num_attention_heads": -1},
        {"num_attention_heads": "3"},
        {"image_size": [[1]]},
        {"id2label": []},
        {"auto_map": {"AutoModel": "evil.Model"}, "model_type": "vit_mae"},
    ],
    ids=str,
)
def test_a_strange_configuration_ends_in_a_model_or_one_line(tmp_path: Path, config: dict[str, Any]) -> None:
    safetensors.torch.save_file(layouts.official_of(layouts.small()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    try:
        assert_same(load_model(tmp_path, hints=HINTS), layouts.small())
    except MaekitError as error:
        assert error.code.startswith(("E-CKPT-", "E-CONFIG-HINT"))
        assert "\n" not in str(error)
