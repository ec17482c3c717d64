"""The masked autoencoder: encoder, decoder, target and loss on masked patches (arXiv 2111.06377).

`forward` answers everything (prediction of all patches, mask, latent); `loss` is what training calls: it predicts and
normalises the masked patches only and gives the same number and gradients.

B batch, C channels, H W pixels, P patch side, N patches, K kept patches, M masked ones, D token width.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maekit.errors import MaekitError
from maekit.model.decoder import Decoder
from maekit.model.encoder import create_encoder, encode, geometry
from maekit.model.masking import Masking, draw_masking, given_masking, len_keep
from maekit.model.patches import patchify, resample_positions, select
from maekit.model.targets import TARGETS, Objective, Tokens, objective
from maekit.model.variant import PAPER, Variant

Statistics = Sequence[float]


class Output(NamedTuple):
    """What a forward pass gives.

    Attributes:
        loss: scalar, mean over the patches that count (by default those removed) of each one's loss.
        pred: (B, N, P*P*C) in image order, channel fastest; for "norm_pixel" in each patch's own units, for other
            targets their values.
        mask: (B, N) bool, True = removed.
        ids_restore: (B, N) place of each patch in the shuffled order.
        latent: (B, prefix + K, D), kept patches in shuffled order; of an encoder that runs on all places
            (B, prefix + N, D) in image order.
    """

    loss: Tensor
    pred: Tensor
    mask: Tensor
    ids_restore: Tensor
    latent: Tensor


class MaskedAutoencoder(nn.Module):
    """A timm encoder on visible patches and a light decoder that predicts the removed ones.

    Build one with `create_model`. Images handed in are already normalised with `mean` and `std`.

    Attributes:
        encoder: a plain timm VisionTransformer without head.
        decoder: names embed, mask_token, pos_embed, blocks, norm, pred.
        mask_token: (1, 1, D) of an encoder that runs on all places, else None.
        target: name of what is predicted.
        objective: makes that of images, and the loss of each patch.
        variant: departures from the paper's default row.
        spec: JSON-able arguments: ``create_model(**model.spec)`` builds the same architecture.
        mean: of each channel, in units of 0..1.
        std: of each channel, in units of 0..1.
        img_size: H, W in pixels.
        patch: side in pixels.
        grid: rows and columns of patches.
        num_patches: N.
    """

    mask_token: nn.Parameter | None

    def __init__(
        self, encoder: VisionTransformer, decoder: Decoder, goal: Objective, variant: Variant, spec: dict[str, Any]
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.variant, self.spec = encoder, decoder, variant, spec
        self.objective = goal
        self.target: str = spec["target"]
        self.register_parameter("mask_token", None)
        if variant.encoder_mask_token:
            self.mask_token = nn.Parameter(nn.init.normal_(torch.empty(1, 1, encoder.embed_dim), std=0.02))
        self.mean, self.std = tuple(spec["mean"]), tuple(spec["std"])
        self._tell_objective()
        embed = encoder.patch_embed
        assert embed.img_size is not None and embed.grid_size is not None
        self.img_size: tuple[int, int] = (embed.img_size[0], embed.img_size[1])
        self.grid: tuple[int, int] = (embed.grid_size[0], embed.grid_size[1])
        self.patch: int = embed.patch_size[0]
        self.num_patches = self.grid[0] * self.grid[1]

    @property
    def num_heads(self) -> int:
        """Attention heads of the encoder."""
        return self.spec["num_heads"] or geometry(self.spec["name"]).heads

    def forward(
        self,
        images: Tensor,
        mask_ratio: float = 0.75,
        *,
        noise: Tensor | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        seen: Tensor | None = None,
    ) -> Output:
        """Mask, encode what is left, predict every patch.

        Args:
            images: (B, C, H, W), normalised.
            mask_ratio: share of patches removed; not looked at when `mask` is given or nothing is ever removed.
            noise: (B, N) decides the mask: by default the lowest of each row stay, also where masks of the user's own
                are trained with. Default: drawn here.
            mask: (B, N) bool, True = removed, the same number in every row; in place of `noise`.
            generator: what the noise is drawn from; its device may differ from that of the images.
            seen: (B, C, H, W) what the encoder sees of the images; default: `corrupt` of them.

        Raises:
            MaekitError: E-DATA-SHAPE for images of another size, E-CONFIG-MASK for a ratio, noise or mask that
                cannot be used.
        """
        patches = self._patches(images)
        # without the user's masks: equal scores, so that the noise alone decides
        scores = images.new_zeros(len(images), self.num_patches) if self.variant.mask_kind == "given" else None
        masking, noise = self._masking(images, mask_ratio, noise, mask, generator, scores)
        seen = self.corrupt(images) if seen is None else seen
        latent = self._encode(patches if seen is images else self._patches(seen), masking)
        pred = self.decoder.predict(self.decoder(latent, masking.ids_keep))
        ids = self._scored(masking, noise)
        scored = self._predict(latent, masking, ids) if self.decoder.parts else select(pred, ids)
        return Output(self._loss(images, patches, ids, scored), pred, masking.mask, masking.ids_restore, latent)

    def loss(
        self, images: Tensor, noise: Tensor | None = None, mask_ratio: float = 0.75, scores: Tensor | None = None
    ) -> Tensor:
        """Return the loss that `forward` returns, without predicting what does not enter it.

        Args:
            images: (B, C, H, W), normalised.
            noise: (B, N), as in `forward`.
            mask_ratio: share of patches removed.
            scores: (B, N) of masks that are given, and only of these: the highest are removed.

        Raises:
            MaekitError: as `forward`.
        """
        patches = self._patches(images)
        masking, noise = self._masking(images, mask_ratio, noise, None, None, scores)
        seen = self.corrupt(images)
        latent = self._encode(patches if seen is images else self._patches(seen), masking)
        ids = self._scored(masking, noise)
        pred = self._predict(latent, masking, ids)
        return self._loss(images, patches, ids, pred)

    def corrupt(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return images (B, C, H, W) as the encoder is to see them: with the variant's noise on them, if it has any."""
        if not self.variant.add_noise:
            return images
        device = images.device if generator is None else generator.device
        noise = torch.randn(images.shape, generator=generator, device=device, dtype=images.dtype)
        return images + self.variant.add_noise * noise.to(images.device)

    def _encode(self, patches: Tensor, masking: Masking) -> Tensor:
        if self.variant.mask_kind == "none":  # all, in image order: nothing to select
            return encode(self.encoder, patches, masking.ids_keep)
        return encode(self.encoder, select(patches, masking.ids_keep), masking.ids_keep, self.mask_token)

    def _predict(self, latent: Tensor, masking: Masking, ids: Tensor) -> Tensor:
        return self.decoder.predict(self.decoder(latent, masking.ids_keep, ids))

    def _loss(self, images: Tensor, patches: Tensor, ids: Tensor, pred: Tensor) -> Tensor:
        """Return the mean over patches of each one's loss.

        The official ``(loss * mask).sum() / mask.sum()`` over the batch, as every row has the same number of them.
        """
        with torch.no_grad():
            target = self.objective(images, patches, ids)
        return self.objective.loss(pred, target).mean()

    def _scored(self, masking: Masking, noise: Tensor | None) -> Tensor:
        """Return the patches (B, M) whose error counts."""
        variant = self.variant
        if variant.loss_on != "masked":
            return masking.ids_shuffle if variant.loss_on == "all" else masking.ids_keep
        if variant.decode_ratio is None:
            return masking.ids_masked
        removed = masking.ids_masked
        count = self._decoded(removed.shape[1])
        if noise is None:  # of a mask that was given there is no noise to choose by: the first ones
            return removed[:, :count]
        # other digits of the noise than those that made the mask, so that each removed patch is as likely
        chance = (noise * 1024 % 1).gather(1, removed)
        return removed.gather(1, chance.argsort(dim=1, stable=True)[:, :count])

    def features(self, images: Tensor, pool: str = "mean") -> Tensor:
        """Run the whole encoder on whole images; never masks.

        Args:
            images: (B, C, H, W), normalised.
            pool: "mean" of patch tokens (B, D) | "cls" class token (B, D) | "tokens" all, prefix first (B, T, D).

        Raises:
            MaekitError: E-CONFIG-POOL for an unknown pool or a class token that is not there, E-DATA-SHAPE.
        """
        return self.layer_features(images, [(len(self.encoder.blocks), pool)])[0]

    def layer_features(self, images: Tensor, wanted: Sequence[tuple[int, str]]) -> list[Tensor]:
        """Run the encoder once and return pooled features of several blocks; never masks.

        The encoder's final norm is applied after each block, as timm's ``forward_intermediates(norm=True)`` does, so
        the last block's are those of `features`.

        Args:
            images: (B, C, H, W), normalised.
            wanted: (block, pool) of each: blocks count from 1; "mean" | "cls", "tokens" all of them.

        Raises:
            MaekitError: as `features`.
        """
        self._check_images(images)
        encoder, depth = self.encoder, len(self.encoder.blocks)
        for _, pool in wanted:
            check_pool(encoder, pool, also=("tokens",))
        layers = sorted({layer for layer, _ in wanted})
        assert layers and all(1 <= layer <= depth for layer in layers), layers
        if layers == [depth]:
            tokens = encoder.forward_features(images)
            return [pool_tokens(encoder, tokens, pool) for _, pool in wanted]
        found: Any = encoder.forward_intermediates(
            images,
            indices=[layer - 1 for layer in layers],
            return_prefix_tokens=True,
            norm=True,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        by_layer = dict(zip(layers, found, strict=True))
        return [_pool_parts(by_layer[layer], pool) for layer, pool in wanted]

    def set_statistics(self, mean: Statistics, std: Statistics) -> None:
        """Say what images are normalised with; kept in `spec` and so in saved weights.

        Raises:
            MaekitError: E-CONFIG-STATS if there is not one finite mean and one positive std for each channel.
        """
        self.mean, self.std = _statistics(mean, std, self.encoder.in_chans)
        self.spec |= {"mean": list(self.mean), "std": list(self.std)}
        self._tell_objective()

    def set_checkpointing(self, encoder: int = 1, decoder: int = 1) -> None:
        """Compute activations of blocks anew in the backward pass, to save memory.

        What enters so many blocks is kept, and the rest of them is computed again together; 0: all is kept.
        """
        self.encoder.set_grad_checkpointing(encoder)  # pyright: ignore[reportArgumentType]  # timm keeps what it is told
        self.decoder.checkpointing = decoder

    @property
    def checkpointing(self) -> tuple[int, int]:
        """Blocks of encoder and decoder that are computed anew together; 0: none."""
        return int(self.encoder.grad_checkpointing), self.decoder.checkpointing

    def _tell_objective(self) -> None:
        if isinstance(self.objective, Tokens):
            self.objective.mean, self.objective.std = self.mean, self.std

    def _patches(self, images: Tensor) -> Tensor:
        self._check_images(images)
        return patchify(images, self.patch)

    def _check_images(self, images: Tensor) -> None:
        expected = (self.encoder.in_chans, *self.img_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise MaekitError(
                "E-DATA-SHAPE",
                "argument images",
                found=f"shape {tuple(images.shape)}",
                expected=f"(B, {', '.join(map(str, expected))})",
            )

    def check_decode_ratio(self, mask_ratio: float) -> None:
        """Refuse a `decode_ratio` of more patches than a mask ratio removes, or of none.

        Raises:
            MaekitError: E-CONFIG-DECODER.
        """
        if self.variant.decode_ratio is not None:
            units = self.num_patches // self.variant.mask_unit**2
            self._decoded((units - len_keep(units, mask_ratio)) * self.variant.mask_unit**2)

    def _decoded(self, removed: int) -> int:
        """Return how many patches of an image are decoded in training, of so many removed ones."""
        count = int(self.num_patches * (self.variant.decode_ratio or 0) + 1e-6)
        if not 1 <= count <= removed:
            raise MaekitError(
                "E-CONFIG-DECODER", "setting decode_ratio", found=f"{self.variant.decode_ratio}: {count} patches",
                expected=f"1 to {removed}, the number removed",
                hint=f"a share from {1 / self.num_patches:.2g} to {removed / self.num_patches:.2g}",
            )  # fmt: skip
        return count

    def _masking(
        self,
        images: Tensor,
        mask_ratio: float,
        noise: Tensor | None,
        mask: Tensor | None,
        generator: torch.Generator | None,
        scores: Tensor | None = None,
    ) -> tuple[Masking, Tensor | None]:
        """Return the masks, and the noise where it decided on them."""
        shape = (images.shape[0], self.num_patches)
        for name, given in (("noise", noise), ("mask", mask), ("scores", scores)):
            if given is not None and tuple(given.shape) != shape:
                raise MaekitError(
                    "E-CONFIG-MASK", f"argument {name}", found=f"shape {tuple(given.shape)}", expected=f"{shape}"
                )
        if mask is not None and (mask.dtype != torch.bool or noise is not None):
            found = "together with noise" if noise is not None else f"dtype {mask.dtype}"
            raise MaekitError(
                "E-CONFIG-MASK", "argument mask", found=found, expected="bool, True = removed, and no noise"
            )
        if generator is not None and (mask is not None or noise is not None):
            given = "mask" if mask is not None else "noise"
            raise MaekitError("E-CONFIG-MASK", "argument generator", found=f"{given} as well", expected="one of them")
        kind, unit = self.variant.mask_kind, self.variant.mask_unit
        if mask is not None:
            if kind == "none":
                raise MaekitError("E-CONFIG-MASK", "argument mask", found="a mask", expected="none: mask_kind is none")
            return given_masking(mask.to(images.device)), None
        if kind == "none":
            everywhere = torch.arange(self.num_patches, device=images.device).expand(shape)
            return Masking(everywhere, self.num_patches), None
        if noise is None:
            device = images.device if generator is None else generator.device
            noise = torch.rand(shape, generator=generator, device=device)
        noise = noise.to(images.device)
        return draw_masking(kind, noise, self.grid, mask_ratio, unit, scores), noise


def create_model(
    name: str = "vit_base_patch16_224",
    *,
    img_size: int | Sequence[int] = 224,
    patch_size: int | None = None,
    in_chans: int = 3,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    drop_path: float = 0.0,
    decoder_dim: int = 512,
    decoder_depth: int = 8,
    decoder_heads: int = 16,
    target: str = "norm_pixel",
    target_spec: dict[str, Any] | None = None,
    variant: Variant | Mapping[str, Any] | None = None,
    mean: Statistics | None = None,
    std: Statistics | None = None,
) -> MaskedAutoencoder:
    """Build a masked autoencoder with freshly drawn weights; the defaults are the paper's ViT-B.

    Args:
        name: any plain timm VisionTransformer, with or without class token and registers.
        img_size: side in pixels, or H and W; multiples of the patch side.
        patch_size: side in pixels; None: the name's own, as for the other geometry of the encoder.
        in_chans: channels per image.
        embed_dim: encoder width, a multiple of 4.
        depth: encoder blocks.
        num_heads: encoder heads; must divide the width.
        drop_path: stochastic depth of the encoder (the paper uses none).
        decoder_dim: decoder width, a multiple of 4.
        decoder_depth: decoder blocks; 0: a linear head, for an encoder that runs on all places.
        decoder_heads: decoder heads; must divide the width.
        target: "norm_pixel" | "pixel" | "pca" | "token" | "low_pass" | "hog".
        target_spec: of the `PatchPCA` or tokenizer that "pca" and "token" need; its tensors are then to be loaded into
            ``model.objective``.
        variant: departures from the paper's default row, as a `Variant` or by name.
        mean: what images are normalised with, per channel in units of 0..1; None: ImageNet's for 3 channels, else .5.
        std: as `mean`.

    Raises:
        MaekitError: E-CONFIG-*, naming the argument.
    """
    size, variant = _image_size(img_size), Variant.of(variant)
    defaults = (
        (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if in_chans == 3 else ((0.5,) * in_chans, (0.5,) * in_chans)
    )
    encoder = create_encoder(
        name,
        img_size=size,
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        drop_path=drop_path,
        class_tokens=variant.class_tokens,
    )
    channel_mean, channel_std = _statistics(mean or defaults[0], std or defaults[1], in_chans)
    grid, patch = encoder.patch_embed.grid_size, encoder.patch_embed.patch_size[0]
    assert grid is not None
    if variant.positions == "learned":
        assert encoder.pos_embed is not None
        nn.init.normal_(encoder.pos_embed, std=0.02).requires_grad_(True)
    if target not in TARGETS:
        raise MaekitError(
            "E-CONFIG-TARGET", "setting target", found=target, expected=" | ".join(TARGETS), hint=_near(target, TARGETS)
        )
    goal = objective(target, channels=in_chans, patch=patch, grid=(grid[0], grid[1]), spec=target_spec)
    decoder = Decoder(
        encoder.embed_dim,
        decoder_dim,
        decoder_depth,
        decoder_heads,
        grid=(grid[0], grid[1]),
        num_prefix=encoder.num_prefix_tokens,
        num_values=goal.num_values,
        variant=variant,
    )
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
        "mean": list(channel_mean),
        "std": list(channel_std),
    }
    if target_spec is not None:
        spec["target_spec"] = target_spec
    if variant != PAPER:
        spec["variant"] = variant.departures()
    return MaskedAutoencoder(encoder, decoder, goal, variant, spec)


def at_size(model: MaskedAutoencoder, img_size: int | Sequence[int]) -> MaskedAutoencoder:
    """Return the same weights for images of another size; the encoder's positions are resampled (official fine-tuning).

    Args:
        model: stays as it is.
        img_size: side in pixels, or H and W; multiples of the patch side.

    Raises:
        MaekitError: E-CONFIG-SIZE.
    """
    spec: dict[str, Any] = {**model.spec, "img_size": list(_image_size(img_size))}
    other = create_model(**spec)
    weights = model.state_dict()
    weights["encoder.pos_embed"] = resample_positions(weights["encoder.pos_embed"], model.grid, other.grid)
    if model.variant.positions == "learned" and "decoder.pos_embed" in weights:
        weights["decoder.pos_embed"] = resample_positions(weights["decoder.pos_embed"], model.grid, other.grid)
    elif "decoder.pos_embed" in weights:
        weights["decoder.pos_embed"] = other.state_dict()["decoder.pos_embed"]
    other.load_state_dict(weights)
    return other.train(model.training)


def check_pool(encoder: VisionTransformer, pool: str, also: tuple[str, ...] = ()) -> None:
    """Refuse an unknown way of pooling, or a class token that the encoder does not have.

    Raises:
        MaekitError: E-CONFIG-POOL.
    """
    known = ("mean", "cls", *also)
    if pool not in known:
        raise MaekitError(
            "E-CONFIG-POOL", "setting pool", found=pool, expected=" | ".join(known), hint=_near(pool, known)
        )
    if pool == "cls" and not encoder.has_class_token:
        raise MaekitError(
            "E-CONFIG-POOL",
            "setting pool",
            found="cls, for an encoder without class token",
            expected="mean",
            hint="pool mean",
        )


def pool_tokens(encoder: VisionTransformer, tokens: Tensor, pool: str) -> Tensor:
    """Pool the encoder's tokens (B, T, D): "mean" of the patches' | "cls" (B, D) | "tokens", all as they are."""
    if pool == "tokens":
        return tokens
    return tokens[:, 0] if pool == "cls" else tokens[:, encoder.num_prefix_tokens :].mean(1)


def _pool_parts(parts: Tensor | tuple[Tensor, Tensor], pool: str) -> Tensor:
    """Pool one block's tokens as timm parts them: patches (B, N, D), and the prefix where there is one."""
    patches, prefix = parts if isinstance(parts, tuple) else (parts, None)
    if pool == "tokens":
        return patches if prefix is None else torch.cat([prefix, patches], dim=1)
    if pool == "mean" or prefix is None:
        return patches.mean(1)
    return prefix[:, 0]


def _image_size(img_size: int | Sequence[int]) -> tuple[int, int]:
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(sides) != 2:
        raise MaekitError("E-CONFIG-SIZE", "setting img_size", found=img_size, expected="a side, or height and width")
    return sides[0], sides[1]


def _statistics(mean: Statistics, std: Statistics, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean, std = tuple(map(float, mean)), tuple(map(float, std))
    finite = all(map(math.isfinite, (*mean, *std)))
    if len(mean) != channels or len(std) != channels or not finite or min(std) <= 0:
        raise MaekitError(
            "E-CONFIG-STATS",
            "mean and std of the images",
            found=f"{mean} and {std}",
            expected=f"{channels} finite means and {channels} positive deviations, one per channel",
        )
    return mean, std


def _near(word: str, known: Sequence[str]) -> str | None:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f"did you mean {near[0]!r}?" if near else None
