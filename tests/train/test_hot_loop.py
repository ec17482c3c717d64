"""The real loop of `maekit pretrain`, watched step by step: what it asks of the device, casts and compiles again.

A step is what runs between two updates of the optimizer. What the loader does on the host with pictures, before they
are on the device, is not counted.
"""

import io
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch._dynamo.utils import counters
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

import maekit as package
from maekit.data.sources import open_source

SETTINGS: dict[str, Any] = {
    "model": "vit_tiny_patch16_224", "img_size": 28, "channels": 1, "patch_size": 7, "embed_dim": 16, "depth": 2,
    "num_heads": 2, "decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 2, "mask_ratio": 0.6, "batch_size": 8,
    "steps": 100, "stop_at": 12, "base_lr": 1e-2, "workers": 0, "log_every": 5, "save_every": 100, "device": "cpu",
    "precision": "fp32",
}  # fmt: skip
FETCHING = ("item", "tolist", "numpy", "cpu", "__array__", "__bool__", "__int__", "__float__", "__index__")
"""Methods of a tensor that wait for its device; on a CPU not all of them are operations."""
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "_unique2", "lift_fresh")
"""Operations that wait for the device: the host must know a number or a shape, or hands numbers over (the last one)."""


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """40 pictures of the built-in set."""
    source = open_source("builtin:fashion", "train")
    return [Image.open(io.BytesIO(bytes(source.read(i)))).convert("L") for i in range(40)]  # type: ignore[arg-type]


@pytest.fixture
def train(pictures: list[Image.Image], tmp_path: Path) -> Callable[..., None]:
    """Return a function: changed settings -> a run of 12 steps through the Python API."""

    def run(**changes: Any) -> None:
        stopped = package.pretrain({**SETTINGS, "out": tmp_path / "run", **changes}, pictures)
        assert stopped.exit_code == 75

    return run


@pytest.fixture
def updates() -> Iterator[list[Callable[[int], None]]]:
    """What is put in here is told the number of each update of an optimizer, from 1, when it is made."""
    told: list[Callable[[int], None]] = []
    made = [0]

    def note(*_: Any) -> None:
        made[0] += 1
        for tell in told:
            tell(made[0])

    hook = register_optimizer_step_post_hook(note)
    yield told
    hook.remove()


class Fetches(TorchDispatchMode):
    """Counts by step and place in maekit what the main thread fetches from tensors while it is open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.step, self.found = 0, Counter[tuple[int, str]]()
        self.thread = threading.get_ident()
        for name in FETCHING:
            monkeypatch.setattr(Tensor, name, self._noted(name, getattr(Tensor, name)))

    def _noted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._note(name)
            return method(tensor, *args, **kwargs)

        return noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; note one that waits."""
        if (name := func.name().split("::")[1].partition(".")[0]) in WAITING:
            self._note(name)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str) -> None:
        if threading.get_ident() != self.thread:  # of the state's copy in memory, when a checkpoint is written
            return
        frame, places = sys._getframe(2), []
        while frame is not None:
            file = Path(frame.f_code.co_filename)
            if "maekit" in file.parts:
                places.append(f"{file.parent.name}/{file.stem}")
            frame = frame.f_back
        if not any(place.startswith("data/") for place in places):
            self.found[self.step, f"{name} in {places[0] if places else 'no module of ours'}"] += 1

    def of_steps(self, steps: range) -> dict[tuple[int, str], int]:
        """Return what was fetched after these updates and before the next ones."""
        return {where: count for where, count in self.found.items() if where[0] in steps}


KINDS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "all that watches": {"ema": 0.9, "clip_grad": 1.0, "spike_sigma": 6.0, "sdc_check": 100, "drop_path": 0.1},
    "bf16, two passes, computed anew, another decoder": {
        "precision": "bf16", "micro_batch": 4, "checkpointing": True, "decoder_kind": "cross", "decode_ratio": 0.25,
        "target": "low_pass",
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_after_which_nothing_is_due_fetches_nothing(
    kind: str, train: Callable[..., None], updates: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Fetches(monkeypatch) as fetches:
        updates.append(lambda step: setattr(fetches, "step", step))
        train(**KINDS[kind])
    quiet = [step for step in range(1, 12) if step % 5]
    assert not {where: n for where, n in fetches.found.items() if where[0] in quiet}
    # the counter counts: log lines are due after 5 and 10
    assert fetches.of_steps(range(5, 6)) and fetches.of_steps(range(10, 11))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [*(name for name in KINDS if "sdc_check" not in KINDS[name]), "fp16"])
def test_on_a_gpu_no_step_waits_for_the_device(kind: str, train: Callable[..., None], updates: list[Any]) -> None:
    """Torch itself refuses to wait from the second update to the one before the last."""
    modes = {2: "error", 11: "default"}
    updates.append(lambda step: torch.cuda.set_sync_debug_mode(modes[step]) if step in modes else None)
    try:
        train(**{**KINDS.get(kind, {"precision": "fp16"}), "device": "cuda", "log_every": 100})
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Casts(TorchDispatchMode):
    """Counts by step how often tensors of each shape were cast to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.found = 0, Counter[tuple[int, tuple[int, ...]]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; note a cast."""
        out = func(*args, **(kwargs or {}))
        if "_to_copy" in str(func) and out.dtype == torch.bfloat16:
            self.found[self.step, tuple(out.shape)] += 1
        return out


def test_a_weight_is_cast_once_in_a_step_of_four_passes(train: Callable[..., None], updates: list[Any]) -> None:
    with Casts() as casts:
        updates.append(lambda step: setattr(casts, "step", step))
        train(precision="bf16", micro_batch=2)
    for step in range(1, 11):
        # the MLPs of two encoder and two decoder blocks, which are equally wide
        assert casts.found[step, (64, 16)] == casts.found[step, (16, 64)] == 4
        # queries with keys and values: of all but the decoder's last block, whose map is used in two parts
        assert casts.found[step, (48, 16)] == 3
        assert casts.found[step, (32, 16)] == 4  # keys and values, a part made anew in each pass


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_a_compiled_run_compiles_nothing_after_its_first_steps(train: Callable[..., None], updates: list[Any]) -> None:
    """40 images in batches of 16: the last one of an epoch has 8, for which there is one more graph, once."""
    torch._dynamo.reset()
    counters.clear()
    found: list[int] = []
    updates.append(lambda _: found.append(counters["stats"]["unique_graphs"]))
    train(compile=True, precision="bf16", batch_size=16, stop_at=24, depth=1, decoder_depth=1)
    assert found == [1, 1] + [2] * 22
    assert not counters["graph_break"]
    torch._dynamo.reset()
