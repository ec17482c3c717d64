"""Files of targets: what was written is what is read, and nothing else passes."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from maekit.errors import MaekitError
from maekit.interchange.targets import load_target, save_target
from maekit.model.pca import fit_pca
from maekit.model.tokenizer import DalleEncoder, VQTokenizer


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PCA of random patches of 2 x 2 pixels, 3 channels."""
    rows = torch.randn(200, 12, generator=torch.Generator().manual_seed(0))
    pca = fit_pca([rows], 5, patch=2, channels=3).pca
    path = tmp_path_factory.mktemp("targets") / "target.safetensors"
    save_target(path, pca, pca.spec, "pca", mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3), fingerprint="f" * 64)
    return path


def changed(file: Path, to: Path, header: dict[str, Any] | None = None, **tensors: torch.Tensor) -> Path:
    """Write the file anew with parts of its header and tensors replaced."""
    with safetensors.safe_open(file, framework="pt") as opened:
        said = json.loads(opened.metadata()["maekit"]) | (header or {})
    values = safetensors.torch.load_file(file) | tensors
    safetensors.torch.save_file(values, to / "target.safetensors", {"maekit": json.dumps(said)})
    return to / "target.safetensors"


def test_what_was_written_is_read_from_the_file_and_from_its_folder(file: Path) -> None:
    for path in (file, file.parent):
        target = load_target(path)
        assert (target.kind, target.name) == ("pca", "pca")
        assert target.spec == {"components": 5, "values": 12, "patch": 2, "channels": 3}
        assert target.mean == (0.4, 0.5, 0.6) and target.std == (0.2, 0.2, 0.3) and target.fingerprint == "f" * 64
        tensors = safetensors.torch.load_file(file)
        assert all(torch.equal(value, tensors[name]) for name, value in target.module().state_dict().items())


def test_nothing_else_passes(file: Path, tmp_path: Path) -> None:
    spec = {"components": 5, "values": 12, "patch": 2, "channels": 3}
    nan = torch.full((12,), float("nan"))
    cases = [
        ({"format": 99}, {}, "E-CKPT-FORMAT", "a newer maekit"),
        ({"kind": "mae"}, {}, "E-CKPT-FORMAT", "kind"),
        ({"spec": spec | {"components": 6}}, {}, "E-CKPT-SHAPE", r"components \(5, 12\)"),
        ({"spec": spec | {"components": 13}}, {}, "E-CKPT-FORMAT", "13 of 12 values"),
        ({"spec": spec | {"channels": 10**9}}, {}, "E-CKPT-FORMAT", "channels"),
        ({"spec": {"components": 5}}, {}, "E-CKPT-FORMAT", "values"),
        ({"std": [0.2, 0.0, 0.1]}, {}, "E-CKPT-FORMAT", "deviation"),
        ({"mean": [0.2]}, {}, "E-CKPT-FORMAT", "deviation"),
        ({"surprise": 1}, {}, "E-CKPT-FORMAT", "surprise"),
        ({}, {"mean": torch.zeros(12)}, "E-CKPT-DAMAGED", "SHA-256"),
        ({"sha256": None}, {"mean": nan}, "E-CKPT-FORMAT", "sha256"),
    ]
    for header, tensors, code, told in cases:
        with pytest.raises(MaekitError, match=told) as caught:
            load_target(changed(file, tmp_path, header, **tensors))
        assert caught.value.code == code, caught.value


def test_values_that_are_no_numbers_are_named(file: Path, tmp_path: Path) -> None:
    target = load_target(file)
    module = target.module()
    module.get_buffer("mean")[3] = float("inf")
    save_target(tmp_path / "t", module, target.spec, "pca", mean=target.mean, std=target.std, fingerprint="")
    with pytest.raises(MaekitError, match="NaN or infinity in mean") as caught:
        load_target(tmp_path / "t")
    assert caught.value.code == "E-CKPT-NAN"


