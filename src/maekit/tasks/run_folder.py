"""A run folder explains itself: what was asked, what that resolved to, what came out.

``config.yaml`` holds the settings and, under "resolved", what was decided once and must stay (precision, statistics,
classes, the data's fingerprint); ``result.json`` is there when the run is finished. A second launch with the same
``--out`` goes on from the newest checkpoint, or does nothing when there is a result; settings that would change the
numbers must be the same.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

from pydantic import BaseModel, ValidationError

from maekit.config import deviations, dump_yaml, load_yaml, resolve
from maekit.disk import own_file
from maekit.errors import MaekitError, clean
from maekit.report.files import write_whole
from maekit.settings import Loop, Place, Settings
from maekit.signals import ending, settled
from maekit.tasks import STOPPED, Result
from maekit.train import checkpoint

log = logging.getLogger("maekit")
S = TypeVar("S", bound=Settings)
LOCK = ".lock"
OF_A_LAUNCH = {"stop_at": None, "resume": None, "data_changed": "stop"}
"""Settings that speak of one launch only, as a run's config.yaml has them."""


class Resolved(BaseModel):
    """What the first launch decided and every later one keeps.

    Attributes:
        images: how many there are.
        fingerprint: of their names and sizes.
        precision: "fp32" | "bf16" | "fp16"; this and what follows is empty where a verb does not train by itself.
        micro_batch: images per process and pass.
        mean: of each channel, in units of 0..1.
        std: of each channel.
        classes: names in the order of the outputs.
        model: arguments of `create_model`, whatever they came from.
        deviations: from the recipe that was named, as `maekit.config.Deviation` has them.
        identity: of the run (`identity`); its checkpoints keep it. Runs of releases before it have none.
        data_changes: of the images between launches that were accepted (`maekit.tasks.same_data`).
    """

    images: int
    fingerprint: str
    precision: str = ""
    micro_batch: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    classes: list[str] | None = None
    model: dict[str, Any] = {}
    deviations: list[dict[str, Any]] = []
    data_changes: list[dict[str, Any]] = []
    identity: str = ""


@dataclass(frozen=True)
class Run:
    """An open run folder.

    Attributes:
        resolved: what an earlier launch decided, None for a new run.
        result: what a finished run found, None while it is not finished.
        made: whether the folder was made for this launch.
    """

    path: Path
    resolved: Resolved | None
    result: dict[str, Any] | None
    made: bool = False


def typed(kind: type[S], config: S | dict[str, Any]) -> S:
    """Return `config` as settings of `kind`; a dictionary is checked like a file."""
    return resolve(kind, flags=config)[0] if isinstance(config, dict) else config


def open_run(path: Path, verb: str, settings: Settings) -> Run:
    """Open a run folder, new or old.

    Raises:
        MaekitError: E-CONFIG-OUT (not a folder, in the data, files that are no run's, not what ``--resume`` asks for),
            E-CONFIG-RUN (another run: another verb, or settings that change the numbers differ), E-ENV-OUT.
    """
    if path.exists() and not path.is_dir():
        raise MaekitError("E-CONFIG-OUT", f"--out {path}", found="a file", expected="a folder, or nothing yet")
    if isinstance(settings, Place):
        outside(path, settings.data)
    file = path / "config.yaml"
    wanted = settings.resume if isinstance(settings, Loop) else None
    if wanted is not None and wanted != file.exists():
        raise MaekitError(
            "E-CONFIG-OUT",
            f"--out {path}",
            found="no run" if wanted else "a run",
            expected="a run to go on with (--resume)" if wanted else "a new folder (--no-resume)",
            hint="another --out",
        )
    if file.exists():
        return _reopen(path, verb, settings, file)
    if path.exists() and any(not entry.name.startswith((".tmp-", LOCK)) for entry in path.iterdir()):
        raise MaekitError(
            "E-CONFIG-OUT",
            f"--out {path}",
            found="files that are no run's",
            expected="a run folder or an empty one",
            hint="another --out",
        )
    made = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".tmp-write-{uuid.uuid4().hex}"  # every process of a run tries
        probe.touch(exist_ok=False)
        probe.unlink(missing_ok=True)  # the main process may be tidying up already
    except OSError as error:
        raise MaekitError(
            "E-ENV-OUT", f"--out {path}", found=error.strerror or error, expected="a writable folder"
        ) from error
    return Run(path, None, None, made)


