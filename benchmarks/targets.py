"""Time to fit patch PCA, and images a second of a tokenizer's training step, on this machine.

python benchmarks/targets.py [--patches 100000] [--values 768] [--batch 256] [--rounds 7] [--json]

Seconds by the clock and of the processor: on a machine that has other work the second tells what the first would be.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from maekit.model.pca import fit_pca
from maekit.model.tokenizer import VQTokenizer


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Return how long a call takes: by the clock, and in seconds of processors."""
    clock, used = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - clock, time.process_time() - used


def main() -> None:
    """Measure both and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patches", type=int, default=100_000)
    parser.add_argument("--values", type=int, default=768, help="of a patch: 16 x 16 pixels, 3 channels")
    parser.add_argument("--batch", type=int, default=256, help="images of 32 px in patches of 4")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = torch.randn(options.patches, options.values)
    patch = round((options.values / 3) ** 0.5)
    clock, used = seconds(lambda: fit_pca(rows.split(6144), min(96, options.values), patch=patch, channels=3))

    model, images = VQTokenizer(512, (32, 32), 4, 3), torch.randn(options.batch, 3, 32, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    optimizer.register_step_post_hook(lambda *_: model.codebook.update())

    def step() -> None:
        model.loss(images).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    found = [seconds(step) for _ in range(options.rounds)]
    rates = sorted(options.batch / one for one, _ in found)
    result = {
        "threads": torch.get_num_threads(), "torch": torch.__version__, "patches": [options.patches, options.values],
        "pca_seconds": clock, "pca_processor_seconds": used, "tokenizer_images_per_second": statistics.median(rates),
        "least": rates[0], "most": rates[-1],
        "tokenizer_images_per_processor_second": options.batch / statistics.median(cpu for _, cpu in found),
    }  # fmt: skip
    print(
        f"PCA of {options.patches} x {options.values}: {clock:.1f} s ({used:.1f} s of processors); tokenizer: "
        f"{result['tokenizer_images_per_second']:.0f} images/s ({rates[0]:.0f} to {rates[-1]:.0f}), "
        f"{result['tokenizer_images_per_processor_second']:.0f} a processor second"
    )
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
