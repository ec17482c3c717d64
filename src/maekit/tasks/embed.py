"""Write the features of a data set into a file that other tools open.

Data larger than memory are streamed, and a stopped file is gone on with (`maekit.tasks.streamed`).
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from maekit.data.augment import default_crop_pct
from maekit.data.loader import Batch
from maekit.data.sources import Source, open_source
from maekit.errors import MaekitError
from maekit.model.mae import MaskedAutoencoder, check_pool
from maekit.report.files import whole
from maekit.report.tables import text
from maekit.settings import Embed
from maekit.tasks import Result
from maekit.tasks.features import check_features, encoder_loader, load_encoder
from maekit.tasks.predictions import fixed_lists, identity
from maekit.tasks.run_folder import outside, typed
from maekit.tasks.streamed import Parts, Rows, Work, images_of, stream
from maekit.tasks.training import spread
from maekit.train.checkpoint import state_sha256
from maekit.train.device import world


def embed(settings: Embed | dict[str, Any]) -> Result:
    """Write one embedding per image, or go on with a file that was stopped.

    ``FILE.parquet`` has the columns id (place of the image in the data), path, label, label_name, embedding;
    ``FILE.npy`` is an array (n, D), or (n, T, D) with ``--pool tokens``, with the paths in ``FILE.ids.txt``. An image
    that cannot be read has no row.

    Returns:
        run, file, images, shape; exit code 75 if stopped with something to go on from: file, images, of.

    Raises:
        MaekitError: E-USAGE- (no data, no or another kind of file), E-DATA-, E-CKPT-, E-NUM-FEATURES, E-ENV-OUT,
            E-ENV-BUSY.
    """
    settings = typed(Embed, settings)
    out = _file(settings)
    if settings.data is None:
        raise MaekitError("E-USAGE-DATA", "no images named", hint="--data FOLDER, or --data builtin:fashion")
    if (result := spread(settings, embed)) is not None:
        return result
    with world(settings.device, settings.peer_timeout) as here:
        source = open_source(
            settings.data, None, image_column=settings.image_column, label_column=settings.label_column
        )
        model = load_encoder(settings, here)
        check_pool(model.encoder, settings.pool, also=("tokens",))
        shape = [len(source), *_shape(model, settings.pool)]

        def rows(batch: Batch) -> Rows:
            last = len(model.encoder.blocks)
            (values,) = model.layer_features(batch["images"], [(last, settings.pool)])
            values = values.float().cpu()
            check_features(values, source.name, last)
            return {"values": values}

        def finish(parts: Parts) -> None:
            shape[0] = parts.num_rows()
            _write(out, source, parts, shape)

        loader = encoder_loader(model, source, here, settings.workers)
        work = Work(loader, rows, 4 * int(np.prod(shape[1:])), "features", _job(model, source, settings.pool))
        if (stopped := stream(out, work, here, finish)) is not None:
            return stopped
    metrics = {"run": str(settings.run), "file": str(out), "images": shape[0], "shape": shape}
    skipped = f", {len(source) - shape[0]} images skipped" if shape[0] < len(source) else ""
    return Result(metrics, f"{out}: {shape[0]} embeddings of {' x '.join(map(str, shape[1:]))} numbers{skipped}")


def _file(settings: Embed) -> Path:
    if settings.out is None or settings.out.suffix not in (".parquet", ".npy"):
        raise MaekitError(
            "E-USAGE-OUT",
            "setting out",
            found=settings.out or "nothing",
            expected="FILE.parquet or FILE.npy",
            hint="--out features.parquet",
        )
    if settings.out.is_dir():
        raise MaekitError("E-USAGE-OUT", "setting out", found=f"the folder {settings.out}", expected="a file")
    outside(settings.out, settings.data)
    if settings.pool == "tokens" and settings.out.suffix != ".npy":
        raise MaekitError("E-USAGE-OUT", "setting out", found=settings.out, expected="FILE.npy for --pool tokens")
    return settings.out


def _shape(model: MaskedAutoencoder, pool: str) -> list[int]:
    """Return the shape of one image's features."""
    width = model.encoder.embed_dim
    return [model.encoder.num_prefix_tokens + model.num_patches, width] if pool == "tokens" else [width]


def _job(model: MaskedAutoencoder, source: Source, pool: str) -> dict[str, Any]:
    return images_of(source) | {
        "verb": "embed",
        "weights": state_sha256({"encoder": model.encoder.state_dict()}, {}),
        "size": model.img_size,
        "mean": model.mean,
        "std": model.std,
        "crop_pct": default_crop_pct(model.img_size),
        "pool": pool,
    }


def _write(out: Path, source: Source, parts: Parts, shape: list[int]) -> None:
    """Write part by part; a file is whole or absent."""
    if out.suffix == ".parquet":
        with whole(out) as place:
            _write_parquet(place, source, parts, shape)
        return
    with (
        whole(out) as place,
        whole(out.with_suffix(".ids.txt")) as names,  # in its place first
        place.open("wb") as array,
        names.open("w", encoding="utf-8") as ids,
    ):
        header = {"descr": "<f4", "fortran_order": False, "shape": tuple(shape)}
        np.lib.format.write_array_header_1_0(array, header)
        for rows in parts:
            array.write(rows["values"].numpy().astype("<f4", copy=False).tobytes())
            ids.writelines(_line(source.ids[int(i)]) for i in rows["index"].tolist())


def _line(name: str) -> str:
    r"""Return the line of an image; a name of several lines, which a disk may hold, is one with ``\n`` in it."""
    return text(name).replace("\r", "\\r").replace("\n", "\\n") + "\n"


def _write_parquet(place: Path, source: Source, parts: Parts, shape: list[int]) -> None:
    schema = _table(source, [], torch.zeros(0, shape[1])).schema
    with pq.ParquetWriter(place, schema) as writer:
        for rows in parts:
            writer.write_table(_table(source, rows["index"].tolist(), rows["values"]))


def _table(source: Source, index: list[int], values: Tensor) -> pa.Table:
    labels = [None if source.labels is None else source.labels[i] for i in index]
    names = [None if label is None or source.classes is None else text(source.classes[label]) for label in labels]
    more = {"label": pa.array(labels, pa.int64()), "label_name": pa.array(names, pa.string())}
    return pa.table(identity(source, index) | more | {"embedding": fixed_lists(values)})
