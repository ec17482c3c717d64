"""What is left after kill -9 in the middle of a save loop, by the pattern in which a checkpoint is written.

A child saves a state of 48 MB again and again, a step number in every value, and is killed at a random moment after its
first save. Then what a run would go on from is read: ok (one whole step), missing, unreadable, or mixed (two steps in
one, without an error). The patterns are those of the projects named, written down anew here; "ours" is
`maekit.train.checkpoint.save`.

    python benchmarks/kills.py [--kills 50] [--seed 0] [--other-disk /dev/shm] [--json]
"""

import argparse
import json
import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from maekit.train import checkpoint

PARTS = ("model", "first", "second")
SIZE = 16_000_000 // 4
"""Values of each part: 48 MB in all."""

State = dict[str, dict[str, torch.Tensor]]


def state(step: int) -> State:
    """Return parts whose every value is the step."""
    return {part: {"w": torch.full((SIZE,), float(step))} for part in PARTS}


def onto_the_same_name(folder: Path, step: int, other: Path) -> None:
    """Write over the last one: many scripts."""
    torch.save(state(step), folder / "last.pth")


def unlink_then_rename(folder: Path, step: int, other: Path) -> None:
    """Write beside, delete the old one, rename: timm."""
    torch.save(state(step), folder / "tmp.pth")
    (folder / "last.pth").unlink(missing_ok=True)
    (folder / "tmp.pth").rename(folder / "last.pth")


def moved_from_another_disk(folder: Path, step: int, other: Path) -> None:
    """Write into TMPDIR and move: a transaction of fsspec where TMPDIR is another file system, as Lightning's."""
    torch.save(state(step), other / "tmp.pth")
    shutil.move(other / "tmp.pth", folder / "last.pth")


def dcp_into_the_same_folder(folder: Path, step: int, other: Path) -> None:
    """torch.distributed.checkpoint over the last one."""
    dcp.save(dict(state(step)), checkpoint_id=folder / "last", no_dist=True)


def several_files(folder: Path, step: int, other: Path) -> None:
    """Write the files of one folder over, one after the other: as Accelerate."""
    (folder / "last").mkdir(exist_ok=True)
    for part, named in state(step).items():
        safetensors.torch.save_file(named, folder / "last" / f"{part}.safetensors")


def ours(folder: Path, step: int, other: Path) -> None:
    """Temporary folder, synced, read back, renamed, synced, then the old ones deleted."""
    checkpoint.save(folder, step, state(step), {}, metadata={}, keep=2)


def read_pth(folder: Path) -> State:
    """Read what the first three patterns leave."""
    return torch.load(folder / "last.pth", weights_only=True)


def read_dcp(folder: Path) -> State:
    """Read what torch.distributed.checkpoint leaves."""
    found = state(0)
    dcp.load(dict(found), checkpoint_id=folder / "last", no_dist=True)
    return found


def read_files(folder: Path) -> State:
    """Read several files."""
    return {part: safetensors.torch.load_file(folder / "last" / f"{part}.safetensors") for part in PARTS}


def read_ours(folder: Path) -> State:
    """Read the newest that verifies."""
    found = checkpoint.newest(folder)
    if found is None:
        raise FileNotFoundError(folder)
    return found.tensors


PATTERNS: dict[str, tuple[Callable[[Path, int, Path], None], Callable[[Path], State]]] = {
    "onto the same name (many scripts)": (onto_the_same_name, read_pth),
    "beside, unlink, rename (timm)": (unlink_then_rename, read_pth),
    "moved from another disk (Lightning)": (moved_from_another_disk, read_pth),
    "DCP into the same folder (torch)": (dcp_into_the_same_folder, read_dcp),
    "several files in one folder (Accelerate)": (several_files, read_files),
    "maekit": (ours, read_ours),
}


def outcome(read: Callable[[Path], State], folder: Path) -> str:
    """Say what a run would find."""
    try:
        found = read(folder)
    except FileNotFoundError:
        return "missing"
    except KeyboardInterrupt:
        raise
    except BaseException:  # DCP's own is no Exception
        return "unreadable"
    steps = {float(value) for named in found.values() for value in (named["w"].min(), named["w"].max())}
    return "ok" if len(steps) == 1 else "mixed"


def killed(write: Callable[[Path, int, Path], None], folder: Path, other: Path, random: Random) -> None:
    """Save in a child until it is killed, at a random moment of the saves after the first."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        step = 0
        while True:
            step += 1
            write(folder, step, other)
            os.write(writer, b".")
    os.close(writer)
    os.read(reader, 1)
    began = time.monotonic()
    os.read(reader, 1)
    time.sleep(random.uniform(0, 2) * (time.monotonic() - began))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(reader)


def main() -> None:
    """Kill each pattern as often and print what was left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--other-disk", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    random, table = Random(options.seed), {}
    for name, (write, read) in PATTERNS.items():
        counts: Counter[str] = Counter()
        for _ in range(options.kills):
            with tempfile.TemporaryDirectory() as here, tempfile.TemporaryDirectory(dir=options.other_disk) as there:
                killed(write, Path(here), Path(there), random)
                counts[outcome(read, Path(here))] += 1
        table[name] = dict(counts)
        print(f"{name:42} {', '.join(f'{count} {what}' for what, count in counts.most_common())}", flush=True)
    if options.json:
        print(json.dumps({"kills": options.kills, "seed": options.seed, "left": table}))


if __name__ == "__main__":
    main()
