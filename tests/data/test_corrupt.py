"""Corruptions: all kinds, the same bits for the same seed, on colour and grey, refused where they mean nothing."""

import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from maekit.data.augment import EvalView
from maekit.data.corrupt import CorruptedView, corrupt
from maekit.data.loader import Loader
from maekit.data.source import DatasetSource
from maekit.errors import MaekitError
from maekit.scores.corruption import KINDS
from maekit.seeds import seed_cpu


def picture(side: int = 48, channels: int = 3) -> Tensor:
    """Return smooth waves with a hard edge, so that blur, noise and contrast all change something."""
    at = torch.linspace(0, 6, side)
    waves = 128 + 100 * torch.sin(at)[:, None] * torch.cos(1.3 * at)[None]
    waves[side // 3 : side // 2] = 30
    return torch.stack([waves.roll(5 * c, 1) for c in range(channels)]).to(torch.uint8)


class Pictures:
    """Six images of two classes."""

    targets = (0, 1, 0, 1, 0, 1)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Tensor:
        return picture().roll(7 * i, 2)


def loaded(workers: int, seed: int = 3, kind: str = "glass_blur") -> Tensor:
    loader = Loader(
        DatasetSource(Pictures()), CorruptedView((32, 32), 1.0, kind, 4), batch_size=6, micro_batch=4, seed=seed,
        mean=(0.0,) * 3, std=(1.0,) * 3, workers=workers,
    )  # fmt: skip
    return torch.cat([batch["images"] for batch in loader.sweep()])


def test_without_the_extra_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(MaekitError, match=r"E-ENV-IMPORT.*pip install 'maekit\[robust\]'") as caught:
        corrupt(picture(), "fog", 1)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("image", [picture(31), picture(channels=4), picture().float()])
def test_what_is_no_picture_or_too_small_is_refused(image: Tensor) -> None:
    with pytest.raises(MaekitError, match="E-DATA-IMAGE"):
        corrupt(image, "fog", 1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_the_same_for_the_same_seed_and_changes_the_image(kind: str) -> None:
    pytest.importorskip("imagecorruptions", exc_type=ImportError)
    for image in (picture(), picture(channels=1)):
        results = []
        for seed in (5, 5):
            seed_cpu(seed, 0, 0)
            results.append(corrupt(image, kind, 5))
        assert results[0].shape == image.shape and results[0].dtype == torch.uint8
        assert torch.equal(results[0], results[1]) and not torch.equal(results[0], image)


@pytest.mark.parametrize("kind", ["gaussian_noise", "impulse_noise", "glass_blur", "motion_blur", "fog", "spatter"])
def test_another_seed_is_another_draw(kind: str) -> None:
    pytest.importorskip("imagecorruptions", exc_type=ImportError)
    assert not torch.equal(loaded(0, 3, kind), loaded(0, 4, kind))


def test_noise_and_blur_grow_with_the_severity() -> None:
    pytest.importorskip("imagecorruptions", exc_type=ImportError)
    for kind in ("gaussian_noise", "gaussian_blur", "contrast"):
        changes = []
        for severity in (1, 3, 5):
            seed_cpu(0)
            changes.append((corrupt(picture(), kind, severity).float() - picture().float()).abs().mean().item())
        assert changes == sorted(changes) and changes[0] < changes[-1], (kind, changes)


def test_spatter_without_a_drop_leaves_the_image_alone() -> None:
    """On 32 px one draw in fifty has none, and the package then divides by 0: what came out was a black image."""
    pytest.importorskip("imagecorruptions", exc_type=ImportError)
    seed_cpu(67)
    assert torch.equal(corrupt(picture(32), "spatter", 1), picture(32))
    seed_cpu(68)
    assert not torch.equal(corrupt(picture(32), "spatter", 1), picture(32))


def test_a_kind_is_what_the_package_makes_of_it() -> None:
    """Oracle: the package's own door."""
    pytest.importorskip("imagecorruptions", exc_type=ImportError)
    import imagecorruptions

    image = picture(64)
    for kind in KINDS:
        seed_cpu(7)
        found = corrupt(image, kind, 3)
        seed_cpu(7)
        more = {"seed": int(np.random.randint(2**31))} if kind in ("impulse_noise", "glass_blur") else {}
        pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        expected = imagecorruptions.corrupt(pixels, severity=3, corruption_name=kind, **more)
        assert np.array_equal(found.permute(1, 2, 0).numpy(), expected), kind


def test_the_crop_that_the_model_sees_is_what_is_corrupted() -> None:
    pytest.importorskip("imagecorruptions", exc_type=ImportError)
    image = picture(64)
    seen = EvalView((32, 32), 0.875)(image)
    seed_cpu(1)
    expected = corrupt(seen, "fog", 2)
    seed_cpu(1)
    assert torch.equal(CorruptedView((32, 32), 0.875, "fog", 2)(image), expected)


@pytest.mark.slow
def test_the_number_of_workers_changes_no_pixel() -> None:
    pytest.importorskip("imagecorruptions", exc_type=ImportError)
    assert torch.equal(loaded(0), loaded(2))
