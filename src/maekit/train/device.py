"""Which device, which precision, which processes: asked of the machine once, never assumed."""

import contextlib
import faulthandler
import hashlib
import logging
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from maekit.errors import MaekitError
from maekit.settings import PEER_TIMEOUT
from maekit.train.allocator import keep_freed_memory

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all of a run."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is set in any process. On the CPU: no device is waited for."""
        if self.size == 1:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=_cpu_group())
        return bool(value)

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the first one's buffers, as batch norm's statistics: what is scored is what is saved."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def agree(self, facts: dict[str, str]) -> None:
        """Refuse to begin where processes were told different things.

        Args:
            facts: by name; every process has the same names.

        Raises:
            MaekitError: E-CONFIG-PROCESSES, naming the first fact that differs.
        """
        if self.size == 1:
            return
        sums = [int.from_bytes(hashlib.sha256(facts[name].encode()).digest()[:7], "big") for name in sorted(facts)]
        rows = self.gather(torch.tensor([sums]))
        wrong = [name for name, column in zip(sorted(facts), rows.T, strict=True) if len(column.unique()) > 1]
        if wrong:
            raise MaekitError(
                "E-CONFIG-PROCESSES", "the processes of this run", found=f"different {', '.join(wrong)}",
                expected="the same on every machine", hint="the same command, code and images everywhere",
            )  # fmt: skip

    def barrier(self) -> None:
        """Wait for all processes."""
        self.any(False)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Return the rows of all processes' CPU tensors (n_i, ...) one after the other, in order of rank."""
        if self.size == 1:
            return values
        counts = [torch.zeros((), dtype=torch.long) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor(len(values)), group=_cpu_group())
        longest = max(int(count) for count in counts)
        padded = torch.zeros(longest, *values.shape[1:], dtype=values.dtype)
        padded[: len(values)] = values
        parts = [torch.zeros_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=_cpu_group())
        return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def circumstances(world: World, micro_batch: int) -> dict[str, Any]:
    """Return what rounding depends on beside the settings: under another value a run goes on, but not to the same bits.

    Args:
        micro_batch: images per process and pass.
    """
    kind = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type
    versions = {"torch": torch.__version__}
    if world.device.type == "cpu":
        versions |= {"cpu": cpu_model(), "instructions": torch.backends.cpu.get_cpu_capability()}
        versions |= {"threads": torch.get_num_threads()}
    return {**versions, "device": kind, "processes": world.size, "micro_batch": micro_batch}


def cpu_model() -> str:
    """Return what the system calls its processor, with numbers where it has them: virtual ones share a name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    first = dict(re.findall(r"^(.+?)\s*: (.*)$", text.partition("\n\n")[0], re.MULTILINE))
    numbers = ", ".join(f"{name} {first[name]}" for name in ("cpu family", "model") if name in first)
    return first.get("model name", platform.machine()) + (f" ({numbers})" if numbers else "")


_group: dict[str, Any] = {}


def _cpu_group() -> Any:
    """Return the gloo group for flags and metrics (beside nccl, which would wait for the device)."""
    return _group.get("gloo")


def resolve_device(name: str) -> torch.device:
    """Turn ``auto | cpu | cuda | cuda:N | mps`` into a device that is there.

    Raises:
        MaekitError: E-ENV-DEVICE if it is not there, E-CONFIG-DEVICE if the name is none.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (number and (kind != "cuda" or not number.isdecimal())):
        raise MaekitError("E-CONFIG-DEVICE", "setting device", found=name, expected="auto, cpu, cuda, cuda:N or mps")
    if kind == "cuda" and not torch.cuda.is_available():
        raise MaekitError(
            "E-ENV-DEVICE", "setting device", found=f"{name}, but no CUDA GPU is usable", hint="--device cpu"
        )
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        have = torch.cuda.device_count()
        raise MaekitError("E-ENV-DEVICE", "setting device", found=name, expected=f"cuda:0 to cuda:{have - 1}")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise MaekitError("E-ENV-DEVICE", "setting device", found="mps, but it is not usable", hint="--device cpu")
    return torch.device(name)


def check_compiler(device: torch.device) -> None:
    """Refuse torch.compile where it cannot work.

    Raises:
        MaekitError: E-ENV-COMPILER on a CPU without a C++ compiler.
    """
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise MaekitError(
            "E-ENV-COMPILER", "setting compile", found="no C++ compiler", hint="apt-get install g++, or --no-compile"
        )


