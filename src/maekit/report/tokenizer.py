"""The report of a tokenizer: images given back, how evenly its codes are used, what they stand for."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from maekit.config import load_yaml
from maekit.model.patches import patchify, unpatchify
from maekit.model.tokenizer import VQTokenizer
from maekit.report.grids import captioned_grid, reconstruction_grid, shown_channels, write_png
from maekit.report.page import Cell, Figure, Section, write_report
from maekit.report.plots import curves, lines
from maekit.report.pretraining import machine, software
from maekit.train.log import clock, read_metrics

PICTURES = 10
"""Images in the grid, in two rows under each other."""
CODES = 64
"""Codes in the picture."""
CODES_TOLD = (
    "Mean of the held-out patches of a code, and its share of all: codes evenly from the most to the least used."
)
POINTS = 80
"""Of the curve of use."""


@dataclass(frozen=True)
class Judged:
    """What a tokenizer makes of held-out images.

    Attributes:
        counts: (V,) patches of each code.
        patches: (V, P*P*C) mean of them, values 0..1; 0 where there are none.
        mse: of the reconstruction, values 0..1.
        flat_mse: of patches that are given their mean colour.
        pictures: (image, reconstruction), each (C, H, W), of some.
    """

    counts: Tensor
    patches: Tensor
    mse: float
    flat_mse: float
    pictures: list[tuple[Tensor, Tensor]]

    @property
    def perplexity(self) -> float:
        """Number of codes in equal use that would be as hard to guess: exp of the entropy."""
        shares = self.counts.double() / self.counts.sum()
        return math.exp(float(-torch.xlogy(shares, shares).sum()))

    @property
    def usage(self) -> float:
        """Share of codes that occur."""
        return float((self.counts > 0).double().mean())


def flat_error(images: Tensor, patch: int) -> Tensor:
    """Return squared errors (B, N, P*P, C) of patches that are given their mean colour: what 1 x 1 pixels would say."""
    cells = patchify(images, patch).unflatten(2, (patch * patch, images.shape[1]))
    return (cells - cells.mean(2, keepdim=True)).square()


def tokenizer_report(run: Path, model: VQTokenizer, judged: Judged, metrics: Mapping[str, Any]) -> Path:
    """Write ``report.html``, ``reconstructions.png`` and ``codes.png``.

    Args:
        run: holds config.yaml and metrics.jsonl.
        model: the trained one, in eval mode.
        judged: what it makes of held-out images.
        metrics: of the run's result.

    Returns:
        The report's path.

    Raises:
        MaekitError: E-CONFIG- if config.yaml cannot be read, E-ENV-OUT if nothing can be written.
    """
    config = load_yaml(run / "config.yaml")
    records = read_metrics(run / "metrics.jsonl")
    pictures, codes = _reconstructions(judged), _codes(judged, model.spec["patch"])
    write_png(run / "reconstructions.png", pictures)
    write_png(run / "codes.png", codes)
    drawn = curves(records)
    note = shown_channels(model.channels)
    told = (
        f"Each patch of {model.spec['patch']} x {model.spec['patch']} pixels is one of {model.vocabulary} codes here. "
        f"{note}"
    )
    write_report(
        run / "report.html",
        title=f"Tokenizer: {run.name}",
        intro="A discrete autoencoder, trained to say each patch with one code of a codebook; for pre-training with "
        "these codes as the target.",
        sections=[
            Section("What was found", facts=_facts(config, model, metrics, records)),
            Section("Images given back", figures=[Figure(pictures, told.strip())]),
            Section("Use of the codes", figures=[Figure(_use(judged.counts), _use_told(judged, model.vocabulary))]),
            Section("What codes stand for", figures=[Figure(codes, CODES_TOLD)]),
            *([Section("Curves", figures=[Figure(drawn, "Loss, learning rate and scores.")])] if drawn else []),
            Section("What next", commands=[f"maekit pretrain --data DATA --target token --target-from {run}"]),
            Section("Configuration", details={"config.yaml": (run / "config.yaml").read_text("utf-8").rstrip()}),
        ],
    )
    return run / "report.html"


def _facts(
    config: Mapping[str, Any], model: VQTokenizer, metrics: Mapping[str, Any], records: list[dict[str, Any]]
) -> dict[str, Cell]:
    last, millions = (records[-1] if records else {}), sum(p.numel() for p in model.parameters()) / 1e6
    facts: dict[str, Cell] = {
        "Reconstruction": f"PSNR {metrics['psnr']:.2f} dB of {metrics['held_out']:,} held-out images",
        "To compare": f"{metrics['psnr_flat']:.2f} dB of patches in their mean colour",
        "Perplexity": f"{metrics['perplexity']:.1f} of {model.vocabulary} codes",
        "Codes in use": f"{100 * metrics['usage']:.1f} %",
        "Images": f"{config.get('data')} · {(config.get('resolved') or {}).get('images')}",
        "Recipe": config.get("recipe"),
        "Grid": f"{model.grid[0]} x {model.grid[1]} codes",
        "Size": f"{millions:.2f} M parameters",
        "Length": f"{metrics['steps']:,} steps, batch {config.get('batch_size')}",
        "Time": clock(last["time"]) if "time" in last else None,
        "Seed": config.get("seed"),
        "Software": software(),
        "Machine": machine(model),
    }
    return {name: value for name, value in facts.items() if value not in (None, "")}


def _reconstructions(judged: Judged) -> Image.Image:
    step = max(1, len(judged.pictures) // PICTURES)
    shown = judged.pictures[::step][:PICTURES]
    rows = [[image for image, _ in shown], [back for _, back in shown]]
    return reconstruction_grid(rows, [""] * len(shown), ["image", "from its codes"], max_side=110)


def _codes(judged: Judged, patch: int) -> Image.Image:
    """Return the mean patch of `CODES` codes that occur, from the most used to the least."""
    counts = judged.counts
    order = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
    order = order[[i * len(order) // min(CODES, len(order)) for i in range(min(CODES, len(order)))]]
    captions = [f"{100 * float(counts[i]) / float(counts.sum()):.2g} %" for i in order]
    return captioned_grid(
        list(unpatchify(judged.patches[order][:, None], patch, (1, 1))), captions, columns=8, max_side=64
    )


def _use(counts: Tensor) -> str:
    """Return the share of patches of each code, from the most used to the least, as a drawing."""
    shares = (counts.double() / counts.sum()).sort(descending=True).values
    count = len(shares)
    at = sorted({round(i * (count - 1) / max(1, POINTS - 1)) for i in range(POINTS)} & set(range(count)))
    return lines(
        {"this tokenizer": ([i + 1 for i in at], [100 * float(shares[i]) for i in at]),
         "all alike": ([1, count], [100 / count, 100 / count])},
        x="codes, most used first", y="per cent of the patches",
    )  # fmt: skip


def _use_told(judged: Judged, vocabulary: int) -> str:
    return (
        f"Of {int(judged.counts.sum()):,} held-out patches. {100 * judged.usage:.1f} % of {vocabulary} codes occur; "
        f"they are as hard to guess as {judged.perplexity:.0f} codes in equal use."
    )
