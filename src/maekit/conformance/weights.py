"""Checks of what a fresh model starts from: initial weights and both position tables (paper appendix A.1).

Statistics are judged by their own spread: a sample of n values may be off by six of its standard errors, which a right
model passes with a probability of 1 - 2e-9 and the deviations named here (other bounds, other distributions) do not.

D token width, Dd decoder width, C channels, P patch side, N patches.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from maekit.conformance.check import Check, Finding, NotShown, Subject

SIX = 6
OFFICIAL = "official models_mae.py, initialize_weights"
SPREAD = "6 standard errors of a sample of this size"
SPREAD_WHY = "a right model fails once in 5e8 draws; the bounds in circulation differ by 15 % and more"


def uniform(weight: Tensor) -> tuple[float, float]:
    """Return a matrix's deviation over that of Xavier's uniform, and how much of it is chance (6 standard errors).

    Infinite where a value lies beyond the bound, as with a normal distribution.
    """
    rows, columns = weight.shape
    bound = math.sqrt(6 / (rows + columns))
    ratio = float(weight.double().std()) / (bound / math.sqrt(3))
    chance = SIX * 0.5 * math.sqrt(0.8 / weight.numel())  # kurtosis of a uniform: 1.8
    beyond = float(weight.abs().max()) > bound * (1 + 1e-5)
    return (math.inf if beyond and abs(ratio - 1) <= chance else ratio), chance


def _xavier(subject: Subject, names: list[str], flatten: bool = False) -> Finding:
    ratios: dict[str, float] = {}
    wrong: dict[str, float] = {}
    for name in names:
        weight = subject.tensor(name)
        ratio, chance = uniform(weight.flatten(1) if flatten else weight)
        ratios[name] = ratio
        if not abs(ratio - 1) <= chance:
            wrong[name] = ratio
    worst = max(wrong or ratios, key=lambda name: abs(ratios[name] - 1))
    found = f"{ratios[worst]:.3f} at {worst}" + (f"; {len(wrong)} of {len(names)} are off" if wrong else "")
    return Finding(not wrong, found, "1.000 of the Xavier uniform's deviation")


def _matrices(subject: Subject) -> list[str]:
    inside = ("attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    ends = ("decoder_embed.weight", "decoder_pred.weight")
    return _some([name for name in subject.tensors if name.endswith(inside) or name in ends], "a linear layer")


def _some(names: list[str], what: str) -> list[str]:
    if not names:
        raise NotShown(f"the adapter names no {what}")
    return names


def linear_xavier(subject: Subject) -> Finding:
    """Look at every linear layer but the fused qkv."""
    return _xavier(subject, _matrices(subject))


def qkv_one_matrix(subject: Subject) -> Finding:
    """Look at qkv as one (3D, D) matrix; drawn as three its deviation is 1.414 of that."""
    return _xavier(subject, _some([n for n in subject.tensors if n.endswith("attn.qkv.weight")], "attn.qkv.weight"))


def patch_projection(subject: Subject) -> Finding:
    """Look at the patch projection as a (D, C*P*P) matrix."""
    return _xavier(subject, ["patch_embed.proj.weight"], flatten=True)


def patch_bias(subject: Subject) -> Finding:
    """Look for torch's default: uniform in 1 / sqrt(fan in)."""
    weight, bias = subject.tensor("patch_embed.proj.weight"), subject.tensor("patch_embed.proj.bias")
    bound = 1 / math.sqrt(weight[0].numel())
    ratio = float(bias.std()) / (bound / math.sqrt(3))
    right = abs(ratio - 1) <= SIX * 0.5 * math.sqrt(0.8 / bias.numel()) and float(bias.abs().max()) <= bound * 1.00001
    found = "zeros" if not bias.any() else f"{ratio:.2f} of the default's deviation"
    return Finding(right, found, "1.00 of the default's deviation, within 1/sqrt(fan in)")


def linear_bias(subject: Subject) -> Finding:
    """Look at the biases of every linear layer."""
    ends = ("attn.qkv.bias", "attn.proj.bias", "mlp.fc1.bias", "mlp.fc2.bias")
    names = [n for n in subject.tensors if n.endswith(ends) or n in ("decoder_embed.bias", "decoder_pred.bias")]
    wrong = [name for name in _some(names, "bias of a linear layer") if subject.tensor(name).any()]
    found = f"{wrong[0]} and {len(wrong) - 1} more are not 0" if wrong else f"all {len(names)} are 0"
    return Finding(not wrong, found, "0")


