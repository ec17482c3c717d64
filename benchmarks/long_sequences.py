"""Memory and time of a pre-training step by the number of patches, with and without activation checkpointing.

Each configuration is a process of its own, so that its peak is its own: on a CPU the most memory that the process held
in the step above what it held before it (model, gradients and AdamW's moments), on CUDA what the allocator
counts. Times are the shortest of `--rounds` steps.

    python benchmarks/long_sequences.py [--model vit_base_patch16_224] [--batch 4] [--rounds 2] [--device cuda]
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

import maekit
from maekit.train.optim import adamw, pretrain_groups
from maekit.train.precision import autocast

LENGTHS = ((224, 16), (448, 16), (224, 8))
"""Image side and patch side in pixels: 196, 784 and 784 patches (method: long_seq_mae)."""


def held(device: torch.device) -> int:
    """Return the most bytes held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Run some steps of one configuration in this process."""
    side, patch, checkpointing = args.one
    device = torch.device(args.device)
    model = maekit.create_model(args.model, img_size=side, patch_size=patch).to(device).train()
    model.set_checkpointing(bool(checkpointing))
    optimizer = adamw(pretrain_groups(model, 0.05), betas=(0.9, 0.95), lr=1e-4)
    images = torch.randn(args.batch, 3, side, side, device=device)

    def step() -> float:
        began = time.perf_counter()
        with autocast(args.precision, device):
            loss = model.loss(images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # gradients stay where they are: they are not what is measured
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()  # makes the moments
    before = held(device)
    seconds = min(step() for _ in range(args.rounds))
    return {"patches": model.num_patches, "mib": (held(device) - before) / 2**20, "seconds": seconds}


def main() -> None:
    """Print a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--one", type=int, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args)))
        return
    rows = []
    print(f"{'side':>5} {'patch':>5} {'patches':>7} {'checkpointing':>13} {'MiB above model':>15} {'s a step':>9}")
    for side, patch in LENGTHS:
        for checkpointing in (0, 1):
            words = [
                sys.executable,
                str(Path(__file__)),
                *sys.argv[1:],
                "--one",
                str(side),
                str(patch),
                str(checkpointing),
            ]
            found = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
            rows.append({"side": side, "patch": patch, "checkpointing": bool(checkpointing), **found})
            told = "yes" if checkpointing else "no"
            print(f"{side:5} {patch:5} {found['patches']:7} {told:>13} {found['mib']:15,.0f} {found['seconds']:9.2f}")
    print(json.dumps({"model": args.model, "batch": args.batch, "device": args.device, "machine": platform.machine(),
                      "precision": args.precision, "torch": torch.__version__, "rows": rows}))  # fmt: skip


if __name__ == "__main__":
    main()
