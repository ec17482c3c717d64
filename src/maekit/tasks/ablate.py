"""Run a table of the paper on a user's images: each row pre-trained, probed, fine-tuned, beside its figures.

A row and a seed make `maekit.tasks.parts`: a pre-training, a linear probe and a fine-tune of it, each the verb itself
in a run folder of its own. The folders lie in ``--parts`` and are named by a digest of what decides them, so rows,
seeds and tables share what they have in common; ``OUT/rows/ROW/seed-S/{pretrain,probe,finetune}`` are links to them.
Seed s is the seed of weights, masks and order, and draws the labels: the same for every row, so rows are compared seed
by seed.
"""

import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from maekit import config
from maekit import settings as declared
from maekit.data.check import survey
from maekit.data.sources import Source, label_subset
from maekit.errors import MaekitError, clean
from maekit.model.masking import check_masking
from maekit.recipes import cost
from maekit.recipes.scales import Plan, default_of, plan
from maekit.recipes.tables import TABLES, Row, Table
from maekit.report.ablation import ablation_report, planned, told
from maekit.scores.ordering import ordering, stated_pairs, summary
from maekit.settings import Ablate, Finetune, Pretrain, Probe
from maekit.tasks import STOPPED, Result
from maekit.tasks.feature_cache import data_digest
from maekit.tasks.features import whole_splits
from maekit.tasks.parts import Outcome, Part, beside, devices, in_this_process, make_part, slurm, work_off
from maekit.tasks.pretrain import new_model
from maekit.tasks.run_folder import Resolved, Run, carry_out, describe, finish, open_run, outside, typed
from maekit.tasks.same_data import same_data
from maekit.train.device import resolve_device
from maekit.train.log import clock

log = logging.getLogger("maekit")

TRY_SECONDS = 10.0
"""Of the steps that ``--dry-run`` times, after one that is not counted."""
VOCABULARY: int = declared.Tokenizer.model_fields["vocabulary"].default
FITTED = {"pca": "pca", "token": "tokenizer"}
"""Target -> the verb that fits what it needs."""
OF_THE_COMMAND = ("data", "image_column", "label_column", "workers", "val_data", "labels", "label_seed", "device",
                  "seed", "out", "run", "recipe", "resume", "stop_at", "target_from")  # fmt: skip
"""Settings that ``--pretrain`` and ``--finetune`` cannot give: the table decides them."""


@dataclass
class Line:
    """A row of the table and all that is run for it.

    Attributes:
        row: as the paper has it.
        plan: what it is at this scale.
        runs: seed -> verb -> part; empty where the row is absent.
    """

    row: Row
    plan: Plan
    runs: dict[int, dict[str, Part]] = field(default_factory=dict)


def ablate(settings: Ablate | dict[str, Any]) -> Result:
    """Run the table, or what is missing of it.

    ``--out`` gets ablation.html, .md, .csv, .json and .png and links to the runs of each row and seed.

    Args:
        settings: as on the command line; a dictionary is checked like a config file.

    Returns:
        run, table, scale, rows (name, label, paper, scores by measure and seed, cost), ordering, summary; exit code 75
        if stopped, 1 if a row failed; with dry_run rows, flops, seconds and disk_mib.

    Raises:
        MaekitError: for everything a user can cause, all that can be known before the first step at once.
    """
    settings = typed(Ablate, settings)
    table = table_of(settings.table)
    wanted = _wanted(settings, table)
    out = settings.out or Path("runs") / f"ablate-{table.name}"
    settings = settings.model_copy(update={"table": table.name, "parts": settings.parts or out.parent / "ablate-parts"})
    if settings.slurm and settings.jobs != "slurm":
        raise MaekitError("E-CONFIG-IDLE", "setting slurm", found=f"jobs {settings.jobs}", expected="--jobs slurm")
    train, val = whole_splits(settings)
    lines = _lines(settings, table, wanted, train, val)
    if settings.dry_run:
        return _dry(settings, table, lines, train)
    runner = _runner(settings)
    assert settings.parts is not None
    outside(settings.parts, settings.data)
    run = open_run(out, "ablate", settings)
    again = replace(run, result=None)  # a finished table may have grown by a seed or row; what it holds costs nothing
    return carry_out(again, lambda: _fill(settings, table, lines, again, runner, train, val))


