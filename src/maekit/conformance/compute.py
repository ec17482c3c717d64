"""What a pass costs and what a model holds: counted, not timed (method 3.1)."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from maekit.conformance import paper
from maekit.conformance.adapter import NotShown
from maekit.conformance.check import Answer, Check, Subject

PARAMETERS = {"B": (111.66, 111.91), "L": (329.24, 329.54), "H": (656.61, 657.07)}
"""Millions of trained parameters, and of all with the fixed tables; the second as MMPretrain publishes them."""
GMAC = {"B": (9.78, 17.56), "L": (20.76, 61.55), "H": (48.56, 167.29)}
"""A forward pass at 75 %, and the encoder alone on the whole image."""
SPARED = {"B": 0.087, "L": 0.116, "H": 0.144}
"""GMAC of projecting patches that are removed, which the authors' code does and need not."""
NUM_PATCHES = {"B": 196, "L": 196, "H": 256}


def visible_only(subject: Subject) -> Answer:
    """Count the products of a forward pass at 75 %."""
    shape = subject.shape
    if not shape.decoder_width:
        raise NotShown("the model has no decoder under the authors' names")
    images, noise = subject.images(1, dtype=torch.float32), subject.noise(1, dtype=torch.float32)
    # attention as plain products: the counter does not know the fused kernel of the CPU
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        subject.run(subject.model, images, noise)
    found = counter.get_total_flops() / 2e9
    expected, whole = (sum(paper.macs(shape[:7], masked)) for masked in (True, False))
    spared = (shape.num_patches - paper.num_keep(shape.num_patches, 0.75)) * shape.width * shape.values / 1e9
    right = expected - spared - 1e-6 <= found * 1.005 and found <= expected * 1.005
    return Answer(right, f"{found:.4f} GMAC", f"{expected - spared:.4f} to {expected:.4f}; on all patches {whole:.4f}")


def no_more_parameters(subject: Subject) -> Answer:
    """Compare the model's parameters with those that have a name in the authors' files."""
    for name in ("decoder_pos_embed", "mask_token"):
        subject.tensor(name)
    official = paper.names(subject.shape.depth, subject.shape.decoder_depth)
    named = {name: value for name, value in subject.tensors.items() if name in official}
    held = {id(p): p.numel() for p in subject.model.parameters()}
    held |= {id(b): b.numel() for b in subject.model.buffers() if any(b is value for value in named.values())}
    total, known = sum(held.values()), sum(value.numel() for value in named.values())
    missing = sorted(official - set(named))
    found = f"{total:,} values, {known:,} of them with a name" + (f"; no {missing[0]}" if missing else "")
    return Answer(total == known and not missing, found, "every value with a name, and every name with values")


def all_trained(subject: Subject) -> Answer:
    """Run a backward pass; every trained parameter must get a gradient."""
    subject.precise.zero_grad()
    subject.shot.loss.backward(retain_graph=True)
    named = [(name, p) for name, p in subject.precise.named_parameters() if p.requires_grad]
    idle = [name for name, p in named if p.grad is None]
    subject.precise.zero_grad()
    found = f"none for {', '.join(idle[:3])}" if idle else f"for all {len(named)}"
    return Answer(not idle, found, f"for all {len(named)}")


class _Waits(TorchDispatchMode):
    """Counts the reads of a value by the host: on a GPU each waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


def host_waits(subject: Subject) -> Answer:
    """Count how often a forward and backward pass fetch a number from the device."""
    images, noise = subject.images(1, dtype=torch.float32), subject.noise(1, dtype=torch.float32)
    torch.manual_seed(3)
    with _Waits() as waits:
        given = subject.adapter.forward(subject.model, images, noise, 0.75)
        if given["loss"].requires_grad:
            given["loss"].backward()
    subject.model.zero_grad()
    return Answer(waits.count == 0, f"{waits.count} times in a step", "never")


def _published(subject: Subject, size: str) -> nn.Module:
    return subject.part("published")(size)


def parameter_counts(subject: Subject) -> Answer:
    """Count the parameters of ViT-B, L and H as published."""
    found = {}
    for size in PARAMETERS:
        model = _published(subject, size)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        found[size] = (round(trained / 1e6, 2), round(sum(p.numel() for p in model.parameters()) / 1e6, 2))
    return Answer(found == PARAMETERS, _spell(found), _spell(PARAMETERS) + " M (with fixed tables)")


def _spell(counts: dict[str, tuple[float, float]]) -> str:
    return ", ".join(f"{size} {one:.2f} ({other:.2f})" for size, (one, other) in counts.items())


def published_cost(subject: Subject) -> Answer:
    """Count the products of ViT-B, L and H, without memory: the masked pass, and the encoder on the whole image."""
    found, right = {}, True
    for size, (masked, whole) in GMAC.items():
        model = _published(subject, size)
        images = torch.empty(1, 3, 224, 224, device="meta")
        noise = torch.empty(1, NUM_PATCHES[size], device="meta")
        pass_cost = _cost(
            lambda model=model, images=images, noise=noise: subject.adapter.forward(model, images, noise, 0.75)
        )
        encoder = _cost(lambda model=model, images=images: subject.adapter.features(model, images))
        found[size] = (pass_cost, encoder)
        right &= masked - SPARED[size] - 0.01 <= pass_cost <= masked + 0.01
        # features that are masked by mistake have a check of their own
        right &= abs(encoder - whole) < 0.01 or encoder < whole / 2
    return Answer(right, f"{_spell(found)} GMAC", f"{_spell(GMAC)}; less what is not projected")


def _cost(work: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 2e9


CHECKS = (
    Check("visible-only", "the encoder computes on visible patches only", "paper section 3, MAE encoder",
          ("3.1 cost",), "0.5 %", "implementations count small products differently",
          "three times the cost: the method's speed is lost", visible_only),
    Check("parameters", "every parameter has a name in the authors' files", "official models_mae.py",
          ("D11", "3.1 parameters", "3.9 keys"), "exact", "a count",
          "weights that the authors' files cannot hold, or parts that are never used", no_more_parameters),
    Check("all-trained", "every trained parameter gets a gradient", "official models_mae.py", ("3.4 other",), "exact",
          "it is there or not", "dead weight; DistributedDataParallel stops, or searches in each step", all_trained),
    Check("host-waits", "a step never waits for the device", "maekit", ("D12", "D16"), "exact", "a count",
          "the GPU idles; torch.compile breaks its graph", host_waits),
    Check("parameter-counts", "ViT-B, L and H have the published number of parameters", "method 3.1, counted",
          ("3.1 parameters", "3.1 decoder"), "0.005 M", "rounding of the published figures",
          "another architecture than the paper's", parameter_counts),
    Check("published-cost", "ViT-B, L and H cost what the method costs", "method 3.1, counted", ("3.1 cost",),
          "0.01 GMAC", "rounding of the published figures", "another architecture than the paper's", published_cost),
)  # fmt: skip
