"""Write the features of a data set into a file that other tools open."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from maekit.data.sources import Source, open_source
from maekit.errors import MaekitError
from maekit.settings import Embed
from maekit.tasks import Result
from maekit.tasks.features import Features, extract, load_encoder
from maekit.tasks.run_folder import outside, typed
from maekit.train.device import world


def embed(settings: Embed | dict[str, Any]) -> Result:
    """Write one embedding per image.

    ``FILE.parquet`` has the columns id, path, label, embedding; ``FILE.npy`` is an array (n, D), or (n, T, D) with
    ``--pool tokens``, with the ids in ``FILE.ids.txt``.

    Raises:
        MaekitError: E-USAGE- (no data, no or another kind of file), E-DATA-, E-CKPT-, E-ENV-OUT.
    """
    settings = typed(Embed, settings)
    out = _file(settings)
    if settings.data is None:
        raise MaekitError("E-USAGE-DATA", "no images named", hint="--data FOLDER, or --data builtin:fashion")
    with world(settings.device) as here:
        source = open_source(
            settings.data, None, image_column=settings.image_column, label_column=settings.label_column
        )
        model = load_encoder(settings, here)
        features = extract(model, source, here, pool=settings.pool, workers=settings.workers, title="features")
        if here.is_main:
            try:
                _write(out, source, features)
            except OSError as error:
                raise MaekitError("E-ENV-OUT", f"cannot write {out}", found=error.strerror or error) from error
    metrics = {
        "run": str(settings.run),
        "file": str(out),
        "images": len(features.index),
        "shape": list(features.values.shape),
    }
    shape = " x ".join(map(str, features.values.shape[1:]))
    return Result(metrics, f"{out}: {len(features.index)} embeddings of {shape} numbers")


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


def _write(out: Path, source: Source, features: Features) -> None:
    """Write beside and rename, so that a file is whole or absent."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".tmp-{out.name}")
    try:
        _write_into(temporary, out, source, features)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def _write_into(temporary: Path, out: Path, source: Source, features: Features) -> None:
    ids = [source.ids[i] for i in features.index.tolist()]
    if out.suffix == ".npy":
        with temporary.open("wb") as file:
            np.save(file, features.values.numpy(), allow_pickle=False)
        out.with_suffix(".ids.txt").write_text("".join(f"{name}\n" for name in ids), encoding="utf-8")
    else:
        labels = [None if label < 0 else label for label in features.labels.tolist()]
        names = [None if label is None or source.classes is None else source.classes[label] for label in labels]
        values = pa.FixedSizeListArray.from_arrays(pa.array(features.values.numpy().ravel()), features.values.shape[1])
        table = pa.table(
            {
                "id": list(range(len(ids))),
                "path": ids,
                "label": pa.array(labels, pa.int64()),
                "label_name": pa.array(names, pa.string()),
                "embedding": values,
            }
        )
        pq.write_table(table, temporary)
