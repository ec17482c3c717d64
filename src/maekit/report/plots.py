"""Curves and bars as inline SVG.

Drawn with matplotlib's Figure objects (no pyplot, no global figures). Text stays text, takes the page's font and
colour (``currentColor``), and lines have colours that read on white and on black: one drawing serves light, dark and
print. Equal data give equal text: no dates, no random ids.
"""

import hashlib
import io
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from maekit.errors import clean

INK = "#010203"
"""Stands for the page's text colour until the drawing is done."""
COLOURS = ("#3f7fd0", "#d9782d", "#4a9a5c", "#a866b8", "#8a8f98")
WIDTH = 6.4
"""Inches of 72 px: small enough that text is still readable at the width of a phone."""
MAX_POINTS = 800
LOG_SPAN = 8.0
"""A loss whose largest value is this many times the smallest gets a logarithmic axis."""

_RC: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "grid.color": INK,
    "grid.alpha": 0.14,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "axes.formatter.use_mathtext": False,
}


def curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Draw loss, learning rate and whatever scores (names with a slash) the records hold, against epochs.

    The recorded loss is drawn thin and a moving mean over a twentieth of the run on top; the axis is logarithmic when
    the loss spans a factor of 8. Records without a value, or with one that is not finite, are left out.

    Args:
        metrics: records of metrics.jsonl; "epoch" is the x axis, "step" where there are no epochs.

    Returns:
        An ``<svg>`` element; empty when there is nothing to draw.
    """
    axis = "epoch" if any("epoch" in record for record in metrics) else "step"
    scores = sorted({name for record in metrics for name in record if "/" in name})
    series = {name: _series(_carried(metrics), axis, name) for name in ("loss", "lr", *scores)}
    series = {name: points for name, points in series.items() if len(points[0])}
    if not series:
        return ""
    with matplotlib.rc_context(_RC):
        heights = [1.6 if name == "loss" else 0.8 for name in series]
        figure = Figure(figsize=(WIDTH, 0.5 + 1.35 * sum(heights)), layout="constrained")
        panels = figure.subplots(len(series), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for panel, (name, (x, y)) in zip(panels, series.items(), strict=True):
            if name == "loss":
                _draw_loss(panel, x, y)
            else:
                _draw_line(panel, x, y, _spoken(name), at=list(series).index(name))
        panels[-1].set_xlabel(axis)
        panels[-1].xaxis.set_major_locator(MaxNLocator(8, min_n_ticks=2))
        return _svg(figure, "Curves over the run: " + ", ".join(_spoken(name) for name in series))


def _spoken(name: str) -> str:
    return "learning rate" if name == "lr" else clean(name, 30)


def _carried(metrics: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Give records of scores, which hold a step only, the epoch of that step."""
    metrics = list(metrics)
    both = [record for record in metrics if _finite(record.get("epoch"), record.get("step")) and record["step"]]
    per_step = both[-1]["epoch"] / both[-1]["step"] if both else 0.0
    return [{"epoch": per_step * record["step"] if "step" in record else 0.0, **record} for record in metrics]


