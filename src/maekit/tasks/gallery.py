"""Draw a page of pictures of one or several runs: reconstructions, attention, features, failures."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maekit.config import load_yaml
from maekit.data.sources import Source, open_source
from maekit.errors import MaekitError
from maekit.interchange.weights import load_model
from maekit.model.mae import MaskedAutoencoder
from maekit.report.gallery import Part, spaced, write_gallery
from maekit.report.gallery_attention import attend, attention_part
from maekit.report.gallery_failures import failures_part, find_errors
from maekit.report.gallery_features import features_part
from maekit.report.gallery_reconstructions import beside_part, ratios_part, training_part
from maekit.report.masks import mask_figure
from maekit.report.reconstruction import (
    check_ratio,
    percent,
    possible_ratios,
    reconstruct_images,
    shows_pixels,
    window,
)
from maekit.seeds import seed_all
from maekit.settings import Gallery
from maekit.tasks import Result
from maekit.tasks.reconstruct import evenly_spaced
from maekit.tasks.run_folder import outside, typed
from maekit.train.device import resolve_device

log = logging.getLogger("maekit")

MOST_COLUMNS = 6
"""Checkpoints of a run, or blocks, that are drawn where nobody chose."""
NO_PIXELS = "{} predicts {}, which are no pixels: there is nothing to show here."
PAPER_RATIO = 0.75
"""Of weights that do not say what they were trained with."""


@dataclass(frozen=True)
class Arm:
    """One run of the gallery.

    Attributes:
        images: (n, C, H, W), 0..1 or as arrays hold them, as this model's evaluation sees them.
        ratio: share of patches removed where one ratio is shown.
        prefix: of its files' names, empty where there is one run.
    """

    path: Path
    name: str
    model: MaskedAutoencoder
    images: Tensor
    names: list[str]
    ratio: float
    prefix: str

    @property
    def pictures(self) -> Tensor:
        """The images to look at, 0..1."""
        low, high = window(self.images)
        return (self.images - low) / (high - low)

    @property
    def inputs(self) -> Tensor:
        """The images normalised, on the model's device."""
        device = next(self.model.parameters()).device
        mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (self.model.mean, self.model.std))
        return (self.images.to(device) - mean) / std


def gallery(settings: Gallery | dict[str, Any]) -> Result:
    """Write ``OUT/index.html`` and the pictures on it.

    Returns:
        runs, out, files, images, parts.

    Raises:
        MaekitError: E-USAGE- (no run, no images), E-CONFIG-MASK, E-CONFIG-PATCHES, E-CONFIG-BLOCKS, E-CONFIG-OUT,
            E-DATA-, E-CKPT-, E-ENV-.
    """
    settings = typed(Gallery, settings)
    if not settings.runs:
        raise MaekitError("E-USAGE-RUN", "no weights named", hint="a run folder or a .safetensors file, or several")
    if settings.data is None:
        raise MaekitError("E-USAGE-IMAGES", "no images named", hint="--data FOLDER, or --data builtin:fashion")
    out = settings.out or _default_out(settings.runs)
    outside(out, settings.data)
    seed_all(settings.seed)  # for a decoder that is not in the file
    source = open_source(
        settings.data, None if settings.split == "all" else settings.split,
        image_column=settings.image_column, label_column=settings.label_column,
    )  # fmt: skip
    arms = _arms(settings, source)
    parts: list[Part] = []
    for arm in arms:
        for name in settings.only:
            parts += [_titled(DRAWN[name](arm, settings, source), arm, len(arms))] if name in DRAWN else []
    if len(arms) > 1 and "beside" in settings.only:
        parts = [_beside(arms, settings), *parts]
    files = write_gallery(out, title=_title(arms), intro=_intro(arms, settings, source), parts=parts)
    metrics: dict[str, object] = {
        "runs": [str(run) for run in settings.runs],
        "out": str(out),
        "files": [str(file) for file in files],
        "images": len(arms[0].images),
        "parts": [part.heading for part in parts],
    }
    return Result(metrics, f"{files[0]}: {len(parts)} parts, {len(files) - 1} pictures beside it")


def _default_out(runs: list[Path]) -> Path:
    alone = len(runs) == 1 and (runs[0] / "config.yaml").exists()
    return runs[0] / "gallery" if alone else Path("gallery")


def _arms(settings: Gallery, source: Source) -> list[Arm]:
    device = resolve_device(settings.device)
    names = _names(settings.runs)
    arms = []
    for path, name in zip(settings.runs, names, strict=True):
        model = load_model(path).to(device).eval()
        images, own = _images(source, settings.count, model, settings.data)
        prefix = f"{name.replace('/', '-')}-" if len(names) > 1 else ""
        arms.append(Arm(path, name, model, images, own, _ratio(settings, path, model), prefix))
    return arms


