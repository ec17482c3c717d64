"""Corruptions of ImageNet-C on any images, computed as they are loaded (Hendrycks and Dietterich, arXiv 1903.12261).

The 19 kinds at 5 severities come from the package imagecorruptions-imaug (Apache-2.0), an optional extra, which follows
the authors' code. As there, the image that the model would see is corrupted, after resizing and cropping, in 8 bits.
Two differences from the published files: those were resized with another filter and saved as JPEG, so numbers on them
and on images made here are near, not equal; ``--protocol in-c`` reads the published ones. The constants are meant
for 224 px: at other sizes the same ones apply, so runs compare at one size only.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from maekit.data.augment import eval_view
from maekit.errors import MaekitError

MIN_SIDE = 32
"""Pixels; the package corrupts no smaller image."""
SEEDED = ("impulse_noise", "glass_blur")
"""Kinds that draw from generators of their own, fresh from the system unless they are given a seed."""


@dataclass(frozen=True)
class CorruptedView:
    """What evaluation sees, corrupted; a function of the generators' state, which the loader seeds for each image.

    Attributes:
        kind: one of `maekit.scores.corruption.KINDS`.
        severity: 1 to 5.
    """

    size: tuple[int, int]
    crop_pct: float
    kind: str
    severity: int

    def __call__(self, image: Tensor) -> Tensor:
        """Return (C, *size), uint8."""
        return corrupt(eval_view(image, self.size, self.crop_pct), self.kind, self.severity)


def corrupt(image: Tensor, kind: str, severity: int) -> Tensor:
    """Corrupt one image (C, H, W), uint8, 3 channels or 1; draws from numpy's global generator.

    A grey image is corrupted as a colour one and turned grey again.

    Raises:
        MaekitError: E-ENV-IMPORT, E-DATA-IMAGE for what is no picture or too small.
    """
    check_pictures(image)
    pixels = np.ascontiguousarray(image.expand(3, -1, -1).permute(1, 2, 0).numpy())
    more = {"seed": int(np.random.randint(2**31))} if kind in SEEDED else {}
    apply = corruptions().corruption_dict[kind]
    with np.errstate(invalid="ignore"):
        found = np.asarray(apply(Image.fromarray(pixels), severity, **more))
    # spatter divides by its strongest drop: on a small image there may be none, and nothing is to be seen
    found = np.where(np.isnan(found), pixels, found).astype(np.uint8)
    colour = torch.from_numpy(found).permute(2, 0, 1).contiguous()
    return colour if len(image) == 3 else F.rgb_to_grayscale(colour)


def check_pictures(image: Tensor) -> None:
    """Refuse what cannot be corrupted.

    Raises:
        MaekitError: E-DATA-IMAGE.
    """
    channels, height, width = image.shape
    if image.dtype != torch.uint8 or channels not in (1, 3) or min(height, width) < MIN_SIDE:
        raise MaekitError(
            "E-DATA-IMAGE",
            "image to corrupt",
            found=f"{channels} channels of {height} x {width} {str(image.dtype).removeprefix('torch.')}",
            expected=f"a picture of 3 channels or 1, 8 bits, at least {MIN_SIDE} px wide and high",
            hint=f"a classifier of {MIN_SIDE} px or more; --protocol occlusion takes any",
        )


def corruptions() -> Any:
    """Return the package that corrupts.

    Raises:
        MaekitError: E-ENV-IMPORT.
    """
    try:
        return import_module("imagecorruptions")
    except ImportError as error:  # also a system library that OpenCV misses
        raise MaekitError(
            "E-ENV-IMPORT", "corruptions need an optional package", found=error, hint="pip install 'maekit[robust]'"
        ) from error
