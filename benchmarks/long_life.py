"""Whether a long training grows: memory, files, threads and shared memory over thousands of tiny steps.

A very small autoencoder is pre-trained by the real task, with loader workers, on 200 images of 16 pixels that are made
here; after every 100th optimizer step the process looks at itself and at its workers (Linux: /proc). The first fifth
of the looks is left out. Memory grows by the slope of a straight line through the rest; what is counted has grown if
the least of the second half is more than that of the first. Times of steps (F42: p99 <= 3 x p50) are told, and judged
with --idle only: on a busy machine they tell of its other work.

    python benchmarks/long_life.py [--steps 10000] [--workers 2] [--idle] [--json]

Exit code 1 if memory grows by more than 1 MB in 1,000 steps or anything else at all, or steps are uneven.
"""

import argparse
import itertools
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

import maekit

IMAGES, BATCH, EVERY = 200, 4, 100
LIMIT_MB = 1.0
"""Growth of memory in 1,000 steps that is let pass: allocators settle."""
UNEVEN = 3
"""A step in a hundred may take so many times as long as the middle one."""


def looked() -> dict[str, float]:
    """Return what this process and its children hold now."""
    tasks, shared = [str(os.getpid()), *children()], os.listdir("/dev/shm")
    return {
        "RSS, MB": resident(tasks[0]),
        "RSS of workers, MB": sum(map(resident, tasks[1:])),
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "processes": len(tasks),
        "files in /dev/shm": sum(name.startswith(tuple(f"torch_{task}_" for task in tasks)) for name in shared),
    }


def children() -> list[str]:
    """Return the ids of this process's children."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        found += (task / "children").read_text().split()
    return found


def resident(process: str) -> float:
    """Return a process's resident memory in MB."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> int:
    """Train, look, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--idle", action="store_true", help="nothing else runs here: judge the times of steps too")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    looks: list[dict[str, float]] = []
    times: list[float] = [time.perf_counter()]

    def after_step(*_: Any) -> None:
        times.append(time.perf_counter())
        if (len(times) - 1) % EVERY == 0:
            looks.append({"step": len(times) - 1, **looked()})

    register_optimizer_step_post_hook(after_step)
    with tempfile.TemporaryDirectory() as folder:
        data, run = Path(folder) / "data", Path(folder) / "run"
        data.mkdir()
        generator = np.random.default_rng(0)
        for number in range(IMAGES):
            Image.fromarray(generator.integers(0, 256, (16, 16), dtype=np.uint8)).save(data / f"{number}.png")
        maekit.pretrain(
            {
                "data": str(data), "out": run, "model": "vit_tiny_patch16_224", "img_size": 16, "channels": 1,
                "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1, "decoder_dim": 8, "decoder_depth": 1,
                "decoder_heads": 1, "batch_size": BATCH, "steps": options.steps, "base_lr": 1e-3, "ema": 0.9,
                "workers": options.workers, "device": "cpu", "precision": "fp32", "log_every": 100,
                "save_every": max(1, options.steps // 10),
            }
        )  # fmt: skip
    return told(looks, times, options)


def told(looks: list[dict[str, float]], times: list[float], options: argparse.Namespace) -> int:
    """Print what became of each measure; return the exit code."""
    settled = looks[len(looks) // 5 :]
    steps = [look["step"] for look in settled]
    result: dict[str, Any] = {
        "steps": options.steps, "epochs": options.steps * BATCH / IMAGES, "workers": options.workers,
        "seconds": round(times[-1] - times[0], 1),
    }  # fmt: skip
    grown = False
    for name in looks[0]:
        if name == "step":
            continue
        values = [look[name] for look in settled]
        slope = 1000 * statistics.linear_regression(steps, values).slope
        result[name] = {"first": values[0], "last": values[-1], "most": max(values), "per 1,000 steps": round(slope, 3)}
        half = len(values) // 2
        grown |= slope > LIMIT_MB if "MB" in name else min(values[half:]) > min(values[:half])
    passed = sorted(later - earlier for earlier, later in itertools.pairwise(times[1:]))
    result["step, ms"] = {f"p{p}": round(1000 * passed[len(passed) * p // 100], 2) for p in (50, 99)}
    result["grown"] = grown
    result["uneven"] = result["step, ms"]["p99"] > UNEVEN * result["step, ms"]["p50"]
    for name, value in result.items():
        print(f"{name:<22}", ", ".join(f"{k} {v:g}" for k, v in value.items()) if isinstance(value, dict) else value)
    if options.json:
        print(json.dumps(result))
    return int(grown or (options.idle and result["uneven"]))


if __name__ == "__main__":
    sys.exit(main())
