"""Images a second of feature extraction, files and all, over a bare timm forward of the same batch and precision.

The bare forward is timm's own model on one ready batch, again and again. Extraction reads JPEG files from the disk,
crops and normalises them, and pools.

    python benchmarks/features.py [--model vit_small_patch16_224] [--images 192] [--workers auto] [--rounds 5] [--json]
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

from maekit.data.sources import open_source
from maekit.model.mae import create_model
from maekit.tasks.features import extract
from maekit.tasks.training import PATCHES_PER_PASS
from maekit.train.device import World


def write_images(folder: Path, count: int, side: int = 320) -> None:
    """Write JPEG files of smooth noise, which compress as photographs do."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i:04}.jpg", quality=90)


def main() -> None:
    """Run both in turns and print the ratio of each round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--workers", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    device = torch.device(options.device)
    model = create_model(options.model).to(device).eval()
    bare = timm.create_model(options.model, num_classes=0).to(device).eval()
    bare.load_state_dict(model.encoder.state_dict())
    batch = max(1, PATCHES_PER_PASS // model.num_patches)
    ready = torch.randn(batch, 3, 224, 224, device=device)
    workers = options.workers if options.workers == "auto" else int(options.workers)

    @torch.no_grad()
    def theirs() -> float:
        start = time.perf_counter()
        for _ in range(options.images // batch):
            bare.forward_features(ready)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (options.images // batch * batch) / (time.perf_counter() - start)

    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), options.images)
        source = open_source(folder)

        def ours() -> float:
            start = time.perf_counter()
            extract(model, source, World(0, 1, device), pool="mean", workers=workers, title="features")
            return len(source) / (time.perf_counter() - start)

        ours(), theirs()
        rounds = []
        for turn in range(options.rounds):
            first = ours() if turn % 2 else None
            other = theirs()
            rounds.append((other, first or ours()))
    ratios = sorted(mine / other for other, mine in rounds)
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(), "torch": torch.__version__, "timm": timm.__version__,
        "model": options.model, "images": options.images, "batch": batch, "workers": options.workers,
        "bare_images_per_second": statistics.median(one for one, _ in rounds),
        "images_per_second": statistics.median(one for _, one in rounds),
        "ratio": statistics.median(ratios), "ratio_min": ratios[0], "ratio_max": ratios[-1],
    }  # fmt: skip
    print(
        f"{options.model}, batch {batch}: bare {result['bare_images_per_second']:.1f}, extraction "
        f"{result['images_per_second']:.1f} images/s: {result['ratio']:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
