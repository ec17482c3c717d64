"""Score frozen features with a linear classifier that is solved, after one block or every one.

The protocols that train their head are in `trained_probe`.
"""

import sys
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from maekit.data.sources import Source, label_subset
from maekit.errors import MaekitError
from maekit.model.mae import MaskedAutoencoder
from maekit.report.files import write_whole
from maekit.report.plots import lines
from maekit.report.tables import to_csv
from maekit.scores.regression import Choice, choose, standardise
from maekit.settings import Probe
from maekit.tasks import Result
from maekit.tasks.feature_cache import open_cache
from maekit.tasks.features import Features, Wanted, extract_layers, load_encoder, rows_of, whole_splits
from maekit.tasks.run_folder import Resolved, Run, carry_out, describe, deviating, finish, open_run, typed
from maekit.tasks.trained_probe import train_probe
from maekit.tasks.training import default_out
from maekit.train.device import World, world

Row = dict[str, Any]
"""layer, pool, labels, train_images, strength, held_top1, held_loss, top1."""


def probe(settings: Probe | dict[str, Any]) -> Result:
    """Return top1 of a small classifier on frozen features of held-out images.

    Raises:
        MaekitError: E-USAGE-, E-DATA-, E-CKPT-, E-CONFIG-, E-NUM-FEATURES.
    """
    settings = typed(Probe, settings)
    check_protocol(settings)
    with world(settings.device) as here:
        if settings.protocol != "logistic":
            run = open_run(settings.out or default_out("probe", settings.data), "probe", settings)
            return carry_out(run, lambda: train_probe(settings, run, here))
        if settings.out is None:
            return _logistic(settings, None, here)
        run = open_run(settings.out, "probe", settings)
        return carry_out(run, lambda: _logistic(settings, run, here))


def check_protocol(settings: Probe) -> None:
    """Refuse settings that the protocol has no use for.

    Raises:
        MaekitError: E-CONFIG-BOTH.
    """
    if settings.protocol == "logistic":
        fields = type(settings).model_fields
        names = [name for name in settings.only_trained if getattr(settings, name) != fields[name].default]
        found, expected = "protocol logistic, which is solved and not trained", "protocol lars"
    else:
        several = {"pool": isinstance(settings.pool, list), "labels": "," in (settings.labels or "")}
        several |= {"layers": settings.layers is not None}
        several |= {"pool": several["pool"] or (settings.protocol == "attentive" and settings.pool is not None)}
        names = [name for name, given in several.items() if given]
        found, expected = f"protocol {settings.protocol}, which trains one head", "protocol logistic"
    if names:
        what = f"settings {' and '.join(names)}"
        raise MaekitError("E-CONFIG-BOTH", what, found=found, expected=expected, hint=f"--{expected}")


def _logistic(settings: Probe, run: Run | None, here: World) -> Result:
    """Solve a regression for each block, pooling and part of the labels; with a folder, keep settings and results."""
    whole, val = whole_splits(settings)
    specs = [None] if settings.labels is None else [spec.strip() for spec in settings.labels.split(",")]
    parts = {spec or "all": label_subset(whole, spec, settings.label_seed) for spec in specs}
    used = sorted(set().union(*parts.values()))
    places = {image: place for place, image in enumerate(used)}
    train = whole.subset(used)
    subsets = {spec: [places[image] for image in images] for spec, images in parts.items()}
    model = load_encoder(settings, here)
    wanted = _wanted(settings, model)
    cache = open_cache(settings)
    banks, queries = (
        extract_layers(model, part, here, wanted, workers=settings.workers, title=f"features of {name}", cache=cache)
        for part, name in ((train, "train"), (val, "val"))
    )
    jobs = [(one, spec) for spec in subsets for one in wanted]
    device = here.device if here.device.type == "cuda" else torch.device("cpu")
    rows = [
        _row(one, spec, rows_of(banks[one], subsets[spec]), queries[one], settings.seed, device)
        for one, spec in tqdm(jobs, "probes", disable=len(jobs) == 1 or not sys.stderr.isatty(), leave=False)
    ]
    metrics = _metrics(settings, rows, train, val)
    if run is not None and here.is_main:
        _keep(run, settings, model, train, rows, metrics)
    return Result(metrics, _told(rows, metrics))


def _wanted(settings: Probe, model: MaskedAutoencoder) -> list[Wanted]:
    """Return the blocks and poolings asked for.

    Raises:
        MaekitError: E-CONFIG-LAYERS for a block that is not there.
    """
    depth = len(model.encoder.blocks)
    layers = range(1, depth + 1) if settings.layers == "all" else settings.layers or [depth]
    if max(layers) > depth:
        raise MaekitError(
            "E-CONFIG-LAYERS", "setting layers", found=max(layers), expected=f"1 to {depth}, the blocks of the encoder",
            hint="--layers all",
        )  # fmt: skip
    pools = settings.pool if isinstance(settings.pool, list) else [settings.pool or "mean"]
    return list(dict.fromkeys((layer, pool) for layer in layers for pool in pools))


