"""The table of several encoders under the same protocols: page, CSV, Markdown and text for the terminal."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maekit.report.files import write_whole
from maekit.report.page import Figure, Section, Table, write_report
from maekit.report.plots import bars
from maekit.report.tables import Cell, to_csv, to_markdown

NOTE = (
    "Mean ± standard deviation; one value stands alone. Difference: first arm minus the other, with the 95 % "
    "confidence interval and p of no difference: a paired t-test over seeds (draws of the labels, or encoders where "
    "an arm has several), or, of one score each, a bootstrap over the images scored with McNemar's exact p. They are "
    "about what was drawn anew: seeds say nothing of other test images, images nothing of another pre-training. p is "
    "not corrected for the number of rows; beyond chance: p below .05."
)


DIFFERENCE = ["difference", "95 % interval", "p", "paired over"]
"""Headers of `difference_cells`."""


def evaluation_report(folder: Path, metrics: dict[str, Any]) -> Path:
    """Write ``report.html``, ``table.csv`` and ``table.md``.

    Args:
        folder: holds config.yaml.
        metrics: as `maekit.tasks.evaluate.evaluate` returns them.

    Raises:
        MaekitError: E-ENV-OUT if nothing can be written.
    """
    arms, rows = list(metrics["arms"]), metrics["rows"]
    write_whole(folder / "table.csv", to_csv(*_long(arms, rows)))
    headers, cells = scores_table(arms, rows)
    apart_headers, apart = differences_table(rows)
    text = to_markdown(headers, cells)
    text += b"\n" + to_markdown(apart_headers, apart, [NOTE]) if apart else b""
    write_whole(folder / "table.md", text)
    sections = [
        Section("Scores", figures=_figures(arms, rows), tables=[Table(headers, cells)]),
        Section(
            f"Differences from {arms[0]}",
            text=[NOTE],
            tables=[Table(apart_headers, apart, highlight=[i for i, row in enumerate(apart) if row[-1] == "yes"])],
        )
        if apart
        else None,
        Section("Cost", tables=[_cost_table(arms, metrics["cost"])]),
        Section("Configuration", details={"config.yaml": (folder / "config.yaml").read_text("utf-8").rstrip()}),
    ]
    still = metrics["jobs"] - metrics["jobs_done"]
    count = f"{len(arms)} arm{'s' * (len(arms) > 1)}"
    intro = [f"{count}, scored on {metrics['val_images']:,} images that no training has seen."]
    write_report(
        folder / "report.html",
        title=f"Evaluation: {folder.name}",
        intro=intro + ([f"Not finished: {still} scores are missing; the same command goes on."] if still else []),
        sections=[section for section in sections if section is not None],
    )
    return folder / "report.html"


def told(metrics: dict[str, Any]) -> str:
    """Return the scores for a terminal, and the differences to the first arm."""
    arms, rows = list(metrics["arms"]), metrics["rows"]
    headers, cells = scores_table(arms, rows)
    lines = aligned([headers, *cells])
    apart_headers, apart = differences_table(rows)
    return "\n".join(lines + (["", *aligned([apart_headers, *apart])] if apart else []))


def scores_table(arms: Sequence[str], rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Cell]]]:
    """Return headers and a row per measure: mean ± deviation of each arm."""
    cells: list[list[Cell]] = []
    for row in rows:
        values = {arm: found["values"] for arm, found in row["arms"].items()}
        shown = [spread(values[arm]) if arm in values else None for arm in arms]
        cells.append([_named(row), *shown, str(max(map(len, values.values()), default=0))])
    return ["measure", *arms, "values"], cells


def differences_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Cell]]]:
    """Return headers and a row per measure and other arm: difference, interval, p, what it was paired over."""
    cells: list[list[Cell]] = []
    for row in rows:
        for arm, found in row["differences"].items():
            beyond = None if found["p"] is None else "yes" if found["p"] < 0.05 else "no"
            cells.append([_named(row), arm, *difference_cells(found), beyond])
    return ["measure", "minus", *DIFFERENCE, "beyond chance"], cells


def difference_cells(found: dict[str, Any]) -> list[Cell]:
    """Return the cells of `DIFFERENCE` for a `maekit.scores.spread.Difference`; unknown ones are empty."""
    if found["low"] is None:
        return [f"{found['mean']:+.4f}", None, None, None]
    interval = f"{found['low']:+.4f} to {found['high']:+.4f}"
    return [f"{found['mean']:+.4f}", interval, f"{found['p']:.2g}", f"{found['pairs']:,} {found['paired']}"]


def spread(values: Sequence[float]) -> str:
    """Return ``0.6610 ± 0.0190``, mean and standard deviation (n - 1); of one value that."""
    mean = f"{statistics.fmean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def _named(row: dict[str, Any]) -> str:
    labels = "" if row["labels"] in (None, "all") else f", labels {row['labels']}"
    return row["measure"] + labels + (" (lower is better)" if row["better"] == "lower" else "")


def _long(arms: Sequence[str], rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Cell]]]:
    """Return one line per measure and arm, for programs."""
    headers = ["measure", "labels", "better", "arm", "mean", "deviation", "values", "difference", "low", "high", "p",
               "paired", "pairs"]  # fmt: skip
    cells: list[list[Cell]] = []
    for row in rows:
        for arm in arms:
            if (found := row["arms"].get(arm)) is None:
                continue
            apart = row["differences"].get(arm, {})
            values = " ".join(f"{value:.6f}" for value in found["values"])
            line: list[Cell] = [
                row["measure"],
                row["labels"],
                row["better"],
                arm,
                found["mean"],
                found["deviation"],
                values,
            ]
            cells.append(line + [apart.get(name) for name in ("mean", "low", "high", "p", "paired", "pairs")])
    return headers, cells


def _figures(arms: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[Figure]:
    measures = {
        _named(row): {arm: row["arms"][arm]["values"] for arm in arms if arm in row["arms"]}
        for row in rows
        if row["better"] == "higher"
    }
    drawn = bars(measures, label="accuracy, and F1 where it says so")
    return [Figure(drawn, "Bar: mean; line: standard deviation; dots: seeds or draws.")] if drawn else []


def _cost_table(arms: Sequence[str], cost: dict[str, dict[str, Any]]) -> Table:
    protocols = list(dict.fromkeys(protocol for arm in arms for protocol in cost[arm]["seconds"]))
    headers = ["arm", "parameters", "GMAC an image", *(f"{protocol}, s" for protocol in protocols), "peak MiB"]
    cells: list[list[Cell]] = [
        [
            arm,
            f"{cost[arm]['parameters'] / 1e6:.2f} M",
            f"{cost[arm]['gmac_per_image']:.3f}",
            *(f"{s:.1f}" if (s := cost[arm]["seconds"].get(p)) is not None else None for p in protocols),
            None if cost[arm]["memory_mib"] is None else f"{cost[arm]['memory_mib']:,.0f}",
        ]
        for arm in arms
    ]
    note = (
        "Of the encoder, products of one image counted; seconds of one score on average; features: of the extraction "
        "that the frozen protocols share; memory: peak of the process, on a GPU that of the device."
    )
    return Table(headers, cells, note)


def aligned(rows: Sequence[Sequence[Cell]]) -> list[str]:
    """Return rows as lines of columns, for a terminal."""
    texts = [["-" if value is None else str(value) for value in row] for row in rows]
    widths = [max(len(row[at]) for row in texts) for at in range(len(texts[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in texts]
