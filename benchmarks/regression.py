"""Seconds until the loss at which scikit-learn's logistic regression stops, by it and by maekit's.

scikit-learn runs with its defaults (L-BFGS, tolerance 1e-4); ours runs with falling tolerances until its loss is not
above, and the time of that whole solve, preparation included, is what counts. Both have all threads, in turns.

    python benchmarks/regression.py [--samples 50000] [--width 384] [--classes 10] [--rounds 5] [--json]
"""

import argparse
import json
import platform
import statistics
import time
import warnings

import sklearn
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from maekit.scores.regression import Problem, Regression, standardise

TOLERANCES = (1e-4, 3e-5, 1e-5, 3e-6, 1e-6)


def made_up(samples: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    """Return features correlated as a network's are: a spectrum that falls as a power; classes are shifted means."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, width + 1) ** -0.75
    mixing = torch.randn(width, width, generator=generator) * spectrum[:, None]
    means = 0.36 * torch.randn(classes, width, generator=generator)
    y = torch.randint(classes, (samples,), generator=generator)
    x = (torch.randn(samples, width, generator=generator) + means[y]) @ mixing
    (x,) = standardise(x + 0.3 * torch.randn(samples, width, generator=generator))
    return x, y


def theirs(x: Tensor, y: Tensor, strength: float) -> tuple[float, float, int]:
    """Return seconds, loss and iterations of scikit-learn."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LogisticRegression(C=strength, max_iter=5000).fit(x.numpy(), y.numpy())
    took = time.perf_counter() - start
    weight, bias = torch.from_numpy(model.coef_.T).double(), torch.from_numpy(model.intercept_)
    loss = F.cross_entropy(x.double() @ weight + bias, y) + weight.square().sum() / (2 * strength * len(x))
    return took, float(loss), int(model.n_iter_[0])


def ours(x: Tensor, y: Tensor, strength: float, tolerance: float) -> tuple[float, Regression]:
    """Return seconds and what maekit finds."""
    start = time.perf_counter()
    solved = Problem(x, y, int(y.max()) + 1).solve(strength, tolerance=tolerance)
    return time.perf_counter() - start, solved


def compare(x: Tensor, y: Tensor, strength: float, rounds: int) -> dict[str, float]:
    """Time both in turns."""
    _, wanted, iterations = theirs(x, y, strength)
    tolerance = next(t for t in TOLERANCES if ours(x, y, strength, t)[1].loss <= wanted)
    pairs = []
    for turn in range(rounds):
        first = ours(x, y, strength, tolerance) if turn % 2 else None
        other = theirs(x, y, strength)[0]
        mine, solved = first or ours(x, y, strength, tolerance)
        pairs.append((other, mine))
    ratios = sorted(other / mine for other, mine in pairs)
    return {
        "C": strength, "loss_theirs": wanted, "loss_ours": solved.loss, "iterations_theirs": iterations,
        "iterations_ours": solved.iterations, "tolerance": tolerance,
        "seconds_theirs": statistics.median(one for one, _ in pairs),
        "seconds_ours": statistics.median(one for _, one in pairs),
        "ratio": statistics.median(ratios), "ratio_min": ratios[0], "ratio_max": ratios[-1],
    }  # fmt: skip


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--strength", type=float, nargs="+", default=[1e-3, 0.1, 10.0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    x, y = made_up(options.samples, options.width, options.classes)
    found = [compare(x, y, strength, options.rounds) for strength in options.strength]
    print(f"{'C':>8} {'loss':>12} {'theirs':>9} {'ours':>9} {'iterations':>12}  times faster")
    for one in found:
        steps = f"{one['iterations_theirs']} / {one['iterations_ours']}"
        spread = f"{one['ratio']:.1f} ({one['ratio_min']:.1f} to {one['ratio_max']:.1f})"
        print(
            f"{one['C']:8g} {one['loss_ours']:12.6f} {one['seconds_theirs']:8.2f}s {one['seconds_ours']:8.2f}s "
            f"{steps:>12}  {spread}"
        )
    if options.json:
        where = {"device": platform.processor() or "cpu", "threads": torch.get_num_threads()}
        where |= {"torch": torch.__version__, "sklearn": sklearn.__version__, "rounds": options.rounds}
        print(json.dumps({**where, "results": found}))


if __name__ == "__main__":
    main()
