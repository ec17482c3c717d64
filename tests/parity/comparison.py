"""How far two implementations are apart, and the table of it.

One measure everywhere: the largest absolute difference of a tensor, divided by the largest absolute value of the
oracle's tensor. A limit holds for every tensor on its own; a row of the table is the worst tensor of its kind.
"""

import os
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Relative, of every tensor."""
EXACT = 0.0
TABLE = os.environ.get("PARITY")
"""Where the table goes: a file with the two marks below. Set by `make parity`."""
START, END = "<!-- table: start -->", "<!-- table: end -->"


class Row(NamedTuple):
    """One comparison; plain values, so that it passes from a test process to the one that reports."""

    case: str
    oracle: str
    precision: str
    quantity: str
    worst: str
    absolute: float
    relative: float
    limit: float


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def apart(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return the largest absolute difference, and that relative to the largest expected value; NaN counts as inf."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert found.dtype == expected.dtype, (found.dtype, expected.dtype)
    absolute = (found - expected).abs().max().nan_to_num(nan=torch.inf).item()
    scale = expected.abs().max().item()
    return absolute, absolute / scale if scale else absolute and float("inf")


def worst(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[str, float, float]:
    """Return the tensor with the largest relative difference, with both its differences."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    pairs = ((name, *apart(found[name], expected[name])) for name in found)
    return max(pairs, key=lambda pair: pair[2])


def too_far(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if not row.relative <= row.limit]


def markdown(rows: Iterable[Row]) -> str:
    """Return the worst of each (case, oracle, precision, quantity), in the order of their first appearance."""
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault(row[:4], []).append(row)
    lines = [
        "| model | compared with | precision | quantity | worst tensor | max abs | relative | limit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for group in groups.values():
        top = max(group, key=lambda row: row.relative)
        numbers = [f"{value:.1e}" if value else "0" for value in (top.absolute, top.relative, top.limit)]
        lines.append("| " + " | ".join([*top[:5], *numbers]) + " |")
    return "\n".join(lines)
