"""Bad numbers: injected into images, loss, gradients and weights at any step, with any optimizer, in two processes."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional as F

from maekit.errors import MaekitError
from maekit.seeds import seed_all
from maekit.settings import Loop
from maekit.train.checkpoint import Checkpoint, newest
from maekit.train.device import World, world
from maekit.train.guard import HEADER, LIMIT, overflowing
from maekit.train.loop import Outcome, Plan, fit
from maekit.train.optim import adamw, lars, pretrain_groups
from maekit.train.schedule import schedule

HERE = World(0, 1, torch.device("cpu"))
STEPS = 12


class Points:
    """Batches that are a function of the step; `harm` changes the images of some of them."""

    batch_size = 8

    def __init__(self, harm: Callable[[int, Tensor], Tensor] = lambda step, x: x, rank: int = 0, size: int = 1) -> None:
        self.harm, self.rank, self.size = harm, rank, size
        self.micro_batch = self.batch_size // size
        self.drawn: list[int] = []

    def sizes(self, step: int) -> tuple[int, int]:
        return self.batch_size, self.batch_size // self.size

    def steps(self, start: int, stop: int) -> Iterator[Iterator[dict[str, Tensor]]]:
        for number in range(start, stop):
            self.drawn.append(number)
            x = torch.randn(self.batch_size, 5, generator=torch.Generator().manual_seed(number))
            ids = torch.arange(self.batch_size) + 100 * number
            part = slice(self.rank * self.batch_size // self.size, (self.rank + 1) * self.batch_size // self.size)
            x, ids = self.harm(number, x)[part], ids[part]
            parts = zip(x.split(self.micro_batch), ids.split(self.micro_batch), strict=True)
            yield ({"x": a, "ids": b} for a, b in parts)


class Network(nn.Module):
    """Weights, a batch norm whose statistics move with the passes, dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)[:, 0]


def step(module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"loss": F.mse_loss(module(batch["x"]), batch["x"].sum(1))}


def train(
    run: Path,
    points: Points | None = None,
    *,
    kind: str = "adamw",
    step: Any = step,
    here: World = HERE,
    **changes: Any,
) -> Outcome:
    given: dict[str, Any] = {"steps": STEPS, "lr": 1e-2, "warmup_steps": 2, "log_every": 5, "ema": 0.9, **changes}
    settings = Loop(**{"precision": "fp32", **given})
    module = Network().train()
    plan = Plan(schedule(settings, 4, 8), settings, seed=3, metadata={})
    groups = pretrain_groups(module, 0.05)
    optimizer = adamw(groups, betas=(0.9, 0.95), lr=1e-2) if kind == "adamw" else lars(module, lr=0.1)
    return fit(module, step, points or Points(rank=here.rank, size=here.size), optimizer, plan, run=run, world=here)


def nan_at(*steps: int) -> Callable[[int, Tensor], Tensor]:
    return lambda number, x: x.where(torch.arange(5) != number % 5, torch.nan) if number in steps else x


def weights_of(run: Path) -> tuple[int, str, Checkpoint]:
    saved = newest(run / "checkpoints")
    assert saved is not None
    return saved.step, saved.sha256(), saved


