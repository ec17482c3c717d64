"""Which parameters decay, at which rate: by name and number."""

import pytest
import timm
import torch
from torch import nn

from maekit.train.optim import adamw, finetune_groups, lars, pretrain_groups


def names(model: nn.Module, group: dict[str, object]) -> set[str]:
    chosen = {id(p) for p in group["params"]}  # type: ignore[attr-defined]
    return {name for name, p in model.named_parameters() if id(p) in chosen}


def test_tokens_decay_in_pretraining_and_vectors_biases_and_fixed_tables_do_not() -> None:
    """Method D17: the official rule exempts only 1-D parameters and ``.bias``."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2)
    model.pos_embed.requires_grad_(False)
    decay, exempt = pretrain_groups(model, 0.05)
    assert decay["weight_decay"] == 0.05
    assert exempt["weight_decay"] == 0.0
    assert "cls_token" in names(model, decay)
    assert {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= names(model, decay)
    assert {"patch_embed.proj.bias", "blocks.1.norm1.weight", "norm.weight"} <= names(model, exempt)
    grouped = names(model, decay) | names(model, exempt)
    assert grouped == {n for n, _ in model.named_parameters()} - {"pos_embed"}


@pytest.mark.parametrize(
    ("name", "decay", "lowest"), [("base", 0.65, 0.0037), ("large", 0.75, 7.5e-4), ("huge", 0.75, 7.5e-5)]
)
def test_layer_decay_reaches_the_numbers_of_the_paper(name: str, decay: float, lowest: float) -> None:
    """Method 3.5: B .65^13 = .0037, L .75^25 = 7.5e-4, H .75^33 = 7.5e-5."""
    patch = 14 if name == "huge" else 16
    with torch.device("meta"):
        model = timm.create_model(f"vit_{name}_patch{patch}_224", num_classes=10, global_pool="avg")
    groups = finetune_groups(model, 0.05, decay)
    scale = {n: g["lr_scale"] for g in groups for n in names(model, g)}
    depth = {"base": 12, "large": 24, "huge": 32}[name]
    assert scale["patch_embed.proj.weight"] == pytest.approx(lowest, rel=0.01)
    assert scale["cls_token"] == scale["pos_embed"] == pytest.approx(decay ** (depth + 1))
    for i in range(depth):
        assert scale[f"blocks.{i}.attn.qkv.weight"] == pytest.approx(decay ** (depth - i))
    assert scale["head.weight"] == scale["fc_norm.weight"] == 1.0


def test_the_norm_before_the_class_tokens_head_has_the_heads_rate() -> None:
    """Method 3.5: fc_norm, norm and head 1.0."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=2, global_pool="token")
    groups = finetune_groups(model, 0.05, 0.5)
    scale = {n: g["lr_scale"] for g in groups for n in names(model, g)}
    assert scale["norm.weight"] == scale["norm.bias"] == scale["head.weight"] == 1.0
    assert scale["blocks.1.norm2.weight"] == 0.5
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_tokens_positions_and_vectors_do_not_decay_in_finetuning() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=2, reg_tokens=2)
    decays = {n: g["weight_decay"] for g in finetune_groups(model, 0.05, 0.75) for n in names(model, g)}
    assert decays.keys() == {n for n, _ in model.named_parameters()}
    assert {n for n, d in decays.items() if d == 0} == {
        n for n, p in model.named_parameters() if p.ndim <= 1 or n in ("cls_token", "pos_embed", "reg_token")
    }


def test_adamw_has_the_fused_kernel_and_the_betas_asked_for() -> None:
    optimizer = adamw(pretrain_groups(nn.Linear(2, 2), 0.05), betas=(0.9, 0.95), lr=1e-3)
    assert optimizer.defaults["fused"] is True
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    assert optimizer.defaults["eps"] == 1e-8


def test_lars_adapts_the_weight_by_its_norms_and_leaves_the_bias_to_plain_momentum() -> None:
    """Oracle: You et al., arXiv 1708.03888, with trust .001: w -= lr * .001 * |w| / |g| * g in the first step."""
    torch.manual_seed(0)
    head = nn.Linear(6, 3)
    weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
    head(torch.randn(4, 6)).square().sum().backward()
    assert head.weight.grad is not None
    assert head.bias.grad is not None
    lars(head, lr=2.0).step()
    trust = 0.001 * weight.norm() / head.weight.grad.norm()
    torch.testing.assert_close(head.weight.detach(), weight - 2.0 * trust * head.weight.grad)
    torch.testing.assert_close(head.bias.detach(), bias - 2.0 * head.bias.grad)


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_lars_keeps_momentum_of_the_adapted_gradient_and_decays_the_weight_alone(decay: float) -> None:
    """Oracle: three steps written out; buffer = .9 buffer + trust * (g + decay w), w -= lr * buffer."""
    torch.manual_seed(0)
    head, images = nn.Linear(6, 3).double(), torch.randn(4, 6, dtype=torch.double)
    optimizer = lars(head, lr=2.0, weight_decay=decay)
    weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
    buffers = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for _ in range(3):
        optimizer.zero_grad()
        head(images).square().sum().backward()
        assert head.weight.grad is not None and head.bias.grad is not None
        grad = head.weight.grad.clone()
        trust = 0.001 * weight.norm() / (grad.norm() + decay * weight.norm())
        buffers = [0.9 * buffers[0] + trust * (grad + decay * weight), 0.9 * buffers[1] + head.bias.grad.clone()]
        weight, bias = weight - 2.0 * buffers[0], bias - 2.0 * buffers[1]
        optimizer.step()
    # 1e-7: timm adds 1e-8 to the norm it divides by
    torch.testing.assert_close(head.weight.detach(), weight, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(head.bias.detach(), bias, rtol=1e-7, atol=1e-7)


def test_layer_decay_counts_from_the_head_whatever_is_frozen_and_frozen_parameters_are_in_no_group() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=4, global_pool="token")
    whole = {n: g["lr_scale"] for g in finetune_groups(model, 0.05, 0.5) for n in names(model, g)}
    model.requires_grad_(False)
    for part in (model.get_submodule("blocks.3"), model.norm, model.head):
        part.requires_grad_(True)
    some = {n: g["lr_scale"] for g in finetune_groups(model, 0.05, 0.5) for n in names(model, g)}
    assert some == {n: whole[n] for n, p in model.named_parameters() if p.requires_grad}
