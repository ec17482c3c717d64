"""Score frozen features by their nearest neighbours: no training, one pass over the images."""

from typing import Any

from maekit.errors import MaekitError
from maekit.scores.neighbours import knn_sweep
from maekit.settings import Knn
from maekit.tasks import Result
from maekit.tasks.features import extract_both, labelled_splits, load_encoder, pixels
from maekit.tasks.run_folder import typed
from maekit.train.device import world


def knn(settings: Knn | dict[str, Any]) -> Result:
    """Return top1: the share of held-out images whose class the neighbours vote for.

    Raises:
        MaekitError: E-USAGE-, E-DATA-, E-CKPT-.
    """
    settings = typed(Knn, settings)
    if settings.raw_pixels and (settings.random_init or settings.pool):
        other = "random_init" if settings.random_init else "pool"
        raise MaekitError(
            "E-CONFIG-BOTH", f"settings raw_pixels and {other}", expected="one of them: no encoder is asked"
        )
    with world(settings.device) as here:
        train, val = labelled_splits(settings)
        model = load_encoder(settings, here)
        if settings.raw_pixels:
            parts = [pixels(part, model.img_size, len(model.mean), workers=settings.workers) for part in (train, val)]
        else:
            parts = extract_both(model, train, val, here, settings)
    scores = knn_sweep(
        parts[0].labelled,
        parts[1].labelled,
        len(train.classes or []),
        ks=list(dict.fromkeys(min(k, len(parts[0].index)) for k in settings.k)),
        temperatures=list(dict.fromkeys(settings.temperature)),
    )
    (k, temperature), top1 = next(iter(scores.items()))
    what = "raw pixels" if settings.raw_pixels else "random encoder" if settings.random_init else str(settings.run)
    metrics = {
        "run": str(settings.run),
        "features": what,
        "top1": top1,
        "k": k,
        "temperature": temperature,
        "train_images": len(train),
        "val_images": len(val),
    }
    if len(scores) > 1:
        metrics["sweep"] = [{"k": k, "temperature": t, "top1": score} for (k, t), score in scores.items()]
    end = f"kNN top-1 {top1:.4f} ({what}; k {k}; {len(train)} labels, scored on {val.name}, {len(val)} images)"
    return Result(metrics, end if len(scores) == 1 else _table(scores) + "\n" + end)


def _table(scores: dict[tuple[int, float], float]) -> str:
    """Return top-1 by k, a column for each temperature; the best of a table that is looked up here is no score."""
    temperatures = list(dict.fromkeys(temperature for _, temperature in scores))
    table = [f"{'k':>6}" + "".join(f"{f'T {temperature:g}':>10}" for temperature in temperatures)]
    for k in dict.fromkeys(k for k, _ in scores):
        table.append(f"{k:6}" + "".join(f"{scores[k, temperature]:10.4f}" for temperature in temperatures))
    return "\n".join(table)
