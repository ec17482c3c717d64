"""Initial weights: what each tensor is drawn from (official models_mae.py, initialize_weights; paper appendix A.1)."""

import math

import torch
from torch import Tensor, nn

from maekit.conformance.adapter import NotShown
from maekit.conformance.check import Answer, Check, Subject

SOURCE = "paper A.1; official models_mae.py L68-93"
SIGMAS = 6.0
"""A sound implementation misses by this many standard errors once in 5e8 draws."""
LINEARS = ("attn.proj", "mlp.fc1", "mlp.fc2")


def uniform(values: Tensor, bound: float) -> tuple[bool, str]:
    """Say whether values look drawn from U(-bound, bound), and what they look like."""
    values = values.detach().double().flatten()
    extreme, deviation = float(values.abs().max()), float(values.std())
    expected = bound / math.sqrt(3)
    slack = SIGMAS * math.sqrt(0.2 / len(values))  # relative standard error of a uniform's deviation
    inside = extreme <= bound * (1 + 1e-6)
    right = inside and abs(deviation / expected - 1) <= slack and extreme >= bound * (1 - 30 / len(values))
    return right, f"largest {extreme:.4f}, deviation {deviation:.4f}"


def normal(values: Tensor, deviation: float) -> tuple[bool, str]:
    """Say whether values look drawn from N(0, deviation)."""
    values = values.detach().double().flatten()
    found, mean, slack = float(values.std()), float(values.mean()), SIGMAS / math.sqrt(2 * len(values))
    right = abs(found / deviation - 1) <= slack and abs(mean) <= SIGMAS * deviation / math.sqrt(len(values))
    return right, f"deviation {found:.3g}, mean {mean:.1g} ({len(values)} values)"


def xavier(weight: Tensor) -> tuple[bool, str, str]:
    """Say whether a matrix (out, in) is Xavier uniform: right, what was found, what was expected."""
    bound = math.sqrt(6 / (weight.shape[0] + weight.shape[1]))
    right, found = uniform(weight, bound)
    return right, found, f"uniform, bound {bound:.4f}, deviation {bound / math.sqrt(3):.4f}"


def _worst(subject: Subject, names: list[str]) -> Answer:
    """Answer for several matrices: the first that is wrong, or how many are right."""
    if not names:
        raise NotShown("the model has none of these layers under the authors' names")
    judged = {name: xavier(subject.tensors[name].flatten(1)) for name in names}
    wrong = {name: verdict for name, verdict in judged.items() if not verdict[0]}
    name, (_, found, expected) = next(iter((wrong or judged).items()))
    many = f"{len(wrong)} of {len(names)} otherwise, {name}: {found}" if wrong else f"{len(names)} as expected"
    return Answer(not wrong, many, f"Xavier {expected}" if wrong else "Xavier uniform")


def qkv(subject: Subject) -> Answer:
    """Look at the fused query, key and value matrices."""
    return _worst(subject, [name for name in subject.tensors if name.endswith("attn.qkv.weight")])


def linears(subject: Subject) -> Answer:
    """Look at all other linear layers."""
    inner = [name for name in subject.tensors if name.endswith(tuple(f"{layer}.weight" for layer in LINEARS))]
    outer = [name for name in ("decoder_embed.weight", "decoder_pred.weight") if name in subject.tensors]
    return _worst(subject, inner + outer)


def patch_projection(subject: Subject) -> Answer:
    """Look at the patch convolution as the linear layer that it is."""
    right, found, expected = xavier(subject.tensor("patch_embed.proj.weight").flatten(1))
    return Answer(right, found, f"Xavier {expected}")


def patch_bias(subject: Subject) -> Answer:
    """Look at the bias of the patch convolution: torch's default, which is not zero."""
    bound = 1 / math.sqrt(subject.shape.values)
    values = subject.tensor("patch_embed.proj.bias").detach()
    extreme, deviation = float(values.abs().max()), float(values.std())
    expected, slack = bound / math.sqrt(3), SIGMAS * math.sqrt(0.2 / len(values))
    right = extreme <= bound * (1 + 1e-6) and abs(deviation / expected - 1) <= slack
    return Answer(
        right, f"largest {extreme:.4f}, deviation {deviation:.4f}", f"uniform, bound {bound:.4f} (torch's default)"
    )


