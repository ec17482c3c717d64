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
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maekit import __version__
from maekit.data.corrupt import check_pictures, corruptions
from maekit.data.sources import Source, label_subset
from maekit.errors import MaekitError, clean
from maekit.interchange.weights import load_model
from maekit.model.mae import MaskedAutoencoder, check_pool
from maekit.report.evaluation import evaluation_report, told
from maekit.report.files import write_whole
from maekit.settings import Evaluate, Finetune
from maekit.signals import settled
from maekit.tasks import STOPPED, Result
from maekit.tasks.feature_cache import data_digest
from maekit.tasks.features import whole_splits
from maekit.tasks.finetune import refuse_idle
from maekit.tasks.probe import check_protocol
from maekit.tasks.protocols import (
    FROZEN,
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
    resolve_named,
    robustness_settings,
    trained,
)
from maekit.tasks.robustness import check_settings
from maekit.tasks.run_folder import Resolved, Run, carry_out, deciding, describe, finish, open_run, typed
from maekit.tasks.scoreboard import cost_of_arms, table_rows
from maekit.tasks.training import default_out
from maekit.train.checkpoint import state_sha256
from maekit.train.device import World, world

log = logging.getLogger("maekit")

RANDOM = "random weights"
"""Name of the arm that every other has to beat."""
LONGEST = 60
"""Letters of an arm's name, which is part of file names."""
READ_BY = {
    "finetune": ("finetune",), "probe": PROBES, "robustness": ON_CLASSIFIER, "shots": ("lowshot",),
    "draws": ("lowshot",),
}  # fmt: skip
"""Settings that mean something to some protocols only."""


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
        encoders = _encoders(settings, arms, protocols)
        data = [data_digest(part) for part in (train, val)]
        jobs = [_named(settings, job, encoders, [*data, here.device.type]) for job in jobs]
        run = open_run(settings.out or default_out("evaluate", settings.data), "evaluate", settings)
        again = replace(run, result=None)  # a finished table may have grown by an arm; what it holds costs nothing
        return carry_out(again, lambda: _fill(settings, arms, jobs, encoders, train, val, again, here))


# ---------------------------------------------------------------------------------------------------- what to do


def _arms(settings: Evaluate) -> list[Arm]:
    """Return the arms that the words name, and the one of random weights.

    Raises:
        MaekitError: E-USAGE-RUN without a word or for one that is no path, E-CONFIG-ARM for a name that is taken.
    """
    if not settings.runs:
        raise MaekitError("E-USAGE-RUN", "no weights named", hint="maekit evaluate runs/a runs/b --data my_classes")
    found: dict[str, list[Path]] = {}
    unnamed: set[str] = set()
    for word in settings.runs:
        name, equals, path = word.partition("=")
        if not equals or Path(word).exists():
            name, path = Path(word).name or str(Path(word).resolve().name), word
            if name in found:  # runs/a/seed0 and runs/b/seed0 are two arms; seeds of one are said to be by a name
                name = word
            unnamed.add(name)
        if not path or not Path(path).exists():
            raise MaekitError(
                "E-USAGE-RUN", f"arm {word!r}", found="no such file or folder", expected="PATH or NAME=PATH"
            )
        if not name or len(name) > LONGEST or name == RANDOM or (name in found and name in unnamed):
            raise MaekitError(
                "E-CONFIG-ARM", f"arm {clean(word, 100)!r}", found=f"the name {clean(name, 100)!r}",
                expected=f"a name of its own, of up to {LONGEST} letters", hint="NAME=PATH",
            )  # fmt: skip
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
    for name, readers in READ_BY.items():
        if getattr(settings, name) != Evaluate.model_fields[name].default and not set(protocols) & set(readers):
            raise MaekitError(
                "E-CONFIG-IDLE", f"setting {name}", found=f"suite {','.join(protocols)}",
                expected=f"{' or '.join(readers)} in the suite",
            )  # fmt: skip
    for spec in {job.labels for job in jobs}:
        label_subset(train, spec)
    if "lowshot" in protocols:
        label_subset(train, f"{max(settings.shots)}/class")
    if "corruptions" in protocols:
        corruptions()
    if "finetune" in protocols:
        refuse_idle(finetune_settings(settings, jobs[0]))
    for protocol in set(protocols) & set(PROBES):
        check_protocol(probe_settings(settings, replace(jobs[0], protocol=protocol)))
    for protocol in set(protocols) & set(ON_CLASSIFIER):
        check_settings(robustness_settings(settings, replace(jobs[0], protocol=protocol)))


@dataclass(frozen=True)
class Encoder:
    """What the table says of an encoder, so that no model has to stay in memory.

    Attributes:
        weights: digest of all of them.
        spec: its architecture.
        cost: parameters, gmac_per_image.
    """

    weights: str
    spec: str
    cost: dict[str, float]


