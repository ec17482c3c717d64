"""Seconds and memory before the first step of a large data set: 1.3 million images in folders of 1300, as ImageNet's.

A tree of `--real` empty files is made below `--at` (a RAM disk by default) and listed; its times are scaled to
`--images`, since they are proportional. What needs no files is measured in full on made-up names. Memory is what the
columns of names hold, what this process takes at its peak above the imports, and what each loader process has of them
for itself. With `--packed` a set of `maekit pack` is opened, in full: as many rows, of few pixels each, in files and
row groups as those of images of 20 kB. Times are the processor's, of one thread: what a clock says on an idle machine
with a local disk.

    python benchmarks/startup.py [--images 1300000] [--real 130000] [--at /dev/shm] [--workers 4] [--packed] [--json]
"""

import argparse
import io
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from maekit.data.columns import Names, Numbers
from maekit.data.loader import Loader
from maekit.data.manifest import manifest, to_bytes
from maekit.data.parquet import PACKED, Packed
from maekit.data.source import FileSource, Source
from maekit.data.sources import hold_out, label_subset, open_source

IN_A_FOLDER, IN_A_FILE = 1300, 10_000
T = TypeVar("T")


class Made(FileSource):
    """Images of which there are only the names."""

    def read(self, i: int) -> Any:
        """Return nothing but a pixel, after the name has been looked up."""
        assert self.keys[i]
        return torch.zeros(1, 4, 4)


class Held:
    """A view that gives the memory that its process has for itself, in MB."""

    def __call__(self, image: Tensor) -> Tensor:
        """Return (1, 1, 1)."""
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return torch.tensor([[[sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024]]])


def names(images: int) -> Iterator[list[str]]:
    """Yield paths like ImageNet's, a folder at a time."""
    for first in range(0, images, IN_A_FOLDER):
        label = f"n{1_440_000 + first:08d}"
        yield [f"{label}/{label}_{i}.JPEG" for i in range(min(IN_A_FOLDER, images - first))]


def plant(root: Path, images: int) -> None:
    """Make the tree."""
    for paths in names(images):
        (root / paths[0]).parent.mkdir()
        for path in paths:
            (root / path).touch()


def plant_packed(root: Path, images: int) -> None:
    """Write files as `maekit pack` does, of 10,000 rows in groups of 50."""
    sink = io.BytesIO()
    Image.new("L", (4, 4)).save(sink, "JPEG")
    for number, first in enumerate(range(0, images, IN_A_FILE)):
        rows = range(first, min(first + IN_A_FILE, images))
        labels = [row // IN_A_FOLDER for row in rows]
        table = pa.table({
            "id": [f"n{label:08d}/n{label:08d}_{row}.JPEG" for row, label in zip(rows, labels, strict=True)],
            "image": [sink.getvalue()] * len(rows), "label": labels,
            "label_name": [f"n{label:08d}" for label in labels],
        }).replace_schema_metadata({PACKED: Packed("train").to_json()})  # fmt: skip
        pq.write_table(table, root / f"train-{number:05d}.parquet", row_group_size=50, write_statistics=False)


def timed(seconds: dict[str, float], what: str, run: Callable[[], T], scale: float = 1.0) -> T:
    """Return what `run` returns and book its processor time."""
    start = time.process_time()
    found = run()
    seconds[what] = (time.process_time() - start) * scale
    return found


def workers_hold(source: Source, workers: int) -> float:
    """Return MB that a loader process has for itself, the largest of all."""
    loader = Loader(source, Held(), batch_size=1, micro_batch=1, mean=(0.0,), std=(1.0,), workers=workers)  # type: ignore[arg-type]
    return max(float(next(step)["images"]) for step in loader.steps(0, 4 * workers))


def peak() -> float:
    """Return MB of this process at its peak."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_300_000)
    parser.add_argument("--real", type=int, default=130_000)
    parser.add_argument("--at", default="/dev/shm")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--packed", action="store_true", help="a packed set in place of a tree")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    if options.packed:
        open_packed(options)
        return
    seconds: dict[str, float] = {}
    before, scale = peak(), options.images / options.real
    with tempfile.TemporaryDirectory(dir=options.at) as folder:
        plant(Path(folder), options.real)
        found = timed(seconds, "list the tree", lambda: open_source(folder), scale)
        timed(seconds, "sizes of all files", found.sizes, scale)
        (Path(folder) / "all.txt").write_text("".join(f"{one} {one.split('/')[0]}\n" for one in found.ids))
        timed(seconds, "read a list of all", lambda: open_source(Path(folder) / "all.txt"), scale)
    keys = timed(seconds, "names into a column", lambda: Names.of(names(options.images)))
    labels = Numbers(np.arange(len(keys)) // IN_A_FOLDER)
    source = Made("made", keys.readable, keys, labels, [f"class {i}" for i in range(labels[-1] + 1)])
    object.__setattr__(source, "_sizes", Numbers(np.arange(len(keys))))
    timed(seconds, "fingerprint, sizes known", source.fingerprint)
    loader = Loader(source, Held(), batch_size=4096, micro_batch=64, mean=(0.0,), std=(1.0,))  # type: ignore[arg-type]
    timed(seconds, "order of an epoch", lambda: loader.order(0))
    table = timed(seconds, "manifest", lambda: manifest({"train": source}))
    memory = {"this process, at the peak, above the imports": peak() - before}
    written = timed(seconds, "manifest as bytes", lambda: to_bytes(table))
    timed(seconds, "a part for few labels: 1%", lambda: label_subset(source, "1%"))
    timed(seconds, "hold a fifth out", lambda: hold_out(source))
    memory["the same, with labels drawn and a part held out"] = peak() - before
    memory["names, labels, sizes"] = (sum(map(len, source.keys)) + 8 * len(keys) + 8 * len(keys)) / 2**20
    memory["data.parquet"] = len(written) / 2**20
    few = source.subset(range(1000))
    memory["each loader process, above one of a set of 1000"] = workers_hold(source, options.workers) - workers_hold(
        few, options.workers
    )
    tell(options, seconds, memory)


def open_packed(options: argparse.Namespace) -> None:
    """Measure the opening of a packed set, which another process writes."""
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=options.at) as folder:
        writer = multiprocessing.get_context("spawn").Process(target=plant_packed, args=(Path(folder), options.images))
        writer.start()
        writer.join()
        before = peak()
        source = timed(seconds, "open the packed set", lambda: open_source(folder))
        memory = {"this process, at the peak, above the imports": peak() - before}
        memory["each loader process, above one of a set of 1000"] = workers_hold(
            source, options.workers
        ) - workers_hold(source.subset(range(1000)), options.workers)
    tell(options, seconds, memory)


def tell(options: argparse.Namespace, seconds: dict[str, float], memory: dict[str, float]) -> None:
    """Print what was found."""
    for title, values, unit in (("start", seconds, "s"), ("memory", memory, "MB")):
        print(f"{title} with {options.images} images")
        for name, value in values.items():
            print(f"  {name:50}{value:8.2f} {unit}")
    if options.json:
        print(json.dumps({"images": options.images, "seconds": seconds, "megabytes": memory}))


if __name__ == "__main__":
    main()
