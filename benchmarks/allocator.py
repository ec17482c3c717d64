"""What keeping freed memory is worth (`maekit.train.allocator`): steps in processes with and without it, in turns.

By the processor's time, one thread; also the pages that a step had to map anew, and memory at the peak.

    python benchmarks/allocator.py [--recipe NAME] [--precision bf16] [--rounds 3] [--steps 20] [--json]
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from maekit.bench.contenders import ours
from maekit.config import resolve
from maekit.recipes import RECIPES
from maekit.settings import Pretrain
from maekit.tasks.pretrain import new_model
from maekit.train.allocator import keep_freed_memory
from maekit.train.device import cpu_model


def measure(options: argparse.Namespace) -> None:
    """Train in this process and print milliseconds and page faults of a step, and MiB at the peak."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.arm == "kept":
        assert keep_freed_memory()
    stated = RECIPES[options.recipe]().settings
    settings = resolve(Pretrain, flags=stated.model_dump(exclude_unset=True))[0]
    model = new_model(settings, settings.channels or 3)
    trained = ours(model, settings.mask_ratio, options.precision, compiled=False)
    images = torch.randn(options.batch or settings.batch_size, model.encoder.in_chans, *model.img_size)
    for _ in range(3):
        trained.step(images)
    began, faults = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(options.steps):
        trained.step(images)
    used = resource.getrusage(resource.RUSAGE_SELF)
    each = 1000 * (time.process_time() - began) / options.steps
    print(json.dumps([each, (used.ru_minflt - faults) / options.steps, used.ru_maxrss / 1024]))


def main() -> None:
    """Let both arms take turns and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="builtin/pretrain-fashion")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--arm", choices=["kept", "given back"], help="measure this one, in this process")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    if options.arm:
        return measure(options)
    found: dict[str, list[list[float]]] = {"given back": [], "kept": []}
    for _ in range(options.rounds):
        for arm, seen in found.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--arm", arm]
            seen.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    ratios = [before[0] / after[0] for before, after in zip(*found.values(), strict=True)]
    middle = {arm: [statistics.median(column) for column in zip(*seen, strict=True)] for arm, seen in found.items()}
    print(f"{cpu_model()}, torch {torch.__version__}; {options.recipe}, {options.precision}, {options.rounds} rounds")
    for arm, (each, faults, peak) in middle.items():
        print(f"{arm:<12} {each:8.1f} ms a step {faults:10,.0f} pages mapped {peak:8,.0f} MiB at the peak")
    print(f"{statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})")
    if options.json:
        print(json.dumps({"recipe": options.recipe, "precision": options.precision, "ratios": ratios, **middle}))
    return None


if __name__ == "__main__":
    main()
