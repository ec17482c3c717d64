"""Weights come back bit for bit; any other file is refused in one line, and nothing in it ever runs."""

import hashlib
import json
import logging
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from maekit.errors import MaekitError
from maekit.interchange.reading import Hints
from maekit.interchange.weights import load_classifier, load_model, metadata, save_encoder, save_model
from maekit.model.heads import classifier
from maekit.model.mae import MaskedAutoencoder, create_model
from maekit.train import checkpoint

SIZES: dict[str, Any] = {
    "name": "vit_tiny_patch16_224",
    "img_size": (16, 24),
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "decoder_dim": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "target": "pixel",
    "mean": (0.1, 0.2, 0.3),
    "std": (0.4, 0.5, 0.6),
}


def small(**changes: Any) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return create_model(**{**SIZES, **changes})


SPEC: dict[str, Any] = small().spec
"""What a sound header holds."""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return a file that `save_model` wrote."""
    path = tmp_path / "model.safetensors"
    save_model(small(), path)
    return path


def assert_same(one: MaskedAutoencoder, other: MaskedAutoencoder) -> None:
    assert one.spec == other.spec
    assert (one.mean, one.std, one.target, one.grid) == (other.mean, other.std, other.target, other.grid)
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], Any], about: dict[str, Any] | None = None) -> None:
    """Write a file again with other tensors or another header."""
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    with safetensors.safe_open(str(path), "pt") as opened:
        header = json.loads(opened.metadata()["maekit"])
    header.pop("sha256", None)  # whoever changes a file on purpose leaves the digest out
    header.update(about or {})
    safetensors.torch.save_file(tensors, path, {"maekit": json.dumps(header)})


def refusal(path: Path, **settings: Any) -> MaekitError:
    with pytest.raises(MaekitError) as caught:
        load_model(path, **settings)
    error = caught.value
    assert error.code.startswith("E-CKPT-")
    assert error.exit_code == 4
    assert "\n" not in str(error)
    return error


# --- round trips


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"name": "vit_small_patch14_reg4_dinov2", "patch_size": 8},
        {"name": "vit_medium_patch16_reg4_gap_256", "target": "norm_pixel"},
        {"in_chans": 5, "mean": (0.5,) * 5, "std": (0.25,) * 5},
    ],
    ids=["plain", "registers", "no class token", "five channels"],
)
def test_a_model_comes_back_bit_for_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = small(**changes)
    save_model(model, tmp_path / "m.safetensors")
    again = load_model(str(tmp_path / "m.safetensors"))
    assert_same(again, model)
    assert {n: p.requires_grad for n, p in again.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }


def test_saving_twice_gives_the_same_bytes_and_leaves_no_other_file(tmp_path: Path, saved: Path) -> None:
    first = saved.read_bytes()
    save_model(small(), saved)
    assert saved.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == [saved.name]


def test_statistics_set_later_travel_with_the_weights(saved: Path) -> None:
    model = small()
    model.set_statistics((0.0, 0.25, 0.5), (1.0, 2.0, 3.0))
    save_model(model, saved)
    again = load_model(saved)
    assert (again.mean, again.std) == ((0.0, 0.25, 0.5), (1.0, 2.0, 3.0))


def test_random_init_is_the_same_model_with_other_weights(saved: Path) -> None:
    fresh, kept = load_model(saved, random_init=True), load_model(saved)
    assert fresh.spec == kept.spec
    assert not torch.equal(fresh.decoder.mask_token, kept.decoder.mask_token)


def write_run(run: Path, steps: tuple[int, ...]) -> dict[int, MaskedAutoencoder]:
    models = {}
    for step in steps:
        models[step] = small()
        with torch.no_grad():
            models[step].decoder.mask_token.fill_(step)
        tensors = {"model": models[step].state_dict(), "optimizer": {}}
        checkpoint.save(run / "checkpoints", step, tensors, {}, metadata=metadata(models[step]), keep=9)
    return models


def test_a_run_folder_gives_its_newest_checkpoint_and_a_checkpoint_folder_itself(tmp_path: Path) -> None:
    models = write_run(tmp_path, (5, 10))
    assert_same(load_model(tmp_path), models[10])
    assert_same(load_model(tmp_path / "checkpoints" / "step-5"), models[5])
    assert_same(load_model(tmp_path / "checkpoints" / "step-5" / "model.safetensors"), models[5])


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = write_run(tmp_path, (5, 10))
    flip_a_byte(tmp_path / "checkpoints" / "step-10" / "model.safetensors")
    with caplog.at_level(logging.WARNING, "maekit"):
        assert_same(load_model(tmp_path), models[5])
    assert "step-10" in caplog.text
    assert refusal(tmp_path / "checkpoints" / "step-10").code == "E-CKPT-DAMAGED"


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 4
    path.write_bytes(data)


# --- other programs


def test_timm_loads_the_encoder_file_as_it_is(tmp_path: Path) -> None:
    model = create_model("vit_tiny_patch16_224", decoder_dim=16, decoder_depth=1, decoder_heads=2)
    save_encoder(model, tmp_path / "encoder.safetensors")
    theirs = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, checkpoint_path=str(tmp_path / "encoder.safetensors")
    )
    assert isinstance(theirs, VisionTransformer)
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, model.encoder.state_dict()[name]), name
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(
            theirs.eval().forward_features(images), model.eval().features(images, "tokens"), rtol=1e-4, atol=1e-4
        )


def test_an_encoder_file_gives_its_encoder_with_a_random_decoder_and_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = small()
    save_encoder(model, tmp_path / "encoder.safetensors")
    with caplog.at_level(logging.INFO, "maekit"):
        again = load_model(tmp_path / "encoder.safetensors")
    assert "decoder is drawn anew" in caplog.text
    assert again.spec == model.spec
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, again.encoder.state_dict()[name])
    assert not torch.equal(again.decoder.mask_token, model.decoder.mask_token)


# --- refusals


def test_nothing_there_is_said_so(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent").code == "E-CKPT-MISSING"
    assert refusal(tmp_path).code == "E-CKPT-MISSING"
    (tmp_path / "checkpoints").mkdir()
    assert refusal(tmp_path).code == "E-CKPT-MISSING"


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, 1000, -1])
def test_a_truncated_file_is_refused(saved: Path, size: int) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[:size])
    refusal(saved)
    refusal(saved, random_init=True)


def test_every_cut_of_the_header_is_refused(saved: Path) -> None:
    data = saved.read_bytes()
    for size in range(0, len(data), len(data) // 64):
        saved.write_bytes(data[:size])
        refusal(saved)


@pytest.mark.parametrize(
    "content",
    [
        b"hello, these are no weights\n",
        bytes(64),
        b"\xff" * 64,
        b"PK\x03\x04",
        (2**62).to_bytes(8, "little") + b"{}",
        b"\x89PNG\r\n",
    ],
    ids=["text", "zeros", "ones", "zip", "header of 4 EiB", "picture"],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    error = refusal(path)
    assert error.code == "E-CKPT-FORMAT"
    assert ".safetensors" in str(error)


class Payload:
    """When unpickled, makes a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = str(sentinel)

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.sentinel,))


