"""Pixels of one size in plain arrays, mapped into memory: what small images are read from fastest.

``train-00000-of-00002.npy`` (n, H, W, C) of uint8 lies beside ``train-00000-of-00002.parquet``, which has ids and
labels (``maekit pack --format raw``). Nothing is decoded and nothing parsed; all processes of a machine share the
pages, and numpy opens the arrays without this package.
"""

import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maekit.data.columns import Numbers
from maekit.data.source import Source, Targets, changed
from maekit.errors import MaekitError


@dataclass(frozen=True, eq=False)
class PixelSource(Source):
    """Rows of .npy files; `keys` are row numbers over all files.

    Attributes:
        files: parquet file and array in turn, as the size of both is looked at.
        starts: number of the first row of each array, and of all rows.
        shape: height, width, channels.
    """

    files: tuple[str, ...] = field(default=(), repr=False)
    starts: tuple[int, ...] = field(default=(), repr=False)
    shape: tuple[int, int, int] = (1, 1, 1)
    _maps: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls, name: str, ids: Sequence[str], labels: Sequence[int] | None, classes: list[str] | None,
        rows: Mapping[str, int],
        shape: tuple[int, int, int], targets: Targets | None = None,
    ) -> "PixelSource":  # fmt: skip
        """Open the arrays beside parquet files.

        Args:
            rows: parquet file -> rows of its array.
            shape: of each image.

        Raises:
            MaekitError: E-DATA-PATH if one is missing or another array.
        """
        files = [text for path in rows for text in (path, str(Path(path).with_suffix(".npy")))]
        starts = (0, *accumulate(rows.values()))
        source = cls(
            name, ids, Numbers(np.arange(len(ids))), labels, classes, tuple(files), starts, shape, targets=targets
        )
        for at in range(len(rows)):
            source._map(at)
        return source

    def read(self, i: int) -> Tensor:
        """Return image `i`, uint8 (C, H, W); memory lies in (H, W, C) order, as of a decoded one."""
        at = bisect_right(self.starts, self.keys[i]) - 1
        if at not in self._maps:
            self._maps[at] = self._map(at)
        return torch.from_numpy(np.array(self._maps[at][self.keys[i] - self.starts[at]])).permute(2, 0, 1)

    def _map(self, at: int) -> np.ndarray:
        path, shape = self.files[2 * at + 1], (self.starts[at + 1] - self.starts[at], *self.shape)
        try:
            if not os.path.isfile(path):
                raise OSError("no such file")
            array = np.lib.format.open_memmap(path, mode="r") if shape[0] else np.zeros(shape, np.uint8)
            if array.shape != shape or array.dtype != np.uint8 or not array.flags.c_contiguous:
                raise ValueError(f"{array.dtype} {array.shape}")
        except Exception as error:  # hostile bytes in a header make numpy raise anything: TokenError, MemoryError
            raise MaekitError("E-DATA-PATH", f"cannot read {path}", found=error, expected=f"uint8 {shape}",
                              hint="the array that lay beside the .parquet file") from error  # fmt: skip
        return array

    def sizes(self) -> list[int]:
        """Return the size of each file."""
        return [os.stat(path).st_size for path in self.files]

    def stamps(self) -> list[str]:
        """Return each file's place and time of change, and the rows."""
        return [*map(changed, self.files), *map(str, self.keys)]

    def __getstate__(self) -> dict[str, Any]:
        """Leave maps behind: a worker makes its own, of the same pages."""
        return {**self.__dict__, "_maps": {}}
