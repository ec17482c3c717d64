"""Weights written for other libraries: names as there, values bit by bit, the same numbers where a library runs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from maekit.errors import MaekitError
from maekit.interchange import proof
from maekit.interchange.reading import Hints
from maekit.interchange.weights import load_classifier, load_model, metadata, read_weights, save_encoder, save_model
from maekit.model.heads import classifier
from maekit.model.mae import MaskedAutoencoder
from maekit.tasks.convert import convert
from maekit.train import checkpoint

from . import layouts

HINTS = {"num_heads": 3, "decoder_heads": 2}
ENDINGS = {"onnx": ".onnx", "pt2": ".pt2", "official": ".pth", "detectron2": ".pth", "safetensors": ".safetensors"}


def saved(path: Path, kind: str, **changes: Any) -> tuple[Path, MaskedAutoencoder]:
    """Save a small model as a file of ours: "mae", "encoder", or "mean" and "cls" classifiers of three classes."""
    model = layouts.small(**changes)
    if kind == "mae":
        save_model(model, path / "ours.safetensors")
    elif kind == "encoder":
        save_encoder(model, path / "ours.safetensors")
    else:
        torch.manual_seed(1)
        tuned = classifier(model, 3, pool=kind)
        torch.nn.init.normal_(tuned.head.get_parameter("weight"))
        header = metadata(model, classes=["cat", "dog", "owl"], pool=kind)
        tensors = {"model": tuned.state_dict(), "optimizer": {}}
        checkpoint.save(path / "ours.safetensors" / "checkpoints", 1, tensors, {}, metadata=header, keep=1)
    return path / "ours.safetensors", model


def turn(path: Path, kind: str, to: str, **settings: Any) -> tuple[Path, dict[str, Any], MaskedAutoencoder]:
    """Convert a small model; return what was written, the metrics and the model."""
    src, model = saved(path, kind, **settings.pop("model_is", {}))
    dst = path / f"theirs{ENDINGS.get(to, '')}"
    result = convert({"src": src, "dst": dst, "to": to, **settings})
    assert sorted(p.name for p in path.iterdir()) == ["ours.safetensors", dst.name]  # nothing else is left
    return dst, dict(result.metrics), model


def refused(path: Path, kind: str, to: str, **settings: Any) -> MaekitError:
    src, _ = saved(path, kind, **settings.pop("model_is", {}))
    with pytest.raises(MaekitError) as caught:
        convert({"src": src, "dst": path / f"theirs{ENDINGS.get(to, '')}", "to": to, **settings})
    assert [p.name for p in path.iterdir()] == ["ours.safetensors"]
    assert "\n" not in str(caught.value)
    return caught.value


# --- names and values, against names written out in layouts.py


def tensors_of(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        return safetensors.torch.load_file(path / "model.safetensors")
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    return torch.load(path, weights_only=True)["model"]


def assert_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


def test_official_files_have_the_authors_names_decoder_included(tmp_path: Path) -> None:
    dst, metrics, model = turn(tmp_path, "mae", "official")
    assert_tensors(tensors_of(dst), layouts.official_of(model))
    assert metrics["not_held"] == ["number of heads", "mean and deviation"]
    again = read_weights(dst, Hints(decoder_heads=2))
    assert again.spec["target"] == model.target == "norm_pixel"
    assert not any("target" in note for note in again.notes)


def test_transformers_folders_have_the_names_of_the_hub(tmp_path: Path) -> None:
    dst, metrics, model = turn(tmp_path, "mae", "transformers")
    assert_tensors(tensors_of(dst), layouts.as_hub(layouts.official_of(model)))
    config = json.loads((dst / "config.json").read_text())
    assert config["architectures"] == ["ViTMAEForPreTraining"]
    assert (config["layer_norm_eps"], config["norm_pix_loss"]) == (1e-6, True)
    assert metrics["not_held"] == []


def test_timm_folders_hold_the_encoder_and_say_what_of_the_decoder_is_left_out(tmp_path: Path) -> None:
    dst, metrics, model = turn(tmp_path, "mae", "timm")
    assert_tensors(tensors_of(dst), layouts.official_of(model, decoder=False))
    left = {row["ours"] for row in metrics["wrote"] if row["what"] == "left out"}
    assert left == {f"decoder.{name}" for name in model.decoder.state_dict()}


def test_detectron2_files_hold_what_vitdet_has(tmp_path: Path) -> None:
    dst, metrics, model = turn(tmp_path, "mae", "detectron2")
    assert_tensors(tensors_of(dst), layouts.as_detectron2(layouts.official_of(model)))
    assert "did not run" in metrics["proof"]["how"]


@pytest.mark.parametrize("kind", ["mae", "encoder", "mean", "cls"])
@pytest.mark.parametrize("to", ["official", "timm", "transformers", "detectron2", "safetensors"])
def test_there_and_back_again_is_bit_identical_or_the_list_says_what_is_missing(
    tmp_path: Path, kind: str, to: str
) -> None:
    if (kind, to) == ("mean", "transformers"):
        assert "class token" in str(refused(tmp_path, kind, to))
        return
    dst, metrics, _ = turn(tmp_path, kind, to)
    before = read_weights(tmp_path / "ours.safetensors")
    whole = kind == "mae" and to not in ("timm", "detectron2")
    after = read_weights(dst, Hints(decoder_heads=2 if whole else None))
    lost = {row["ours"] for row in metrics["wrote"] if row["what"] == "left out"}
    made = {row.ours for row in after.rows if row.what == "created"}
    back = {name: value for name, value in after.whole().items() if name not in made}
    if to == "detectron2":  # which has no class token, nor a place for it
        lost |= {"encoder.cls_token"}
        assert torch.equal(back.pop("encoder.pos_embed"), before.whole()["encoder.pos_embed"][:, 1:])
        lost |= {"encoder.pos_embed"}
    assert back.keys() == before.whole().keys() - lost
    assert not [name for name in back if not torch.equal(back[name], before.whole()[name])]
    if to in ("official", "transformers", "safetensors"):
        assert not lost and not made
        assert after.kind == before.kind
    if to in ("timm", "transformers", "safetensors"):
        assert (after.spec["mean"], after.spec["std"]) == (before.spec["mean"], before.spec["std"])
        assert after.classes == before.classes
        assert after.pool == before.pool


# --- the libraries run what was written


@torch.no_grad()
def test_timm_loads_folder_and_file_both_ways(tmp_path: Path) -> None:
    dst, metrics, model = turn(tmp_path, "mae", "timm")
    images = torch.randn(2, 3, 32, 32)
    expected = model.features(images, "tokens")
    overlay = {"file": str(dst / "model.safetensors")}
    shape: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 0}
    for theirs in (
        timm.create_model(f"local-dir:{dst}", pretrained=True),
        timm.create_model("vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, **shape),
    ):
        assert isinstance(theirs, VisionTransformer)
        assert torch.equal(theirs.eval().forward_features(images), expected)
    assert metrics["proof"]["difference"] == 0
    assert metrics["proof"]["how"].startswith(f"timm {timm.__version__}: all tokens")


@pytest.mark.parametrize("kind", ["mae", "encoder", "cls"])
def test_transformers_ran_what_was_written_and_agreed(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("transformers")
    _, metrics, _ = turn(tmp_path, kind, "transformers")
    assert 0 <= metrics["proof"]["difference"] <= 1e-5
    outputs = {"mae": "prediction, loss, mask and order", "encoder": "all tokens", "cls": "logits"}[kind]
    assert outputs in metrics["proof"]["how"]


def test_the_image_processor_cuts_and_normalises_as_our_evaluation(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    from maekit.data.augment import EvalView, default_crop_pct

    dst, _, model = turn(tmp_path, "mae", "transformers")
    generator = np.random.default_rng(0)
    photo = Image.fromarray(generator.integers(0, 256, (12, 16, 3), np.uint8)).resize(
        (90, 70), Image.Resampling.BICUBIC
    )
    theirs = transformers.AutoImageProcessor.from_pretrained(dst)(photo, return_tensors="pt")["pixel_values"][0]
    seen = EvalView((32, 32), default_crop_pct((32, 32)))(pil_to_tensor(photo)).float() / 255
    mean, std = (torch.tensor(value)[:, None, None] for value in (model.mean, model.std))
    assert theirs.shape == (3, 32, 32)
    assert float((theirs - (seen - mean) / std).abs().mean()) < 0.02  # of two resizing routines on 8-bit levels


def test_where_the_library_is_missing_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    _, metrics, _ = turn(tmp_path, "mae", "transformers")
    assert metrics["proof"]["how"] == (
        "50 tensors read back bit by bit; transformers is not installed, so it did not run there"
    )


def test_a_conversion_that_computes_otherwise_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "TOLERANCE", -1.0)
    error = refused(tmp_path, "mae", "timm")
    assert error.code == "E-CKPT-PARITY"
    assert "nothing was written" in str(error)


@pytest.mark.parametrize(
    ("kind", "to", "settings", "outputs"),
    [
        ("mae", "onnx", {"pool": "tokens", "dynamic_size": True}, ["features"]),
        ("mae", "onnx", {"what": "autoencoder", "mask_ratio": 0.5}, ["loss", "pred", "mask", "ids_restore", "latent"]),
        ("mean", "onnx", {}, ["logits"]),
        ("encoder", "pt2", {"pool": "cls"}, ["features"]),
    ],
)
def test_graphs_prove_themselves(
    tmp_path: Path, kind: str, to: str, settings: dict[str, Any], outputs: list[str]
) -> None:
    _, metrics, _ = turn(tmp_path, kind, to, **settings)
    assert [row["theirs"].split()[1] for row in metrics["wrote"] if row["theirs"].startswith("output")] == outputs
    assert metrics["proof"]["difference"] <= metrics["proof"]["tolerance"] == 1e-4
    assert any("any multiple of 8 pixels" in note for note in metrics["notes"]) == ("dynamic_size" in settings)


# --- what cannot be held is refused


@pytest.mark.parametrize(
    ("to", "model_is", "words"),
    [
        ("official", {"name": "vit_small_patch14_reg4_dinov2"}, "ls1.gamma"),
        ("transformers", {"name": "vit_base_patch16_gap_224", "embed_dim": 192, "num_heads": 3}, "cls_token"),
        ("detectron2", {"name": "vit_base_patch16_gap_224", "embed_dim": 192, "num_heads": 3}, "cls_token"),
        ("transformers", {"img_size": (32, 48)}, "square"),
    ],
)
def test_what_a_layout_has_no_place_for_is_refused(
    tmp_path: Path, to: str, model_is: dict[str, Any], words: str
) -> None:
    error = refused(tmp_path, "mae", to, model_is=model_is)
    assert error.code == "E-CKPT-LAYOUT"
    assert words in str(error)
    assert "--to timm" in str(error)


@pytest.mark.parametrize("model_is", [{"name": "vit_small_patch14_reg4_dinov2"}, {"name": "vit_base_patch16_gap_224"},
                                      {"in_chans": 5}, {"img_size": (32, 48)}], ids=str)  # fmt: skip
def test_timm_holds_registers_no_class_token_channels_and_any_size(tmp_path: Path, model_is: dict[str, Any]) -> None:
    dst, metrics, model = turn(tmp_path, "encoder", "timm", model_is=model_is)
    assert metrics["proof"]["difference"] == 0
    for name, value in load_model(dst).encoder.state_dict().items():
        assert torch.equal(value, model.encoder.state_dict()[name]), name


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    src, _ = saved(tmp_path, "mae")
    for to in ("official", "detectron2", "safetensors", "timm", "transformers"):
        program = (
            "import resource, signal, sys; from maekit.cli import main\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
            f"sys.exit(main(['convert', {str(src)!r}, 'theirs{ENDINGS.get(to, '')}', '--to', {to!r}]))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 5, done.stderr
        assert "E-ENV-" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert [p.name for p in tmp_path.iterdir()] == ["ours.safetensors"]


def test_nothing_that_exists_is_replaced(tmp_path: Path) -> None:
    src, _ = saved(tmp_path, "mae")
    for to, name in (("timm", "folder"), ("official", "file.pth")):
        (tmp_path / name).touch()
        with pytest.raises(MaekitError, match="it exists"):
            convert({"src": src, "dst": tmp_path / name, "to": to})
        assert (tmp_path / name).read_bytes() == b""
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(MaekitError, match="README"):
        convert({"src": src, "dst": tmp_path / "new.pth", "to": "official", "licence": "mit"})
    assert (tmp_path / "README.md").read_text() == "mine"
    assert not (tmp_path / "new.pth").exists()
    with pytest.raises(MaekitError) as caught:
        convert({"src": src, "dst": tmp_path / ("n" * 300), "to": "timm"})
    assert caught.value.code == "E-ENV-OUT"


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"dst": None}, "E-USAGE-CONVERT"),
        ({"to": None}, "E-USAGE-CONVERT"),
        ({"to": "official", "dst": Path("a.safetensors")}, "E-USAGE-OUT"),
        ({"to": "timm", "pool": "mean"}, "E-USAGE-CONVERT"),
        ({"to": "timm", "dynamic_size": False}, "E-USAGE-CONVERT"),
        ({"to": "onnx", "dst": Path("a.onnx"), "mask_ratio": 0.5}, "E-USAGE-CONVERT"),
        ({"to": "onnx", "dst": Path("a.onnx"), "what": "autoencoder", "pool": "mean"}, "E-USAGE-CONVERT"),
        ({"src": Path("absent")}, "E-CKPT-MISSING"),
        ({"licence": " "}, "E-CONFIG-LICENCE"),
        ({"channel_matrix": Path("absent.json")}, "E-CONFIG-CHANNELS"),
    ],
)
def test_what_does_not_go_together_is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], code: str
) -> None:
    monkeypatch.chdir(tmp_path)
    src, _ = saved(tmp_path, "mae")
    with pytest.raises(MaekitError) as caught:
        convert({"src": src, "dst": Path("out"), "to": "timm", **settings})
    assert caught.value.code == code
    assert [p.name for p in tmp_path.iterdir()] == ["ours.safetensors"]


def test_the_encoder_alone_on_request(tmp_path: Path) -> None:
    dst, metrics, model = turn(tmp_path, "mae", "transformers", encoder_only=True)
    assert json.loads((dst / "config.json").read_text())["architectures"] == ["ViTMAEModel"]
    left = {row["ours"] for row in metrics["read"] if row["what"] == "left out"}
    assert left == {f"decoder.{name}" for name in model.decoder.state_dict()}


# --- a user's path: saved here, loaded by a program that cannot import maekit

TIMM_ONLY = """
import timm, torch
model = timm.create_model("local-dir:theirs", pretrained=True).eval()
images = torch.from_numpy(np.load("images.npy"))
with torch.no_grad():
    np.save("found.npy", model.forward_features(images).numpy())