@pytest.mark.parametrize(
    "name", ["mae_pretrain_vit_base.pth", "model.pt", "model.bin", "model.ckpt", "model.safetensors"]
)
@pytest.mark.parametrize("form", ["torch", "old torch", "pickle"])
def test_a_pickle_is_refused_and_its_payload_never_runs(tmp_path: Path, name: str, form: str) -> None:
    sentinel, path = tmp_path / "it-ran", tmp_path / name
    content = {"model": Payload(sentinel)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    assert refusal(path).code == "E-CKPT-PICKLE"
    assert f"{os.mkdir.__module__}.mkdir" in str(refusal(path, random_init=True))
    assert not sentinel.exists()
    pickle.loads(pickle.dumps(content))
    assert sentinel.exists()  # the payload is live


def test_a_pickle_inside_a_run_folder_never_runs(tmp_path: Path) -> None:
    write_run(tmp_path, (5,))
    sentinel, file = tmp_path / "it-ran", tmp_path / "checkpoints" / "step-5" / "model.safetensors"
    torch.save(Payload(sentinel), file)
    refusal(tmp_path)
    refusal(tmp_path / "checkpoints" / "step-5")
    assert not sentinel.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_a_checkpoint_whose_manifest_vouches_for_rubbish_is_refused(tmp_path: Path, name: str) -> None:
    write_run(tmp_path, (5,))
    folder, sentinel = tmp_path / "checkpoints" / "step-5", tmp_path / "it-ran"
    torch.save(Payload(sentinel), folder / name)
    manifest, data = json.loads((folder / "manifest.json").read_text()), (folder / name).read_bytes()
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    facts = {name: value for name, value in manifest.items() if name != "sha256"}
    own = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**facts, "sha256": own}))
    refusal(folder)
    refusal(tmp_path)
    assert not sentinel.exists()


