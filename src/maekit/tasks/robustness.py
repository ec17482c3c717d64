"""Score a classifier on corrupted, occluded and otherwise foreign images (paper appendix B; arXiv 1903.12261)."""

import json
import logging
from typing import Any

import torch
from torch import Tensor

from maekit.data.augment import EvalView
from maekit.data.corrupt import check_pictures, corruptions
from maekit.data.imagenet import Variant, open_variant
from maekit.data.loader import Batch
from maekit.errors import MaekitError
from maekit.model.occlusion import blacken, drop, shuffle
from maekit.report.files import write_whole
from maekit.report.robustness import draw_occlusion, published
from maekit.report.tables import to_csv, to_markdown
from maekit.settings import Robustness
from maekit.tasks import Result
from maekit.tasks.classifying import (
    Subject,
    accuracy,
    begin,
    image_loader,
    labelled,
    limited,
    predictions,
)
from maekit.tasks.corruptions import chosen_kinds, load, score_corruptions
from maekit.tasks.run_folder import Run, carry_out, finish, open_run, typed
from maekit.tasks.training import default_out
from maekit.train.device import World, world

log = logging.getLogger("maekit")

Accepted = list[tuple[int, ...]]


def robustness(settings: Robustness | dict[str, Any]) -> Result:
    """Score a classifier, or go on with a scoring that was stopped.

    ``--out`` gets table.csv, table.md, a plot and robustness.json, written after each kind of corruption: the same
    command goes on after the last whole one.

    Args:
        settings: as on the command line; a dictionary is checked like a config file.

    Returns:
        run, out, protocol, images, top1; with corruptions mean_error, mce, relative_mce (over the 15 standard kinds),
        extra_error, extra_ce and kinds; with occlusion curves; with ReaL, A, R and mapped ones left_out, and top1_all
        where only some outputs compete.

    Raises:
        MaekitError: for everything a user can cause.
    """
    settings = typed(Robustness, settings)
    check_settings(settings)
    with world(settings.device) as here:
        scored = load(settings, settings.run, here)
        if settings.protocol == "corruptions":
            check_pictures(torch.zeros(len(scored.mean), *scored.size, dtype=torch.uint8))
        run = open_run(settings.out or default_out("robustness", settings.data), "robustness", settings)
        return carry_out(run, lambda: _score(settings, scored, run, here))


def check_settings(settings: Robustness) -> None:
    """Refuse what is missing or belongs to another protocol: nothing is accepted and ignored.

    Raises:
        MaekitError: E-USAGE-DATA, E-USAGE-KINDS, E-USAGE-MAP, E-CONFIG-BOTH, E-ENV-IMPORT.
    """
    if settings.data is None:
        raise MaekitError("E-USAGE-DATA", "no labelled images named", hint="--data FOLDER, or --data builtin:fashion")
    fresh, mine = Robustness(), ONLY_FOR
    for name, protocols in mine.items():
        if settings.protocol not in protocols and getattr(settings, name) != getattr(fresh, name):
            raise MaekitError(
                "E-CONFIG-BOTH", f"setting {name}", found=f"protocol {settings.protocol}",
                expected=" or ".join(protocols),
            )  # fmt: skip
    chosen_kinds(settings.kinds)
    if settings.protocol == "mapped" and settings.class_map is None:
        raise MaekitError("E-USAGE-MAP", "no class map named", hint="--class-map FILE.json")
    if settings.protocol == "corruptions":
        corruptions()


ONLY_FOR = {
    "kinds": ("corruptions", "in-c"),
    "severities": ("corruptions", "in-c"),
    "reference": ("corruptions", "in-c"),
    "occlusions": ("occlusion",),
    "fractions": ("occlusion",),
    "class_map": ("mapped",),
    "all_images": ("corruptions", "occlusion"),
}
"""Settings that mean something to some protocols only."""


def _score(settings: Robustness, scored: Subject, run: Run, here: World) -> Result:
    if settings.protocol in ("corruptions", "in-c"):
        return score_corruptions(settings, scored, run, here)
    if settings.protocol == "occlusion":
        return _occlusion(settings, scored, run, here)
    return _variant(settings, scored, run, here)


# -------------------------------------------------------------------------------------------------- occlusion


