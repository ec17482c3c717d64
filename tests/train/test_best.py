"""The best weights so far: kept by score, the earlier of equal ones, known again after a restart."""

from pathlib import Path

import torch

from maekit.train import checkpoint
from maekit.train.best import Best


def offer(best: Best, step: int, score: float) -> None:
    best.offer(step, {"held/top1": score}, {"w": torch.full((2,), float(step))}, {}, write=True)


def kept(run: Path) -> tuple[int, float]:
    saved = checkpoint.newest(run / "best")
    assert saved is not None and float(saved.tensors["model"]["w"][0]) == saved.step
    return saved.step, saved.state["score"]


def test_the_highest_score_stays_and_the_first_of_equal_ones(tmp_path: Path) -> None:
    best = Best(tmp_path, "held/top1", "")
    for step, score in ((1, 0.2), (2, 0.5), (3, 0.4), (4, 0.5)):
        offer(best, step, score)
    assert kept(tmp_path) == (2, 0.5) and len(list((tmp_path / "best").iterdir())) == 1


def test_a_run_that_goes_on_knows_the_best_and_one_that_comes_to_it_again_changes_nothing(tmp_path: Path) -> None:
    best = Best(tmp_path, "held/top1", "")
    offer(best, 2, 0.5)
    again = Best(tmp_path, "held/top1", "")
    for step, score in ((1, 0.2), (2, 0.5), (3, 0.3)):
        offer(again, step, score)
    assert kept(tmp_path) == (2, 0.5)
    offer(again, 4, 0.6)
    assert kept(tmp_path) == (4, 0.6)


def test_only_the_process_that_may_writes(tmp_path: Path) -> None:
    best = Best(tmp_path, "held/top1", "ema_")
    best.offer(1, {"ema_held/top1": 0.5}, {}, {}, write=False)
    assert best.score == 0.5 and not list(tmp_path.iterdir())
