"""Kill it, starve it, lie to it, for as long as you like: a real small run under faults drawn at random.

Trial number N of seed S is always the same fault: ``--seed S --trial N`` does it again. Exit code 0 only if all
survived: the final state equal bit by bit to that of a run left in peace, every checkpoint on the disk verified,
nothing left behind.
"""

import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from maekit.errors import MaekitError
from maekit.report.evaluation import aligned
from maekit.seeds import mix
from maekit.settings import Soak
from maekit.soak import processes, storage
from maekit.soak.bench import Bench, make
from maekit.soak.children import Lost
from maekit.soak.fuzz import KINDS as MUTANT_KINDS
from maekit.soak.fuzz import fuzz
from maekit.tasks import Result
from maekit.tasks.run_folder import typed
from maekit.train.log import clock

log = logging.getLogger("maekit")

INTERRUPTED = 130
"""Exit code after ctrl-C, as `maekit.cli` has it; what was tried until then is told all the same."""
MUTANTS = 500
"""Damaged files that one trial of fuzz reads."""


def _mutants(bench: Bench, run: Path, random: Random) -> int:
    """Section 2 of docs/reliability.md: damaged files of one kind are read, or refused in one line."""
    kind, seed = random.choice(list(MUTANT_KINDS)), random.randrange(2**31)
    found = fuzz([kind], seed, mutants=MUTANTS, folder=run)[kind]
    if found.bad:
        raise Lost("; ".join(map(str, found.bad[:5])))
    return 0


Kind = Callable[[Bench, Path, Random], int]
KINDS: dict[str, tuple[Kind, int]] = {
    "kill": (processes.kill, 4),
    "failpoint": (storage.failpoint, 2),
    "signal": (processes.stop, 2),
    "two": (processes.two, 1),
    "worker": (processes.worker, 1),
    "flip": (storage.flip, 7),
    "truncate": (storage.truncate, 2),
    "missing": (storage.missing, 1),
    "swapped": (storage.swapped, 1),
    "errno": (storage.errno, 3),
    "unread": (storage.unread, 1),
    "full": (storage.full, 1),
    "clock": (storage.clock, 1),
    "hang": (processes.hang, 1),
    "nan": (processes.nan, 1),
    "memory": (processes.memory, 1),
    "fuzz": (_mutants, 2),
}
"""Kinds of faults, and how often each is drawn in proportion to the others."""


@dataclass
class Tally:
    """What became of the trials of a kind.

    Attributes:
        worst: most steps that had to be done again.
        lost: number of each trial that broke a promise, and which.
    """

    trials: int = 0
    worst: int = 0
    lost: list[tuple[int, str]] = field(default_factory=list)


def soak(settings: Soak | dict[str, Any]) -> Result:
    """Run trials for as long as asked, and count.

    Returns:
        kinds: of each, trials, survived, worst; lost: what to replay; exit code 1 if anything was lost.

    Raises:
        MaekitError: E-USAGE-KIND; E-ENV-SOAK if not even the run left in peace goes through.
    """
    settings = typed(Soak, settings)
    kinds = settings.kinds or list(KINDS)
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise MaekitError("E-USAGE-KIND", "setting kinds", found=unknown[0], expected=", ".join(KINDS))
    with tempfile.TemporaryDirectory(prefix="maekit-soak-") as folder:
        try:
            bench = make(Path(folder), settings.seed)
        except Lost as error:
            raise MaekitError("E-ENV-SOAK", "the run left in peace", found=str(error)) from error
        tallies = {kind: Tally() for kind in kinds}
        try:
            _trials(settings, tallies, bench)
            code = int(any(tally.lost for tally in tallies.values()))
        except KeyboardInterrupt:
            log.info("interrupted: what there is so far")
            code = INTERRUPTED
        finally:
            bench.children.close()
    return _result(settings, tallies, code)


def _trials(settings: Soak, tallies: dict[str, Tally], bench: Bench) -> None:
    log.info("reference run: %.1f s, state %s", bench.seconds, bench.digest[:12])
    end = time.monotonic() + 60 * settings.minutes
    number, told = settings.trial or 0, time.monotonic()
    while time.monotonic() < end:
        random = Random(mix(settings.seed, number))
        kind = random.choices(list(tallies), [KINDS[kind][1] for kind in tallies])[0]
        run = bench.folder / f"trial-{number}"
        tallies[kind].trials += 1
        before = bench.children.count
        try:
            tallies[kind].worst = max(tallies[kind].worst, KINDS[kind][0](bench, run, random))
        except Exception as error:  # what nobody has thought of is lost too, and no reason to end
            what = str(error) if isinstance(error, Lost) else f"{type(error).__name__}: {error}"
            tallies[kind].lost.append((number, what))
            log.warning("LOST trial %d, %s: %s%s", number, kind, what, _kept(settings, run, bench, before))
        finally:
            bench.children.end()
        shutil.rmtree(run, ignore_errors=True)
        if settings.trial is not None or bench.children.process.poll() is not None:
            break
        number += 1
        if time.monotonic() - told > 10:
            told = time.monotonic()
            lost = sum(len(tally.lost) for tally in tallies.values())
            log.info("%d trials, %d lost, %s left", number, lost, clock(max(0.0, end - told)))


def _kept(settings: Soak, run: Path, bench: Bench, before: int) -> str:
    """Keep the folder of a trial that lost something, and what its commands said: those after so many."""
    if settings.out is None:
        return ""
    place = settings.out / run.name
    shutil.rmtree(place, ignore_errors=True)
    if run.exists():
        shutil.copytree(run, place)
    for number in range(before + 1, bench.children.count + 1):
        shutil.copytree(bench.children.folder / str(number), place / "said" / str(number))
    return f" (kept in {place})"


def _result(settings: Soak, tallies: dict[str, Tally], code: int) -> Result:
    rows = [("kind", "trials", "survived", "worst: steps done again")]
    rows += [
        (kind, str(one.trials), str(one.trials - len(one.lost)), str(one.worst))
        for kind, one in tallies.items() if one.trials
    ]  # fmt: skip
    lost = [(number, kind, what) for kind, one in tallies.items() for number, what in one.lost]
    words = " ".join(["--kinds", ",".join(settings.kinds)] if settings.kinds else [])
    lines = [
        f"lost: {what}\n  again: maekit soak --seed {settings.seed} --trial {number} {words}".rstrip()
        for number, _, what in sorted(lost)
    ]
    total = sum(one.trials for one in tallies.values())
    metrics: dict[str, object] = {
        "seed": settings.seed, "trials": total, "survived": total - len(lost),
        "kinds": {
            kind: {"trials": one.trials, "survived": one.trials - len(one.lost), "worst": one.worst}
            for kind, one in tallies.items()
        },
        "lost": [{"trial": number, "kind": kind, "what": what} for number, kind, what in sorted(lost)],
    }  # fmt: skip
    mutants = MUTANTS * tallies["fuzz"].trials if "fuzz" in tallies else 0
    read = f", {mutants} damaged files" if mutants else ""
    end = f"{total} trials{read}, {len(lost)} lost"
    return Result(metrics, "\n".join([*aligned(rows), *lines, end]), code)
