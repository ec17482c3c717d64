"""Fine-tuning: layer decay, the new head and norm, stochastic depth (paper table 9; official main_finetune.py)."""

import re
from typing import Any

import torch
from torch import nn

from maekit.conformance.adapter import NotShown
from maekit.conformance.check import Answer, Check, Subject

SOURCE = "paper table 9; official lr_decay.py L15-76"
CLASSES, DECAY, DROP = 10, 0.65, 0.1
BLOCK = re.compile(r"(?:blocks|layers?|encoder_layer)[._](\d+)\.")
LOWEST = (
    "patch_embed",
    "cls_token",
    "pos_embed",
    "class_token",
    "patch_embeddings",
    "position_embeddings",
    "conv_proj",
)


def _classifier(subject: Subject) -> nn.Module:
    return subject.part("finetune_model")(subject.model, CLASSES, DROP)


def _grouped(subject: Subject) -> dict[int, tuple[float, float]]:
    """Return (rate as a share of the highest, decay) of each parameter in a group."""
    groups: list[dict[str, Any]] = subject.part("finetune_groups")(subject.once(_classifier), DECAY)
    rates = [group.get("lr_scale", group.get("lr", 1.0)) for group in groups]
    return {
        id(p): (rate / max(rates), group.get("weight_decay", 0.0))
        for group, rate in zip(groups, rates, strict=True)
        for p in group["params"]
    }


def _depth(names: list[str]) -> int:
    return len({found[1] for name in names if (found := BLOCK.search(name))})


def layer_decay(subject: Subject) -> Answer:
    """Compare the rate of each parameter that is in a group."""
    named = dict(subject.once(_classifier).named_parameters())
    grouped, depth, wrong = subject.once(_grouped), _depth(list(named)), {}
    if not depth:
        raise NotShown("the classifier has no numbered blocks")
    for name, p in named.items():
        block = BLOCK.search(name)
        low = not block and any(part in name for part in LOWEST)
        expected = DECAY ** (depth - int(block[1]) if block else depth + 1 if low else 0)
        if id(p) in grouped and abs(grouped[id(p)][0] / expected - 1) > 1e-6:
            wrong[name] = (grouped[id(p)][0], expected)
    if not wrong:
        return Answer(True, f"patches {DECAY ** (depth + 1):.4g}, blocks {DECAY**depth:.4g} to {DECAY:g}, head 1",
                      f"{DECAY} per block downwards")  # fmt: skip
    name, (found, expected) = next(iter(wrong.items()))
    flat = len({round(rate, 9) for rate, _ in grouped.values()}) == 1
    every = "one rate for all" if flat else f"otherwise for {len(wrong)}"
    return Answer(False, f"{every}: {name} {found:.4g}", f"{expected:.4g}: {DECAY} per block downwards")


def all_grouped(subject: Subject) -> Answer:
    """Look for parameters that no group holds."""
    grouped, named = subject.once(_grouped), dict(subject.once(_classifier).named_parameters())
    lost = [name for name, p in named.items() if p.requires_grad and id(p) not in grouped]
    found = f"in no group: {', '.join(lost[:4])}" if lost else f"all {len(named)}"
    return Answer(not lost, found, "every trained parameter in a group")


def no_decay(subject: Subject) -> Answer:
    """Look which parameters decay."""
    grouped, wrong = subject.once(_grouped), []
    for name, p in subject.once(_classifier).named_parameters():
        exempt = p.ndim <= 1 or name.rpartition(".")[2] in (
            "pos_embed",
            "cls_token",
            "reg_token",
            "position_embeddings",
        )
        if id(p) in grouped and bool(grouped[id(p)][1]) == exempt:
            wrong.append(name)
    expected = "all but 1-D, positions and class token decay"
    return Answer(not wrong, f"otherwise for {', '.join(wrong[:2])}" if wrong else expected, expected)


