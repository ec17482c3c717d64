"""Views: one decoded image in, one image of the model's size out.

A view is a small picklable object that is called with a ``(C, H, W)`` tensor and returns a tensor of the same
type at ``size``. Views draw from the global random generators, which the loader seeds for every sample with
(seed, epoch, sample index): so torchvision's and timm's own transforms serve unchanged, and the result does not
depend on worker, rank or call order. Normalisation happens later, on the device (`maekit.data.loader`).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from timm.data.auto_augment import posterize, rand_augment_transform
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import ColorJitter, InterpolationMode, RandAugment
from torchvision.transforms.v2 import functional as F

from maekit.errors import MaekitError

ASPECT = (3 / 4, 4 / 3)
"""Aspect ratios of random crops: torchvision's RandomResizedCrop, which the official pre-training uses."""
LOG_ASPECT = tuple(torch.log(torch.tensor(ASPECT)).tolist())
MOST_DRAWS = 10
"""Boxes that are drawn until one fits the image: torchvision's RandomResizedCrop."""
MOST_PIXELS = 4
"""Times the pixels of the model's size up to which a box is left to the device: larger ones would cost more to hand
over than to resize, and torch's kernel for GPUs refuses to shrink by more than 47."""
RAND_AUGMENT = re.compile(r"rand(-(m|n|p|mstd|mmax|inc)\d+(\.\d+)?|-t[a-z0-9]+)*")
"""What timm reads of a RandAugment string: magnitude, number, probability, noise, limit, increasing; a set of names."""
TENSOR_AUGMENT = re.compile(r"tensor-m(\d|10)-n([1-9])")
"""torchvision's RandAugment on tensors, without a detour through Pillow: magnitude of 10, number of operations."""


def default_crop_pct(size: tuple[int, int]) -> float:
    """Return the part of the resized image that evaluation keeps.

    .875 at 224 px and 1 above (official fine-tuning); 1 below 112 px, where the set's images are already tight
    crops (CIFAR, Fashion-MNIST) and enlarging them only to cut the border off would lose pixels.
    """
    return 0.875 if 112 <= min(size) <= 224 else 1.0


def eval_view(image: Tensor, size: tuple[int, int], crop_pct: float = 1.0) -> Tensor:
    """Resize to cover ``size / crop_pct`` keeping the aspect, then cut the centre out.

    For 224 px and .875: resize the shorter side to 256, centre crop 224, both bicubic with antialiasing
    (official evaluation). `image` is (C, H, W), the result (C, *size), same dtype.
    """
    return F.center_crop(resize_to_cover(image, size, crop_pct), list(size))


