"""What a run costs before anything runs: multiplications by shape, and hours of a GPU at a stated utilisation.

Pure arithmetic on settings, so that ``maekit recipes`` needs no torch. `maekit.model.flops` counts the same from the
model itself; a test holds the two together. D width, T tokens; an image costs T * 12 * D**2 + 2 * T**2 * D a block.
"""

import math
import re
from typing import NamedTuple

from maekit.settings import Finetune, Pretrain

IMAGENET = 1_281_167
"""Training images of ImageNet-1K."""
GPU, GPU_FLOPS = "A100", 312e12
"""The GPU that hours are of, and its bf16 products a second (NVIDIA's data sheet)."""
MFU = 0.3
"""Share of them that are used: the paper's 15.4 h for ViT-L on 64 chips of 123 TFLOP/s (128 TPU-v3 cores) are 0.29."""

ENCODERS = {
    "vit_tiny": (192, 12),
    "vit_small": (384, 12),
    "vit_base": (768, 12),
    "vit_large": (1024, 24),
    "vit_huge": (1280, 32),
}
"""Width and blocks by timm's name (arXiv 2010.11929, table 1)."""


class Shape(NamedTuple):
    """What the cost of an encoder hangs on."""

    patches: int
    values: int
    width: int
    depth: int


def encoder_shape(settings: Pretrain | Finetune) -> Shape:
    """Return patches an image, values a patch, width and blocks."""
    assert settings.model is not None and settings.img_size is not None
    named = re.fullmatch(r"(vit_\w+?)_patch(\d+)_\d+", settings.model)
    assert named is not None, settings.model
    width, depth = ENCODERS[named[1]]
    patch = settings.patch_size or int(named[2])
    patches = math.prod(side // patch for side in settings.img_size)
    values = (settings.channels or 3) * patch**2
    return Shape(patches, values, settings.embed_dim or width, settings.depth or depth)


def blocks(tokens: int, width: int, depth: int) -> float:
    """Return the multiplications of Transformer blocks on one image."""
    return depth * (12.0 * tokens * width**2 + 2.0 * tokens**2 * width)


def encoder_macs(settings: Pretrain | Finetune) -> float:
    """Return the multiplications of the whole encoder on one whole image: what features and classifiers cost."""
    shape = encoder_shape(settings)
    return shape.patches * shape.values * shape.width + blocks(1 + shape.patches, shape.width, shape.depth)


def pretraining_macs(settings: Pretrain, vocabulary: int = 8192) -> tuple[float, float]:
    """Return the multiplications of encoder and decoder on one image of pre-training, forward.

    Args:
        settings: of the pre-training.
        vocabulary: codes of the tokenizer where the target is token.
    """
    shape = encoder_shape(settings)
    unit = settings.mask_unit**2
    kept = int(shape.patches // unit * (1 - settings.mask_ratio) + 1e-6) * unit
    kept = shape.patches if settings.mask_kind == "none" else kept
    seen = shape.patches if settings.encoder_mask_token else kept
    encoder = kept * shape.values * shape.width + blocks(1 + seen, shape.width, shape.depth)
    predicted = {"masked": shape.patches - kept, "visible": kept, "all": shape.patches}[settings.loss_on]
    predicted = shape.patches if settings.mask_kind == "none" else predicted
    outputs = {"pca": min(96, shape.values // 2), "token": vocabulary}.get(settings.target, shape.values)
    if settings.decoder_depth == 0:
        return encoder, float(predicted * shape.width * outputs)
    decoder = (1 + seen) * shape.width * settings.decoder_dim + predicted * settings.decoder_dim * outputs
    tokens = 1 + shape.patches
    decoder += blocks(tokens, settings.decoder_dim, settings.decoder_depth)
    if predicted < shape.patches:  # of its last block the others need no more than keys and values
        decoder -= (tokens - predicted) * (10.0 * settings.decoder_dim**2 + 2.0 * tokens * settings.decoder_dim)
    return encoder, decoder


def gpu_hours(macs: float, images: float, *, trained: bool = True) -> float:
    """Return hours of one `GPU` for so many images: two operations a product, three passes where it is trained."""
    return 2 * (3 if trained else 1) * macs * images / (GPU_FLOPS * MFU) / 3600
