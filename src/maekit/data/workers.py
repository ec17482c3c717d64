"""Loader processes that may die or hang: what they had in hand is done again, by new ones, with the same bits.

torch's DataLoader does the work. Each worker says in shared memory which image it is at and since when (`Seats`), and
the batches asked of it are remembered until they are there (`Due`). A thread kills workers that are at one image for
longer than the timeout (`Watch`; the main process may itself be waiting for one of them). A dead worker ends the pool,
and a new one begins with the first batch that is missing. Samples are functions of (seed, epoch, index), so nothing
changes. An image in which workers died or hung twice counts as unreadable from then on; three deaths within an epoch
that no image explains stop the run.

Workers come from a fork server: a child forked after OpenMP has run can hang; its server has never computed anything.
"""

import multiprocessing
import os
import shutil
import signal
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from logging import getLogger
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info

from maekit.data.samples import SLOW_AFTER, Key, Samples, collate
from maekit.errors import MaekitError

try:
    import resource
except ImportError:  # Windows
    resource = None

PRELOADED = ["maekit.data.orphan", "maekit.data.loader", "maekit.data.augment", "maekit.data.sources"]
"""What the fork server imports once: a worker that had to import torchvision and timm itself would take seconds."""
PARENT = "MAEKIT_PARENT"
"""Variable that tells the fork server who started it (`maekit.data.orphan`)."""
PREFETCH = 4
"""Batches that each worker is ahead."""
LOOK_EVERY = 1
"""Seconds between two looks at what the workers are at."""
MOST_STRIKES = 2
"""Times that a worker may die or hang in an image before it counts as unreadable."""
MOST_DEATHS = 3
"""Times in an epoch that workers may be lost for no image's sake."""
TO_START = 600
"""Seconds in which a worker's start is no hang: importing over a slow network takes long."""
FILES_OF_A_WORKER = 32
"""Open files of the main process per worker: queues, and up to seven tensors in each batch that is ahead."""
SHARED_MEMORY = Path("/dev/shm")
"""Where batches come over from the workers."""

log = getLogger("maekit")


class Seats:
    """What each worker is at: two numbers a worker in memory that it shares with the main process."""

    def __init__(self, workers: int) -> None:
        self._at = RawArray("q", [-1] * workers)
        self._since = RawArray("d", [time.monotonic() + TO_START] * workers)

    def take(self, index: int) -> None:
        """In a worker: say that it begins to read image `index`."""
        info = get_worker_info()
        if info is not None:
            self._since[info.id] = time.monotonic()
            self._at[info.id] = index

    def leave(self) -> None:
        """In a worker: say that it is at no image."""
        self.take(-1)

    def of(self, worker: int) -> tuple[int | None, float]:
        """Return the image that a worker is at, None for none, and since when by the monotonic clock."""
        at = self._at[worker]
        return (None if at < 0 else at), self._since[worker]


class Due:
    """Batches of keys on their way through the workers, in order; those not yet there can be asked for again."""

    def __init__(self, batches: Iterable[list[Key]]) -> None:
        self._rest = iter(batches)
        self._sent: deque[list[Key]] = deque()

    def __iter__(self) -> Iterator[list[Key]]:
        yield from tuple(self._sent)
        for keys in self._rest:
            self._sent.append(keys)
            yield keys

    def arrived(self) -> None:
        """Take note that the first one is there."""
        self._sent.popleft()

    @property
    def epoch(self) -> int:
        """The epoch that is waited for."""
        return self._sent[0][0][0] if self._sent else -1


@dataclass(frozen=True)
class Loss:
    """A worker that is gone: its number as a process, what it was at, and how it ended."""

    pid: int
    index: int | None
    how: str


class Lost(Exception):
    """Workers are gone."""

    def __init__(self, losses: list[Loss]) -> None:
        super().__init__(losses)
        self.losses = losses


