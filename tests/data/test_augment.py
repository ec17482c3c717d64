"""Views against torchvision's own transforms, which the official recipes use."""

import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode, v2

from maekit.data.augment import (
    CropsView,
    EvalView,
    FinetuneView,
    PretrainView,
    ProbeView,
    clamped_box,
    clamped_crop,
    cut,
    default_crop_pct,
    eval_view,
    random_box,
    random_crop,
    resize_to_cover,
    resized,
    resized_boxes,
)
from maekit.errors import MaekitError
from maekit.seeds import seed_cpu

sides, small_sides = st.integers(4, 90), st.integers(4, 40)


def photo(height: int, width: int, channels: int = 3) -> Tensor:
    """Return something like a photograph: smooth shades, an edge and some grain."""
    generator = np.random.default_rng(height * width)
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 90 * np.sin((c + 1) * x / 37) * np.cos(y / (23 + c)) + 30 * (x > y) for c in range(channels)]
    grain = generator.normal(0, 6, (channels, height, width))
    return torch.from_numpy((np.stack(waves) + grain).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("size", [(224, 224), (32, 48)])
def test_the_random_crop_is_that_of_torchvision(size: tuple[int, int], seed: int) -> None:
    """Oracle: RandomResizedCrop under the same seed; v1 resizes in floats, v2 in bytes as Pillow does."""
    image = photo(200 + 10 * seed, 260)
    found = []
    for kind in (transforms, v2):
        crop = kind.RandomResizedCrop(size, (0.2, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True)
        torch.manual_seed(seed)
        found.append(crop(image))
    torch.manual_seed(seed)
    ours = random_crop(image, size, (0.2, 1.0))
    assert torch.equal(ours, found[1])
    assert (ours.int() - found[0].int()).abs().max() <= 2


@pytest.mark.parametrize("channels", [1, 3])
def test_boxes_resized_together_in_floats_are_those_of_the_loader(channels: int) -> None:
    boxes = [photo(40 + 31 * i, 300 - 29 * i, channels) for i in range(7)]
    flat = torch.cat([box.permute(1, 2, 0).flatten() for box in boxes])
    size, said = (64, 48), [(box.shape[1], box.shape[2], 1) for box in boxes]
    found, one_by_one = resized_boxes(flat, said, channels, size), torch.stack([resized(box, size) for box in boxes])
    assert found.dtype == torch.float32 and found.shape == (7, channels, *size)
    differs = (found * 255 - one_by_one).abs()
    assert differs.max() < 1.01 and differs.mean() < 0.01
    in_floats = torch.stack([resized(box.float() / 255, size) for box in boxes])
    arrays = [(tall, wide, 0) for tall, wide, _ in said]
    assert torch.allclose(resized_boxes(flat / 255, arrays, channels, size), in_floats, atol=1e-6)


@pytest.mark.parametrize("box", [(0, 0, 60, 70), (5, 0, 40, 70), (3, 4, 50, 31)])
def test_pixels_stay_in_the_order_in_which_they_were_decoded(box: tuple[int, int, int, int]) -> None:
    """Whole, of all columns, cut on all sides: the same pixels as of planes, and no copy is left to whoever stacks."""
    pixels = torch.randint(0, 256, (60, 70, 3), dtype=torch.uint8).permute(2, 0, 1)
    found, planes = (resized(cut(image, box), (24, 32)) for image in (pixels, pixels.contiguous()))
    assert torch.equal(found, planes) and planes.is_contiguous()
    assert found.permute(1, 2, 0).is_contiguous()


def test_a_box_of_many_pixels_is_resized_before_it_is_handed_over() -> None:
    image, seen = photo(90, 120), set()
    for seed in range(60):
        torch.manual_seed(seed)
        whole = PretrainView((24, 32))(image)
        torch.manual_seed(seed)
        box = PretrainView((24, 32), cut_only=True)(image)
        assert box[0].numel() <= 4 * 24 * 32
        seen.add(box.shape == whole.shape)
        assert box.shape != whole.shape or torch.equal(box, whole)
    assert seen == {True, False}


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([(0.2, 1.0), (0.08, 1.0), (0.5, 0.5)]), st.integers())
def test_the_random_box_is_that_of_torchvision(height: int, width: int, scale: tuple[float, float], seed: int) -> None:
    """Oracle, also where no box fits: the same numbers, and as many of them."""
    seed %= 2**63
    torch.manual_seed(seed)
    theirs = transforms.RandomResizedCrop.get_params(torch.empty(1, height, width), list(scale), [3 / 4, 4 / 3])
    after = torch.rand(())
    torch.manual_seed(seed)
    assert random_box(height, width, scale) == theirs and torch.rand(()) == after


@settings(max_examples=100, deadline=None)
@given(
    small_sides,
    small_sides,
    st.integers(0, 99),
    st.integers(0, 99),
    st.sampled_from([0.08, 0.2, 0.9]),
    st.integers(0, 99),
)
def test_from_what_a_view_calls_enough_no_crop_is_enlarged(
    rows: int, columns: int, taller: int, wider: int, low: float, seed: int
) -> None:
    torch.manual_seed(seed)
    for view, draw in ((PretrainView, random_box), (ProbeView, clamped_box), (FinetuneView, random_box)):
        height, width = view((rows, columns), (low, 1.0)).enough
        _, _, tall, wide = draw(height + taller, width + wider, (low, 1.0))
        assert tall >= rows and wide >= columns, "rounding never goes below: the sides were rounded up"
    for crop, pct in (("fixed", 0.875), ("centre", default_crop_pct((rows, columns)))):
        assert PretrainView((rows, columns), crop=crop).enough >= (int(rows / pct), int(columns / pct))
    assert PretrainView((rows, columns), (1.0, 1.0)).enough == (rows, columns)


def test_a_crop_of_scale_one_is_the_whole_image() -> None:
    image = photo(28, 28)
    assert torch.equal(random_crop(image, (28, 28), (1.0, 1.0)), image)
    assert torch.equal(random_crop(photo(50, 40), (28, 28), (1.0, 1.0)), eval_view(photo(50, 40), (28, 28)))


@pytest.mark.parametrize(
    ("height", "width"),
    [(375, 500), (500, 333), (480, 640), (256, 256), (300, 1001), (427, 640), (640, 427), (225, 224)],
)
def test_evaluation_is_torchvisions_resize_to_256_and_centre_crop(height: int, width: int) -> None:
    """Oracle: the official evaluation, pixel by pixel."""
    image = photo(height, width)
    floats, exact = (
        kind.Compose([kind.Resize(256, InterpolationMode.BICUBIC, antialias=True), kind.CenterCrop(224)])
        for kind in (transforms, v2)
    )
    ours = eval_view(image, (224, 224), 0.875)
    assert torch.equal(ours, exact(image))
    assert (ours.int() - floats(image).int()).abs().max() <= 2


@settings(max_examples=60, deadline=None)
@given(
    st.integers(4, 90), st.integers(4, 90), st.integers(4, 40), st.integers(4, 40), st.sampled_from([1.0, 0.875, 0.5])
)
def test_evaluation_always_gives_the_size_and_never_a_border(
    height: int, width: int, rows: int, columns: int, crop_pct: float
) -> None:
    image = torch.full((2, height, width), 200, dtype=torch.uint8)
    shown = eval_view(image, (rows, columns), crop_pct)
    assert shown.shape == (2, rows, columns) and shown.dtype == torch.uint8 and bool((shown == 200).all())


@settings(max_examples=60, deadline=None)
@given(sides, sides, small_sides, small_sides, st.integers(0, 99))
def test_random_crops_always_give_the_size(height: int, width: int, rows: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    image = torch.full((1, height, width), 0.5)
    for crop in (random_crop, clamped_crop):
        shown = crop(image, (rows, columns), (0.08, 1.0))
        assert shown.shape == (1, rows, columns) and torch.allclose(shown, torch.tensor(0.5), atol=1e-5)


def boxes(height: int, width: int, scale: tuple[float, float] = (0.08, 1.0)) -> np.ndarray:
    """Return 4000 boxes of the clamped crop: top, left, height, width."""
    torch.manual_seed(0)
    return np.array([clamped_box(height, width, scale) for _ in range(4000)])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(0, 99))
def test_a_clamped_box_lies_within_the_image(height: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    top, left, tall, wide = clamped_box(height, width, (0.08, 1.0))
    assert 0 <= top <= top + tall <= height and 0 <= left <= left + wide <= width and min(tall, wide) >= 1


def test_a_clamped_crop_draws_area_evenly_and_aspect_evenly_in_its_logarithm() -> None:
    """Below half of the area no side of a square image is reached, so the draws themselves can be seen."""
    _, _, tall, wide = boxes(1000, 1000, (0.08, 0.5)).T
    area, aspect = tall * wide / 1e6, np.log(wide / tall) / np.log(4 / 3)
    quarters = (0.25, 0.5, 0.75)
    np.testing.assert_allclose(np.quantile(area, quarters), [0.08 + 0.42 * q for q in quarters], atol=0.012)
    np.testing.assert_allclose(np.quantile(aspect, quarters), (-0.5, 0.0, 0.5), atol=0.06)
    assert area.min() >= 0.0795 and area.max() <= 0.5005 and np.abs(aspect).max() <= 1.01
    assert abs(np.corrcoef(area, aspect)[0, 1]) < 0.05


def test_a_clamped_crop_lies_anywhere_evenly() -> None:
    top, left, tall, wide = boxes(300, 400, (0.08, 0.3)).T
    for place, room in ((top, 300 - tall), (left, 400 - wide)):
        np.testing.assert_allclose(np.quantile(place / room, (0.25, 0.5, 0.75)), (0.25, 0.5, 0.75), atol=0.04)


def test_a_box_longer_than_the_image_is_cut_to_its_side_and_not_drawn_again() -> None:
    """On a strip nearly every box is too tall: ours keeps the drawn width, torchvision falls back to the centre."""
    top, left, tall, wide = boxes(20, 2000).T
    assert (tall == 20).mean() > 0.99 and (top[tall == 20] == 0).all()
    width = np.sqrt(20 * 2000 * (0.08 + 0.92 * np.arange(0.05, 1, 0.1)))
    np.testing.assert_allclose(np.quantile(wide, np.arange(0.05, 1, 0.1)), width, rtol=0.06)
    assert np.ptp(left) > 1700
    centre = {transforms.RandomResizedCrop.get_params(torch.zeros(1, 20, 2000), [0.08, 1], [3 / 4, 4 / 3])[1:]}
    assert centre == {((2000 - 27) // 2, 20, 27)}


@pytest.mark.parametrize(("side", "pct"), [(28, 1.0), (96, 1.0), (112, 0.875), (224, 0.875), (384, 1.0)])
def test_the_part_that_is_scored_follows_the_size(side: int, pct: float) -> None:
    assert default_crop_pct((side, side)) == pct


def test_half_of_the_images_are_mirrored_and_none_when_switched_off() -> None:
    image = torch.arange(8, dtype=torch.uint8).expand(1, 8, 8)
    torch.manual_seed(0)
    flips = sum(not torch.equal(PretrainView((8, 8), (1.0, 1.0))(image), image) for _ in range(400))
    assert 160 < flips < 240
    assert all(torch.equal(PretrainView((8, 8), (1.0, 1.0), flip=False)(image), image) for _ in range(20))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    "view", [PretrainView((8, 12)), EvalView((8, 12), 0.875), FinetuneView((8, 12)), ProbeView((8, 12))]
)
def test_views_keep_channels_and_type(view: PretrainView, dtype: torch.dtype) -> None:
    shown = view(torch.zeros(5, 30, 20, dtype=dtype))
    assert shown.shape == (5, 8, 12) and shown.dtype == dtype


@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_changes_pictures_of_one_and_three_channels(channels: int) -> None:
    view = FinetuneView((32, 32), (1.0, 1.0), False, "rand-m9-mstd0.5-inc1", (120, 110, 100)[:channels])
    image = photo(32, 32, channels)
    torch.manual_seed(0)
    shown = [view(image) for _ in range(60)]
    assert all(one.shape == image.shape and one.dtype == torch.uint8 for one in shown)
    assert sum(not torch.equal(one, image) for one in shown) > 30


def test_the_strongest_posterize_keeps_a_bit() -> None:
    """timm asks for 0 bits at full magnitude, which Pillow 13 refuses: it would end a run after some hundred images."""
    view = FinetuneView((32, 32), (1.0, 1.0), False, "rand-m10-n2-p1-inc1")
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    for _ in range(60):
        assert view(photo(32, 32)).shape == (3, 32, 32)


@pytest.mark.parametrize("text", ["rand-m9-zz1", "augmix", "rand-mx", "rand-nx-m9", "-", "rand-m", "m9", "rand-m9-w7"])
def test_a_wrong_randaugment_string_is_refused_at_once(text: str) -> None:
    with pytest.raises(MaekitError, match="--auto-augment none") as caught:
        FinetuneView((32, 32), auto_augment=text)
    assert caught.value.code == "E-CONFIG-AUGMENT"


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_randaugment_of_other_channels_is_refused_at_once(channels: int) -> None:
    with pytest.raises(MaekitError, match=f"{channels} channels") as caught:
        FinetuneView((32, 32), auto_augment="rand-m9", fill=(0,) * channels)
    assert caught.value.code == "E-CONFIG-AUGMENT"
    assert FinetuneView((32, 32), fill=(0,) * channels)(torch.zeros(channels, 9, 9)).shape == (channels, 32, 32)


def test_five_crops_are_torchvisions_with_the_centre_that_evaluation_sees_first() -> None:
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    crops = CropsView((28, 28), 0.875)(image)
    assert crops.shape == (5, 3, 28, 28) and torch.equal(crops[0], EvalView((28, 28), 0.875)(image))
    whole = resize_to_cover(image, (28, 28), 0.875)
    assert whole.shape == (3, 32, 40)
    assert torch.equal(crops[1], whole[:, :28, :28]) and torch.equal(crops[4], whole[:, -28:, -28:])


def test_colour_jitter_changes_colours_within_its_share_and_follows_the_seed() -> None:
    image = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    view = FinetuneView((8, 8), (1.0, 1.0), flip=False, color_jitter=0.4)
    seen = []
    for seed in (0, 0, 1):
        seed_cpu(seed)
        seen.append(view(image))
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    assert all(int(one.min()) >= 58 and int(one.max()) <= 142 for one in seen)


def test_colour_jitter_wants_pictures() -> None:
    with pytest.raises(MaekitError, match="color_jitter"):
        FinetuneView((8, 8), fill=(0,) * 5, color_jitter=0.4)


@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_on_tensors_is_torchvisions(channels: int) -> None:
    image = photo(24, 24, channels)
    view = FinetuneView((24, 24), (1.0, 1.0), flip=False, auto_augment="tensor-m9-n2", fill=(7,) * channels)
    theirs = v2.RandAugment(2, 9, 11, InterpolationMode.BILINEAR, fill=[7.0] * channels)
    seen = []
    for seed in range(12):
        seed_cpu(seed)
        seen.append(pickle.loads(pickle.dumps(view))(image))
        seed_cpu(seed)
        assert torch.equal(seen[-1], theirs(image)) and seen[-1].dtype == torch.uint8
    assert sum(not torch.equal(one, image) for one in seen) > 6
