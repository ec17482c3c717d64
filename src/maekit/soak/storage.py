"""Faults of the disk: bits that flip, files that end early, vanish or change places, writes that fail, clocks.

Each takes the bench, a folder for its run and a source of chance; it returns how many steps had to be done again, and
raises `maekit.soak.bench.Lost` if a promise was broken. Numbers F.. are those of docs/reliability.md.
"""

import errno as errors
import os
import shutil
import signal
import time
from pathlib import Path
from random import Random

from maekit.errors import MaekitError
from maekit.soak.bench import Bench, check_said, copied
from maekit.soak.children import Lost
from maekit.train import checkpoint

SAVING = (
    "saver-write", "checkpoint-opened", "checkpoint-written", "checkpoint-synced", "checkpoint-renamed",
    "checkpoint-saved", "checkpoint-pruned",
)  # fmt: skip
"""Places of a save at which a process can die."""
WRITING = ("checkpoint-opened", "checkpoint-written", "checkpoint-synced", "checkpoint-renamed")
"""Places at which the system can refuse to write."""
LOOKING = ("checkpoint-list", "checkpoint-read")
"""Places at which it can refuse to say what is there."""
UNREAD = ("eio", "eacces", "estale", "emfile", "etimedout")
"""With what errors."""
ERRNOS = ("enospc", "edquot", "eio", "erofs", "eacces", "emfile", "estale", "efbig")


