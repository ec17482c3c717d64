"""Say what a file of weights holds, and what would be taken for granted on reading it."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from maekit.errors import MaekitError, clean
from maekit.interchange.names import Row
from maekit.interchange.reading import Hints, Reading
from maekit.interchange.weights import read_weights
from maekit.settings import Inspect, Unsaid
from maekit.tasks import Result
from maekit.tasks.run_folder import typed

NUMBER = re.compile(r"(?<=[._])\d+(?=\.)")
"""Of a block inside a name."""


def inspect(settings: Inspect | dict[str, Any]) -> Result:
    """Read weights of any layout and describe them; no model is built, no code in the file is run.

    Raises:
        MaekitError: E-USAGE-FILE, E-CKPT-.
    """
    settings = typed(Inspect, settings)
    if settings.file is None:
        raise MaekitError("E-USAGE-FILE", "no file named", hint="maekit inspect FILE")
    reading = read_weights(settings.file, hints(settings))
    metrics: dict[str, object] = {**facts(reading), "tensors": [row._asdict() for row in reading.rows]}
    lines = [*description(reading), "", *table(reading.rows)]
    return Result(metrics, "\n".join(lines))


OUTPUTS = {"classes": "classes", "multilabel": "labels (several an image)", "regression": "numbers (regression)"}


def hints(settings: Unsaid) -> Hints:
    """Return what the user says of a file that does not say it."""
    return Hints(settings.model, settings.num_heads, settings.decoder_heads, settings.target, settings.source_size)


def facts(reading: Reading) -> dict[str, Any]:
    """Return what was read as plain values."""
    return {
        "file": str(reading.path),
        "container": reading.container,
        "layout": reading.layout,
        "kind": reading.kind,
        "parameters": sum(value.numel() for value in reading.tensors.values()),
        "spec": reading.spec,
        "pool": reading.pool,
        "task": reading.task if reading.kind == "classifier" else None,
        "classes": reading.classes,
        "notes": reading.notes,
        "facts": reading.facts,
        "beside": reading.beside,
    }


def description(reading: Reading) -> list[str]:
    """Return what was read in lines for people."""
    spec = reading.spec
    kinds = {"mae": "masked autoencoder, with decoder", "encoder": "encoder alone", "classifier": "classifier"}
    height, width = spec["img_size"]
    shape = {
        "images": f"{height} x {width} pixels, {spec['in_chans']} channels",
        "patches": f"{spec['patch_size']} pixels" if spec["patch_size"] else "the name's own",
        "encoder": ", ".join(
            f"{word} {spec[key]}"
            for word, key in (("width", "embed_dim"), ("blocks", "depth"), ("heads", "num_heads"))
            if spec[key]
        )
        or "the name's own",
    }
    if reading.kind == "mae":
        shape["decoder"] = (
            f"width {spec['decoder_dim']}, blocks {spec['decoder_depth']}, heads {spec['decoder_heads']}, "
            f"target {spec['target']}"
        )
    if reading.kind == "classifier":
        shape["head"] = f"{reading.num_classes()} {OUTPUTS[reading.task]}, pooling {reading.pool}"
    lines = [
        f"{reading.path}: {kinds[reading.kind]}, layout of {reading.layout} ({reading.container})",
        f"  {'model':<10}{spec['name']}, {sum(t.numel() for t in reading.tensors.values()) / 1e6:.2f} M parameters",
        *(f"  {name:<10}{text}" for name, text in shape.items()),
        f"  {'mean, std':<10}{_short(spec['mean'])}, {_short(spec['std'])}",
        *(f"  note: {note}" for note in reading.notes),
    ]
    plain = {name: value for name, value in reading.facts.items() if not isinstance(value, dict)}
    if plain:
        lines.append("  beside the weights: " + ", ".join(f"{clean(n, 40)} {clean(v, 60)}" for n, v in plain.items()))
    if reading.beside:
        lines.append("  not read: " + ", ".join(clean(name, 40) for name in reading.beside[:12]))
    return lines


@dataclass
class _Line:
    """Rows that differ only in the number of a block, and in weight or bias."""

    what: str
    theirs: str
    ours: str
    count: int = 0
    endings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, ending: str, note: str) -> None:
        self.count += 1
        for new, known in ((ending, self.endings), (note, self.notes)):
            if new and new not in known:
                known.append(new)

    def names(self) -> tuple[str, str]:
        """Return both names; empty ones stay empty."""
        ending = "|".join(sorted(self.endings, reverse=True))
        theirs, ours = (f"{name}.{ending}" if name and ending else name for name in (self.theirs, self.ours))
        return theirs, ours


def table(rows: Iterable[Row], *, with_used: bool = True) -> list[str]:
    """Return one line for rows that differ only in block number, weight or bias; the last counts all.

    Args:
        rows: one for each tensor.
        with_used: False: tensors that kept their name and shape are only counted.
    """
    rows = list(rows)
    lines: dict[tuple[str, str, str], _Line] = {}
    for row in rows:
        if row.what == "used" and not with_used:
            continue
        (theirs, one), (ours, other) = (_split(clean(name, 120)) for name in (row.theirs, row.ours))
        key = (row.what, theirs, ours)
        lines.setdefault(key, _Line(*key)).add(one or other, row.note)
    names = [line.names() for line in lines.values()]
    left, right = (max((len(pair[side]) for pair in names), default=0) for side in (0, 1))
    counts = Counter(row.what for row in rows)
    return [
        *(
            f"{line.what:<9} {line.count:>4}  {theirs:<{left}}  {ours:<{right}}  {', '.join(line.notes[:3])}".rstrip()
            for line, (theirs, ours) in zip(lines.values(), names, strict=True)
        ),
        f"{len(rows)} tensors: " + ", ".join(f"{count} {what}" for what, count in counts.items()),
    ]


def _split(name: str) -> tuple[str, str]:
    """Return a name with a star for the block, and its ending where that is weight or bias."""
    stem, _, ending = name.rpartition(".")
    name = NUMBER.sub("*", name)
    return (NUMBER.sub("*", f"{stem}.")[:-1], ending) if stem and ending in ("weight", "bias") else (name, "")


def _short(values: list[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values[:4]) + (" ..." if len(values) > 4 else "")
