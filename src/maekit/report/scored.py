"""Drawings of how good a model is: confusion, reliability, accuracy by number of trained blocks; tags; numbers.

For the page as SVG or picture, and each as PNG on white for those who want the file.
"""

import io
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from maekit.errors import clean
from maekit.report.plots import _RC, COLOURS, INK, WIDTH, _svg
from maekit.scores.measures import Reliability
from maekit.scores.targets import Answers

NUMBERED, NAMED = 20, 60
"""Up to so many classes the confusion matrix has numbers in its cells, and names beside it."""
MOST_BARS, MOST_NUMBERS, MOST_DOTS = 30, 6, 2000
"""Tags that are drawn, the numbers that are, and the images that have a dot."""
Draw = Callable[[Figure], str]
"""Draws into a figure and returns what a screen reader says."""


def as_svg(draw: Draw, height: float = 3.2) -> str:
    """Return a drawing as an ``<svg>`` element for the page."""
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        return _svg(figure, draw(figure))


def as_picture(draw: Draw, height: float = 3.2, width: float = WIDTH) -> Image.Image:
    """Return a drawing as a picture on white."""
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(width, height), layout="constrained", dpi=150, facecolor="white")
        draw(figure)
        FigureCanvasAgg(figure)
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
    return Image.open(stream).convert("RGB")


def confusion_picture(matrix: Tensor, classes: Sequence[str]) -> Image.Image:
    """Draw a confusion matrix (C, C): rows true, columns predicted, each row's shares as shades.

    Cells hold numbers of images up to 20 classes, names stand beside up to 60; beyond, a class is a line of pixels.
    """
    side = min(12.0, 3.4 + 0.3 * min(len(classes), NAMED))
    return as_picture(lambda figure: _confusion(figure, matrix.numpy(), classes), side, side)


def _confusion(figure: Figure, matrix: np.ndarray, classes: Sequence[str]) -> str:
    panel = figure.add_subplot()
    panel.grid(visible=False)
    shares = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    panel.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    panel.set_xlabel("predicted")
    panel.set_ylabel("true")
    if len(classes) <= NAMED:
        names = [clean(name, 24) for name in classes]
        panel.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        panel.set_yticks(range(len(names)), names, fontsize=7)
    if len(classes) <= NUMBERED:
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                colour = "white" if shares[row, column] > 0.6 else INK
                panel.text(column, row, f"{count:,}", ha="center", va="center", fontsize=7, color=colour)
    return "Confusion matrix"


def reliability_drawing(bins: Reliability) -> Draw:
    """Draw accuracy against confidence, bin by bin, over a diagonal where both are equal; below, images per bin."""
    width = 1 / len(bins.count)
    middle = (np.arange(len(bins.count)) + 0.5) * width
    filled = bins.count.numpy() > 0

    def draw(figure: Figure) -> str:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        above.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle="--", label="calibrated")
        above.bar(
            middle[filled], bins.accuracy.numpy()[filled], 0.92 * width, color=COLOURS[0], alpha=0.55, label="accuracy"
        )
        above.plot(
            bins.confidence.numpy()[filled], bins.accuracy.numpy()[filled], "o", color=COLOURS[1], markersize=3,
            label="at the mean confidence",
        )  # fmt: skip
        above.set_xlim(0, 1)
        above.set_ylim(0, 1)
        above.set_ylabel("accuracy")
        above.legend(loc="upper left", fontsize=8)
        below.bar(middle, bins.count.numpy(), 0.92 * width, color=COLOURS[4], alpha=0.6)
        below.set_ylabel("images")
        below.set_xlabel("confidence")
        return f"Reliability: expected calibration error {bins.ece:.3f}"

    return draw


def partial_drawing(curve: Mapping[str, float], probe: float | None) -> Draw:
    """Draw accuracy against the number of trained blocks (paper figure 9), and the linear probe as a level.

    Args:
        curve: blocks as they are spelled ("0", "0.5", "4", "all") -> accuracy; drawn in this order, evenly spaced.
        probe: accuracy of the linear probe; None: not drawn.
    """

    def draw(figure: Figure) -> str:
        panel = figure.add_subplot()
        places = range(len(curve))
        panel.plot(places, list(curve.values()), color=COLOURS[0], linewidth=1.6, marker="o", markersize=4,
                   label="partial fine-tuning")  # fmt: skip
        for place, value in zip(places, curve.values(), strict=True):
            panel.annotate(f"{value:.3f}", (place, value), (0, 6), textcoords="offset points", ha="center", fontsize=8)
        if probe is not None:
            panel.axhline(probe, color=COLOURS[1], linewidth=1.2, linestyle="--", label=f"linear probe {probe:.3f}")
        panel.set_xticks(places, list(curve))
        panel.margins(y=0.15)
        panel.set_xlabel("blocks fine-tuned")
        panel.set_ylabel("top-1 accuracy")
        panel.legend(loc="lower right", fontsize=8)
        return "Accuracy by blocks fine-tuned: " + ", ".join(f"{name} {value:.3f}" for name, value in curve.items())

    return draw


def tags_drawing(names: Sequence[str], ap: Sequence[float], share: Sequence[float]) -> Draw:
    """Draw the average precision of each tag, from the top, and where chance would be: the share of images with it."""

    def draw(figure: Figure) -> str:
        panel = figure.add_subplot()
        places = np.arange(len(names))
        panel.grid(axis="y", visible=False)
        panel.barh(places, ap, height=0.62, color=COLOURS[0], alpha=0.55, linewidth=0)
        panel.scatter(share, places, marker="|", s=90, color=INK, zorder=3, label="chance: share of images")
        for place, value in zip(places, ap, strict=True):
            panel.annotate(f"{value:.3f}", (value, place), (5, 0), textcoords="offset points", va="center", fontsize=8)
        panel.set_yticks(places, [clean(name, 30) for name in names])
        panel.set_ylim(len(names) - 0.4, -0.6)
        panel.set_xlim(0, 1.12)
        panel.set_xlabel("average precision")
        figure.legend(loc="outside upper right", fontsize=8)
        return "Average precision: " + ", ".join(f"{name} {value:.3f}" for name, value in zip(names, ap, strict=True))

    return draw


def tags_height(count: int) -> float:
    """Return the height in inches of a drawing of so many tags."""
    return 1.0 + 0.27 * count


def numbers_drawing(answers: Answers, names: Sequence[str]) -> Draw:
    """Draw, for each number a row: predicted against true over the diagonal, and how the errors are spread."""
    step = max(1, len(answers.index) // MOST_DOTS)
    shown = min(len(names), MOST_NUMBERS)

    def draw(figure: Figure) -> str:
        rows = figure.subplots(shown, 2, squeeze=False, width_ratios=(1.15, 1))
        for at, (left, right) in enumerate(rows):
            true, said = answers.truth[:, at].numpy(), answers.said[:, at].numpy()
            ends = [min(true.min(), said.min()), max(true.max(), said.max())]
            left.plot(ends, ends, color=INK, linewidth=0.8, linestyle="--")
            left.plot(true[::step], said[::step], "o", color=COLOURS[0], markersize=3, alpha=0.5, markeredgewidth=0)
            left.set_xlabel(f"{clean(names[at], 30)}, true")
            left.set_ylabel("predicted")
            right.hist(said - true, bins=min(40, max(8, len(true) // 8)), color=COLOURS[1], alpha=0.6)
            right.axvline(0, color=INK, linewidth=0.8)
            right.set_xlabel("predicted - true")
            right.set_ylabel("images")
        return "Predicted against true, and errors: " + ", ".join(names[:shown])

    return draw
