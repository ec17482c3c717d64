"""Look after the checkpoints of a run: what is there, whether it is whole, what may go, what is damaged.

A run folder holds them in ``checkpoints``, ``best`` and ``best-ema``, one made of stages (a quickstart, a table) in
those of its stages. Only `prune` and `repair` change anything, and only while no other process is at work in the
folder. Nothing damaged is deleted: it is put aside into ``RUN/damaged``, so that whoever wants to save something from
it still can.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from maekit.config import load_yaml
from maekit.errors import MaekitError
from maekit.interchange.weights import load_model
from maekit.report.evaluation import aligned
from maekit.report.files import write_whole
from maekit.settings import Ckpt
from maekit.tasks import Result
from maekit.tasks.run_folder import alone, typed
from maekit.train import checkpoint
from maekit.train.best import FOLDERS
from maekit.train.log import sort_metrics

log = logging.getLogger("maekit")

PLACES = ("checkpoints", *FOLDERS.values())
"""Folders of a run, or of a stage of it, that hold checkpoints."""


@dataclass(frozen=True)
class Found:
    """A checkpoint on the disk.

    Attributes:
        wrong: what is the matter with it; empty: nothing.
        unread: the disk fails, which says nothing of the checkpoint.
    """

    path: Path
    step: int
    size: int
    wrong: str = ""
    unread: bool = False


def ckpt(settings: Ckpt | dict[str, Any]) -> Result:
    """Do what the action says.

    Returns:
        checkpoints: path, step, bytes, wrong; newest: what a run would go on from; exit code 1: `verify` found damage.

    Raises:
        MaekitError: E-USAGE-ACTION, E-USAGE-RUN, E-CKPT-MISSING, E-ENV-BUSY; E-CKPT-DAMAGED if nothing is left to go
            on from.
    """
    settings = typed(Ckpt, settings)
    if settings.action is None:
        raise MaekitError("E-USAGE-ACTION", "no action named", hint="maekit ckpt list RUN; also verify, prune, repair")
    if settings.run is None:
        raise MaekitError("E-USAGE-RUN", "no run named", hint=f"maekit ckpt {settings.action} RUN")
    _refuse_unused(settings)
    folders = [path for path in sorted(settings.run.rglob("*")) if path.name in PLACES and path.is_dir()]
    folders = [path for path in folders if checkpoint.ASIDE not in path.relative_to(settings.run).parts]
    if not folders:
        raise MaekitError("E-CKPT-MISSING", f"{settings.run}", found="no checkpoints", expected="a run folder")
    if settings.action in ("list", "verify"):
        return _told(settings.run, [*_look(folders, read=settings.action == "verify")], settings.action)
    with alone(settings.run):
        return _prune(settings, folders) if settings.action == "prune" else _repair(settings, folders)


def _refuse_unused(settings: Ckpt) -> None:
    uses = {"prune": {"keep", "keep_every", "dry_run"}, "repair": {"dry_run"}}.get(settings.action or "", set())
    if unused := sorted(settings.model_fields_set & {"keep", "keep_every", "dry_run"} - uses):
        raise MaekitError(
            "E-CONFIG-BOTH", f"maekit ckpt {settings.action}", found=f"--{unused[0].replace('_', '-')}",
            expected="settings that it reads", hint=f"maekit ckpt {settings.action} {settings.run}",
        )  # fmt: skip


def _look(folders: list[Path], *, read: bool) -> Iterator[Found]:
    """Yield every checkpoint, by folder and newest first.

    Args:
        read: compare the sums of what the files hold; otherwise only that they are there and as long as they should be.
    """
    for folder in folders:
        run = _identity(folder.parent / "config.yaml") if read else ""
        for path in checkpoint.steps(folder):
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            wrong, unread = "", False
            try:
                checkpoint.sound(path, run) if read else checkpoint.sizes(path)
            except MaekitError as error:
                wrong, unread = str(error.args[0]), error.code == "E-CKPT-READ"
            yield Found(path, checkpoint.number(path), size, wrong, unread)


def _identity(config: Path) -> str:
    """Return that of the run, if its config.yaml has one and can be read."""
    try:
        return str(load_yaml(config)["resolved"]["identity"])
    except (MaekitError, KeyError, TypeError):
        return ""


def _told(run: Path, found: list[Found], action: Literal["list", "verify"]) -> Result:
    good = {"list": "whole", "verify": "verified"}[action]
    lines = [(str(one.path.relative_to(run)), _size(one.size), one.wrong or good) for one in found]
    wrong = sum(bool(one.wrong) for one in found)
    end = [f"{len(found)} checkpoints, {_size(sum(one.size for one in found))}, {wrong} of them damaged"]
    if action == "list":
        end.append("sizes were compared; maekit ckpt verify reads the contents")
    if wrong:
        end.append(f"maekit ckpt repair {run} puts damaged ones aside; a run goes on from the newest that verifies")
    exit_code = int(action == "verify" and wrong > 0)
    return Result(_metrics(run, found), "\n".join([*aligned(lines), *end]), exit_code)


def _metrics(run: Path, found: list[Found]) -> dict[str, Any]:
    own = [one for one in found if one.path.parent.name == PLACES[0] and not one.wrong]
    listed = [
        {"path": str(one.path.relative_to(run)), "step": one.step, "bytes": one.size, "wrong": one.wrong or None}
        for one in found
    ]
    return {"run": str(run), "checkpoints": listed, "newest": max((one.step for one in own), default=None)}


def _prune(settings: Ckpt, folders: list[Path]) -> Result:
    """Delete by folder all but the newest that verify; those that do not verify are left to `repair`."""
    assert settings.run is not None
    found = [*_look([path for path in folders if path.name == PLACES[0]], read=True)]
    doomed: list[Found] = []
    for folder in {one.path.parent: None for one in found}:
        good = [one for one in found if one.path.parent == folder and not one.wrong]
        doomed += [one for one in good[settings.keep :] if not settings.keep_every or one.step % settings.keep_every]
    if not settings.dry_run:
        for one in doomed:
            checkpoint.delete(one.path)
    word = "would delete" if settings.dry_run else "deleted"
    lines = [f"{word} {one.path.relative_to(settings.run)}, {_size(one.size)}" for one in doomed]
    damaged = [one for one in found if one.wrong]
    lines += [f"left alone, since it does not verify: {one.path.relative_to(settings.run)}" for one in damaged]
    lines.append(f"{word} {len(doomed)} of {len(found)} checkpoints, {_size(sum(one.size for one in doomed))}")
    stay = [one for one in found if one not in doomed or settings.dry_run]
    names = [str(one.path.relative_to(settings.run)) for one in doomed]
    return Result({**_metrics(settings.run, stay), "deleted": names}, "\n".join(lines))


def _repair(settings: Ckpt, folders: list[Path]) -> Result:
    """Put aside what is damaged, so that the same command that made the run makes it whole again."""
    run, done, dry = settings.run, [], settings.dry_run
    assert run is not None
    found = [*_look(folders, read=True)]
    for one in found:
        if one.unread:
            log.warning("left alone: %s", one.wrong)
        elif one.wrong:
            done.append(f"{_aside(run, one.path, dry)}: {one.wrong}")
    for folder in folders:
        leftovers = [path.name for path in checkpoint.leftovers(folder)]
        if leftovers and not dry:
            checkpoint.delete_leftovers(folder)
        done += [f"deleted the rest of an interrupted save: {(folder / name).relative_to(run)}" for name in leftovers]
    for stage in sorted({folder.parent for folder in folders}):
        done += _repair_beside(run, stage, dry)
    good = [one for one in found if not one.wrong]
    metrics = {**_metrics(run, good), "done": done}
    if not any(one.path.parent.name == PLACES[0] for one in good):
        raise MaekitError(
            "E-CKPT-DAMAGED", f"{run}", found="no checkpoint that verifies", expected="one to go on from",
            hint="the same command begins anew; --init takes up other weights",
        )  # fmt: skip
    lines = [f"would have {line}" for line in done] if dry else done
    end = "nothing is damaged" if not done else f"the same command that made {run} goes on"
    return Result(metrics, "\n".join([*lines, f"newest checkpoint: step {metrics['newest']}; {end}"]))


def _repair_beside(run: Path, stage: Path, dry: bool) -> Iterator[str]:
    """Mend what stands beside the checkpoints: half a line of metrics, a result or weights that cannot be read."""
    metrics = stage / "metrics.jsonl"
    records, lost = sort_metrics(metrics)
    if lost:
        yield f"{_aside(run, metrics, dry)}: {len(lost)} of its lines cannot be read, the others stay"
        if not dry:
            write_whole(metrics, "".join(json.dumps(record) + "\n" for record in records).encode())
    harmed = [path for path in sorted(stage.glob("*.safetensors")) if _unreadable(path)]
    result = stage / "result.json"
    if result.exists() and (harmed or not _is_json(result)):
        harmed.append(result)  # without it the run counts as unfinished, and makes its results again
    for path in harmed:
        yield f"{_aside(run, path, dry)}: it cannot be read, or says that what cannot be read is there"


def _unreadable(weights: Path) -> bool:
    try:
        load_model(weights)
    except MaekitError:
        return True
    return False


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return True


def _aside(run: Path, path: Path, dry: bool) -> str:
    """Put a file or folder of the run aside; return what was done."""
    place = checkpoint.set_aside(run, path, dry=dry)
    return f"moved {path.relative_to(run)} to {place.relative_to(run)}"


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