def flip(bench: Bench, run: Path, random: Random) -> int:
    """F5: one bit of the newest checkpoint."""
    file = _any_file(copied(bench, run), random)
    data = bytearray(file.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    file.write_bytes(data)
    return _found_and_gone_on(bench, run)


def truncate(bench: Bench, run: Path, random: Random) -> int:
    """F6: a file of the newest checkpoint ends early."""
    file = _any_file(copied(bench, run), random)
    os.truncate(file, random.randrange(file.stat().st_size))
    return _found_and_gone_on(bench, run)


def missing(bench: Bench, run: Path, random: Random) -> int:
    """F6: a file of the newest checkpoint is gone, or all are."""
    file = _any_file(copied(bench, run), random)
    for one in file.parent.iterdir() if random.random() < 0.2 else [file]:
        one.unlink()
    return _found_and_gone_on(bench, run)


def swapped(bench: Bench, run: Path, random: Random) -> int:
    """F6: a file of the newest checkpoint is that of an earlier step."""
    file = _any_file(copied(bench, run), random)
    other = checkpoint.steps(run / "checkpoints")[random.randrange(1, 3)]
    shutil.copy(other / file.name, file)
    return _found_and_gone_on(bench, run)


def _any_file(run: Path, random: Random) -> Path:
    files = sorted(checkpoint.steps(run / "checkpoints")[0].iterdir())
    return files[random.randrange(len(files))]


def _found_and_gone_on(bench: Bench, run: Path) -> int:
    newest, before = checkpoint.steps(run / "checkpoints")[:2]
    try:
        checkpoint.load(newest)
    except MaekitError:
        pass
    else:
        raise Lost(f"{newest.name} verifies although it was harmed")
    told = bench.children.start("ckpt", "verify", run, "--json").wait()
    if told.code != 1 or told.json["newest"] != checkpoint.number(before):
        raise Lost("maekit ckpt verify does not see it")
    bench.finish(run, "--workers", "0")
    return checkpoint.number(newest) - checkpoint.number(before)


def failpoint(bench: Bench, run: Path, random: Random) -> int:
    """F2: kill -9 at a named place of a save."""
    place, when = random.choice(SAVING), random.randint(1, 4)
    died = bench.faulty(
        run, f"{place}:kill@{when}", "--save-every", str(random.randint(1, 4)), "--keep", str(random.randint(1, 3))
    ).wait()
    if died.code not in (0, -signal.SIGKILL):
        raise Lost(f"exit code {died.code}")
    redone = bench.redone(run)
    bench.finish(run, "--save-every", "4")
    return redone


def errno(bench: Bench, run: Path, random: Random) -> int:
    """F3, F4: the system refuses a write, once or from then on: of a checkpoint, or any in the run folder."""
    return (_refused_checkpoint if random.random() < 0.4 else refused)(bench, run, random)


def refused(bench: Bench, run: Path, random: Random) -> int:
    """F3, F4: any of all the openings, renamings, deletions in the run folder, of config, metrics, events, report."""
    first, number, ever = random.randint(1, 100), getattr(errors, random.choice(ERRNOS).upper()), random.random() < 0.5
    refuse = {"folder": f"{run}/", "number": number, "first": first, "ever": ever}
    done = bench.command(run, "--save-every", "6", "--workers", "0", refuse=refuse).wait()
    check_said(done, 0, 5, 75, pattern="" if done.code == 0 else "error[E-")
    if done.stderr.count("error[E-") != (done.code != 0):
        raise Lost(f"exit code {done.code}, and not one line of error: {done.last_line}")
    newest = bench.check_verified(run)
    if done.code == 0 and done.json["state_sha256"] != bench.digest:
        raise Lost("other bits at the end")
    if done.code == 75 and newest < 0:
        raise Lost("exit code 75 without a checkpoint")
    redone = max(0, bench.redone(run))
    bench.finish(run, "--save-every", "6", "--workers", "0", logged="metrics are not written" not in done.stderr)
    return redone


def _refused_checkpoint(bench: Bench, run: Path, random: Random) -> int:
    place, kind, first = random.choice(WRITING), random.choice(ERRNOS), random.randint(1, 9)
    ever, going = random.random() < 0.5, random.random() < 0.5
    words = ["--save-every", str(random.randint(2, 5)), "--save-errors", "keep-going" if going else "stop"]
    done = bench.faulty(run, f"{place}:{kind}@{first}{'+' if ever else ''}", *words).wait()
    check_said(done, 0, 5, 75, pattern="" if done.code == 0 else "error[E-")
    newest = bench.check_verified(run)
    if (done.code == 75) != (newest >= 0) and done.code != 0:
        raise Lost(f"exit code {done.code} with newest checkpoint {newest}")
    redone = bench.redone(run)
    bench.finish(run, "--save-every", "6")
    return redone


def unread(bench: Bench, run: Path, random: Random) -> int:
    """F4: when the run goes on, its checkpoints cannot be listed or read, once or from then on: that is no damage."""
    before = checkpoint.number(checkpoint.steps(copied(bench, run) / "checkpoints")[0])
    place, kind, first = random.choice(LOOKING), random.choice(UNREAD), random.randint(1, 6)
    fault = f"{place}:{kind}@{first}{'+' if random.random() < 0.5 else ''}"
    done = bench.faulty(run, fault, "--save-every", "4", "--keep", "4", "--workers", "0").wait()
    check_said(done, 0, 4, 5, 75, pattern="" if done.code == 0 else "error[E-")
    if done.code == 0 and done.json["state_sha256"] != bench.digest:
        raise Lost("other bits at the end")
    if done.code == 4 and "error[E-CKPT-READ]" not in done.stderr:
        raise Lost(f"refused for another reason: {done.last_line}")
    if not (run / "damaged").exists():  # where one that cannot be read is put when an earlier one is gone on from
        bench.check_verified(run, at_least=before)
    redone = max(0, bench.redone(run))
    bench.finish(run, "--save-every", "4", "--workers", "0")
    return redone


def full(bench: Bench, run: Path, random: Random) -> int:
    """F3: no file may become longer than some bytes (RLIMIT_FSIZE), which a real write meets."""
    longest = max(file.stat().st_size for file in bench.template.rglob("*.safetensors"))
    done = bench.command(run, "--save-every", "4", file_size=random.randrange(2000, longest)).wait()
    check_said(done, 5, 75, pattern="error[E-")
    redone = bench.redone(run)
    bench.finish(run, "--save-every", "4")
    return redone


def clock(bench: Bench, run: Path, random: Random) -> int:
    """F11: clocks and file times say nothing of what is newest."""
    copied(bench, run)
    found = checkpoint.steps(run / "checkpoints")
    back = random.random() < 0.5  # the clock has been set back by an hour: what was written before is of later
    for path in found:
        when = time.time() + 3600 if back else random.choice((0, 10**9, 4 * 10**9)) + random.randrange(10**6)
        for file in [*path.iterdir(), path]:
            os.utime(file, (when, when))
    before = checkpoint.newest(run / "checkpoints")
    if before is None or before.path != found[0]:
        raise Lost("another checkpoint counts as the newest")
    zones = ("UTC", "Asia/Kathmandu", "America/St_Johns", "EST5EDT")
    surroundings = {"TZ": random.choice(zones), "LC_ALL": "tr_TR.UTF-8"}
    shift = random.choice((-3600, 3600, -(10**9)))
    done = bench.command(run, "--workers", "0", environment=surroundings, clock=shift).wait()
    check_said(done, 0)
    if done.json["state_sha256"] != bench.digest:
        raise Lost("other bits under another clock")
    bench.finish(run, "--workers", "0")
    return 0
