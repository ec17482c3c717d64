"""Out of memory: what it means, and how many images a pass may have instead.

The global batch and its samples do not hang on ``micro_batch``: with a smaller one a step takes more passes. What
comes out differs in rounding, and in what is drawn or measured in each pass: drop path, mixup, batch norm (of the lars
probe).
"""

import re

import torch

from maekit.errors import MaekitError

SIGNS = ("can't allocate memory", "bad_alloc", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch's CPU allocator, the C++ library, drivers and cuBLAS say of it in a RuntimeError."""
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


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
