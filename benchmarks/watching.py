"""What watching workers and files adds: processor time beside a batch, and the contents of all files hashed once.

Batches of the same samples come through torch's bare DataLoader and through `maekit.data.workers.Pool`, in turns, from
one worker; what differs is the memory that says what a worker is at, the thread that looks at it every second, and the
list of what is on its way. It is the main process's processor time, since there it would hold up a step.

    python benchmarks/watching.py --data PATH [--batch 16] [--rounds 5] [--batches 150] [--json]
"""

import argparse
import json
import multiprocessing
import statistics
import time
from itertools import islice

import torch
from torch.utils.data import DataLoader

from maekit.data.augment import PretrainView
from maekit.data.manifest import contents
from maekit.data.samples import Key, Samples, collate
from maekit.data.sources import open_source
from maekit.data.workers import PREFETCH, Pool, start_server
from maekit.train.device import cpu_model


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    source = open_source(options.data)
    keys: list[list[Key]] = [
        [(0, (number * options.batch + k) % len(source)) for k in range(options.batch)]
        for number in range(options.batches + 20)
    ]

    def samples() -> Samples:
        return Samples(source, PretrainView((224, 224)), 3, 0, 196)

    def bare() -> float:
        start_server()
        loader = DataLoader(
            samples(), batch_sampler=keys, num_workers=1, collate_fn=collate, prefetch_factor=PREFETCH,  # type: ignore[arg-type]
            multiprocessing_context=multiprocessing.get_context("forkserver"),
        )  # fmt: skip
        return spent(iter(loader))

    def watched() -> float:
        return spent(Pool(samples(), 1, timeout=120.0).batches(keys))

    def spent(batches: object) -> float:
        """Return the main process's seconds for a batch, once the worker runs."""
        for _ in islice(batches, 20):  # type: ignore[call-overload]
            pass
        began = time.process_time()
        for _ in batches:  # type: ignore[attr-defined]
            pass
        return (time.process_time() - began) / options.batches

    times: dict[str, list[float]] = {"bare": [], "watched": []}
    for _ in range(options.rounds):
        for name, way in (("bare", bare), ("watched", watched)):
            times[name].append(way())
    began, processor = time.perf_counter(), time.process_time()
    contents({"train": source}, None)
    hashed, processor = time.perf_counter() - began, time.process_time() - processor
    result = {
        "device": cpu_model(), "torch": torch.__version__, "batch": options.batch, "rounds": options.rounds,
        **{f"{name}: milliseconds a batch": 1000 * statistics.median(values) for name, values in times.items()},
        "watching: milliseconds a batch": 1000 * statistics.median(
            after - before for before, after in zip(times["bare"], times["watched"], strict=True)
        ),
        "images": len(source), "seconds to hash them": hashed, "of the processor": processor,
    }  # fmt: skip
    for name, value in result.items():
        print(f"{name:<32} {value:.4g}" if isinstance(value, float) else f"{name:<32} {value}")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
