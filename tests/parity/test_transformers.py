"""transformers' ViTMAE and ViT with our weights in them: the same numbers and the same gradients."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from maekit.model.heads import classifier
from maekit.model.mae import MaskedAutoencoder, create_model

from .comparison import EXACT, LIMITS, Row, apart, short, worst
from .conftest import Report
from .models import MODELS, build, inputs, stir
from .theirs import gradients, in_our_layout, names_of, vit_classifier, vit_mae, vit_mae_encoder

PRECISIONS = [torch.float64, torch.float32]
SLOW = "ViT-B/16, 224 px"
HALF_SINGLE = 1e-6
"""Limit in float64 where transformers takes the softmax in float32: its "eager" attention casts whatever it gets."""


def models() -> list[object]:
    return [pytest.param(name, marks=pytest.mark.slow) if name == SLOW else name for name in MODELS]


def eager_as_it_comes(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, **_: object
) -> tuple[Tensor, Tensor]:
    """transformers' eager attention without its cast of the softmax to float32."""
    assert mask is None
    weights = (query @ key.transpose(2, 3) * scaling).softmax(dim=-1)
    return (weights @ value).transpose(1, 2), weights


AttentionInterface.register("eager_uncast", eager_as_it_comes)
AttentionMaskInterface.register("eager_uncast", eager_mask)


def limit(dtype: torch.dtype, attention: str) -> float:
    return HALF_SINGLE if attention == "eager" and dtype == torch.float64 else LIMITS[dtype]


def compare(case: str, ours: MaskedAutoencoder, mask_ratio: float, attention: str) -> list[Row]:
    """Run both forward and backward on the same images and noise."""
    dtype = ours.decoder.pos_embed.dtype
    ours = ours.requires_grad_(True)  # position tables too: their gradients prove where they were added
    theirs = vit_mae(ours, mask_ratio, attention)
    images, noise = inputs(ours, dtype)
    found, expected = ours(images, mask_ratio, noise=noise), theirs(images, noise=noise)
    latent = theirs.vit(images, noise=noise).last_hidden_state
    found.loss.backward()
    expected.loss.backward()
    same_limit = limit(dtype, attention)
    tensors: list[tuple[str, Tensor, Tensor, float]] = [
        ("mask", found.mask.to(dtype), expected.mask.to(dtype), EXACT),
        ("ids_restore", found.ids_restore, expected.ids_restore, EXACT),
        ("latent", found.latent, latent, same_limit),
        ("prediction", found.pred, expected.logits, same_limit),
        ("loss", found.loss, expected.loss, same_limit),
    ]
    about = (case, f"ViTMAEForPreTraining, {attention}", short(dtype))
    rows = [Row(*about, name, name, *apart(left, right), most) for name, left, right, most in tensors]
    grads = gradients(ours), in_our_layout(gradients(theirs), ours)
    return [*rows, Row(*about, f"{len(grads[0])} gradients", *worst(*grads), same_limit)]


@pytest.mark.parametrize("dtype", PRECISIONS, ids=short)
@pytest.mark.parametrize("attention", ["sdpa", "eager", "eager_uncast"])
@pytest.mark.parametrize("mask_ratio", [0.75, 0.6])
@pytest.mark.parametrize("target", ["norm_pixel", "pixel"])
@pytest.mark.parametrize("name", models())
def test_the_autoencoder_is_transformers_in_mask_latent_prediction_loss_and_gradients(
    report: Report, name: str, mask_ratio: float, target: str, attention: str, dtype: torch.dtype
) -> None:
    report(compare(name, build(name, target, dtype), mask_ratio, attention))


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_of_either_has_a_counterpart(name: str) -> None:
    with torch.device("meta"):
        ours = build(name)
        theirs = vit_mae(ours, 0.75, "sdpa")
    places = [place for places in names_of(ours).values() for place in places]
    assert len(places) == len(set(places))
    assert set(places) == set(theirs.state_dict()) == {name for name, _ in theirs.named_parameters()}


@pytest.mark.parametrize("dtype", PRECISIONS, ids=short)
@pytest.mark.parametrize("name", models())
def test_features_without_a_mask_are_those_of_their_encoder(report: Report, name: str, dtype: torch.dtype) -> None:
    ours = build(name, dtype=dtype)
    images, _ = inputs(ours, dtype)
    in_order = torch.arange(ours.num_patches, dtype=dtype).expand(len(images), -1)
    with torch.no_grad():
        expected = vit_mae_encoder(ours, "sdpa")(images, noise=in_order).last_hidden_state
        found = ours.features(images, pool="tokens")
    about = (name, "ViTMAEModel, mask_ratio 0", short(dtype))
    report([Row(*about, "features", "tokens", *apart(found, expected), LIMITS[dtype])])


@pytest.mark.parametrize("dtype", PRECISIONS, ids=short)
@pytest.mark.parametrize("name", models())
def test_a_class_token_classifier_gives_their_logits(report: Report, name: str, dtype: torch.dtype) -> None:
    ours = build(name, dtype=torch.float32)
    head = classifier(ours, 7, pool="cls")
    stir(head)  # the head starts nearly at zero
    head = head.to(dtype).eval()
    images, _ = inputs(ours, dtype)
    theirs = vit_classifier(head, ours.num_heads, "sdpa").eval()
    labels = torch.tensor([3, 5])
    found, expected = head(images), theirs(images).logits
    for logits in (found, expected):
        nn.functional.cross_entropy(logits, labels).backward()
    grads = gradients(head), in_our_layout(gradients(theirs), head)
    about = (name, "ViTForImageClassification", short(dtype))
    report(
        [
            Row(*about, "logits", "logits", *apart(found, expected), LIMITS[dtype]),
            Row(*about, f"{len(grads[0])} gradients", *worst(*grads), LIMITS[dtype]),
        ]
    )


def test_at_a_ratio_with_float_dust_they_keep_a_patch_less() -> None:
    """Trap 4.1, the one intended difference: int(N * (1 - r)) keeps 9 of 100 patches at .9; we keep 10, as the paper."""
    torch.manual_seed(0)
    ours = create_model(**{**MODELS["tiny, 5 channels"], "img_size": 80})
    images, noise = inputs(ours, torch.float32)
    with torch.no_grad():
        found, theirs = ours(images, 0.9, noise=noise), vit_mae(ours, 0.9, "sdpa")(images, noise=noise)
    assert (~found.mask).sum(1).tolist() == [10, 10]
    assert (theirs.mask == 0).sum(1).tolist() == [9, 9]
    assert torch.equal(found.ids_restore, theirs.ids_restore)