def outside(out: Path, data: str | None) -> None:
    """Refuse to write among the images: what is written would be read as one of them.

    Raises:
        MaekitError: E-CONFIG-OUT.
    """
    if data is None or data.startswith("builtin:") or not Path(data).is_dir():
        return
    if out.resolve().is_relative_to(Path(data).resolve()):
        raise MaekitError(
            "E-CONFIG-OUT", f"--out {out}", found=f"a place in --data {data}", expected="one beside the images",
            hint="another --out",
        )  # fmt: skip


def carry_out(run: Run, work: Callable[[], Result]) -> Result:
    """Do the work of an open run, or nothing if it is finished.

    A mistake before the run has begun leaves no folder. The training loop minds signals itself; one that comes before
    or after it ends the run in the same way: exit code 75 if there is a checkpoint to go on from.

    Raises:
        MaekitError: E-ENV-BUSY if another process is at work in the folder, E-ENV-OUT if that cannot be told, and
            whatever `work` raises.
    """
    if run.result is not None:
        log.info("%s: finished already, nothing to do", run.path)
        report = run.path / "report.html"
        look = f"; the report: {report.resolve()}" if report.exists() else ""
        return Result(run.result, f"{run.path} is finished: nothing to do{look}")
    try:
        with alone(run.path), ending():
            return work()
    except (KeyboardInterrupt, SystemExit):
        settled()
        saved = _saved(run.path)
        if saved is None:
            _take_away(run)
            raise
        return stopped({"run": str(run.path), "steps": saved.step, "state_sha256": saved.sha256()})
    except BaseException:
        _take_away(run)
        raise


def _saved(path: Path) -> checkpoint.Checkpoint | None:
    """Return a checkpoint to go on from; a quickstart's are those of its stages."""
    found = sorted(path.rglob("checkpoints"))
    folders = [one for one in found if checkpoint.ASIDE not in one.relative_to(path).parts]
    with contextlib.suppress(MaekitError):  # the next launch says what is wrong with them
        return next((saved for one in folders if (saved := checkpoint.newest(one))), None)
    return None


