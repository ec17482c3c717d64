"""What minding bad numbers adds to a pre-training step of ViT-S: norm of all gradients, flag, buffers.

Also what ``--sdc-check`` adds to every step: sums of weights, moments and average, twice. Its second computation of
every N-th step is not measured here: it costs that step's passes once more, so 1 / N of them.

Steps with the guard (`maekit.train.guard.Guard.update`) and steps with the bare optimizer take turns on one model, so
that a busy machine slows both alike; the share is that of medians. On a GPU the device is waited for after each step.

    python benchmarks/guard.py [--batch 16] [--rounds 20] [--device cpu] [--json]
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from maekit.model.mae import create_model
from maekit.settings import Loop
from maekit.train.device import World
from maekit.train.guard import Guard
from maekit.train.optim import adamw, pretrain_groups
from maekit.train.recheck import Recheck
from maekit.train.state import State


def main() -> None:
    """Time both kinds of steps in turns and print what the guard adds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = create_model(options.model, decoder_dim=512, decoder_depth=8, decoder_heads=16).to(device)
    optimizer = adamw(pretrain_groups(model, 0.05), betas=(0.9, 0.95), lr=1e-4)
    state = State(model, optimizer, torch.amp.GradScaler(device.type, enabled=False), None)
    settings = {name: Loop(spike_sigma=sigma) for name, sigma in (("guard", None), ("guard and spikes", 6.0))}
    world = World(0, 1, device)
    guards = {name: Guard(state, loop, 0, world, Path()) for name, loop in settings.items()}
    guards["guard and sdc_check"] = guards["guard"]
    recheck = Recheck(state, 100, world, Path())
    images = torch.randn(options.batch, 3, 224, 224, device=device)
    noise = torch.rand(options.batch, model.num_patches, device=device)

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(kind: str) -> tuple[float, float]:
        """Return the seconds of a whole step and those of its update."""
        began = wait()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model.loss(images, noise, mask_ratio=0.75)
        loss.backward()
        passed = wait()
        if kind in guards:
            if kind.endswith("sdc_check"):
                recheck.look()
                recheck.noted.clear()
            guards[kind].update(loss.detach(), [], 0.0)
            guards[kind].pending.clear()
            if kind.endswith("sdc_check"):
                recheck.begin()
        else:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ended = wait()
        return ended - began, ended - passed

    kinds = ("bare", *guards)
    for kind in kinds:
        step(kind)
    state.mishaps.accepted = 1000  # the window of losses is full
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for _ in range(options.rounds):
        for kind in kinds:
            times[kind].append(step(kind))
    whole = {kind: statistics.median(pair[0] for pair in pairs) for kind, pairs in times.items()}
    update = {kind: statistics.median(pair[1] for pair in pairs) for kind, pairs in times.items()}
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(), "torch": torch.__version__, "model": options.model, "batch": options.batch,
        "step_seconds": whole["bare"],
        **{f"{kind}: milliseconds": 1000 * (update[kind] - update["bare"]) for kind in guards},
        **{f"{kind}: share": (update[kind] - update["bare"]) / whole["bare"] for kind in guards},
    }  # fmt: skip
    for name, value in result.items():
        print(f"{name:<32} {value:.4g}" if isinstance(value, float) else f"{name:<32} {value}")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
