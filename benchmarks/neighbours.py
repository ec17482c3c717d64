"""Time and memory of kNN over the bare matrix product that it needs, in one process, in turns.

python benchmarks/neighbours.py [--bank 50000] [--queries 10000] [--width 384] [--rounds 7] [--json]
"""

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable

import torch

from maekit.scores.neighbours import SIMILARITIES, knn_sweep


def seconds(call: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak() -> float:
    """Return the most memory this process has held, in GiB (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Run both in turns and print the ratio of each round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    torch.manual_seed(0)
    bank, queries = (torch.randn(count, options.width) for count in (options.bank, options.queries))
    labels, asked = (torch.randint(options.classes, (len(part),)) for part in (bank, queries))
    rows = SIMILARITIES // len(bank)

    def bare() -> None:
        for part in queries.split(rows):
            part @ bank.T

    def ours() -> None:
        knn_sweep((bank, labels), (queries, asked), options.classes, ks=[5, 10, 20], temperatures=[0.07])

    before = peak()
    ours()
    more = peak() - before
    bare()
    found = []
    for turn in range(options.rounds):
        pair = {call.__name__: seconds(call) for call in ((bare, ours) if turn % 2 == 0 else (ours, bare))}
        found.append((pair["bare"], pair["ours"]))
    ratios = sorted(mine / theirs for theirs, mine in found)
    result = {
        "device": platform.processor() or "cpu", "threads": torch.get_num_threads(), "torch": torch.__version__,
        "shape": [options.bank, options.queries, options.width], "rounds": options.rounds,
        "product_seconds": statistics.median(one for one, _ in found),
        "knn_seconds": statistics.median(one for _, one in found),
        "ratio": statistics.median(ratios), "ratio_min": ratios[0], "ratio_max": ratios[-1],
        "gib_above_features": more,
    }  # fmt: skip
    print(
        f"product {result['product_seconds']:.2f} s, kNN {result['knn_seconds']:.2f} s: "
        f"{result['ratio']:.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f}), {more:.2f} GiB above the features"
    )
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
