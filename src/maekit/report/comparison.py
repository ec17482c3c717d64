"""Two runs side by side: page, CSV, Markdown and text for the terminal."""

from pathlib import Path
from typing import Any

from maekit.report.evaluation import DIFFERENCE, aligned, difference_cells, spread
from maekit.report.files import write_whole
from maekit.report.page import Section, Table, write_report
from maekit.report.tables import Cell, to_csv, to_markdown

HEADERS = ["score", "a", "b", *DIFFERENCE]


def comparison_report(folder: Path, metrics: dict[str, Any]) -> Path:
    """Write ``report.html``, ``table.csv`` and ``table.md``.

    Args:
        folder: made if it is not there.
        metrics: as `maekit.tasks.compare.compare` returns them.

    Raises:
        MaekitError: E-ENV-OUT if nothing can be written.
    """
    rows, differ = score_rows(metrics), setting_rows(metrics)
    write_whole(folder / "table.csv", to_csv(*_long(metrics)))
    write_whole(folder / "table.md", to_markdown(HEADERS, rows) + b"\n" + to_markdown(["setting", "a", "b"], differ))
    images = images_told(metrics)
    write_report(
        folder / "report.html",
        title=f"{_name(metrics['a'])} and {_name(metrics['b'])}",
        intro=f"Two runs of {metrics['verb']}.",
        sections=[
            Section("What they are", facts={"a": ", ".join(metrics["a"]), "b": ", ".join(metrics["b"])}),
            Section("Scores", text=[images] if images else [], tables=[Table(HEADERS, rows)]),
            Section("Settings that differ", tables=[Table(["setting", "a", "b"], differ)])
            if differ
            else Section("Settings that differ", text=["None."]),
        ],
    )
    return folder / "report.html"


def told(metrics: dict[str, Any]) -> str:
    """Return scores, images and settings for a terminal."""
    lines = [f"a: {', '.join(metrics['a'])}", f"b: {', '.join(metrics['b'])}", ""]
    lines += aligned([HEADERS, *score_rows(metrics)])
    lines += [images_told(metrics)] if "both" in metrics else []
    differ = setting_rows(metrics)
    return "\n".join(lines + (["", *aligned([["setting", "a", "b"], *differ])] if differ else []))


def score_rows(metrics: dict[str, Any]) -> list[list[Cell]]:
    """Return a row per score: mean ± deviation of both, difference, interval, p, what it was paired over."""
    return [[row["score"], spread(row["a"]), spread(row["b"]), *difference_cells(row)] for row in metrics["rows"]]


def setting_rows(metrics: dict[str, Any]) -> list[list[Cell]]:
    """Return a row per setting that differs."""
    return [[name, one, other] for name, (one, other) in metrics["settings"].items()]


def images_told(metrics: dict[str, Any]) -> str:
    """Return a line about the images that both have judged; "" where there are none."""
    if "both" not in metrics:
        return ""
    counts = (metrics[name] for name in ("both", "only_a", "only_b", "neither"))
    return "Images right: both {:,}, a alone {:,}, b alone {:,}, neither {:,}.".format(*counts)


def _long(metrics: dict[str, Any]) -> tuple[list[str], list[list[Cell]]]:
    names = ["mean", "low", "high", "p", "paired", "pairs"]
    rows = [
        [row["score"], *(" ".join(f"{v:.6f}" for v in row[side]) for side in "ab"), *(row[name] for name in names)]
        for row in metrics["rows"]
    ]
    return ["score", "a", "b", "difference", *names[1:]], rows


def _name(paths: list[str]) -> str:
    return Path(paths[0]).name + (f" (and {len(paths) - 1} more)" if len(paths) > 1 else "")
