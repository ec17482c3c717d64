"""Look at a data set before any training: what there is, what would be skipped, what might mislead.

Every image is read (up to `LIMIT` per part), exactly as training reads it. Bad images are findings, not failures: the
table is complete and the exit code 0 even where training would stop; a note says so then.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from maekit.data.check import Report, survey
from maekit.data.source import Source
from maekit.data.sources import FileSource, open_source, other_files, parts_of
from maekit.errors import MaekitError, clean
from maekit.settings import Data
from maekit.tasks import Result

LIMIT = 100_000
"""Images read per part; of more, as many evenly spaced ones."""
MAX_SHOWN = 20
"""Lines of each list in the text; ``--json`` has them all."""


def run(settings: Data) -> Result:
    """Report counts, sizes, classes, formats, bad files, duplicates, mean and std of each part.

    Raises:
        MaekitError: E-USAGE-DATA without a path; E-DATA- when the data cannot be opened at all.
    """
    if settings.data is None:
        raise MaekitError("E-USAGE-DATA", "no images named", hint="maekit data PATH, or maekit data builtin:fashion")
    sources = _sources(settings)
    reports = {part: survey(source, channels=settings.channels, limit=LIMIT) for part, source in sources.items()}
    notes = [*_notes(settings, sources, reports)]
    parts = {part: _facts(sources[part], report) for part, report in reports.items()}
    metrics: dict[str, object] = {"data": settings.data, "parts": parts, "notes": notes}
    text = [clean(settings.data), *_table(parts), *_lists(reports), *(f"note: {clean(note, 400)}" for note in notes)]
    return Result(metrics, "\n".join(text))


def _sources(settings: Data) -> dict[str, Source]:
    """Return the parts on disk: train and val, or all."""
    assert settings.data is not None
    columns: dict[str, Any] = {"image_column": settings.image_column, "label_column": settings.label_column}
    if "val" not in parts_of(settings.data):
        return {"all": open_source(settings.data, "train-or-all", **columns)}
    return {
        "train": open_source(settings.data, "train-or-all", **columns),
        "val": open_source(settings.data, "val-or-all", **columns),
    }


def _facts(source: Source, report: Report) -> dict[str, Any]:
    """Return one part as plain values; sizes as [height, width]."""
    counts = Counter(source.labels or [])
    classes = None if source.classes is None else {name: counts[i] for i, name in enumerate(source.classes)}
    sizes = sorted(report.sizes, key=lambda size: size[0] * size[1])
    return {
        "images": len(source),
        "seen": report.seen,
        "bad": [{"id": name, "reason": reason} for name, reason in report.bad],
        "classes": classes,
        "formats": dict(report.formats.most_common()),
        "channels": report.channels,
        "sizes": {
            "distinct": len(sizes),
            "smallest": list(sizes[0]) if sizes else None,
            "largest": list(sizes[-1]) if sizes else None,
            "common": [[*size, count] for size, count in report.sizes.most_common(10)],
        },
        "mean": list(report.mean),
        "std": list(report.std),
        "duplicates": report.duplicates,
        "fingerprint": source.fingerprint(),
    }


def _table(parts: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the facts, one line each, one column per part."""
    rows = {
        "images": lambda facts: f"{facts['images']:,}",
        "looked at": lambda facts: f"{facts['seen']:,}",
        "skipped": lambda facts: f"{len(facts['bad']):,}",
        "duplicates": lambda facts: f"{sum(len(group) - 1 for group in facts['duplicates']):,}",
        "formats": lambda facts: ", ".join(f"{name} {count:,}" for name, count in facts["formats"].items()),
        "height x width": _size_range,
        "channels": lambda facts: str(facts["channels"]),
        "mean": lambda facts: _first(facts["mean"]),
        "std": lambda facts: _first(facts["std"]),
        "classes": lambda facts: "none" if facts["classes"] is None else f"{len(facts['classes']):,}",
    }
    cells = [["", *parts], *([title, *map(tell, parts.values())] for title, tell in rows.items())]
    names = list(dict.fromkeys(name for facts in parts.values() for name in facts["classes"] or ()))
    for name in names[:MAX_SHOWN]:
        counts = [f"{(facts['classes'] or {}).get(name, 0):,}" for facts in parts.values()]
        cells.append([f"  {clean(name, 40)}", *counts])
    yield from _aligned(cells)
    if len(names) > MAX_SHOWN:
        yield f"  … {len(names) - MAX_SHOWN} more classes"


def _first(values: list[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values[:4]) + (" …" if len(values) > 4 else "")


def _size_range(facts: dict[str, Any]) -> str:
    smallest, largest = facts["sizes"]["smallest"], facts["sizes"]["largest"]
    if smallest is None:
        return "-"
    small, large = " x ".join(map(str, smallest)), " x ".join(map(str, largest))
    return small if facts["sizes"]["distinct"] == 1 else f"{small} to {large}"


def _aligned(cells: list[list[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _lists(reports: dict[str, Report]) -> Iterator[str]:
    """Yield the images that would be skipped, and those that are there twice."""
    bad = [f"{part} {name}: {reason}" for part, report in reports.items() for name, reason in report.bad]
    yield from _cut("would be skipped:", bad)
    groups = [f"{part} {' = '.join(group)}" for part, report in reports.items() for group in report.duplicates]
    yield from _cut("the same bytes:", groups)


def _cut(title: str, lines: list[str]) -> Iterable[str]:
    shown = [f"  {clean(line, 300)}" for line in lines[:MAX_SHOWN]]
    more = [f"  … {len(lines) - MAX_SHOWN} more"] if len(lines) > MAX_SHOWN else []
    return [title, *shown, *more] if lines else []


def _notes(settings: Data, sources: dict[str, Source], reports: dict[str, Report]) -> Iterator[str]:
    """Yield what a user should know before training on this."""
    assert settings.data is not None
    for part, report in reports.items():
        if report.too_many_bad:
            found = f"{len(report.bad)} of {report.seen} images of {part} cannot be used, at most {report.max_bad} may"
            yield f"training would stop with E-DATA-BAD: {found}"
        if report.animated:
            yield f"{report.animated} images of {part} have several frames or pages; the first one is used"
        if sources[part].classes is not None and len(sources[part].classes or ()) == 1:
            yield f"{part} has one class only: nothing to tell apart by labels"
    yield from _notes_on_parts(settings, reports)
    is_folder = isinstance(next(iter(sources.values())), FileSource)
    if is_folder and (others := other_files(settings.data)):
        yield "files that are not read: " + ", ".join(f"{count:,} {suffix}" for suffix, count in others.most_common(8))


def _notes_on_parts(settings: Data, reports: dict[str, Report]) -> Iterator[str]:
    assert settings.data is not None
    if "val" not in reports:
        yield "no part to score on: 20 % of each class, by a hash of the id, would be held out where one is needed"
        return
    if shared := reports["train"].digests.keys() & reports["val"].digests.keys():
        yield f"{len(shared)} images of val are in train too: scores on them say nothing"
    try:
        open_source(settings.data, "train", image_column=settings.image_column, label_column=settings.label_column)
    except MaekitError as error:
        yield f"tasks with labels would stop: {error}"
