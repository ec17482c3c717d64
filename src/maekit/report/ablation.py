"""The table of `maekit ablate` beside the paper's: page, Markdown, CSV, JSON, text for the terminal."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from maekit.errors import clean
from maekit.report.evaluation import aligned, difference_cells, spread
from maekit.report.files import write_whole
from maekit.report.grids import write_png
from maekit.report.page import Figure, Section, Table, write_report
from maekit.report.plots import COLOURS, INK
from maekit.report.scored import Draw, as_picture, as_svg
from maekit.report.tables import Cell, to_csv, to_markdown
from maekit.train.log import clock

NAMES = {"finetune": "fine-tuned", "probe": "linear probe"}
NOTE = (
    "Mean ± standard deviation over seeds; one value stands alone. The paper's figures are top-1 of ViT-L/16 (where a "
    "row does not say otherwise) on ImageNet-1K and stand here for their order, not to be reached. GFLOPs: of one "
    "image in a step, forward and backward; time: of the training itself, by its rate, without set-up and reports; "
    "speed-up: over the row in bold, in table2-wallclock over that of its size with mask tokens in the encoder; "
    "memory: peak of the process, on a GPU that of the device."
)
JUDGED = (
    "Pairs of rows that the paper tells apart: by figures that differ by more than .0023, or by its words. Confirmed "
    "and contradicted: p below .05 in a paired t-test over seeds, not corrected for the number of pairs; within the "
    "spread: otherwise. One seed cannot tell a difference from chance."
)


def ablation_report(folder: Path, metrics: dict[str, Any]) -> Path:
    """Write ``ablation.html``, ``.md``, ``.csv`` and ``.json``; the figure as ``.png`` while there is a score.

    Args:
        folder: holds config.yaml.
        metrics: as `maekit.tasks.ablate.ablate` returns them.

    Raises:
        MaekitError: E-ENV-OUT if nothing can be written.
    """
    write_whole(folder / "ablation.json", (json.dumps(metrics, indent=1) + "\n").encode())
    write_whole(folder / "ablation.csv", to_csv(*_long(metrics)))
    headers, cells = scores_table(metrics)
    order_headers, order = order_table(metrics)
    text = f"{metrics['title']} ({metrics['source']}), {_where(metrics)}.\n\n".encode() + to_markdown(
        headers, cells, [*metrics["summary"], *_notes(metrics)]
    )
    text += b"\n" + to_markdown(order_headers, order, [JUDGED]) if order else b""
    write_whole(folder / "ablation.md", text)
    if measures := _scored(metrics):
        write_png(folder / "ablation.png", as_picture(_drawing(metrics, measures), _height(metrics, measures)))
    else:  # a table that begins anew has none of its own yet
        (folder / "ablation.png").unlink(missing_ok=True)
    default = [at for at, row in enumerate(metrics["rows"]) if row["name"] == metrics["default"]]
    sections = [
        Section("Figure", figures=_figures(metrics)),
        Section("Numbers", tables=[Table(headers, cells, NOTE, default)], text=_notes(metrics)),
        Section("Order", text=[*metrics["summary"], JUDGED], tables=[Table(order_headers, order)] if order else []),
        Section("Configuration", details={"config.yaml": (folder / "config.yaml").read_text("utf-8").rstrip()}),
    ]
    left = metrics["runs"] - metrics["done"]
    intro = [f"{metrics['title']} ({metrics['source']}), {_where(metrics)}. The row in bold is the base of the others."]
    write_report(
        folder / "ablation.html",
        title=f"Ablation: {metrics['table']}",
        intro=intro + ([f"Not finished: {left} of {metrics['runs']} runs are missing."] if left else []),
        sections=sections,
    )
    return folder / "ablation.html"


def told(metrics: dict[str, Any]) -> str:
    """Return the table for a terminal, and what it says of the order."""
    headers, cells = scores_table(metrics)
    return "\n".join([*aligned([headers, *cells]), *_notes(metrics), "", *metrics["summary"]])


def planned(metrics: dict[str, Any]) -> str:
    """Return what a dry run says: rows, operations, time, disk."""
    headers = ["row", "", "GFLOPs an image", "runs", "PFLOPs", "time"]
    cells: list[list[Cell]] = [
        [row["name"], row["label"], f"{row['gflops_per_image']:.3g}", row["runs"], f"{row['flops'] / 1e15:.3g}",
         _duration(row["seconds"])]
        for row in metrics["rows"]
        if not row["absent"]
    ]  # fmt: skip
    lines = [
        f"{metrics['title']}, scale {metrics['scale']}, {metrics['seeds']} seeds, {metrics['train_images']:,} images"
    ]
    lines += aligned([headers, *cells]) + _notes(metrics)
    lines += [f"Not counted: {', '.join(metrics['uncounted'])}."] if metrics["uncounted"] else []
    lines += [
        f"{metrics['runs']} runs, {metrics['done']} of them done already; what rows share is done once.",
        f"left: {metrics['flops'] / 1e15:.3g} PFLOPs, about {_duration(metrics['seconds'])} on {metrics['device']} at "
        f"{metrics['flops_per_second'] / 1e9:.3g} GFLOP/s (steps of row {metrics['timed']} timed, without loading), "
        f"{metrics['disk_mib']:,.0f} MiB of disk",
    ]
    return "\n".join(lines)


def scores_table(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[Cell]]]:
    """Return headers and a line per row: scores here and in the paper, cost."""
    measures = metrics["measures"]
    hours = any("hours" in row["paper"] for row in metrics["rows"])
    headers = ["row", ""]
    for measure in measures:
        headers += [NAMES[measure], "paper"]
    headers += ["GFLOPs an image", "images/s", "time", "speed-up"]
    headers += ["hours (paper)", "speed-up (paper)"] * hours + ["peak MiB"]
    cells: list[list[Cell]] = []
    for row in metrics["rows"]:
        line: list[Cell] = [row["name"], row["label"]]
        for measure in measures:
            values = list(row["scores"].get(measure, {}).values())
            line += [spread(values) if values else None, _three(row["paper"].get(measure))]
        seconds = row["seconds"]
        line += [
            None if row["gflops_per_image"] is None else f"{row['gflops_per_image']:.3g}",
            None if row["images_per_second"] is None else f"{row['images_per_second']:,.0f}",
            None if seconds is None else clock(seconds) + " with set-up" * row["with_setup"],
            _times(row["speed_up"], 2),
        ]
        line += [row["paper"].get("hours"), _times(row["speed_up_paper"], 1)] if hours else []
        cells.append([*line, None if row["memory_mib"] is None else f"{row['memory_mib']:,.0f}"])
    return headers, cells


def order_table(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[Cell]]]:
    """Return headers and a line per pair that the paper tells apart."""
    headers = ["measure", "better in the paper", "than", "by", "here", "95 % interval", "p", "paired over", "verdict"]
    return headers, [
        [NAMES[measure], pair["better"], pair["worse"], _three(pair["published"]), *difference_cells(pair["found"]),
         pair["verdict"]]
        for measure, pairs in metrics["ordering"].items()
        for pair in pairs
    ]  # fmt: skip


def _duration(seconds: float) -> str:
    """Return a duration as `clock` does, in days where it is many."""
    return clock(seconds) if seconds < 3 * 86400 else f"{seconds / 86400:,.0f} days"


def _times(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _three(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _where(metrics: Mapping[str, Any]) -> str:
    labels = f"{metrics['labels']} of the labels" if metrics["labels"] else "all labels"
    seeds = f"{metrics['seeds']} seed{'s' * (metrics['seeds'] > 1)}"
    return (
        f"scale {metrics['scale']}, on {metrics['train_images']:,} images of {Path(str(metrics['data'])).name}, "
        f"{labels}, scored on {metrics['val_images']:,}; {seeds}, {metrics['device']}"
    )


def _notes(metrics: Mapping[str, Any]) -> list[str]:
    found = [f"{row['name']} is absent: {row['absent']}." for row in metrics["rows"] if row["absent"]]
    found += [f"{row['name']}: {row['note']}." for row in metrics["rows"] if row.get("note")]
    sharing = max((row.get("sharing", 1) for row in metrics["rows"]), default=1)
    if sharing > 1:
        what = "a GPU" if "cuda" in metrics["device"] else "the CPU and competed for its cores"
        found.append(f"Up to {sharing} runs at a time shared {what}: times and speed-ups are not those of a run alone.")
    return found + [f"{row['name']} failed, {fault}" for row in metrics["rows"] for fault in row.get("faults", [])]


def _long(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[Cell]]]:
    """Return one line per row and measure, for programs."""
    costs = ["flops", "gflops_per_image", "images_per_second", "seconds", "speed_up", "memory_mib"]
    headers = ["row", "label", "x", "measure", "mean", "deviation", "seeds", "values", "paper", *costs, "absent"]
    cells: list[list[Cell]] = []
    for row in metrics["rows"]:
        for measure in metrics["measures"]:
            values = list(row["scores"].get(measure, {}).values())
            cells.append([
                row["name"], row["label"], row["x"], measure,
                statistics.fmean(values) if values else None,
                statistics.stdev(values) if len(values) > 1 else None,
                len(values), " ".join(f"{value:.6f}" for value in values), row["paper"].get(measure),
                *(row[name] for name in costs), row["absent"],
            ])  # fmt: skip
    return headers, cells


# ------------------------------------------------------------------------------------------------------ figures


def _figures(metrics: Mapping[str, Any]) -> list[Figure]:
    if not (measures := _scored(metrics)):
        return []
    told = (
        "Left: here, dots are seeds, line or bar the mean, whiskers the standard deviation. Right: the paper. Axes "
        "begin near the lowest score."
    )
    figure = as_svg(_drawing(metrics, measures), _height(metrics, measures))
    return [Figure(figure, f"{metrics['title']}. {told}")]


def _scored(metrics: Mapping[str, Any]) -> list[str]:
    """Return the measures that any row has been scored by."""
    return [m for m in metrics["measures"] if any(row["scores"].get(m) for row in metrics["rows"])]


def _height(metrics: Mapping[str, Any], measures: Sequence[str]) -> float:
    return (2.6 if metrics["axis"] else 0.9 + 0.3 * len(metrics["rows"])) * len(measures)


def _drawing(metrics: Mapping[str, Any], measures: Sequence[str]) -> Draw:
    """Draw a panel for each measure, ours beside the paper's: lines over a numeric axis, bars for categories."""

    def draw(figure: Canvas) -> str:
        grid = figure.subplots(len(measures), 2, squeeze=False, sharex="col" if metrics["axis"] else False)
        for at, measure in enumerate(measures):
            ours = {row["name"]: list(row["scores"].get(measure, {}).values()) for row in metrics["rows"]}
            theirs = {r["name"]: [r["paper"][measure]] if measure in r["paper"] else [] for r in metrics["rows"]}
            for panel, values in zip(grid[at], (ours, theirs), strict=True):
                (_draw_line if metrics["axis"] else _draw_bars)(panel, metrics["rows"], values, COLOURS[at])
            grid[at][0].set_ylabel(f"{NAMES[measure]}, top-1")
        for panel, title in zip(grid[0], ("here", "paper"), strict=True):
            panel.set_title(title, fontsize=9)
        for panel in grid[-1]:
            panel.set_xlabel(clean(metrics["axis"], 40))
        return f"{metrics['title']}: " + "; ".join(
            f"{row['name']} {NAMES[m]} {spread(list(row['scores'][m].values()))}"
            for m in measures for row in metrics["rows"] if row["scores"].get(m)
        )  # fmt: skip

    return draw


