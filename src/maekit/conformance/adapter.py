"""What a model must answer to be audited: four methods, and as many of the optional ones as it has.

B batch, C channels, H W pixels, P patch side, N patches, K kept patches, D token width, T tokens with prefix.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn


class Adapter(Protocol):
    """Four methods around a model with square patches on a square grid; see docs/audit.md for one that runs."""

    def build(self, seed: int) -> nn.Module:
        """Return a model with freshly drawn weights, float32, on the CPU. torch is seeded with `seed` already."""
        ...

    def tensors(self, model: Any) -> Mapping[str, Tensor]:
        """Return the live tensors of `model` under the names of the official layout (official models_mae.py).

        ``cls_token`` (1, 1, D), ``pos_embed`` (1, 1 + N, D), ``patch_embed.proj.weight`` (D, C, P, P) and ``.bias``,
        ``blocks.I.norm1|attn.qkv|attn.proj|norm2|mlp.fc1|mlp.fc2`` with ``.weight`` and ``.bias`` (split projections
        concatenated), ``norm.*``, ``decoder_embed.*``, ``mask_token``, ``decoder_pos_embed``, ``decoder_blocks.I.*``,
        ``decoder_norm.*``, ``decoder_pred.*``. What a model does not have is left out.
        """
        ...

    def forward(self, model: Any, images: Tensor, noise: Tensor, mask_ratio: float) -> Mapping[str, Tensor]:
        """Run a training pass with the mask that `noise` decides.

        Args:
            model: in train mode.
            images: (B, C, H, W).
            noise: (B, N); in each row the lowest are kept.
            mask_ratio: share of patches removed.

        Returns:
            ``loss`` scalar, ``pred`` (B, N, P*P*C) in image order, ``mask`` (B, N) True or 1 = removed, ``latent``
            (B, 1 + K, D), and ``ids_keep`` (B, K), the place of each kept patch in the order of the latent, or
            ``ids_restore`` (B, N), the place of each patch in the order of the noise.
        """
        ...

    def features(self, model: Any, images: Tensor) -> Tensor:
        """Return what users take as features, all tokens (B, 1 + N, D), of a model in eval mode."""
        ...


OPTIONAL: dict[str, str] = {
    "masks": "(model, number, mask_ratio) -> bool (number, N): masks as training draws them, without a pass",
    "published": "() -> {'B' | 'L' | 'H': model on the meta device}: the paper's three models",
    "pretrain_groups": "(model) -> optimizer groups of pre-training: dicts with params, weight_decay",
    "pretrain_lr": "(step, total, warmup, peak) -> learning rate of update number step in pre-training",
    "peak_lr": "(base_lr, batch_size) -> peak learning rate for a global batch",
    "update": "(model, images, noise, micro_batch) -> None: one optimizer update in place, in parts of micro_batch",
    "settings": "() -> {name: value}: defaults of pre-training, names as in `maekit pretrain --help`",
    "finetune_settings": "() -> {name: value}: the same for fine-tuning",
    "classifier": "(model, num_classes) -> module to fine-tune: mean pooling, drop path .1",
    "finetune_groups": "(classifier) -> optimizer groups: dicts with params, weight_decay, lr_scale (layer decay .65)",
    "pretrain_view": "(image (3, H, W)) -> (3, 224, 224): random crop and mirror of pre-training",
    "eval_view": "(uint8 image (3, H, W)) -> uint8 (3, 224, 224): resize and crop of evaluation",
    "probe_head": "(dim, num_classes) -> module: head of the linear probe",
    "probe_decay": "(head) -> weight decays of the probe's optimizer groups",
    "resample": "(table (1, 1 + N, Dd), old side, new side) -> decoder positions for another grid",
    "saved_names": "(model, folder) -> names of the tensors that saving writes, and those that the hub's files have",
}
"""Methods beyond the four, each with its signature; a check whose method is missing is reported as not shown."""


class Recipe(Protocol):
    """Signatures of the optional methods, for type checkers; see `OPTIONAL`."""

    def masks(self, model: Any, number: int, mask_ratio: float) -> Tensor: ...
    def published(self) -> Mapping[str, nn.Module]: ...
    def pretrain_groups(self, model: Any) -> list[dict[str, Any]]: ...
    def pretrain_lr(self, step: int, total: int, warmup: int, peak: float) -> float: ...
    def peak_lr(self, base_lr: float, batch_size: int) -> float: ...
    def update(self, model: Any, images: Tensor, noise: Tensor, micro_batch: int) -> None: ...
    def settings(self) -> Mapping[str, object]: ...
    def finetune_settings(self) -> Mapping[str, object]: ...
    def classifier(self, model: Any, num_classes: int) -> nn.Module: ...
    def finetune_groups(self, classifier: Any) -> list[dict[str, Any]]: ...
    def pretrain_view(self, image: Tensor) -> Tensor: ...
    def eval_view(self, image: Tensor) -> Tensor: ...
    def probe_head(self, dim: int, num_classes: int) -> nn.Module: ...
    def probe_decay(self, head: Any) -> list[float]: ...
    def resample(self, table: Tensor, old: int, new: int) -> Tensor: ...
    def saved_names(self, model: Any, folder: Path) -> tuple[set[str], set[str]]: ...