def _names(runs: list[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell them apart."""
    if len({run.resolve() for run in runs}) < len(runs):
        raise MaekitError("E-USAGE-RUN", "a run named twice", found=", ".join(map(str, runs)))
    parts = [run.resolve().with_suffix("" if run.suffix == ".safetensors" else run.suffix).parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return list(map(str, runs))


def _images(source: Source, count: int, model: MaskedAutoencoder, data: str | None) -> tuple[Tensor, list[str]]:
    found = evenly_spaced(source, count, model, str(data))
    views = [view.float() / 255 if view.dtype == torch.uint8 else view.float() for view, _ in found]
    return torch.stack(views), [name for _, name in found]


def _ratio(settings: Gallery, path: Path, model: MaskedAutoencoder) -> float:
    """Return the ratio to mask with: the one asked for, else the run's own, else the paper's or one half."""
    if model.variant.mask_kind == "none":
        return 0.0
    if settings.mask_ratio is not None:
        check_ratio(model, settings.mask_ratio)
        return settings.mask_ratio
    file = path / "config.yaml"
    if file.exists():
        return float(load_yaml(file).get("mask_ratio", PAPER_RATIO))
    return next(iter(possible_ratios([100 * PAPER_RATIO, 50], model)))


# ------------------------------------------------------------------------------------------------ the parts


def _ratios(arm: Arm, settings: Gallery, _: Source) -> Part:
    if not shows_pixels(arm.model):
        return Part("Mask ratios", text=[NO_PIXELS.format(arm.name, arm.model.target)])
    ratios = possible_ratios(settings.ratios, arm.model)
    if not ratios:
        return Part("Mask ratios", text=[f"{arm.model.num_patches} patches allow none of the ratios asked for."])
    return ratios_part(
        [reconstruct_images(arm.model, arm.images, ratio, settings.seed) for ratio in ratios], arm.names, arm.prefix
    )


def _training(arm: Arm, settings: Gallery, _: Source) -> Part:
    folders = {int(folder.name.removeprefix("step-")): folder for folder in arm.path.glob("checkpoints/step-*")}
    steps = sorted(folders)
    if len(steps) < 2:
        kept = f"step {steps[0]} only" if steps else "no checkpoint"
        told = f"{arm.name} keeps {kept}, so there is nothing to set side by side. `maekit pretrain --keep 100 "
        return Part("Over training", text=[told + "--save-every N` keeps more."])
    if not shows_pixels(arm.model):
        return Part("Over training", text=[NO_PIXELS.format(arm.name, arm.model.target)])
    found = {}
    for at in spaced(len(steps), MOST_COLUMNS):
        model = load_model(folders[steps[at]]).to(next(arm.model.parameters()).device).eval()
        found[steps[at]] = reconstruct_images(model, arm.images, arm.ratio, settings.seed)
    return training_part(found, arm.names, arm.prefix)


def _features(arm: Arm, settings: Gallery, _: Source) -> Part:
    return features_part(arm.model, arm.pictures, arm.inputs, _blocks(arm, settings), arm.names, arm.prefix)


def _attention(arm: Arm, settings: Gallery, _: Source) -> Part:
    rows, columns = arm.model.grid
    places = settings.patches or [(rows // 2, columns // 2)]
    found = attend(arm.model, arm.inputs, places, _blocks(arm, settings))
    return attention_part(arm.model, arm.pictures, found, arm.names, arm.prefix)


def _failures(arm: Arm, settings: Gallery, source: Source) -> Part:
    images, names = _images(source, settings.among, arm.model, settings.data)
    errors = find_errors(arm.model, images, arm.ratio, settings.seed)
    return failures_part(arm.model, images, names, errors, settings.count, settings.seed, arm.prefix)


def _masks(arm: Arm, settings: Gallery, _: Source) -> Part:
    try:
        figure = mask_figure(arm.pictures, arm.model.grid, settings.seed, arm.names, max_side=112)
    except MaekitError as error:
        return Part("Kinds of masks", text=[str(error)])
    told = "Kind, share removed, and the side of the squares that are removed whole where it is not one patch."
    return Part(
        "Kinds of masks", text=["Each kind as pre-training would draw it, whatever this run was trained with."],
        pictures={f"{arm.prefix}masks.png": (figure, told)},
    )  # fmt: skip


DRAWN: dict[str, Callable[[Arm, Gallery, Source], Part]] = {
    "masks": _masks,
    "ratios": _ratios,
    "training": _training,
    "features": _features,
    "attention": _attention,
    "failures": _failures,
}
"""Parts that show one run."""


def _beside(arms: list[Arm], settings: Gallery) -> Part:
    """Draw all runs at the ratio of the first, or at its own where the masks of a run cannot have that one."""
    shown = [arm for arm in arms if shows_pixels(arm.model)]
    text = [NO_PIXELS.format(arm.name, arm.model.target) for arm in arms if arm not in shown]
    if not shown:
        return Part("Side by side", text=text)
    found = {}
    for arm in shown:
        ratio = shown[0].ratio if possible_ratios([100 * shown[0].ratio], arm.model) else arm.ratio
        found[arm.name] = reconstruct_images(arm.model, arm.images, ratio, settings.seed)
    return beside_part(found, shown[0].names, text)


def _blocks(arm: Arm, settings: Gallery) -> list[int]:
    """Return the blocks asked for, else up to six evenly spaced ones to the last."""
    depth = len(arm.model.encoder.blocks)
    if settings.blocks is None:
        return [at + 1 for at in spaced(depth, MOST_COLUMNS)]
    blocks = list(range(1, depth + 1)) if settings.blocks == "all" else sorted(set(settings.blocks))
    if blocks[-1] > depth:
        raise MaekitError(
            "E-CONFIG-BLOCKS", "setting blocks", found=f"block {blocks[-1]} of {arm.name}", expected=f"1 to {depth}"
        )
    return blocks


def _titled(part: Part, arm: Arm, count: int) -> Part:
    if count == 1:
        return part
    return Part(f"{part.heading}: {arm.name}", part.text, part.pictures, part.tables, part.plots)


def _title(arms: list[Arm]) -> str:
    return "Gallery: " + ", ".join(arm.name for arm in arms)


def _intro(arms: list[Arm], settings: Gallery, source: Source) -> list[str]:
    part = {"val": "held-out images", "train": "training images", "all": "images"}[settings.split]
    ratios = ", ".join(dict.fromkeys(percent(arm.ratio) for arm in arms))
    return [
        f"{len(arms[0].images)} of {len(source):,} {part} of `{settings.data}`, evenly spaced, as evaluation sees "
        f"them; seed {settings.seed} chooses the masks. Where one mask ratio is shown it is {ratios}.",
    ]