def _series(metrics: Sequence[Mapping[str, Any]], axis: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return finite points, thinned to means of neighbours where there are more than `MAX_POINTS`."""
    points = [(record[axis], record[name]) for record in metrics if _finite(record.get(axis), record.get(name))]
    x, y = np.array(points, dtype=np.float64).reshape(-1, 2).T
    parts = math.ceil(len(x) / MAX_POINTS)
    if parts > 1:
        cuts = np.arange(0, len(x), parts)
        counts = np.diff(np.append(cuts, len(x)))
        x, y = np.add.reduceat(x, cuts) / counts, np.add.reduceat(y, cuts) / counts
    return x, y


def _finite(*values: Any) -> bool:
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the centred moving mean over a twentieth of the values; it narrows at the ends, so nothing lags."""
    half = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    reach = np.minimum(half, np.minimum(at, len(values) - 1 - at))
    return (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)


def _draw_loss(panel: Axes, x: np.ndarray, y: np.ndarray) -> None:
    smoothed = smooth(y)
    if len(x) >= 40:
        panel.plot(x, y, color=COLOURS[0], linewidth=0.7, alpha=0.4, label="recorded")
        panel.plot(x, smoothed, color=COLOURS[0], linewidth=1.6, label="moving mean")
        panel.legend(loc="upper right", fontsize=8)
    else:
        panel.plot(x, y, color=COLOURS[0], linewidth=1.6, marker="o" if len(x) < 12 else None, markersize=3)
    logarithmic = y.min() > 0 and y.max() > LOG_SPAN * y.min()
    if logarithmic:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.yaxis.set_major_formatter(FuncFormatter(_number))
        panel.yaxis.set_minor_formatter(NullFormatter())
    panel.set_ylabel("loss (log scale)" if logarithmic else "loss")


def _draw_line(panel: Axes, x: np.ndarray, y: np.ndarray, label: str, at: int) -> None:
    panel.plot(x, y, color=COLOURS[at % len(COLOURS)], linewidth=1.6, marker="o" if len(x) < 12 else None, markersize=3)
    panel.set_ylabel(label)
    if label == "learning rate":
        panel.set_ylim(bottom=0)
        panel.yaxis.set_major_formatter(FuncFormatter(_number))
        panel.yaxis.set_major_locator(MaxNLocator(4))


def lines(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, x: str, y: str = "top-1 accuracy") -> str:
    """Draw one line with dots for each series of (x, y) values.

    Args:
        series: name -> x values and y values.
        x: what the horizontal axis is.
        y: what the vertical axis is.

    Returns:
        An ``<svg>`` element; empty when there is nothing to draw.
    """
    series = {name: points for name, points in series.items() if len(points[0])}
    if not series:
        return ""
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        panel = figure.add_subplot()
        for at, (name, (xs, ys)) in enumerate(series.items()):
            style = ("-", "--", ":", "-.")[at // len(COLOURS) % 4]
            colour = COLOURS[at % len(COLOURS)]
            panel.plot(xs, ys, style, color=colour, linewidth=1.6, marker="o", markersize=3, label=clean(name, 40))
        panel.set_xlabel(clean(x, 60))
        panel.set_ylabel(clean(y, 60))
        panel.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
        if len(series) > 1:
            panel.legend(fontsize=8)
        told = (
            f"{name}: " + ", ".join(f"{b:.3f} at {a:g}" for a, b in zip(*points, strict=True))
            for name, points in series.items()
        )
        return _svg(figure, "Lines: " + "; ".join(told))


def _number(value: float, _: int | None = None) -> str:
    """Return 0.05, 2e-05: no factor far away at the end of the axis."""
    return f"{value:.3g}"


def bars(measures: Mapping[str, Mapping[str, Sequence[float]]], *, label: str = "top-1 accuracy") -> str:
    """Compare arms: a bar for the mean of the seeds, a line for their standard deviation, a dot for each seed.

    Args:
        measures: title -> arm -> one value per seed, such as ``{"10 labels a class": {"from MAE": [.66, .70], "from
            scratch": [.61, .60]}}``; an arm has the same colour in every measure.
        label: what the values are; bars begin at 0.

    Returns:
        An ``<svg>`` element; empty when there is nothing to draw.
    """
    measures = {title: {arm: v for arm, v in arms.items() if len(v)} for title, arms in measures.items()}
    arms = list(dict.fromkeys(arm for values in measures.values() for arm in values))
    if not arms:
        return ""
    rows = _rows(measures)
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(WIDTH, 0.6 + 0.27 * (rows[-1][0] + 1.2)), layout="constrained")
        panel = figure.add_subplot()
        panel.grid(axis="y", visible=False)
        panel.spines["left"].set_visible(False)
        panel.tick_params(axis="y", length=0)
        for y, _, arm, values in rows:
            _draw_arm(panel, y, values, COLOURS[arms.index(arm) % len(COLOURS)])
        _name_rows(panel, rows)
        ends = [max([_mean(v) + _spread(v), *v]) for *_, v in rows]
        panel.set_xlim(min(0.0, *(min(v) for *_, v in rows)), max(ends) * 1.34 or 1.0)
        for (y, _, _, values), end in zip(rows, ends, strict=True):
            panel.annotate(_told(values), (end, y), (7, 0), textcoords="offset points", va="center", fontsize=8.5)
        panel.set_xlabel(clean(label, 60))
        return _svg(figure, "Bars: " + "; ".join(f"{t} {a} {_told(v)}".strip() for _, t, a, v in rows))


Row = tuple[float, str, str, Sequence[float]]


def _rows(measures: Mapping[str, Mapping[str, Sequence[float]]]) -> list[Row]:
    """Return (y, title, arm, values) from the top; a title takes a row of its own."""
    rows: list[Row] = []
    y = -1.0
    for title, arms in measures.items():
        y += (1.1 if title else 0.0) + (0.35 if rows else 0.0)
        for arm, values in arms.items():
            y += 1.0
            rows.append((y, title, arm, values))
    return rows


def _draw_arm(panel: Axes, y: float, values: Sequence[float], colour: str) -> None:
    mean, spread = _mean(values), _spread(values)
    panel.barh(y, mean, height=0.62, color=colour, alpha=0.55, linewidth=0)
    if len(values) > 1:
        panel.errorbar(mean, y, xerr=spread, color=INK, linewidth=1.0, capsize=3, zorder=3)
        offsets = np.linspace(-0.17, 0.17, len(values))
        panel.scatter(values, y + offsets, s=12, color=colour, edgecolors=INK, linewidths=0.5, zorder=4)


def _name_rows(panel: Axes, rows: Sequence[Row]) -> None:
    panel.set_yticks([y for y, *_ in rows], [clean(arm, 30) for _, _, arm, _ in rows])
    panel.set_ylim(rows[-1][0] + 0.6, -0.7)
    titles = {title: y for y, title, _, _ in reversed(rows) if title}
    for title, y in titles.items():
        panel.annotate(
            clean(title, 60), (0, y - 0.82), (3, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            va="center", fontweight="bold", annotation_clip=False,
        )  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _spread(values: Sequence[float]) -> float:
    """Return the standard deviation over seeds (n - 1)."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _told(values: Sequence[float]) -> str:
    spread = f" ± {_spread(values):.3f}" if len(values) > 1 else ""
    return f"{_mean(values):.3f}{spread}"


_FONT = re.compile(r"font: ([^;\"]*?[\d.]+px) [^;\"]*")
_UNUSED_ID = re.compile(r' id="([^"]*)"')


def _svg(figure: Figure, spoken: str) -> str:
    """Render, and make the file an element of a page: no prologue, comments, page-wide style or ids nobody uses.

    Args:
        figure: is drawn, and not closed: it belongs to no window.
        spoken: what a screen reader says.
    """
    stream = io.StringIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": "maekit"}):
        # names in scripts that DejaVu lacks are measured wrong and still written as text, which the browser draws
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    text = stream.getvalue()
    text = re.sub(r"<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = _FONT.sub(r"font: \1 system-ui, 'DejaVu Sans', sans-serif", text).replace(INK, "currentColor")
    text = _own_ids(text)
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height|xmlns:xlink|version)="[^"]*"', "", head)
    label = re.sub(r"[<>&\"]", " ", clean(spoken, 500))
    return f'{head} role="img" aria-label="{label}" stroke-linejoin="round" stroke-linecap="butt">{rest}'.strip()


def _own_ids(text: str) -> str:
    """Drop ids that nothing refers to and make the others unique to this drawing: a page holds several."""
    mine = hashlib.sha256(text.encode()).hexdigest()[:8]
    used = set(re.findall(r"url\(#([^)]*)\)", text)) | set(re.findall(r'xlink:href="#([^"]*)"', text))
    text = _UNUSED_ID.sub(lambda found: f' id="{mine}-{found[1]}"' if found[1] in used else "", text)
    return re.sub(r'xlink:href="#', f'href="#{mine}-', re.sub(r"url\(#", f"url(#{mine}-", text))
