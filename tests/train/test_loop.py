"""The loop on a small module of its own: exact resume, accumulation, signals, bad numbers."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maekit.errors import MaekitError
from maekit.settings import Loop
from maekit.train import checkpoint
from maekit.train.checkpoint import newest, save
from maekit.train.device import World
from maekit.train.loop import Outcome, Plan, fit
from maekit.train.optim import adamw, pretrain_groups
from maekit.train.schedule import schedule
from maekit.train.state import State

STEPS = 12
OF_THE_CLOCK = ("time", "images_per_second", "data_wait")
HERE = World(0, 1, torch.device("cpu"))


class Points:
    """Batches that are a function of the step, as the real loader's are."""

    batch_size = 8

    def __init__(self, micro: int = 8, poison: int = -1) -> None:
        self.micro_batch, self.poison = micro, poison

    def sizes(self, step: int) -> tuple[int, int]:
        return self.batch_size, self.batch_size

    def steps(self, start: int, stop: int) -> Iterator[Iterator[dict[str, Tensor]]]:
        for step in range(start, stop):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(self.batch_size, 5, generator=generator)
            if step == self.poison:
                x[3, 1] = torch.nan
            ids = torch.arange(self.batch_size)
            parts = zip(x.split(self.micro_batch), ids.split(self.micro_batch), strict=True)
            yield ({"x": a, "ids": b} for a, b in parts)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 1))


def step(module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"loss": F.mse_loss(module(batch["x"])[:, 0], batch["x"].sum(1))}


def train(run: Path, points: Points | None = None, *, model: nn.Module | None = None, **changes: Any) -> Outcome:
    settings = Loop(
        **{"steps": STEPS, "lr": 1e-2, "warmup_steps": 2, "precision": "fp32", "log_every": 5, "ema": 0.9, **changes}
    )
    module = model or network()
    plan = Plan(schedule(settings, 4, 8), settings, seed=3, metadata={})
    optimizer = adamw(pretrain_groups(module, 0.05), betas=(0.9, 0.95), lr=1e-2)
    return fit(module.train(), step, points or Points(), optimizer, plan, run=run, world=HERE)


def records(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in OF_THE_CLOCK} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, list[dict[str, Any]]]:
    """Train once without a stop: state digest and logged records to compare with."""
    run = tmp_path_factory.mktemp("whole")
    return train(run), records(run)


@pytest.mark.parametrize("at", range(1, STEPS))
def test_stop_at_any_step_and_go_on_gives_the_same_bits_and_losses(tmp_path: Path, at: int, whole: Any) -> None:
    """F20."""
    first = train(tmp_path, stop_at=at)
    assert (first.step, first.stopped) == (at, True)
    second = train(tmp_path)
    assert not second.stopped
    assert second.state_sha256 == whole[0].state_sha256
    assert second.loss == whole[0].loss
    assert records(tmp_path) == whole[1]


def test_a_stop_at_every_single_step_gives_the_same_bits(tmp_path: Path, whole: Any) -> None:
    """F20, F21: a chain of as many launches as there are steps."""
    for at in range(1, STEPS):
        train(tmp_path, stop_at=at)
    assert train(tmp_path).state_sha256 == whole[0].state_sha256
    assert records(tmp_path) == whole[1]


@pytest.mark.parametrize("every", [1, 3, 100])
def test_the_save_interval_changes_no_bit(tmp_path: Path, every: int, whole: Any) -> None:
    assert train(tmp_path, save_every=every).state_sha256 == whole[0].state_sha256


def test_a_damaged_newest_checkpoint_costs_steps_not_bits(tmp_path: Path, whole: Any) -> None:
    """F5, F6."""
    train(tmp_path, stop_at=9, save_every=3, keep=5)
    file = tmp_path / "checkpoints" / "step-9" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    train(tmp_path, stop_at=8, keep=2)
    assert [path.name for path in checkpoint.steps(tmp_path / "checkpoints")] == ["step-8", "step-6"]
    assert (tmp_path / "damaged" / "checkpoints" / "step-9" / "model.safetensors").exists()
    assert train(tmp_path, save_every=3).state_sha256 == whole[0].state_sha256
    assert records(tmp_path) == whole[1]


@pytest.mark.parametrize("micro", [4, 3, 1])
def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path: Path, micro: int) -> None:
    plain = nn.Sequential(nn.Linear(5, 16), nn.GELU(), nn.Linear(16, 1))
    state = {k: v.clone() for k, v in plain.state_dict().items()}
    train(tmp_path / "whole", model=plain, ema=None)
    parts = nn.Sequential(nn.Linear(5, 16), nn.GELU(), nn.Linear(16, 1))
    parts.load_state_dict(state)
    train(tmp_path / "parts", Points(micro), model=parts, ema=None)
    for a, b in zip(plain.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)  # AdamW divides by sqrt(v): dust of 1e-7 grows


