"""Where randomness comes from: a few integers say which generator, nothing is carried along.

The order, crop, flip and mask of a sample come from (seed, epoch, sample index); drop path, mixup and erasing from
(seed, step, rank). A position in a run is therefore one number, and no generator's state needs saving.
"""

import random

import numpy as np
import torch


def mix(*numbers: int) -> int:
    """Mix integers into one 64-bit seed (finaliser of splitmix64): near inputs give unrelated generators."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state


def seed_cpu(*numbers: int) -> None:
    """Seed the CPU generators of torch, Python and numpy: timm's augmentations and mixup draw from all three."""
    seed = mix(*numbers)
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


def seed_all(*numbers: int) -> None:
    """Seed the CPU generators and those of every device."""
    seed_cpu(*numbers)
    if torch.accelerator.is_available():  # without one torch formats a traceback for each kind in every call: 0.3 ms
        torch.manual_seed(mix(*numbers))