class Pool:
    """Batches made by worker processes.

    Args:
        samples: what a sample is.
        workers: how many processes.
        timeout: seconds that one image may take.
        batch_bytes: of the images of a batch, to see whether shared memory can hold what is on its way.
        pin_memory: for a GPU.
    """

    def __init__(
        self, samples: Samples, workers: int, *, timeout: float, batch_bytes: int = 0, pin_memory: bool = False
    ) -> None:
        self.samples, self.workers, self.timeout, self.pin_memory = samples, workers, timeout, pin_memory
        self.prefetch = enough_memory(workers, batch_bytes)
        enough_files(workers)
        self._strikes: Counter[int] = Counter()
        self._deaths: Counter[int] = Counter()

    def batches(self, keys: Iterable[list[Key]]) -> Generator[dict[str, Any], None, None]:
        """Yield the batch of each list of keys, in order.

        Raises:
            MaekitError: E-ENV-WORKER, E-ENV-FILES.
        """
        due = Due(keys)
        while True:
            running = self._start(due)
            watch = Watch(running._workers, self.seats, self.timeout, self._name)
            try:
                yield from self._until_lost(running, due, watch)
                return
            except Lost as lost:
                self._judge(lost.losses, due.epoch)
            finally:
                _end(running)
                watch.stop()

    def _start(self, due: Due) -> Any:
        self.seats = self.samples.seat = Seats(self.workers)
        start_server()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # the user has said how many
            data: DataLoader[Any] = DataLoader(
                self.samples,
                batch_sampler=due,  # type: ignore[arg-type]
                num_workers=self.workers,
                collate_fn=collate,
                multiprocessing_context=multiprocessing.get_context("forkserver"),
                worker_init_fn=_start_worker,
                prefetch_factor=self.prefetch,
                timeout=LOOK_EVERY,
                pin_memory=self.pin_memory,
                generator=torch.Generator(),  # or the DataLoader would draw from the global one
            )
            try:
                return iter(data)
            except OSError as error:
                raise _no_files(error) or error from None

    def _until_lost(self, running: Any, due: Due, watch: "Watch") -> Iterator[dict[str, Any]]:
        """Yield batches to the end, or until workers are lost.

        Raises:
            Lost: then.
        """
        while True:
            watch.waiting = watch.waiting or time.monotonic()
            try:
                batch = next(running)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                # no batch within `LOOK_EVERY`, or the worker died while its batch was taken over
                late = "timed out" in str(error)
                if dead := _dead(running, 0 if late else 1):
                    raise Lost([self._loss(number, dead[number], watch) for number in dead]) from None
                if not late:
                    raise _no_files(error) or error from None
                continue
            watch.waiting = None
            due.arrived()
            yield batch

    def _loss(self, number: int, worker: Any, watch: "Watch") -> Loss:
        return Loss(worker.pid, self.seats.of(number)[0], watch.killed.get(number) or _ending(worker))

    def _name(self, index: int | None) -> str:
        return "no image" if index is None else self.samples.source.ids[index]

    def _judge(self, losses: Sequence[Loss], epoch: int) -> None:
        """Book what was lost; stop if it was too often.

        Raises:
            MaekitError: E-ENV-WORKER.
        """
        self._deaths[epoch] += 1
        for loss in losses:
            if loss.index is None:
                continue
            self._strikes[loss.index] += 1
            if self._strikes[loss.index] == MOST_STRIKES:
                self.samples.given_up[loss.index] = f"loader processes {loss.how} in it, {MOST_STRIKES} times"
        told = ", ".join(f"pid {loss.pid} {loss.how} at {self._name(loss.index)}" for loss in losses)
        if any(loss.index in self.samples.given_up for loss in losses):
            self._deaths[epoch] -= MOST_STRIKES  # the image explains them
        if self._deaths[epoch] >= MOST_DEATHS:
            raise MaekitError(
                "E-ENV-WORKER", f"loader processes died {MOST_DEATHS} times in an epoch", found=f"the last: {told}",
                hint="fewer --workers if memory is short (SIGKILL), larger shared memory (SIGBUS), --workers 0 to see "
                "the error itself",
            )  # fmt: skip
        log.warning("a loader process is lost, its batch is done again: %s", told)


class Watch:
    """A thread that looks every second at what workers are at: says once that it is slow, kills those that hang.

    Args:
        workers: the processes.
        seats: what they are at.
        timeout: seconds.
        name: of an image.

    Attributes:
        killed: workers by number, and why.
        waiting: since when the main process waits for a batch, None when it does not.
    """

    def __init__(self, workers: Sequence[Any], seats: Seats, timeout: float, name: Callable[[int], str]) -> None:
        self.workers, self.seats, self.timeout, self.name = workers, seats, timeout, name
        self.killed: dict[int, str] = {}
        self.waiting: float | None = None
        self._told: float | None = None
        self._end = threading.Event()
        threading.Thread(target=self._run, name="maekit-watch", daemon=True).start()

    def stop(self) -> None:
        """End the thread."""
        self._end.set()

    def _run(self) -> None:
        while not self._end.wait(LOOK_EVERY):
            self._look(time.monotonic(), self.waiting)

    def _look(self, now: float, since: float | None) -> None:
        seats = [self.seats.of(number) for number in range(len(self.workers))]
        for number, (index, began) in enumerate(seats):
            if index is not None and now - began > self.timeout:
                self._kill(number, f"hung for more than {self.timeout:g} s")
        if since is None:
            return
        # stopped between two images, or unable to hand over what they have
        if now - max(since, *(began for _, began in seats)) > 2 * self.timeout:
            for number in range(len(self.workers)):
                self._kill(number, f"sent nothing for more than {2 * self.timeout:g} s")
        if now - since > SLOW_AFTER and self._told != since:
            self._told = since
            began, index = min(((began, index) for index, began in seats if index is not None), default=(now, None))
            what = "" if index is None else f": {self.name(index)} is read since {now - began:.0f} s"
            log.warning("slow: no batch for %.0f s%s", now - since, what)

    def _kill(self, number: int, why: str) -> None:
        if number not in self.killed:  # no is_alive() here: of two threads that ask, one can miss the exit code
            self.killed[number] = why
            self.workers[number].kill()


