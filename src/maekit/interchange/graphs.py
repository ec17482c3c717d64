"""What an exported file computes: a model made ready to be recorded, its inputs and outputs, what the file says of it.

B batch, C channels, H W pixels, N patches, D token width.
"""

import copy
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call

from maekit import __version__
from maekit.errors import MaekitError
from maekit.model.mae import MaskedAutoencoder, check_pool, pool_tokens
from maekit.model.masking import len_keep
from maekit.model.patches import resample_positions

Model = MaskedAutoencoder | VisionTransformer
Size = tuple[int, int]


class Graph(NamedTuple):
    """A model made ready.

    Attributes:
        module: what is recorded: takes `inputs`, gives `outputs` in order.
        own: the same at the model's own image size, without resampled positions.
        inputs: names.
        outputs: names.
        channels: of the images.
        patch: side in pixels.
        grid: rows and columns of patches at the model's own size.
        any_size: whether images may have another size.
        facts: what the file says about itself, all text.
    """

    module: nn.Module
    own: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    channels: int
    patch: int
    grid: Size
    any_size: bool
    facts: dict[str, str]

    def sizes(self) -> list[Size]:
        """Return image sizes to try: the model's own; if open, one with fewer patches too, and last a larger one."""
        grids = [self.grid]
        if self.any_size:  # sides of the last differ from each other and from the own ones: nothing can be confused
            larger = max(self.grid) + 1
            grids += [(max(2, self.grid[0] // 2), max(2, self.grid[1] // 2)), (larger, larger + 1)]
        return [(rows * self.patch, columns * self.patch) for rows, columns in grids]

    def example(self, size: Size, batch: int) -> tuple[Tensor, ...]:
        """Draw inputs: images as if normalised, noise with many ties, which only a stable sort keeps in order."""
        generator = torch.Generator().manual_seed(batch)
        images = torch.randn(batch, self.channels, *size, generator=generator)
        if "noise" not in self.inputs:
            return (images,)
        num_patches = self.grid[0] * self.grid[1]
        return images, torch.randint(0, num_patches, (batch, num_patches), generator=generator) / num_patches

    def run(self, size: Size, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Run the model itself on images of its own size, the recorded module on others."""
        with torch.no_grad():
            given = (self.own if size == self.sizes()[0] else self.module)(*inputs)
        return [given] if isinstance(given, Tensor) else list(given)


class _Features(nn.Module):
    """An encoder and its pooling, or a classifier as it is (`pool` None)."""

    def __init__(self, encoder: VisionTransformer, pool: str | None) -> None:
        super().__init__()
        self.encoder, self.pool = encoder, pool

    def forward(self, images: Tensor) -> Tensor:
        if self.pool is None:
            return self.encoder(images)
        return pool_tokens(self.encoder, self.encoder.forward_features(images), self.pool)


class _AnySize(nn.Module):
    """The same with positions resampled to the images' grid; timm's own code runs, on other positions."""

    def __init__(self, inner: _Features, patch: int, grid: Size) -> None:
        super().__init__()
        self.inner, self.patch, self.grid = inner, patch, grid

    def forward(self, images: Tensor) -> Tensor:
        grid = (images.shape[2] // self.patch, images.shape[3] // self.patch)
        table = self.inner.encoder.pos_embed
        assert table is not None
        return functional_call(self.inner, {"encoder.pos_embed": resample_positions(table, self.grid, grid)}, (images,))


class _Autoencoder(nn.Module):
    """A whole autoencoder with noise as an input; gives a plain tuple."""

    def __init__(self, model: MaskedAutoencoder, mask_ratio: float) -> None:
        super().__init__()
        self.model, self.mask_ratio = model, mask_ratio

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model(images, self.mask_ratio, noise=noise))


def graph_of(
    model: Model,
    what: str,
    pool: str,
    dynamic_size: bool,
    mask_ratio: float,
    spec: dict[str, Any] | None,
    classes: Sequence[str] | None,
    task: str,
) -> Graph:
    """Make a model ready to be recorded; arguments and errors are those of `export_onnx`."""
    _check(model, what, dynamic_size, spec, classes)
    model = _ready(model)
    inputs, outputs = ("images",), ("features",)
    if isinstance(model, VisionTransformer):
        what, encoder, module = "classifier", model, _Features(model, None)
        outputs = ("numbers",) if task == "regression" else ("logits",)
        facts = {"pool": "mean" if model.global_pool == "avg" else "cls", "classes": list(classes or [])}
        facts |= {} if task == "classes" else {"task": task}
    elif what == "encoder":
        check_pool(model.encoder, pool, also=("tokens",))
        encoder, module, facts = model.encoder, _Features(model.encoder, pool), {"pool": pool}
    else:
        keep = len_keep(model.num_patches, mask_ratio)  # refuses what cannot be
        inputs, outputs = ("images", "noise"), ("loss", "pred", "mask", "ids_restore", "latent")
        encoder, module = model.encoder, _Autoencoder(model, mask_ratio)
        noise = f"float32 (batch, patches), uniform in 0..1: in each row the {keep} lowest stay"
        facts = {"mask_ratio": mask_ratio, "noise": noise}
    spec = model.spec if isinstance(model, MaskedAutoencoder) else spec
    assert spec is not None and encoder.patch_embed.grid_size is not None
    grid, patch = (
        (encoder.patch_embed.grid_size[0], encoder.patch_embed.grid_size[1]),
        encoder.patch_embed.patch_size[0],
    )
    encoder.patch_embed.strict_img_size = not dynamic_size
    return Graph(
        module=_AnySize(module, patch, grid) if dynamic_size and isinstance(module, _Features) else module,
        own=module,
        inputs=inputs,
        outputs=outputs,
        channels=encoder.in_chans,
        patch=patch,
        grid=grid,
        any_size=dynamic_size,
        facts=_facts(spec, what=what, patch=patch, any_size=dynamic_size, **facts),
    )


def _check(
    model: Model,
    what: str,
    dynamic_size: bool,
    spec: dict[str, Any] | None,
    classes: Sequence[str] | None,
) -> None:
    is_classifier, encoder = isinstance(model, VisionTransformer), _encoder(model)
    grid = encoder.patch_embed.grid_size
    assert grid is not None
    hint: str | None = None
    if what not in ("encoder", "autoencoder"):
        found, expected = what, "encoder | autoencoder"
    elif what == "autoencoder" and is_classifier:
        found, expected = "a fine-tuned classifier as autoencoder", "a masked autoencoder, with its decoder"
    elif what == "autoencoder" and dynamic_size:
        found = "an autoencoder of any image size"
        expected = "one size: masking, noise and the decoder's positions are those of its patches"
        hint = "the encoder with any size, or the autoencoder with its own"
    elif dynamic_size and min(grid) < 2:  # torch.export takes a length of one for a constant
        found = f"{grid[0]} x {grid[1]} patches, of any image size"
        expected = "at least two patches each way"
    elif is_classifier and (spec is None or encoder.num_classes < 1):
        found, expected = "a VisionTransformer without spec or head", "what load_classifier returns: model and spec"
    elif is_classifier and classes and len(classes) != encoder.num_classes:
        found, expected = f"{len(classes)} classes", f"{encoder.num_classes}, one for each output"
    else:
        return
    raise MaekitError("E-CONFIG-EXPORT", "export", found=found, expected=expected, hint=hint)


def _ready(model: Model) -> Model:
    """Return a copy in eval mode, float32 on the CPU; tensors that are so already are shared, not copied."""
    tensors = (*model.parameters(), *model.buffers())
    shared: dict[int, Any] = {id(t): t for t in tensors if t.device.type == "cpu" and t.dtype == torch.float32}
    ready = copy.deepcopy(model, shared).to("cpu", torch.float32).eval()
    _encoder(ready).set_grad_checkpointing(False)  # timm checkpoints in eval mode, too, and that cannot be recorded
    return ready


def _encoder(model: Model) -> VisionTransformer:
    return model if isinstance(model, VisionTransformer) else model.encoder


def _facts(spec: dict[str, Any], **more: Any) -> dict[str, str]:
    """Return what the file says about itself; text as it is, everything else as JSON."""
    facts = {
        "version": __version__,
        "images": "float32 (batch, channels, height, width); value / 255 (uint8), then (value - mean) / std",
        "mean": list(spec["mean"]),
        "std": list(spec["std"]),
        "spec": spec,
        **more,
    }
    return {f"maekit.{name}": v if isinstance(v, str) else json.dumps(v) for name, v in facts.items()}
