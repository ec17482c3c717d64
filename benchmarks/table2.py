"""Time of a training step with mask tokens in the encoder, with the paper's decoder and with one block of it (Table 2).

Forward, backward and fused AdamW on one ready batch; the arms take turns in one process, and a speed-up is within each
round, over the arm with mask tokens. Beside it stand the ratio of operations (`maekit.model.flops`) and what the paper
measured: ViT-L 2.8 and 3.7 times, ViT-H 3.5 and 4.1 times as fast (arXiv 2111.06377, Table 2; 128 TPU-v3 cores).

    python benchmarks/table2.py [--model vit_large_patch16_224] [--batch 2] [--rounds 3] [--precision fp32] [--json]
"""

import argparse
import contextlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from maekit.model.flops import flops
from maekit.model.mae import create_model

ARMS: dict[str, dict[str, Any]] = {
    "mask tokens in the encoder, decoder of 8": {"decoder_depth": 8, "variant": {"encoder_mask_token": True}},
    "decoder of 8": {"decoder_depth": 8},
    "decoder of 1": {"decoder_depth": 1},
}
PAPER = {"vit_large_patch16_224": (1.0, 2.8, 3.7), "vit_huge_patch14_224": (1.0, 3.5, 4.1)}


def step_of(
    spec: dict[str, Any], options: argparse.Namespace, device: torch.device
) -> tuple[Callable[[], float], float]:
    """Return a function that does one step and says how long it took, and the operations of an image."""
    torch.manual_seed(0)
    model = create_model(options.model, **spec).to(device).train()
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-4, fused=True) if options.optimizer else None
    images = torch.randn(options.batch, 3, *model.img_size, device=device)
    noise = torch.rand(options.batch, model.num_patches, device=device)
    precision = torch.autocast(device.type, torch.bfloat16) if options.precision == "bf16" else contextlib.nullcontext()

    # on a CPU the processor's time: what other work takes does not count
    clock = time.perf_counter if device.type == "cuda" else time.process_time

    def step() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = clock()
        with precision:
            loss = model.loss(images, noise)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    return step, flops(model).total


def main() -> None:
    """Run the arms in turns and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_large_patch16_224")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--optimizer", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    device = torch.device(options.device)
    arms = {name: step_of(spec, options, device) for name, spec in ARMS.items()}
    for step, _ in arms.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(options.rounds):
        for name in [*arms] if turn % 2 else [*reversed(arms)]:
            times[name].append(arms[name][0]())
    slowest, cost = next(iter(times.values())), next(iter(arms.values()))[1]
    rows = []
    for (name, own), paper in zip(times.items(), PAPER.get(options.model, (None,) * 3), strict=True):
        gains = [before / after for before, after in zip(slowest, own, strict=True)]
        rows.append(
            {
                "arm": name, "seconds": statistics.median(own), "speed_up": statistics.median(gains),
                "least": min(gains), "most": max(gains), "gflops": arms[name][1] / 1e9,
                "by_operations": cost / arms[name][1], "paper": paper,
            }
        )  # fmt: skip
        print(
            f"{name:<42} {rows[-1]['seconds']:8.3f} s   {rows[-1]['speed_up']:.2f} times as fast "
            f"({min(gains):.2f} to {max(gains):.2f}), by operations {rows[-1]['by_operations']:.2f}, paper {paper}"
        )
    if options.json:
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
        print(json.dumps(vars(options) | {"on": where, "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
