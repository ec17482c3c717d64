"""F41: a bit that flips in memory, arithmetic that errs once, a process that drifts away; and no false alarm."""

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from maekit import failpoints
from maekit.errors import MaekitError
from maekit.settings import Loop
from maekit.train.checkpoint import newest
from maekit.train.device import World, world
from maekit.train.loop import Outcome, Plan, fit
from maekit.train.optim import adamw, lars, pretrain_groups
from maekit.train.recheck import Recheck
from maekit.train.schedule import schedule
from maekit.train.state import Average, State

HERE = World(0, 1, torch.device("cpu"))
STEPS = 24


class Points:
    """Batches of 8 that are a function of the step, in passes of 3, 3 and 2."""

    batch_size = 8

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.micro_batch = 3 if size == 1 else 8 // size

    def sizes(self, step: int) -> tuple[int, int]:
        return self.batch_size, self.batch_size // self.size

    def steps(self, start: int, stop: int) -> Iterator[Iterator[dict[str, Tensor]]]:
        for number in range(start, stop):
            x = torch.randn(self.batch_size, 5, generator=torch.Generator().manual_seed(number))
            mine = slice(self.rank * self.batch_size // self.size, (self.rank + 1) * self.batch_size // self.size)
            ids = torch.arange(self.batch_size) + 100 * number
            parts = zip(x[mine].split(self.micro_batch), ids[mine].split(self.micro_batch), strict=True)
            # memory of its own, as from the loader: a matrix product may have other bits at another alignment
            yield ({"x": a.clone(), "ids": b} for a, b in parts)


class Network(nn.Module):
    """Weights, a batch norm whose statistics move with the passes, dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)[:, 0]


def step(module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    x = batch["x"].mul_(1.5)  # as random erasing, which changes the images of its batch
    return {"loss": F.mse_loss(module(x), x.sum(1))}


def made(kind: str = "adamw") -> tuple[Network, torch.optim.Optimizer]:
    module = Network().train()
    groups = pretrain_groups(module, 0.05)
    return module, adamw(groups, betas=(0.9, 0.95), lr=1e-2) if kind == "adamw" else lars(module, lr=0.1)


def train(run: Path, *, kind: str = "adamw", step: Any = step, here: World = HERE, **changes: Any) -> Outcome:
    given: dict[str, Any] = {"steps": STEPS, "lr": 1e-2, "warmup_steps": 2, "log_every": 5, "save_every": 3, "ema": 0.9}
    settings = Loop(**{"precision": "fp32", **given, **changes})
    module, optimizer = made(kind)
    plan = Plan(schedule(settings, 4, 8), settings, seed=3, metadata={})
    return fit(module, step, Points(here.rank, here.size), optimizer, plan, run=run, world=here)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Arm failpoints for the time of a test."""
    return lambda text: monkeypatch.setattr(failpoints, "_faults", failpoints.read(text))


def saved_at(run: Path) -> int:
    saved = newest(run / "checkpoints")
    return saved.step if saved else -1


@pytest.mark.parametrize("every", [1, 4, 1000])
def test_a_flipped_bit_of_a_weight_is_found_in_its_step_and_the_run_goes_on_to_the_same_bits(
    tmp_path: Path, every: int, faults: Callable[[str], None]
) -> None:
    whole = train(tmp_path / "whole")
    run = tmp_path / "run"
    faults("train-flip:on@8")
    with pytest.raises(
        MaekitError, match=r"E-NUM-SDC.*in step 8: found layers.0.weight \(model\), which changed"
    ) as stop:
        train(run, sdc_check=every)
    assert stop.value.exit_code == 4 and "goes on from step 6" in str(stop.value)
    assert saved_at(run) == 6
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["sdc"] == 1 and last["step"] in (8, 9)  # before the save after step 9 at the latest
    assert train(run, sdc_check=every).state_sha256 == whole.state_sha256
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["sdc"] == 1
    assert [json.loads(line)["step"] for line in (run / "sdc.jsonl").read_text().splitlines()] == [8]


def test_without_the_check_a_flipped_bit_changes_the_run_and_nobody_knows(
    tmp_path: Path, faults: Callable[[str], None]
) -> None:
    whole = train(tmp_path / "whole", save_every=100)
    faults("train-flip:on@8")
    assert train(tmp_path / "run", save_every=100).state_sha256 != whole.state_sha256


def test_any_flipped_bit_of_weights_moments_and_average_is_found_by_name(tmp_path: Path) -> None:
    module, optimizer = made()
    step(module, next(next(Points().steps(0, 1))))["loss"].backward()
    optimizer.step()
    state = State(module, optimizer, torch.amp.GradScaler("cpu", enabled=False), Average(module, 0.9))
    recheck = Recheck(state, 1, HERE, tmp_path)
    recheck.read(-1, None)
    assert len(recheck.watched) == 5 * 6  # weight, its two moments, their count, average
    generator = torch.Generator().manual_seed(0)
    for name, value in recheck.watched.items():
        flat = value.detach().view(-1).view(torch.int32)
        at, bit = (int(torch.randint(n, (), generator=generator)) for n in (len(flat), 32))
        flat[at] ^= 1 << bit if bit < 31 else -(2**31)
        with pytest.raises(MaekitError) as caught:
            recheck.read(-1, None)
        assert f"found {name}, which changed" in str(caught.value) and "begins anew" in str(caught.value)
        flat[at] ^= 1 << bit if bit < 31 else -(2**31)
        recheck.read(-1, None)


class Erring:
    """A step whose backward once has one number a little wrong."""

    def __init__(self, at: int) -> None:
        self.at, self.done = at, False

    def __call__(self, module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        loss = step(module, batch)["loss"]
        if int(batch["ids"][0]) == 100 * self.at and not self.done:
            self.done = True
            loss = loss + 1e-6 * next(module.parameters())[2, 3]
        return {"loss": loss}


def test_an_error_of_arithmetic_is_found_in_the_steps_that_are_computed_twice(tmp_path: Path) -> None:
    with pytest.raises(MaekitError, match=r"E-NUM-SDC.*in step 8: found .*which came out otherwise the second time"):
        train(tmp_path / "found", step=Erring(7), sdc_check=4)
    assert saved_at(tmp_path / "found") == 6
    train(tmp_path / "missed", step=Erring(7), sdc_check=5)
    whole = train(tmp_path / "whole")
    assert train(tmp_path / "found", sdc_check=4).state_sha256 == whole.state_sha256


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("adamw", {}),
        ("adamw", {"precision": "fp16", "clip_grad": 0.5}),
        pytest.param("adamw", {"precision": "bf16", "clip_grad": 0.5}, marks=pytest.mark.slow),
        pytest.param("adamw", {"spike_sigma": 6.0, "ema": None}, marks=pytest.mark.slow),
        pytest.param("lars", {}, marks=pytest.mark.slow),
    ],
)
def test_there_is_no_false_alarm_and_the_bits_are_those_without_the_check(
    tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    changes = {"save_every": 100, **changes}
    plain = train(tmp_path / "plain", kind=kind, **changes)
    checked = train(tmp_path / "checked", kind=kind, sdc_check=1, **changes)
    assert checked.state_sha256 == plain.state_sha256 and checked.loss == plain.loss
    train(tmp_path / "parts", kind=kind, sdc_check=3, stop_at=11, **changes)
    assert train(tmp_path / "parts", kind=kind, sdc_check=2, **changes).state_sha256 == plain.state_sha256


def test_a_device_that_cannot_sum_bits_is_refused(tmp_path: Path) -> None:
    module, optimizer = made()
    state = State(module, optimizer, torch.amp.GradScaler("cpu", enabled=False), None)
    with pytest.raises(MaekitError, match=r"E-ENV-DEVICE.*sdc_check"):
        Recheck(state, 1, World(0, 1, torch.device("mps")), tmp_path)


# ------------------------------------------------------------------------------------------------ several processes


def _member(rank: int, size: int, run: Path, port: int, what: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    if rank == 1 and what == "flips":
        failpoints.arm("train-flip:on@8")
    if rank == 1 and what == "drifts":
        register_optimizer_step_post_hook(drift)
    with world("cpu") as here:
        try:
            told = train(run, here=here, sdc_check=1 if what == "is well" else 4).state_sha256
        except MaekitError as error:
            told = str(error)
    (run / f"told-{rank}").write_text(told)


def drift(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Make one number of the eighth update wrong by a bit."""
    weight = optimizer.param_groups[0]["params"][0]
    if optimizer.state[weight]["step"] == 8:
        with torch.no_grad():
            weight.view(-1)[0] += 2**-20


def launch(size: int, run: Path, what: str) -> str:
    """Train in so many processes; return what all of them say."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(_member, (size, run, port, what), nprocs=size, start_method="spawn")
    told = {(run / f"told-{rank}").read_text() for rank in range(size)}
    assert len(told) == 1
    return told.pop()


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ("flips", "in step 8: found layers.0.weight (model), which changed between two updates (process 1)"),
        ("drifts", "in step 8: found layers.0.weight (model), which is not the same in all processes,"),
    ],
)
def test_what_befalls_one_process_stops_all(tmp_path: Path, what: str, found: str) -> None:
    told = launch(2, tmp_path, what)
    assert "E-NUM-SDC" in told and found in told
    assert saved_at(tmp_path) == 6


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_there_is_no_false_alarm_in_several_processes(tmp_path: Path, size: int) -> None:
    assert len(launch(size, tmp_path, "is well")) == 64 and saved_at(tmp_path) == STEPS