def _draw_line(
    panel: Axes, rows: Sequence[Mapping[str, Any]], values: Mapping[str, Sequence[float]], colour: str
) -> None:
    there = sorted((float(row["x"]), values[row["name"]]) for row in rows if values[row["name"]])
    means = [statistics.fmean(each) for _, each in there]
    deviations = [statistics.stdev(each) if len(each) > 1 else 0.0 for _, each in there]
    panel.errorbar([x for x, _ in there], means, yerr=deviations, color=colour, linewidth=1.6, marker="o", markersize=3,
                   capsize=2, elinewidth=0.8)  # fmt: skip
    for x, each in there:
        panel.scatter([x] * len(each), each, s=8, color=colour, edgecolors=INK, linewidths=0.4, zorder=3)
    low, high = panel.get_ylim()
    if high - low < 0.02:  # a thousandth is no slope
        panel.set_ylim((low + high) / 2 - 0.01, (low + high) / 2 + 0.01)
    if not there:
        panel.text(0.5, 0.5, "no figures", ha="center", va="center", transform=panel.transAxes)
    lowest, highest = min((x for x, _ in there), default=1.0), max((x for x, _ in there), default=1.0)
    if lowest > 0 and highest / lowest > 9 and len(there) > 2:  # widths, depths and lengths double
        panel.set_xscale("log", base=2)
        panel.set_xticks([x for x, _ in there], [f"{x:g}" for x, _ in there])