def qkv_bias(subject: Subject) -> Finding:
    """Look whether query, key and value have a bias."""
    weights = _some([n for n in subject.tensors if n.endswith("attn.qkv.weight")], "attn.qkv.weight")
    missing = [name for name in weights if name.replace("weight", "bias") not in subject.tensors]
    return Finding(not missing, f"{len(weights) - len(missing)} of {len(weights)} blocks have one", "every block")


def _norm_names(subject: Subject) -> list[str]:
    ends = ("norm1", "norm2", "norm", "decoder_norm")
    return [n for n in subject.tensors if n.rpartition(".")[0].rpartition(".")[2] in ends]


def norms(subject: Subject) -> Finding:
    """Look at weight and bias of every layer norm."""
    names = _some(_norm_names(subject), "layer norm")
    wrong = [n for n in names if not bool((subject.tensor(n) == (1 if n.endswith("weight") else 0)).all())]
    return Finding(not wrong, f"{wrong[0]} is not" if wrong else f"all {len(names) // 2} are", "weight 1, bias 0")


def norm_eps(subject: Subject) -> Finding:
    """Look at eps of every layer norm that the model holds."""
    held = [module.eps for module in subject.model.modules() if isinstance(module, nn.LayerNorm)]
    if not held:
        raise NotShown("the model holds no torch LayerNorm")
    counts = {eps: held.count(eps) for eps in sorted(set(held))}
    found = ", ".join(f"{eps:g} in {count}" for eps, count in counts.items())
    return Finding(set(counts) == {1e-6}, found, f"1e-06 in {len(held)}")


def _normal(subject: Subject, name: str) -> Finding:
    token = subject.tensor(name).double()
    deviation, error = float(token.std()), 0.02 * SIX / math.sqrt(2 * token.numel())
    mean, drift = float(token.mean()), 0.02 * SIX / math.sqrt(token.numel())
    right = abs(deviation - 0.02) <= error and abs(mean) <= drift
    found = "zeros" if not token.any() else f"mean {mean:+.4f}, deviation {deviation:.4f}"
    return Finding(right, found, "N(0, 0.02)")


def cls_token(subject: Subject) -> Finding:
    """Look at the class token."""
    return _normal(subject, "cls_token")


def mask_token(subject: Subject) -> Finding:
    """Look at the mask token."""
    return _normal(subject, "mask_token")


def table(dim: int, side: int, *, height_first: bool = False, divisor: int = 0, swap: bool = False) -> Tensor:
    """Write the sin-cos positions (N, dim) number by number as the official util/pos_embed.py defines them, float64.

    Args:
        height_first: the deviation "first half of the channels encodes the row".
        divisor: of the exponent, dim / 4 by definition; MoCo v3 and big_vision have dim / 4 - 1.
        swap: the deviation "cosines before sines".
    """
    quarter = dim // 4
    exponents = torch.arange(quarter, dtype=torch.float64) / (divisor or quarter)
    omega = torch.exp(-math.log(10000) * exponents)
    rows = []
    for row in range(side):
        for column in range(side):
            parts = [f(place * omega) for place in (column, row) for f in (torch.sin, torch.cos)]
            if swap:
                parts = [parts[1], parts[0], parts[3], parts[2]]
            rows.append(torch.cat(parts[2:] + parts[:2] if height_first else parts))
    return torch.stack(rows)


