"""What the machine could do: its best matrix product, and whether bf16 pays; measured."""

import time
from collections.abc import Callable

import torch

from maekit.train.device import cpu_model

SIZES = (2048, 4096, 8192)
"""Sides of the square products of which the best is the machine's peak."""
LONGEST = 4.0
"""Seconds that one product may take: larger ones are left out on a slow machine."""


def wait(device: torch.device) -> None:
    """Wait until a GPU has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(device: torch.device, dtype: torch.dtype, rounds: int = 3) -> tuple[float, int]:
    """Return the most operations a second of a square matrix product, and its side.

    Args:
        device: where.
        dtype: of factors and product.
        rounds: of each size; the best counts.
    """
    best, side, expected = 0.0, 0, 0.0
    for size in SIZES:
        if best and 2 * size**3 / best > LONGEST:
            break
        a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        for round_ in range(rounds + 1):
            wait(device)
            began = time.perf_counter()
            torch.mm(a, b)
            wait(device)
            expected = 2 * size**3 / (time.perf_counter() - began)
            if round_ and expected > best:
                best, side = expected, size
    return best, side


def describe(device: torch.device) -> dict[str, object]:
    """Return what a figure belongs to: device, threads, versions."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
    return {
        "device": cpu_model(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def layer_in_fp32_over_bf16(width: int, tokens: int = 256, rounds: int = 5) -> float:
    """Time the products of a layer (width to 4 width; forward and backward) on the CPU, in turns; the best of each."""
    generator = torch.Generator().manual_seed(0)

    def work(dtype: torch.dtype) -> Callable[[], object]:
        inside, weight, grad = (
            torch.randn(shape, generator=generator).to(dtype)
            for shape in ((tokens, width), (width, 4 * width), (tokens, 4 * width))
        )
        return lambda: (inside @ weight, grad @ weight.T, inside.T @ grad)

    works = {dtype: work(dtype) for dtype in (torch.float32, torch.bfloat16)}
    best = dict.fromkeys(works, float("inf"))
    for round_ in range(rounds + 1):
        for dtype, run in works.items():
            began = time.perf_counter()
            run()
            if round_:  # the first one makes ready
                best[dtype] = min(best[dtype], time.perf_counter() - began)
    return best[torch.float32] / best[torch.bfloat16]
