"""Exported files run without maekit, give the model's numbers at any batch and size, and are whole or not there."""

import json
import os
import resource
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from maekit.errors import MaekitError
from maekit.interchange import export
from maekit.interchange.export import Exported, export_onnx, export_pt2
from maekit.interchange.weights import Classifier, load_classifier, metadata
from maekit.model.heads import classifier
from maekit.model.mae import MaskedAutoencoder, at_size, create_model
from maekit.train import checkpoint

SIZES: dict[str, Any] = {
    "name": "vit_tiny_patch16_224",
    "img_size": (24, 40),
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "decoder_dim": 24,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "mean": (0.1, 0.2, 0.3),
    "std": (0.4, 0.5, 0.6),
}
WITHOUT_CLASS_TOKEN = "vit_medium_patch16_reg4_gap_256"
TOLERANCE = 1e-4
"""Largest absolute difference that is promised; 1e-6 was measured, with ViT-B at 224 as well."""

Export = Callable[..., Exported]
FORMATS = pytest.mark.parametrize(("write", "end"), [(export_onnx, "onnx"), (export_pt2, "pt2")], ids=["onnx", "pt2"])


def small(**changes: Any) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return create_model(**{**SIZES, **changes}).eval()


def fine_tuned(folder: Path, pool: str) -> Classifier:
    """Return what `load_classifier` finds in a run whose head is not nearly zero."""
    origin = small()
    model = classifier(origin, 3, pool=pool)
    assert isinstance(model.head, torch.nn.Linear)
    torch.nn.init.normal_(model.head.weight)
    header = metadata(origin, classes=["a", "b", "ü"], pool=pool)
    checkpoint.save(folder / "checkpoints", 1, {"model": model.state_dict()}, {}, metadata=header, keep=1)
    return load_classifier(folder)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def run(file: Path, *inputs: Tensor) -> list[Tensor]:
    """Run a file with the library that it is for."""
    with torch.no_grad():
        if file.suffix == ".pt2":
            given = torch.export.load(file).module()(*inputs)
            return [given] if isinstance(given, Tensor) else list(given)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]
        given = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
        return [torch.as_tensor(value) for value in given]


def features(model: MaskedAutoencoder, images: Tensor, pool: str) -> Tensor:
    with torch.no_grad():
        return model.features(images, pool)


class Made(NamedTuple):
    """A file that several tests only read."""

    model: MaskedAutoencoder
    file: Path
    written: Exported


@pytest.fixture(scope="module")
def any_size(tmp_path_factory: pytest.TempPathFactory) -> Made:
    file = tmp_path_factory.mktemp("any_size") / "m.onnx"
    return Made(small(), file, export_onnx(small(), file, pool="tokens", dynamic_size=True))


@pytest.fixture(scope="module", params=[(export_onnx, "onnx"), (export_pt2, "pt2")], ids=["onnx", "pt2"])
def autoencoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    write, end = request.param
    file = tmp_path_factory.mktemp("autoencoder") / f"m.{end}"
    return Made(small(), file, write(small(), file, what="autoencoder", mask_ratio=0.6))


# --- the numbers


@FORMATS
@pytest.mark.parametrize("pool", ["mean", "cls", "tokens"])
def test_an_encoder_gives_the_models_features_at_batches_that_were_not_recorded(
    tmp_path: Path, write: Export, end: str, pool: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model, file = small(), tmp_path / "new" / "folder" / f"m.{end}"
    written = write(model, file, pool=pool)
    assert capfd.readouterr() == ("", "")  # torch and onnx like to talk
    for batch in (1, 5):
        images = draw(batch, 3, 24, 40)
        assert_close(run(file, images), [features(model, images, pool)])
    assert written.path == file
    assert written.inputs == {"images": "(batch, 3, 24, 40) float32"}
    shape = "(batch, 16, 32)" if pool == "tokens" else "(batch, 32)"
    assert written.outputs == {"features": f"{shape} float32"}
    assert 0 <= written.differences["features"] < 1e-5
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    ("write", "end", "changes"),
    [
        (export_onnx, "onnx", {}),
        (export_pt2, "pt2", {}),
        (export_onnx, "onnx", {"name": WITHOUT_CLASS_TOKEN, "in_chans": 1, "mean": (0.5,), "std": (0.25,)}),
    ],
    ids=["onnx", "pt2", "onnx, registers and no class token"],
)
def test_an_encoder_of_any_size_equals_the_model_rebuilt_at_that_size(
    tmp_path: Path, write: Export, end: str, changes: dict[str, Any]
) -> None:
    model, file = small(**changes), tmp_path / f"m.{end}"
    channels = model.encoder.in_chans
    written = write(model, file, pool="tokens", dynamic_size=True)
    assert written.inputs == {"images": f"(batch, {channels}, height, width) float32"}
    assert written.outputs == {"features": "(batch, tokens, 32) float32"}
    for batch, size in ((1, (24, 40)), (2, (16, 16)), (3, (56, 24)), (1, (40, 88))):
        images = draw(batch, channels, *size)
        expected = features(at_size(model, size), images, "tokens")
        assert_close(run(file, images), [expected])


