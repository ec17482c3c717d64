"""The table of `maekit evaluate`: what jobs found, by measure and arm, and what chance could have done."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from maekit.scores.spread import Difference, bootstrapped, paired_over_seeds
from maekit.tasks.protocols import LOWER_IS_BETTER, Arm, Job, Outcome

Values = dict[tuple[int, int, int], float]
"""By number of the encoder, seed and draw."""


def table_rows(arms: Sequence[Arm], jobs: Sequence[Job], done: dict[Job, Outcome]) -> list[dict[str, Any]]:
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


def cost_of_arms(
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
