"""The same images under the same masks, filled in at several ratios, by several checkpoints, by several runs."""

from collections.abc import Mapping, Sequence

import torch
from PIL import Image

from maekit.report.gallery import SHOWN_SIDE, Part
from maekit.report.grids import reconstruction_grid
from maekit.report.page import Table
from maekit.report.plots import lines
from maekit.report.reconstruction import Reconstruction, combined_figure, combined_notes, percent, removed

NOTE = (
    "Over removed pixels of the images above, values 0 to 1. The plain fill needs no model: each removed patch takes "
    "the mean colour of its visible neighbours."
)


def ratios_part(found: Sequence[Reconstruction], names: Sequence[str], prefix: str = "") -> Part:
    """Draw the same images with more and more removed.

    Args:
        found: one for each ratio.
        names: of the images.
        prefix: of the file's name.
    """
    rows = [[percent(one.ratio), *_scores(one)] for one in found]
    figure = combined_figure(found, names, max_side=SHOWN_SIDE, notes=False)
    return Part(
        "Mask ratios",
        text=["The same images with more and more removed.", *combined_notes(found)],
        pictures={f"{prefix}ratios.png": (figure, "Masked, prediction in place, prediction, for each ratio.")},
        tables=[Table(["removed", *HEADERS], rows, note=NOTE)],
    )


def training_part(found: Mapping[int, Reconstruction], names: Sequence[str], prefix: str = "") -> Part:
    """Draw what each checkpoint of a run made of the same masked images.

    Args:
        found: step -> its reconstructions, all at one ratio.
        names: of the images.
        prefix: of the file's name.
    """
    steps = sorted(found)
    drawn = lines({"PSNR": (steps, [found[step].psnr for step in steps])}, x="step", y="PSNR of removed pixels, dB")
    return _beside(
        "Over training",
        {f"step {step}": found[step] for step in steps},
        names,
        f"{prefix}training.png",
        plots={drawn: "Of the same images and masks."} if len(steps) > 1 else {},
    )


def beside_part(found: Mapping[str, Reconstruction], names: Sequence[str], text: Sequence[str] = ()) -> Part:
    """Draw what several models made of the same images; their masks are the same where their grids are.

    Args:
        found: name of a run -> its reconstructions.
        names: of the images.
        text: said of what is not shown.
    """
    return _beside("Side by side", found, names, "beside.png", plots={}, more=text)


def _beside(
    heading: str,
    found: Mapping[str, Reconstruction],
    names: Sequence[str],
    file: str,
    plots: Mapping[str, str],
    more: Sequence[str] = (),
) -> Part:
    figure = side_by_side(found, names)
    ratios = ", ".join(dict.fromkeys(removed(one) for one in found.values()))
    text = [f"Of the patches: {ratios}. Predictions stand in place of removed patches."]
    text += dict.fromkeys(note for one in found.values() for note in combined_notes([one]))
    text += more
    best = max(range(len(found)), key=lambda at: list(found.values())[at].psnr)
    if _same_masks(found):
        told = "The same images, the same masks."
        rows = [[name, *_scores(one)] for name, one in found.items()]
        table = Table(["", *HEADERS], rows, note=NOTE, highlight=[best] if len(rows) > 1 else [])
    else:  # what one has to guess the other may see: none is the best
        told = "The same images; the runs differ in patches or kind of mask, so each has a mask of its own."
        rows = [[name, removed(one), *_scores(one)] for name, one in found.items()]
        note = f"{NOTE} The masks differ, so rows are not to be compared with one another."
        note += " Where nothing is removed, scores are over all pixels and the fill is the noisy image itself."
        table = Table(["", "removed", *HEADERS], rows, note=note)
    return Part(heading, text=text, pictures={file: (figure, told)}, tables=[table], plots=plots)


def side_by_side(found: Mapping[str, Reconstruction], names: Sequence[str]) -> Image.Image:
    """Draw originals, masks and a column of predictions in place for each; a mask each where they are not the same."""
    first = next(iter(found.values()))
    count = len(first.original)
    if _same_masks(found):
        headers = ["original", "masked", *found]
        rows = [[first.original[i], first.masked[i], *(one.pasted[i] for one in found.values())] for i in range(count)]
        return reconstruction_grid(rows, headers, names, groups=[("", 2), ("", len(found))], max_side=SHOWN_SIDE)
    rows = [
        [first.original[i], *(picture[i] for one in found.values() for picture in (one.masked, one.pasted))]
        for i in range(count)
    ]
    headers = ["original", *["masked", "prediction in place"] * len(found)]
    groups = [("", 1), *((name, 2) for name in found)]
    return reconstruction_grid(rows, headers, names, groups=groups, max_side=SHOWN_SIDE)


def _same_masks(found: Mapping[str, Reconstruction]) -> bool:
    first = next(iter(found.values()))
    return all(
        one.masked.shape == first.masked.shape and torch.equal(one.masked, first.masked) for one in found.values()
    )


HEADERS = ("PSNR", "PSNR of a plain fill", "mean squared error", "loss")


def _scores(one: Reconstruction) -> list[str]:
    return [f"{one.psnr:.2f} dB", f"{one.psnr_fill:.2f} dB", f"{one.mse:.5f}", f"{one.loss:.4f}"]
