"""A run folder explains itself: what was asked, what that resolved to, what came out.

``config.yaml`` holds the settings and, under "resolved", what was decided once and must stay (precision, statistics,
classes, the data's fingerprint); ``result.json`` is there when the run is finished. A second launch with the same
``--out`` goes on from the newest checkpoint, or does nothing when there is a result; settings that would change the
numbers must be the same.
"""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from maekit.config import dump_yaml, load_yaml, resolve
from maekit.errors import MaekitError
from maekit.report.files import write_whole
from maekit.settings import Settings
from maekit.tasks import Result

log = logging.getLogger("maekit")
S = TypeVar("S", bound=Settings)


class Resolved(BaseModel):
    """What the first launch decided and every later one keeps."""

    images: int
    fingerprint: str
    precision: str
    micro_batch: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: list[str] | None = None


@dataclass(frozen=True)
class Run:
    """An open run folder.

    Attributes:
        resolved: what an earlier launch decided, None for a new run.
        result: what a finished run found, None while it is not finished.
        made: whether the folder was made for this launch.
    """

    path: Path
    verb: str
    resolved: Resolved | None
    result: dict[str, Any] | None
    made: bool = False


def typed(kind: type[S], config: S | dict[str, Any]) -> S:
    """Return `config` as settings of `kind`; a dictionary is checked like a file."""
    return resolve(kind, flags=config)[0] if isinstance(config, dict) else config


def open_run(path: Path, verb: str, settings: Settings) -> Run:
    """Open a run folder, new or old.

    Raises:
        MaekitError: E-CONFIG-OUT (not a folder, or files that are no run's), E-CONFIG-RUN (another run: another
            verb, or settings that change the numbers differ), E-ENV-OUT (not writable).
    """
    if path.exists() and not path.is_dir():
        raise MaekitError("E-CONFIG-OUT", f"--out {path}", found="a file", expected="a folder, or nothing yet")
    _delete_leftovers(path)
    file = path / "config.yaml"
    if file.exists():
        return _reopen(path, verb, settings, file)
    if path.exists() and any(not entry.name.startswith(".tmp-") for entry in path.iterdir()):
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
        probe = path / f".tmp-write-{os.getpid()}"  # every process of a run tries
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise MaekitError(
            "E-ENV-OUT", f"--out {path}", found=error.strerror or error, expected="a writable folder"
        ) from error
    return Run(path, verb, None, None, made)


@contextlib.contextmanager
def begun(run: Run) -> Iterator[None]:
    """Take a new folder away again if the block fails before it has begun: a mistake leaves no trace."""
    try:
        yield
    except BaseException:
        if run.made and not (run.path / "config.yaml").exists():
            with contextlib.suppress(OSError):
                run.path.rmdir()
        raise


def _delete_leftovers(path: Path) -> None:
    """Delete what a kill left half written, in one process only."""
    if os.environ.get("RANK", "0") == "0":
        for leftover in path.glob(".tmp-*"):
            with contextlib.suppress(OSError):
                leftover.unlink()


def _reopen(path: Path, verb: str, settings: Settings, file: Path) -> Run:
    header = load_yaml(file)
    if header.get("verb") != verb:
        raise MaekitError(
            "E-CONFIG-RUN",
            f"--out {path}",
            found=f"a run of {header.get('verb')}",
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
    result = json.loads((path / "result.json").read_text()) if (path / "result.json").exists() else None
    log.info("%s: %s", path, "finished already, nothing to do" if result else "an unfinished run is here, going on")
    return Run(path, verb, Resolved.model_validate(header["resolved"]), result)


def describe(run: Run, settings: Settings, resolved: Resolved) -> None:
    """Write config.yaml: settings and what they resolved to, with format and version."""
    write_whole(run.path / "config.yaml", dump_yaml(settings, resolved.model_dump(mode="json")).encode())


def same_data(run: Run, images: int, fingerprint: str) -> None:
    """Refuse to go on with other images than the run began with.

    Raises:
        MaekitError: E-DATA-CHANGED.
    """
    before = run.resolved
    if before is not None and before.fingerprint != fingerprint:
        raise MaekitError(
            "E-DATA-CHANGED",
            f"the images are not those that {run.path} began with",
            found=f"{images} images",
            expected=f"the same {before.images} names and sizes",
            hint="the old images, or another --out",
        )


def finish(run: Run, metrics: dict[str, Any]) -> None:
    """Write result.json: the run is finished."""
    write_json(run.path / "result.json", metrics)


def write_json(path: Path, metrics: dict[str, Any]) -> None:
    """Write a result where people and scripts look for it."""
    write_whole(path, (json.dumps(metrics, indent=1) + "\n").encode())


def stopped(metrics: dict[str, Any]) -> Result:
    """Say how a stopped run goes on: exit code 75."""
    text = f"stopped at step {metrics['steps']} with a checkpoint; the same command goes on"
    return Result(metrics, text, exit_code=75)
