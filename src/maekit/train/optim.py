"""Which parameters decay, at which rate, under which optimizer.

Groups are plain dictionaries as torch takes them, with "lr_scale" beside: the loop sets
``lr = schedule(step) * lr_scale`` before every step.
"""

from typing import Any

import torch
from timm.optim._param_groups import param_groups_layer_decay
from timm.optim.lars import Lars
from torch import nn

Groups = list[dict[str, Any]]


def pretrain_groups(model: nn.Module, weight_decay: float) -> Groups:
    """Group for pre-training: all but 1-D parameters and ``.bias`` decay.

    So the class token and the mask token do decay, as in the official code, whose rule is timm 0.3.2's
    ``add_weight_decay`` (method: D17); frozen position tables are in no group.
    """
    decay, exempt = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (exempt if parameter.ndim <= 1 or name.endswith(".bias") else decay).append(parameter)
    return [
        {"params": decay, "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": exempt, "weight_decay": 0.0, "lr_scale": 1.0},
    ]


def finetune_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> Groups:
    """Group for fine-tuning: the rate falls by `layer_decay` per block downwards (BEiT, paper table 9).

    Patch embedding, class token and positions scale by ``layer_decay ** (depth + 1)``, block i by
    ``layer_decay ** (depth - i)``, final norm and head by 1; positions, tokens and 1-D parameters do not decay.
    """
    groups = param_groups_layer_decay(
        model,
        weight_decay=weight_decay,
        no_weight_decay_list=("pos_embed", "cls_token", "reg_token"),
        layer_decay=layer_decay,
    )
    # timm lets the norm before the class token's head be one layer lower; official lr_decay.py counts it with the head
    norm = {id(parameter): parameter for name, parameter in model.named_parameters() if name.startswith("norm.")}
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in norm]
    own = [{"params": list(norm.values()), "weight_decay": 0.0, "lr_scale": 1.0}] if norm else []
    return [group for group in groups if group["params"]] + own


def adamw(groups: Groups, *, betas: tuple[float, float], lr: float) -> torch.optim.Optimizer:
    """Build AdamW with torch's fused kernel (CPU and CUDA), eps 1e-8."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def lars(head: nn.Module, *, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """Build LARS for the linear probe: momentum .9, trust .001 (paper table 10, official util/lars.py).

    Only the weight matrix is adapted and decays (table 10: not at all); `always_adapt` since timm otherwise skips the
    trust ratio without decay.
    """
    weights = [p for p in head.parameters() if p.requires_grad and p.ndim > 1]
    biases = [p for p in head.parameters() if p.requires_grad and p.ndim <= 1]
    groups: Groups = [
        {"params": weights, "always_adapt": True, "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": biases, "always_adapt": False, "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    for group in groups:  # timm's signature takes only whole numbers for it
        group["momentum"] = 0.9
    return Lars(groups, lr=lr, trust_coeff=0.001)
