"""Score frozen features with a few labels of each class: many draws of which, their mean and its interval."""

import sys
from typing import Any

from tqdm import tqdm

from maekit.data.sources import Source, label_subset
from maekit.scores.spread import mean_and_interval
from maekit.settings import Lowshot
from maekit.tasks import Result
from maekit.tasks.features import Features, extract_both, load_encoder, rows_of, whole_splits
from maekit.tasks.probe import logistic_top1
from maekit.tasks.run_folder import typed
from maekit.train.device import world


def lowshot(settings: Lowshot | dict[str, Any]) -> Result:
    """Return by number of labels a class the mean top1 of a logistic regression over draws of the labels.

    Draw i takes the images that ``--labels n/class --label-seed (seed + i)`` gives to every other verb, so arms can be
    compared pair by pair. The interval is about which labels were drawn; the images scored on are the same in all.

    Raises:
        MaekitError: E-USAGE-, E-DATA- (E-DATA-LABELS for more shots than a class has images), E-CKPT-.
    """
    settings = typed(Lowshot, settings)
    with world(settings.device) as here:
        train, val = whole_splits(settings)
        shots = list(dict.fromkeys(settings.shots))
        for count in shots:  # too many are said before anything is computed
            label_subset(train, f"{count}/class")
        model = load_encoder(settings, here)
        features = extract_both(model, train, val, here, settings)
    jobs = tqdm(shots, "shots", disable=not sys.stderr.isatty(), leave=False)
    rows = [_row(settings, train, *features, count) for count in jobs]
    metrics = {"run": str(settings.run), "draws": settings.draws, "shots": rows}
    metrics |= {"train_images": len(train), "val_images": len(val), "random_init": settings.random_init}
    return Result(metrics, _told(settings, rows, val))


def _row(settings: Lowshot, train: Source, bank: Features, queries: Features, count: int) -> dict[str, Any]:
    scores = []
    for draw in range(settings.draws):
        images = label_subset(train, f"{count}/class", settings.label_seed + draw)
        scores.append(logistic_top1(rows_of(bank, images), queries, seed=settings.seed + draw)[0])
    mean, half = mean_and_interval(scores)
    return {"per_class": count, "top1": mean, "interval": half, "draws": scores}


def _told(settings: Lowshot, rows: list[dict[str, Any]], val: Source) -> str:
    table = [f"{'labels a class':>14}{'top-1':>10}   95 % interval of the mean"]
    for row in rows:
        half = row["interval"]
        interval = "one draw" if half is None else f"{row['top1'] - half:.4f} to {row['top1'] + half:.4f}"
        table.append(f"{row['per_class']:14}{row['top1']:10.4f}   {interval}")
    what = "random encoder" if settings.random_init else str(settings.run)
    return "\n".join([*table, f"{what}: {settings.draws} draws of the labels, scored on {len(val)} held-out images"])