def resize_to_cover(image: Tensor, size: tuple[int, int], crop_pct: float) -> Tensor:
    """Resize (C, H, W), keeping the aspect, to the smallest that covers ``size / crop_pct``."""
    height, width = image.shape[-2:]
    rows, columns = int(size[0] / crop_pct), int(size[1] / crop_pct)
    # whole numbers, rounded down: exactly the sides that torchvision's Resize gives
    tall = rows * width >= columns * height
    target = [rows, width * rows // height] if tall else [height * columns // width, columns]
    return resized(image, (target[0], target[1]))


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (C, H, W) to (C, *size), bicubic with antialiasing: the pixels of torchvision's `resize`, sooner.

    What lies in memory in (H, W, C) order, as decoders give it, stays so: reordered by torch it would take 1.4 times as
    long.
    """
    if image.shape[-2:] == size:
        return image
    images = image[None]
    if image.dtype == torch.uint8 and image.shape[0] > 1 and image.stride(0) == 1:  # without the gaps of a cut
        images = image.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)
    return interpolate(images, size, mode="bicubic", align_corners=False, antialias=True)[0]


def cut(image: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """Return a box (top, left, height, width) of (C, H, W)."""
    top, left, tall, wide = box
    return image[:, top : top + tall, left : left + wide]


def resized_crop(image: Tensor, box: tuple[int, int, int, int], size: tuple[int, int]) -> Tensor:
    """Cut a box (top, left, height, width) out of (C, H, W) and resize it to (C, *size)."""
    return resized(cut(image, box), size)


def left_to_device(image: Tensor, box: tuple[int, int, int, int], size: tuple[int, int]) -> Tensor:
    """Cut a box (top, left, height, width) out of (C, H, W); of more than `MOST_PIXELS` it is resized to (C, *size)."""
    few = box[2] * box[3] <= MOST_PIXELS * size[0] * size[1]
    return cut(image, box) if few else resized_crop(image, box, size)


def resized_boxes(
    pixels: Tensor, boxes: Sequence[tuple[int, int, int]], channels: int, size: tuple[int, int]
) -> Tensor:
    """Resize boxes of different sides, where their pixels lie: on a GPU without waiting for it.

    Computed in float32. 8-bit pixels are rounded after columns and again after rows, as by Pillow and `resized`,
    to the same levels but for one value in three hundred, which is off by one.

    Args:
        pixels: of one box after the other, each (height, width, C), in one dimension.
        boxes: of each height, width, and 1 if its pixels were of 8 bits, levels of 0 to 255, else 0.
        channels: C.
        size: of all results.

    Returns:
        (B, C, *size) float32; of 8-bit pixels in 0..1.
    """
    areas = [tall * wide * channels for tall, wide, _ in boxes]
    images = pixels.new_empty((len(boxes), channels, *size), dtype=torch.float32)
    for image, part, (tall, wide, in_levels) in zip(images, pixels.split(areas), boxes, strict=True):
        whole = part.view(tall, wide, channels).permute(2, 0, 1).float()
        if in_levels:
            whole = resized(whole, (tall, size[1])).clamp_(0, 255).round_()
        image.copy_(resized(whole, size))
    pictures = [images] if all(box[2] for box in boxes) else [images[i] for i, box in enumerate(boxes) if box[2]]
    for one in pictures:
        one.clamp_(0, 255).round_().div_(255)
    return images


def random_crop(image: Tensor, size: tuple[int, int], scale: tuple[float, float]) -> Tensor:
    """Cut a random box of `scale` of the area out and resize it to `size` (bicubic, antialiased).

    A scale of (1, 1) means the whole image, as `eval_view` shows it.
    """
    if scale == (1.0, 1.0):
        return eval_view(image, size)
    return resized_crop(image, random_box(image.shape[-2], image.shape[-1], scale), size)


def random_box(height: int, width: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """Draw top, left, height and width of a box, in pixels, as torchvision's RandomResizedCrop does.

    The same numbers from the same generator; its own function takes twice as long, which counts for small images.
    """
    area, drawn = height * width, torch.empty(1)
    for _ in range(MOST_DRAWS):
        wanted = area * drawn.uniform_(*scale).item()
        aspect = drawn.uniform_(*LOG_ASPECT).exp_().item()
        wide, tall = round(math.sqrt(wanted * aspect)), round(math.sqrt(wanted / aspect))
        if 0 < wide <= width and 0 < tall <= height:
            return _randint(height - tall), _randint(width - wide), tall, wide
    # the middle, as much of it as the aspects allow
    tall, wide = min(height, round(width / ASPECT[0])), min(width, round(height * ASPECT[1]))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def enough(size: tuple[int, int], scale: tuple[float, float]) -> tuple[int, int]:
    """Return height and width from which no random crop of `scale` has to be enlarged to `size`, except by rounding."""
    if scale == (1.0, 1.0):
        return size
    side = math.ceil(max(size) / math.sqrt(scale[0] * ASPECT[0]))  # by the smallest box in parts of the image
    return side, side


def fixed_crop(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut a box of fixed size out of the resized image, at a random place (paper table 1e, "crop, fixed size").

    224 px: out of one whose shorter side is 256, as is usual where only the place varies. Below 112 px, where images
    are resized to the model's size itself: out of one with a border of an eighth of the side, mirrored (32 px: 4 px,
    the usual augmentation of CIFAR).
    """
    pct = default_crop_pct(size)
    if pct == 1.0 and min(size) < 112:
        border = [max(1, size[1] // 8), max(1, size[0] // 8)]
        image = F.pad(resize_to_cover(image, size, 1.0), border, padding_mode="reflect")
    else:
        image = resize_to_cover(image, size, 0.875)
    top, left = (_randint(have - want) for have, want in zip(image.shape[-2:], size, strict=True))
    return F.crop(image, top, left, *size)


def clamped_crop(image: Tensor, size: tuple[int, int], scale: tuple[float, float]) -> Tensor:
    """Cut a random box of about `scale` of the area out and resize it to `size`, as the official linear probe does.

    In the manner of BYOL (arXiv 2006.07733, appendix B; official util/crop.py): area and log-uniform aspect are drawn
    once, a box longer than the image is cut to its side where `random_crop` would draw again, and it may lie anywhere.
    So long images are seen in wider boxes. A scale of (1, 1) means the whole image, as `eval_view` shows it.
    """
    if scale == (1.0, 1.0):
        return eval_view(image, size)
    return resized_crop(image, clamped_box(image.shape[-2], image.shape[-1], scale), size)


def clamped_box(height: int, width: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """Draw top, left, height and width of a box for `clamped_crop`, in pixels."""
    area = height * width * _uniform(*scale)
    aspect = math.exp(_uniform(*map(math.log, ASPECT)))
    tall = min(height, max(1, round(math.sqrt(area / aspect))))
    wide = min(width, max(1, round(math.sqrt(area * aspect))))
    return _randint(height - tall), _randint(width - wide), tall, wide


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), dtype=torch.double))


def _randint(most: int) -> int:
    """Draw a whole number from 0 to `most`."""
    return int(torch.randint(0, most + 1, ()).item())


def _mirrored(image: Tensor) -> Tensor:
    """Return the image or, half of the time, its mirror."""
    return image.flip(-1) if torch.rand(()).item() < 0.5 else image


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """Keep at least one bit: timm asks for none at full magnitude, which Pillow 13 refuses (before: a black image)."""
    return posterize(image, max(1, bits_to_keep))


@dataclass(frozen=True)
class EvalView:
    """What evaluation, features and reconstructions see: no randomness."""

    size: tuple[int, int]
    crop_pct: float

    def __call__(self, image: Tensor) -> Tensor:
        """Return (C, *size)."""
        return eval_view(image, self.size, self.crop_pct)


@dataclass(frozen=True)
class CropsView:
    """Five crops of one image: centre and corners of the resized one, of which `crop_pct` is kept on each side."""

    size: tuple[int, int]
    crop_pct: float

    def __call__(self, image: Tensor) -> Tensor:
        """Return (5, C, *size), the centre first, which is what `EvalView` shows."""
        image = resize_to_cover(image, self.size, self.crop_pct)
        *corners, centre = F.five_crop(image, list(self.size))
        return torch.stack([centre, *corners])


@dataclass(frozen=True)
class PretrainView:
    """Random resized crop and mirror (paper appendix A.1; scale .2 to 1, bicubic: official code).

    Attributes:
        crop: "random": size and place; "fixed": place only; "centre" (paper table 1e's arms, `fixed_crop`).
        color_jitter: brightness, contrast and saturation are multiplied by 1 - this to 1 + this.
        cut_only: a random crop is left as large as it was cut, for `resized_boxes`, up to `MOST_PIXELS`.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.2, 1.0)
    flip: bool = True
    crop: str = "random"
    color_jitter: float = 0.0
    cut_only: bool = False

    def __post_init__(self) -> None:
        assert not self.cut_only or self.crop == "random"

    @property
    def enough(self) -> tuple[int, int]:
        """Height and width that suffice of an image (`enough`)."""
        if self.crop == "random":
            return enough(self.size, self.scale)
        kept = 0.875 if self.crop == "fixed" else default_crop_pct(self.size)
        return math.ceil(self.size[0] / kept), math.ceil(self.size[1] / kept)

    def __call__(self, image: Tensor) -> Tensor:
        """Return (C, *size), or what is to be resized to it."""
        if self.cut_only:
            image = left_to_device(image, random_box(image.shape[-2], image.shape[-1], self.scale), self.size)
        elif self.crop == "random":
            image = random_crop(image, self.size, self.scale)
        elif self.crop == "fixed":
            image = fixed_crop(image, self.size)
        else:
            image = eval_view(image, self.size, default_crop_pct(self.size))
        image = _mirrored(image) if self.flip else image
        return ColorJitter(*(self.color_jitter,) * 3)(image) if self.color_jitter else image


@dataclass(frozen=True)
class ProbeView:
    """Clamped random crop and mirror (paper table 10; scale .08 to 1, bicubic: official main_linprobe.py)."""

    size: tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    flip: bool = True

    @property
    def enough(self) -> tuple[int, int]:
        """Height and width that suffice of an image (`enough`)."""
        return enough(self.size, self.scale)

    def __call__(self, image: Tensor) -> Tensor:
        """Return (C, *size)."""
        image = clamped_crop(image, self.size, self.scale)
        return _mirrored(image) if self.flip else image


@dataclass(frozen=True)
class FinetuneView:
    """Random resized crop, mirror, colour jitter and timm's RandAugment (paper table 9).

    Attributes:
        fill: colour (0-255 per channel) of what RandAugment shifts in from outside: the data's mean.
        color_jitter: brightness, contrast and saturation are multiplied by 1 - this to 1 + this.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    flip: bool = True
    auto_augment: str | None = None
    fill: tuple[int, ...] = (124, 116, 104)
    color_jitter: float = 0.0

    @property
    def enough(self) -> tuple[int, int]:
        """Height and width that suffice of an image (`enough`)."""
        return enough(self.size, self.scale)

    @cached_property
    def _augment(self) -> Any:
        if found := TENSOR_AUGMENT.fullmatch(self.auto_augment or ""):
            magnitude, number = map(int, found.groups())
            # eleven steps from 0 to torchvision's largest change, so that 9 means nine tenths of it as in timm
            return RandAugment(number, magnitude, 11, InterpolationMode.BILINEAR, fill=list(self.fill))
        # translate .45 of the side, as timm's own training does for these strings (method: official fine-tuning)
        translate = int(min(self.size) * 0.45)
        fill = self.fill if len(self.fill) == 3 else self.fill[0]
        augment = rand_augment_transform(self.auto_augment or "", {"translate_const": translate, "img_mean": fill})
        for op in augment.ops:
            if op.aug_fn is posterize:
                op.aug_fn = _posterize
        return augment

    def __call__(self, image: Tensor) -> Tensor:
        """Return (C, *size)."""
        image = random_crop(image, self.size, self.scale)
        image = _mirrored(image) if self.flip else image
        if self.color_jitter:
            image = ColorJitter(*(self.color_jitter,) * 3)(image)
        if self.auto_augment and isinstance(self._augment, RandAugment):
            image = self._augment(image)
        elif self.auto_augment:
            image = F.pil_to_tensor(self._augment(F.to_pil_image(image)))
        return image

    def __post_init__(self) -> None:
        for name, on, off in (("auto_augment", self.auto_augment, "none"), ("color_jitter", self.color_jitter, "0")):
            if on and len(self.fill) not in (1, 3):
                raise MaekitError(
                    "E-CONFIG-AUGMENT",
                    f"setting {name}",
                    found=f"images of {len(self.fill)} channels",
                    expected="1 or 3 channels: it works on pictures",
                    hint=f"--{name.replace('_', '-')} {off}",
                )
        if not self.auto_augment:
            return
        try:
            known = RAND_AUGMENT.fullmatch(self.auto_augment) or TENSOR_AUGMENT.fullmatch(self.auto_augment)
            assert known, "timm would pass over what it cannot read"
            _ = self._augment
        except (AssertionError, ValueError, KeyError) as error:
            raise MaekitError(
                "E-CONFIG-AUGMENT",
                "setting auto_augment",
                found=self.auto_augment,
                expected="a RandAugment string of timm, as rand-m9-mstd0.5-inc1, or tensor-m9-n2",
                hint="--auto-augment none",
            ) from error
