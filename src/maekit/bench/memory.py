"""How much memory training takes at its peak: each contender in a process of its own, from before its model is built.

Weights, gradients, moments and activations are in it, torch itself and the images are not.
"""

import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from maekit.bench.contenders import Contender, ours, peer
from maekit.model.mae import create_model
from maekit.train.allocator import keep_freed_memory

STEPS = 3
"""Steps of which the last is timed; the peak is reached in the second, when the moments are there."""


@dataclass(frozen=True)
class Held:
    """What a contender took.

    Attributes:
        mib: at its peak, above what the process held before its model was built.
        kept_mib: of them, weights and moments, which stay from step to step; the rest are gradients, activations and
            what is made on the way.
        seconds: of a step.
    """

    mib: float
    kept_mib: float
    seconds: float


@dataclass(frozen=True)
class Job:
    """A contender to be built in another process.

    Attributes:
        name: "maekit", or a peer.
        spec: arguments of `create_model`.
        shape: of the images, (B, C, H, W).
        checkpointing: blocks of encoder and decoder whose activations are computed anew together; 0: none.
    """

    name: str
    spec: dict[str, Any]
    shape: tuple[int, int, int, int]
    mask_ratio: float
    precision: str
    device: str
    threads: int
    checkpointing: tuple[int, int] = (0, 0)


def held(job: Job) -> Held:
    """Measure in a new process.

    Raises:
        MaekitError: as `maekit.bench.contenders.peer`.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_held, job).result()


def _held(job: Job) -> Held:
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    device = torch.device(job.device)
    images = torch.randn(job.shape, device=device)
    torch.mm(images[0, 0], images[0, 0].T)  # what a library sets up for its first product is not a model's
    before = _start(device)
    contender = _build(job, device)
    seconds = [contender.seconds(images) for _ in range(STEPS)]
    return Held((_most(device) - before) / 2**20, _kept(contender) / 2**20, seconds[-1])


def _build(job: Job, device: torch.device) -> Contender:
    if job.name == "maekit":
        if device.type == "cpu":
            keep_freed_memory()  # as in training
        model = create_model(**job.spec).to(device)
        model.set_checkpointing(*job.checkpointing)
        return ours(model, job.mask_ratio, job.precision, compiled=False)
    with torch.device("meta"):
        same = create_model(**job.spec)
    return peer(job.name, same, job.mask_ratio, job.precision, device)


def _kept(contender: Contender) -> int:
    """Return the bytes of weights, buffers and moments."""
    model, moments = contender.model, contender.optimizer.state.values()
    tensors = [*model.parameters(), *model.buffers(), *(value for each in moments for value in each.values())]
    return sum(value.numel() * value.element_size() for value in tensors)


def _start(device: torch.device) -> int:
    """Return the bytes held now, and let the peak count from here where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if (peak := Path("/proc/self/clear_refs")).exists():
        peak.write_text("5")
    return _most(device)


def _most(device: torch.device) -> int:
    """Return the most bytes held since the start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (status := Path("/proc/self/status")).exists():
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