@contextlib.contextmanager
def world(device: str, peer_timeout: float = PEER_TIMEOUT) -> Iterator[World]:
    """Join the processes of this run (torchrun's environment) or be the only one; leave them at the end.

    gloo on CPU, nccl on CUDA with a gloo group beside it.

    Args:
        peer_timeout: seconds to wait for the others, here and in every exchange.

    Raises:
        MaekitError: E-ENV-PEER if one does not come.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = resolve_device(device)
    if chosen.type == "cpu":
        keep_freed_memory()
    if size == 1:
        yield World(0, 1, chosen)
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if chosen.type == "cuda":
        chosen = resolve_device(f"cuda:{local}")
        torch.cuda.set_device(chosen)
    waits = timedelta(seconds=peer_timeout)
    try:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=waits)
    except RuntimeError as error:
        raise MaekitError(
            "E-ENV-PEER", f"process {rank} of {size}", found=f"no word of all others: {str(error).splitlines()[0]}",
            expected=f"all within {peer_timeout:g} s", hint="start all, with the same address and a free port",
        ) from error  # fmt: skip
    _group["gloo"] = dist.new_group(backend="gloo", timeout=waits) if chosen.type == "cuda" else None
    try:
        yield World(rank, size, chosen)
    finally:
        dist.destroy_process_group()
        _group.clear()


GONE = (
    "closed by peer",
    "connection reset",
    "broken pipe",
    "timed out",
    "timeout",
    "socket closed",
    "remote process exited",
)
"""What torch says where another process has ended or hangs."""


def without_peer(error: RuntimeError, step: int, saved_at: int, run: Path) -> MaekitError | None:
    """Say what an exchange that failed means; None for any other error.

    Where the other hangs, what all threads of this process were doing is written into the run folder.

    Args:
        step: that was being done.
        saved_at: step of the newest checkpoint, -1 if there is none.
    """
    text = str(error).lower()
    if not dist.is_initialized() or not any(word in text for word in GONE):
        return None
    hangs = "time" in text
    told = re.sub(r"^\[.*?\] ", "", str(error).splitlines()[-1]).partition(". ")[0]  # less its place in torch's code
    if hangs:
        with contextlib.suppress(OSError), (run / f"hang-{dist.get_rank()}.txt").open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file)
    return MaekitError(
        "E-STOP-PEER" if saved_at >= 0 else "E-ENV-PEER", f"step {step + 1}",
        found=f"another process that {'hangs' if hangs else 'is gone'} ({told})",
        expected="all processes to the end",
        hint=(f"the same command goes on from step {saved_at}; " if saved_at >= 0 else "")
        + "what became of the other stands in its own output; memory is the usual reason",
    )  # fmt: skip


def launch(nproc: int, task: Callable[..., T], *args: Any) -> T:
    """Run `task` in `nproc` processes on this machine through torchrun's launcher; return what rank 0 returned.

    Raises:
        SystemExit: with the exit code of the first process that failed (its message is on stderr already).
        MaekitError: E-ENV-PEER if a signal ended it, as the system does when memory is short.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id="maekit",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(),
        signals_to_handle="SIGHUP,SIGQUIT",  # those by which a run is stopped are ours: `_forwarded`
    )
    threads = max(1, (os.cpu_count() or 1) // nproc)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # the child's own line is on stderr; the launcher would add tracebacks to it, and whom it ended after that
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with _forwarded(signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            return elastic_launch(config, _in_child)(task, *args)[0]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise MaekitError(
                "E-ENV-PEER", f"process {rank} of {nproc}", found=f"its end by {name}",
                hint="--micro-batch with fewer images if memory was the reason; the same command goes on from the "
                "newest checkpoint, if there is one",
            ) from None  # fmt: skip
        raise SystemExit(failure.exitcode) from None


@contextlib.contextmanager
def _forwarded(*kinds: signal.Signals) -> Iterator[None]:
    """Hand signals on to the started processes, which save and end; this one waits for what they return."""

    def forward(number: int, _: FrameType | None) -> None:
        for pid in (process.pid for process in multiprocessing.active_children()):
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    before = {}
    try:
        with contextlib.suppress(ValueError):  # not in the main thread: whoever owns it decides on signals
            before = {kind: signal.signal(kind, forward) for kind in kinds}
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _in_child(task: Callable[..., T], *args: Any) -> T:
    if int(os.environ["RANK"]) == 0:
        logging.basicConfig(level=logging.INFO, format="maekit: %(message)s", stream=sys.stderr)
    try:
        return task(*args)
    except MaekitError as error:
        if int(os.environ["RANK"]) > 0:  # a mistake of all is told by the first, and the launcher then ends the others
            time.sleep(3)
        sys.stderr.write(f"maekit: {error}\n")
        raise SystemExit(error.exit_code) from None