def _row(one: Wanted, spec: str, train: Features, val: Features, seed: int, device: torch.device) -> Row:
    choice, said = solve(train, val, seed, device)
    row: Row = {"layer": one[0], "pool": one[1], "labels": spec, "train_images": len(train.index)}
    return (
        row
        | {"strength": choice.solved.strength, "held_top1": choice.held_top1, "held_loss": choice.held_loss}
        | {"top1": _share_right(said, val)}
    )


def logistic_top1(train: Features, val: Features, *, seed: int) -> tuple[float, float]:
    """Solve a regularised logistic regression on standardised features to convergence.

    The strength is chosen on a fifth of the *training* labels; `val` is looked at once.

    Returns:
        top-1 on `val`, and the strength C chosen (inverse regularisation, as in scikit-learn).
    """
    choice, said = solve(train, val, seed, torch.device("cpu"))
    return _share_right(said, val), choice.solved.strength


def solve(train: Features, val: Features, seed: int, device: torch.device) -> tuple[Choice, Tensor]:
    """Solve on standardised features as `logistic_top1`; return what was chosen and the class said of each of `val`."""
    x, queries = standardise(train.values.to(device), val.values.to(device))
    choice = choose(x, train.labels.to(device), int(train.labels.max()) + 1, seed=seed)
    return choice, choice.solved.logits(queries).argmax(1).cpu()


def _share_right(said: Tensor, val: Features) -> float:
    return float((said == val.labels).double().mean())


def _metrics(settings: Probe, rows: list[Row], train: Source, val: Source) -> dict[str, Any]:
    """Return what was found; of several the row is the result that did best on training labels held out."""
    last = [row for row in rows if row["labels"] == rows[-1]["labels"]]
    chosen = max(last, key=lambda row: (row["held_top1"] or 0.0, -(row["held_loss"] or 0.0)))
    metrics = {"run": str(settings.run), "top1": chosen["top1"], "protocol": "logistic", "strength": chosen["strength"]}
    metrics |= {"train_images": len(train), "val_images": len(val), "layer": chosen["layer"], "pool": chosen["pool"]}
    return metrics | {"held_top1": chosen["held_top1"]} | ({"sweep": rows} if len(rows) > 1 else {})


def _keep(
    run: Run, settings: Probe, model: MaskedAutoencoder, train: Source, rows: list[Row], metrics: dict[str, Any]
) -> None:
    """Write config.yaml, the table (sweep.csv) and the plot (sweep.svg) of several rows, result.json."""
    found = Resolved(
        images=len(train),
        fingerprint=train.fingerprint(),
        classes=train.classes,
        model=model.spec,
        deviations=deviating(settings),
    )
    describe(run, settings, found)
    if len(rows) > 1:
        write_whole(run.path / "sweep.csv", to_csv(list(rows[0]), [list(row.values()) for row in rows]))
        series = {
            " ".join(name): ([row["layer"] for row in _of(rows, name)], [row["top1"] for row in _of(rows, name)])
            for name in _columns(rows)
        }
        write_whole(run.path / "sweep.svg", lines(series, x="block").encode())
    finish(run, metrics)


def _columns(rows: list[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["labels"], row["pool"]) for row in rows))


def _of(rows: list[Row], column: tuple[str, str]) -> list[Row]:
    return [row for row in rows if (row["labels"], row["pool"]) == column]


def _told(rows: list[Row], metrics: dict[str, Any]) -> str:
    facts = f"logistic, C {metrics['strength']:g}"
    if len(rows) > 1:
        facts += f", block {metrics['layer']}, {metrics['pool']}: chosen on held-out training labels"
    count = next(row["train_images"] for row in rows if row["labels"] == rows[-1]["labels"])
    end = f"linear probe top-1 {metrics['top1']:.4f} ({facts}; {count} labels, {metrics['val_images']} held-out images)"
    return end if len(rows) == 1 else _table(rows) + "\n" + end


def _table(rows: list[Row]) -> str:
    """Return top-1 by block, a column for each part of the labels and pooling."""
    columns = _columns(rows)
    heads = [" ".join(column) for column in columns]
    widths = [max(8, len(head)) + 2 for head in heads]
    table = ["block" + "".join(head.rjust(width) for head, width in zip(heads, widths, strict=True))]
    for layer in dict.fromkeys(row["layer"] for row in rows):
        scores = [next(row["top1"] for row in _of(rows, column) if row["layer"] == layer) for column in columns]
        table.append(f"{layer:5}" + "".join(f"{s:{width}.4f}" for s, width in zip(scores, widths, strict=True)))
    return "\n".join(table)
