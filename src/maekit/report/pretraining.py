"""The report of a pre-training run: what was run, the curves, the pictures, what to do next."""

import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from maekit import __version__
from maekit.config import Deviation, load_yaml
from maekit.model.mae import MaskedAutoencoder
from maekit.report.grids import write_png
from maekit.report.page import Cell, Figure, Section, Table, write_report
from maekit.report.plots import curves
from maekit.report.reconstruction import (
    LEAKING,
    RAW,
    Reconstruction,
    combined_figure,
    combined_notes,
    percent,
    possible_ratios,
    ratio_figure,
    reconstruct_images,
    shows_pixels,
)
from maekit.train.log import clock, read_metrics

PAPER_RATIOS = (75, 85, 95)
"""Per cents of the paper's own figure (arXiv 2111.06377 figure 4)."""
TARGET_WORDS = {
    "norm_pixel": "pixels normalised per patch",
    "pixel": "plain pixels",
    "pca": "principal components of patches",
    "token": "codes of a tokenizer",
    "low_pass": "pixels without fine texture",
    "hog": "histograms of oriented gradients",
}
PAGE_SIDE = 160
"""Longest side of a picture in the page: a report of photographs stays at a few MB."""


def pretrain_report(
    run: Path, model: MaskedAutoencoder, images: Tensor, seed: int = 0, *, labelled: bool = True
) -> Path:
    """Write ``RUN/report.html`` and ``RUN/reconstructions/*.png`` from the run folder and some images.

    Args:
        run: holds config.yaml and metrics.jsonl.
        model: the trained one, on any device.
        images: (B, C, H, W) to be reconstructed, uint8 or float 0..1.
        seed: chooses their masks.
        labelled: whether the page suggests to score the encoder on the same images.

    Returns:
        The report's path.

    Raises:
        MaekitError: E-CONFIG- if config.yaml cannot be read, E-ENV-OUT if nothing can be written.
    """
    config = load_yaml(run / "config.yaml")
    metrics = read_metrics(run / "metrics.jsonl")
    ratios = _ratios(config, model) if shows_pixels(model) else []
    shown = [reconstruct_images(model, images, ratio, seed) for ratio in ratios]
    for one in shown:
        write_png(run / "reconstructions" / picture_name(one.ratio), ratio_figure(one))
    if shown:
        write_png(run / "reconstructions" / "reconstructions.png", combined_figure(shown))
    write_report(
        run / "report.html",
        title=f"Pre-training: {run.name}",
        intro="A masked autoencoder was trained to fill in removed patches of unlabelled images.",
        sections=[
            what_was_run(config, model, metrics),
            Section("Curves", figures=_curves(metrics), text=[] if metrics else ["No step was recorded."]),
            reconstructions(shown),
            Section("What next", commands=_commands(run, config, labelled)),
            Section("Configuration", details={"config.yaml": _text(run / "config.yaml")}),
        ],
    )
    return run / "report.html"


def what_was_run(config: Mapping[str, Any], model: MaskedAutoencoder, metrics: Sequence[Mapping[str, Any]]) -> Section:
    """Return the facts of a run: data, model, schedule, cost, software."""
    resolved, last = config.get("resolved") or {}, (metrics[-1] if metrics else {})
    losses = [record["loss"] for record in metrics if "loss" in record]
    images = f"{int(resolved['images']):,} images" if resolved.get("images") else None
    facts: dict[str, Cell] = {
        "Recipe": config.get("recipe"),
        "Deviations from it": "; ".join(str(Deviation(**each)) for each in resolved.get("deviations") or []),
        "Images": " · ".join(filter(None, [config.get("data"), images])),
        **_shape(model, str(config.get("model"))),
        "Masked": f"{100 * float(config.get('mask_ratio', 'nan')):.4g} % of patches",
        "Target": TARGET_WORDS[model.target],
        **_departures(config, model),
        "Length": f"{last.get('step', 0):,} steps, {_epochs(metrics):.4g} epochs, batch {config.get('batch_size')}",
        "Peak learning rate": max((record["lr"] for record in metrics if "lr" in record), default=None),
        "Loss": f"{losses[0]:.4f} → {losses[-1]:.4f}" if losses else None,
        "Time": f"{clock(last['time'])}, {last.get('images_per_second', 0):,.0f} images/s" if "time" in last else None,
        "Precision": resolved.get("precision"),
        "Seed": config.get("seed"),
        "Software": software(),
        "Machine": machine(model),
    }
    return Section("What was run", facts={name: value for name, value in facts.items() if value not in (None, "")})