def test_an_autoencoder_answers_noise_with_the_same_mask_loss_and_prediction(autoencoder: Made) -> None:
    model, file, written = autoencoder
    assert written.inputs == {"images": "(batch, 3, 24, 40) float32", "noise": "(batch, 15) float32"}
    assert list(written.outputs) == ["loss", "pred", "mask", "ids_restore", "latent"]
    assert written.outputs["mask"] == "(batch, 15) bool"
    assert written.differences["mask"] == written.differences["ids_restore"] == 0
    for batch in (1, 4):
        images = draw(batch, 3, 24, 40)
        tied = torch.zeros(batch, 15)  # only the places decide
        for noise in (torch.rand(batch, 15, generator=torch.Generator().manual_seed(batch)), tied):
            with torch.no_grad():
                expected = model(images, 0.6, noise=noise)
            loss, pred, mask, ids_restore, latent = run(file, images, noise)
            assert torch.equal(mask, expected.mask)
            assert torch.equal(ids_restore, expected.ids_restore)
            assert_close([loss, pred, latent], [expected.loss, expected.pred, expected.latent])


@FORMATS
@pytest.mark.parametrize(("pool", "dynamic_size"), [("mean", True), ("cls", False)])
def test_a_classifier_gives_its_logits_and_names_its_classes(
    tmp_path: Path, write: Export, end: str, pool: str, dynamic_size: bool
) -> None:
    found, file = fine_tuned(tmp_path / "run", pool), tmp_path / f"m.{end}"
    written = write(found.model, file, dynamic_size=dynamic_size, spec=found.spec, classes=found.classes)
    assert written.outputs == {"logits": "(batch, 3) float32"}
    images = draw(4, 3, 24, 40)
    with torch.no_grad():
        assert_close(run(file, images), [found.model(images)])
    facts = said(file)
    assert facts["maekit.what"] == "classifier"
    assert facts["maekit.pool"] == pool
    assert json.loads(facts["maekit.classes"]) == ["a", "b", "ü"]
    if dynamic_size:
        assert run(file, draw(2, 3, 48, 32))[0].shape == (2, 3)


def test_a_model_in_training_and_half_precision_is_exported_in_eval_mode_and_float32_and_stays_as_it_was(
    tmp_path: Path,
) -> None:
    model = small(drop_path=0.5).to(torch.bfloat16).train()
    model.encoder.set_grad_checkpointing()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_pt2(model, tmp_path / "m.pt2", dynamic_size=True)
    assert model.training and model.encoder.training and model.encoder.grad_checkpointing
    assert model.encoder.patch_embed.strict_img_size
    after = model.state_dict()
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())
    images = draw(1, 3, 24, 40)
    expected = features(model.float().eval(), images, "mean")
    assert_close(run(tmp_path / "m.pt2", images), [expected])


# --- the file


def said(file: Path) -> dict[str, str]:
    """Return what a file says about itself."""
    if file.suffix == ".onnx":
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return session.get_modelmeta().custom_metadata_map
    extra = {export.FACTS: ""}
    torch.export.load(file, extra_files=extra)
    return json.loads(extra[export.FACTS])


def test_a_file_says_how_images_are_prepared_and_which_model_it_is(autoencoder: Made) -> None:
    facts = said(autoencoder.file)
    assert facts["maekit.what"] == "autoencoder"
    assert json.loads(facts["maekit.mean"]) == [0.1, 0.2, 0.3]
    assert json.loads(facts["maekit.std"]) == [0.4, 0.5, 0.6]
    assert json.loads(facts["maekit.patch"]) == 8
    assert json.loads(facts["maekit.any_size"]) is False
    assert json.loads(facts["maekit.mask_ratio"]) == 0.6
    assert "the 6 lowest stay" in facts["maekit.noise"]
    assert create_model(**json.loads(facts["maekit.spec"])).grid == (3, 5)


def test_an_onnx_file_is_sound_and_names_what_is_open(any_size: Made) -> None:
    model = onnx.load(any_size.file)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", export.OPSET)]
    sides = [side.dim_param or side.dim_value for side in model.graph.input[0].type.tensor_type.shape.dim]
    assert sides == ["batch", 3, "height", "width"]


