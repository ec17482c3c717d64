"""How a step's cost grows with one setting, as lines for a terminal and as a drawing."""

from collections.abc import Iterator
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from maekit.report.evaluation import aligned
from maekit.report.plots import COLOURS
from maekit.report.scored import Draw

SIZES = {"batch-size": "images", "mask-ratio": "patches kept", "img-size": "patches kept", "threads": "threads"}
"""What of each setting should decide the cost."""
NEAR = 1.1
"""Times what the fastest point makes expect, up to which a point is as expected."""


def told(metrics: dict[str, Any]) -> Iterator[str]:
    """Yield a table of the points, and what it means.

    Args:
        metrics: as `maekit.tasks.bench.bench` returns them for scale.
    """
    over, points, line = metrics["over"], metrics["points"], metrics["line"]
    size = [] if over in ("batch-size", "threads") else [SIZES[over]]
    heads = ("images/s", "s a step", "least to most", "GFLOP/s", "grows as", "FLOPs as", "times the best", "fixed")
    rows: list[tuple[str, ...]] = [(over, *size, *heads)]
    rows += [
        (
            f"{one['value']:g}", *[str(one["size"]) for _ in size], f"{one['images_per_second']:,.4g}",
            f"{one['seconds']:.4g}", f"{one['lowest']:.4g} to {one['highest']:.4g}",
            f"{one['flops_per_second'] / 1e9:,.3g}", _power(one["grows"]), _power(one["expected"]),
            f"{one['over_best']:.2f}", f"{line['fixed_seconds'] / one['fitted']:.0%}",
        )
        for one in points
    ]  # fmt: skip
    yield from aligned(rows)
    yield f"grows as: {SIZES[over]} to this power since the row above; times the best: its time for as many FLOPs"
    rate = line["flops_per_second"]
    rest = f"{rate / 1e9:,.3g} GFLOP/s of a thread" if rate else "nothing that grows with its FLOPs"
    yield f"a step = {line['fixed_seconds']:.3g} s fixed + {rest}; the points miss that by {line['misses']:.0%} at most"
    yield from _verdict(over, points, line["fixed_seconds"])
    if over in ("mask-ratio", "img-size"):
        yield _parts(over, points)


def _power(exponent: float | None) -> str:
    return "" if exponent is None else f"^{exponent:.2f}"


def _verdict(over: str, points: list[dict[str, Any]], fixed: float) -> Iterator[str]:
    """Say where the cost is as expected, and what makes the others dearer."""
    near = [f"{one['value']:g}" for one in points if one["over_best"] <= NEAR]
    yield f"as the FLOPs of the best make expect, within {NEAR - 1:.0%}: {over} {', '.join(near)}"
    for one in points:
        if one["over_best"] > NEAR:
            share = fixed / one["fitted"]
            because = "mostly a fixed cost" if share > 0.5 else f"{share:.0%} of it fixed"
            because += f", {one['attention']:.0%} of its FLOPs products among tokens" if over == "img-size" else ""
            yield f"dearer: {one['value']:g}, {one['over_best']:.2f} times ({because})"


def _parts(over: str, points: list[dict[str, Any]]) -> str:
    first, last = points[0], points[-1]
    ends = f"{over} {first['value']:g} to {last['value']:g}"
    return (
        f"of the FLOPs, {ends}: products among tokens, which grow with their square, {first['attention']:.0%} to "
        f"{last['attention']:.0%}; the decoder, which sees every place, {first['decoder']:.0%} to {last['decoder']:.0%}"
    )


def scale_drawing(metrics: dict[str, Any]) -> Draw:
    """Draw seconds of a step and, below, operations a second against the size; beside them what was to be expected.

    Args:
        metrics: as for `told`.
    """
    over, points, line = metrics["over"], metrics["points"], metrics["line"]
    sizes = [one["size"] for one in points]
    seconds = [one["seconds"] for one in points]
    expected = [one["seconds"] / one["over_best"] for one in points]
    below_above = [
        [one["seconds"] - one["lowest"] for one in points], [one["highest"] - one["seconds"] for one in points]
    ]  # fmt: skip
    rates = [one["flops_per_second"] / 1e9 for one in points]

    def draw(figure: Figure) -> str:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
        above.set_title(_title(metrics), loc="left", fontsize=9)
        above.plot(
            sizes,
            expected,
            "--",
            color=COLOURS[4],
            linewidth=1.2,
            label="FLOPs, at the best point's rate",
        )
        above.plot(
            sizes, [one["fitted"] for one in points], ":", color=COLOURS[1], linewidth=1.4,
            label=f"{line['fixed_seconds']:.2g} s fixed, and FLOPs",
        )  # fmt: skip
        above.errorbar(
            sizes, seconds, yerr=below_above, color=COLOURS[0], linewidth=1.6, marker="o", markersize=4, elinewidth=1,
            capsize=3, label="measured: median, least to most",
        )  # fmt: skip
        above.set_ylabel("seconds a step")
        above.legend(fontsize=8, loc="best")
        below.plot(sizes, rates, color=COLOURS[2], linewidth=1.6, marker="o", markersize=4)
        below.set_ylim(0, 1.15 * max(rates))
        below.set_ylabel("GFLOP/s")
        _axes(above, below, over, points)
        told = ", ".join(f"{one['seconds']:.3g} s at {one['value']:g}" for one in points)
        return f"Seconds a step by {over}: {told}"

    return draw


def _title(metrics: dict[str, Any]) -> str:
    """Return what all points share."""
    (high, wide), threads = metrics["img_size"], metrics.get("threads")
    parts = {
        "img-size": f"{high} x {wide} px", "batch-size": f"batch {metrics['batch_size']}",
        "mask-ratio": f"mask ratio {metrics['mask_ratio']:g}",
        "threads": f"{threads} thread{'s' * (threads != 1)}" if threads else "",
    }  # fmt: skip
    shared = [text for name, text in parts.items() if text and name != metrics["over"]]
    return ", ".join([metrics["model"], metrics["precision"], *shared])


def _axes(above: Axes, below: Axes, over: str, points: list[dict[str, Any]]) -> None:
    """Make both logarithmic, but over the mask ratio: there a straight line is what the method promises."""
    if over == "mask-ratio":
        above.set_ylim(bottom=0)
        above.set_xlim(left=0)
    else:
        above.set_yscale("log")
        above.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        above.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        above.yaxis.set_minor_formatter(NullFormatter())
        below.set_xscale("log")
    below.xaxis.set_major_locator(FixedLocator([one["size"] for one in points]))
    below.xaxis.set_minor_locator(NullLocator())
    below.set_xticklabels([_tick(over, one) for one in points])
    image = {"mask-ratio": "share removed", "img-size": "side"}.get(over)
    below.set_xlabel(f"patches kept of an image, and {image}" if image else over.replace("-", " "))


def _tick(over: str, one: dict[str, Any]) -> str:
    value = f"{one['value']:g}"
    named = {"mask-ratio": f"{one['size']}\n{one['value']:.0%}", "img-size": f"{one['size']}\n{value} px"}
    return named.get(over, value)
