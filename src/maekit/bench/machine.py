"""What the machine could do: its best matrix product, measured; and waiting for a device."""

import platform
import time
from pathlib import Path

import torch

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
    return {"device": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def processor() -> str:
    """Return the processor's name and the instructions that torch uses of it."""
    name = platform.processor() or platform.machine()
    if (facts := Path("/proc/cpuinfo")).exists():
        lines = facts.read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
