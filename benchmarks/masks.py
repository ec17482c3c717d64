"""Time to draw the masks of 256 images of 14 x 14 patches over a pre-training step of ViT-B on as many images.

The step is forward, backward and AdamW of the paper's ViT-B/16 at 75 %, with its decoder of 8 blocks. Where 256 images
are too many (a CPU), it is timed on `--batch` of them and scaled: its time is proportional to the images.

    python benchmarks/masks.py [--batch 4] [--rounds 3] [--device cpu] [--json]
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch

from maekit.model.mae import create_model
from maekit.model.masking import draw_masking

IMAGES, GRID = 256, (14, 14)
KINDS = {
    "random 75": ("random", 0.75, 1),
    "block 50": ("block", 0.5, 1),
    "block 75": ("block", 0.75, 1),
    "grid 75": ("grid", 0.75, 1),
    "centre 25": ("centre", 0.25, 1),
    "random 75 in 2 x 2": ("random", 0.75, 2),
}


def seconds(run: Callable[[], object], times: int, device: torch.device) -> float:
    """Return the mean time of one call, waiting for the device at the end only."""
    start = time.perf_counter()
    for _ in range(times):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def main() -> None:
    """Time masks and step in turns and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = create_model("vit_base_patch16_224", decoder_dim=512, decoder_depth=8, decoder_heads=16).to(device)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    images = torch.randn(options.batch, 3, 224, 224, device=device)
    few, noise = (torch.rand(count, GRID[0] * GRID[1], device=device) for count in (options.batch, IMAGES))

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            model.loss(images, few, mask_ratio=0.75).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def draw(name: str) -> Callable[[], object]:
        kind, ratio, unit = KINDS[name]
        return lambda: draw_masking(kind, noise, GRID, ratio, unit).mask

    for run in (step, *map(draw, KINDS)):
        run()
    times: dict[str, list[float]] = {name: [] for name in ("step", *KINDS)}
    for _ in range(options.rounds):
        times["step"].append(seconds(step, 1, device) * IMAGES / options.batch)
        for name in KINDS:
            times[name].append(seconds(draw(name), 20, device))
    typical = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(), "torch": torch.__version__, "batch": options.batch,
        "step_seconds": typical["step"],
        **{f"{name}_milliseconds": 1000 * typical[name] for name in KINDS},
        **{f"{name}_share": typical[name] / typical["step"] for name in KINDS},
    }  # fmt: skip
    print(f"step of {IMAGES} images (from {options.batch}): {typical['step']:.2f} s")
    for name in KINDS:
        print(f"{name:20}{1000 * typical[name]:8.2f} ms  {100 * typical[name] / typical['step']:.3f} %")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