def test_other_files_are_refused_with_what_they_should_be(tmp_path: Path) -> None:
    (tmp_path / "dvae.pkl").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "text.safetensors").write_text("this is no such file" * 9)
    safetensors.torch.save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("format: 1\n")
    for name, code, told in (
        ("nowhere", "E-CKPT-MISSING", "maekit pca"),
        ("run", "E-CKPT-MISSING", "goes on"),
        ("dvae.pkl", "E-CKPT-FORMAT", "pickles are never read"),
        ("text.safetensors", "E-CKPT-FORMAT", "safetensors"),
        ("other.safetensors", "E-CKPT-FORMAT", "no metadata of a target"),
        ("x" * 300, "E-CKPT-MISSING", "no target"),
    ):
        with pytest.raises(MaekitError, match=told) as caught:
            load_target(tmp_path / name)
        assert caught.value.code == code, caught.value


def test_a_tokenizer_comes_back_as_it_was(tmp_path: Path) -> None:
    made = VQTokenizer(16, (8, 12), 4, 3, width=8, blocks=1, code_width=4, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3))
    save_target(tmp_path / "t", made, made.spec, "vq", mean=made.mean, std=made.std, fingerprint="f")
    target = load_target(tmp_path / "t")
    assert (target.kind, target.name, target.mean) == ("vq", "token", (0.4, 0.5, 0.6))
    module, images = target.module(), torch.rand(2, 3, 8, 12)
    assert isinstance(module, VQTokenizer) and not any(p.requires_grad for p in module.parameters())
    assert torch.equal(module.codes(images), made.eval().codes(images)) and module.grid == (2, 3)
    for wrong, code, told in (
        ({"vocabulary": 17}, "E-CKPT-SHAPE", "codebook"),
        ({"img_size": [8, 13]}, "E-CKPT-FORMAT", "fill the image"),
        ({"std": [0.2, 0.2, -1.0]}, "E-CKPT-FORMAT", "deviation"),
        ({"width": 8.5}, "E-CKPT-FORMAT", "width"),
    ):
        (tmp_path / "wrong").mkdir(exist_ok=True)
        with pytest.raises(MaekitError, match=told) as caught:
            load_target(changed(tmp_path / "t", tmp_path / "wrong", {"spec": made.spec | wrong}))
        assert caught.value.code == code, caught.value


def test_a_converted_dvae_is_read_by_its_published_names_in_half_precision_too(tmp_path: Path) -> None:
    made = DalleEncoder(vocabulary=20, width=8, groups=2, blocks=1)
    weights = {name: value.half() for name, value in made.state_dict().items()}
    safetensors.torch.save_file(weights, tmp_path / "encoder.safetensors")
    target = load_target(tmp_path / "encoder.safetensors")
    assert (target.kind, target.name, target.fingerprint, target.spec["vocabulary"]) == ("dalle", "token", "", 20)
    module = target.module()
    assert isinstance(module, DalleEncoder) and module.at_grid((4, 4), 3).codes(torch.rand(1, 3, 8, 8)).shape == (1, 16)
    for name, value, code, told in (
        ("blocks.group_1.block_1.res_path.conv_2.w", torch.zeros(2, 2, 5, 5), "E-CKPT-SHAPE", "conv_2"),
        ("blocks.group_2.block_1.res_path.conv_4.b", torch.full((16,), float("nan")), "E-CKPT-NAN", "conv_4.b"),
        ("blocks.surprise", torch.zeros(1), "E-CKPT-KEYS", "surprise"),
    ):
        safetensors.torch.save_file(weights | {name: value}, tmp_path / "wrong.safetensors")
        with pytest.raises(MaekitError, match=told) as caught:
            load_target(tmp_path / "wrong.safetensors")
        assert caught.value.code == code, caught.value
    del weights["blocks.output.conv.w"]
    safetensors.torch.save_file(weights, tmp_path / "wrong.safetensors")
    with pytest.raises(MaekitError, match=r"blocks\.output\.conv\.w"):
        load_target(tmp_path / "wrong.safetensors")
