"""Renew the tables of docs/benchmarks.md: measure, keep what was measured, write the tables.

    python scripts/benchmarks.py [--only NAMES] [--device cpu|cuda] [--core N] [--photos DIR]
    python scripts/benchmarks.py --render

A measurement is a `maekit bench` command in a process of its own, on one thread of a CPU; ``--core`` keeps it on one
core (taskset). What it prints as JSON becomes a record of docs/benchmarks.jsonl, in place of the one of the same name
and device; those of other devices stay, and each device has its own table. One that fails (a peer is not installed) is
told and leaves its record. Everything takes about 15 minutes of a core that has nothing else to do; on any other the
figures are not worth keeping. Text between the tables is written by hand; ``--render`` only writes the tables.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).parents[1] / "docs"
Record = dict[str, Any]
"""name, device, date, load (average of the minute before; None: not recorded), note, found (the command's JSON)."""
Table = Iterator[tuple[str, ...]]
"""Rows of cells, the first one of titles."""


class Measurement(NamedTuple):
    """Something to measure.

    Attributes:
        name: that of its table, then its own, for ``--only`` and for its record.
        label: what a table calls it.
        words: of the `maekit bench` command; ``{photos}`` stands for the folder of ``--photos``.
        device: where it belongs: "cpu" | "cuda".
    """

    name: str
    label: str
    words: str
    device: str = "cpu"


QUICKSTART = "--recipe builtin/pretrain-fashion"
SMALL = (
    "--model vit_tiny_patch16_224 --img-size 28 --channels 1 --patch-size 4 --embed-dim 96 --depth 4 --num-heads 4 "
    "--decoder-dim 64 --decoder-depth 1 --decoder-heads 4 --target pixel --batch-size 256"
)
VIT_S = "--model vit_small_patch16_224 --batch-size 16"
VIT_B = "--model vit_base_patch16_224 --batch-size 32"
SHIPPED = "transformers,transformers:fp32"
"""In the same precision, and as it is where nothing is said."""
GPU = "--precision bf16 --compile --vs transformers --rounds 15 --device cuda"
LARGE = (
    ("b", "ViT-B/16, 224 px", "vit_base_patch16_224 --batch-size 256"),
    ("l", "ViT-L/16, 224 px", "vit_large_patch16_224 --batch-size 128"),
    ("h", "ViT-H/14, 224 px", "vit_huge_patch14_224 --batch-size 64"),
)
"""For a GPU."""
MEASUREMENTS = (
    *(
        Measurement(f"train-{name}-{precision}", label, f"train {words} --precision {precision} --vs {peers}")
        for name, label, words in (
            ("quickstart", "quickstart (28 px, patch 7, ratio .6)", f"{QUICKSTART} --rounds 25"),
            ("28px", "28 px, patch 4, ratio .75", f"{SMALL} --rounds 15"),
            ("vit-s", "ViT-S/16, 224 px", f"{VIT_S} --rounds 5"),
        )
        for precision, peers in (("fp32", "transformers"), ("bf16", SHIPPED))
    ),
    Measurement("train-vit-b", "ViT-B/16, 224 px", f"train {VIT_B} --precision bf16 --vs {SHIPPED} --rounds 3"),
    *(
        Measurement(f"train-vit-{name}-gpu", label, f"train --model {words} {GPU}", "cuda")
        for name, label, words in LARGE
    ),
    Measurement("peers-quickstart", "quickstart", f"train {QUICKSTART} --vs timm-forward,lightly --rounds 15"),
    Measurement("memory-quickstart", "quickstart", f"memory {QUICKSTART} --vs transformers"),
    Measurement("memory-vit-b", "ViT-B/16, 224 px", f"memory {VIT_B} --vs transformers"),
    *(
        Measurement(
            f"anew-vit-b-{encoder}-{decoder}", "ViT-B/16, 224 px",
            f"memory {VIT_B} --checkpointing-encoder {encoder} --checkpointing-decoder {decoder}",
        )
        for encoder, decoder in ((1, 0), (0, 1), (2, 2), (4, 4))
    ),
    Measurement(
        "masks-vit-b", "ViT-B/16, 224 px",
        "mask --model vit_base_patch16_224 --batch-size 4 --precision fp32 --rounds 3",
    ),
    Measurement(
        "data-fashion", "the built-in set", f"data {QUICKSTART} --data builtin:fashion --workers 0,1 --seconds 20"
    ),
    Measurement("decode-photos", "photographs", "decode --data {photos} --seconds 20"),
)  # fmt: skip
"""In the order of the tables' rows."""
NAMES = [one.name for one in MEASUREMENTS]


def steps(rows: Iterable[tuple[str, Record]]) -> Table:
    """Training steps, one row for each peer."""
    yield (
        "size", "precision", "batch", "rounds", "maekit images/s", "beside", "its images/s",
        "its time / maekit's (min to max)", "GFLOP/s of a square product's", "MFU",
    )  # fmt: skip
    for label, found in rows:
        reached = "-"
        if "peak_flops" in found:
            reached = f"{found['flops_per_second'] / 1e9:,.0f} of {found['peak_flops'] / 1e9:,.0f}"
        kind = found["precision"] + (", compiled" if found.get("compile") else "")
        for peer, ratio in found["ratio"].items():
            yield (
                label, kind, str(found["batch_size"]), str(found["rounds"]), rate(found.get("images_per_second")), peer,
                rate(found.get("peer_images_per_second", {}).get(peer)),
                f"{ratio:.2f} ({found['ratio_min'][peer]:.2f} to {found['ratio_max'][peer]:.2f})",
                reached, share(found["mfu"], 0) if "mfu" in found else "-",
            )  # fmt: skip


def kinds(rows: Iterable[tuple[str, Record]]) -> Table:
    """Where maekit's own step goes."""
    found = [(f"{label}, {one['precision']}", one["kinds"]) for label, one in rows]
    names = [*dict.fromkeys(name for _, one in found for name in one)]
    yield ("step", *names)
    for label, one in found:
        yield (label, *(share(one[name], 0) if name in one else "-" for name in names))


def memory(rows: Iterable[tuple[str, Record]]) -> Table:
    """Peak memory in training, one row for each contender."""
    yield ("size", "precision", "batch", "who", "MiB at the peak", "of transformers'", "s a step", "of maekit's")
    for label, found in rows:
        base = found["mib"].get("transformers")
        for who, mib in found["mib"].items():
            took, own = (found.get("seconds", {}).get(name) for name in (who, "maekit"))
            yield (
                label, found["precision"], str(found["batch_size"]), who, f"{mib:,.0f}", over(mib, base),
                f"{took:.3g}" if took else "-", over(took, own),
            )  # fmt: skip


def anew(rows: Iterable[tuple[str, Record]]) -> Table:
    """What computing blocks anew together, or those of one part alone, saves and costs."""
    titles = ("MiB at the peak", "of all kept", "s a step", "of all kept's")
    yield ("size", "precision", "batch", "options", *titles)
    for label, found in rows:
        for who in [name for name in found["mib"] if name != "maekit"]:
            mib, took = found["mib"], found["seconds"]
            yield (
                label, found["precision"], str(found["batch_size"]), who.removeprefix("maekit "), f"{mib[who]:,.0f}",
                over(mib[who], mib["maekit"]), f"{took[who]:.3g}", over(took[who], took["maekit"]),
            )  # fmt: skip


def masks(rows: Iterable[tuple[str, Record]]) -> Table:
    """Masks beside a step."""
    yield ("a step of 256 images", "masks of as many", "time", "share of the step")
    for label, found in rows:
        for kind, seconds in found["seconds"].items():
            yield (
                f"{label}, {found['precision']}: {found['step_seconds']:.0f} s", kind, f"{1000 * seconds:.1f} ms",
                share(found["share"][kind], 4),
            )  # fmt: skip


def data(rows: Iterable[tuple[str, Record]]) -> Table:
    """Loader processes beside a step."""
    yield ("images", "loader processes", "images/s", "a step takes", "processes that keep up")
    for label, found in rows:
        step = f"{found['step_images_per_second']:,.0f}/s in {found['precision']}"
        needed = "none of these" if found["workers_needed"] is None else str(found["workers_needed"])
        for count, images in found["images_per_second"].items():
            yield (f"{label} ({found['images']:,})", count, rate(images), step, needed)


def decode(rows: Iterable[tuple[str, Record]]) -> Table:
    """From a file's bytes to a crop, on one core, by the processor's time."""
    yield ("from a JPEG to a crop", "images/s of a core", "times the first", "difference, levels of 255")
    for label, found in rows:
        for one in found["pipelines"]:
            yield (
                f"{found['files']} {label}, {found['img_size']} px, {one['pipeline']}", rate(one["images_per_second"]),
                f"{one['ratio']:.2f}", f"{one['difference']:.3f}",
            )  # fmt: skip


def rate(images: float | None) -> str:
    """Return images per second in as many digits as mean something."""
    return "-" if images is None else f"{images:,.0f}" if images >= 10 else f"{images:.1f}"


def over(one: float | None, other: float | None) -> str:
    """Return a ratio, if there is one."""
    return f"{one / other:.2f}" if one and other else "-"


def share(part: float, digits: int) -> str:
    """Return per cent in so many digits after the point."""
    return f"{100 * part:.{digits}f} %"


TABLES = {
    "train": steps,
    "kinds": kinds,
    "peers": steps,
    "memory": memory,
    "anew": anew,
    "masks": masks,
    "data": data,
    "decode": decode,
}


OF = {"kinds": "train"}
"""Tables of what another table's measurements found, too."""


def page(text: str, records: Sequence[Record]) -> str:
    """Return the page with its tables made of the records."""
    for name in TABLES:
        start, end = f"<!-- {name}: start -->", f"<!-- {name}: end -->"
        before, _, rest = text.partition(start)
        assert end in rest, f"docs/benchmarks.md has lost the marks of {name}"
        text = f"{before}{start}\n{tables(name, records)}\n{end}{rest.partition(end)[2]}"
    return text


def tables(name: str, records: Sequence[Record]) -> str:
    """Return the tables of one kind, one for each device."""
    devices: dict[str, list[Record]] = {}
    for record in sorted(records, key=place):
        if record["name"].partition("-")[0] == OF.get(name, name) and (name not in OF or record["found"].get(name)):
            devices.setdefault(record["device"], []).append(record)
    return "\n\n".join(table(TABLES[name], of) for of in devices.values()) or "Not measured yet."


def table(make: Callable[[Iterable[tuple[str, Record]]], Table], records: Sequence[Record]) -> str:
    """Return what one device gave, under what it belongs to."""
    labels = {one.name: one.label for one in MEASUREMENTS}
    titles, *rows = make((labels[record["name"]], record["found"]) for record in records)
    lines = [f"| {' | '.join(line)} |" for line in (titles, *rows)]
    return "\n".join([caption(records), "", lines[0], "|---" * len(titles) + "|", *lines[1:]])


def caption(records: Sequence[Record]) -> str:
    """Return one line: device, instructions, threads, versions, dates, load, notes."""
    found = [record["found"] for record in records]
    threads = each(f"{one['threads']} thread{'s' * (one['threads'] > 1)}" for one in found if "threads" in one)
    versions = each(f"{peer} {number}" for one in found for peer, number in one.get("versions", {}).items())
    loads = [record["load"] for record in records if record["load"] is not None]
    load = (
        "load " + " to ".join(dict.fromkeys(f"{fold(loads):.1f}" for fold in (min, max)))
        if loads
        else "no load recorded"
    )
    words = [
        records[0]["device"], each(one["instructions"] for one in found if "instructions" in one), threads,
        each(f"PyTorch {one['torch']}" for one in found if "torch" in one), versions,
        each(sorted(record["date"] for record in records)), load, each(record["note"] for record in records),
    ]  # fmt: skip
    return ", ".join(word for word in words if word) + "."


def each(words: Iterable[str]) -> str:
    """Return different words once, in the order of their first."""
    return ", ".join(dict.fromkeys(word for word in words if word))


def place(record: Record) -> tuple[str, int]:
    """Return what records are ordered by."""
    return record["device"], NAMES.index(record["name"])


def renewed(records: Sequence[Record], record: Record) -> list[Record]:
    """Return the records with one in place of that of the same name and device."""
    same = ("name", "device")
    others = [one for one in records if any(one[key] != record[key] for key in same)]
    return sorted([*others, record], key=place)


def measure(one: Measurement, core: int | None, photos: Path | None) -> Record | None:
    """Run a measurement; None, and a word why, where there is nothing to keep."""
    if "{photos}" in one.words and photos is None:
        sys.stderr.write(f"{one.name}: left out, no --photos\n")
        return None
    words = [word.replace("{photos}", str(photos)) for word in one.words.split()]
    pinned = [] if core is None else ["taskset", "-c", str(core)]
    command = [*pinned, sys.executable, "-m", "maekit", "bench", *words, "--json"]
    sys.stderr.write(f"{one.name}: maekit bench {' '.join(words)}\n")
    load = os.getloadavg()[0]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        told = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        sys.stderr.write(f"{one.name}: {told[-1]}\n")
        return None
    found = json.loads(done.stdout.strip().splitlines()[-1])
    device, today = found.pop("device"), datetime.now(UTC).date().isoformat()
    return {"name": one.name, "device": device, "date": today, "load": round(load, 2), "note": "", "found": found}


def chosen(only: str | None, device: str) -> list[Measurement]:
    """Return the measurements of a device, or those of them that are named in full or by first words.

    Raises:
        SystemExit: one is named that is not there.
    """
    wanted = [one for one in MEASUREMENTS if one.device == device]
    if only is None:
        return wanted
    for word in only.split(","):
        if not any(is_named(one, word) for one in wanted):
            raise SystemExit(f"no measurement {word!r} on {device}; there are {', '.join(one.name for one in wanted)}")
    return [one for one in wanted if any(is_named(one, word) for word in only.split(","))]


def is_named(one: Measurement, word: str) -> bool:
    """Return whether a word names a measurement, or several of which it is one."""
    return f"{one.name}-".startswith(f"{word}-")


def read(docs: Path) -> list[Record]:
    """Return the records kept."""
    return [json.loads(line) for line in (docs / "benchmarks.jsonl").read_text("utf-8").splitlines()]


def write(docs: Path, records: Sequence[Record]) -> None:
    """Keep the records and write the tables."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (docs / "benchmarks.jsonl").write_text(lines, encoding="utf-8")
    file = docs / "benchmarks.md"
    file.write_text(page(file.read_text("utf-8"), records), encoding="utf-8")


def main(words: Sequence[str] | None = None) -> int:
    """Measure and write; each record when it is there. 1: nothing could be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names, or their first words, with commas between them")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--core", type=int, help="keep to this core of a CPU")
    parser.add_argument("--photos", type=Path, help="folder of JPEG photographs, for decode")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where benchmarks.md and benchmarks.jsonl lie")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    options = parser.parse_args(words)
    write(options.docs, read(options.docs))
    if options.render:
        return 0
    measured = 0
    for one in chosen(options.only, options.device):
        if (record := measure(one, options.core, options.photos)) is not None:
            write(options.docs, renewed(read(options.docs), record))
            measured += 1
    return 0 if measured else 1


if __name__ == "__main__":
    sys.exit(main())