def biases(subject: Subject) -> Answer:
    """Look at the biases of all linear layers."""
    layers = ("attn.qkv", *LINEARS, "decoder_embed", "decoder_pred")
    names = [name for name in subject.tensors if name.endswith(tuple(f"{layer}.bias" for layer in layers))]
    if not names:
        raise NotShown("the model has no linear biases under the authors' names")
    wrong = [name for name in names if bool(subject.tensors[name].any())]
    return Answer(not wrong, f"{len(wrong)} not zero, the first {wrong[0]}" if wrong else f"{len(names)} zero", "zero")


def norms(subject: Subject) -> Answer:
    """Look at weight and bias of the layer norms."""
    names = [name for name in subject.tensors if name.split(".")[-2:][0].removeprefix("decoder_").startswith("norm")]
    if not names:
        raise NotShown("the model has no norms under the authors' names")
    wrong = [name for name in names if bool((subject.tensors[name] != float(name.endswith("weight"))).any())]
    return Answer(not wrong, f"otherwise: {wrong[0]}" if wrong else f"{len(names)} as expected", "weight 1, bias 0")


def norm_eps(subject: Subject) -> Answer:
    """Look at the epsilon of every layer norm module."""
    found = sorted({part.eps for part in subject.model.modules() if isinstance(part, nn.LayerNorm)})
    if not found:
        raise NotShown("the model has no torch.nn.LayerNorm")
    return Answer(found == [1e-6], ", ".join(f"{eps:g}" for eps in found), "1e-06 everywhere")


def class_token(subject: Subject) -> Answer:
    """Look at the class token."""
    right, found = normal(subject.tensor("cls_token"), 0.02)
    return Answer(right, found, "N(0, 0.02)")


def mask_token(subject: Subject) -> Answer:
    """Look at the mask token."""
    right, found = normal(subject.tensor("mask_token"), 0.02)
    return Answer(right, found, "N(0, 0.02)")


def seeds(subject: Subject) -> Answer:
    """Build again, with the same seed and with another."""
    again, other = (dict(subject.adapter.tensors(subject.adapter.build(seed))) for seed in (0, 1))
    name = "patch_embed.proj.weight"
    here = subject.tensor(name)
    same, changed = torch.equal(again[name], here), not torch.equal(other[name], here)
    found = (
        f"{'the same' if same else 'other'} weights for the same seed, {'other' if changed else 'the same'} for another"
    )
    return Answer(same and changed, found, "the seed alone decides")


STATISTICS = "6 standard errors of the statistic"
CHANCE = "a draw is random; 6 standard errors are missed once in 5e8 draws"
CHECKS = (
    Check("init-linear", "linear layers start Xavier uniform", SOURCE, ("D3", "3.1 linear layers"), STATISTICS, CHANCE,
          "another scale of activations from the first step; results of the paper are not comparable", linears, True),
    Check("init-qkv", "query, key and value start as one Xavier matrix (3D, D)", SOURCE, ("3.1 linear layers",),
          STATISTICS, CHANCE, "attention logits start 2 x too large if drawn as three matrices (bound 1.41 x)", qkv,
          True),
    Check("init-patch", "the patch projection starts like a linear layer", SOURCE, ("3.1 patch projection", "trap 4.9"),
          STATISTICS, CHANCE, "tokens start at another scale than positions", patch_projection, True),
    Check("init-patch-bias", "the patch projection keeps the bias torch gives a convolution", SOURCE,
          ("3.1 patch projection", "3.10 conv bias"), STATISTICS, CHANCE, "a small difference; not bit-comparable",
          patch_bias, True),
    Check("init-bias", "linear biases start at zero", SOURCE, ("3.1 linear layers",), "exact", "zero is zero",
          "not the published starting point", biases, True),
    Check("init-norm", "layer norms start at 1 and 0", SOURCE, ("3.1 linear layers",), "exact", "set, not drawn",
          "not the published starting point", norms, True),
    Check("norm-eps", "layer norms use epsilon 1e-6 everywhere", "official models_mae.py L40, L54, L227",
          ("D3", "D9", "3.1 blocks"), "exact", "a constant",
          "outputs differ from the authors' weights at low variance; with 1e-12 half precision may overflow", norm_eps),
    Check("init-class-token", "the class token is N(0, .02)", SOURCE, ("D1", "3.1 class and mask token"), STATISTICS,
          CHANCE, "a token of zeros gets its first value from the optimizer's noise", class_token, True),
    Check("init-mask-token", "the mask token starts N(0, .02)", SOURCE, ("D1", "D2", "3.1 class and mask token"),
          STATISTICS, CHANCE, "removed places start without any content", mask_token, True),
    Check("init-seed", "the seed decides the weights", "maekit", (), "exact", "the same arithmetic",
          "runs cannot be repeated", seeds, True),
)  # fmt: skip
