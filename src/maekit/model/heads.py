"""What sits on the encoder after pre-training: a classifier that trains whole, or a linear head on frozen features."""

from typing import Any

import timm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maekit.errors import MaekitError
from maekit.model.encoder import initialise
from maekit.model.mae import MaskedAutoencoder, create_model


def classifier(
    model: MaskedAutoencoder, num_classes: int, *, pool: str, drop_path: float, pretrained: bool
) -> VisionTransformer:
    """Build the timm VisionTransformer that is fine-tuned, of `model`'s architecture.

    With pool "mean" the final norm is replaced by a new one on the mean of the patch tokens (``fc_norm``); with
    "cls" the encoder's own norm stays. Positions become trainable; the head starts with std 2e-5 (official
    fine-tuning). Linear layers that are new start xavier-uniform as in pre-training.

    Args:
        pretrained: take over the encoder's weights; otherwise all but the position table is random.

    Raises:
        MaekitError: E-CONFIG-POOL for "cls" without a class token.
    """
    encoder, spec = model.encoder, model.spec
    if pool == "cls" and not encoder.has_class_token:
        raise MaekitError("E-CONFIG-POOL", "setting pool", found="cls", expected="mean: this encoder has no class token")
    wanted: dict[str, Any] = {key: spec[key] for key in ("patch_size", "embed_dim", "depth", "num_heads") if spec[key]}
    new = timm.create_model(
        spec["name"],
        img_size=model.img_size,
        in_chans=spec["in_chans"],
        num_classes=num_classes,
        global_pool="avg" if pool == "mean" else "token",
        fc_norm=pool == "mean",
        drop_path_rate=drop_path,
        **wanted,
    )
    assert isinstance(new, VisionTransformer)
    initialise(new)
    state = encoder.state_dict()
    if pool == "mean":  # the norm before pooling belongs to the pre-trained use only
        state = {name: value for name, value in state.items() if not name.startswith("norm.")}
    if not pretrained:
        fresh = create_model(**spec).encoder.state_dict()
        state = {name: fresh[name] for name in state}
    missing, unexpected = new.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith(("head.", "fc_norm.")) for name in missing), (missing, unexpected)
    nn.init.trunc_normal_(new.head.weight, std=2e-5)
    nn.init.zeros_(new.head.bias)
    return new


class LinearHead(nn.Sequential):
    """Batch norm without affine part (eps 1e-6), then a linear layer that starts with std .01 (official probe)."""

    def __init__(self, dim: int, num_classes: int) -> None:
        linear = nn.Linear(dim, num_classes)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        super().__init__(nn.BatchNorm1d(dim, affine=False, eps=1e-6), linear)

    def forward(self, input: Tensor) -> Tensor:
        """Return logits: (B, D) -> (B, classes)."""
        return super().forward(input)
