"""What a classifier says when part of the patches is gone or out of place.

Three ways, by one noise per patch as in pre-training, so that those removed at a smaller fraction are removed at every
larger one: the encoder runs on the other patches only (`drop`, which a Transformer can and a convolution cannot); their
pixels are black (`blacken`: PatchDrop of Naseer et al., arXiv 2105.10497); they change places (`shuffle`).

B batch, C channels, P patch side, N patches, K kept patches.
"""

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from maekit.model.encoder import encode
from maekit.model.masking import Masking, len_keep, random_masking
from maekit.model.patches import patchify, unpatchify


def drop(classifier: VisionTransformer, images: Tensor, noise: Tensor, fraction: float) -> Tensor:
    """Return logits (B, classes) of the patches that stay; the others are never computed.

    Args:
        classifier: with a head.
        images: (B, C, H, W), normalised.
        noise: (B, N); the highest go.
        fraction: of the patches, 0 up to below 1.

    Raises:
        MaekitError: E-CONFIG-MASK if none would stay.
    """
    ids = _masking(noise, fraction).ids_keep.sort(dim=1).values  # in image order: at fraction 0 the image itself
    patches = patchify(images, classifier.patch_embed.patch_size[0])
    kept = patches.gather(1, ids[:, :, None].expand(-1, -1, patches.shape[2]))
    return classifier.forward_head(encode(classifier, kept, ids))


def blacken(images: Tensor, noise: Tensor, fraction: float, patch: int, black: Tensor) -> Tensor:
    """Return images whose removed patches are `black` (C,), the value of a pixel 0 after normalisation.

    Raises:
        MaekitError: as `drop`.
    """
    patches = patchify(images, patch)
    mask = _masking(noise, fraction).mask[:, :, None]
    return _images(patches.where(~mask, black.repeat(patch * patch)), images, patch)


def shuffle(images: Tensor, noise: Tensor, fraction: float, patch: int) -> Tensor:
    """Return images in which a fraction of the patches changed places among themselves, each with another.

    Raises:
        MaekitError: as `drop`.
    """
    patches = patchify(images, patch)
    places = _masking(noise, fraction).ids_masked[:, :, None].expand(-1, -1, patches.shape[2])
    # the order of the noise is a random one, so the next in it is a random other
    return _images(patches.scatter(1, places, patches.gather(1, places).roll(1, 1)), images, patch)


def _masking(noise: Tensor, fraction: float) -> Masking:
    count = noise.shape[1]
    return random_masking(noise, len_keep(count, fraction) if fraction * count > 1e-6 else count)


def _images(patches: Tensor, like: Tensor, patch: int) -> Tensor:
    return unpatchify(patches, patch, (like.shape[2] // patch, like.shape[3] // patch))
