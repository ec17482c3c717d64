"""Score several encoders by the same protocols, side by side in one table.

Arms (encoders, several seeds of each where there are) x protocols x parts of the labels x seeds make jobs
(`maekit.tasks.protocols`). Each outcome is a file of its own in ``OUT/scores``, named by a digest of all that decides
it, so the same command measures only what is not there yet: after a stop, with one more arm, protocol or seed. Seeds
are the same for every arm: seed s draws the same labels for each and starts each training alike, so scores are compared
pair by pair.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maekit import __version__
from maekit.data.corrupt import corruptions
from maekit.data.sources import Source, label_subset
from maekit.errors import MaekitError
from maekit.interchange.weights import load_model
from maekit.model.mae import MaskedAutoencoder, check_pool
from maekit.report.evaluation import evaluation_report, told
from maekit.report.files import write_whole
from maekit.scores.spread import Difference, bootstrapped, paired_over_seeds
from maekit.settings import Evaluate
from maekit.tasks import Result
from maekit.tasks.features import whole_splits
from maekit.tasks.protocols import (
    FROZEN,
    LOWER_IS_BETTER,
    ON_CLASSIFIER,
    PROBES,
    Arm,
    Job,
    Outcome,
    Stopped,
    check_names,
    finetune_settings,
    frozen,
    probe_settings,
    robustness_settings,
    trained,
)
from maekit.tasks.run_folder import Resolved, Run, carry_out, describe, finish, open_run, same_data, typed
from maekit.tasks.training import default_out
from maekit.train.checkpoint import state_sha256
from maekit.train.device import World, world

log = logging.getLogger("maekit")

RANDOM = "random weights"
"""Name of the arm that every other has to beat."""

Values = dict[tuple[int, int, int], float]
"""By number of the encoder, seed and draw."""


def evaluate(settings: Evaluate | dict[str, Any]) -> Result:
    """Fill the table, or what is missing of it.

    ``--out`` gets report.html, table.csv, table.md, result.json, the outcome of each job in scores/ and the run folders
    of what was trained in runs/.

    Args:
        settings: as on the command line; a dictionary is checked like a config file.

    Returns:
        run, arms, rows (measure, labels, better, arms: mean, deviation, values; differences to the first arm: mean,
        low, high, p, paired, pairs), cost, train_images, val_images; exit code 75 if stopped with scores to go on from.

    Raises:
        MaekitError: for everything a user can cause, all that can be known before the first score at once.
    """
    settings = typed(Evaluate, settings)
    protocols, arms = check_names(settings.suite), _arms(settings)
    with world(settings.device) as here:
        if here.size > 1:
            raise MaekitError(
                "E-CONFIG-NPROC", "evaluate", found=f"{here.size} processes", expected="one; its trainings may be more",
                hint="nproc in the YAML file of --finetune",
            )  # fmt: skip
        train, val = whole_splits(settings)
        jobs = _jobs(settings, arms, protocols)
        _check(settings, protocols, jobs, train)
        models = {(arm.name, number): load_model(path) for arm in arms for number, path in enumerate(arm.runs)}
        for model in models.values():
            check_pool(model.encoder, settings.pool or "mean")
        jobs = [_named(settings, job, models, train, val) for job in jobs]
        run = open_run(settings.out or default_out("evaluate", settings.data), "evaluate", settings)
        again = replace(run, result=None)  # a finished table may have grown by an arm; what it holds costs nothing
        return carry_out(again, lambda: _fill(settings, arms, jobs, models, train, val, again, here))


# ---------------------------------------------------------------------------------------------------- what to do


def _arms(settings: Evaluate) -> list[Arm]:
    """Return the arms that the words name, and the one of random weights.

    Raises:
        MaekitError: E-USAGE-RUN without a word or for one that is no path, E-CONFIG-ARM for a name that is taken.
    """
    if not settings.runs:
        raise MaekitError("E-USAGE-RUN", "no weights named", hint="maekit evaluate runs/a runs/b --data my_classes")
    found: dict[str, list[Path]] = {}
    for word in settings.runs:
        name, equals, path = word.partition("=")
        if not equals or Path(word).exists():
            name, path = Path(word).name or str(Path(word).resolve().name), word
            if name in found:  # runs/a/seed0 and runs/b/seed0 are two arms; seeds of one are said to be by a name
                name = word
        if not path or not Path(path).exists():
            raise MaekitError(
                "E-USAGE-RUN", f"arm {word!r}", found="no such file or folder", expected="PATH or NAME=PATH"
            )
        if not name or name == RANDOM or (not equals and name in found):
            raise MaekitError("E-CONFIG-ARM", f"arm {word!r}", found=f"the name {name!r}", expected="a name of its own")
        found.setdefault(name, []).append(Path(path))
    arms = [Arm(name, tuple(paths)) for name, paths in found.items()]
    return [*arms, Arm(RANDOM, arms[0].runs, random=True)] if settings.random_arm else arms


def _jobs(settings: Evaluate, arms: Sequence[Arm], protocols: Sequence[str]) -> list[Job]:
    """Return all jobs: the cheap protocols of every arm first, then by seed, so that arms grow side by side."""
    specs: list[str | None] = [None]
    if settings.labels is not None:
        specs = list(dict.fromkeys(part.strip() for part in settings.labels.split(",")))
    encoders = [(arm, number) for arm in arms for number in range(len(arm.runs))]
    jobs = [
        Job(protocol, arm, number, None if protocol == "lowshot" else spec, seed)
        for arm, number in encoders
        for protocol in protocols
        if protocol in FROZEN
        for spec in ([None] if protocol == "lowshot" else specs)
        for seed in range(1 if protocol == "lowshot" or spec in (None, "100%") else settings.seeds)
    ]
    return jobs + [
        Job(protocol, arm, number, spec, seed)
        for seed in range(settings.seeds)
        for spec in specs
        for protocol in protocols
        if protocol not in FROZEN
        for arm, number in encoders
    ]


def _check(settings: Evaluate, protocols: Sequence[str], jobs: Sequence[Job], train: Source) -> None:
    """Refuse before the first score what would be refused after hours.

    Raises:
        MaekitError: E-CONFIG-IDLE, E-DATA-LABELS, E-USAGE-LABELS, E-ENV-IMPORT, and those of the named settings.
    """
    users = {
        "finetune": (protocols, ("finetune",)), "probe": (protocols, PROBES), "robustness": (protocols, ON_CLASSIFIER),
        "shots": (protocols, ("lowshot",)), "draws": (protocols, ("lowshot",)),
    }  # fmt: skip
    fields = Evaluate.model_fields
    for name, (chosen, readers) in users.items():
        if getattr(settings, name) != fields[name].default and not set(chosen) & set(readers):
            raise MaekitError(
                "E-CONFIG-IDLE", f"setting {name}", found=f"suite {','.join(chosen)}",
                expected=f"{' or '.join(readers)} in the suite",
            )  # fmt: skip
    for spec in {job.labels for job in jobs}:
        label_subset(train, spec)
    if "lowshot" in protocols:
        label_subset(train, f"{max(settings.shots)}/class")
    if "corruptions" in protocols:
        corruptions()


def _named(
    settings: Evaluate, job: Job, models: dict[tuple[str, int], MaskedAutoencoder], train: Source, val: Source
) -> Job:
    """Give a job the name of its file: what it is, and a digest of all that decides its scores."""
    model = models[job.arm.name if not job.arm.random else next(iter(models))[0], job.number]
    decides: dict[str, Any] = {
        "maekit": __version__,
        "weights": _of_spec(model) if job.arm.random else state_sha256({"model": model.state_dict()}, {}),
        "data": [train.fingerprint(), val.fingerprint()],
        "job": [job.protocol, job.labels, job.seed, job.number if job.arm.random else 0, settings.label_seed],
        "seed": settings.seed,
        "pool": settings.pool,
    }
    if job.protocol == "lowshot":
        decides |= {"shots": settings.shots, "draws": settings.draws}
    if job.protocol in PROBES:
        decides |= {"probe": _deciding(probe_settings(settings, job))}
    if job.protocol == "finetune" or job.protocol in ON_CLASSIFIER:
        decides |= {"finetune": _deciding(finetune_settings(settings, job))}
    if job.protocol in ON_CLASSIFIER:
        decides |= {"attack": _deciding(robustness_settings(settings, job))}
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
    words = (job.protocol, job.arm.name, str(job.number), job.labels or "all", f"seed-{job.seed}", digest)
    return replace(job, name="_".join(re.sub(r"[^\w.-]+", "-", word) for word in words))


def _of_spec(model: MaskedAutoencoder) -> str:
    return json.dumps(model.spec, sort_keys=True, default=str)


def _deciding(settings: Any) -> dict[str, Any]:
    """Return the settings that change the numbers."""
    fields, values = type(settings).model_fields, settings.model_dump(mode="json")
    return {
        name: value
        for name, value in values.items()
        if (fields[name].json_schema_extra or {}).get("resume") == "same" and name not in ("run", "data")
    }


# ------------------------------------------------------------------------------------------------------ doing it


def _fill(
    settings: Evaluate, arms: list[Arm], jobs: list[Job], models: dict[tuple[str, int], MaskedAutoencoder],
    train: Source, val: Source, run: Run, here: World,
) -> Result:  # fmt: skip
    fingerprint = train.fingerprint()
    same_data(run, len(train), fingerprint)
    describe(run, settings, Resolved(images=len(train), fingerprint=fingerprint, classes=train.classes))
    kept = run.path / "scores"
    done = {job: outcome for job in jobs if (outcome := _read(kept / f"{job.name}.json")) is not None}
    if done:
        log.info("%d of %d scores are there already", len(done), len(jobs))
    left = [job for job in jobs if job not in done]
    costs = {arm.name: _cost(models[(arms[0] if arm.random else arm).name, 0]) for arm in arms}

    def table() -> dict[str, Any]:
        metrics: dict[str, Any] = {"run": str(run.path), "arms": {a.name: [str(p) for p in a.runs] for a in arms}}
        metrics |= {"rows": _rows(arms, jobs, done), "cost": _costs(costs, arms, done)}
        metrics |= {"train_images": len(train), "val_images": len(val), "jobs": len(jobs), "jobs_done": len(done)}
        evaluation_report(run.path, metrics)
        return metrics

    try:
        for job, outcome in _outcomes(settings, left, jobs, train, val, run.path / "runs", here):
            write_whole(kept / f"{job.name}.json", (json.dumps(asdict(outcome)) + "\n").encode())
            done[job] = outcome
            log.info("%d/%d %s: %s", len(done), len(jobs), _spoken(job), _said(outcome))
    except (KeyboardInterrupt, SystemExit, Stopped):
        if not done:
            raise
        table()
        log.info("stopped: %d of %d scores are kept; the same command goes on", len(done), len(jobs))
        return Result({"run": str(run.path), "jobs": len(jobs), "jobs_done": len(done)}, exit_code=75)
    metrics = table()
    finish(run, metrics)
    return Result(metrics, f"{told(metrics)}\nthe report: {run.path}/report.html")


def _outcomes(
    settings: Evaluate, left: Sequence[Job], jobs: Sequence[Job], train: Source, val: Source, folder: Path, here: World
) -> Iterable[tuple[Job, Outcome]]:
    cheap = [job for job in left if job.protocol in FROZEN]
    for _, of_one in groupby(cheap, key=lambda job: (job.arm.name, job.number)):
        yield from frozen(settings, list(of_one), train, val, here)
    for job in left:
        if job.protocol not in FROZEN:
            yield job, trained(settings, job, folder, _classifier(job, jobs, folder), here)


def _classifier(job: Job, jobs: Sequence[Job], folder: Path) -> Path | None:
    """Return the fine-tune that a job attacks: that of the same encoder, labels and seed."""
    if job.protocol not in ON_CLASSIFIER:
        return None
    same = replace(job, protocol="finetune", name="")
    return folder / next(other.name for other in jobs if replace(other, name="") == same)


def _read(path: Path) -> Outcome | None:
    """Return an outcome that is on the disk; one that is damaged is measured anew."""
    if not path.exists():
        return None
    try:
        return Outcome(**json.loads(path.read_text()))
    except (ValueError, TypeError, OSError) as error:
        log.warning("%s is damaged, it is measured anew: %s", path, error)
        return None


def _spoken(job: Job) -> str:
    return f"{job.protocol} of {job.arm.name}, labels {job.labels or 'all'}, seed {job.seed}"


def _said(outcome: Outcome) -> str:
    means = {measure: sum(values) / len(values) for measure, values in outcome.scores.items()}
    return ", ".join(f"{measure} {value:.4f}" for measure, value in means.items())


# ----------------------------------------------------------------------------------------------------- the table


def _rows(arms: Sequence[Arm], jobs: Sequence[Job], done: dict[Job, Outcome]) -> list[dict[str, Any]]:
    """Return one row per measure and part of the labels, in the order of the protocols."""
    order = {protocol: at for at, protocol in enumerate(dict.fromkeys(job.protocol for job in jobs))}
    found = [
        (order[job.protocol], job.labels or "all", measure)
        for job, outcome in done.items()
        for measure in outcome.scores
    ]
    lowshot = order.get("lowshot")
    rows = []
    for protocol, labels, measure in sorted(dict.fromkeys(found), key=lambda one: one[0]):
        values = {arm.name: _values(arm, labels, measure, done) for arm in arms}
        rows.append({
            "measure": measure,
            "labels": None if protocol == lowshot else labels,
            "better": "lower" if measure in LOWER_IS_BETTER else "higher",
            "arms": {name: summary(list(_units(found).values())) for name, found in values.items() if found},
            "differences": {
                arm.name: asdict(_difference(arms[0], arm, labels, measure, done))
                for arm in arms[1:]
                if values[arms[0].name] and values[arm.name]
            },
        })  # fmt: skip
    return rows


def summary(values: list[float]) -> dict[str, Any]:
    """Return mean and standard deviation (n - 1; None for one value) with the values themselves."""
    tensor = torch.tensor(values, dtype=torch.double)
    return {
        "mean": float(tensor.mean()),
        "deviation": float(tensor.std()) if len(values) > 1 else None,
        "values": values,
    }


def _values(arm: Arm, labels: str, measure: str, done: dict[Job, Outcome]) -> Values:
    return {
        (job.number, job.seed, draw): value
        for job, outcome in done.items()
        if job.arm == arm and (job.labels or "all") == labels
        for draw, value in enumerate(outcome.scores.get(measure, []))
    }


def _units(values: Values) -> dict[tuple[int, ...], float]:
    """Return what counts as independent: encoders where there are several, else seeds and draws of the one."""
    numbers = sorted({number for number, *_ in values})
    if len(numbers) < 2:
        return dict(sorted(values.items()))
    of = {number: [value for (which, *_), value in values.items() if which == number] for number in numbers}
    return {(number,): sum(each) / len(each) for number, each in of.items()}


def _difference(first: Arm, other: Arm, labels: str, measure: str, done: dict[Job, Outcome]) -> Difference:
    """Compare over seeds where there are two or more of both arms, else over the images that both have judged."""
    mine, theirs = (_units(_values(arm, labels, measure, done)) for arm in (first, other))
    common = [unit for unit in mine if unit in theirs]
    if len(common) > 1:
        found = paired_over_seeds([mine[unit] for unit in common], [theirs[unit] for unit in common])
        return replace(found, paired=_what_differs(common))
    right = [
        outcome.right[measure]
        for arm in (first, other)
        for job, outcome in done.items()
        if job.arm == arm and (job.labels or "all") == labels and measure in outcome.right
    ]
    if len(right) == 2 and len(right[0]) == len(right[1]):
        a, b = ([one == "1" for one in each] for each in right)
        return bootstrapped(a, b)
    return Difference(sum(mine.values()) / len(mine) - sum(theirs.values()) / len(theirs))


def _what_differs(units: Sequence[tuple[int, ...]]) -> str:
    if len(units[0]) == 1:
        return "encoders"
    return "draws" if len({draw for *_, draw in units}) > 1 else "seeds"


def _cost(model: MaskedAutoencoder) -> dict[str, float]:
    """Return what one image costs in the encoder: products counted, not timed."""
    images = torch.zeros(1, len(model.mean), *model.img_size)
    # attention as plain products: the counter does not know the fused kernel of the CPU
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval().features(images)
    return {
        "parameters": sum(p.numel() for p in model.encoder.parameters()),
        "gmac_per_image": counter.get_total_flops() / 2e9,
    }


def _costs(
    costs: dict[str, dict[str, float]], arms: Sequence[Arm], done: dict[Job, Outcome]
) -> dict[str, dict[str, Any]]:
    """Return by arm what one image costs, and of each protocol mean seconds of a job and peak memory in MiB."""
    found: dict[str, dict[str, Any]] = {}
    for arm in arms:
        mine = {job: outcome for job, outcome in done.items() if job.arm == arm}
        found[arm.name] = dict(costs[arm.name])
        found[arm.name]["seconds"] = {
            protocol: sum(each) / len(each)
            for protocol in dict.fromkeys(job.protocol for job in mine)
            if (each := [outcome.seconds for job, outcome in mine.items() if job.protocol == protocol])
        }
        features = [outcome.feature_seconds for outcome in mine.values() if outcome.feature_seconds]
        if features:
            found[arm.name]["seconds"] |= {"features": max(features)}
        found[arm.name]["memory_mib"] = max((outcome.memory or 0.0 for outcome in mine.values()), default=0.0) or None
    return found
