"""Step time and memory of fine-tuning by the number of last blocks that are trained (`--tune-blocks`).

The models take turns, round by round, so that a machine that slows down slows all; each time is a share of that of the
whole fine-tune of the same round. Memory: what autograd keeps of a forward pass for the backward one, counted storage
by storage without the weights; gradients and AdamW's two moments come on top, 12 bytes a trained parameter.

    python benchmarks/partial_finetuning.py [--model vit_base_patch16_224] [--batch 8] [--rounds 5] [--device cuda]
"""

import argparse
import json
import platform
import statistics
import time

import torch
from torch import Tensor
from torch.nn import functional as F

import maekit
from maekit.model.heads import classifier, freeze_below
from maekit.train.optim import adamw, finetune_groups
from maekit.train.precision import autocast

SERIES = (0, 0.5, 1, 2, 4, 6, 12, 18, 24, "all")
CLASSES = 1000


class Tuned:
    """One classifier in training with a number of blocks."""

    def __init__(self, name: str, blocks: float | str, device: torch.device, precision: str) -> None:
        self.device, self.precision = device, precision
        self.model = classifier(maekit.create_model(name, decoder_depth=1), CLASSES, drop_path=0.1).to(device).train()
        if not isinstance(blocks, str):
            freeze_below(self.model, blocks)
        self.optimizer = adamw(finetune_groups(self.model, 0.05, 0.65), betas=(0.9, 0.999), lr=1e-4)
        self.trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Run a forward pass."""
        with autocast(self.precision, self.device):
            return F.cross_entropy(self.model(images), labels)

    def seconds(self, images: Tensor, labels: Tensor) -> float:
        """Return the time of one step."""
        self._wait()
        start = time.perf_counter()
        self.loss(images, labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._wait()
        return time.perf_counter() - start

    def kept(self, images: Tensor, labels: Tensor) -> int:
        """Return the bytes that one forward pass keeps for the backward one."""
        own, seen = {p.untyped_storage().data_ptr() for p in self.model.parameters()}, {}

        def pack(value: Tensor) -> Tensor:
            storage = value.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            self.loss(images, labels).backward()
        self.optimizer.zero_grad(set_to_none=True)
        return sum(seen.values())

    def peak(self, images: Tensor, labels: Tensor) -> int | None:
        """Return the most bytes that the device held during a step; None on the CPU, which does not count them."""
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        self.seconds(images, labels)
        return torch.cuda.max_memory_allocated(self.device)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(options.device)
    depth = len(maekit.create_model(options.model, decoder_depth=1).encoder.blocks)
    series = [blocks for blocks in SERIES if isinstance(blocks, str) or blocks <= depth]
    images = torch.randn(options.batch, 3, 224, 224, device=device)
    labels = torch.arange(options.batch, device=device) % CLASSES
    found: dict[str, dict[str, float | int | None]] = {}
    models: dict[str, Tuned] = {}
    for blocks in series:
        tuned = Tuned(options.model, blocks, device, options.precision)
        tuned.seconds(images, labels)  # warm-up: optimizer state, kernel choice
        models[str(blocks)] = tuned
        found[str(blocks)] = {
            "trained": tuned.trained,
            "kept": tuned.kept(images, labels),
            "peak": tuned.peak(images, labels),
        }
    rounds = [{name: tuned.seconds(images, labels) for name, tuned in models.items()} for _ in range(options.rounds)]
    for name, facts in found.items():
        shares = sorted(times[name] / times["all"] for times in rounds)
        facts |= {"seconds": statistics.median(times[name] for times in rounds), "share": statistics.median(shares)}
        facts |= {"share_min": shares[0], "share_max": shares[-1]}
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{options.model}, batch {options.batch}, {options.precision}, {where}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, {options.rounds} rounds")  # fmt: skip
    print("| blocks | trained | step | share of whole (min to max) | kept for backward |")
    print("|---|---|---|---|---|")
    for name, facts in found.items():
        print(
            f"| {name} | {facts['trained'] / 1e6:.2f} M | {facts['seconds']:.2f} s | {facts['share']:.2f} "
            f"({facts['share_min']:.2f} to {facts['share_max']:.2f}) | {facts['kept'] / 2**20:,.0f} MiB |"
        )
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
