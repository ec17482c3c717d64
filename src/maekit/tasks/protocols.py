"""One protocol on one encoder with one seed: what `maekit evaluate` fills its table with.

A `Job` says what is measured, an `Outcome` what was found. Frozen protocols share one extraction of the features; the
trained ones are the verbs themselves, each in a run folder of its own that goes on where it was stopped. Scores are
those that ``maekit knn``, ``probe``, ``lowshot``, ``finetune`` and ``robustness`` give for the same settings.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from maekit.config import resolve
from maekit.data.sources import Source, label_subset
from maekit.errors import MaekitError
from maekit.scores.neighbours import nearest, vote
from maekit.settings import Evaluate, Finetune, Knn, Probe, Robustness, Settings
from maekit.tasks import Result
from maekit.tasks.features import Features, extract_both, load_encoder, rows_of
from maekit.tasks.finetune import finetune
from maekit.tasks.predictions import FILE, read_predictions
from maekit.tasks.probe import probe, solve
from maekit.tasks.robustness import robustness
from maekit.train.device import World

S = TypeVar("S", bound=Settings)
FROZEN = ("knn", "logistic", "lowshot")
PROBES = ("lars", "attentive")
ON_CLASSIFIER = ("occlusion", "corruptions")
PROTOCOLS = (*FROZEN, *PROBES, "finetune", *ON_CLASSIFIER)
SUITES = {"quick": FROZEN, "full": (*FROZEN, *PROBES, "finetune", "occlusion")}
UNEVEN = 2
"""From so many times the images of the smallest class in the largest, accuracy alone tells of the largest."""
LOWER_IS_BETTER = ("corruptions error", "corruptions mCE")


@dataclass(frozen=True)
class Arm:
    """One line-up of the table.

    Attributes:
        runs: its weights; several are seeds of the pre-training.
        random: the architecture of `runs` with random weights.
    """

    name: str
    runs: tuple[Path, ...]
    random: bool = False


@dataclass(frozen=True)
class Job:
    """One protocol on one encoder.

    Attributes:
        number: of the encoder among the arm's.
        labels: part of the training labels; None: all.
        seed: of the label draw and of what is trained.
        name: of its file or folder; holds a digest of all that decides the scores.
    """

    protocol: str
    arm: Arm
    number: int
    labels: str | None
    seed: int
    name: str = ""

    @property
    def run(self) -> Path:
        """The encoder's weights."""
        return self.arm.runs[self.number]


@dataclass(frozen=True)
class Outcome:
    """What a job found.

    Attributes:
        scores: measure -> values: one, or one per draw.
        right: measure -> "1" or "0" for each image scored on, where the protocol says it.
        seconds: that it took.
        feature_seconds: of the extraction that it shares with others.
        memory: peak in MiB, None where nothing can be measured.
    """

    scores: dict[str, list[float]]
    right: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    feature_seconds: float = 0.0
    memory: float | None = None


class Stopped(Exception):
    """A verb was stopped and can go on."""


# --------------------------------------------------------------------------------------------- frozen features


def frozen(
    settings: Evaluate, jobs: Sequence[Job], train: Source, val: Source, here: World
) -> Iterator[tuple[Job, Outcome]]:
    """Yield the outcomes of jobs on the frozen features of one encoder, which are extracted once."""
    images = {job: _images(settings, job, train) for job in jobs}
    used = sorted(set().union(*images.values()))
    places = {image: place for place, image in enumerate(used)}
    part = train.subset(used)
    began = time.perf_counter()
    with peak_memory(here.device) as memory:
        of = jobs[0]
        asked = _of(
            Knn, settings, run=of.run, random_init=of.arm.random, seed=settings.seed + of.number, labels=None
        )  # fmt: skip
        bank, queries = extract_both(load_encoder(asked, here), part, val, here, asked)
        extraction = time.perf_counter() - began
        for job in jobs:
            began = time.perf_counter()
            rows = rows_of(bank, [places[image] for image in images[job]])
            if job.protocol == "lowshot":
                outcome = _lowshot(settings, part, bank, queries)
            elif job.protocol == "knn":
                outcome = _judged("knn", _knn(rows, queries), queries.labels)
            else:
                outcome = _judged("logistic", _logistic(rows, queries, settings.seed), queries.labels)
            yield (
                job,
                replace(outcome, seconds=time.perf_counter() - began, feature_seconds=extraction, memory=memory()),
            )


