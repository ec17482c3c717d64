"""Parts of a larger job: runs of verbs that rest on one another, each in a run folder named by what decides it.

A `Part` is one call of a verb (pretrain, pca, tokenizer, probe, finetune) and the parts it needs. Its folder's name
holds a digest of all that decides its numbers, so equal parts of any table are one folder, done once; a folder with a
result is finished, any other is gone on with by the verb itself. `work_off` does what is not finished: in this process,
in several beside one another (one GPU each where there are GPUs), or as SLURM jobs.

``python -m maekit.tasks.parts FILE`` is what the others start: it does the part whose settings FILE holds.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch

from maekit import __version__, settings
from maekit.config import dump_yaml, load_yaml, resolve
from maekit.disk import own_file
from maekit.errors import MaekitError, clean
from maekit.report.files import write_whole
from maekit.settings import Settings
from maekit.signals import of_command, settled
from maekit.tasks import STOPPED
from maekit.tasks.protocols import peak_memory
from maekit.tasks.run_folder import deciding
from maekit.train.device import resolve_device
from maekit.train.log import read_metrics

log = logging.getLogger("maekit")

BUSY, BROKEN = 76, 1
"""Codes: another process is at work in the folder; a fault of ours or of the machine."""
WAIT = 0.2
"""Seconds between looks at what runs elsewhere."""
BUSY_WAIT = 5.0
"""Seconds before a folder in which another process works is tried again."""


@dataclass(eq=False)
class Part:
    """One run of a verb.

    Attributes:
        verb: its name.
        settings: its settings, ``out`` is the part's folder.
        needs: parts that must be finished before.
        flops: operations that it takes, for estimates of time.
    """

    verb: str
    settings: Settings
    needs: tuple["Part", ...] = ()
    flops: float = 0.0

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(str(self.settings.model_dump()["out"]))

    @property
    def result(self) -> dict[str, Any] | None:
        """What it found, None while it is not finished."""
        try:
            return dict(json.loads((self.folder / "result.json").read_text()))
        except (OSError, ValueError, TypeError, RecursionError):
            return None

    @property
    def cost(self) -> dict[str, Any]:
        """Seconds of the whole verb, peak memory in MiB, runs that shared its device, as far as they are known."""
        return _read_cost(self.folder)


def make_part(
    verb: str, kind: type[Settings], values: dict[str, Any], place: Path, where: Sequence[str],
    needs: tuple[Part, ...] = (), flops: float = 0.0,
) -> Part:  # fmt: skip
    """Return a part whose folder in `place` is named by a digest of its settings and of what it rests on.

    Args:
        verb: name of the verb.
        kind: its settings class.
        values: its settings without ``out``.
        place: folder of the folders.
        where: digests of the data, kind of device.
        needs: parts that it rests on.
        flops: as `Part.flops`.
    """
    chosen = kind.model_validate(values)
    decides = {"maekit": __version__, "verb": verb, "where": list(where), "needs": [part.folder.name for part in needs]}
    decides |= {"settings": deciding(chosen)}
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
    return Part(verb, chosen.model_copy(update={"out": place / f"{verb}-{digest}"}), needs, flops)


# ---------------------------------------------------------------------------------------------------- doing one


def do(verb: str, chosen: Settings, sharing: int = 1) -> tuple[int, str]:
    """Run a part in this process; return its code and what went wrong, and keep what it cost.

    Any exception is the part's failure and not that of the table; a signal's goes through.

    Args:
        verb: its name.
        chosen: its settings.
        sharing: runs that may be at work on its device, this one among them.
    """
    folder = Path(str(chosen.model_dump()["out"]))
    before, began = _read_cost(folder), time.monotonic()
    memory: Callable[[], float | None] = lambda: None  # noqa: E731
    try:
        with peak_memory(resolve_device(str(chosen.model_dump().get("device", "cpu")))) as memory:
            code = getattr(import_module(f"maekit.tasks.{verb}"), verb)(chosen).exit_code
            return code, ""
    except MaekitError as error:
        return (BUSY if error.code == "E-ENV-BUSY" else error.exit_code), str(error)
    except Exception as error:
        log.debug("%s %s", verb, folder.name, exc_info=True)
        return BROKEN, f"{type(error).__name__}: {clean(error, 400)}"
    finally:
        peaks = [peak for peak in (before.get("memory_mib"), memory()) if peak is not None]
        seconds = float(before.get("seconds", 0.0)) + time.monotonic() - began
        if folder.is_dir():
            shared = max(sharing, int(before.get("sharing", 1)))
            kept = {"seconds": seconds, "memory_mib": max(peaks, default=None), "sharing": shared}
            write_whole(_cost_file(folder), (json.dumps(kept) + "\n").encode())


def _cost_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.cost.json")


def _read_cost(folder: Path) -> dict[str, Any]:
    """Return what is known of seconds and memory; a training has booked its seconds itself, those before a kill too."""
    found: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        found = dict(json.loads(_cost_file(folder).read_text()))
    with contextlib.suppress(OSError):
        if records := read_metrics(folder / "metrics.jsonl"):
            trained = max(record.get("time", 0.0) for record in records)
            found["seconds"] = max(found.get("seconds", 0.0), trained)
    return found


def do_file(file: Path, sharing: int = 1) -> int:
    """Run the part whose settings a file holds; return its code, and leave what went wrong in a file beside."""
    kind: type[Settings] = getattr(settings, str(load_yaml(file)["verb"]).capitalize())
    code, told = do(str(load_yaml(file)["verb"]), resolve(kind, file=file)[0], sharing)
    if told:
        write_whole(file.with_suffix(".error"), told.encode())
    return code


# ---------------------------------------------------------------------------------------------------- doing all


class Handle(Protocol):
    """A part that was started."""

    def code(self) -> int | None:
        """Return its code, None while it runs."""
        ...

    def told(self) -> str:
        """Return what went wrong."""
        ...

    def stop(self) -> None:
        """Ask it to save and end."""
        ...


@dataclass
class _Here:
    outcome: tuple[int, str]

    def code(self) -> int | None:
        return self.outcome[0]

    def told(self) -> str:
        return self.outcome[1]

    def stop(self) -> None:
        return None


@dataclass
class _Process:
    file: Path
    process: "subprocess.Popen[bytes]"

    def code(self) -> int | None:
        return self.process.poll()

    def told(self) -> str:
        return _told(self.file)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait()


@dataclass
class _Slurm:
    file: Path
    job: Any

    def code(self) -> int | None:
        if not self.job.done():
            return None
        try:
            return int(self.job.result())
        except Exception as error:  # submitit raises one class for all that can happen to a job
            log.warning("job %s: %s", self.job.job_id, str(error).splitlines()[-1] if str(error) else "failed")
            return BROKEN

    def told(self) -> str:
        return _told(self.file)

    def stop(self) -> None:
        self.job.cancel()


def _told(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.with_suffix(".error").read_text()
    with contextlib.suppress(OSError):
        lines = file.with_suffix(".log").read_text(errors="replace").splitlines()
        return lines[-1] if lines else ""
    return "ended without a word"


Runner = Callable[[Part, int], Handle]
"""Starts a part in a slot."""


def in_this_process(part: Part, _: int) -> Handle:
    """Do it now."""
    return _Here(do(part.verb, part.settings))


def _file_of(part: Part) -> Path:
    file = part.folder.with_name(f"{part.folder.name}.yaml")
    write_whole(file, dump_yaml(part.settings).encode())
    file.with_suffix(".error").unlink(missing_ok=True)
    return file


def devices(kind: str) -> int:
    """Return among how many devices of a kind runs are dealt out: GPUs, or the one CPU."""
    return len(_gpus()) or 1 if kind == "cuda" else 1


def _gpus() -> list[str]:
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    return seen.split(",") if torch.cuda.is_available() else []


def beside(jobs: int) -> Runner:
    """Return what starts each part in a process of its own: on a GPU of its own, or with its share of the cores.

    The process ends with this one, also by kill -9, so that the same command started anew finds no other at work.
    """
    gpus = _gpus()

    def start(part: Part, slot: int) -> Handle:
        file = _file_of(part)
        environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} | os.environ
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        kind = resolve_device(str(part.settings.model_dump().get("device", "cpu"))).type
        sharing = math.ceil(jobs / devices(kind))
        command = [sys.executable, "-m", "maekit.tasks.parts", str(file), str(sharing)]
        with open(file.with_suffix(".log"), "ab", opener=own_file) as out:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=out, env=environment)
        return _Process(file, process)

    return start


def slurm(folder: Path, parameters: dict[str, Any]) -> Runner:
    """Return what submits parts as jobs.

    Args:
        folder: of submitit's own files.
        parameters: of submitit's ``update_parameters``; ``cluster`` chooses another than SLURM, as "local".

    Raises:
        MaekitError: E-ENV-IMPORT without submitit, E-ENV-SLURM where no job can be submitted.
    """
    try:
        submitit = import_module("submitit")
    except ImportError as error:
        raise MaekitError(
            "E-ENV-IMPORT", "setting jobs: slurm", found="package submitit is not installed", expected="it",
            hint="pip install 'maekit[slurm]', or --jobs N on this machine",
        ) from error  # fmt: skip
    parameters = dict(parameters)
    cluster = parameters.pop("cluster", "slurm")
    try:
        executor = submitit.AutoExecutor(folder=str(folder), cluster=cluster)
        executor.update_parameters(**parameters)
    except (RuntimeError, NameError, TypeError, ValueError, AssertionError) as error:
        raise MaekitError(
            "E-ENV-SLURM", "setting jobs: slurm", found=error, expected="a machine that can submit jobs",
            hint="--slurm slurm_partition=NAME timeout_min=600, or --jobs N on this machine",
        ) from error  # fmt: skip

    def submit(part: Part, _: int) -> Handle:
        file = _file_of(part)
        return _Slurm(file, executor.submit(do_file, file.resolve()))

    return submit


@dataclass
class Outcome:
    """How it ended.

    Attributes:
        stopped: it was stopped; what is unfinished can be gone on with.
        failed: folder name of a part -> what went wrong, also of those that rest on one that failed.
    """

    stopped: bool = False
    failed: dict[str, str] = field(default_factory=dict)


def work_off(
    parts: Sequence[Part], start: Runner, slots: int, *,
    said: Callable[[Part, int, int], None], done: Callable[[Part], None],
) -> Outcome:  # fmt: skip
    """Do every part that is not finished, each after those it needs; a failure stops only what rests on it.

    Args:
        parts: each once, needs before what needs them.
        start: starts one.
        slots: how many run at a time.
        said: told before each: the part, its number among all, how many there are.
        done: told after each that finished.
    """
    outcome, running, later = Outcome(), dict[int, tuple[Part, Handle]](), dict[str, float]()
    waiting = [part for part in parts if part.result is None]
    try:
        while waiting or running:
            for slot, (part, handle) in list(running.items()):
                code = handle.code()
                if code is None:
                    continue
                del running[slot]
                if code == 0:
                    done(part)
                elif code == STOPPED:
                    outcome.stopped = True
                elif code == BUSY:
                    log.info("%s: another process is at work in it, trying again", part.folder.name)
                    later[part.folder.name] = time.monotonic() + BUSY_WAIT
                    waiting.insert(0, part)
                else:
                    outcome.failed[part.folder.name] = handle.told()
                    log.error("%s failed: %s", part.folder.name, handle.told())
            if outcome.stopped:
                break
            waiting = _without_hope(waiting, outcome)
            part = next((part for part in waiting if _is_due(part, later)), None) if len(running) < slots else None
            if part is None:
                if waiting or running:
                    time.sleep(WAIT)
                continue
            waiting.remove(part)
            if part.result is not None:  # another process has finished it
                done(part)
                continue
            slot = next(n for n in range(slots) if n not in running)
            said(part, parts.index(part) + 1, len(parts))
            running[slot] = part, start(part, slot)
    except (KeyboardInterrupt, SystemExit):
        outcome.stopped = True
    if outcome.stopped:
        settled()
    for _, handle in running.values():
        handle.stop()
    return outcome


def _is_due(part: Part, later: dict[str, float]) -> bool:
    """Tell whether a part can be started: what it needs is there, and its folder was not found busy just now."""
    free = time.monotonic() >= later.get(part.folder.name, 0.0)
    return free and all(need.result is not None for need in part.needs)


def _without_hope(waiting: list[Part], outcome: Outcome) -> list[Part]:
    """Drop what rests on a part that failed."""
    kept = []
    for part in waiting:
        lost = next((need for need in part.needs if need.folder.name in outcome.failed), None)
        if lost is None:
            kept.append(part)
        else:
            outcome.failed[part.folder.name] = f"{lost.folder.name} failed: {outcome.failed[lost.folder.name]}"
    return kept


def main(words: Sequence[str]) -> int:
    """Do the part that the first word names; messages go to stderr, which is the part's log.

    With a second word, the number of runs that share the device, it is one of `beside`, which holds the other end of
    its stdin.
    """
    of_command()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.DEBUG)  # a fault's traceback stands in the log
    if len(words) == 1:
        return do_file(Path(words[0]))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    return do_file(Path(words[0]), int(words[1]))


def _end_with_parent() -> None:
    """End this process when the one that started it is gone: only then does its stdin end."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(BROKEN)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
