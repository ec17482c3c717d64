"""Those who train: maekit as its own loop does, and peers of the same sizes as they are installed.

Each is a model, an AdamW and a step (forward, backward, update) on the same images in the same precision. A peer is
given its library's fastest attention.
"""

import contextlib
import time
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, TypeVar

import timm
import torch
from torch import Tensor, nn

from maekit.bench.machine import wait
from maekit.conformance.peers import needed
from maekit.errors import MaekitError
from maekit.model.mae import MaskedAutoencoder
from maekit.model.variant import PAPER
from maekit.train.optim import adamw, pretrain_groups
from maekit.train.precision import autocast, resolve_precision

K = TypeVar("K", bound=Hashable)
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass
class Contender:
    """Someone who trains.

    Attributes:
        name: whom a table shows.
        model: in train mode, on the device.
        loss: of images (B, C, H, W).
        precision: "fp32" | "bf16" | "fp16".
        own: maekit's own context of a precision; a peer's is torch's autocast.
        keep_casts: of maekit's own context, as its loop has it.
        trains: False: forward passes only.
    """

    name: str
    model: nn.Module
    loss: Callable[[Tensor], Tensor]
    precision: str
    own: bool = False
    keep_casts: bool = True
    trains: bool = True
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = adamw(pretrain_groups(self.model, 0.05), betas=(0.9, 0.95), lr=1e-4)

    def context(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a forward pass."""
        if self.own:
            return autocast(self.precision, device, keep_casts=self.keep_casts)
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(device.type, kind) if kind else contextlib.nullcontext()

    def step(self, images: Tensor) -> None:
        """Train once."""
        if not self.trains:
            with torch.no_grad(), self.context(images.device):
                self.loss(images)
            return
        with self.context(images.device):
            loss = self.loss(images)
            if self.own:  # as in maekit's loop: what is computed anew while going backward is computed alike
                loss.backward()
        if not self.own:
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def seconds(self, images: Tensor) -> float:
        """Train once and return how long it took."""
        wait(images.device)
        began = time.perf_counter()
        self.step(images)
        wait(images.device)
        return time.perf_counter() - began


def ours(model: MaskedAutoencoder, mask_ratio: float, precision: str, *, compiled: bool) -> Contender:
    """Return maekit in training; masks come with the batch, as from the loader."""
    generator = torch.Generator().manual_seed(0)

    def loss(images: Tensor) -> Tensor:
        noise = torch.rand(len(images), model.num_patches, generator=generator).to(images.device)
        return made(images, noise, mask_ratio)

    made: Any = torch.compile(model.loss, dynamic=False) if compiled else model.loss
    keep = not (model.encoder.grad_checkpointing or model.decoder.checkpointing)  # as in training
    return Contender("maekit", model.train(), loss, precision, own=True, keep_casts=keep)


def turns(runs: Mapping[K, Callable[[], float]], rounds: int) -> dict[K, list[float]]:
    """Return the seconds that each run gives, taken in turns; who begins changes every time, and a first time warms up.

    Args:
        runs: each does something once and returns the seconds that it took.
        rounds: that count.
    """
    times: dict[K, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in runs if number % 2 else reversed([*runs]):
            seconds = runs[name]()
            if number:
                times[name].append(seconds)
    return times


def peer(name: str, ours: MaskedAutoencoder, mask_ratio: float, precision: str, device: torch.device) -> Contender:
    """Build a peer of the same sizes.

    Args:
        name: of the peer; with a colon and a precision after it, that one: "transformers:fp32" is what it does where
            nothing is said.
        precision: where the name has none.

    Raises:
        MaekitError: E-CONFIG-PEER for an unknown one, or one that has no model like this; E-ENV-IMPORT if it is not
            installed; E-ENV-PRECISION.
    """
    model, loss, precision = _built(name, ours, mask_ratio, precision, device)
    return Contender(name, model.to(device).train(), loss, precision, trains=not name.startswith("timm-forward"))


def check_peer(name: str, ours: MaskedAutoencoder, mask_ratio: float, precision: str, device: torch.device) -> None:
    """Refuse what `peer` refuses; nothing comes to the device."""
    _built(name, ours, mask_ratio, precision, device)


def _built(
    name: str, ours: MaskedAutoencoder, mask_ratio: float, precision: str, device: torch.device
) -> tuple[nn.Module, Callable[[Tensor], Tensor], str]:
    """Return a peer's model in main memory, its loss and its precision; see `peer`."""
    builders = {"transformers": _transformers, "timm-forward": _timm_forward, "lightly": _lightly}
    who, colon, at = name.partition(":")
    if who not in builders or (colon and at not in PRECISIONS):
        expected = f"{', '.join(builders)}; with :{', :'.join(PRECISIONS)} for a precision of its own"
        raise MaekitError("E-CONFIG-PEER", "setting vs", found=name, expected=expected)
    precision = resolve_precision(at, device, ours.encoder.embed_dim) if at else precision
    return *builders[who](ours, mask_ratio), precision


def peer_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of peers' libraries, by peer."""
    return {who: version(who.partition("-")[0]) for who in (name.partition(":")[0] for name in names)}


def _plain(name: str, ours: MaskedAutoencoder) -> tuple[int, int]:
    """Return side and heads of a model that a peer knows, too.

    Raises:
        MaekitError: E-CONFIG-PEER.
    """
    odd = ours.img_size[0] != ours.img_size[1] or ours.variant != PAPER or ours.target not in ("pixel", "norm_pixel")
    if odd:
        raise MaekitError(
            "E-CONFIG-PEER", "setting vs", found=f"{name}, which has no such variant",
            expected="square images, the paper's default row, target pixel or norm_pixel",
        )  # fmt: skip
    return ours.img_size[0], ours.num_heads


def _transformers(ours: MaskedAutoencoder, mask_ratio: float) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Return its ViTMAEForPreTraining with sdpa."""
    side, heads = _plain("transformers", ours)
    library, decoder = needed("transformers", "transformers"), ours.decoder
    config = library.ViTMAEConfig(
        image_size=side, num_channels=ours.encoder.in_chans, patch_size=ours.patch, hidden_size=ours.encoder.embed_dim,
        num_hidden_layers=len(ours.encoder.blocks), num_attention_heads=heads,
        intermediate_size=4 * ours.encoder.embed_dim, decoder_hidden_size=decoder.embed.out_features,
        decoder_num_hidden_layers=decoder.depth, decoder_num_attention_heads=ours.spec["decoder_heads"],
        decoder_intermediate_size=4 * decoder.embed.out_features, mask_ratio=mask_ratio,
        norm_pix_loss=ours.target == "norm_pixel", attn_implementation="sdpa",
    )  # fmt: skip
    model = library.ViTMAEForPreTraining(config)
    return model, lambda images: model(images).loss


def _timm_forward(ours: MaskedAutoencoder, _: float) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Return a bare timm encoder that is run forward on whole images: a yardstick, no peer in training."""
    spec = {key: ours.spec[key] for key in ("patch_size", "in_chans", "embed_dim", "depth", "num_heads")}
    model = timm.create_model(ours.spec["name"], img_size=ours.img_size, num_classes=0, **spec)
    return model, model


def _lightly(ours: MaskedAutoencoder, mask_ratio: float) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Return lightly's parts, put together as its own benchmark of ViT-B/16 does."""
    side, _ = _plain("lightly", ours)
    modules = ("modules.masked_vision_transformer_timm", "modules.masked_autoencoder_timm", "utils")
    vits, decoders, tools = (needed(f"lightly.models.{name}", "lightly") for name in modules)
    spec = {key: ours.spec[key] for key in ("patch_size", "in_chans", "embed_dim", "depth", "num_heads")}
    vit = timm.create_model(ours.spec["name"], img_size=side, num_classes=0, **spec)
    encoder: Any = vits.MaskedVisionTransformerTIMM(vit=vit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its name is to change
        decoder: Any = decoders.MAEDecoderTIMM(
            num_patches=ours.num_patches, patch_size=ours.patch, in_chans=ours.encoder.in_chans,
            embed_dim=ours.encoder.embed_dim, decoder_embed_dim=ours.decoder.embed.out_features,
            decoder_depth=ours.decoder.depth, decoder_num_heads=ours.spec["decoder_heads"],
        )  # fmt: skip

    def loss(images: Tensor) -> Tensor:
        batch, length = len(images), encoder.sequence_length
        keep, removed = tools.random_token_mask((batch, length), mask_ratio=mask_ratio, device=images.device)
        latent = decoder.embed(encoder.encode(images, idx_keep=keep))
        tokens = tools.repeat_token(decoder.mask_token, (batch, length))
        tokens = tools.set_at_index(tokens, keep, latent.type_as(tokens))
        pred = decoder.predict(tools.get_at_index(decoder.decode(tokens), removed))
        target = tools.get_at_index(tools.patchify(images, ours.patch), removed - 1)
        if ours.target == "norm_pixel":
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return nn.functional.mse_loss(pred, target)

    return nn.ModuleDict({"encoder": encoder, "decoder": decoder}), loss