def test_a_file_names_no_place_on_the_machine_that_wrote_it(autoencoder: Made) -> None:
    parts = [autoencoder.file.read_bytes()]
    if autoencoder.file.suffix == ".pt2":
        with zipfile.ZipFile(autoencoder.file) as archive:
            parts += [archive.read(name) for name in archive.namelist()]
    places = {os.getcwd(), tempfile.gettempdir(), str(Path.home()), sys.prefix, str(Path(export.__file__).parent)}
    for word in (*places, "site-packages", ".py"):
        assert not any(word.encode() in part for part in parts), word


def test_weights_too_large_for_one_file_lie_beside_it_and_travel_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "LARGEST_IN_ONE_FILE", 10_000)
    model = small(depth=1)
    export_onnx(model, tmp_path / "m.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert (tmp_path / "m.onnx.data").stat().st_size > (tmp_path / "m.onnx").stat().st_size
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("m.onnx", "m.onnx.data"):
        (tmp_path / name).rename(elsewhere / name)
    images = draw(3, 3, 24, 40)
    found = run(elsewhere / "m.onnx", images)
    assert_close(found, [features(model, images, "mean")])
    (tmp_path / "m.onnx.data").write_text("of another model")
    with pytest.raises(MaekitError, match=r"E-ENV-OUT.*m\.onnx\.data: found it exists"):
        export_onnx(model, tmp_path / "m.onnx")


# --- whoever has only the file

STRANGER = """
import json, sys
for name in ("maekit", "torch", "timm", "torchvision", "onnx", "onnxscript", "onnx_ir"):
    sys.modules[name] = None  # import fails
import numpy as np
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
about = session.get_modelmeta().custom_metadata_map
mean, std = (np.array(json.loads(about["maekit." + name]), np.float32)[:, None, None] for name in ("mean", "std"))
images = (np.load(sys.argv[2]).astype(np.float32) / 255 - mean) / std
np.save(sys.argv[3], session.run(["features"], {"images": images})[0])
assert not {"maekit", "torch", "timm"} & {name for name, module in sys.modules.items() if module}
"""


def test_someone_with_onnxruntime_and_numpy_alone_gets_the_same_features(tmp_path: Path, any_size: Made) -> None:
    pixels = torch.randint(0, 256, (3, 3, 48, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    pixels_file, features_file = tmp_path / "pixels.npy", tmp_path / "features.npy"
    np.save(pixels_file, pixels.numpy())
    words = [sys.executable, "-I", "-c", STRANGER, str(any_size.file), str(pixels_file), str(features_file)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = any_size.model
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.mean, model.std))
    expected = features(at_size(model, (48, 32)), (pixels.float() / 255 - mean) / std, "tokens")
    assert_close([torch.from_numpy(np.load(features_file))], [expected])


def test_someone_with_torch_alone_runs_a_pt2_file(tmp_path: Path) -> None:
    model, file, images = small(), tmp_path / "m.pt2", draw(3, 3, 24, 40)
    export_pt2(model, file)
    np.save(tmp_path / "images.npy", images.numpy())
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('maekit', 'timm', 'torchvision', 'onnx')))\n"  # imports fail
        "import numpy as np, torch\n"
        "images = torch.from_numpy(np.load(sys.argv[2]))\n"
        "np.save(sys.argv[3], torch.export.load(sys.argv[1]).module()(images).detach().numpy())\n"
    )
    words = [str(file), str(tmp_path / "images.npy"), str(tmp_path / "features.npy")]
    done = subprocess.run([sys.executable, "-I", "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.from_numpy(np.load(tmp_path / "features.npy"))
    assert_close([found], [features(model, images, "mean")])


def test_a_missing_package_is_named_with_what_brings_it(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from maekit.errors import MaekitError\n"
        "from maekit.interchange.export import export_onnx\n"
        "from maekit.model.mae import create_model\n"
        f"model = create_model(**{SIZES!r})\n"
        "for name in ('onnxruntime', 'onnxscript', 'onnx'):\n"
        "    sys.modules[name] = None\n"  # import fails
        "    try: export_onnx(model, sys.argv[1])\n"
        "    except MaekitError as error: print(error)\n"
        "    del sys.modules[name]\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.onnx")], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    for line, package in zip(lines, ("onnxruntime", "onnxscript", "onnx"), strict=True):
        assert line.startswith(f"error[E-ENV-IMPORT]: ONNX export: found no package {package}, expected onnx")
        assert "maekit[export]" in line
    assert not list(tmp_path.iterdir())


# --- refusals


def refusal(folder: Path, write: Export, end: str, model: MaskedAutoencoder | VisionTransformer, **options: Any) -> str:
    """Return the error's text; nothing may be left on the disk."""
    with pytest.raises(MaekitError) as caught:
        write(model, folder / f"m.{end}", **options)
    assert "\n" not in str(caught.value)
    assert not list(folder.iterdir())
    return str(caught.value)


@FORMATS
def test_what_cannot_be_exported_is_refused_before_anything_is_recorded(
    tmp_path: Path, write: Export, end: str
) -> None:
    model, folder = small(), tmp_path / "out"
    found = fine_tuned(tmp_path / "run", "mean")
    folder.mkdir()
    about: dict[str, Any] = {"spec": found.spec, "classes": found.classes}
    for expected, subject, options in (
        ("E-CONFIG-EXPORT.*found decoder, expected encoder | autoencoder", model, {"what": "decoder"}),
        ("E-CONFIG-EXPORT.*any image size", model, {"what": "autoencoder", "dynamic_size": True}),
        ("E-CONFIG-POOL.*expected mean | cls | tokens", model, {"pool": "max"}),
        ("E-CONFIG-POOL.*without class token", small(name=WITHOUT_CLASS_TOKEN), {"pool": "cls"}),
        ("E-CONFIG-MASK.*1.0 of 15 patches", model, {"what": "autoencoder", "mask_ratio": 1.0}),
        ("E-CONFIG-EXPORT.*1 x 3 patches", small(img_size=(8, 24)), {"dynamic_size": True}),
        ("E-CONFIG-EXPORT.*classifier as autoencoder", found.model, {"what": "autoencoder", **about}),
        ("E-CONFIG-EXPORT.*without spec or head", found.model, {}),
        ("E-CONFIG-EXPORT.*found 2 classes, expected 3", found.model, {**about, "classes": ["a", "b"]}),
    ):
        code, _, words = expected.partition(".*")
        text = refusal(folder, write, end, subject, **options)
        assert text.startswith(f"error[{code}]") and words in text, text


@FORMATS
def test_a_file_that_gives_other_numbers_than_its_model_is_not_written(tmp_path: Path, write: Export, end: str) -> None:
    model = small(depth=1)
    with torch.no_grad():
        model.encoder.norm.get_parameter("bias")[3] = float("nan")  # equals nothing, itself included
    text = refusal(tmp_path, write, end, model)
    assert text.startswith("error[E-CKPT-PARITY]")
    assert "was not written" in text and "inf" in text


def test_the_difference_that_was_measured_is_what_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "TOLERANCE", 1e-9)  # float32 in another order cannot keep this
    assert "E-CKPT-PARITY" in refusal(tmp_path, export_onnx, "onnx", small(depth=1))


