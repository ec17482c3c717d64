"""Which device, which precision, which processes: asked of the machine once, never assumed."""

import contextlib
import errno
import faulthandler
import hashlib
import logging
import multiprocessing
import os
import platform
import re
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, resource_tracker
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from maekit.disk import own_file
from maekit.errors import MaekitError
from maekit.settings import PEER_TIMEOUT
from maekit.signals import KINDS, handled, of_command
from maekit.train.allocator import keep_freed_memory

T = TypeVar("T")
STORE = "MAEKIT_STORE"
"""Variable that names the file through which the processes of `launch` meet."""
TO_END = 30.0
"""Seconds that processes have to end once another one has failed."""


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


def prepare_compiler(device: torch.device) -> None:
    """Refuse torch.compile where it cannot work, or would load what somebody else has put there.

    torch keeps what it has compiled for the next run, in a folder of a known name in /tmp, and loads what lies there.
    It is made here, for this user alone. ``TORCHINDUCTOR_CACHE_DIR`` moves all but precompiled headers, ``TMPDIR`` all.

    Raises:
        MaekitError: E-ENV-COMPILER on a CPU without a C++ compiler, and where that folder belongs to another user.
    """
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise MaekitError(
            "E-ENV-COMPILER", "setting compile", found="no C++ compiler", hint="apt-get install g++, or --no-compile"
        )
    folder = Path(default_cache_dir())
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise PermissionError(errno.EPERM, "a folder or link of another user")
        folder.chmod(0o700)
    except OSError as error:
        raise MaekitError(
            "E-ENV-COMPILER", f"{folder}, where torch keeps compiled code", found=error.strerror or error,
            expected="a folder of this user", hint="TMPDIR=A/FOLDER/OF/YOURS before the command, or --no-compile",
        ) from error  # fmt: skip


@contextlib.contextmanager
def world(device: str, peer_timeout: float = PEER_TIMEOUT) -> Iterator[World]:
    """Join the processes of this run (of `launch`, or in torchrun's environment) or be the only one; leave them then.

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
    meet = f"file://{os.environ[STORE]}" if STORE in os.environ else "env://"
    if chosen.type == "cuda":
        chosen = resolve_device(f"cuda:{local}")
        torch.cuda.set_device(chosen)
    waits = timedelta(seconds=peer_timeout)
    try:
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=meet, rank=rank, world_size=size, timeout=waits)
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
        with (
            contextlib.suppress(OSError),
            open(run / f"hang-{dist.get_rank()}.txt", "w", encoding="utf-8", opener=own_file) as file,
        ):
            faulthandler.dump_traceback(file)
    return MaekitError(
        "E-STOP-PEER" if saved_at >= 0 else "E-ENV-PEER", f"step {step + 1}",
        found=f"another process that {'hangs' if hangs else 'is gone'} ({told})",
        expected="all processes to the end",
        hint=(f"the same command goes on from step {saved_at}; " if saved_at >= 0 else "")
        + "what became of the other stands in its own output; memory is the usual reason",
    )  # fmt: skip


def launch(nproc: int, task: Callable[..., T], *args: Any) -> T:
    """Run `task` in `nproc` processes on this machine; return what rank 0 returned.

    They meet through a file in a folder that is this user's alone, and exchange tensors over the loopback interface.
    torchrun's launcher would open a store to the whole network, and load Python objects from it.

    Raises:
        SystemExit: with the exit code of the first process that failed (its message is on stderr already), or that of a
            signal that came before the processes had taken over.
        MaekitError: E-ENV-PEER if a signal ended it, as the system does when memory is short.
    """
    threads = max(1, (os.cpu_count() or 1) // nproc)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo0" if sys.platform == "darwin" else "lo")
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="maekit-") as folder:
        children = [
            context.Process(target=_in_child, args=(rank, nproc, f"{folder}/store", sender, task, args))
            for rank in range(nproc)
        ]
        with _forwarded() as forwarded:
            with _blocked():
                resource_tracker.ensure_running()  # at its start it lifts the block of two of them
            with _blocked():  # until the processes can say how they end
                for child in children:
                    child.start()
            sender.close()
            found, failed = _until_ended(children, receiver)
    if failed is None:
        return found[0]
    code = failed.exitcode or 0
    if -code in forwarded:
        raise SystemExit(128 - code)
    if code < 0:
        raise MaekitError(
            "E-ENV-PEER", f"process {children.index(failed)} of {nproc}",
            found=f"its end by {signal.Signals(-code).name}",
            hint="--micro-batch with fewer images if memory was the reason; the same command goes on from the "
            "newest checkpoint, if there is one",
        )  # fmt: skip
    raise SystemExit(code)


def _until_ended(children: list[SpawnProcess], receiver: Any) -> tuple[list[Any], SpawnProcess | None]:
    """Wait for all processes; return what was received, and the first that failed, after which the others are ended."""
    left, found, failed = {child.sentinel: child for child in children}, [], None
    waited: list[Any] = [receiver, *left]
    while left:
        for ready in connection.wait(waited):
            if ready is receiver:
                try:
                    found.append(receiver.recv())
                except EOFError:  # every process has ended
                    waited.remove(receiver)
                continue
            waited.remove(ready)
            child = left.pop(ready)  # type: ignore[call-overload]
            child.join()
            if child.exitcode and failed is None:
                failed = child
                for other in left.values():
                    other.terminate()
        if failed is not None:
            end = time.monotonic() + TO_END
            for other in left.values():
                other.join(max(0.0, end - time.monotonic()))
                other.kill()
                other.join()
            break
    while not found and failed is None and receiver.poll(0):
        found.append(receiver.recv())
    return found, failed


@contextlib.contextmanager
def _forwarded() -> Iterator[set[int]]:
    """Hand signals on to the started processes, which save and end; this one waits for what they return.

    Yields the numbers of those that came.
    """
    came: set[int] = set()

    def forward(number: int, _: FrameType | None) -> None:
        came.add(number)
        for pid in (process.pid for process in multiprocessing.active_children()):
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    with handled(forward, settles=True):
        yield came


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    """Let signals wait, here and in processes that are started."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, KINDS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _in_child(rank: int, size: int, store: str, sender: Any, task: Callable[..., T], args: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), STORE: store}
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    if rank == 0:
        logging.basicConfig(level=logging.INFO, format="maekit: %(message)s", stream=sys.stderr)
    try:
        of_command()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, KINDS)  # one that has waited comes here
        done = task(*args)
    except MaekitError as error:
        if rank > 0:  # a mistake of all is told by the first, and then the others are ended
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3)
        sys.stderr.write(f"maekit: {error}\n")
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    if rank == 0:
        sender.send(done)


def _stop_with_parent() -> None:
    """Save and end when the process that started this one is gone, also by kill -9."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGINT)
