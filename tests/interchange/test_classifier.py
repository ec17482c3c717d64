"""A classifier in a program of two lines: any pictures in, the probabilities of ``maekit predict`` out."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

import maekit
from maekit.interchange.classifier import Classifier
from maekit.interchange.weights import metadata
from maekit.model.heads import classifier
from maekit.model.mae import create_model


def small(path: Path, channels: int = 3) -> Path:
    torch.manual_seed(0)
    model = create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, in_chans=channels, embed_dim=16, depth=1, num_heads=2,
        decoder_dim=16, decoder_depth=1, decoder_heads=2,
    )  # fmt: skip
    model.set_statistics((0.4, 0.5, 0.3)[:channels], (0.2, 0.3, 0.25)[:channels])
    made = classifier(model, 3)
    torch.nn.init.normal_(made.head.weight)  # type: ignore[arg-type]
    header = metadata(model, classes=["a", "b", "c"], pool="mean")
    safetensors.torch.save_file(made.state_dict(), path, header)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("weights") / "c.safetensors")


@pytest.fixture(scope="module")
def found(weights: Path) -> Classifier:
    return maekit.load_classifier(weights)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """70 pictures of different sizes and kinds, more than one pass."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(70):
        pixels = rng.integers(0, 256, (33 + i, 90 - i, 3), dtype=np.uint8)
        kind = ("png", "jpg", "webp")[i % 3]
        Image.fromarray(pixels).convert("RGBA" if i % 6 == 0 else "RGB").save(root / f"{i:02d}.{kind}")
    return sorted(root.iterdir())


def test_files_give_the_probabilities_of_predict(
    weights: Path, found: Classifier, files: list[Path], tmp_path: Path
) -> None:
    settings = {"run": weights, "data": str(files[0].parent), "out": tmp_path / "p.parquet", "workers": 0}
    maekit.predict({**settings, "device": "cpu"})
    said = torch.tensor(pq.read_table(tmp_path / "p.parquet")["probabilities"].to_pylist())
    shares = found(files)
    assert shares.shape == (70, 3) and shares.dtype == torch.float32 and not shares.requires_grad
    assert len(set(shares.argmax(1).tolist())) > 1
    torch.testing.assert_close(shares, said, rtol=0, atol=1e-6)
    assert found.classes == ["a", "b", "c"] and not found.training
    torch.testing.assert_close(maekit.load_classifier(weights)(str(files[3])), said[3:4], rtol=0, atol=1e-6)


def test_a_run_is_seen_with_the_crop_it_was_scored_with(weights: Path, files: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    data = tmp_path / "data"
    for i, file in enumerate(files[:12]):
        (data / "abc"[i % 3]).mkdir(parents=True, exist_ok=True)
        (data / "abc"[i % 3] / file.name).write_bytes(file.read_bytes())
    maekit.finetune(
        {"run": weights, "new_head": True, "data": str(data), "out": run, "steps": 1, "batch_size": 4, "workers": 0,
         "device": "cpu", "crop_pct": 0.6}
    )  # fmt: skip
    table = pq.read_table(run / "predictions.parquet")
    shares = maekit.load_classifier(run)([data / path for path in table["path"].to_pylist()])
    torch.testing.assert_close(shares, torch.tensor(table["probabilities"].to_pylist()), rtol=0, atol=1e-6)


def test_pictures_of_every_kind_say_the_same(found: Classifier, files: list[Path]) -> None:
    pictures = [Image.open(file) for file in files[1:60:6]]  # without transparency
    arrays = [np.array(image.convert("RGB")) for image in pictures]
    tensors = [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]
    shares = found(pictures)
    mixed: list[Any] = [*arrays[:4], *tensors[4:]]
    assert torch.equal(found(mixed), shares)
    same = torch.stack([tensor[:, :30, :30] for tensor in tensors])
    assert torch.equal(found(same), found(list(same)))
    assert torch.equal(found(same.permute(0, 2, 3, 1).numpy()), found(same))
    torch.testing.assert_close(found(same / 255), found(same), rtol=0, atol=0.02)  # resized before it is rounded
    assert torch.equal(found(pictures[0]), found(pictures[:1]))
    for image in pictures:
        image.close()


def image(*shape: int, value: float = 0.5) -> Tensor:
    return torch.full(shape, value)


@pytest.mark.parametrize(
    ("wrong", "code", "words"),
    [
        ([], "E-USAGE-IMAGES", "no images"),
        (["nothing.png"], "E-DATA-IMAGE", "nothing.png: found No such file"),
        (image(2, 1, 32, 32), "E-DATA-IMAGE", "1 channels, expected 3"),
        (image(2, 3, 32, 32, value=1.5), "E-DATA-IMAGE", "from 1.5 to 1.5.*it is normalised here"),
        (image(3, 32, 32, value=float("nan")), "E-DATA-IMAGE", "values from nan"),
        (image(2, 3, 32, 32).double(), "E-DATA-IMAGE", "float64"),
        ([None], "E-DATA-IMAGE", "NoneType"),
        (image(2, 2), "E-DATA-IMAGE", "a tensor"),
    ],
)
def test_what_is_no_picture_is_refused(found: Classifier, wrong: Any, code: str, words: str) -> None:
    with pytest.raises(maekit.MaekitError, match=words) as caught:
        found(wrong)
    assert caught.value.code == code