def _occlusion(settings: Robustness, scored: Subject, run: Run, here: World) -> Result:
    """Sweep once: every image under every way and fraction, from one noise."""
    source = labelled(settings, scored)
    begin(settings, run, here, source, scored)
    assert source.labels is not None
    ways = [
        (way, fraction) for way in dict.fromkeys(settings.occlusions) for fraction in sorted(set(settings.fractions))
    ]
    black = torch.tensor([-mean / std for mean, std in zip(scored.mean, scored.std, strict=True)], device=here.device)

    def predict(batch: Batch) -> Tensor:
        return torch.stack([_occluded(scored, batch, way, f, black).float().argmax(1) for way, f in ways], 1)

    view = EvalView(scored.size, scored.crop_pct)
    loader = image_loader(source, view, scored, here, settings, seed=settings.seed, num_noise=scored.num_patches)
    table = predictions(loader, scored, here, predict, "occluded", len(ways))
    top1 = accuracy(table, [(label,) for label in source.labels])
    curves: dict[str, list[tuple[float, float]]] = {}
    for (way, fraction), score in zip(ways, top1, strict=True):
        curves.setdefault(way, []).append((fraction, score))
    metrics = {
        "run": str(settings.run),
        "out": str(run.path),
        "protocol": settings.protocol,
        "images": len(source),
        "patches": scored.num_patches,
        "curves": curves,
    }
    if here.is_main:
        _write_occlusion(run, metrics, 1 / scored.num_outputs)
        finish(run, metrics)
    said = "; ".join(
        f"{way} " + " ".join(f"{score:.3f}@{fraction:g}" for fraction, score in points)
        for way, points in curves.items()
    )
    return Result(metrics, f"{run.path}: top-1 by fraction of patches: {said}; {len(source)} images")


def _occluded(scored: Subject, batch: Batch, way: str, fraction: float, black: Tensor) -> Tensor:
    images, noise, patch = batch["images"], batch["noise"], scored.model.patch_embed.patch_size[0]
    if way == "drop":
        return drop(scored.model, images, noise, fraction)
    if way == "black":
        return scored.model(blacken(images, noise, fraction, patch, black))
    return scored.model(shuffle(images, noise, fraction, patch))


def _write_occlusion(run: Run, metrics: dict[str, Any], chance: float) -> None:
    curves = metrics["curves"]
    fractions = sorted({fraction for points in curves.values() for fraction, _ in points})
    headers = ["fraction", *curves]
    rows = [[float(fraction), *(dict(points)[fraction] for points in curves.values())] for fraction in fractions]
    note = f"Top-1 of {metrics['images']} images, {metrics['patches']} patches each; chance {chance:.3f}."
    write_whole(run.path / "table.csv", to_csv(headers, rows))
    write_whole(run.path / "table.md", to_markdown(headers, rows, [note]))
    write_whole(run.path / "robustness.json", (json.dumps(metrics, indent=1) + "\n").encode())
    write_whole(run.path / "occlusion.png", draw_occlusion(curves, chance, [metrics["run"]]))


# --------------------------------------------------------------------------------------------- published sets


def _variant(settings: Robustness, scored: Subject, run: Run, here: World) -> Result:
    """Score on a published set; where only some outputs compete, both numbers are told."""
    variant = _open_variant(settings, scored)
    begin(settings, run, here, variant.source, scored)
    outputs = None if variant.outputs is None else torch.tensor(variant.outputs, device=here.device)

    def predict(batch: Batch) -> Tensor:
        logits = scored.model(batch["images"]).float()
        among = logits if outputs is None else logits[:, outputs]
        best = among.argmax(1) if outputs is None else outputs[among.argmax(1)]
        return torch.stack([best, logits.argmax(1)], 1)

    loader = image_loader(variant.source, EvalView(scored.size, scored.crop_pct), scored, here, settings)
    top1, top1_all = accuracy(predictions(loader, scored, here, predict, settings.protocol, 2), variant.accepted)
    metrics: dict[str, Any] = {
        "run": str(settings.run),
        "out": str(run.path),
        "protocol": settings.protocol,
        "images": len(variant.source),
        "left_out": variant.left_out,
        "top1": top1,
        **({} if outputs is None else {"top1_all": top1_all, "outputs": len(outputs)}),
        "published": published(settings.protocol),
    }
    if here.is_main:
        rows = [[metrics["run"], top1], *([model, value] for model, value in metrics["published"].items())]
        among = "" if outputs is None else f" among {len(outputs)} classes ({top1_all:.4f} among all)"
        note = f"{settings.protocol}: {metrics['images']} images scored, {metrics['left_out']} left out{among}."
        write_whole(run.path / "table.csv", to_csv(["model", "top-1"], rows))
        write_whole(run.path / "table.md", to_markdown(["model", "top-1"], rows, [note]))
        write_whole(run.path / "robustness.json", (json.dumps(metrics, indent=1) + "\n").encode())
        finish(run, metrics)
    beside = ", ".join(f"{model} {value:.3f}" for model, value in metrics["published"].items())
    more = f"; the paper: {beside}" if beside else ""
    return Result(metrics, f"{run.path}: {settings.protocol} top-1 {top1:.4f}, {len(variant.source)} images{more}")


def _open_variant(settings: Robustness, scored: Subject) -> Variant:
    """Open the images, at most ``--limit`` of those that can be scored."""
    variant = open_variant(
        settings.protocol,  # type: ignore[arg-type]
        str(settings.data),
        scored.classes,
        scored.num_outputs,
        class_map=settings.class_map,
        image_column=settings.image_column,
        label_column=settings.label_column,
    )
    source = limited(variant.source, settings.limit, settings.seed)
    if source is variant.source:
        return variant
    places = {name: at for at, name in enumerate(variant.source.ids)}
    return Variant(source, [variant.accepted[places[name]] for name in source.ids], variant.outputs, variant.left_out)
