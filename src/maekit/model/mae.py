"""The masked autoencoder of arXiv 2111.06377: encoder on visible patches, light decoder, loss on removed ones.

``forward`` gives everything a user may want to look at; ``loss`` is what training calls and predicts removed patches
only. Both give the same loss.
"""

from dataclasses import dataclass
from typing import Any, get_args

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maekit.errors import MaekitError
from maekit.model.decoder import Decoder, take
from maekit.model.encoder import create_encoder, encode
from maekit.model.masking import Masking, by_mask, by_noise, len_keep
from maekit.model.patches import patchify
from maekit.model.targets import Target, reconstruction_loss


@dataclass(frozen=True)
class Output:
    """What one masked pass gives.

    Attributes:
        loss: scalar, mean squared error over removed patches.
        pred: (B, N, P*P*C) in image order, in the target's units; at visible patches untrained.
        mask: (B, N) bool, True = removed.
        ids_restore: (B, N) where each patch went in the order of its noise.
        latent: (B, prefix + K, D) normalised encoder output, kept patches in the order of their noise.
    """

    loss: Tensor
    pred: Tensor
    mask: Tensor
    ids_restore: Tensor
    latent: Tensor


class MaskedAutoencoder(nn.Module):
    """Encoder, decoder, target and loss. Built by `create_model`.

    Attributes:
        encoder: a plain timm VisionTransformer.
        spec: keyword arguments of `create_model` that build this model again; plain JSON.
        mean: per channel, with which images were normalised; likewise `std`.
    """

    def __init__(self, encoder: VisionTransformer, decoder: Decoder, spec: dict[str, Any]) -> None:
        super().__init__()
        self.encoder, self.decoder, self.spec = encoder, decoder, spec
        self.target: Target = spec["target"]
        self.set_statistics(spec["mean"], spec["std"])

    def set_statistics(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Note the mean and deviation with which images are normalised: weights travel with them."""
        self.mean, self.std = tuple(mean), tuple(std)
        self.spec |= {"mean": list(mean), "std": list(std)}

    @property
    def grid(self) -> tuple[int, int]:
        """Return the patches per column and per row."""
        rows, columns = self.encoder.patch_embed.grid_size
        return rows, columns

    @property
    def patch(self) -> int:
        """Return the patch side P in pixels."""
        return self.encoder.patch_embed.patch_size[0]

    @property
    def img_size(self) -> tuple[int, int]:
        """Return height and width in pixels."""
        return self.grid[0] * self.patch, self.grid[1] * self.patch

    @property
    def num_patches(self) -> int:
        """Return N."""
        return self.grid[0] * self.grid[1]

    def forward(
        self,
        images: Tensor,
        mask_ratio: float = 0.75,
        *,
        noise: Tensor | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Output:
        """Mask, encode, decode and score normalised images (B, C, H, W).

        Args:
            images: normalised with `mean` and `std`.
            mask_ratio: share of patches removed; of no effect with `mask`.
            noise: (B, N), the patches of lowest noise stay.
            mask: (B, N) bool, True = removed, the same number in every row.
            generator: draws the noise, on its own device.

        Raises:
            MaekitError: E-CONFIG-SIZE, E-CONFIG-MASK.
        """
        patches = self._patches(images)
        masking = self._masking(patches, mask_ratio, noise, mask, generator)
        latent = encode(self.encoder, take(patches, masking.ids_keep), masking.ids_keep)
        pred = self.decoder(latent, masking)
        loss = reconstruction_loss(take(pred, masking.ids_masked), take(patches, masking.ids_masked), self.target)
        return Output(loss, pred, masking.mask, masking.ids_restore, latent)

    def loss(self, images: Tensor, noise: Tensor | None = None, *, mask_ratio: float = 0.75) -> Tensor:
        """Return the training loss: as `forward`, but only removed patches are predicted."""
        patches = self._patches(images)
        masking = self._masking(patches, mask_ratio, noise, None, None)
        latent = encode(self.encoder, take(patches, masking.ids_keep), masking.ids_keep)
        pred = self.decoder(latent, masking, masking.ids_masked)
        return reconstruction_loss(pred, take(patches, masking.ids_masked), self.target)

    def features(self, images: Tensor, pool: str = "mean") -> Tensor:
        """Encode whole images, nothing masked: (B, D), or (B, prefix + N, D) with pool "tokens".

        "mean" is over patch tokens, without class token and registers; all are normalised encoder output.

        Raises:
            MaekitError: E-CONFIG-POOL for another pool, or "cls" without a class token; E-CONFIG-SIZE.
        """
        tokens = encode(self.encoder, self._patches(images))
        if pool == "tokens":
            return tokens
        if pool == "mean":
            return tokens[:, self.encoder.num_prefix_tokens :].mean(1)
        if pool == "cls" and self.encoder.has_class_token:
            return tokens[:, 0]
        raise MaekitError("E-CONFIG-POOL", "setting pool", found=pool, expected="mean, tokens, or cls where there is a class token")

    def _patches(self, images: Tensor) -> Tensor:
        expected = (self.encoder.in_chans, *self.img_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise MaekitError("E-CONFIG-SIZE", "images", found=tuple(images.shape), expected=f"(B, {', '.join(map(str, expected))})")
        return patchify(images, self.patch)

    def _masking(
        self,
        patches: Tensor,
        mask_ratio: float,
        noise: Tensor | None,
        mask: Tensor | None,
        generator: torch.Generator | None,
    ) -> Masking:
        given = [value for value in (noise, mask, generator) if value is not None]
        if len(given) > 1:
            raise MaekitError("E-CONFIG-MASK", "noise, mask and generator", found=f"{len(given)} of them", expected="one at most")
        for value in (noise, mask):
            if value is not None and tuple(value.shape) != tuple(patches.shape[:2]):
                raise MaekitError("E-CONFIG-MASK", "noise or mask", found=tuple(value.shape), expected=f"{tuple(patches.shape[:2])}")
        if mask is not None:
            return by_mask(mask)
        if noise is None:
            where = patches.device if generator is None else generator.device
            noise = torch.rand(patches.shape[:2], generator=generator, device=where).to(patches.device)
        return by_noise(noise, len_keep(patches.shape[1], mask_ratio))


def create_model(
    name: str = "vit_base_patch16_224",
    *,
    img_size: int | tuple[int, int] = 224,
    patch_size: int | None = None,
    in_chans: int = 3,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    drop_path: float = 0.0,
    decoder_dim: int = 512,
    decoder_depth: int = 8,
    decoder_heads: int = 16,
    target: Target = "norm_pixel",
    mean: tuple[float, ...] | list[float] | None = None,
    std: tuple[float, ...] | list[float] | None = None,
) -> MaskedAutoencoder:
    """Build a masked autoencoder around any plain timm VisionTransformer, with the paper's initial weights.

    Args:
        name: timm's name; registers, no class token, any patch side are fine.
        img_size: side, or (height, width); multiples of the patch side.
        patch_size: P; like `embed_dim`, `depth` and `num_heads` it replaces the named model's own.
        in_chans: channels of the images.
        drop_path: stochastic depth of the encoder (the paper pre-trains without).
        decoder_dim: width; 512, 8 blocks and 16 heads are the paper's default row for every encoder.
        target: "norm_pixel" (each patch normalised by itself) or "pixel".
        mean: with which images will be normalised; default: ImageNet's for 3 channels, else .5; likewise `std`.

    Raises:
        MaekitError: E-CONFIG-MODEL, E-CONFIG-SIZE, E-CONFIG-TARGET.
    """
    if target not in get_args(Target):
        raise MaekitError("E-CONFIG-TARGET", "setting target", found=target, expected=" or ".join(get_args(Target)))
    size = (img_size, img_size) if isinstance(img_size, int) else (int(img_size[0]), int(img_size[1]))
    rgb = in_chans == 3
    spec: dict[str, Any] = {
        "name": name,
        "img_size": list(size),
        "patch_size": patch_size,
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "drop_path": drop_path,
        "decoder_dim": decoder_dim,
        "decoder_depth": decoder_depth,
        "decoder_heads": decoder_heads,
        "target": target,
        "mean": list(mean or (IMAGENET_DEFAULT_MEAN if rgb else (0.5,) * in_chans)),
        "std": list(std or (IMAGENET_DEFAULT_STD if rgb else (0.5,) * in_chans)),
    }
    shape = {key: spec[key] for key in ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "drop_path")}
    encoder = create_encoder(name, img_size=size, **shape)
    embed = encoder.patch_embed
    decoder = Decoder(
        encoder.embed_dim,
        (embed.grid_size[0], embed.grid_size[1]),
        encoder.num_prefix_tokens,
        embed.patch_size[0] ** 2 * in_chans,
        dim=decoder_dim,
        depth=decoder_depth,
        heads=decoder_heads,
    )
    return MaskedAutoencoder(encoder, decoder, spec)
