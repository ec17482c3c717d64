"""Ways to a faster step that were tried beside the one taken; docs/benchmarks.md, "Tried, and did not pay".

The arms of a trial take turns within one process; seconds are the processor's on one thread, so that other work on the
machine weighs little. A gain is the difference to the way taken, as a share of a step of the same model measured in the
same run. Padding is given its best case: its tokens are as good as any, so that no mask has to hide them.

    OMP_NUM_THREADS=1 python benchmarks/tried.py TRIAL [--size SIZE] [--precision fp32|bf16] [--rounds 7]

B images, T tokens, H heads, N patches, D width.
"""

import argparse
import contextlib
import copy
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from maekit.bench.contenders import Contender, ours
from maekit.bench.machine import describe
from maekit.model.encoder import embed_patches
from maekit.model.mae import MaskedAutoencoder, create_model
from maekit.model.masking import len_keep
from maekit.model.patches import patchify, select
from maekit.train import precision
from maekit.train.optim import pretrain_groups

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "name": "vit_tiny_patch16_224", "img_size": 28, "in_chans": 1, "embed_dim": 96, "depth": 4, "num_heads": 4,
    "decoder_dim": 64, "decoder_depth": 1, "decoder_heads": 4, "target": "pixel",
}  # fmt: skip
SIZES: dict[str, tuple[dict[str, Any], int, float]] = {
    "quickstart": ({**SMALL, "patch_size": 7}, 128, 0.6),
    "28px/4": ({**SMALL, "patch_size": 4}, 256, 0.75),
    "vit-s/16": ({"name": "vit_small_patch16_224"}, 16, 0.75),
}
"""Arguments of `create_model`, B, mask ratio."""
Arms = dict[str, Callable[[], object]]
Model = tuple[MaskedAutoencoder, Tensor, float, str]
"""Model, images, mask ratio, precision."""


def turns(arms: Arms, rounds: int) -> dict[str, list[float]]:
    """Return the processor's seconds of each arm's calls; the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name in arms if number % 2 else reversed(arms):
            began = time.process_time()
            arms[name]()
            if number:
                found[name].append(time.process_time() - began)
    return found


def parts(given: Model) -> list[tuple[str, int, int, int, int]]:
    """Return encoder and decoder: name, tokens attended to, width, heads, blocks."""
    model, _, ratio, _ = given
    tokens, width = len_keep(model.num_patches, ratio) + 1, model.decoder.embed.out_features
    return [
        ("encoder", tokens, model.encoder.embed_dim, model.num_heads, len(model.encoder.blocks)),
        ("decoder", model.num_patches + 1, width, model.spec["decoder_heads"], model.decoder.depth),
    ]


def padding(given: Model) -> tuple[Arms, int]:
    """Attention over more tokens than there are: a multiple of 8, 16 or 64, in the encoder and then in the decoder."""
    arms: Arms = {}
    for part, count, width, heads, blocks in parts(given):
        for many in sorted({count, *(-(-count // by) * by for by in (8, 16, 64))}):
            name = f"{part}, {many} tokens{' (taken)' if many == count else ''}"
            arms[name] = repeated(attend(len(given[1]), many, width, heads, given[3]), blocks)
    return arms, 1


def attention(given: Model) -> tuple[Arms, int]:
    """Attention as training has it, by torch's fused kernel or plain products, and by maekit's own."""
    arms: Arms = {}
    torchs = F.scaled_dot_product_attention
    for part, *shape, blocks in parts(given):
        how = {
            " (taken)": {}, ", torch's fused": {"function": torchs}, ", maekit's own": {"function": own},
            ", torch's products": {"function": torchs, "backends": [SDPBackend.MATH]},
            ", no product at all": {"function": spread_out},
        }  # fmt: skip
        for name, options in how.items():
            arms[part + name] = repeated(attend(len(given[1]), *shape, given[3], **options), blocks)
    return arms, 1


def own(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return maekit's own attention, whatever it is asked for."""
    return precision.attention(query, key, value)


