"""Tables and plots of robustness: per kind and severity, per fraction, beside what the paper published."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maekit.report.plots import COLOURS
from maekit.report.tables import Cell
from maekit.scores.corruption import GROUPS, Corruption, Errors

PUBLISHED: dict[str, dict[str, float]] = {
    "MAE ViT-B": {"in-c": 0.517, "in-a": 0.359, "in-r": 0.483, "in-sketch": 0.345},
    "MAE ViT-L": {"in-c": 0.418, "in-a": 0.571, "in-r": 0.599, "in-sketch": 0.453},
    "MAE ViT-H": {"in-c": 0.338, "in-a": 0.682, "in-r": 0.644, "in-sketch": 0.496},
    "MAE ViT-H 448 px": {"in-c": 0.368, "in-a": 0.767, "in-r": 0.665, "in-sketch": 0.509},
    "supervised ViT-B": {"in-c": 0.458, "in-a": 0.272, "in-r": 0.494, "in-sketch": 0.356},
    "supervised ViT-L": {"in-c": 0.423, "in-a": 0.296, "in-r": 0.509, "in-sketch": 0.375},
    "supervised ViT-H": {"in-c": 0.413, "in-a": 0.331, "in-r": 0.503, "in-sketch": 0.380},
    "best before MAE": {"in-c": 0.425, "in-a": 0.358, "in-r": 0.487, "in-sketch": 0.360},
}
"""Top-1, for C the mCE (lower is better), of models fine-tuned on ImageNet-1K: arXiv 2111.06377, appendix B."""

_RC: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.2,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "text.parse_math": False,
}


def published(protocol: str) -> dict[str, float]:
    """Return what the paper printed for a protocol, by model; {} where it printed nothing."""
    return {model: values[protocol] for model, values in PUBLISHED.items() if protocol in values}


def corruption_rows(errors: Errors, found: Mapping[str, Corruption]) -> tuple[list[str], list[list[Cell]]]:
    """Return headers and one row for each kind: its group, error at each severity, mean error, CE, relative CE."""
    severities = sorted({severity for _, severity in errors})
    group_of = {kind: group for group, kinds in GROUPS.items() for kind in kinds}
    rows: list[list[Cell]] = [
        [kind, group_of.get(kind, ""), *(errors.get((kind, s)) for s in severities), one.error, one.ce, one.relative]
        for kind, one in found.items()
    ]
    return ["kind", "group", *(f"severity {s}" for s in severities), "error", "CE", "relative CE"], rows


def draw_corruptions(errors: Errors, clean: float | None, names: Sequence[str] = ()) -> bytes:
    """Draw error against severity, a panel for each group, a line for each kind; return a PNG.

    Args:
        errors: by kind and severity.
        clean: error on the images as they are, a dashed line.
        names: the title's parts.
    """
    groups = {
        group: [kind for kind in kinds if any(kind == cell[0] for cell in errors)] for group, kinds in GROUPS.items()
    }
    groups = {group: kinds for group, kinds in groups.items() if kinds}
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(2.6 * max(2, len(groups)), 3.2), layout="constrained")
        panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
        for panel, (group, kinds) in zip(panels, groups.items(), strict=True):
            for at, kind in enumerate(kinds):
                points = sorted((severity, error) for (name, severity), error in errors.items() if name == kind)
                _line(panel, points, kind.replace("_", " "), at)
            if clean is not None:
                panel.axhline(clean, color="#555555", linewidth=1, linestyle="--")
            panel.set_title(group, fontsize=9)
            panel.set_xlabel("severity")
            panel.set_xticks(sorted({severity for _, severity in errors}))
            panel.set_ylim(0, 1)
            panel.legend(fontsize=7, loc="best")
        panels[0].set_ylabel("top-1 error (dashed: clean)")
        figure.suptitle(" · ".join(names), fontsize=10)
        return _png(figure)


def draw_occlusion(
    curves: Mapping[str, Sequence[tuple[float, float]]], chance: float, names: Sequence[str] = ()
) -> bytes:
    """Draw accuracy against the fraction of patches, a line for each way of occlusion; return a PNG."""
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        panel = figure.add_subplot()
        for at, (name, points) in enumerate(curves.items()):
            _line(panel, sorted(points), name, at)
        panel.axhline(chance, color="#555555", linewidth=1, linestyle=":", label="chance")
        panel.set_ylim(0, 1)
        panel.set_xlabel("fraction of the patches")
        panel.set_ylabel("top-1 accuracy")
        panel.legend(fontsize=8)
        figure.suptitle(" · ".join(names), fontsize=10)
        return _png(figure)


def _line(panel: Axes, points: Sequence[tuple[float, float]], label: str, at: int) -> None:
    x, y = zip(*points, strict=True)
    panel.plot(x, y, color=COLOURS[at % len(COLOURS)], marker="o", markersize=3, linewidth=1.5, label=label)


def _png(figure: Figure) -> bytes:
    """Render without a date, so that equal data give equal bytes."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150, metadata={"Software": None})
    return stream.getvalue()
