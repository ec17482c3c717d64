"""Where a step's time goes, in steps made for that alone: by parts of the model, and by kinds of operations.

Parts are parted by marks that hooks set. Kinds are torch's profiler's; its own cost stretches what is small and many.

B images.
"""

import os
import re
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from maekit.bench.contenders import Contender
from maekit.bench.machine import wait
from maekit.model.mae import MaskedAutoencoder

# torch's profiler would tell stderr of its start and of the GPUs that it misses
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

PARTS = ("patches", "encoder", "decoder", "loss", "backward", "optimizer")
KINDS = {
    "attention": r"attention", "optimizer": r"^Optimizer\.step", "linear maps": r"^aten::(mm|addmm|linear)$",
    "GELU": r"^aten::gelu", "norms": r"^aten::native_layer_norm",
    "copies, casts": r"^aten::(copy_|_to_copy|to|clone|cat|contiguous)$",
}  # fmt: skip
"""Operations of each kind, by name; whatever one of the first two calls belongs to it."""
REST = "the rest"
WITHIN = ("attention", "optimizer")


def shares(contender: Contender, images: Tensor, rounds: int = 3) -> dict[str, float]:
    """Return the share of a step that each part takes.

    Those of the forward pass: masking and embedding patches; the encoder; the decoder and its prediction; target and
    loss.

    Args:
        contender: maekit, not compiled.
        images: (B, C, H, W).
        rounds: steps of which the fastest of each part counts.
    """
    model = contender.model
    assert isinstance(model, MaskedAutoencoder)
    marks: list[tuple[str, float]] = []

    def mark(name: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            wait(images.device)
            marks.append((name, time.perf_counter()))

        return note

    hooks = [
        model.encoder.blocks.register_forward_pre_hook(mark("patches")),
        model.encoder.norm.register_forward_hook(mark("encoder")),
        model.decoder.pred.register_forward_hook(mark("decoder")),
    ]
    best: dict[str, float] = defaultdict(lambda: float("inf"))
    try:
        for _ in range(rounds):
            marks.clear()
            mark("start")()
            with contender.context(images.device):
                loss = contender.loss(images)
                mark("loss")()
                loss.backward()
            mark("backward")()
            contender.optimizer.step()
            contender.optimizer.zero_grad(set_to_none=True)
            mark("optimizer")()
            for (_, before), (name, now) in pairwise(marks):
                best[name] = min(best[name], now - before)
    finally:
        for hook in hooks:
            hook.remove()
    whole = sum(best.values())
    return {name: best[name] / whole for name in PARTS}


def kinds(contender: Contender, images: Tensor, rounds: int = 3) -> dict[str, float]:
    """Return the share of a step on a CPU that each kind of operation takes; the rest: all others, Python and autograd.

    Args:
        contender: not compiled.
        images: (B, C, H, W), on a CPU.
        rounds: steps that are added up, after one that the profiler itself needs.
    """
    spent = dict.fromkeys((*KINDS, REST), 0.0)
    for number in range(rounds + 1):
        with profile(activities=[ProfilerActivity.CPU]) as found, record_function("step"):
            contender.step(images)
        for event in (found.events() or ()) if number else ():
            spent[_kind(event)] += event.self_cpu_time_total
    whole = sum(spent.values())
    return {name: time / whole for name, time in spent.items()}


def _kind(event: Any) -> str:
    """Return an event's kind: that of what it was called by, where that is a kind of its own."""
    names = [event.name]
    while (event := event.cpu_parent) is not None:
        names.append(event.name)
    for kind in WITHIN:
        if any(re.search(KINDS[kind], name) for name in names):
            return kind
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, names[0])), REST)