def bad_gradient(module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make a loss that is finite, with a gradient that is not, where the images are marked."""
    loss = step(module, {**batch, "x": batch["x"].clamp(-9, 9)})["loss"]
    return {"loss": loss + (0 * next(module.parameters()).sum()).sqrt() if batch["x"].max() > 9 else loss}


def marked_at(*steps: int) -> Callable[[int, Tensor], Tensor]:
    return lambda number, x: x + 100 * (number in steps)


# ---------------------------------------------------------------------------------------------- F35: stop


@pytest.mark.parametrize("at", [0, 7, 11])
@pytest.mark.parametrize(("kind", "bad"), [("adamw", "image"), ("adamw", "gradient"), ("lars", "image")])
def test_a_bad_number_stops_the_run_with_the_bits_of_the_step_before(
    tmp_path: Path, at: int, kind: str, bad: str
) -> None:
    """F35: also where the optimizer cannot be told (LARS), and where its state is not there yet."""
    how: dict[str, Any] = {"step": bad_gradient} if bad == "gradient" else {}
    harm = marked_at if bad == "gradient" else nan_at
    good, hurt = tmp_path / "good", tmp_path / "hurt"
    if at:
        train(good, Points(), kind=kind, stop_at=at, **how)
    code = "E-NUM-GRADIENT" if bad == "gradient" else "E-NUM-LOSS"
    with pytest.raises(MaekitError, match=rf"{code}.*step {at + 1}: .*8 images, numbers {100 * at}, ") as caught:
        train(hurt, Points(harm(at)), kind=kind, **how)
    assert caught.value.exit_code == 4
    number, digest, saved = weights_of(hurt)
    assert number == at
    assert not at or digest == weights_of(good)[1]
    assert all(value.isfinite().all() for part in saved.tensors.values() for value in part.values())
    with pytest.raises(MaekitError, match=rf"{code}.*step {at + 1}:"):  # the same command, the same number
        train(hurt, Points(harm(at)), kind=kind, **how)
    mended = train(hurt, Points(), kind=kind, **how)  # and goes on from there
    assert mended.state_sha256 == train(tmp_path / "whole", Points(), kind=kind, **how).state_sha256


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    """F35, F36: a weight that breaks by itself, as in a memory fault; the last checkpoint stays the newest."""

    def broken(module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if int(batch["ids"][0]) == 700:
            with torch.no_grad():
                next(module.parameters())[0, 0] = torch.nan
        return step(module, batch)

    for policy in ("stop", "skip"):
        with pytest.raises(MaekitError, match="E-NUM-WEIGHTS") as caught:
            train(tmp_path / policy, step=broken, save_every=3, keep=1, bad_numbers=policy)
        assert caught.value.exit_code == 4
        assert weights_of(tmp_path / policy)[0] == 6


def test_the_replay_file_holds_the_weights_of_just_before_and_the_images(tmp_path: Path) -> None:
    train(tmp_path / "good", stop_at=7)
    with pytest.raises(MaekitError, match="maekit replay"):
        train(tmp_path / "hurt", Points(nan_at(7)))
    file = tmp_path / "hurt" / "replay" / "step-8.safetensors"
    with safetensors.safe_open(file, "pt") as opened:
        facts = json.loads(opened.metadata()[HEADER])
        weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert (facts["step"], facts["batch"], facts["ids"]) == (8, 7, list(range(700, 708)))
    before = weights_of(tmp_path / "good")[2].tensors["model"]
    assert weights.keys() == before.keys()
    assert all(torch.equal(weights[name], before[name]) for name in before)


# ---------------------------------------------------------------------------------------------- F35: skip


@pytest.mark.parametrize("kind", ["adamw", "lars"])
def test_skipped_updates_do_not_hang_on_log_lines_saves_or_stops(tmp_path: Path, kind: str) -> None:
    """F21, F35: one, the last before a log line, two in a row, the very last step."""
    hurt = Points(nan_at(0, 4, 6, 7, 11))
    found = {
        every: train(tmp_path / str(every), hurt, kind=kind, bad_numbers="skip", log_every=every, save_every=saves)
        for every, saves in ((1, 2), (5, 100), (100, 4))
    }
    assert len({outcome.state_sha256 for outcome in found.values()}) == 1
    for at in range(1, STEPS):
        train(tmp_path / "parts", hurt, kind=kind, bad_numbers="skip", stop_at=at)
    last = train(tmp_path / "parts", hurt, kind=kind, bad_numbers="skip")
    assert last.state_sha256 == found[5].state_sha256
    assert (tmp_path / "parts" / "metrics.jsonl").read_text().count('"skipped": 5') == 1
    assert weights_of(tmp_path / "parts")[2].state["mishaps"]["skipped"] == 5
    assert len(list((tmp_path / "5" / "replay").iterdir())) == 3


def test_a_skipped_update_is_one_that_was_not_made(tmp_path: Path) -> None:
    """Oracle: a loop by hand that leaves the step out."""
    train(tmp_path, Points(nan_at(3)), bad_numbers="skip", ema=None, steps=6, log_every=3)
    model = Network().train()
    optimizer = adamw(pretrain_groups(model, 0.05), betas=(0.9, 0.95), lr=1e-2)
    timing = schedule(Loop(steps=6, lr=1e-2, warmup_steps=2), 4, 8)
    for number, (batch,) in enumerate(Points().steps(0, 6)):
        if number == 3:
            continue
        for group in optimizer.param_groups:
            group["lr"] = timing.lr(number)
        seed_all(3, number, 0, 0)
        step(model, batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = weights_of(tmp_path)[2].tensors["model"]
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


def test_too_many_skipped_updates_in_a_row_stop(tmp_path: Path) -> None:
    hurt = Points(nan_at(*range(30, 60)))
    with pytest.raises(MaekitError, match=rf"E-NUM-LOSS.*step {30 + LIMIT}, after {LIMIT - 1} updates in a row"):
        train(tmp_path, hurt, bad_numbers="skip", steps=80)


# -------------------------------------------------------------------------------------------- F19: two processes


def _one_of_two(rank: int, run: Path, port: int, policy: str) -> None:
    import os

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with world("cpu") as here:
        own = nan_at(7) if rank == 1 else lambda number, x: x
        try:
            outcome = train(run, Points(own, rank, 2), here=here, bad_numbers=policy)
            told = outcome.state_sha256
        except MaekitError as error:
            told = f"{error.code} {error}"
    (run / f"told-{rank}").write_text(told)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_bad_number_in_one_process_stops_or_skips_in_both_at_the_same_step(tmp_path: Path, policy: str) -> None:
    """F19."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(_one_of_two, (tmp_path, port, policy), nprocs=2, start_method="spawn")
    told = [(tmp_path / f"told-{rank}").read_text() for rank in (0, 1)]
    assert told[0] == told[1]
    if policy == "stop":
        assert "E-NUM-LOSS" in told[0] and "step 8:" in told[0] and "process 1" in told[0]
        assert weights_of(tmp_path)[0] == 7
    else:
        assert weights_of(tmp_path)[2].state["mishaps"]["skipped"] == 1


# ---------------------------------------------------------------------------------------------- F37: spikes


def far_off(*steps: int) -> Callable[[int, Tensor], Tensor]:
    return lambda number, x: x * 10 if number in steps else x  # a loss some 100 times as large


def spiking(run: Path, *steps: int, **changes: Any) -> Outcome:
    given = {"spike_sigma": 6.0, "steps": 110, "ema": None, "log_every": 10, "save_every": 500, **changes}
    return train(run, Points(far_off(*steps)), **given)


def test_spikes_are_skipped_and_the_run_is_the_same_wherever_it_stopped(tmp_path: Path) -> None:
    """F37: 1 and 5 steps."""
    steps = (80, 100, 101, 102, 103, 104)
    whole = spiking(tmp_path / "whole", *steps, log_every=50)
    for at in (81, 103):
        spiking(tmp_path / "parts", *steps, stop_at=at)
    assert spiking(tmp_path / "parts", *steps).state_sha256 == whole.state_sha256
    assert weights_of(tmp_path / "whole")[2].state["mishaps"]["skipped"] == len(steps)
    quiet = spiking(tmp_path / "quiet")
    assert quiet.state_sha256 == spiking(tmp_path / "none", spike_sigma=None).state_sha256


@pytest.mark.slow
def test_many_spikes_roll_back_pass_over_their_batches_and_then_stop(tmp_path: Path) -> None:
    """F37: 50 steps."""
    steps = range(90, 140)
    with pytest.raises(MaekitError, match=rf"E-NUM-SPIKE.*step {90 + LIMIT}, after"):
        spiking(tmp_path / "stops", *steps, save_every=40, steps=160)
    assert weights_of(tmp_path / "stops")[0] == 90 + LIMIT - 1
    with pytest.raises(MaekitError, match="E-NUM-SPIKE"):
        spiking(tmp_path / "few", *steps, save_every=40, steps=160, roll_back=1)
    done = spiking(tmp_path / "run", *steps, save_every=40, steps=160, roll_back=3)
    mishaps = weights_of(tmp_path / "run")[2].state["mishaps"]
    # from 80: 10 good, 20 bad, back; the batches 80 to 109 are gone; 20 bad, back; 20 more are gone; 10 are skipped
    assert (mishaps["rolled_back"], mishaps["shift"], mishaps["skipped"]) == (2, 50, 2 * LIMIT + 10)
    for at in (85, 105, 120):
        spiking(tmp_path / "parts", *steps, save_every=40, steps=160, roll_back=3, stop_at=at)
    assert spiking(tmp_path / "parts", *steps, save_every=40, steps=160, roll_back=3).step == done.step == 160
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})