def _images(settings: Evaluate, job: Job, train: Source) -> list[int]:
    """Return the training images that a job has need of."""
    if job.protocol != "lowshot":
        return label_subset(train, job.labels, settings.label_seed + job.seed)
    most = f"{max(settings.shots)}/class"  # fewer of a draw lie within more
    return sorted({i for draw in range(settings.draws) for i in label_subset(train, most, settings.label_seed + draw)})


def _knn(bank: Features, queries: Features) -> Tensor:
    fresh, num_classes = Knn(), int(bank.labels.max()) + 1
    found = nearest(bank.values, queries.values, fresh.k[0])
    return vote(found, bank.labels, num_classes, k=fresh.k[0], temperature=fresh.temperature[0])


def _logistic(bank: Features, queries: Features, seed: int) -> Tensor:
    return solve(bank, queries, seed, torch.device("cpu"))[1]


def _lowshot(settings: Evaluate, train: Source, bank: Features, queries: Features) -> Outcome:
    """Return a value per draw; what was right is not kept, since there are draws to compare."""
    found: dict[str, list[float]] = {}
    for count in dict.fromkeys(settings.shots):
        for draw in range(settings.draws):
            rows = rows_of(bank, label_subset(train, f"{count}/class", settings.label_seed + draw))
            said = _logistic(rows, queries, settings.seed + draw)
            for measure, values in _judged(f"lowshot {count}/class", said, queries.labels).scores.items():
                found.setdefault(measure, []).extend(values)
    return Outcome(found)


def _judged(measure: str, said: Tensor, labels: Tensor) -> Outcome:
    """Return top-1, and where one class has more than twice the images of another the mean recall of the classes."""
    right = said == labels
    scores = {measure: [float(right.double().mean())]}
    counts = labels.bincount()
    counts = counts[counts > 0]
    if counts.max() > UNEVEN * counts.min():
        recalls = [float(right[labels == label].double().mean()) for label in labels.unique()]
        scores[f"{measure} balanced"] = [sum(recalls) / len(recalls)]
    return Outcome(scores, {measure: _as_text(right.tolist())})


def _as_text(right: list[bool]) -> str:
    return "".join("01"[one] for one in right)


# -------------------------------------------------------------------------------------- what is trained or attacked


def trained(settings: Evaluate, job: Job, folder: Path, classifier: Path | None, here: World) -> Outcome:
    """Run the verb of a job in `folder`, which gets a run folder of the job's name.

    Args:
        classifier: run folder of the fine-tune that a protocol of `ON_CLASSIFIER` attacks.

    Raises:
        Stopped: it was stopped with a checkpoint.
    """
    out = folder / job.name
    right: dict[str, str] = {}
    began = time.perf_counter()
    with peak_memory(here.device) as memory:
        if job.protocol == "finetune":
            found = _done(finetune(finetune_settings(settings, job, out)))
            scores = {"finetune": [found["top1"]], "finetune macro F1": [found["macro_f1"]]}
            right = {"finetune": _as_text(read_predictions(out / FILE).right)}
        elif job.protocol in PROBES:
            scores = {job.protocol: [_done(probe(probe_settings(settings, job, out)))["top1"]]}
        else:
            found = _done(robustness(robustness_settings(settings, job, out, classifier)))
            scores = _attacked(job.protocol, found)
        return Outcome(scores, right, seconds=time.perf_counter() - began, memory=memory())


def _attacked(protocol: str, found: dict[str, Any]) -> dict[str, list[float]]:
    """Return the scores of a classifier under attack: mean errors, or the mean accuracy over fractions above 0."""
    if protocol == "corruptions":
        mce = {} if found.get("mce") is None else {"corruptions mCE": [found["mce"]]}
        return {"corruptions error": [found["mean_error"]]} | mce
    curves = {way: [top1 for fraction, top1 in points if fraction] for way, points in found["curves"].items()}
    return {f"occlusion {way}": [sum(values) / len(values)] for way, values in curves.items() if values}


