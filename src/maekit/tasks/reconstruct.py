"""Show what a model makes of images of which most is removed (as figure 4 of arXiv 2111.06377)."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maekit.data.augment import default_crop_pct, eval_view
from maekit.data.image import read_image
from maekit.data.source import read_regular_file
from maekit.data.sources import Source, open_source
from maekit.errors import MaekitError
from maekit.interchange.weights import load_model
from maekit.model.mae import MaskedAutoencoder
from maekit.report.grids import write_png
from maekit.report.pretraining import picture_name
from maekit.report.reconstruction import (
    Reconstruction,
    check_ratios,
    combined_figure,
    possible_ratios,
    ratio_figure,
    reconstruct_images,
    reconstruction_figure,
)
from maekit.seeds import seed_all
from maekit.settings import Reconstruct
from maekit.tasks import Result
from maekit.tasks.run_folder import outside, typed
from maekit.train.device import resolve_device

__all__ = ["reconstruct", "reconstruction_figure"]

log = logging.getLogger("maekit")


def reconstruct(settings: Reconstruct | dict[str, Any]) -> Result:
    """Write ``reconstruction-75.png`` ... and ``reconstructions.png`` with all ratios side by side.

    Returns:
        run, out, files, images, view (what is scored: "pixel", or "neighbours": un-normalised with the visible
        neighbours' statistics) and, by ratio in per cent, mse, psnr, psnr_fill (of a fill without a model), loss.

    Raises:
        MaekitError: E-USAGE- (no run, no images, both files and ``--data``), E-CONFIG-MASK (a ratio that keeps none
            or all patches), E-DATA-, E-CKPT-, E-ENV-.
    """
    settings = typed(Reconstruct, settings)
    _check_usage(settings)
    assert settings.run is not None
    out = settings.out or _default_out(settings.run)
    outside(out, settings.data)
    device = resolve_device(settings.device)
    seed_all(settings.seed)  # for a decoder that is not in the file
    model = load_model(settings.run).to(device).eval()
    ratios = _ratios(settings, model)
    images, names = _images(settings, model)
    shown = [reconstruct_images(model, images, ratio, settings.seed) for ratio in ratios]
    files = _write(out, shown, names)
    scores = {
        f"{100 * one.ratio:.6g}": {"mse": one.mse, "psnr": one.psnr, "psnr_fill": one.psnr_fill, "loss": one.loss}
        for one in shown
    }
    metrics: dict[str, object] = {
        "run": str(settings.run),
        "out": str(out),
        "files": [str(file) for file in files],
        "images": len(images),
        "view": "neighbours" if model.target == "norm_pixel" else "pixel",
        "ratios": scores,
    }
    return Result(metrics, _told(shown, files))


def _check_usage(settings: Reconstruct) -> None:
    if settings.run is None:
        raise MaekitError(
            "E-USAGE-RUN", "no weights named", hint="a run folder or a .safetensors file as first argument"
        )
    if not settings.images and settings.data is None:
        raise MaekitError("E-USAGE-IMAGES", "no images named", hint="image files after the run, or --data FOLDER")
    if settings.images and settings.data is not None:
        raise MaekitError("E-USAGE-IMAGES", "images named twice", found="files and --data", expected="one of them")


def _ratios(settings: Reconstruct, model: MaskedAutoencoder) -> list[float]:
    """Return the ratios as shares; of the default ones only those that so few patches allow."""
    if "ratios" in settings.model_fields_set:
        return check_ratios(settings.ratios, model)
    ratios = possible_ratios(settings.ratios, model)
    if len(ratios) < len(settings.ratios) and model.variant.mask_kind != "none":
        left_out = ", ".join(f"{ratio:g}" for ratio in settings.ratios if ratio / 100 not in ratios)
        log.warning("left out: %s per cent cannot be removed of %d patches", left_out, model.num_patches)
    return ratios or check_ratios(settings.ratios, model)


def _default_out(run: Path) -> Path:
    """Return a folder of its own: RUN/reconstructions holds what training drew."""
    return run / "reconstruct" if (run / "config.yaml").exists() else Path("reconstruct")


def _images(settings: Reconstruct, model: MaskedAutoencoder) -> tuple[Tensor, list[str]]:
    """Return images as evaluation sees them, (n, C, H, W), and their names."""
    found = (
        _from_files(settings.images, model)
        if settings.images
        else evenly_spaced(open_source(str(settings.data), "val"), settings.count, model, str(settings.data))
    )
    views = [view for view, _ in found]
    if len({view.dtype for view in views}) > 1:  # pictures among float arrays
        views = [view.float() / 255 if view.dtype == torch.uint8 else view for view in views]
    return torch.stack(views), [name for _, name in found]


def _from_files(paths: list[Path], model: MaskedAutoencoder) -> list[tuple[Tensor, str]]:
    """Read the files that were named: one that cannot be read is an error, not a gap."""
    found = []
    for path in paths:
        if path.is_dir():
            raise MaekitError(
                "E-DATA-PATH", f"image {path}", found="a folder", expected="a file", hint=f"--data {path}"
            )
        try:
            data = read_regular_file(str(path))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise MaekitError("E-DATA-PATH", f"image {path}", found=reason, expected="a readable file") from error
        alike = sum(other.stem == path.stem for other in paths) > 1
        found.append((_view(data, str(path), model), f"{path.parent.name}/{path.stem}" if alike else path.stem))
    return found


def evenly_spaced(source: Source, count: int, model: MaskedAutoencoder, data: str) -> list[tuple[Tensor, str]]:
    """Read `count` images as the model's evaluation sees them, with their names; skip unreadable ones.

    They are evenly spaced, so that every class folder has its turn.

    Raises:
        MaekitError: E-DATA-BAD, naming `data`, if none can be read.
    """
    wanted = min(count, len(source))
    found: list[tuple[Tensor, str]] = []
    for turn in range(wanted):
        start, end = turn * len(source) // wanted, (turn + 1) * len(source) // wanted
        found += _first_readable(source, range(start, end), model)
    if not found:
        raise MaekitError("E-DATA-BAD", data, found="no readable image", hint=f"maekit data {data}")
    return found


def _first_readable(source: Source, indices: range, model: MaskedAutoencoder) -> list[tuple[Tensor, str]]:
    for index in indices:
        try:
            return [(_view(source.read(index), source.ids[index], model), source.ids[index])]
        except MaekitError as error:
            log.warning("skipped: %s", error.args[0])
    return []


def _view(data: bytes | Tensor, name: str, model: MaskedAutoencoder) -> Tensor:
    channels = len(model.mean)
    image = data if isinstance(data, Tensor) else read_image(data, channels=channels, name=name)
    return eval_view(image, model.img_size, default_crop_pct(model.img_size))


def _write(out: Path, shown: list[Reconstruction], names: list[str]) -> list[Path]:
    pictures = {picture_name(one.ratio): ratio_figure(one, names, max_side=512) for one in shown}
    pictures["reconstructions.png"] = combined_figure(shown, names)
    for name, image in pictures.items():
        write_png(out / name, image)
    return [out / name for name in pictures]


def _told(shown: list[Reconstruction], files: list[Path]) -> str:
    lines = ["removed   PSNR       plain fill"]
    lines += [f"{100 * one.ratio:5.4g} %   {one.psnr:5.2f} dB   {one.psnr_fill:5.2f} dB" for one in shown]
    return "\n".join([*lines, *map(str, files)])