def head(subject: Subject) -> Answer:
    """Look at the new head's weights."""
    heads = [part for part in subject.once(_classifier).modules() if isinstance(part, nn.Linear)
             and part.out_features == CLASSES]  # fmt: skip
    if not heads:
        raise NotShown(f"the classifier has no linear layer of {CLASSES} outputs")
    found = float(heads[-1].weight.detach().std())
    return Answer(abs(found / 2e-5 - 1) < 0.15, f"deviation {found:.3g}", "2e-05")


def pool_norm(subject: Subject) -> Answer:
    """Look whether mean pooling has a norm of its own in place of the final one."""
    parts = dict(subject.once(_classifier).named_modules())
    last = {name.rpartition(".")[2]: part for name, part in parts.items() if name.count(".") <= 1}
    new, old = isinstance(last.get("fc_norm"), nn.LayerNorm), isinstance(last.get("norm"), nn.LayerNorm)
    words = {(True, False): "fc_norm after pooling, no norm before", (False, True): "norm before pooling, no fc_norm"}
    found = words.get((new, old), "both" if new else "neither under these names")
    return Answer(new and not old, found, words[True, False])


def positions_train(subject: Subject) -> Answer:
    """Look whether the positions are trained now."""
    found = [p.requires_grad for name, p in subject.once(_classifier).named_parameters() if name.endswith("pos_embed")]
    if not found:
        raise NotShown("the classifier has no pos_embed")
    return Answer(all(found), "trained" if all(found) else "fixed", "trained")


def drop_path(subject: Subject) -> Answer:
    """Look how stochastic depth rises over the blocks."""
    model = subject.once(_classifier)
    depth = _depth([name for name, _ in model.named_parameters()])
    rates: dict[int, float] = {}
    for name, part in model.named_modules():
        block, rate = BLOCK.search(name + "."), getattr(part, "drop_prob", None)
        if rate is None and type(part).__name__ == "StochasticDepth":
            rate = part.p
        if block and isinstance(rate, float):
            rates[int(block[1])] = max(rate, rates.get(int(block[1]), 0.0))
    found = [round(rates.get(i, 0.0), 4) for i in range(depth)]
    expected = [round(value, 4) for value in torch.linspace(0, DROP, depth).tolist()]
    words = f"{found} over the blocks" if any(found) else "no stochastic depth in any block"
    return Answer(found == expected, words, f"{expected}, linear to {DROP}")


CHECKS = (
    Check("layer-decay", "the learning rate falls by the block", SOURCE, ("D4", "3.5 LLRD", "trap 4.12"), "1e-6",
          "float32 powers", "lower blocks forget what they learned: the paper's accuracy is not reached", layer_decay),
    Check("finetune-groups", "every parameter is fine-tuned", SOURCE, ("D6", "3.5 LLRD"), "exact", "a list",
          "class token and positions keep their pre-training values", all_grouped),
    Check("finetune-decay", "1-D parameters, positions and class token do not decay", SOURCE, ("3.5 LLRD", "trap 4.12"),
          "exact", "a list", "another regularisation than the paper's", no_decay),
    Check("head-init", "the head starts nearly at zero", "official main_finetune.py L257",
          ("3.5 model", "3.10 head std", "trap 4.12"), "15 %", "a deviation of some thousand drawn values",
          "the first steps of a large head disturb the encoder", head),
    Check("pool-norm", "mean pooling has a norm of its own", "official models_vit.py L26-53",
          ("D18", "3.5 model", "3.10 fc_norm", "trap 4.12"), "exact", "a structure",
          "features are normalised before the mean: other numbers than the paper's", pool_norm),
    Check("finetune-positions", "positions are trained in fine-tuning", "official models_vit.py",
          ("3.5 model", "3.10 positions train"), "exact", "a flag", "positions cannot adapt", positions_train),
    Check("drop-path", "stochastic depth rises linearly over the blocks", "paper table 9; official main_finetune.py",
          ("D5", "D8", "3.5 model"), "1e-4", "rounding", "too little or too much regularisation: accuracy is lost",
          drop_path),
)  # fmt: skip