@FORMATS
def test_nothing_that_exists_is_replaced(tmp_path: Path, write: Export, end: str) -> None:
    (tmp_path / f"file.{end}").write_text("mine")
    (tmp_path / f"folder.{end}").mkdir()
    (tmp_path / f"link.{end}").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.iterdir())
    for path in (*before, Path()):
        with pytest.raises(MaekitError, match=r"E-ENV-OUT.*found it exists, expected a new name: nothing is replaced"):
            write(small(), path)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / f"file.{end}").read_text() == "mine"


@FORMATS
def test_a_place_that_cannot_be_written_and_a_full_disk_are_one_line_each(
    tmp_path: Path, write: Export, end: str
) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(MaekitError, match=r"E-ENV-OUT.*Not a directory"):
        write(small(), tmp_path / "file" / f"m.{end}")
    (tmp_path / "file").unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))  # stands for a disk with no more room than this
    try:
        text = refusal(tmp_path, write, end, small(depth=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert text.startswith("error[E-ENV-OUT]: cannot write")
    assert "File too large" in text


# --- real sizes


@pytest.mark.slow
@FORMATS
def test_vit_base_at_224_keeps_the_tolerance(tmp_path: Path, write: Export, end: str) -> None:
    torch.manual_seed(0)
    model = create_model().eval()
    for name, options in (
        ("encoder", {"pool": "tokens", "dynamic_size": True}),
        ("autoencoder", {"what": "autoencoder"}),
    ):
        written = write(model, tmp_path / f"{name}.{end}", **options)
        assert max(written.differences.values()) < 1e-5, written.differences
    images, noise = draw(1, 3, 224, 224), torch.rand(1, 196, generator=torch.Generator().manual_seed(0))
    found = run(tmp_path / f"encoder.{end}", images)
    assert_close(found, [features(model, images, "tokens")])
    with torch.no_grad():
        expected = model(images, noise=noise)
    assert_close(run(tmp_path / f"autoencoder.{end}", images, noise), list(expected))