# ---------------------------------------------------------------------------------------------- F38: fp16


def test_a_scale_that_sinks_is_counted_and_stops_with_advice(tmp_path: Path) -> None:
    """F38: gradients too large for fp16 whatever the scale; the weights are those before it began."""
    assert overflowing(8.0, [4.0, 2.0, 4.0, 4.0, 2.0], 3) == [4, 5, 0, 0, 1]

    how: dict[str, Any] = {"step": bad_gradient, "precision": "fp16", "steps": 60, "save_every": 100}
    train(tmp_path / "good", **how, stop_at=6)
    for _ in range(2):  # the same command, the same number
        with pytest.raises(MaekitError, match=r"E-NUM-SCALE.*2\d updates in a row.*--precision bf16") as caught:
            train(tmp_path / "sinks", Points(marked_at(*range(6, 60))), **how)
        assert caught.value.exit_code == 4
        step, _, saved = weights_of(tmp_path / "sinks")
        assert f"those of step {step} are saved" in str(caught.value) and step >= 6 + LIMIT
        before = weights_of(tmp_path / "good")[2].tensors["model"]
        assert all(
            torch.equal(saved.tensors["model"][name], before[name]) for name in dict(Network().named_parameters())
        )


def test_a_bad_loss_in_fp16_leaves_weights_and_scale_as_they_were(tmp_path: Path) -> None:
    train(tmp_path / "good", precision="fp16", stop_at=7, clip_grad=1.0)
    with pytest.raises(MaekitError, match=r"E-NUM-LOSS.*step 8.*scale \d+"):
        train(tmp_path / "hurt", Points(nan_at(7)), precision="fp16", clip_grad=1.0)
    assert weights_of(tmp_path / "hurt")[:2] == weights_of(tmp_path / "good")[:2]