def table_of(word: str | None) -> Table:
    """Return the table that a word names, whole or by its beginning.

    Raises:
        MaekitError: E-CONFIG-TABLE for none or several, E-CONFIG-ROW for one that cannot be trained.
    """
    fits = [name for name in TABLES if word and (name == word or name.startswith(word))]
    fits = [word] if word in fits else fits
    if len(fits) != 1 or word is None:
        begun = [name[: len(word or "")] for name in TABLES]
        near = "" if word is None or fits else config.suggest(word, TABLES) or config.suggest(word, begun)
        what = "no table named" if word is None else f"table {clean(word, 60)!r}"
        raise MaekitError(
            "E-CONFIG-TABLE", what + near, found=f"the beginning of {', '.join(fits)}" if fits else None,
            expected="one of " + ", ".join(TABLES) if not near and not fits else None, hint="maekit recipes table",
        )  # fmt: skip
    table = TABLES[fits[0]]
    if table.refused:
        commands = list(dict.fromkeys(row.refused for row in table.rows))
        raise MaekitError(
            "E-CONFIG-TABLE", f"table {table.name}", found=table.refused, expected="a table of pre-trainings",
            hint=commands[0],
        )  # fmt: skip
    return table


def _wanted(settings: Ablate, table: Table) -> list[Row]:
    """Return the rows asked for, in the order of the table.

    Raises:
        MaekitError: E-CONFIG-ROW.
    """
    names = [row.name for row in table.rows]
    unknown = [word for word in settings.rows or [] if word not in names]
    if unknown:
        near = config.suggest(unknown[0], names)
        raise MaekitError(
            "E-CONFIG-ROW", f"row {clean(unknown[0], 60)!r} of {table.name}{near}", expected=", ".join(names),
            hint=f"maekit recipes {table.name}",
        )  # fmt: skip
    return [row for row in table.rows if settings.rows is None or row.name in settings.rows]


# ---------------------------------------------------------------------------------------------------- what to do


def _lines(settings: Ablate, table: Table, rows: Sequence[Row], train: Source, val: Source) -> list[Line]:
    """Return what is run for each row; a row that cannot be is absent, or refused where it was asked for by name.

    Raises:
        MaekitError: E-CONFIG-ROW, and those of the settings.
    """
    side, channels = _side(train), 1 if settings.data == "builtin:fashion" else None
    changes, tuned = _given(settings, Pretrain, "pretrain"), _given(settings, Finetune, "finetune")
    where = [data_digest(part) for part in (train, val)] + [resolve_device(settings.device).type]
    labelled = len(label_subset(train, _labels(settings), settings.label_seed))
    lines = []
    for row in rows:
        chosen = plan(
            table, row, settings.scale, side=side, channels=channels, pretrain=changes, finetune=tuned
        )  # fmt: skip
        reason = chosen.absent or _impossible(settings, chosen, channels)
        if reason and settings.rows is not None:
            raise MaekitError("E-CONFIG-ROW", f"row {row.name} of {table.name}", found=reason, hint="leave it out")
        line = Line(row, replace(chosen, absent=reason))
        if not reason:
            for seed in range(settings.seeds):
                line.runs[seed] = _parts(settings, line.plan, seed, where, len(train), labelled, len(val))
        lines.append(line)
    if not any(line.runs for line in lines):
        raise MaekitError("E-CONFIG-ROW", f"table {table.name}", found="no row that can be run at this scale")
    return lines


