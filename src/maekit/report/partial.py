"""The report of a partial fine-tuning series: accuracy by number of trained blocks, beside the linear probe."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maekit.report.files import write_whole
from maekit.report.grids import write_png
from maekit.report.page import Cell, Figure, Section, Table, write_report
from maekit.report.scored import as_picture, as_svg, partial_drawing


@dataclass(frozen=True)
class Point:
    """One fine-tune of the series.

    Attributes:
        blocks: as it is spelled: "0", "0.5", "4", "all".
        metrics: what the fine-tune found.
    """

    blocks: str
    metrics: dict[str, Any]

    @property
    def top1(self) -> float:
        """Accuracy of the weights."""
        return float(self.metrics["top1"])

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return int(self.metrics["trained_parameters"])


def partial_report(run: Path, points: Sequence[Point], probe: float, *, images: int) -> Path:
    """Write ``report.html``, ``partial.png`` and ``partial.csv``.

    Args:
        run: holds config.yaml.
        points: in the order of the curve.
        probe: accuracy of the linear probe on the same images.
        images: how many were scored.

    Raises:
        MaekitError: E-ENV-OUT if nothing can be written.
    """
    draw = partial_drawing({point.blocks: point.top1 for point in points}, probe)
    write_png(run / "partial.png", as_picture(draw))
    columns = ("top1", "macro_f1", "balanced_accuracy", "ece")
    lines = [",".join(["blocks", "trained_parameters", *columns])]
    lines += [",".join([p.blocks, str(p.trained), *(f"{p.metrics[name]:.6f}" for name in columns)]) for p in points]
    write_whole(run / "partial.csv", ("\n".join(lines) + "\n").encode())
    rows: list[list[Cell]] = [
        [p.blocks, f"{p.trained / 1e6:.2f} M", f"{p.top1:.4f}", f"{p.metrics['macro_f1']:.4f}", p.metrics["score_of"]]
        for p in points
    ]
    rows.append(["linear probe", None, f"{probe:.4f}", None, "solved on features computed once"])
    told = (
        "0: head and the norm under it; 0.5: the MLP of the last block too; all: embeddings too. The rest is frozen in "
        f"eval mode. All parts have the same settings but the number of blocks. Scored on {images:,} images; the "
        "report of each part stands in its folder."
    )
    write_report(
        run / "report.html",
        title=f"Partial fine-tuning: {run.name}",
        intro="How much of the encoder has to move: only the last blocks are trained (arXiv 2111.06377, figure 9).",
        sections=[
            Section("Curve", figures=[Figure(as_svg(draw), told)]),
            Section("Numbers", tables=[Table(["blocks", "trained", "top-1", "macro F1", "score of"], rows)]),
            Section("Configuration", details={"config.yaml": (run / "config.yaml").read_text("utf-8").rstrip()}),
        ],
    )
    return run / "report.html"
