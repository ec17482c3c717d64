"""What an implementation has to offer to be audited: four methods; everything else is optional.

B batch, C channels, H W pixels, P patch side, N patches, K kept patches, D token width, T tokens with prefix.
"""

import importlib
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from maekit.errors import MaekitError, clean

log = logging.getLogger("maekit")

METHODS = ("build", "tensors", "forward", "features")


class NotShown(Exception):
    """Raised where the implementation lacks the part that a check is about; the text says which."""


class Adapter(Protocol):
    """The four methods. Each may raise `NotShown` with the reason, where the implementation lacks the part."""

    def build(self, seed: int) -> nn.Module:
        """Return a freshly drawn model on the CPU, decided by `seed` alone. A small one is enough: two blocks."""
        ...

    def tensors(self, model: Any) -> Mapping[str, Tensor]:
        """Return the model's tensors under the names of the authors' files, live (no copies) wherever possible.

        cls_token, pos_embed, patch_embed.proj.weight and .bias,
        blocks.I.{norm1, attn.qkv, attn.proj, norm2, mlp.fc1, mlp.fc2}.{weight, bias}, norm.weight and .bias;
        decoder_embed.*, mask_token, decoder_pos_embed, decoder_blocks.I.* as above, decoder_norm.*, decoder_pred.*.
        A split qkv is concatenated. What the model has not is left out.
        """
        ...

    def forward(self, model: Any, images: Tensor, noise: Tensor | None, mask_ratio: float) -> Mapping[str, Any]:
        """Run the masked autoencoder.

        Args:
            model: from `build`.
            images: (B, C, H, W), normalised, in the type of the model's weights.
            noise: (B, N), the lowest stay; None: the model draws its own. A model that cannot be told ignores it.
            mask_ratio: share of patches removed.

        Returns:
            "loss" scalar, "pred" (B, N, P*P*C) in image order, "mask" (B, N) True or 1 = removed; and, where it can be
            had, "latent" (B, T, D) as the decoder was given it, and "ids_keep" (B, K) or "ids_restore" (B, N).
        """
        ...

    def features(self, model: Any, images: Tensor) -> Tensor:
        """Return what a user of the encoder gets for whole images: all tokens (B, T, D), prefix first."""
        ...


class Recipe(Protocol):
    """Optional attributes and methods; a check whose method is missing is "not shown"."""

    name: str
    """What is audited, for the head of the table."""
    version: str
    how: str
    """How it was built, in one line."""
    trained: bool
    """The weights come from a file: checks of fresh weights are left out."""
    heads: tuple[int, int]
    """Attention heads of encoder and decoder; otherwise they are found by trying."""
    grid: tuple[int, int]
    """Rows and columns of patches, where they are not a square."""

    def published(self, size: str) -> nn.Module:
        """Return the whole model of size "B", "L" or "H", on the meta device."""
        ...

    def resized(self, model: Any, grid: int) -> tuple[Tensor, Tensor]:
        """Return encoder and decoder positions (1, T, D) that the model uses for another, square grid of patches."""
        ...

    def saved_names(self, model: Any) -> tuple[set[str], set[str]]:
        """Return the names that its own saving writes, and those of the files it is meant to exchange."""
        ...

    def pretrain_optimizer(self, model: Any) -> Any:
        """Return the torch optimizer of pre-training; its groups carry "weight_decay"."""
        ...

    def learning_rate(self, step: int, *, steps: int, warmup: int, base_lr: float, batch: int) -> float:
        """Return the rate of update number `step` (from 0) of `steps`."""
        ...

    def train_epoch(self, module: Any, images: Tensor, optimizer: Any, *, batch: int, micro_batch: int) -> None:
        """Train one pass over `images` (n, C, H, W), ``module(images)`` being the mean loss of a micro-batch."""
        ...

    def finetune_model(self, model: Any, num_classes: int, drop_path: float) -> nn.Module:
        """Return the classifier that fine-tuning trains, mean-pooled."""
        ...

    def finetune_groups(self, classifier: Any, layer_decay: float) -> list[dict[str, Any]]:
        """Return its parameter groups with "weight_decay" and "lr_scale" (or "lr")."""
        ...

    def eval_view(self, image: Any) -> Tensor:
        """Return what evaluation at 224 px sees of a Pillow image: (C, 224, 224), values 0..255, not normalised."""
        ...

    def probe_head(self, dim: int, num_classes: int) -> nn.Module:
        """Return what linear probing trains on the features (B, dim)."""
        ...

    def probe_optimizer(self, head: Any) -> Any:
        """Return the torch optimizer of linear probing."""
        ...


