"""A classifier for use: pictures in, probabilities out, each picture seen exactly as ``maekit predict`` sees it."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maekit.data.augment import default_crop_pct, eval_view
from maekit.data.image import read_image
from maekit.data.source import DatasetSource, read_regular_file
from maekit.errors import MaekitError

Picture = str | Path | Image.Image | np.ndarray | Tensor
"""A file, a Pillow image, an array (H, W) or (H, W, C), a tensor (C, H, W); see `Classifier.forward`."""
PER_PASS = 64


class Classifier(nn.Module):
    """A fine-tuned model with what it needs to be used.

    Attributes:
        model: timm's, with head, in eval mode; takes normalised images and gives logits.
        classes: names in the order of the outputs: of classes, tags or numbers; empty if they had none.
        spec: of the autoencoder it came from: geometry, mean and std of the images.
        crop_pct: part of the resized image that it sees.
        task: what the outputs are: "classes": logits of a softmax; "multilabel": of a sigmoid each; "regression":
            numbers in the user's units.
    """

    def __init__(
        self, model: VisionTransformer, classes: list[str], spec: dict[str, Any], crop_pct: float | None = None,
        task: str = "classes",
    ) -> None:  # fmt: skip
        super().__init__()
        self.task = task
        self.model, self.classes, self.spec = model, classes, spec
        self.size = (int(spec["img_size"][0]), int(spec["img_size"][1]))
        self.crop_pct = crop_pct or default_crop_pct(self.size)

    @torch.no_grad()
    def forward(self, images: Picture | Sequence[Picture]) -> Tensor:
        """Return what each picture is, (B, outputs) float32 on the model's device, without gradient.

        Probabilities of all classes, which sum to 1; of tags, each for itself; or numbers in the units of the labels.
        Resizing, centre crop and normalisation are done here: pictures of any size come as they are.

        Args:
            images: a list of files, Pillow images, arrays (H, W[, C]) and tensors (C, H, W), mixed and of any sizes; or
                one tensor (B, C, H, W), one array (B, H, W, C). Arrays and tensors are uint8, or float32 within 0..1.
                One picture is a batch of one.

        Raises:
            MaekitError: E-DATA-IMAGE for what cannot be read, has another number of channels or values beyond 0..1;
                E-USAGE-IMAGES for none at all.
        """
        place = next(self.model.parameters())
        mean, std = (torch.tensor(self.spec[name], device=place.device).view(-1, 1, 1) for name in ("mean", "std"))
        views = (_unit(eval_view(image, self.size, self.crop_pct)) for image in self._pixels(_several(images)))
        found = []
        while some := list(itertools.islice(views, PER_PASS)):
            batch = (torch.stack(some).to(place.device) - mean) / std
            found.append(self.model(batch.to(place.dtype)).float())
        outputs = torch.cat(found)
        if self.task == "regression":
            return outputs
        return outputs.sigmoid() if self.task == "multilabel" else outputs.softmax(1)

    def _pixels(self, images: Sequence[Picture]) -> Iterator[Tensor]:
        """Yield (C, H, W), uint8 or float32."""
        channels = len(self.spec["mean"])
        others = DatasetSource(images, "images", channels)
        for at, image in enumerate(images):
            if isinstance(image, str | Path):
                try:
                    pixels = read_image(read_regular_file(str(image)), channels=channels, name=str(image))
                except OSError as error:
                    raise MaekitError("E-DATA-IMAGE", f"cannot read {image}", found=error.strerror or error) from error
            else:
                pixels = others.read(at)
            if len(pixels) != channels:
                raise MaekitError(
                    "E-DATA-IMAGE", f"image {at}", found=f"{len(pixels)} channels", expected=f"{channels}, as trained"
                )
            if pixels.dtype != torch.uint8 and not (pixels.min() >= 0 and pixels.max() <= 1):  # NaN too
                raise MaekitError(
                    "E-DATA-IMAGE", f"image {at}", found=f"values from {pixels.min():g} to {pixels.max():g}",
                    expected="uint8, or float32 within 0..1", hint="the image as it is: it is normalised here",
                )  # fmt: skip
            yield pixels


def _several(images: Any) -> Sequence[Picture]:
    """Return a batch of one where one picture was given.

    Raises:
        MaekitError: E-USAGE-IMAGES.
    """
    one = isinstance(images, str | Path | Image.Image) or (isinstance(images, np.ndarray | Tensor) and images.ndim < 4)
    images = [images] if one else images
    if len(images) == 0:
        raise MaekitError("E-USAGE-IMAGES", "no images", expected="one or more")
    return images


def _unit(view: Tensor) -> Tensor:
    """Return float32 within 0..1."""
    return view.float() / 255 if view.dtype == torch.uint8 else view