"""
TRANSFORMERS_ONLY = """
import torch, transformers
model = transformers.ViTMAEModel.from_pretrained("theirs", mask_ratio=0.0).eval()
images = torch.from_numpy(np.load("images.npy"))
noise = torch.arange(16).expand(len(images), -1) / 16
with torch.no_grad():
    np.save("found.npy", model(images, noise=noise).last_hidden_state.numpy())
"""
CLASSIFIER_ONLY = """
import torch, transformers
model = transformers.ViTForImageClassification.from_pretrained("theirs").eval()
assert model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}, model.config.id2label
with torch.no_grad():
    np.save("found.npy", model(torch.from_numpy(np.load("images.npy"))).logits.numpy())
"""


def alone(path: Path, program: str, images: Tensor, *, without: tuple[str, ...]) -> Tensor:
    """Run a program in which some packages cannot be imported; it reads images.npy and writes found.npy."""
    np.save(path / "images.npy", images.numpy())
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in ("maekit", *without))
    text = f"import sys\n{blocked}import numpy as np\n{program}"
    done = subprocess.run([sys.executable, "-c", text], cwd=path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return torch.from_numpy(np.load(path / "found.npy"))


def test_a_program_with_only_timm_gets_the_same_features(tmp_path: Path) -> None:
    _, _, model = turn(tmp_path, "mae", "timm")
    images = torch.randn(2, 3, 32, 32)
    found = alone(tmp_path, TIMM_ONLY, images, without=("transformers", "onnxruntime"))
    with torch.no_grad():
        torch.testing.assert_close(found, model.features(images, "tokens"), rtol=1e-5, atol=1e-5)


def test_a_program_with_only_transformers_gets_the_same_features(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    _, _, model = turn(tmp_path, "mae", "transformers")
    images = torch.randn(2, 3, 32, 32)
    found = alone(tmp_path, TRANSFORMERS_ONLY, images, without=("timm", "onnxruntime"))
    with torch.no_grad():
        torch.testing.assert_close(found, model.features(images, "tokens"), rtol=1e-5, atol=1e-5)


def test_a_program_with_only_transformers_gets_the_same_classes(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    src, _ = saved(tmp_path, "cls")
    convert({"src": src, "dst": tmp_path / "theirs", "to": "transformers"})
    images = torch.randn(2, 3, 32, 32)
    found = alone(tmp_path, CLASSIFIER_ONLY, images, without=("timm", "onnxruntime"))
    with torch.no_grad():
        torch.testing.assert_close(found, load_classifier(src).model(images), rtol=1e-5, atol=1e-5)