def _known_tables(dim: int, side: int) -> Iterator[tuple[str, Tensor]]:
    yield "zeros", torch.zeros(side * side, dim, dtype=torch.float64)
    yield "height first", table(dim, side, height_first=True)
    yield "frequencies over D/4 - 1 (MoCo v3)", table(dim, side, divisor=dim // 4 - 1)
    yield "cosines before sines", table(dim, side, swap=True)


def _positions(subject: Subject, name: str) -> Finding:
    found = subject.tensor(name)[0].double()[-subject.num_patches :]
    expected = table(found.shape[1], subject.side)
    off = float((found - expected).abs().max())
    if off <= 1e-5:
        return Finding(True, f"equal to {off:.0e}", "the sin-cos table, width first")
    named = [word for word, other in _known_tables(*found.T.shape[:1], subject.side) if _near(found, other)]
    says = named[0] if named else f"another table, {off:.2f} off (deviation {float(found.std()):.3f})"
    return Finding(False, says, "the sin-cos table, width first")


def _near(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-5)


def positions_encoder(subject: Subject) -> Finding:
    """Compare the encoder's positions with the table."""
    return _positions(subject, "pos_embed")


def positions_decoder(subject: Subject) -> Finding:
    """Compare the decoder's positions with the table."""
    return _positions(subject, "decoder_pos_embed")


def positions_class_row(subject: Subject) -> Finding:
    """Look at the row of the class token in both tables."""
    names = [name for name in ("pos_embed", "decoder_pos_embed") if name in subject.tensors]
    rows = {name: subject.tensor(name)[0] for name in _some(names, "position table")}
    lacking = [name for name, values in rows.items() if len(values) == subject.num_patches]
    moved = [name for name, values in rows.items() if name not in lacking and values[0].any()]
    words = [f"{name} has none" for name in lacking] + [f"{name}: not 0" for name in moved]
    return Finding(not words, "; ".join(words) or "zeros", "zeros, a row in both tables")


def positions_frozen(subject: Subject) -> Finding:
    """Look whether both tables are left out of training."""
    names = [name for name in ("pos_embed", "decoder_pos_embed") if name in subject.tensors]
    trained = [name for name in _some(names, "position table") if subject.tensors[name].requires_grad]
    return Finding(not trained, f"{' and '.join(trained)} trained" if trained else "frozen", "frozen")


def positions_place(subject: Subject) -> Finding:
    """Look whether every place has a row of its own, in both tables, trained or not."""
    words = []
    for name in ("pos_embed", "decoder_pos_embed"):
        if name in subject.tensors:
            rows = subject.tensor(name)[0][-subject.num_patches :]
            distinct = len(torch.unique(rows, dim=0))
            if distinct < len(rows):
                words.append(f"{name}: {distinct} different rows for {len(rows)} places")
    return Finding(not words, "; ".join(words) or "a row of its own for every place", "a row of its own for every place")


def finite(subject: Subject) -> Finding:
    """Look for values that are no numbers."""
    wrong = [name for name in subject.tensors if not bool(torch.isfinite(subject.tensor(name)).all())]
    return Finding(not wrong, f"{wrong[0]} and {len(wrong) - 1} more are not" if wrong else "all finite", "all finite")


def shapes(subject: Subject) -> Finding:
    """Compare every tensor's shape with the official layout at this width, depth and patch side."""
    expected = layout(subject)
    have = {name: tuple(value.shape) for name, value in subject.tensors.items()}
    wrong = [f"{n} {have[n]}, not {shape}" for n, shape in expected.items() if n in have and have[n] != shape]
    missing = [name for name in expected if name not in have]
    if missing and not wrong and all("decoder" in name or name == "mask_token" for name in missing):
        raise NotShown("there is no decoder")
    words = wrong[:1] + ([f"no {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "")] * bool(missing))
    return Finding(not words, "; ".join(words) or f"{len(expected)} tensors fit", "the official layout")


def layout(subject: Subject) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the official layout (official models_mae.py) for this model's sizes."""
    dim, patch, channels, places = subject.width, subject.patch, subject.channels, subject.num_patches + 1
    narrow = subject.tensor("decoder_embed.weight").shape[0] if "decoder_embed.weight" in subject.tensors else 0
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, places, dim),
        "patch_embed.proj.weight": (dim, channels, patch, patch),
        "patch_embed.proj.bias": (dim,),
        **_blocks("blocks", dim, subject.depth()),
        **_pair("norm", (dim,)),
    }
    if narrow:
        shapes |= {
            **_pair("decoder_embed", (narrow, dim)),
            "mask_token": (1, 1, narrow),
            "decoder_pos_embed": (1, places, narrow),
            **_blocks("decoder_blocks", narrow, subject.depth("decoder_blocks")),
            **_pair("decoder_norm", (narrow,)),
            **_pair("decoder_pred", (patch * patch * channels, narrow)),
        }
    return shapes


def _pair(name: str, weight: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def _blocks(prefix: str, dim: int, depth: int) -> dict[str, tuple[int, ...]]:
    parts = {"norm1": (dim,), "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "norm2": (dim,)}
    parts |= {"mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
    return {k: v for i in range(depth) for name, w in parts.items() for k, v in _pair(f"{prefix}.{i}.{name}", w).items()}


def parameter_count(subject: Subject) -> Finding:
    """Count what is trained, and compare with the sum over the official layout."""
    expected = sum(math.prod(shape) for name, shape in layout(subject).items() if "pos_embed" not in name)
    found = sum(p.numel() for p in subject.model.parameters() if p.requires_grad)
    return Finding(found == expected, f"{found:,}", f"{expected:,} trained")


PUBLISHED = {"B": 111.91, "L": 329.54, "H": 657.07}
"""Million parameters with both position tables (mmpretrain's table of its MAE models; the official code gives the same)."""


def published_counts(subject: Subject) -> Finding:
    """Count the parameters of ViT-B/16, L/16 and H/14 with the default decoder."""
    models = subject.published
    found = {name: sum(p.numel() for p in model.parameters()) / 1e6 for name, model in models.items()}
    right = all(round(found[name], 2) == PUBLISHED[name] for name in found)
    words = ", ".join(f"{name} {count:.2f} M" for name, count in found.items())
    return Finding(right, words, ", ".join(f"{name} {PUBLISHED[name]:.2f} M" for name in found))


def decoder_size(subject: Subject) -> Finding:
    """Look at width and depth of the decoder of ViT-B, L and H: 512 x 8 for each."""
    words = set()
    for model in subject.published.values():
        tensors = subject.adapter.tensors(model)
        depth = len({name.split(".")[1] for name in tensors if name.startswith("decoder_blocks.")})
        words.add(f"{tensors['decoder_embed.weight'].shape[0]} wide, {depth} blocks")
    return Finding(words == {"512 wide, 8 blocks"}, ", ".join(sorted(words)), "512 wide, 8 blocks")


def drawn_by_seed(subject: Subject) -> Finding:
    """Build twice with one seed and once with another."""
    drawn = []
    for seed in (11, 11, 12):
        torch.manual_seed(seed)
        tensors = subject.adapter.tensors(subject.adapter.build(seed))
        drawn.append(tensors["patch_embed.proj.weight"].detach().clone())
    same, other = torch.equal(drawn[0], drawn[1]), torch.equal(drawn[0], drawn[2])
    words = ("the same" if same else "different") + ", " + ("the same" if other else "different")
    return Finding(same and not other, words, "the same, different")


CHECKS = (
    Check(
        "linear-xavier",
        "every linear layer but qkv is drawn Xavier uniform",
        OFFICIAL,
        ("3.1", "D3", "D11"),
        "another start than the paper's: losses of the first epochs and the best learning rate differ",
        linear_xavier,
        SPREAD,
        SPREAD_WHY,
    ),
    Check(
        "qkv-one-matrix",
        "the fused qkv is drawn Xavier uniform as the one (3D, D) matrix it is",
        OFFICIAL,
        ("3.1",),
        "queries and keys 1.41 times too large (three matrices): attention starts twice as sharp",
        qkv_one_matrix,
        SPREAD,
        SPREAD_WHY,
    ),
    Check(
        "qkv-bias",
        "query, key and value have a bias",
        "official models_mae.py, Block(qkv_bias=True)",
        ("3.1",),
        "official checkpoints hold tensors that the model has no place for",
        qkv_bias,
    ),
    Check(
        "linear-bias-zero",
        "biases of linear layers start at 0",
        OFFICIAL,
        ("3.1",),
        "another start than the paper's",
        linear_bias,
    ),
    Check(
        "patch-projection",
        "the patch projection is drawn like a linear layer of C*P*P inputs",
        OFFICIAL,
        ("3.1", "trap 4.9"),
        "patch tokens of another scale beside positions of scale .7",
        patch_projection,
        SPREAD,
        SPREAD_WHY,
    ),
    Check(
        "patch-bias",
        "the bias of the patch convolution keeps torch's default",
        OFFICIAL,
        ("3.1", "3.10"),
        "another start than the paper's",
        patch_bias,
        SPREAD,
        SPREAD_WHY,
    ),
    Check(
        "norm-start",
        "layer norms start at weight 1 and bias 0",
        OFFICIAL,
        ("3.1",),
        "another start than the paper's",
        norms,
    ),
    Check(
        "norm-eps",
        "eps of every layer norm is 1e-6",
        "official models_mae.py, norm_layer",
        ("3.1", "D3", "D9"),
        "small differences in every layer: features of official weights are not the official ones",
        norm_eps,
    ),
    Check(
        "class-token",
        "the class token starts as N(0, .02)",
        OFFICIAL,
        ("3.1", "D1"),
        "at zero it is nothing but its position of zeros",
        cls_token,
        SPREAD,
        SPREAD_WHY,
    ),
    Check(
        "mask-token",
        "the mask token starts as N(0, .02)",
        OFFICIAL,
        ("3.1", "D1", "D2"),
        "at zero the decoder cannot tell a removed patch from nothing at the start",
        mask_token,
        SPREAD,
        SPREAD_WHY,
    ),
    Check(
        "positions-encoder",
        "encoder positions are the 2-D sin-cos table, width first, base 10000",
        "official util/pos_embed.py",
        ("3.1", "D1", "D11", "trap 4.6"),
        "zeros: no position information; another table: official weights see a moved image",
        positions_encoder,
        "1e-5",
        "float32 sines of angles up to the grid's side: 1e-6; the tables in circulation differ by .2 and more",
    ),
    Check(
        "positions-decoder",
        "decoder positions are the 2-D sin-cos table, width first, base 10000",
        "official util/pos_embed.py",
        ("3.1", "D1", "D2", "D20", "trap 4.6"),
        "zeros, and frozen: the decoder never knows which patch it predicts",
        positions_decoder,
        "1e-5",
        "float32 sines of angles up to the grid's side: 1e-6; the tables in circulation differ by .2 and more",
    ),
    Check(
        "positions-class-row",
        "both tables have a row of zeros for the class token",
        "official util/pos_embed.py, cls_token=True",
        ("3.1", "D20"),
        "official checkpoints do not fit, or the class token starts as if it were in the image",
        positions_class_row,
    ),
    Check(
        "positions-frozen",
        "both position tables are fixed",
        "official models_mae.py, requires_grad=False",
        ("3.1", "D11", "trap 4.7"),
        "positions drift and are decayed: another method than the paper's",
        positions_frozen,
    ),
    Check(
        "positions-place",
        "every place has a position of its own, in both tables",
        "paper section 3, MAE decoder",
        ("D1", "D2"),
        "patches of one image cannot be told apart by place",
        positions_place,
        trained=True,
    ),
    Check(
        "layout",
        "names and shapes are the official layout's",
        "keys of the official pre-training files",
        ("3.9",),
        "official checkpoints cannot be loaded, or only in part",
        shapes,
        trained=True,
    ),
    Check("finite", "every weight is a number", "-", ("3.9",), "every output is NaN", finite, trained=True),
    Check(
        "parameter-count",
        "what is trained is what the official layout trains",
        "official models_mae.py",
        ("3.1",),
        "a layer too many, too few, frozen or shared",
        parameter_count,
    ),
    Check(
        "published-counts",
        "ViT-B, L and H with the default decoder have the published number of parameters",
        "mmpretrain's table of MAE models; official models_mae.py",
        ("3.1",),
        "another architecture under the paper's name",
        published_counts,
        "0.005 M",
        "the published numbers have two decimals",
    ),
    Check(
        "decoder-size",
        "the decoder of ViT-B, L and H is 512 wide with 8 blocks",
        "paper section 4.1, default row",
        ("3.1",),
        "other cost, other linear-probe score (paper table 1)",
        decoder_size,
    ),
    Check(
        "drawn-by-seed",
        "the same seed gives the same weights, another seed others",
        "-",
        ("3.4",),
        "runs cannot be repeated, or all seeds are one",
        drawn_by_seed,
    ),
)
"""In the order of the table."""