# ---------------------------------------------------------------------------------------------- F40: memory


class Tight:
    """A step that has memory for so many images, from some step on."""

    def __init__(self, room: int, after: int = 5, error: Exception | None = None) -> None:
        self.room, self.after = room, after
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has")

    def __call__(self, module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if len(batch["ids"]) > self.room and int(batch["ids"][0]) >= 100 * self.after:
            module(batch["x"])  # batch norm has moved when it happens
            raise self.error
        return step(module, batch)


def test_out_of_memory_halves_the_pass_and_makes_the_step_again_from_the_same_state(tmp_path: Path) -> None:
    points = Points()
    done = train(tmp_path / "auto", points, step=Tight(2))
    assert (done.step, points.micro_batch) == (STEPS, 2)
    assert points.drawn == [*range(6), 5, *range(5, 12)]
    train(tmp_path / "parts", step=Tight(8), stop_at=5)
    parts = Points()
    parts.micro_batch = 2
    assert train(tmp_path / "parts", parts, step=Tight(8)).state_sha256 == done.state_sha256


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("Tried to allocate 1.50 GiB."), "1,610,612,736 bytes"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."), "4,096 bytes"),
        (MemoryError(), "8 in all"),
        (RuntimeError("std::bad_alloc"), "8 in all"),
    ],
)
def test_out_of_memory_says_batch_bytes_and_what_will_do(tmp_path: Path, error: Exception, told: str) -> None:
    with pytest.raises(MaekitError, match=rf"E-ENV-MEMORY.*8 images per pass.*{told}.*--micro-batch 4") as caught:
        train(tmp_path / "first", step=Tight(2, 0, error), micro_batch=8)
    assert caught.value.exit_code == 5
    with pytest.raises(MaekitError, match=r"E-STOP-MEMORY.*checkpoint of step 4") as caught:
        train(tmp_path / "later", step=Tight(2, 5, error), micro_batch=8, save_every=4)
    assert caught.value.exit_code == 75
    assert train(tmp_path / "later").state_sha256 == train(tmp_path / "whole").state_sha256


def test_one_image_that_does_not_fit_and_other_errors_end_the_run(tmp_path: Path) -> None:
    def full(module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        raise MemoryError

    points = Points()
    points.micro_batch = 1
    with pytest.raises(MaekitError, match=r"E-ENV-MEMORY.*1 images per pass.*smaller model"):
        train(tmp_path / "a", points, step=full)
    with pytest.raises(RuntimeError, match="of another kind"):
        train(tmp_path / "b", step=Tight(0, 0, RuntimeError("of another kind")))
