"""The learning rate at named steps, and lengths in epochs and steps."""

import doctest
import itertools
import math

import pytest

from maekit.config import resolve
from maekit.errors import MaekitError
from maekit.settings import Loop, Pretrain
from maekit.train import schedule as module
from maekit.train.schedule import half_cosine, schedule


def test_official_pretraining_rate_at_named_epochs() -> None:
    """lr 1.5e-4 x 4096 / 256 = 2.4e-3; warm-up 40 of 800 epochs; half of it at epoch 420 (arXiv 2111.06377 T8)."""
    steps_per_epoch = 312
    plan = schedule(Loop(epochs=800, warmup_epochs=40, base_lr=1.5e-4), steps_per_epoch, 4096)
    assert plan.peak == pytest.approx(2.4e-3)
    assert plan.lr(0) == 0.0
    assert plan.lr(20 * steps_per_epoch) == pytest.approx(1.2e-3)
    assert plan.lr(40 * steps_per_epoch) == pytest.approx(2.4e-3)
    assert plan.lr(420 * steps_per_epoch) == pytest.approx(1.2e-3)
    assert plan.lr(800 * steps_per_epoch) == pytest.approx(0.0, abs=1e-12)


def test_rate_changes_every_step_not_every_epoch() -> None:
    rates = [half_cosine(s, total=100, warmup=10, peak=1.0) for s in range(100)]
    assert all(a < b for a, b in itertools.pairwise(rates[:11]))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_floor_is_where_the_cosine_ends() -> None:
    assert half_cosine(50, total=50, warmup=5, peak=1e-3, floor=1e-6) == pytest.approx(1e-6)


@pytest.mark.parametrize(("batch", "peak"), [(256, 1e-3), (1024, 4e-3), (64, 2.5e-4)])
def test_rate_scales_with_the_global_batch(batch: int, peak: float) -> None:
    assert schedule(Loop(steps=10, base_lr=1e-3), 1, batch).peak == pytest.approx(peak)


def test_lr_itself_replaces_base_lr() -> None:
    assert schedule(Loop(steps=10, lr=0.1), 1, 4096).peak == 0.1


def test_a_recipes_warmup_of_many_epochs_goes_with_its_length_and_ones_own_is_kept() -> None:
    chosen, sources = resolve(Pretrain, recipe="paper/pretrain-vit-b16", flags={"steps": "50"})
    assert (chosen.epochs, chosen.warmup_epochs, sources["warmup_epochs"]) == (None, None, "flag")
    assert (schedule(chosen, 100, 256).total, schedule(chosen, 100, 256).warmup) == (50, 2)
    both, _ = resolve(Pretrain, recipe="paper/pretrain-vit-b16", flags={"steps": "50", "warmup_epochs": "0.1"})
    assert schedule(both, 100, 256).warmup == 10
    with pytest.raises(MaekitError, match="warm-up longer than the schedule"):
        schedule(Loop(steps=50, warmup_epochs=40, base_lr=1e-3), 100, 256)


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        (Loop(), "E-CONFIG-LENGTH"),
        (Loop(steps=10), "E-CONFIG-LR"),
        (Loop(steps=10, warmup_steps=11, lr=1.0), "E-CONFIG-LENGTH"),
        (Loop(steps=10, lr=1e-4, min_lr=1e-3), "E-CONFIG-LR"),
    ],
)
def test_impossible_schedules_are_refused(settings: Loop, code: str) -> None:
    with pytest.raises(MaekitError, match=code) as caught:
        schedule(settings, 10, 256)
    assert caught.value.exit_code == 2


def test_schedule_never_leaves_its_bounds() -> None:
    for total, warmup in [(1, 0), (1, 1), (7, 7), (100, 0), (100, 99)]:
        rates = [half_cosine(s, total=total, warmup=warmup, peak=1.0, floor=0.1) for s in range(total + 1)]
        assert all(0 <= r <= 1 and math.isfinite(r) for r in rates)


def test_warmup_is_five_per_cent_when_nothing_is_said() -> None:
    assert schedule(Loop(epochs=800, base_lr=1e-3), 312, 4096).warmup == 40 * 312
    assert schedule(Loop(epochs=100, base_lr=1e-3), 50, 1024).warmup == 5 * 50
    assert schedule(Loop(steps=3, base_lr=1e-3), 1, 1).warmup == 0


def test_the_example_of_the_docstring_runs_as_written() -> None:
    outcome = doctest.testmod(module)
    assert outcome.attempted == 1 and outcome.failed == 0