def _encoders(settings: Evaluate, arms: Sequence[Arm], protocols: Sequence[str]) -> dict[Path, Encoder]:
    """Look at all weights once, by path.

    Raises:
        MaekitError: E-CKPT-, E-CONFIG-POOL, E-CONFIG-ARM for the same weights twice in one arm; for images too small
            to be corrupted as `check_pictures`.
    """
    pools = {settings.pool or "mean"}
    if "finetune" in protocols:
        pools.add(settings.pool or resolve_named(Finetune, settings.finetune).pool)
    found: dict[Path, Encoder] = {}
    for path in {path for arm in arms for path in arm.runs}:
        model = load_model(path)
        for pool in pools:
            check_pool(model.encoder, pool)
        if "corruptions" in protocols:
            check_pictures(torch.zeros(len(model.mean), *model.img_size, dtype=torch.uint8))
        digest = state_sha256({"encoder": model.encoder.state_dict()}, {})
        found[path] = Encoder(digest, json.dumps(model.spec, sort_keys=True, default=str), _cost(model))
    for arm in arms:
        if len({found[path].weights for path in arm.runs}) < len(arm.runs):
            raise MaekitError(
                "E-CONFIG-ARM", f"arm {arm.name!r}", found="the same weights twice: " + ", ".join(map(str, arm.runs)),
                expected="encoders of different seeds",
            )  # fmt: skip
    return found


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


def _named(settings: Evaluate, job: Job, encoders: dict[Path, Encoder], where: list[str]) -> Job:
    """Give a job the name of its file: what it is, and a digest of all that decides its scores.

    Args:
        where: digests of the images, kind of device.
    """
    encoder = encoders[job.run]
    decides: dict[str, Any] = {
        "maekit": __version__,
        "weights": encoder.spec if job.arm.random else encoder.weights,
        "where": where,
        "job": [job.protocol, job.labels, job.seed, job.number if job.arm.random else 0, settings.label_seed],
        "seed": settings.seed,
        "pool": settings.pool,
    }
    if job.protocol == "lowshot":
        decides |= {"shots": settings.shots, "draws": settings.draws}
    if job.protocol in PROBES:
        decides |= {"probe": deciding(probe_settings(settings, job))}
    if job.protocol == "finetune" or job.protocol in ON_CLASSIFIER:
        decides |= {"finetune": deciding(finetune_settings(settings, job))}
    if job.protocol in ON_CLASSIFIER:
        decides |= {"attack": deciding(robustness_settings(settings, job))}
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
    words = (job.protocol, job.arm.name, str(job.number), job.labels or "all", f"seed-{job.seed}", digest)
    return replace(job, name="_".join(re.sub(r"[^\w.-]+", "-", word) for word in words))


# ------------------------------------------------------------------------------------------------------ doing it


def _fill(
    settings: Evaluate, arms: list[Arm], jobs: list[Job], encoders: dict[Path, Encoder],
    train: Source, val: Source, run: Run, here: World,
) -> Result:  # fmt: skip
    describe(run, settings, Resolved(images=len(train), fingerprint=train.fingerprint(), classes=train.classes))
    kept = run.path / "scores"
    done = {job: outcome for job in jobs if (outcome := _read(kept / f"{job.name}.json")) is not None}
    if done:
        log.info("%d of %d scores are there already", len(done), len(jobs))
    for job in [job for job in jobs if job not in done and job.protocol in ON_CLASSIFIER]:
        classifier = _classifier(job, jobs)
        if not (run.path / "runs" / classifier.name).exists():  # taken away: there is nothing to attack
            done.pop(classifier, None)
    left = [job for job in jobs if job not in done]
    if left:
        (run.path / "result.json").unlink(missing_ok=True)
    costs = {arm.name: encoders[arm.runs[0]].cost for arm in arms}

    def table() -> dict[str, Any]:
        metrics: dict[str, Any] = {"run": str(run.path), "arms": {a.name: [str(p) for p in a.runs] for a in arms}}
        metrics |= {"rows": table_rows(arms, jobs, done), "cost": cost_of_arms(costs, arms, done)}
        metrics |= {"train_images": len(train), "val_images": len(val), "jobs": len(jobs), "jobs_done": len(done)}
        evaluation_report(run.path, metrics)
        return metrics

    try:
        for job, outcome in _outcomes(settings, left, jobs, train, val, run.path / "runs", here):
            write_whole(kept / f"{job.name}.json", (json.dumps(asdict(outcome)) + "\n").encode())
            done[job] = outcome
            log.info("%d/%d %s: %s", len(done), len(jobs), _spoken(job), _said(outcome))
    except (KeyboardInterrupt, SystemExit, Stopped) as stop:
        if not done and not isinstance(stop, Stopped):
            raise
        settled()
        table()
        log.info("stopped: %d of %d scores are kept; the same command goes on", len(done), len(jobs))
        return Result({"run": str(run.path), "jobs": len(jobs), "jobs_done": len(done)}, exit_code=STOPPED)
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
            attacked = folder / _classifier(job, jobs).name if job.protocol in ON_CLASSIFIER else None
            yield job, trained(settings, job, folder, attacked, here)


def _classifier(job: Job, jobs: Sequence[Job]) -> Job:
    """Return the fine-tune that a job attacks: that of the same encoder, labels and seed."""
    same = replace(job, protocol="finetune", name="")
    return next(other for other in jobs if replace(other, name="") == same)


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