def _draw_bars(
    panel: Axes, rows: Sequence[Mapping[str, Any]], values: Mapping[str, Sequence[float]], colour: str
) -> None:
    """Draw bars from the top; the axis begins below the smallest, since differences are a hundredth of the scores."""
    every = [value for row in rows for value in values[row["name"]]]
    low, high = (min(every), max(every)) if every else (0.0, 1.0)
    margin = max(0.02, 0.35 * (high - low))
    start = max(0.0, low - margin)
    for at, row in enumerate(rows):
        each = values[row["name"]]
        if not each:
            continue
        mean, deviation = statistics.fmean(each), statistics.stdev(each) if len(each) > 1 else 0.0
        panel.barh(at, mean - start, left=start, height=0.62, color=colour, alpha=0.55, linewidth=0)
        if len(each) > 1:
            panel.errorbar(mean, at, xerr=deviation, color=INK, linewidth=1.0, capsize=3, zorder=3)
            panel.scatter(each, [at] * len(each), s=10, color=colour, edgecolors=INK, linewidths=0.5, zorder=4)
        panel.annotate(
            f"{mean:.3f}",
            (max([mean + deviation, *each]), at),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    panel.set_yticks(range(len(rows)), [clean(row["name"], 24) for row in rows])
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.set_xlim(start, high + 1.2 * margin)
    panel.grid(axis="y", visible=False)