def test_our_names_without_our_header_want_what_shapes_do_not_tell(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(small().state_dict(), path)
    assert refusal(path).code == "E-CKPT-HEADS"
    hints = Hints(num_heads=3, decoder_heads=2, target="pixel", img_size=(16, 24))
    again = load_model(path, hints=hints)
    for name, value in small().state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_newer_format_asks_for_a_newer_maekit(saved: Path) -> None:
    rewrite(saved, lambda _: None, {"format": 99})
    error = refusal(saved)
    assert error.code == "E-CKPT-FORMAT"
    assert "newer maekit" in str(error)


@pytest.mark.parametrize("written", ["1", None, 1.5, [], {}])
def test_a_format_that_is_no_number_is_refused(saved: Path, written: object) -> None:
    rewrite(saved, lambda _: None, {"format": written})
    refusal(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused_by_name(saved: Path, value: float) -> None:
    rewrite(saved, lambda tensors: tensors["encoder.blocks.1.mlp.fc1.weight"].view(-1)[3].fill_(value))
    error = refusal(saved)
    assert error.code == "E-CKPT-NAN"
    assert "encoder.blocks.1.mlp.fc1.weight" in str(error)


def test_missing_extra_transposed_and_retyped_weights_are_named(saved: Path) -> None:
    name, data = "encoder.blocks.0.attn.qkv.weight", saved.read_bytes()
    changes: list[tuple[str, str, Callable[[dict[str, Tensor]], Any]]] = [
        ("E-CKPT-KEYS", "missing " + name, lambda tensors: tensors.pop(name)),
        ("E-CKPT-KEYS", "unknown " + name + "2", lambda tensors: tensors.update({name + "2": torch.zeros(1)})),
        ("E-CKPT-SHAPE", "(24, 72)", lambda tensors: tensors.update({name: tensors[name].T.contiguous()})),
        ("E-CKPT-SHAPE", "float16", lambda tensors: tensors.update({name: tensors[name].half()})),
    ]
    for code, words, change in changes:
        saved.write_bytes(data)
        rewrite(saved, change)
        error = refusal(saved)
        assert error.code == code
        assert name in str(error)
        assert words in str(error)


def test_any_flipped_byte_of_the_values_is_noticed(saved: Path) -> None:
    flip_a_byte(saved)
    assert refusal(saved).code == "E-CKPT-DAMAGED"


@pytest.mark.parametrize(
    "about",
    [
        {"spec": None},
        {"spec": []},
        {"spec": {}},
        {"spec": {"return": 1}},
        {"spec": {"__class__": 1}},
        {"spec": {**SPEC, "name": 5}},
        {"spec": {**SPEC, "name": "resnet50"}},
        {"spec": {**SPEC, "name": "../../evil"}},
        {"spec": {**SPEC, "name": "hf_hub:someone/model"}},
        {"spec": {**SPEC, "img_size": "16"}},
        {"spec": {**SPEC, "img_size": 17}},
        {"spec": {**SPEC, "embed_dim": "24"}},
        {"spec": {**SPEC, "embed_dim": 2**40}},
        {"spec": {**SPEC, "depth": 10**9}},
        {"spec": {**SPEC, "decoder_dim": 2**40}},
        {"spec": {**SPEC, "decoder_depth": 10**9}},
        {"spec": {**SPEC, "img_size": 2**30}},
        {"spec": {**SPEC, "in_chans": 2**40}},
        {"spec": {**SPEC, "target": ["pixel"]}},
        {"spec": {**SPEC, "mean": "abc"}},
        {"spec": {**SPEC, "mean": None, "std": 3}},
        {"kind": "classifier"},
        {"kind": None},
        {"kind": []},
    ],
    ids=str,
)
def test_a_header_that_lies_is_refused_without_a_traceback(saved: Path, about: dict[str, Any]) -> None:
    rewrite(saved, lambda _: None, about)
    refusal(saved)


@pytest.mark.parametrize(
    "header", ["", "{", "[]", "5", "null", '"x"', "[" * 100_000, '{"format": 1}', '{"format": ' + "9" * 5000 + "}"]
)
def test_a_header_that_is_no_json_of_ours_is_refused(saved: Path, header: str) -> None:
    safetensors.torch.save_file(safetensors.torch.load_file(saved), saved, {"maekit": header})
    refusal(saved)


def test_a_name_with_control_characters_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[2J\nb.safetensors"
    path.write_bytes(b"no")
    assert "\x1b" not in str(refusal(path))


def test_a_folder_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "m.safetensors").mkdir()
    for place in ("file/m.safetensors", "m.safetensors"):
        with pytest.raises(MaekitError) as caught:
            save_model(small(), tmp_path / place)
        assert caught.value.code == "E-ENV-OUT"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "m.safetensors"]


# --- classifiers


def save_classifier(path: Path, origin: MaskedAutoencoder, pool: str) -> VisionTransformer:
    model = classifier(origin, 3, pool=pool, drop_path=0.2, pretrained=True)
    tensors = {"model": model.state_dict(), "optimizer": {}}
    header = metadata(origin, classes=["a", "b", "ü"], pool=pool)
    checkpoint.save(path / "checkpoints", 4, tensors, {}, metadata=header, keep=1)
    return model


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_a_classifier_comes_back_with_its_classes_but_not_as_an_autoencoder(tmp_path: Path, pool: str) -> None:
    model = save_classifier(tmp_path, small(), pool).eval()
    again = load_classifier(tmp_path)
    assert again.classes == ["a", "b", "ü"]
    assert again.spec == small().spec
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        assert torch.equal(again.model(images), model(images))
    error = refusal(tmp_path)
    assert error.code == "E-CKPT-KIND"
    assert "classifier" in str(error)


def test_an_autoencoder_is_no_classifier(saved: Path) -> None:
    with pytest.raises(MaekitError) as caught:
        load_classifier(saved)
    assert caught.value.code == "E-CKPT-KIND"


def test_files_follow_the_umask(saved: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o666 & ~mask