def _side(source: Source) -> int:
    """Return the median of the shorter sides of some images, in pixels."""
    sizes = sorted(min(size) for size in survey(source, limit=100).sizes.elements())
    if not sizes:
        raise MaekitError("E-DATA-BAD", source.name, found="no readable image among the first")
    return sizes[len(sizes) // 2]


def _labels(settings: Ablate) -> str | None:
    return settings.labels or (None if settings.scale == "paper" else "10%")


def _given(settings: Ablate, kind: type[declared.Settings], name: str) -> dict[str, Any]:
    """Return the settings that ``--pretrain`` or ``--finetune`` gives every row, as their class reads them.

    Raises:
        MaekitError: E-USAGE-WORD for a word without =, E-CONFIG-BOTH for what the table decides, E-CONFIG-.
    """
    words = getattr(settings, name)
    said: dict[str, object] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise MaekitError("E-USAGE-WORD", f"setting {name}", found=repr(word), expected="NAME=VALUE")
        said[key.replace("-", "_")] = value.split(",") if "," in value else value
    wrong = sorted(said.keys() & set(OF_THE_COMMAND))
    if wrong:
        raise MaekitError(
            "E-CONFIG-BOTH", f"setting {name}", found=", ".join(wrong), expected="settings of the training alone",
            hint=None if wrong[0] == "target_from" else f"maekit ablate --{wrong[0].replace('_', '-')} ...",
        )  # fmt: skip
    chosen, _ = config.resolve(kind, flags=said)
    return {key: getattr(chosen, key) for key in said}


def _impossible(settings: Ablate, chosen: Plan, channels: int | None) -> str:
    """Return why a row's model or masks cannot be, "" where they can."""
    if chosen.pretrain is None:
        return ""
    try:
        wanted = Pretrain.model_validate(chosen.pretrain | {"target": _plain_target(chosen.pretrain)})
        with torch.device("meta"):
            model = new_model(wanted, channels or wanted.channels or 3)
        if wanted.mask_kind != "none":
            check_masking(wanted.mask_kind, model.grid, wanted.mask_ratio, wanted.mask_unit)
    except MaekitError as error:
        return str(error.args[0])
    return ""


def _plain_target(values: dict[str, Any]) -> str:
    return "pixel" if values["target"] in FITTED else values["target"]


def _parts(
    settings: Ablate, chosen: Plan, seed: int, where: Sequence[str], images: int, labelled: int, scored: int
) -> dict[str, Part]:
    """Return the parts of a row and seed by verb, each after those it needs."""
    assert settings.parts is not None
    shared: dict[str, Any] = {
        name: getattr(settings, name) for name in ("data", "image_column", "label_column", "workers", "device")
    }
    of_labels = {"val_data": settings.val_data, "labels": _labels(settings), "label_seed": settings.label_seed + seed}
    found: dict[str, Part] = {}

    def add(verb: str, kind: Any, values: dict[str, Any], needs: tuple[Part, ...], flops: float) -> Part:
        found[verb] = make_part(verb, kind, values, settings.parts, where, needs, flops)  # type: ignore[arg-type]
        return found[verb]

    seeded = shared | {"seed": settings.seed + seed}
    run: dict[str, Any] = {}
    first: tuple[Part, ...] = ()
    macs = 0.0
    if chosen.pretrain is not None:
        wanted = Pretrain.model_validate(chosen.pretrain | seeded | {"target": _plain_target(chosen.pretrain)})
        verb = FITTED.get(chosen.pretrain["target"])
        fitted: tuple[Part, ...] = ()
        if verb is not None:
            kind = getattr(declared, verb.capitalize())
            same = {name: getattr(wanted, name) for name in kind.takes_only} | shared
            same = {name: value for name, value in same.items() if name in kind.model_fields}
            same |= chosen.tokenizer if verb == "tokenizer" else {}
            fitted = (add(verb, kind, same | {"seed": settings.seed}, (), 0.0),)  # once for all seeds
            chosen_target = {"target": chosen.pretrain["target"], "target_from": fitted[0].folder}
        else:
            chosen_target = {}
        real = wanted.model_copy(update={"target": chosen.pretrain["target"]})
        flops = 6.0 * _macs(real, chosen) * _seen(wanted, images)
        first = (add("pretrain", Pretrain, chosen.pretrain | seeded | chosen_target, fitted, flops),)
        run, macs = {"run": first[0].folder}, cost.encoder_macs(wanted)
    if chosen.probe is not None:
        kept = {"cache": "auto"}
        add("probe", Probe, chosen.probe | seeded | of_labels | run | kept, first, 2 * macs * (labelled + scored))
    tuned = Finetune.model_validate(chosen.finetune | seeded | of_labels | run)
    macs = macs or cost.encoder_macs(tuned)
    trained = _trained_share(tuned, chosen)
    add("finetune", Finetune, chosen.finetune | seeded | of_labels | run, first,
        (2 + 4 * trained) * macs * _seen(tuned, labelled) + 2 * macs * scored)  # fmt: skip
    return found


def _macs(wanted: Pretrain, chosen: Plan) -> float:
    """Return the multiplications of one image of a row's pre-training."""
    return sum(cost.pretraining_macs(wanted, chosen.tokenizer.get("vocabulary", VOCABULARY)))


def _trained_share(tuned: Finetune, chosen: Plan) -> float:
    """Return the share of the encoder's operations that a fine-tune goes back through."""
    if tuned.tune_blocks in (None, "all") or chosen.pretrain is None:
        return 1.0
    depth = cost.encoder_shape(Pretrain.model_validate(chosen.pretrain | {"target": "pixel"})).depth
    blocks = float(tuned.tune_blocks or 0)
    return min(1.0, (blocks if blocks != 0.5 else 2 / 3) / depth)  # an MLP is 8 of a block's 12 products


def _seen(chosen: Any, images: int) -> float:
    """Return the samples that a training goes through."""
    samples = images * getattr(chosen, "repeats", 1)
    if chosen.steps is not None:
        return float(chosen.steps * min(chosen.batch_size, samples))
    return float(chosen.epochs * samples)


# ------------------------------------------------------------------------------------------------------ doing it


def _runner(settings: Ablate) -> Any:
    if settings.jobs == "slurm":
        words = [word.partition("=") for word in settings.slurm]
        assert settings.parts is not None
        return slurm(settings.parts / "slurm", {name: _number(value) for name, _, value in words})
    return in_this_process if settings.jobs == 1 else beside(settings.jobs)


def _number(value: str) -> int | str:
    return int(value) if value.isdecimal() else value


def _every(lines: Sequence[Line]) -> list[Part]:
    """Return all parts, each once, seed by seed so that rows grow side by side, needs first."""
    seeds = max(len(line.runs) for line in lines)
    parts = [
        part for seed in range(seeds) for line in lines for part in _in_order(line.runs.get(seed, {}))
    ]  # fmt: skip
    return list({part.folder: part for part in parts}.values())


def _in_order(runs: dict[str, Part]) -> list[Part]:
    found: list[Part] = []
    for part in runs.values():
        found += [need for need in part.needs if need not in found] + [part]
    return found


def _fill(
    settings: Ablate, table: Table, lines: list[Line], run: Run, runner: Any, train: Source, val: Source
) -> Result:
    fingerprint = train.fingerprint()
    same_data(run, len(train), fingerprint)
    describe(run, settings, Resolved(images=len(train), fingerprint=fingerprint, classes=train.classes))
    parts = _every(lines)
    of: dict[Path, tuple[Line, int]] = {}
    for line in lines:
        for seed, runs in line.runs.items():
            for part in runs.values():
                of.setdefault(part.folder, (line, seed))
    _link(run.path, lines)
    if any(part.result is None for part in parts):
        (run.path / "result.json").unlink(missing_ok=True)
    else:
        log.info("all %d runs of the table are there already", len(parts))
    began, failed = time.monotonic(), dict[str, str]()
    spent = {"flops": 0.0}

    def write() -> dict[str, Any]:
        metrics = _metrics(settings, table, lines, parts, failed, run.path, train, val)
        ablation_report(run.path, metrics)
        return metrics

    def said(part: Part, number: int, count: int) -> None:
        line, seed = of[part.folder]
        row = lines.index(line) + 1
        left = _left(parts, spent["flops"], time.monotonic() - began)
        log.info(
            "run %d of %d: %s of row %s (%d of %d), seed %d%s",
            number, count, part.verb, line.row.name, row, len(lines), seed,
            f"; about {clock(left)} left" if left else "",
        )  # fmt: skip

    def done(part: Part) -> None:
        spent["flops"] += part.flops
        if part.verb != "pretrain":
            write()

    slots = settings.jobs if isinstance(settings.jobs, int) else len(parts)
    outcome = work_off(parts, runner, slots, said=said, done=done)
    failed |= outcome.failed
    return _end(outcome, write(), run)


def _left(parts: Sequence[Part], flops: float, seconds: float) -> float | None:
    """Estimate the seconds left, at the rate of what this launch has done."""
    if not flops:
        return None
    return seconds * sum(part.flops for part in parts if part.result is None) / flops


def _end(outcome: Outcome, metrics: dict[str, Any], run: Run) -> Result:
    if outcome.stopped:
        log.info("stopped: %d of %d runs are done; the same command goes on", metrics["done"], metrics["runs"])
        return Result(metrics, exit_code=STOPPED)
    if outcome.failed:
        return Result(metrics, f"{told(metrics)}\n{len(outcome.failed)} runs failed; {run.path}/ablation.html", 1)
    finish(run, metrics)
    return Result(metrics, f"{told(metrics)}\nthe report: {run.path}/ablation.html")


def _link(out: Path, lines: Sequence[Line]) -> None:
    """Lay links from rows and seeds to the runs; say how many finished ones no longer count."""
    left = list[str]()
    for line in lines:
        for seed, runs in line.runs.items():
            place = out / "rows" / line.row.name / f"seed-{seed}"
            place.mkdir(parents=True, exist_ok=True)
            for verb, part in runs.items():
                link, to = place / verb, os.path.relpath(part.folder.resolve(), place.resolve())
                if link.is_symlink() and os.readlink(link) == to:
                    continue
                if (link / "result.json").exists() and part.result is None:
                    left.append(link.resolve().name)
                link.unlink(missing_ok=True)
                link.symlink_to(to)
    if left:
        log.warning(
            "%d finished runs no longer count (%s, ...): images or their times of change are others, or maekit is; "
            "they stay where they are", len(left), left[0],
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------- what came out


def _metrics(
    settings: Ablate, table: Table, lines: Sequence[Line], parts: Sequence[Part], failed: dict[str, str], out: Path,
    train: Source, val: Source,
) -> dict[str, Any]:  # fmt: skip
    measures = [name for name in table.measures if name in ("finetune", "probe")]
    default = default_of(table, settings.scale)
    labelled = len(label_subset(train, _labels(settings), settings.label_seed))
    images = {"pretrain": len(train), "finetune": labelled}
    rows = [_row_metrics(line, measures, failed, images) for line in lines]
    for row in rows:
        row |= _speed_ups(row, next((other for other in rows if other["name"] == (row["reference"] or default)), None))
    orders: dict[str, list[dict[str, Any]]] = {}
    sentences: list[str] = []
    for measure in measures:
        published = {row["name"]: row["paper"][measure] for row in rows if measure in row["paper"]}
        scores = {row["name"]: row["scores"].get(measure, {}) for row in rows}
        says = [(better, worse) for what, better, worse in table.says if what == measure]
        found = ordering(published, {name: {int(s): v for s, v in of.items()} for name, of in scores.items()}, says)
        orders[measure] = [asdict(pair) for pair in found]
        able = {row["name"] for row in rows if not row["absent"]}
        stated = sum(better in able and worse in able for better, worse, _ in stated_pairs(published, says))
        name = {"finetune": "fine-tuned", "probe": "linear probe"}[measure]
        sentences.append(summary(name, found, stated - len(found)))
    return {
        "run": str(out), "table": table.name, "title": table.title, "source": table.source, "axis": table.axis,
        "scale": settings.scale, "data": settings.data, "labels": _labels(settings), "seeds": settings.seeds,
        "train_images": len(train), "val_images": len(val), "device": str(resolve_device(settings.device)),
        "default": default, "measures": measures, "rows": rows,
        "ordering": orders, "summary": sentences,
        "runs": len(parts), "done": sum(part.result is not None for part in parts), "failed": dict(failed),
    }  # fmt: skip


def _row_metrics(line: Line, measures: Sequence[str], failed: dict[str, str], images: dict[str, int]) -> dict[str, Any]:
    scores: dict[str, dict[str, float]] = {measure: {} for measure in measures}
    trained: list[dict[str, Any]] = []
    faults: list[str] = []
    for seed, runs in line.runs.items():
        for verb, part in runs.items():
            result = part.result
            if result is not None and verb in measures:
                scores[verb][str(seed)] = float(result["ema_top1"] if "ema_top1" in result else result["top1"])
            if result is not None and verb == _main_verb(line):
                trained.append(result | part.cost | _training_time(part, result, images[verb]))
            if part.folder.name in failed:
                faults.append(f"seed {seed}, {verb}: {failed[part.folder.name]}")
    first = line.runs[0][_main_verb(line)] if line.runs else None
    return {
        "name": line.row.name, "label": line.plan.label, "x": line.row.x, "paper": dict(line.row.paper),
        "reference": line.row.reference, "note": line.row.note, "absent": line.plan.absent, "scores": scores,
        "faults": faults,
        "flops": first.flops if first else None,
        "gflops_per_image": _per_image(line),
        "seconds": _mean(trained, "seconds"), "with_setup": any(each.get("with_setup") for each in trained),
        "sharing": max((each.get("sharing", 1) for each in trained), default=1),
        "images_per_second": _mean(trained, "images_per_second"),
        "memory_mib": max((cost["memory_mib"] for cost in trained if cost.get("memory_mib")), default=None),
        "runs": {
            str(seed): {verb: str(part.folder) for verb, part in runs.items()} for seed, runs in line.runs.items()
        },
    }  # fmt: skip


def _speed_ups(row: dict[str, Any], base: dict[str, Any] | None) -> dict[str, float | None]:
    """Return how many times faster than another row a row is, here and in the paper, as far as both are known."""
    if base is None:
        return {"speed_up": None, "speed_up_paper": None}
    alike = row["with_setup"] == base["with_setup"]
    hours, of_base = row["paper"].get("hours"), base["paper"].get("hours")
    return {
        "speed_up": base["seconds"] / row["seconds"] if alike and row["seconds"] and base["seconds"] else None,
        "speed_up_paper": of_base / hours if hours and of_base else None,
    }


def _training_time(part: Part, result: dict[str, Any], images: int) -> dict[str, Any]:
    """Return the seconds of the training itself, without set-up and report, or that it is not known.

    Args:
        part: a training.
        result: what it found.
        images: that it is trained on: a batch is no larger.
    """
    rate = float(result.get("images_per_second") or 0.0)
    if not rate:
        return {"with_setup": True}
    return {"seconds": result["steps"] * min(part.settings.model_dump()["batch_size"], images) / rate}


def _main_verb(line: Line) -> str:
    """Return the verb whose cost is the row's."""
    return "finetune" if line.plan.pretrain is None else "pretrain"


def _per_image(line: Line) -> float | None:
    """Return the operations of one image in a step of the row's training, forward and backward, in 10**9."""
    if not line.runs:
        return None
    chosen = line.runs[0][_main_verb(line)].settings
    if isinstance(chosen, Pretrain):
        return 6e-9 * _macs(chosen, line.plan)
    assert isinstance(chosen, Finetune)
    return 6e-9 * cost.encoder_macs(chosen)


def _mean(found: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [float(each[name]) for each in found if each.get(name) is not None]
    return sum(values) / len(values) if values else None


# --------------------------------------------------------------------------------------------------- a dry run


def _dry(settings: Ablate, table: Table, lines: list[Line], train: Source) -> Result:
    """Say what would be run, without running it: the default row's steps are timed, the rest scaled by operations."""
    parts = _every(lines)
    left = [part for part in parts if part.result is None]
    base = next((line for line in lines if line.row.name == default_of(table, settings.scale) and line.runs), None)
    base = base or next(line for line in lines if line.runs)
    rate = _measured_rate(base, resolve_device(settings.device))
    # runs on one device share it; as SLURM jobs they are taken to start at once, as far as they do not wait for others
    jobs = len(parts)
    if isinstance(settings.jobs, int):
        jobs = min(settings.jobs, devices(resolve_device(settings.device).type))
    rows = [
        {
            "name": line.row.name, "label": line.plan.label, "paper": dict(line.row.paper), "absent": line.plan.absent,
            "gflops_per_image": _per_image(line),
            "flops": sum(part.flops for runs in line.runs.values() for part in runs.values()),
            "seconds": sum(part.flops for runs in line.runs.values() for part in runs.values()) / rate,
            "runs": sum(len(runs) for runs in line.runs.values()),
        }
        for line in lines
    ]  # fmt: skip
    metrics: dict[str, Any] = {
        "table": table.name, "title": table.title, "scale": settings.scale, "rows": rows, "seeds": settings.seeds,
        "runs": len(parts), "done": len(parts) - len(left), "flops": sum(part.flops for part in left),
        "flops_per_second": rate, "seconds": sum(part.flops for part in left) / rate / max(1, jobs),
        "uncounted": sorted({part.verb for part in left if not part.flops}),
        "disk_mib": sum(_disk(part) for part in left) / 2**20, "timed": base.row.name,
        "device": str(resolve_device(settings.device)), "train_images": len(train),
    }  # fmt: skip
    return Result(metrics, planned(metrics))


def _measured_rate(line: Line, device: torch.device) -> float:
    """Time some steps of a row's training on random images; return operations a second, loading not counted."""
    chosen = line.runs[0][_main_verb(line)].settings
    if isinstance(chosen, Finetune):
        values = {n: getattr(chosen, n) for n in ("model", "img_size", "patch_size", "embed_dim", "depth", "num_heads")}
        chosen = Pretrain.model_validate({**values, "channels": chosen.channels, "decoder_depth": 1})
    assert isinstance(chosen, Pretrain)
    chosen = chosen.model_copy(update={"target": _plain_target({"target": chosen.target})})
    model = new_model(chosen, chosen.channels or 3).to(device).train()
    macs = sum(cost.pretraining_macs(chosen))
    batch = max(1, min(chosen.batch_size, math.ceil((2e9 if device.type == "cpu" else 5e12) / macs), 256))
    images = torch.randn(batch, len(model.mean), *model.img_size, device=device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        noise = torch.rand(batch, model.num_patches, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model.loss(images, noise, mask_ratio=chosen.mask_ratio)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    step()
    began, steps = time.monotonic(), 0
    while time.monotonic() - began < TRY_SECONDS and steps < 50:
        step()
        steps += 1
    return 6 * macs * batch * steps / (time.monotonic() - began)


def _disk(part: Part) -> float:
    """Return the bytes that a run leaves: weights with both moments of AdamW in two checkpoints, and the encoder."""
    chosen = part.settings
    if not isinstance(chosen, Pretrain | Finetune) or chosen.model is None:
        return 2e6
    shape = cost.encoder_shape(chosen)
    parameters = shape.depth * 12 * shape.width**2 + shape.values * shape.width
    decoder = chosen.decoder_depth * 12 * chosen.decoder_dim**2 if isinstance(chosen, Pretrain) else 0
    return 4.0 * (3 * (parameters + decoder) * min(2, chosen.keep) + parameters) + 2e6
