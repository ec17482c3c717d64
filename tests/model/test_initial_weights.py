"""A new model starts exactly as the paper's (official models_mae.py, initialize_weights)."""

import math

import pytest
import torch
from torch import Tensor, nn

from maekit.model.mae import create_model

from .conftest import Build


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}


def assert_xavier(weight: Tensor) -> None:
    """A uniform of this bound: no value outside, the extremes near it, the right variance."""
    rows, columns = weight.shape
    bound = math.sqrt(6 / (rows + columns))
    extreme = float(weight.abs().max())
    assert bound * 0.97 < extreme <= bound * (1 + 1e-6)
    assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert abs(float(weight.mean())) < 5 * bound / math.sqrt(3 * weight.numel())


def test_every_linear_layer_is_xavier_with_zero_bias_and_the_fused_qkv_is_one_matrix(build: Build, kind: str) -> None:
    layers = linears(build(kind))
    assert "encoder.blocks.0.attn.qkv" in layers
    assert "decoder.pred" in layers
    assert layers["encoder.blocks.0.attn.qkv"].weight.shape == (72, 24)  # bound sqrt(6 / 96), not that of 24 x 24
    for layer in layers.values():
        assert_xavier(layer.weight.detach())
        assert layer.bias is None or not layer.bias.any()


def test_trap_9_the_patch_projection_starts_like_a_linear_layer(build: Build, kind: str) -> None:
    assert_xavier(build(kind).encoder.patch_embed.proj.weight.detach().flatten(1))


@pytest.mark.parametrize("seed_free_kind", ["plain", "five channels", "registers and class token"])
def test_the_patch_projection_keeps_the_bias_that_torch_gives_a_convolution(build: Build, seed_free_kind: str) -> None:
    model = build(seed_free_kind)
    bias = model.encoder.patch_embed.proj.bias
    assert bias is not None
    bias = bias.detach()
    bound = 1 / math.sqrt(model.encoder.in_chans * model.patch**2)
    assert 0.7 * bound < float(bias.abs().max()) <= bound
    assert float(bias.std()) > 0.4 * bound


def test_class_register_and_mask_tokens_are_normal_with_deviation_002(build: Build) -> None:
    model = build("registers and class token", embed_dim=768, num_heads=12, depth=1, decoder_dim=768, decoder_depth=1)
    for token in (model.encoder.cls_token, model.encoder.reg_token, model.decoder.mask_token):
        assert token is not None
        assert token.requires_grad
        values = token.detach()
        assert float(values.std()) == pytest.approx(0.02, rel=0.1)
        assert abs(float(values.mean())) < 0.004


def test_layer_norms_are_one_and_zero_with_eps_1e_6_everywhere(build: Build) -> None:
    # D9: a decoder left at torch's 1e-5; CLIP-like models bring an eps of their own, so only the method's are asked
    for kind in ("plain", "patch 14", "registers and class token", "registers, no class token", "no class token"):
        norms = [part for part in build(kind).modules() if isinstance(part, nn.LayerNorm)]
        assert len(norms) == 2 * 2 + 1 + 2 * 2 + 1
        for norm in norms:
            assert norm.eps == 1e-6
            assert bool((norm.weight == 1).all())
            assert not norm.bias.any()


def test_the_decoder_has_eps_1e_6_for_every_encoder(build: Build, kind: str) -> None:
    norms = [part for part in build(kind).decoder.modules() if isinstance(part, nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-6}


def test_defects_1_and_2_predictions_differ_between_masked_places_from_the_start(build: Build, kind: str) -> None:
    # transformers' ViTMAE zeroes its decoder positions: the spread there is 0.0
    model = build(kind).eval()
    images = torch.randn(2, model.encoder.in_chans, *model.img_size)
    out = model(images, 0.7)
    for pred, mask in zip(out.pred.detach(), out.mask, strict=True):
        removed = pred[mask]
        assert float((removed - removed[0])[1:].abs().amax(1).min()) > 1e-3


def test_defect_1_every_position_table_is_filled_and_encodes_place(build: Build) -> None:
    model = build()
    assert model.encoder.pos_embed is not None
    for table in (model.encoder.pos_embed[0], model.decoder.pos_embed[0]):
        assert not table[0].any()  # the class token's row
        assert len(torch.unique(table, dim=0)) == 1 + model.num_patches


def test_the_same_seed_gives_the_same_weights_and_the_next_draw_others(build: Build) -> None:
    model = build()
    again, next_draw = build().state_dict(), create_model(**model.spec).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(again[name], value)
    assert not torch.equal(next_draw["decoder.mask_token"], model.decoder.mask_token)
    assert not torch.equal(next_draw["encoder.patch_embed.proj.weight"], model.encoder.patch_embed.proj.weight)
