"""Show which training images lie nearest to held-out ones."""

from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from maekit.data.sources import Source, open_source
from maekit.errors import MaekitError
from maekit.model.mae import MaskedAutoencoder
from maekit.report.files import write_whole
from maekit.report.grids import reconstruction_grid, write_png
from maekit.report.tables import Cell, to_csv
from maekit.scores.neighbours import Neighbours, nearest
from maekit.settings import Retrieve
from maekit.tasks import Result
from maekit.tasks.features import Features, extract_both, load_encoder
from maekit.tasks.pretrain import some_images
from maekit.tasks.run_folder import outside, typed
from maekit.train.device import world

Part = tuple[Source, Features]


def retrieve(settings: Retrieve | dict[str, Any]) -> Result:
    """Write ``neighbours.png``, some held-out images with their nearest ones, and ``neighbours.csv``, those of all.

    Returns:
        run, out, files, k, images; with labels also precision: the share of all neighbours that are of the class of
        the image they were found for.

    Raises:
        MaekitError: E-USAGE-, E-DATA-, E-CKPT-, E-CONFIG-OUT, E-ENV-OUT.
    """
    settings = typed(Retrieve, settings)
    train, val = _splits(settings)
    out = settings.out or _default_out(settings)
    outside(out, settings.data)
    with world(settings.device) as here:
        model = load_encoder(settings, here)
        bank, queries = zip((train, val), extract_both(model, train, val, here, settings), strict=True)
        found = nearest(bank[1].values, queries[1].values, settings.k)
        right = _same_class(bank, queries, found)
        asked = [i * len(found.index) // settings.queries for i in range(settings.queries)]
        asked = list(dict.fromkeys(asked))
        files = [out / "neighbours.png", out / "neighbours.csv"]
        if here.is_main:
            write_png(files[0], neighbour_grid(model, bank, queries, asked, found, right))
            write_whole(files[1], _table(bank, queries, found))
    metrics: dict[str, Any] = {"run": str(settings.run), "out": str(out), "files": [str(file) for file in files]}
    metrics |= {"k": found.index.shape[1], "images": len(found.index)}
    text = f"{files[0]}: {len(asked)} of {len(found.index)} held-out images and their nearest of {len(train)}"
    if right is not None:
        metrics["precision"] = float(right.double().mean())
        text += f"\nof all {metrics['k']} nearest, {metrics['precision']:.4f} are of the same class"
    return Result(metrics, text)


def _splits(settings: Retrieve) -> tuple[Source, Source]:
    """Return the images to look among and those to look for; labels are welcome and not needed."""
    if settings.data is None:
        raise MaekitError("E-USAGE-DATA", "no images named", hint="--data FOLDER, or --data builtin:fashion")
    columns: dict[str, Any] = {"image_column": settings.image_column, "label_column": settings.label_column}
    apart = settings.val_data is not None
    train = open_source(settings.data, "train-or-all" if apart else "train", **columns)
    place, part = settings.val_data or settings.data, "val-or-all" if apart else "val"
    return train, open_source(place, part, classes=train.classes, **columns)


def _default_out(settings: Retrieve) -> Path:
    run = settings.run
    return run / "retrieve" if run is not None and (run / "config.yaml").exists() else Path("retrieve")


def _same_class(bank: Part, queries: Part, found: Neighbours) -> Tensor | None:
    """Return (n, k) bool, None without labels."""
    if bank[0].labels is None or queries[0].labels is None:
        return None
    return bank[1].labels[found.index] == queries[1].labels[:, None]


def neighbour_grid(
    model: MaskedAutoencoder,
    bank: Part,
    queries: Part,
    asked: list[int],
    found: Neighbours,
    right: Tensor | None = None,
) -> Image.Image:
    """Draw a held-out image and its nearest ones in each row.

    Args:
        model: whose view is shown.
        bank: images to look among.
        queries: images to look for.
        asked: which of them are drawn.
        found: the neighbours of all queries.
        right: (n, k) which of them are of the same class.
    """
    rows, labels = [], []
    for query in asked:
        left = some_images(queries[0].subset([int(queries[1].index[query])]), model, 1)
        near = [some_images(bank[0].subset([int(bank[1].index[i])]), model, 1) for i in found.index[query].tolist()]
        rows.append([(image[0] * 255).round().clamp(0, 255).byte() for image in (left, *near)])
        if right is not None:
            name = (queries[0].classes or [])[int(queries[1].labels[query])]
            labels.append(f"{name}: {int(right[query].sum())} of {right.shape[1]}")
    headers = ["held out", *(f"nearest {i + 1}" for i in range(found.index.shape[1]))]
    notes = ["Nearest by cosine of the features. Left: the class, and how many of the nearest are of it."] * bool(
        labels
    )
    return reconstruction_grid(rows, headers, labels or None, notes=notes)


def _table(bank: Part, queries: Part, found: Neighbours) -> bytes:
    """Return a line for each neighbour of each image: image, rank, neighbour, cosine."""
    rows: list[list[Cell]] = []
    for row, (near, cosines) in enumerate(zip(found.index.tolist(), found.similarity.tolist(), strict=True)):
        image = queries[0].ids[int(queries[1].index[row])]
        for rank, (place, cosine) in enumerate(zip(near, cosines, strict=True), 1):
            rows.append([image, rank, bank[0].ids[int(bank[1].index[place])], f"{cosine:.6f}"])
    return to_csv(["image", "rank", "neighbour", "cosine"], rows)
