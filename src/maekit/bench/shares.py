"""Where a step's time goes: marks set by hooks between the parts of the model, in steps made for that alone.

B images.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import Tensor

from maekit.bench.contenders import Contender
from maekit.bench.machine import wait
from maekit.model.mae import MaskedAutoencoder

PARTS = ("patches", "encoder", "decoder", "loss", "backward", "optimizer")


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