class Pass(NamedTuple):
    """What `Adapter.forward` gave, in one form: mask is bool; latent, ids_keep and ids_restore may be None."""

    loss: Tensor
    pred: Tensor
    mask: Tensor
    latent: Tensor | None
    ids_keep: Tensor | None
    ids_restore: Tensor | None


def read_pass(given: Mapping[str, Any]) -> Pass:
    """Check and complete what an adapter's `forward` returned.

    Raises:
        MaekitError: E-USAGE-ADAPTER if loss, pred or mask is missing.
    """
    missing = [name for name in ("loss", "pred", "mask") if given.get(name) is None]
    if missing:
        raise MaekitError("E-USAGE-ADAPTER", "the adapter's forward", found=f"no {' and no '.join(missing)}")
    mask, ids_keep, ids_restore = given["mask"].bool(), given.get("ids_keep"), given.get("ids_restore")
    if ids_keep is None and ids_restore is not None and mask.device.type != "meta":
        ids_keep = ids_restore.argsort(1)[:, : int((~mask[0]).sum())]
    return Pass(given["loss"], given["pred"], mask, given.get("latent"), ids_keep, ids_restore)


def load_adapter(place: str) -> Adapter:
    """Import ``package.module:factory`` and call the factory. This runs the module's code, which is announced.

    Raises:
        MaekitError: E-USAGE-MODULE for a spelling, module or attribute that does not exist, E-ENV-IMPORT for a package
            that the module wants, E-USAGE-ADAPTER if one of the four methods is missing.
    """
    module_name, colon, attribute = place.partition(":")
    if not (module_name and colon and attribute):
        raise MaekitError("E-USAGE-MODULE", "setting module", found=place, expected="package.module:factory")
    log.warning("importing %s: this runs its code", clean(module_name))
    factory = getattr(_imported(module_name), attribute, None)
    if not callable(factory):
        raise MaekitError("E-USAGE-MODULE", f"module {module_name}", found=f"no function or class {attribute}",
                          expected="one that returns the adapter", hint="docs/audit.md")  # fmt: skip
    try:
        adapter: Any = factory()
    except SystemExit as error:  # a module of its own command line: its exit is not our verdict
        raise MaekitError(
            "E-USAGE-ADAPTER", f"adapter {clean(place)}", found="a call of exit", expected="an object with four methods"
        ) from error
    missing = [name for name in METHODS if not callable(getattr(adapter, name, None))]
    if missing:
        raise MaekitError(
            "E-USAGE-ADAPTER",
            f"adapter {clean(place)}",
            found=f"no {', no '.join(missing)}",
            expected="the methods build, tensors, forward, features",
            hint="docs/audit.md",
        )
    return adapter


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if missing == name or name.startswith(missing + "."):
            hint = "run where the module lies, or PYTHONPATH=FOLDER maekit doctor ..."
            raise MaekitError("E-USAGE-MODULE", "setting module", found=f"no module {missing}", hint=hint) from error
        what, hint = (
            f"package {missing}, which {name} imports, is not installed",
            f"pip install {missing.split('.')[0]}",
        )
        raise MaekitError("E-ENV-IMPORT", what, hint=hint) from error
