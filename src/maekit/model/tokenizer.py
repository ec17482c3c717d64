"""Discrete tokenizers: one code for each patch of an image, the target "token" (arXiv 2111.06377 section 4.1).

`VQTokenizer` is trained here: a small autoencoder whose bottleneck is a codebook (VQ-VAE, arXiv 1711.00937). Codes are
unit vectors of few dimensions, compared by cosine (ViT-VQGAN, arXiv 2110.04627 section 3.2), they follow the mean of
what they stand for (1711.00937 appendix A.1), and codes that nothing is near to are drawn anew from the batch (Jukebox,
arXiv 2005.00341 section 3.1). All that moves is in its state dict.

`DalleEncoder` has the architecture of DALL-E's dVAE encoder (arXiv 2102.12092 appendix A.2) under its published names;
its weights are the user's to bring.

Both answer ``codes(images)`` for images in 0..1, have ``vocabulary`` and ``grid``, and refuse another grid.

B batch, C channels, H W pixels, P patch side, N patches, V vocabulary, D code width.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maekit.errors import MaekitError

Pair = tuple[int, int]

WIDTH, BLOCKS, CODE_WIDTH = 96, 2, 16
"""Of the trained tokenizer: channels, residual blocks in encoder and in decoder, dimensions of a code."""
DECAY = 0.99
"""Of the running means that codes follow (arXiv 1711.00937 appendix A.1)."""
COMMITMENT = 0.25
"""Weight of the loss that keeps the encoder near its codes (arXiv 1711.00937 section 3.2)."""
DEAD = 0.05
"""A code that is used less than this share of the mean use is drawn anew."""
REVIVED = 0.25
"""What a code drawn anew counts as used, as a share of the mean use: if nothing takes it, it is dead in 160 steps."""


class Codebook(nn.Module):
    """Unit vectors that follow what they stand for.

    A pass notes what it used; `update`, once after each optimizer step, moves the codes. Between steps nothing is
    pending, so a checkpoint needs the three buffers only.

    Attributes:
        codes: (V, D), unit rows.
        counts: (V,) running mean of how often each is used in a step.
        sums: (V, D) running mean of what was given to each.
    """

    codes: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.register_buffer("codes", F.normalize(torch.randn(vocabulary, width), dim=1))
        self.register_buffer("counts", torch.zeros(vocabulary))
        self.register_buffer("sums", torch.zeros(vocabulary, width))
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []

    def nearest(self, vectors: Tensor) -> Tensor:
        """Return the code (n,) of least angle to each unit vector (n, D)."""
        return (vectors @ self.codes.T).argmax(1)

    @torch.no_grad()
    def note(self, vectors: Tensor, ids: Tensor) -> None:
        """Remember what a pass used until `update`: vectors (n, D) and their codes (n,)."""
        counts = torch.bincount(ids, minlength=len(self.codes)).to(vectors.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, ids, vectors)
        some = torch.randperm(len(vectors))[: len(self.codes)]  # on the CPU: the same draw for every device
        self._pending.append((counts, sums, vectors[some.to(vectors.device)]))

    def forget(self) -> None:
        """Forget what the passes of a step that broke off have noted."""
        self._pending.clear()

    @torch.no_grad()
    def update(self) -> None:
        """Move the codes by what the passes of a step have noted, and draw dead ones anew from these."""
        if not self._pending:
            return
        counts, sums, vectors = zip(*self._pending, strict=True)
        self._pending.clear()
        self.counts.lerp_(torch.stack(counts).sum(0), 1 - DECAY)
        self.sums.lerp_(torch.stack(sums).sum(0), 1 - DECAY)
        mean = self.counts.mean()
        dead = self.counts < DEAD * mean
        drawn = torch.cat(vectors)
        drawn = drawn[torch.arange(len(dead), device=dead.device) % len(drawn)]
        self.counts.copy_(torch.where(dead, REVIVED * mean, self.counts))
        self.sums.copy_(torch.where(dead[:, None], REVIVED * mean * drawn, self.sums))
        self.codes.copy_(F.normalize(self.sums, dim=1))


class Residual(nn.Module):
    """A 3 x 3 and a 1 x 1 convolution beside the identity, as in VQ-VAE (arXiv 1711.00937 section 4.1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(width, width // 2, 3, padding=1)
        self.narrow = nn.Conv2d(width // 2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, width, rows, columns)."""
        return x + self.narrow(F.relu(self.wide(F.relu(x))))


class VQEncoder(nn.Module):
    """Patches, then their neighbourhood, to one unit vector each."""

    def __init__(self, channels: int, patch: int, width: int, blocks: int, code_width: int) -> None:
        super().__init__()
        self.embed_dim = width
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(blocks)))
        self.to_code = nn.Conv2d(width, code_width, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return unit vectors (B, N, D) of normalised images (B, C, H, W), in float32."""
        x = self.to_code(F.relu(self.blocks(self.patches(images))))
        return F.normalize(x.float().flatten(2).transpose(1, 2), dim=2)


class VQDecoder(nn.Module):
    """The encoder backwards."""

    def __init__(self, channels: int, patch: int, width: int, blocks: int, code_width: int) -> None:
        super().__init__()
        self.from_code = nn.Conv2d(code_width, width, 1)
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(blocks)))
        self.patches = nn.ConvTranspose2d(width, channels, patch, stride=patch)

    def forward(self, vectors: Tensor, grid: Pair) -> Tensor:
        """Return normalised images (B, C, H, W) of vectors (B, N, D)."""
        x = vectors.transpose(1, 2).unflatten(2, grid)
        return self.patches(F.relu(self.blocks(self.from_code(x))))


def per_channel(values: Sequence[float], images: Tensor) -> Tensor:
    """Return values (C, 1, 1) for images (B, C, H, W), filled in on their device: a copy from the host would wait."""
    return torch.stack([images.new_full((1, 1), value) for value in values])


class VQTokenizer(nn.Module):
    """A discrete autoencoder whose grid of codes is that of the patches.

    Initial weights are a function of torch's seed. In train mode a pass notes what it used of the codebook: call
    ``codebook.update()`` after each optimizer step.

    Attributes:
        spec: JSON-able arguments, with "kind": ``create_tokenizer(tokenizer.spec)`` has the same shapes.
        vocabulary: V.
        grid: rows and columns of codes.
        num_patches: N.
        mean: of each channel, in units of 0..1.
        std: of each channel.
    """

    def __init__(
        self,
        vocabulary: int,
        img_size: Sequence[int],
        patch: int,
        channels: int,
        width: int = WIDTH,
        blocks: int = BLOCKS,
        code_width: int = CODE_WIDTH,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        height, across = img_size
        if height % patch or across % patch or vocabulary < 2:
            raise MaekitError(
                "E-CONFIG-TOKENIZER",
                "tokenizer",
                found=f"{vocabulary} codes for {height} x {across} pixels in patches of {patch}",
                expected="at least 2 codes, and patches that fill the image",
            )
        self.vocabulary, self.channels, self.img_size = vocabulary, channels, (height, across)
        self.grid: Pair = (height // patch, across // patch)
        self.num_patches = self.grid[0] * self.grid[1]
        self.spec: dict[str, Any] = {
            "kind": "vq", "vocabulary": vocabulary, "img_size": [height, across], "patch": patch, "channels": channels,
            "width": width, "blocks": blocks, "code_width": code_width,
        }  # fmt: skip
        self.encoder = VQEncoder(channels, patch, width, blocks, code_width)
        self.codebook = Codebook(vocabulary, code_width)
        self.decoder = VQDecoder(channels, patch, width, blocks, code_width)
        self.set_statistics(mean or (0.5,) * channels, std or (0.5,) * channels)

    def set_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Say what images are normalised with; kept in `spec`."""
        assert len(mean) == len(std) == self.channels and min(std) > 0
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self.spec |= {"mean": list(self.mean), "std": list(self.std)}

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return reconstruction (B, C, H, W), codes (B, N) and commitment loss of normalised images (B, C, H, W).

        Gradients pass the codebook as if it were not there (straight through, arXiv 1308.3432).
        """
        vectors = self.encoder(images)
        with torch.autocast(images.device.type, enabled=False):
            flat = vectors.detach().flatten(0, 1)
            ids = self.codebook.nearest(flat)
            nearest = self.codebook.codes[ids].view_as(vectors)
            if self.training and torch.is_grad_enabled():
                self.codebook.note(flat, ids)
            commitment = (vectors - nearest).square().sum(2).mean()
            passed = vectors + (nearest - vectors).detach()
        return self.decoder(passed, self.grid), ids.view(vectors.shape[:2]), commitment

    def loss(self, images: Tensor) -> Tensor:
        """Return squared error of the reconstruction plus commitment, a scalar, of normalised images."""
        reconstruction, _, commitment = self(images)
        return F.mse_loss(reconstruction.float(), images) + COMMITMENT * commitment

    @torch.no_grad()
    def codes(self, images: Tensor) -> Tensor:
        """Return the code (B, N) int64 of each patch of images (B, C, H, W) in 0..1, row by row over the grid.

        Images of another size than the tokenizer was trained for are resized.
        """
        with torch.autocast(images.device.type, enabled=False):
            images = _resized(_checked(images, self.channels), self.img_size)
            vectors = self.encoder((images - per_channel(self.mean, images)) / per_channel(self.std, images))
            return self.codebook.nearest(vectors.flatten(0, 1)).view(vectors.shape[:2])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Return the images (B, C, H, W) in 0..1 that codes (B, N) stand for."""
        pixels = self.decoder(self.codebook.codes[codes], self.grid).float()
        return (pixels * per_channel(self.std, pixels) + per_channel(self.mean, pixels)).clamp(0, 1)

    def at_grid(self, grid: Pair, channels: int) -> "VQTokenizer":
        """Return it, for images of such a grid and so many channels.

        Raises:
            MaekitError: E-CONFIG-TOKENIZER if it was trained for others.
        """
        _same_channels(self.channels, channels)
        if tuple(grid) != self.grid:
            raise MaekitError(
                "E-CONFIG-TOKENIZER",
                "grid of the tokenizer's codes",
                found=f"{self.grid[0]} x {self.grid[1]}",
                expected=f"{grid[0]} x {grid[1]}, as the patches",
                hint="maekit tokenizer with the img_size and patch_size of this run",
            )
        return self


class Conv(nn.Module):
    """A convolution with the published names of its weight and bias, padded to keep the size."""

    def __init__(self, inputs: int, outputs: int, side: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(outputs, inputs, side, side).normal_(0, 1 / math.sqrt(inputs * side * side)))
        self.b = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, outputs, H, W)."""
        return F.conv2d(x, self.w, self.b, padding=(self.w.shape[-1] - 1) // 2)


class Bottleneck(nn.Module):
    """Four convolutions beside the identity, weighed by 1 / layers² (arXiv 2102.12092 appendix A.2)."""

    def __init__(self, inputs: int, outputs: int, layers: int) -> None:
        super().__init__()
        hidden = outputs // 4
        self.gain = 1 / layers**2
        self.id_path = Conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        sizes = [(inputs, hidden, 3), (hidden, hidden, 3), (hidden, hidden, 3), (hidden, outputs, 1)]
        self.res_path = nn.ModuleDict({f"conv_{i + 1}": Conv(*size) for i, size in enumerate(sizes)})

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, outputs, H, W)."""
        rest = x
        for conv in self.res_path.values():
            rest = conv(F.relu(rest))
        return self.id_path(x) + self.gain * rest


class DalleEncoder(nn.Module):
    """The encoder of a dVAE as DALL-E's: groups of bottlenecks, halved in between; the likeliest code of each place.

    It has no grid of its own: `at_grid` says for which one images are resized, 8 pixels a code for four groups.

    Attributes:
        spec: JSON-able arguments, with "kind".
        vocabulary: V, 8192 of the published one.
        grid: rows and columns of codes; None until `at_grid`.
    """

    MARGIN = 0.1
    """Pixels are mapped into .1 to .9, where its logit-Laplace distribution lives (2102.12092 appendix A.3)."""

    def __init__(
        self,
        vocabulary: int = 8192,
        channels: int = 3,
        width: int = 256,
        groups: int = 4,
        blocks: int = 2,
        grid: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.vocabulary, self.channels, self.stride = vocabulary, channels, 2 ** (groups - 1)
        self.grid: Pair | None = None if grid is None else (grid[0], grid[1])
        self.spec: dict[str, Any] = {
            "kind": "dalle", "vocabulary": vocabulary, "channels": channels, "width": width, "groups": groups,
            "blocks": blocks, "grid": None if grid is None else list(grid),
        }  # fmt: skip
        self.blocks = nn.ModuleDict({"input": Conv(channels, width, 7)})
        before = width
        for group in range(groups):
            after = width * 2**group
            widths = [before] + [after] * blocks
            self.blocks[f"group_{group + 1}"] = nn.ModuleDict(
                {f"block_{i + 1}": Bottleneck(widths[i], after, groups * blocks) for i in range(blocks)}
            )
            before = after
        self.blocks["output"] = nn.ModuleDict({"conv": Conv(before, vocabulary, 1)})
        self.requires_grad_(False)

    @staticmethod
    def spec_of(tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Return the spec of weights under the published names, read off their shapes.

        Raises:
            MaekitError: E-CKPT-KEYS if they are not those of such an encoder.
        """
        first, last = tensors.get("blocks.input.w"), tensors.get("blocks.output.conv.w")
        groups = _count(tensors, "blocks.group_{}.block_1.res_path.conv_1.w")
        blocks = _count(tensors, "blocks.group_1.block_{}.res_path.conv_1.w")
        if first is None or last is None or first.ndim != 4 or last.ndim != 4 or not groups or not blocks:
            raise MaekitError(
                "E-CKPT-KEYS",
                "weights of a dVAE",
                found="other tensors than an encoder's",
                expected="blocks.input.w, blocks.group_1.block_1.res_path.conv_1.w ... blocks.output.conv.w",
            )
        return {
            "kind": "dalle", "vocabulary": last.shape[0], "channels": first.shape[1], "width": first.shape[0],
            "groups": groups, "blocks": blocks, "grid": None,
        }  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, V, H / stride, W / stride) of images (B, C, H, W) in 0..1."""
        x = self.blocks["input"]((1 - 2 * self.MARGIN) * images + self.MARGIN)
        groups = [cast(nn.ModuleDict, part) for name, part in self.blocks.items() if name.startswith("group_")]
        for number, group in enumerate(groups):
            x = F.max_pool2d(x, 2) if number else x
            for block in group.values():
                x = block(x)
        return cast(nn.ModuleDict, self.blocks["output"])["conv"](F.relu(x))

    @torch.no_grad()
    def codes(self, images: Tensor) -> Tensor:
        """Return the likeliest code (B, N) int64 of each place of images (B, C, H, W) in 0..1, resized for the grid."""
        assert self.grid is not None, "at_grid first"
        with torch.autocast(images.device.type, enabled=False):
            size = (self.grid[0] * self.stride, self.grid[1] * self.stride)
            return self(_resized(_checked(images, self.channels), size)).argmax(1).flatten(1)

    def at_grid(self, grid: Pair, channels: int) -> "DalleEncoder":
        """Return it, for images of such a grid and so many channels.

        Raises:
            MaekitError: E-CONFIG-TOKENIZER if it is made for other channels.
        """
        _same_channels(self.channels, channels)
        self.grid = (grid[0], grid[1])
        self.spec |= {"grid": list(self.grid)}
        return self


def create_tokenizer(spec: dict[str, Any]) -> VQTokenizer | DalleEncoder:
    """Build the tokenizer of a spec, with freshly drawn weights.

    Raises:
        MaekitError: E-CONFIG-TOKENIZER for an unknown kind.
    """
    kinds: dict[str, type[VQTokenizer | DalleEncoder]] = {"vq": VQTokenizer, "dalle": DalleEncoder}
    arguments = {name: value for name, value in spec.items() if name != "kind"}
    if spec.get("kind") not in kinds:
        raise MaekitError("E-CONFIG-TOKENIZER", "kind of tokenizer", found=spec.get("kind"), expected="vq | dalle")
    return kinds[spec["kind"]](**arguments)


def _checked(images: Tensor, channels: int) -> Tensor:
    if images.ndim != 4 or images.shape[1] != channels:
        raise MaekitError(
            "E-DATA-SHAPE",
            "images for the tokenizer",
            found=f"shape {tuple(images.shape)}",
            expected=f"(B, {channels}, H, W)",
        )
    return images.float()


def _resized(images: Tensor, size: Pair) -> Tensor:
    if tuple(images.shape[-2:]) == size:
        return images
    return F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def _same_channels(has: int, wanted: int) -> None:
    if has != wanted:
        raise MaekitError(
            "E-CONFIG-TOKENIZER",
            "channels of the tokenizer",
            found=has,
            expected=f"{wanted}, as the images",
            hint="maekit tokenizer on these images",
        )


def _count(tensors: dict[str, Tensor], name: str) -> int:
    """Return how many names there are with 1, 2, 3 ... in their gap."""
    count = 0
    while name.format(count + 1) in tensors:
        count += 1
    return count