def test_ten_steps_follow_a_loop_written_by_hand(tmp_path: Path) -> None:
    """Oracle: the same training in plain torch."""
    plain, ours = (nn.Linear(5, 1) for _ in range(2))
    ours.load_state_dict(plain.state_dict())
    train(tmp_path, model=ours, ema=None, clip_grad=0.5)
    optimizer = torch.optim.AdamW(
        [{"params": [plain.weight], "weight_decay": 0.05}, {"params": [plain.bias], "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    timing = schedule(Loop(steps=STEPS, lr=1e-2, warmup_steps=2), 4, 8)
    for number, (batch,) in enumerate(Points().steps(0, STEPS)):
        for group in optimizer.param_groups:
            group["lr"] = timing.lr(number)
        step(plain, batch)["loss"].backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_average_follows_its_formula(tmp_path: Path) -> None:
    model = nn.Linear(5, 1)
    expected = model.weight.detach().clone()
    for at in range(1, 5):
        train(tmp_path, model=model, ema=0.5, stop_at=at)
        decay = min(0.5, (1 + at) / (10 + at))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    saved = newest(tmp_path / "checkpoints")
    assert saved is not None
    torch.testing.assert_close(saved.tensors["ema"]["weight"], expected)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_finishes_the_step_saves_and_loses_nothing(tmp_path: Path, kind: signal.Signals, whole: Any) -> None:
    class Interrupted(Points):
        def steps(self, start: int, stop: int) -> Iterator[Iterator[dict[str, Tensor]]]:
            for number, batches in enumerate(super().steps(start, stop), start):
                if number == 6:
                    os.kill(os.getpid(), kind)
                yield batches

    before = signal.getsignal(kind)
    first = train(tmp_path, Interrupted())
    assert (first.step, first.stopped) == (7, True)
    assert signal.getsignal(kind) is before
    assert train(tmp_path).state_sha256 == whole[0].state_sha256


def test_another_model_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    train(tmp_path, stop_at=2)
    with pytest.raises(MaekitError, match="E-CKPT-MODEL"):
        train(tmp_path, model=nn.Linear(5, 1))


def test_scores_are_taken_in_eval_mode_of_model_and_average_and_modes_come_back(tmp_path: Path) -> None:
    model = network()
    frozen = next(part for part in model.modules() if isinstance(part, nn.Dropout))
    seen: list[bool] = []

    def evaluate(module: nn.Module) -> Iterator[tuple[str, float]]:
        seen.append(any(m.training for m in module.modules()))
        yield "val/top1", float(module(torch.ones(1, 5)))

    settings = Loop(steps=4, lr=1e-2, precision="fp32", ema=0.9)
    plan = Plan(schedule(settings, 4, 8), settings, seed=3, metadata={}, eval_every=2)
    optimizer = adamw(pretrain_groups(model, 0.05), betas=(0.9, 0.95), lr=1e-2)
    model.train()
    frozen.eval()
    outcome = fit(model, step, Points(), optimizer, plan, run=tmp_path, world=HERE, evaluate=evaluate)
    assert seen == [False] * 4
    assert set(outcome.scores) == {"val/top1", "ema_val/top1"}
    assert outcome.scores["val/top1"] != outcome.scores["ema_val/top1"]
    assert model.training
    assert not frozen.training


def test_metrics_that_cannot_be_written_do_not_stop_training(tmp_path: Path, whole: Any) -> None:
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "gone" / "metrics.jsonl")  # every write to it fails
    assert train(tmp_path).state_sha256 == whole[0].state_sha256


def test_an_events_file_that_cannot_be_written_is_said_without_a_traceback(
    tmp_path: Path, whole: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F3, F4: TensorBoard writes in a thread of its own."""
    tracebacks: list[Any] = []

    def note(told: Any) -> None:
        tracebacks.append(told)

    class Away(Points):
        def steps(self, start: int, stop: int) -> Iterator[Iterator[dict[str, Tensor]]]:
            for parts in super().steps(start, stop):
                shutil.rmtree(tmp_path / "events", ignore_errors=True)
                yield parts

    monkeypatch.setattr(threading, "excepthook", note)
    assert train(tmp_path, Away(), log_every=1).state_sha256 == whole[0].state_sha256
    assert caplog.text.count("metrics are not written any more") == 1 and not tracebacks
    assert len(records(tmp_path)) == STEPS
    assert threading.excepthook is note


def test_an_events_folder_that_cannot_be_made_does_not_stop_training(tmp_path: Path, whole: Any) -> None:
    (tmp_path / "events").write_text("a file")
    assert train(tmp_path).state_sha256 == whole[0].state_sha256


def test_tensorboard_holds_every_line_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, stop_at=10)
    train(tmp_path)
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [one.step for one in events.Scalars("loss")] == [line["step"] for line in records(tmp_path)] == [5, 10, 12]


def test_log_lines_do_not_enter_the_digest(tmp_path: Path) -> None:
    digests = {train(tmp_path / str(every), stop_at=7, log_every=every).state_sha256 for every in (2, 5)}
    assert len(digests) == 1


def test_the_scaler_of_fp16_comes_back(tmp_path: Path) -> None:
    model, other = network(), network()
    optimizers = [adamw(pretrain_groups(one, 0.05), betas=(0.9, 0.95), lr=1e-2) for one in (model, other)]
    scalers = [torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1) for scale in (8.0, 1024.0)]
    first, second = (
        State(one, optimizer, scaler, None)
        for one, optimizer, scaler in zip((model, other), optimizers, scalers, strict=True)
    )
    scalers[0].scale(step(model, next(next(Points().steps(0, 1))))["loss"]).backward()
    scalers[0].step(optimizers[0])
    scalers[0].update()
    save(tmp_path, 0, first.tensors(), first.numbers(), metadata={}, keep=1)
    saved = newest(tmp_path)
    assert saved is not None
    second.restore(saved)
    assert scalers[1].get_scale() == scalers[0].get_scale() == 16.0
    assert second.sha256() == first.sha256() == saved.sha256()


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
def test_a_compiled_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    straight = train(tmp_path / "straight", compile=True)
    train(tmp_path / "parts", compile=True, stop_at=5)
    assert train(tmp_path / "parts", compile=True).state_sha256 == straight.state_sha256
    plain = train(tmp_path / "plain")
    assert straight.loss == pytest.approx(plain.loss, rel=0.3)  # dropout draws other numbers
