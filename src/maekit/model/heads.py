"""What sits on the encoder afterwards: a classifier to fine-tune, linear and attentive heads to probe with, numbers.

B batch, N patches, D token width.
"""

from typing import Any

from timm.layers.attention_pool import AttentionPoolLatent
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maekit.errors import MaekitError
from maekit.model.encoder import create_encoder
from maekit.model.mae import MaskedAutoencoder, check_pool


def classifier(
    model: MaskedAutoencoder,
    num_classes: int,
    *,
    pool: str = "mean",
    drop_path: float = 0.0,
    pretrained: bool = True,
) -> VisionTransformer:
    """Build a plain timm VisionTransformer with a head, of the encoder's geometry (method 3.5).

    With "mean" a new norm on the mean of patch tokens (``fc_norm``) takes the place of the final norm; with "cls" the
    final norm and the class token are used. Positions become trainable. The head starts nearly at zero: N(0, 2e-5)
    cut at two units, as in the official fine-tuning.

    Args:
        model: brings the geometry and, if `pretrained`, the weights.
        num_classes: outputs of the head.
        pool: "mean" | "cls".
        drop_path: stochastic depth of the last block, rising linearly from 0.
        pretrained: False: weights drawn anew as pre-training starts from (sin-cos positions too), so that arms of a
            comparison differ in pre-training alone.

    Raises:
        MaekitError: E-CONFIG-POOL, E-CONFIG-CLASSES for fewer than one class.
    """
    check_pool(model.encoder, pool)
    if num_classes < 1:
        raise MaekitError("E-CONFIG-CLASSES", "number of classes", found=num_classes, expected="at least 1")
    geometry: dict[str, Any] = {**encoder_spec(model.spec), "drop_path": drop_path}
    fresh = create_encoder(**geometry, num_classes=num_classes, pool=pool)
    if pretrained:
        _take_over(fresh, model.encoder.state_dict())
    assert fresh.pos_embed is not None and isinstance(fresh.head, nn.Linear)
    fresh.pos_embed.requires_grad_(True)
    nn.init.trunc_normal_(fresh.head.weight, std=2e-5)
    nn.init.zeros_(fresh.head.bias)
    return fresh


def freeze_below(model: VisionTransformer, blocks: float) -> None:
    """Train only the last `blocks` blocks, head and the norm under it (paper section 4.4, "partial fine-tuning").

    The rest is frozen: no gradients, and in eval mode, so that nothing in it is dropped. It stands below all that is
    trained, so no step keeps activations of it either. Call this after ``model.train()``.

    Args:
        model: a classifier.
        blocks: 0: none; 0.5: the MLP of the last block with its norm; as many as there are: all but the embeddings.

    Raises:
        MaekitError: E-CONFIG-BLOCKS.
    """
    depth = len(model.blocks)
    check_blocks(depth, blocks)
    trained = [*list(model.blocks)[depth - int(blocks) :], model.norm, model.fc_norm, model.head_drop, model.head]
    if blocks == 0.5:
        last = model.blocks[-1]
        trained += [last.norm2, last.mlp, last.ls2, last.drop_path2]
    model.requires_grad_(False).eval()
    for part in trained:
        part.requires_grad_(True).train()


def check_blocks(depth: int, blocks: float) -> None:
    """Refuse a number of last blocks that a model of `depth` blocks has not.

    Raises:
        MaekitError: E-CONFIG-BLOCKS.
    """
    if blocks != 0.5 and (blocks != int(blocks) or not 0 <= blocks <= depth):
        raise MaekitError(
            "E-CONFIG-BLOCKS", "setting tune_blocks", found=f"{blocks:g} of a model of {depth} blocks",
            expected=f"0, 0.5, 1 to {depth}, or all",
        )  # fmt: skip


def encoder_spec(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a model's ``spec`` that `create_encoder` takes."""
    names = ("name", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "drop_path")
    own = {"img_size": tuple(spec["img_size"]), **{name: spec[name] for name in names}}
    tokens = (spec.get("variant") or {}).get("class_tokens")
    return own if tokens is None else own | {"class_tokens": tokens}


def _take_over(classifier: VisionTransformer, weights: dict[str, Tensor]) -> None:
    """Copy an encoder's weights; what is new may only be the head and the norm under it."""
    theirs = {name: value for name, value in weights.items() if name in classifier.state_dict()}
    missing = classifier.load_state_dict(theirs, strict=False).missing_keys
    dropped = set(weights) - set(theirs)
    assert all(name.startswith(("head.", "fc_norm.")) for name in missing), missing
    assert all(name.startswith("norm.") for name in dropped), dropped


class ExactLinear(nn.Linear):
    """A linear layer that computes in float32 whatever autocast says: the head of numbers.

    bf16 keeps 8 bits, so a number around 2000 would come in steps of 8.
    """

    @staticmethod
    def instead_of(layer: nn.Linear) -> "ExactLinear":
        """Return one with the parameters of `layer` themselves; nothing is drawn."""
        made = ExactLinear(layer.in_features, layer.out_features, device="meta")
        made.weight, made.bias = layer.weight, layer.bias
        return made.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return (B, outputs) of features (B, D); products and sums by element, which autocast leaves alone."""
        return (input.float()[:, None] * self.weight).sum(-1) + self.bias


class LinearHead(nn.Module):
    """Batch norm without affine part, then a linear layer: the probe's head (official main_linprobe.py).

    Put no weight decay on it. The linear layer starts at N(0, .01), bias 0.

    Args:
        dim: D.
        num_classes: outputs.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, classes) of features (B, D)."""
        return self.linear(self.norm(features))


class AttentiveHead(nn.Module):
    """One cross-attention in place of pooling, layer norm, then a linear layer: attentive probing.

    A learned query attends to the patch tokens (CAE, arXiv 2202.03026; compared in arXiv 2506.10178): a masked
    autoencoder spreads what it knows over them, and a mean keeps little of it. There is no MLP.

    Args:
        dim: D.
        num_classes: outputs.
        num_heads: attention heads; must divide D.
    """

    def __init__(self, dim: int, num_classes: int, num_heads: int) -> None:
        super().__init__()
        self.attend = AttentionPoolLatent(dim, out_features=0, num_heads=num_heads)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.linear = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (B, classes) of patch tokens (B, N, D)."""
        return self.linear(self.norm(self.attend(tokens)))
