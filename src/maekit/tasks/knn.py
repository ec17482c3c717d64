"""Score frozen features by their nearest neighbours: no training, one pass over the images."""

from typing import Any

from maekit.errors import MaekitError
from maekit.scores.neighbours import knn_top1
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
    num_classes = len(train.classes or [])
    k = min(settings.k, len(parts[0].index))
    top1 = knn_top1(*(part.labelled for part in parts), num_classes=num_classes, k=k, temperature=settings.temperature)
    what = "raw pixels" if settings.raw_pixels else "random encoder" if settings.random_init else str(settings.run)
    metrics = {
        "run": str(settings.run),
        "features": what,
        "top1": top1,
        "k": k,
        "train_images": len(train),
        "val_images": len(val),
    }
    return Result(
        metrics,
        f"kNN top-1 {top1:.4f} ({what}; k {k}; {len(train)} labels, scored on {val.name}, {len(val)} images)",
    )