def finetune_settings(settings: Evaluate, job: Job, out: Path | None = None) -> Finetune:
    """Return the settings of a job's fine-tune."""
    given = resolve_named(Finetune, settings.finetune)
    if given.task != "classes" or given.eval_only or given.from_scratch or given.new_head:
        raise MaekitError(
            "E-CONFIG-TASK", f"--finetune {settings.finetune}",
            found=f"task {given.task}, eval_only {given.eval_only}, from_scratch {given.from_scratch}, "
            f"new_head {given.new_head}",
            expected="the training of encoders for classes; random weights are an arm of their own",
        )  # fmt: skip
    return _of(
        Finetune, settings, given,
        run=job.run, from_scratch=job.arm.random, labels=job.labels, label_seed=settings.label_seed + job.seed,
        seed=_seed(settings, job), out=out, resume=None, pool=settings.pool or given.pool,
    )  # fmt: skip


def probe_settings(settings: Evaluate, job: Job, out: Path | None = None) -> Probe:
    """Return the settings of a job's trained probe."""
    given = resolve_named(Probe, settings.probe)
    return _of(
        Probe, settings, given,
        run=job.run, random_init=job.arm.random, labels=job.labels, label_seed=settings.label_seed + job.seed,
        seed=_seed(settings, job), out=out, protocol=job.protocol,
        pool=None if job.protocol == "attentive" else settings.pool or given.pool,
    )  # fmt: skip


def robustness_settings(settings: Evaluate, job: Job, out: Path | None = None, run: Path | None = None) -> Robustness:
    """Return the settings of a job that attacks a classifier."""
    given = resolve_named(Robustness, settings.robustness)
    return _of(Robustness, settings, given, run=run, out=out, protocol=job.protocol, seed=given.seed)


def _seed(settings: Evaluate, job: Job) -> int:
    """Return the seed of what is trained; each of several encoders of random weights has weights of its own."""
    return settings.seed + job.seed + (1000 * job.number if job.arm.random else 0)


def resolve_named(kind: type[S], word: str | None) -> S:
    """Return settings that a recipe's name or a YAML file gives.

    Raises:
        MaekitError: E-CONFIG-.
    """
    if word is None:
        return resolve(kind)[0]
    is_file = word.endswith((".yaml", ".yml")) or Path(word).is_file()
    return resolve(kind, file=Path(word))[0] if is_file else resolve(kind, recipe=word)[0]


def _of(kind: type[S], settings: Evaluate, given: Settings | None = None, **values: Any) -> S:
    """Return settings of a verb: `given`, over them what it shares with the table's, over them `values`."""
    shared = ("data", "image_column", "label_column", "workers", "val_data", "labels", "label_seed", "cache", "pool",
              "device", "seed")  # fmt: skip
    mine = {name: getattr(settings, name) for name in shared if name in kind.model_fields}
    if kind is Robustness and settings.val_data is not None:
        mine |= {"data": settings.val_data, "all_images": True}
    return kind.model_validate((given.model_dump() if given else {}) | mine | values)


def _done(result: Result) -> dict[str, Any]:
    if result.exit_code:
        raise Stopped
    return dict(result.metrics)


# ------------------------------------------------------------------------------------------------------- memory


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], float | None]]:
    """Give a function that returns the peak since now in MiB: of the GPU, or of this process where Linux tells."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device) / 2**20
        return
    with contextlib.suppress(OSError):  # proc(5): 5 sets the high-water mark back
        Path("/proc/self/clear_refs").write_text("5")
    yield _high_water


def _high_water() -> float | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    return None


def check_names(words: Sequence[str]) -> list[str]:
    """Return the protocols that ``--suite`` names, each once.

    Raises:
        MaekitError: E-CONFIG-SUITE.
    """
    unknown = [word for word in words if word not in SUITES and word not in PROTOCOLS]
    if unknown:
        raise MaekitError(
            "E-CONFIG-SUITE", "setting suite", found=", ".join(unknown),
            expected=f"{', '.join(SUITES)} or some of {', '.join(PROTOCOLS)}",
        )  # fmt: skip
    chosen = {protocol for word in words for protocol in SUITES.get(word, (word,))}
    if chosen & set(ON_CLASSIFIER):
        chosen.add("finetune")
    return [protocol for protocol in PROTOCOLS if protocol in chosen]
