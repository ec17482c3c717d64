"""The best weights so far by one score, on the disk beside the checkpoints, so that a run that goes on knows them."""

import math
from pathlib import Path

from torch import Tensor

from maekit.train import checkpoint

FOLDERS = {"": "best", "ema_": "best-ema"}
"""Where they stay, by the prefix of the score's name: those of the weights, and those of their average."""


class Best:
    """Keeps the weights of the highest score; the earlier of equal ones stays.

    A run that goes on from before the best step comes to it again with the same bits and the same score, so nothing
    changes.

    Args:
        run: the run folder.
        name: of the score.
        prefix: "" or "ema_".
    """

    def __init__(self, run: Path, name: str, prefix: str) -> None:
        self.folder, self.name = run / FOLDERS[prefix], prefix + name
        saved = checkpoint.newest(self.folder) if self.folder.exists() else None
        self.score = saved.state["score"] if saved else -math.inf

    def offer(
        self, step: int, scores: dict[str, float], weights: dict[str, Tensor], metadata: dict[str, str], *, write: bool
    ) -> None:
        """Keep `weights` if their score is higher than all before; only the process that may `write` does.

        Raises:
            MaekitError: E-STOP-DISK, E-ENV-DISK.
        """
        if not scores.get(self.name, -math.inf) > self.score:
            return
        self.score = scores[self.name]
        if write:
            state = {"score": self.score, "scaler": {}}
            checkpoint.save(self.folder, step, {"model": weights}, state, metadata=metadata, keep=1)
