"""How many images a pass may have: what memory will hold, and what to do when it does not.

A pass keeps activations for going backward. How many bytes of an image, and how many whatever the images, is asked of
torch: the model makes passes of one and of two images that have shapes and no contents (`FakeTensorMode`), and every
storage that is kept is counted once. That takes no memory and is the same on a busy machine.

The global batch and its samples do not hang on ``micro_batch``: with a smaller one a step takes more passes. What
comes out differs in rounding, and in what is drawn or measured in each pass: drop path, mixup, batch norm (of the lars
probe).
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from maekit.errors import MaekitError
from maekit.train.precision import autocast

SIGNS = ("can't allocate memory", "bad_alloc", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch's CPU allocator, the C++ library, drivers and cuBLAS say of it in a RuntimeError."""
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}

ROOM = 0.6
"""Share of the memory that weights and what is kept may take: results on their way, images and gaps take the rest.
`maekit bench memory` tells what is counted beside what was taken: at most 1.17 times as much by ViT-B in bf16. Where
blocks are few and narrow the rest is more than this leaves: up to 2.4 times by the quickstart's model (101 of 43 MiB,
256 images, bf16), 3.3 times with checkpointing; there a pass that ends memory is what halves it."""
TRAINED = 16
"""Bytes of a trained number: float32 weight, gradient and two moments."""
AT_A_NORM = 64
"""Bytes for each value of a token that enters a norm: a block has two, and keeps 17 times its width in float32."""
AT_A_PIXEL = 64
"""Bytes for each pixel: the image, its patches, prediction, target and what lies between."""
MOST_PREFIX = 16
"""Tokens before the patches, more than any encoder has."""
CGROUP = Path("/sys/fs/cgroup/memory.max")
"""What a container may take."""


@dataclass(frozen=True)
class Kept:
    """What training holds when a pass turns back, in bytes.

    Attributes:
        fixed: whatever the images: weights, gradients, moments, weights in half precision.
        per_image: activations of an image.
    """

    fixed: int
    per_image: int

    def images(self, memory: int) -> int:
        """Return how many images so much memory holds, at least 1."""
        return max(1, (int(ROOM * memory) - self.fixed) // self.per_image)


@dataclass(frozen=True)
class Passes:
    """Passes of a model over made-up images, to see what they keep.

    Attributes:
        model: on the CPU, in the mode that it is trained in.
        loss: of so many images, on the CPU.
        patches: of an image.
        pixels: of an image, in all channels.
        again: for each part of the model that is computed anew: the share of it that is computed at once, and the loss
            where that part is kept.
    """

    model: nn.Module
    loss: Callable[[int], Tensor]
    patches: int
    pixels: int
    again: Sequence[tuple[float, Callable[[int], Tensor]]] = ()

    def kept(self, precision: str) -> Kept:
        """Count what a pass in "fp32" | "bf16" | "fp16" keeps."""
        half = "fp32" if precision == "fp32" else "bf16"
        one, two = (self._of(images, half) for images in (1, 2))
        return Kept(self._weights() + max(0, 2 * one - two), max(1, two - one))

    def _of(self, images: int, precision: str) -> int:
        kept = _kept(self.loss, images, precision)
        return kept + max(
            (round(share * (_kept(loss, images, precision) - kept)) for share, loss in self.again), default=0
        )

    def at_most(self, images: int) -> int:
        """Return bytes that a pass certainly does not need, for nothing: small models are not looked at closely."""
        norms = [norm for norm in self.model.modules() if isinstance(norm, nn.LayerNorm)]
        widths = sum(norm.normalized_shape[0] for norm in norms)
        tokens = self.patches + MOST_PREFIX
        return self._weights() + images * (tokens * widths * AT_A_NORM + self.pixels * AT_A_PIXEL)

    def _weights(self) -> int:
        numbers = list(self.model.parameters())
        frozen = sum(p.nbytes for p in numbers if not p.requires_grad)
        return frozen + TRAINED * sum(p.numel() for p in numbers if p.requires_grad)


def _kept(loss: Callable[[int], Tensor], images: int, precision: str) -> int:
    """Return the bytes kept by a pass, weights that are kept as they are among them."""
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # held, so that no other one gets its number
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FakeTensorMode(allow_non_fake_inputs=True), hooks, autocast(precision, torch.device("cpu")):
        held = loss(images)
    del held
    return sum(storage.nbytes() for storage in storages.values())


def memory_of(device: torch.device) -> int:
    """Return the bytes of a device; of a CPU what this container may take, by each of this machine's processes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if CGROUP.exists() and (allowed := CGROUP.read_text().strip()).isdigit():
        whole = min(whole, int(allowed))
    return whole // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an allocation failed."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS))


def asked_for(error: BaseException) -> int | None:
    """Return the bytes that were asked for, None where the message does not say.

    >>> asked_for(RuntimeError("you tried to allocate 4096 bytes")), asked_for(MemoryError())
    (4096, None)
    """
    found = re.search(r"allocate ([\d.]+) ?(bytes|[KMGT]iB)", str(error))
    return round(float(found[1].rstrip(".")) * UNITS[found[2]]) if found else None


def next_smaller(micro_batch: int, share: int) -> int | None:
    """Return the largest micro-batch up to half of this one that divides a process's share of the batch.

    >>> next_smaller(64, 192), next_smaller(5, 25), next_smaller(1, 8)
    (32, 1, None)
    """
    return next((size for size in range(micro_batch // 2, 0, -1) if share % size == 0), None)


def out_of_memory(
    error: BaseException, *, batch: int, micro_batch: int, smaller: int | None, saved_at: int, noted: bool
) -> MaekitError:
    """Say what a failed allocation means.

    Args:
        error: it.
        batch: images of the global batch.
        micro_batch: images of the pass that failed.
        smaller: images that a pass may have instead, None if it had one.
        saved_at: step of the checkpoint that the run goes on from, -1 without one.
        noted: whether the same command will take `smaller` by itself.
    """
    wanted = asked_for(error)
    if smaller is None:
        hint = "a smaller model or image, --checkpointing (pretrain), or another --device"
    elif noted:
        hint = f"the same command: it goes on with {smaller} images per pass"
    else:
        hint = f"--micro-batch {smaller} with the same --out: the global batch and the samples stay the same"
    return MaekitError(
        "E-STOP-MEMORY" if saved_at >= 0 else "E-ENV-MEMORY",
        "out of memory in a training step",
        found=f"{micro_batch} images per pass, {batch} in all"
        + (f"; {wanted:,} bytes more were asked for" if wanted else ""),
        hint=hint + (f"; there is a checkpoint of step {saved_at}" if saved_at >= 0 else ""),
    )
