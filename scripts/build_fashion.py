"""Draw the built-in data set: a fixed subset of Fashion-MNIST, small enough to live inside the package.

Source: the idx files of Debian's package ``dataset-fashion-mnist`` (MIT licence, Zalando SE). Drawn are, of each
class, the images whose SHA-256 of the 784 pixel bytes is smallest: 200 of the test files first, then 1,000 of the
training files. Pixels that were already drawn are passed over, so no two images are equal, also not between the
two files. Rows stand in the order of the original files. Lossless WebP (12 % smaller than PNG here).

With the pinned versions of Pillow and pyarrow the parquet files come out byte for byte the same.

    apt-get install dataset-fashion-mnist && python scripts/build_fashion.py [OUT]
"""

import gzip
import hashlib
import io
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SOURCE = Path("/usr/share/datasets/fashion-mnist")
OUT = Path(__file__).parents[1] / "src/maekit/data/builtin/fashion"
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
"""Label -> name, as in the data set's own README."""
DRAWN = {"test": ("t10k", 200), "train": ("train", 1000)}
"""Output file -> prefix of the idx files, images per class; the order is that of the drawing."""

log = logging.getLogger("maekit")


def read_idx(path: Path) -> np.ndarray:
    """Return the uint8 array of a gzipped idx file, (N,) or (N, H, W)."""
    data = gzip.decompress(path.read_bytes())
    ndim = data[3]
    assert data[:3] == b"\0\0\x08", f"{path}: not an idx file of unsigned bytes"
    shape = np.frombuffer(data, ">u4", count=ndim, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def draw(images: np.ndarray, labels: np.ndarray, per_class: int, drawn: set[bytes]) -> list[int]:
    """Return the rows drawn, ascending; adds the digests of their pixels to `drawn`."""
    rows: list[int] = []
    digests = [hashlib.sha256(image.tobytes()).digest() for image in images]
    for label in range(len(CLASSES)):
        mine: list[int] = []
        for row in sorted(np.flatnonzero(labels == label).tolist(), key=digests.__getitem__):
            if len(mine) < per_class and digests[row] not in drawn:
                drawn.add(digests[row])
                mine.append(row)
        rows += mine
    return sorted(rows)


def encode(image: np.ndarray) -> bytes:
    """Return the smallest lossless WebP of a grey image (H, W)."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "WEBP", lossless=True, quality=100, method=6)
    return out.getvalue()


def table(prefix: str, per_class: int, drawn: set[bytes]) -> pa.Table:
    """Return the drawn rows: image (binary), label (int64), label_name and file (string)."""
    images = read_idx(SOURCE / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(SOURCE / f"{prefix}-labels-idx1-ubyte.gz")
    rows = draw(images, labels, per_class, drawn)
    return pa.table(
        {
            "image": pa.array([encode(images[row]) for row in rows], pa.binary()),
            "label": pa.array([int(labels[row]) for row in rows], pa.int64()),
            "label_name": pa.array([CLASSES[labels[row]] for row in rows], pa.string()),
            "file": pa.array([f"{prefix}/{row:05d}" for row in rows], pa.string()),
        }
    )


def build(out: Path) -> None:
    """Write train.parquet and test.parquet into `out`."""
    drawn: set[bytes] = set()
    out.mkdir(parents=True, exist_ok=True)
    for name, (prefix, per_class) in DRAWN.items():
        rows = table(prefix, per_class, drawn)
        path = out / f"{name}.parquet"
        # images are compressed already; the other columns are not
        codecs = {column: "none" if column == "image" else "zstd" for column in rows.column_names}
        options: dict[str, Any] = {"compression": codecs, "use_dictionary": ["label_name"]}
        pq.write_table(rows, path, write_statistics=False, **options)
        log.info("%s: %d images, %d bytes", path, rows.num_rows, path.stat().st_size)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT)
