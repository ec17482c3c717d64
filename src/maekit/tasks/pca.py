"""Fit principal components of patches: images -> folder that ``pretrain --target pca --target-from`` reads.

Images are seen as pre-training sees them: its crops and mirrors, drawn from the seed, normalised with the statistics
that it would measure. An image gives an eighth of its patches, so that the patches come from many images and decoding
takes no longer than fitting.
"""

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from maekit.data.bad_images import FILE as BAD_FILES
from maekit.data.check import LIMIT
from maekit.data.loader import Loader
from maekit.data.sources import Source
from maekit.interchange.targets import FILE, save_target
from maekit.model.patches import patchify
from maekit.model.pca import Fitted, PatchPCA, fit_pca
from maekit.report.pca import pca_report
from maekit.settings import Pca
from maekit.tasks import Result
from maekit.tasks.run_folder import Resolved, Run, carry_out, describe, deviating, finish, open_run, typed
from maekit.tasks.same_data import same_data
from maekit.tasks.training import (
    channels_of,
    default_out,
    measured,
    number_of_workers,
    patch_of,
    published,
    seen_as,
    unlabelled,
)

log = logging.getLogger("maekit")

COMPONENTS = 96
"""Of a patch, where nothing is said (paper section 4.1)."""
SHARE = 8
"""One of so many patches of an image is taken, where there are images enough."""
IMAGES = 256
"""Images read at a time."""


def pca(settings: Pca | dict[str, Any], dataset: Any = None) -> Result:
    """Fit patch PCA and write ``target.safetensors``, ``components.png`` and ``report.html``.

    Args:
        settings: as on the command line; a dictionary is checked like a config file.
        dataset: in place of ``settings.data``: a `Source` or any map-style dataset of images or (image, label).

    Returns:
        run, target, components, values, patches, explained (share of the variance), explained_by (of each component).

    Raises:
        MaekitError: E-CONFIG-PCA, E-DATA-PCA (see `fit_pca`); E-CONFIG-, E-DATA-, E-ENV- for all else a user can cause.
    """
    settings = typed(Pca, settings)
    run = open_run(settings.out or default_out("pca", settings.data), "pca", settings)
    return carry_out(run, lambda: _fit(settings, unlabelled(settings, dataset, settings.channels), run))


def _fit(settings: Pca, source: Source, run: Run) -> Result:
    channels = channels_of(source, settings.channels)
    view = seen_as(settings, settings.img_size, channels)
    patch, grid = patch_of(settings)
    values = patch * patch * channels
    components = min(COMPONENTS, max(1, values // 2)) if settings.components is None else settings.components
    PatchPCA(components, values, patch, channels)  # refused before anything is read
    said = published(settings.stats, channels)
    fingerprint = source.fingerprint()
    same_data(run, len(source), fingerprint)
    found = measured(source, channels, settings.bad_images)
    mean, std = said or found
    resolved = Resolved(images=len(source), fingerprint=fingerprint, mean=mean, std=std, deviations=deviating(settings))
    loader = Loader(
        source,
        view,
        batch_size=IMAGES,
        micro_batch=IMAGES,
        mean=mean,
        std=std,
        seed=settings.seed,
        num_noise=grid[0] * grid[1],
        workers=number_of_workers(settings.workers, len(source), settings.img_size),
        bad_log=run.path / BAD_FILES,
        bad_images=settings.bad_images,
        read_timeout=settings.read_timeout,
        looked_at=LIMIT,
    )
    log.info("pca: %d components of %d values", components, values)
    fitted = fit_pca(_patches(loader, settings.patches, patch), components, patch=patch, channels=channels)

    describe(run, settings, resolved)
    save_target(run.path / FILE, fitted.pca, fitted.pca.spec, "pca", mean=mean, std=std, fingerprint=fingerprint)
    pca_report(run.path, fitted, resolved.images)
    metrics = _metrics(run, fitted)
    finish(run, metrics)
    return Result(metrics, _told(metrics))


def _patches(loader: Loader, wanted: int, patch: int) -> Iterator[Tensor]:
    """Yield parts (n, V) of `wanted` patches from images in the order of training, crops anew in every epoch.

    Which patches of an image are taken goes by its noise, a function of (seed, epoch, image).
    """
    images, num_patches = len(loader.source), loader.samples.num_noise
    each = min(num_patches, max(math.ceil(num_patches / SHARE), math.ceil(wanted / images)))
    left = wanted
    for micro_batches in loader.steps(0, math.ceil(wanted / each) + loader.steps_per_epoch):
        for batch in micro_batches:
            chosen = batch["noise"].argsort(dim=1, stable=True)[:, :each]
            patches = patchify(batch["images"], patch)
            rows = patches.gather(1, chosen[:, :, None].expand(-1, -1, patches.shape[2])).flatten(0, 1)[:left]
            left -= len(rows)
            yield rows
        if not left:
            return


def _metrics(run: Run, fitted: Fitted) -> dict[str, Any]:
    kept = fitted.ratio[: len(fitted.pca.variance)]
    return {
        "run": str(run.path),
        "target": str(run.path / FILE),
        "components": len(kept),
        "values": len(fitted.ratio),
        "patches": fitted.patches,
        "explained": float(kept.sum()),
        "explained_by": [round(float(share), 6) for share in kept],
    }


def _told(metrics: dict[str, Any]) -> str:
    """Return how much the first components explain, for a terminal."""
    shares = torch.tensor(metrics["explained_by"]).cumsum(0)
    counts = [count for count in (1, 2, 4, 8, 16, 32, 64) if count < metrics["components"]]
    steps = ", ".join(f"{count}: {100 * shares[count - 1]:.1f} %" for count in counts)
    return (
        f"{metrics['run']}: {metrics['components']} components of {metrics['values']} values explain "
        f"{100 * metrics['explained']:.2f} % of the variance of {metrics['patches']:,} patches"
        + (f" ({steps})" if steps else "")
        + f"; look at {metrics['run']}/report.html"
    )