def _take_away(run: Run) -> None:
    if run.made and not (run.path / "config.yaml").exists():
        with contextlib.suppress(OSError):
            run.path.rmdir()


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system gives back however the process ends; tidy up what a kill left."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    file = path / LOCK
    with _lock_file(file) as held:
        held.seek(0)
        holder = held.read(200)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not file.exists() or not os.path.samestat(
                os.fstat(held.fileno()), file.stat()
            ):  # its holder ended and deleted it just now
                raise BlockingIOError
        except BlockingIOError:
            raise _busy(path, holder, "wait for it, or another --out") from None
        except OSError as error:  # a file system without locks: what the file says must do
            if holder and not _ended(holder):
                raise _busy(path, holder, f"wait for it; if it is gone, delete {file}") from None
            log.warning("%s cannot be locked (%s): start no second process in it", path, error.strerror)
        if holder:
            log.warning("%s: its last process (%s) ended without a word, going on in its place", path, clean(holder))
        held.truncate(0)
        held.write(f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        held.flush()
        for leftover in (*path.glob(".tmp-*"), *path.glob("*/.tmp-*")):
            if leftover.parent == path or not (leftover.parent / LOCK).exists():  # no run of its own inside this one
                with contextlib.suppress(OSError):
                    leftover.unlink()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a disk that refuses has been told of; nobody holds what is left
                file.unlink(missing_ok=True)


def _lock_file(file: Path) -> TextIO:
    try:
        return open(file, "a+", encoding="utf-8", errors="replace", opener=own_file)
    except OSError as error:
        raise MaekitError(
            "E-ENV-OUT", f"cannot lock {file.parent}", found=f"{LOCK}: {error.strerror or error}",
            expected="a file of maekit's own there", hint="another --out, or find out who put it there",
        ) from error  # fmt: skip


def _busy(path: Path, holder: str, hint: str) -> MaekitError:
    return MaekitError(
        "E-ENV-BUSY", f"--out {path}", found=f"another process at work: {holder or 'just started'}",
        expected="one at a time", hint=hint,
    )  # fmt: skip


def _ended(holder: str) -> bool:
    """Whether the process that a lock names was one of this machine and is there no more."""
    found = re.fullmatch(r"pid (\d+) on (\S+) since .*", holder)
    return found is not None and found[2] == socket.gethostname() and not Path(f"/proc/{found[1]}").exists()


def _reopen(path: Path, verb: str, settings: Settings, file: Path) -> Run:
    header = load_yaml(file)
    if header.get("verb") != verb or "resolved" not in header:
        raise MaekitError(
            "E-CONFIG-RUN",
            f"--out {path}",
            found=f"a run of {header.get('verb')}" if header.get("verb") != verb else "a config.yaml of no run",
            expected=f"a run of {verb}",
            hint="another --out",
        )
    stored, now = resolve(type(settings), file=file)[0].model_dump(), settings.model_dump()
    changed = [
        f"{name} {stored[name]} -> {now[name]}"
        for name, field in type(settings).model_fields.items()
        if (field.json_schema_extra or {}).get("resume") == "same" and stored[name] != now[name]  # type: ignore[union-attr]
    ]
    if changed:
        raise MaekitError(
            "E-CONFIG-RUN",
            f"--out {path} holds a run with other settings",
            found="; ".join(changed),
            expected="the same settings, to go on",
            hint="another --out, or the run's own settings: --config " + str(path / "config.yaml"),
        )
    result = None
    if (path / "result.json").exists():
        try:
            result = dict(json.loads((path / "result.json").read_text()))
        except (OSError, ValueError, TypeError, RecursionError):
            log.warning("%s cannot be read: the run counts as unfinished", path / "result.json")
    if result is None:
        log.info("%s: an unfinished run is here, going on", path)
    try:
        return Run(path, Resolved.model_validate(header["resolved"]), result)
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{'.'.join(map(str, ('resolved', *first['loc'])))}: {first['msg']}"
        raise MaekitError("E-CONFIG-RUN", f"{file}", found=found, expected="what the run wrote",
                          hint="another --out") from error  # fmt: skip


def describe(run: Run, settings: Settings, resolved: Resolved) -> None:
    """Write config.yaml: settings and what they resolved to, with format and version.

    What speaks of one launch only is left out, so that ``--config`` takes the run up.
    """
    of_a_launch = {name: value for name, value in OF_A_LAUNCH.items() if name in type(settings).model_fields}
    lasting = settings.model_copy(update=of_a_launch)
    write_whole(run.path / "config.yaml", dump_yaml(lasting, resolved.model_dump(mode="json")).encode())


def deviating(settings: Settings) -> list[dict[str, Any]]:
    """Log a line for each setting that deviates from the recipe that was named; return them for config.yaml."""
    found = deviations(settings.recipe, settings) if settings.recipe else []
    for deviation in found:
        log.info("deviates from %s: %s", settings.recipe, deviation)
    return [asdict(deviation) for deviation in found]


def deciding(settings: Settings) -> dict[str, Any]:
    """Return the settings that change the numbers, without paths whose content decides."""
    fields, values = type(settings).model_fields, settings.model_dump(mode="json")
    return {
        name: value
        for name, value in values.items()
        if (fields[name].json_schema_extra or {}).get("resume") == "same"  # type: ignore[union-attr]
        and name not in ("run", "data", "target_from")
    }


def identity(settings: Settings, fingerprint: str) -> str:
    """Return what tells a run from others: a digest of what decides its numbers, 14 hexadecimal digits.

    Written when the run begins and kept from then on, since later releases may have more settings.
    """
    places = {name: str(getattr(settings, name, None)) for name in ("run", "target_from")}
    facts = [type(settings).__name__, deciding(settings), places, fingerprint]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:14]


def finish(run: Run, metrics: dict[str, Any]) -> None:
    """Write result.json: the run is finished."""
    write_whole(run.path / "result.json", (json.dumps(metrics, indent=1) + "\n").encode())


def stopped(metrics: dict[str, Any]) -> Result:
    """Say how a stopped run goes on: exit code 75, whatever signals come yet, also of what it may be a part of."""
    settled()
    log.info("stopped at step %d with a checkpoint; the same command goes on", metrics["steps"])
    return Result(metrics, exit_code=STOPPED)