def _dead(running: Any, patience: float) -> dict[int, Any]:
    """Return the workers that have ended, by number, waiting up to `patience` seconds for one."""
    workers = running._workers
    connection.wait([worker.sentinel for worker in workers], patience)
    return {number: worker for number, worker in enumerate(workers) if not worker.is_alive()}


def _ending(worker: Any) -> str:
    code = worker.exitcode
    if code is not None and code < 0:
        known = -code in {kind.value for kind in signal.Signals}
        return f"was ended by {signal.Signals(-code).name if known else f'signal {-code}'}"
    return f"ended with code {code}"


def _end(running: Any) -> None:
    """End all workers, also those that do not listen any more."""
    workers = list(running._workers)
    running._shutdown_workers()
    for worker in workers:
        if worker.is_alive():
            worker.kill()
            worker.join()


def enough_memory(workers: int, batch_bytes: int) -> int:
    """Return how many batches each worker may be ahead, at most `PREFETCH`.

    Raises:
        MaekitError: E-ENV-SHM if shared memory does not hold one of each.
    """
    if not batch_bytes or not SHARED_MEMORY.is_dir():
        return PREFETCH
    free = shutil.disk_usage(SHARED_MEMORY).free
    ahead = min(PREFETCH, free // (workers * batch_bytes))
    if ahead < 1:
        raise MaekitError(
            "E-ENV-SHM", f"{SHARED_MEMORY} for {workers} loader processes", found=f"{free / 1e6:,.1f} MB free",
            expected=f"{workers * batch_bytes / 1e6:,.1f} MB or more: a batch of each",
            hint="a larger one (docker run --shm-size 8g), a smaller --micro-batch, or --workers 0",
        )  # fmt: skip
    if ahead < PREFETCH:
        log.warning("%s has %.1f MB free: loader processes stay %d batches ahead, not %d", SHARED_MEMORY, free / 1e6,
                    ahead, PREFETCH)  # fmt: skip
    return ahead


def enough_files(workers: int) -> None:
    """Let this process open as many files as batches need that come over from workers.

    Raises:
        MaekitError: E-ENV-FILES if the system does not allow it.
    """
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 64
    need = open_now + FILES_OF_A_WORKER * workers + 64
    if soft == resource.RLIM_INFINITY or soft >= need:
        return
    if hard != resource.RLIM_INFINITY and hard < need:
        raise MaekitError(
            "E-ENV-FILES", f"open files for {workers} loader processes", found=f"at most {hard} allowed",
            expected=f"{need} or more", hint=f"ulimit -n {max(1024, need)}, or --workers 0",
        )  # fmt: skip
    resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))


def _no_files(error: BaseException) -> MaekitError | None:
    """Say what it means that no file can be opened any more; None for any other error."""
    if "Too many open files" not in str(error):
        return None
    limit = "" if resource is None else f"at most {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} allowed"
    return MaekitError(
        "E-ENV-FILES", "open files for loader processes", found=f"too many, {limit}",
        hint="ulimit -n 4096, fewer --workers, or --workers 0",
    )  # fmt: skip


def _start_worker(_: int) -> None:
    """Let the main process alone decide on signals.

    Ctrl-C reaches the whole group, and a worker that dies of it takes the batch along that is still to be finished.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    info = get_worker_info()
    if info is not None and isinstance(info.dataset, Samples) and info.dataset.seat is not None:
        info.dataset.seat.leave()  # it has started


def _end_with_parent() -> None:
    """End this worker when the main process is gone, also by kill -9.

    torch's own watchdog asks for the parent's number, but a worker's parent is the fork server, which in turn waits for
    its workers.
    """
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def start_server() -> None:
    """Start the fork server with the signals blocked that a terminal or scheduler sends to the whole group.

    Workers inherit the block, so there is no moment at which such a signal could end them or the server. Python's
    resource tracker lifts the block of SIGINT and SIGTERM when it starts, and ignores these two by itself; SIGUSR1
    would end it, and its successor would not know what the workers give back.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    if not hasattr(signal, "pthread_sigmask"):
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    os.environ[PARENT] = str(os.getpid())
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
        forkserver.ensure_running()
    finally:
        del os.environ[PARENT]
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