def _shape(model: MaskedAutoencoder, name: str) -> dict[str, Cell]:
    encoder, decoder = (
        sum(p.numel() for p in part.parameters() if p.requires_grad) / 1e6 for part in (model.encoder, model.decoder)
    )
    blocks = _count(len(model.encoder.blocks), "block")
    height, width = model.img_size
    channels = _count(len(model.mean), "channel")
    return {
        "Encoder": f"{name}, {blocks} {model.encoder.embed_dim} wide, {encoder:.2f} M parameters",
        "Decoder": f"{_count(model.decoder.depth, 'block')}, {decoder:.2f} M parameters",
        "Image and patch": f"{height} x {width} px, {channels}; {model.num_patches} patches of {model.patch} px",
    }


def _departures(config: Mapping[str, Any], model: MaskedAutoencoder) -> dict[str, Cell]:
    """Return what is not as in the paper's default row, where anything is."""
    told = [f"{name} {value}" for name, value in model.variant.departures().items()]
    told += [f"{name} {config[name]}" for name in ("mask_ratio_max", "color_jitter") if config.get(name)]
    told += [f"crop {config['crop']}"] if config.get("crop", "random") != "random" else []
    return {"Other than the paper": ", ".join(told)} if told else {}


def software() -> str:
    """Return the versions that decide the numbers."""
    python = platform.python_version()
    return f"maekit {__version__}, torch {torch.__version__}, timm {timm.__version__}, Python {python}"


def machine(model: nn.Module) -> str:
    """Return what the model stands on: the GPU's name, or processor and cores."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{device.type}, {platform.machine()}, {cores} cores"


def reconstructions(shown: Sequence[Reconstruction]) -> Section:
    """Return the pictures and, per ratio, how far off they are."""
    if not shown:
        return Section("Reconstructions", text=["This target has no pixels, so there is nothing to show."])
    rows = [
        [percent(one.ratio), f"{one.psnr:.2f} dB", f"{one.psnr_fill:.2f} dB", f"{one.mse:.5f}", f"{one.loss:.4f}"]
        for one in shown
    ]
    table = Table(
        ["removed", "PSNR", "PSNR of a plain fill", "mean squared error", "loss"],
        rows,
        note="Over removed pixels of the images above, values 0 to 1. The plain fill needs no model: each removed "
        "patch takes the mean colour of its visible neighbours.",
    )
    told = " ".join(["The same images with more and more removed.", *combined_notes(shown)])
    figures = [Figure(combined_figure(shown, max_side=PAGE_SIDE, notes=False), told)]
    if shown[0].raw is not None:
        told = f"The same prediction in three ways. {RAW} {LEAKING}"
        figures.append(Figure(ratio_figure(shown[0], max_side=PAGE_SIDE, notes=False), told))
    return Section("Reconstructions", figures=figures, tables=[table])


def picture_name(ratio: float) -> str:
    """Return the file of a ratio: reconstruction-75.png."""
    return f"reconstruction-{100 * ratio:.6g}.png"


def _ratios(config: Mapping[str, Any], model: MaskedAutoencoder) -> list[float]:
    """Return the run's own ratio first, then those of the paper that keep at least one patch."""
    return possible_ratios([100 * float(config.get("mask_ratio", 0.75)), *PAPER_RATIOS], model)


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"


def _epochs(metrics: Sequence[Mapping[str, Any]]) -> float:
    return max((record["epoch"] for record in metrics if "epoch" in record), default=0.0)


def _curves(metrics: Sequence[Mapping[str, Any]]) -> list[Figure]:
    drawn = curves(metrics)
    return [Figure(drawn, "Loss over removed patches and learning rate.")] if drawn else []


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8").rstrip()


def _commands(run: Path, config: Mapping[str, Any], labelled: bool) -> list[str]:
    """Return commands that go on from here, ready for a shell; those that score want labels."""
    here, data = shlex.quote(str(run)), shlex.quote(str(config.get("data") or "DATA"))
    scores = [
        f"maekit knn {here} --data {data}",
        f"maekit probe {here} --data {data}",
        f"maekit finetune {here} --data {data} --labels 10/class --out {shlex.quote(str(run) + '-finetuned')}",
    ]
    return [
        *(scores if labelled else ()),
        f"maekit reconstruct {here} --data {data}",
        f"maekit embed {here} --data {data} --out features.parquet",
    ]
