"""The report of a patch PCA: its leading components as pictures, and how much they explain."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from maekit.config import load_yaml
from maekit.model.patches import unpatchify
from maekit.model.pca import Fitted, PatchPCA
from maekit.report.grids import captioned_grid, shown_channels, write_png
from maekit.report.page import Cell, Figure, Section, Table, write_report
from maekit.report.plots import lines

MOST = 48
"""Components in the picture."""
POINTS = 60
"""Of the curve."""


def pca_report(run: Path, fitted: Fitted, images: int) -> Path:
    """Write ``report.html`` and ``components.png``.

    Args:
        run: holds config.yaml.
        fitted: what was found.
        images: in the data.

    Returns:
        The report's path.

    Raises:
        MaekitError: E-CONFIG- if config.yaml cannot be read, E-ENV-OUT if nothing can be written.
    """
    config, spec = load_yaml(run / "config.yaml"), fitted.pca.spec
    grid = components_figure(fitted.pca, fitted.ratio)
    write_png(run / "components.png", grid)
    kept, total = spec["components"], fitted.ratio.cumsum(0)
    facts: dict[str, Cell] = {
        "Images": f"{config.get('data')} · {images:,}",
        "Patches": f"{fitted.patches:,} of {spec['patch']} x {spec['patch']} px, {spec['channels']} channels",
        "Components": f"{kept} of {spec['values']} values",
        "Explained variance": f"{100 * float(total[kept - 1]):.2f} %",
        "Recipe": config.get("recipe"),
        "Seed": config.get("seed"),
    }
    told = "Share of the variance of normalised pixels that so many components explain, kept and left out."
    note = shown_channels(spec["channels"])
    write_report(
        run / "report.html",
        title=f"Patch PCA: {run.name}",
        intro="Principal components of patches, for pre-training with their coefficients as the target.",
        sections=[
            Section("What was fitted", facts={name: value for name, value in facts.items() if value is not None}),
            Section("Explained variance", figures=[Figure(explained_curve(total, kept), told)], tables=[_table(total)]),
            Section(
                "Leading components",
                figures=[Figure(grid, f"Grey is 0; each is scaled to its own largest entry. {note}".strip())],
            ),
            Section("What next", commands=[f"maekit pretrain --data DATA --target pca --target-from {run}"]),
            Section("Configuration", details={"config.yaml": (run / "config.yaml").read_text("utf-8").rstrip()}),
        ],
    )
    return run / "report.html"


def components_figure(pca: PatchPCA, ratio: Tensor) -> Image.Image:
    """Return the first `MOST` components as pictures, each with its share of the variance."""
    rows = pca.components[:MOST]
    scaled = 0.5 + 0.5 * rows / rows.abs().amax(1, keepdim=True)
    patch = pca.spec["patch"]
    pictures = list(unpatchify(scaled[:, None], patch, (1, 1)))
    captions = [f"{i + 1}: {100 * float(ratio[i]):.2g} %" for i in range(len(rows))]
    return captioned_grid(pictures, captions, columns=8, max_side=110)


def explained_curve(total: Tensor, kept: int) -> str:
    """Return the cumulative share of the variance over the number of components, as a drawing."""
    at = sorted({*_points(total), kept})
    series = {"kept": [i for i in at if i <= kept], "left out": [i for i in at if i >= kept]}
    return lines(
        {name: (at, [float(total[i - 1]) for i in at]) for name, at in series.items()},
        x="components",
        y="explained variance",
    )


def _points(total: Tensor) -> list[int]:
    """Return at most `POINTS` numbers of components, dense where the curve bends."""
    count = len(total)
    places = torch.logspace(0, torch.tensor(float(count)).log10().item(), min(POINTS, count))
    return sorted({*(int(place.round()) for place in places), 1, count})


def _table(total: Tensor) -> Table:
    wanted = (0.5, 0.8, 0.9, 0.95, 0.99, 0.999)
    rows: Sequence[Sequence[Cell]] = [
        [f"{100 * share:g} %", min(len(total), int((total < share - 1e-12).sum()) + 1)] for share in wanted
    ]
    return Table(["of the variance", "components needed"], rows)
