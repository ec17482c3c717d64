"""Set two finished runs side by side: settings that differ, scores, and whether chance explains the difference.

Each side is one run or several, which are its seeds. What is compared is what the runs have left on the disk: nothing
is loaded and nothing runs. With several seeds scores are compared pair by pair; of one each the images themselves are,
where both have left what they said of the same ones (``predictions.parquet`` of a fine-tune, or a file of ``maekit
predict``).
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from maekit.config import differences, load_yaml, resolve, spell
from maekit.errors import MaekitError
from maekit.report.comparison import comparison_report, told
from maekit.scores.spread import Difference, bootstrapped, paired_over_seeds
from maekit.settings import Compare, Finetune, Partial, Pretrain, Probe, Quickstart, Robustness, Settings
from maekit.tasks import Result
from maekit.tasks.predictions import FILE, Predictions, read_predictions
from maekit.tasks.run_folder import typed

KINDS: dict[str, type[Settings]] = {
    kind.__name__.lower(): kind for kind in (Pretrain, Finetune, Partial, Probe, Quickstart, Robustness)
}
"""Verbs that leave a run folder with one score a name."""


NO_SCORES = ("images_per_second",)
OURS = {"report.html", "table.csv", "table.md"}


@dataclass(frozen=True)
class Side:
    """One run, or the seeds of one.

    Attributes:
        verb: that made them; "predict" for files of predictions.
        settings: of each run; none for files.
        scores: name -> one value per run; those that all of them have.
        said: what the only run said of each image, None for several or where nothing was kept.
    """

    paths: list[Path]
    verb: str
    settings: list[Settings]
    scores: dict[str, list[float]]
    said: Predictions | None


def compare(settings: Compare | dict[str, Any]) -> Result:
    """Return what two runs, or the seeds of two, have in common and what differs.

    Returns:
        a, b (paths), verb, rows (score, a, b: values; mean, low, high, p, paired, pairs of a minus b), settings
        (name -> both values), and where the images were compared how many each got right: only_a, only_b, both,
        neither.

    Raises:
        MaekitError: E-USAGE-RUN for less than two sides, E-CONFIG-RUN for what is no finished run, E-CONFIG-VERB for
            runs of two verbs, E-CONFIG-SEEDS for another number of seeds, E-DATA-LABELS, E-ENV-OUT.
    """
    settings = typed(Compare, settings)
    if not settings.a or not settings.b:
        raise MaekitError("E-USAGE-RUN", "two runs are compared", found="fewer", hint="maekit compare runs/a runs/b")
    a, b = _side(settings.a), _side(settings.b)
    if a.verb != b.verb:
        raise MaekitError(
            "E-CONFIG-VERB", "two runs", found=f"{a.paths[0]} of {a.verb}, {b.paths[0]} of {b.verb}",
            expected="two of the same verb", hint="maekit evaluate measures two encoders by the same protocols",
        )  # fmt: skip
    if len(a.paths) != len(b.paths):
        raise MaekitError(
            "E-CONFIG-SEEDS", "two arms", found=f"{len(a.paths)} and {len(b.paths)} runs",
            expected="as many of each, in the order of the seeds",
        )  # fmt: skip
    seeds = [[getattr(one, "seed", None) for one in side.settings] for side in (a, b)]
    if len(a.paths) > 1 and seeds[0] != seeds[1]:
        raise MaekitError(
            "E-CONFIG-SEEDS", "the seeds of two arms", found=f"{seeds[0]} and {seeds[1]}",
            expected="the same in the same order: they are compared pair by pair",
        )  # fmt: skip
    metrics: dict[str, Any] = {"a": [str(path) for path in a.paths], "b": [str(path) for path in b.paths]}
    metrics |= {"verb": a.verb, "rows": _rows(a, b), "settings": _settings(a, b)} | _images(a, b)
    if settings.out is not None:
        _only_ours(settings.out)
        comparison_report(settings.out, metrics)
    end = f"\nthe report: {settings.out}/report.html" if settings.out is not None else ""
    return Result(metrics, told(metrics) + end)


def _only_ours(folder: Path) -> None:
    """Refuse to write over what another verb has written.

    Raises:
        MaekitError: E-CONFIG-OUT.
    """
    if folder.exists() and not folder.is_dir():
        raise MaekitError("E-CONFIG-OUT", f"--out {folder}", found="a file", expected="a folder, or nothing yet")
    others = sorted(entry.name for entry in folder.iterdir() if entry.name not in OURS) if folder.exists() else []
    if others:
        raise MaekitError(
            "E-CONFIG-OUT", f"--out {folder}", found=f"other files: {', '.join(others[:3])}",
            expected="a folder of its own", hint="another --out",
        )  # fmt: skip


def _side(paths: list[Path]) -> Side:
    if len({path.resolve() for path in paths}) < len(paths):
        raise MaekitError(
            "E-CONFIG-SEEDS", "seeds of one arm", found=f"a run twice: {', '.join(map(str, paths))}",
            expected="runs of different seeds",
        )  # fmt: skip
    runs = [_run(path) for path in paths]
    verbs = {verb for verb, *_ in runs}
    if len(verbs) > 1:
        raise MaekitError("E-CONFIG-VERB", "seeds of one arm", found=" and ".join(sorted(verbs)), expected="one verb")
    names = [name for name in runs[0][2] if all(name in scores for *_, scores, _ in runs)]
    scores = {name: [found[name] for *_, found, _ in runs] for name in names}
    settings = [found for _, found, *_ in runs if found is not None]
    return Side(paths, runs[0][0], settings, scores, runs[0][3] if len(runs) == 1 else None)


def _run(path: Path) -> tuple[str, Settings | None, dict[str, float], Predictions | None]:
    """Return verb, settings, scores and predictions of one run folder or file of predictions."""
    if path.is_file():
        said = read_predictions(path)
        return "predict", None, {"top1": said.top1()}, said
    config, result = path / "config.yaml", path / "result.json"
    verb = str(load_yaml(config).get("verb")) if config.is_file() else ""
    if verb not in KINDS or not result.is_file():
        there = f"a run of {verb} that is not finished" if verb in KINDS else f"a run of {verb}" if verb else "no run"
        raise MaekitError(
            "E-CONFIG-RUN", f"{path}", found=there if path.exists() else "no such folder",
            expected=f"a finished run of {', '.join(KINDS)}, or a file of maekit predict",
        )  # fmt: skip
    try:
        metrics = dict(json.loads(result.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise MaekitError("E-CONFIG-RUN", f"{result}", found="no JSON", hint="run the same command again") from error
    found = {name: value for name, value in metrics.items() if isinstance(value, float) and name not in NO_SCORES}
    kept = path / FILE
    return verb, resolve(KINDS[verb], file=config)[0], found, read_predictions(kept) if kept.is_file() else None


def _rows(a: Side, b: Side) -> list[dict[str, Any]]:
    """Return one row per score that both have."""
    rows = []
    for name in (name for name in a.scores if name in b.scores):
        mine, theirs = a.scores[name], b.scores[name]
        found = Difference(mine[0] - theirs[0])
        if len(mine) > 1:
            found = paired_over_seeds(mine, theirs)
        elif name == "top1" and (pairs := _pairs(a, b)):
            found = bootstrapped([one for one, _ in pairs], [other for _, other in pairs])
        rows.append({"score": name, "a": mine, "b": theirs, **asdict(found)})
    return rows


def _pairs(a: Side, b: Side) -> list[tuple[bool, bool]]:
    """Return of each image whether a and b got it right; nothing where they have not judged the same images."""
    if a.said is None or b.said is None or a.said.images != b.said.images:
        return []
    return list(zip(a.said.right, b.said.right, strict=True))


def _images(a: Side, b: Side) -> dict[str, Any]:
    """Return how many images each side alone got right, both and neither."""
    pairs = _pairs(a, b)
    if not pairs:
        return {}
    return {
        "only_a": pairs.count((True, False)),
        "only_b": pairs.count((False, True)),
        "both": pairs.count((True, True)),
        "neither": pairs.count((False, False)),
    }


def _settings(a: Side, b: Side) -> dict[str, list[str]]:
    """Return the settings of the first runs that differ, as they are spelled."""
    if not a.settings or not b.settings:
        return {}
    found = differences(a.settings[0], b.settings[0])
    return {name: [spell(one), spell(other)] for name, (one, other) in found.items()}
