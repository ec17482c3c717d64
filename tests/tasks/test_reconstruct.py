import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maekit.errors import MaekitError
from maekit.interchange.weights import save_model
from maekit.model.mae import create_model
from maekit.tasks.reconstruct import reconstruct


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("weights") / "model.safetensors")


def save(path: Path, channels: int = 3) -> Path:
    torch.manual_seed(0)
    model = create_model(
        "vit_tiny_patch16_224", img_size=(16, 24), patch_size=4, in_chans=channels, embed_dim=16, depth=1, num_heads=2,
        decoder_dim=16, decoder_depth=1, decoder_heads=2,
    )  # fmt: skip
    save_model(model, path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)
    paths = [tmp_path / f"photo {i}.png" for i in range(3)]
    for path, array in zip(paths, pixels, strict=True):
        Image.fromarray(array).save(path)
    return paths


def test_one_picture_per_ratio_and_one_of_all(weights: Path, photos: list[Path], tmp_path: Path) -> None:
    result = reconstruct(
        {"run": weights, "images": photos, "ratios": [75, 62.5], "out": tmp_path / "out", "device": "cpu"}
    )
    names = ["reconstruction-75.png", "reconstruction-62.5.png", "reconstructions.png"]
    assert result.metrics["files"] == [str(tmp_path / "out" / name) for name in names]
    assert sorted(names) == sorted(file.name for file in (tmp_path / "out").iterdir())
    scores = json.loads(json.dumps(result.metrics))["ratios"]
    assert set(scores) == {"75", "62.5"} and set(scores["75"]) == {"mse", "psnr", "psnr_fill", "loss"}
    assert result.metrics["images"] == 3 and result.metrics["view"] == "neighbours"
    assert "PSNR" in result.text and str(tmp_path / "out" / names[0]) in result.text


def test_the_original_in_the_picture_is_the_image_as_evaluation_sees_it(weights: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "fits.png")
    reconstruct({"run": weights, "images": [tmp_path / "fits.png"], "ratios": [50], "out": tmp_path / "out"})
    shown = np.asarray(Image.open(tmp_path / "out" / "reconstruction-50.png"))
    enlarged = pixels.repeat(5, 0).repeat(5, 1)  # 24 -> 120 pixels
    rows, columns = (n - m + 1 for n, m in zip(shown.shape[:2], enlarged.shape[:2], strict=True))
    corners = [(y, x) for y in range(rows) for x in range(columns) if (shown[y, x] == enlarged[0, 0]).all()]
    assert any(np.array_equal(shown[y : y + 80, x : x + 120], enlarged) for y, x in corners)


def test_the_seed_alone_decides(weights: Path, photos: list[Path], tmp_path: Path) -> None:
    def bytes_of(name: str, seed: int) -> bytes:
        reconstruct({"run": weights, "images": photos, "ratios": [75], "out": tmp_path / name, "seed": seed})
        return (tmp_path / name / "reconstructions.png").read_bytes()

    assert bytes_of("a", 5) == bytes_of("b", 5) != bytes_of("c", 6)


def test_images_of_a_data_set_are_held_out_and_evenly_spaced(weights: Path, tmp_path: Path) -> None:
    for label in "abc":
        for i in range(10):
            path = tmp_path / "data" / "val" / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (24, 16), (i, i, i)).save(path)
            (tmp_path / "data" / "train" / label).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (24, 16)).save(tmp_path / "data" / "train" / label / f"{i}.png")
    (tmp_path / "data" / "val" / "b" / "0.png").write_bytes(b"broken")
    result = reconstruct(
        {"run": weights, "data": str(tmp_path / "data"), "count": 3, "ratios": [75], "out": tmp_path / "out"}
    )
    assert result.metrics["images"] == 3


def test_a_picture_of_each_kind_and_arrays_of_many_channels(tmp_path: Path) -> None:
    five = save(tmp_path / "five.safetensors", channels=5)
    np.save(tmp_path / "bytes.npy", np.random.default_rng(0).integers(0, 256, (20, 30, 5), dtype=np.uint8))
    np.save(tmp_path / "floats.npy", np.random.default_rng(0).normal(size=(20, 30, 5)).astype(np.float32))
    images = [tmp_path / "bytes.npy", tmp_path / "floats.npy"]
    assert reconstruct({"run": five, "images": images, "out": tmp_path / "out"}).metrics["images"] == 2


def test_default_ratios_that_so_few_patches_do_not_allow_are_left_out_and_said(
    photos: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2,
        decoder_dim=16, decoder_depth=1, decoder_heads=2,
    )  # fmt: skip
    save_model(model, tmp_path / "m.safetensors")
    asked = {"run": tmp_path / "m.safetensors", "images": photos, "out": tmp_path / "out"}
    assert list(reconstruct(asked).metrics["ratios"]) == ["75", "85"]  # type: ignore[call-overload]
    assert "95 per cent cannot be removed of 16 patches" in caplog.text
    with pytest.raises(MaekitError, match="E-CONFIG-MASK"):
        reconstruct(asked | {"ratios": [75, 85, 95]})


def test_without_out_the_pictures_lie_beside_the_command(
    weights: Path, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reconstruct({"run": weights, "images": photos[:1], "ratios": [75]})
    assert (tmp_path / "reconstruct" / "reconstruction-75.png").exists()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"run": None}, "E-USAGE-RUN"),
        ({"images": []}, "E-USAGE-IMAGES"),
        ({"data": "builtin:fashion"}, "E-USAGE-IMAGES"),
        ({"ratios": [0.75]}, "E-CONFIG-MASK"),
        ({"ratios": [75, 99]}, "E-CONFIG-MASK"),
        ({"images": [Path("absent.png")]}, "E-DATA-PATH"),
        ({"images": [Path()]}, "E-DATA-PATH"),
        ({"images": [Path(__file__)]}, "E-DATA-IMAGE"),
        ({"run": Path("absent")}, "E-CKPT-"),
        ({"out": Path(__file__)}, "E-ENV-OUT"),
        ({"device": "tpu"}, "E-CONFIG-DEVICE"),
    ],
)
def test_faults_are_one_plain_error_and_leave_nothing(
    weights: Path, photos: list[Path], tmp_path: Path, change: dict[str, object], code: str
) -> None:
    asked: dict[str, object] = {"run": weights, "images": photos, "ratios": [75], "out": tmp_path / "out"}
    with pytest.raises(MaekitError, match=code):
        reconstruct(asked | change)
    assert not (tmp_path / "out").exists()


def test_a_fifo_is_refused_and_not_waited_for(weights: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(MaekitError, match=r"E-DATA-PATH.*regular file"):
        reconstruct({"run": weights, "images": [tmp_path / "pipe.png"], "out": tmp_path / "out"})


@pytest.mark.skipif("MAEKIT_DATA" not in os.environ, reason="MAEKIT_DATA names no folder of real photographs")
def test_real_photographs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_model(
        create_model("vit_tiny_patch16_224", depth=1, decoder_dim=32, decoder_depth=1, decoder_heads=2),
        tmp_path / "m.safetensors",
    )
    photos = sorted((Path(os.environ["MAEKIT_DATA"]) / "photos").iterdir())[:3]
    result = reconstruct({"run": tmp_path / "m.safetensors", "images": photos, "out": tmp_path / "out"})
    assert len(list((tmp_path / "out").iterdir())) == 4 and result.metrics["images"] == 3
