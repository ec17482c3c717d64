"""`maekit convert` and `maekit inspect` as a user runs them: another program's files in, another program's out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from maekit import convert, create_model, save_model

from .conftest import Command

Maekit = Callable[..., Command]
SMALL: dict[str, Any] = {
    "name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8, "depth": 2,
    "decoder_dim": 64, "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with ours.safetensors and official.pth, the same model."""
    path = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    save_model(create_model(**SMALL), path / "ours.safetensors")
    convert({"src": path / "ours.safetensors", "dst": path / "official.pth", "to": "official"})
    return path


def test_the_path_of_a_user_who_has_an_official_checkpoint(maekit: Maekit, weights: Path) -> None:
    seen = maekit("inspect", "official.pth", cwd=weights)
    assert seen.code == 0, seen.stderr
    for words in ("layout of official (torch)", "3 heads", "target norm_pixel", "decoder_blocks.*.attn.qkv.weight|bias",
                  "50 tensors: 20 renamed, 30 used"):  # fmt: skip
        assert words in seen.stdout
    done = maekit(
        "convert", "official.pth", "hf", "--to", "transformers", "--licence", "mit", "--img-size", "64", "--json",
        cwd=weights,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    assert done.json["from"] == "official"
    assert done.json["proof"]["difference"] <= done.json["proof"]["tolerance"] == 1e-5
    assert any("bicubic positions, 4 x 4 to 8 x 8" in note for note in done.json["notes"])
    files = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert {path.name for path in (weights / "hf").iterdir()} == files
    again = maekit("convert", "official.pth", "hf", "--to", "transformers", cwd=weights)
    assert again.code == 5
    assert "it exists" in again.stderr
    assert len(again.stderr.splitlines()) == 1


def test_the_text_says_what_became_of_every_tensor(maekit: Maekit, weights: Path) -> None:
    done = maekit("convert", "ours.safetensors", "timm", "--to", "timm", cwd=weights)
    assert done.code == 0, done.stderr
    for words in ("decoder.mask_token", "timm has no place for it", "50 tensors: 20 left out, 30 used",
                  "largest difference 0.0e+00", "written: timm"):  # fmt: skip
        assert words in done.stdout


PICKLE = b"\x80\x02cposix\nsystem\nX\x09\x00\x00\x00touch ran\x85R."


@pytest.mark.parametrize(
    ("words", "content", "code", "said"),
    [
        ("inspect weights.pth", b"<!DOCTYPE html><html>404</html>", "E-CKPT-FORMAT", "a web page"),
        ("inspect weights.pth", b"version https://git-lfs.github.com/spec/v1\n", "E-CKPT-FORMAT", "LFS pointer"),
        ("convert weights.pth out --to timm", b"", "E-CKPT-FORMAT", "an empty file"),
        ("convert weights.pth out --to timm", b"PK\x03\x04 and no more", "E-CKPT-FORMAT", "cut off"),
        ("convert weights.pth out --to timm", PICKLE, "E-CKPT-PICKLE", "posix.system"),
        ("knn weights.pth --data builtin:fashion", PICKLE, "E-CKPT-PICKLE", "posix.system"),
    ],
    ids=["web page", "LFS pointer", "empty", "truncated", "pickle", "pickle to another verb"],
)
def test_rubbish_is_one_line_and_nothing_is_written(
    maekit: Maekit, tmp_path: Path, words: str, content: bytes, code: str, said: str
) -> None:
    (tmp_path / "weights.pth").write_bytes(content)
    done = maekit(*words.split(), cwd=tmp_path)
    assert done.code == 4
    assert code in done.stderr
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pth"]


def test_other_verbs_take_another_librarys_weights(maekit: Maekit, weights: Path) -> None:
    words = ["--data", "builtin:fashion", "--count", "2", "--out", "pictures"]
    convert({"src": weights / "official.pth", "dst": weights / "grey.pth", "to": "official", "channels": 1})
    done = maekit("reconstruct", "grey.pth", *words, cwd=weights)
    assert done.code == 0, done.stderr
    assert list((weights / "pictures").glob("*.png"))
    done = maekit("knn", "grey.pth", "--data", "builtin:fashion", "--labels", "10/class", "--json", cwd=weights)
    assert done.code == 0, done.stderr