def spread_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend by multiplying and adding up, which spares small products their call."""
    logits = (query[:, :, :, None] * key[:, :, None]).sum(-1) * query.shape[-1] ** -0.5
    return (logits.softmax(-1)[..., None] * value[:, :, None]).sum(3)


def attend(
    batch: int, tokens: int, width: int, heads: int, kind: str, *, function: Any = None, backends: Any = None
) -> Callable[[], None]:
    """Return attention forward and backward of a joint projection's output, as a timm block has it."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    joint = torch.randn(batch, tokens, 3 * width).to(dtype).requires_grad_()
    grad = torch.randn(batch, heads, tokens, width // heads).to(dtype)

    def run() -> None:
        query, key, value = joint.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        with precision.autocast(kind, CPU), sdpa_kernel(backends) if backends else contextlib.nullcontext():
            (function or F.scaled_dot_product_attention)(query, key, value).backward(grad)
        joint.grad = None

    return run


def repeated(run: Callable[[], object], times: int) -> Callable[[], None]:
    """Return what does it so many times."""

    def several() -> None:
        for _ in range(times):
            run()

    return several


def embedding(given: Model) -> tuple[Arms, int]:
    """Patches to tokens, forward and backward: a linear map of those kept, or a convolution of all, then a choice."""
    model, images, ratio, kind = given
    keep = len_keep(model.num_patches, ratio)
    ids = torch.rand(len(images), model.num_patches).argsort(1)[:, :keep]
    encoder, last = model.encoder, images.to(memory_format=torch.channels_last)
    grad = torch.randn(len(images), keep, encoder.embed_dim)

    def arm(tokens: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            with precision.autocast(kind, CPU):
                found = tokens()
                found.backward(grad.to(found.dtype))
            encoder.zero_grad(set_to_none=True)

        return run

    return {
        "linear on those kept (taken)": arm(lambda: embed_patches(encoder, select(patchify(images, model.patch), ids))),
        "convolution of all": arm(lambda: select(encoder.patch_embed(images), ids)),
        "the same, channels last": arm(lambda: select(encoder.patch_embed(last), ids)),
    }, 1


def shadow(given: Model) -> tuple[Arms, int]:
    """Whole steps in bf16: weights cast in each, or a bf16 copy beside the float32 ones that the optimizer moves."""
    model, images, ratio, _ = given
    casts = ours(model, ratio, "bf16", compiled=False)
    twin = copy.deepcopy(model)
    keeps = ours(twin, ratio, "bf16", compiled=False)
    shadows = [p for part in twin.modules() if isinstance(part, nn.Linear) for p in part.parameters()]
    masters = [p.detach().clone() for p in shadows]
    for p in shadows:
        p.data = p.data.bfloat16()
    place = {id(p): master for p, master in zip(shadows, masters, strict=True)}
    groups = pretrain_groups(twin, 0.05)
    for group in groups:
        group["params"] = [place.get(id(p), p) for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    weights = [p for p in model.parameters() if p.requires_grad]
    half = [p.detach().bfloat16() for p in weights]

    def step() -> None:
        with keeps.context(CPU):
            keeps.loss(images).backward()
        for p, master in zip(shadows, masters, strict=True):
            assert p.grad is not None
            master.grad = p.grad.float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        twin.zero_grad(set_to_none=True)
        torch._foreach_copy_([p.data for p in shadows], masters)

    def only_casts() -> None:
        for p, small in zip(weights, half, strict=True):
            p.detach().bfloat16()
            small.float()

    return {
        "step, weights cast in it (taken)": lambda: casts.step(images), "step, a copy in bf16": step,
        "all casts of weights and gradients alone": only_casts,
    }, 1  # fmt: skip


def onednn(given: Model) -> tuple[Arms, int]:
    """The linear maps of a step in fp32: torch's choice, or oneDNN for all but the gradients of weights."""
    model, images, ratio, kind = given
    if kind != "fp32":
        raise SystemExit("onednn is a trial of fp32: in bf16 torch takes oneDNN by itself")
    shapes: list[tuple[int, int, int]] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        shapes.append((inputs[0].numel() // layer.in_features, layer.in_features, layer.out_features))

    hooks = [part.register_forward_hook(note) for part in model.modules() if isinstance(part, nn.Linear)]
    with torch.no_grad():
        model.loss(images, torch.rand(len(images), model.num_patches), ratio)
    for hook in hooks:
        hook.remove()
    maps = [(torch.randn(n, i), torch.randn(o, i), torch.randn(o), torch.randn(n, o)) for n, i, o in shapes]
    linear = torch.ops.mkldnn._linear_pointwise

    def usual() -> None:
        for x, weight, bias, grad in maps:
            torch.addmm(bias, x, weight.T)
            grad @ weight
            grad.T @ x

    def other() -> None:
        for x, weight, bias, grad in maps:
            linear(x, weight, bias, "none", [], "")
            linear(grad, weight.T, None, "none", [], "")
            grad.T @ x

    return {"torch's choice, MKL here (taken)": usual, "oneDNN": other}, 1


def sorting(given: Model) -> tuple[Arms, int]:
    """The order of a batch's noise: all of it, or the lowest alone, which leaves open which ones were removed."""
    model, images, ratio, _ = given
    noise, keep = torch.rand(len(images), model.num_patches), len_keep(model.num_patches, ratio)
    return {
        "stable argsort (taken)": repeated(lambda: torch.argsort(noise, dim=1, stable=True), 100),
        "argsort": repeated(lambda: torch.argsort(noise, dim=1), 100),
        "topk of those kept": repeated(lambda: noise.topk(keep, dim=1, largest=False), 100),
        "topk, and those removed from a mask": repeated(lambda: both_sides(noise, keep), 100),
    }, 100


def both_sides(noise: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Return ids kept and ids removed without sorting all."""
    kept = noise.topk(keep, dim=1, largest=False)[1]
    mask = torch.ones_like(noise, dtype=torch.bool).scatter_(1, kept, False)
    return kept, mask.nonzero()[:, 1].view(len(noise), -1)


def update(given: Model) -> tuple[Arms, int]:
    """AdamW: one kernel for all, lists of tensors, or one tensor after the other."""
    model, *_ = given
    arms: Arms = {}
    for name, how in {
        "fused (taken)": {"fused": True},
        "foreach": {"foreach": True},
        "single": {"foreach": False},
    }.items():
        twin = copy.deepcopy(model)
        for p in twin.parameters():
            p.grad = torch.randn_like(p) if p.requires_grad else None
        arms[name] = torch.optim.AdamW(pretrain_groups(twin, 0.05), lr=1e-4, **how).step  # type: ignore[arg-type]
    return arms, 1


def compiled(given: Model) -> tuple[Arms, int]:
    """Whole steps, as they are and through torch.compile; compiling is paid in the first."""
    model, images, ratio, kind = given
    twin = ours(copy.deepcopy(model), ratio, kind, compiled=True)
    began = sum(os.times()[:4])  # with the compiler's processes
    twin.step(images)
    print(f"compiling and the first step: {sum(os.times()[:4]) - began:.0f} s of the processor")
    plain = ours(model, ratio, kind, compiled=False)
    return {"eager (taken)": lambda: plain.step(images), "compiled": lambda: twin.step(images)}, 1


TRIALS = {trial.__name__: trial for trial in (padding, attention, embedding, shadow, onednn, sorting, update, compiled)}


def main() -> None:
    """Run a trial and print its arms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", choices=TRIALS)
    parser.add_argument("--size", choices=SIZES, default="quickstart")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    spec, batch, ratio = SIZES[options.size]
    model = create_model(**spec).train()
    images = torch.randn(batch, model.encoder.in_chans, *model.img_size)
    arms, per = TRIALS[options.trial]((model, images, ratio, options.precision))
    step = whole_step(ours(copy.deepcopy(model), ratio, options.precision, compiled=False), images, options.rounds)
    found = turns(arms, options.rounds)
    print(", ".join(f"{name} {value}" for name, value in describe(CPU).items()))
    print(f"{options.trial}, {options.size}, batch {batch}, {options.precision}: a step takes {step:.4f} s")
    for name, seconds in found.items():
        taken = next(found[other] for other in reversed([*found][: [*found].index(name) + 1]) if "taken" in other)
        ratios = sorted(a / b for a, b in zip(taken, seconds, strict=True))
        middle = statistics.median(seconds) / per
        gain = (statistics.median(taken) / per - middle) / step
        print(
            f"  {name:44} {1000 * middle:9.3f} ms  {statistics.median(ratios):5.2f} times as fast "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f}), gain of the step {gain:+.1%}"
        )


def whole_step(contender: Contender, images: Tensor, rounds: int) -> float:
    """Return the processor's seconds of a step."""
    return statistics.median(turns({"": lambda: contender.step(images)}, rounds)[""])


if __name__ == "__main__":
    main()
