"""From images to a report in minutes: pre-train, look, measure, fine-tune with few labels.

What is compared is compared fairly: both arms of the fine-tuning have the same recipe, budget, labels and seeds, and
differ in the initial weights only; everything is scored on images that no training has seen; the score is that of the
last epoch. Every stage is a run of its own verb in a folder of its own, so a stopped quickstart goes on where it was.
"""

import logging
import math
import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

from maekit import __version__
from maekit.config import dump_yaml, resolve
from maekit.data.check import survey
from maekit.data.source import Source
from maekit.data.sources import label_subset, open_source
from maekit.errors import MaekitError
from maekit.interchange.weights import load_model
from maekit.model.mae import MaskedAutoencoder, create_model
from maekit.recipes.builtin import finetune_fashion, pretrain_fashion
from maekit.report.grids import write_png
from maekit.report.page import Figure, Section, Table, write_report
from maekit.report.plots import bars, curves
from maekit.report.reconstruction import ratio_figure, reconstruct_images
from maekit.scores.neighbours import knn_top1, nearest
from maekit.seeds import seed_all
from maekit.settings import Finetune, Pretrain, Quickstart
from maekit.tasks import Result
from maekit.tasks.features import Features, extract, pixels
from maekit.tasks.finetune import finetune
from maekit.tasks.pretrain import pretrain, some_images
from maekit.tasks.probe import logistic_top1
from maekit.tasks.retrieve import neighbour_grid
from maekit.tasks.run_folder import Resolved, Run, carry_out, describe, finish, open_run, typed
from maekit.tasks.same_data import same_data
from maekit.tasks.training import channels_of, number_of_workers
from maekit.train.device import World, resolve_device
from maekit.train.log import clock, read_metrics

log = logging.getLogger("maekit")

SEEDS = (0, 1, 2)
LABELS_PER_CLASS = 10
MOST_TRAIN, MOST_HELD = 10_000, 2_000
"""Images that kNN and probe use: enough for two digits, and a large folder does not eat the minutes."""


@dataclass(frozen=True)
class Measures:
    """What was found: accuracies by encoder, and by arm of the fine-tuning one per seed."""

    knn: dict[str, float]
    probe: dict[str, float]
    few_labels: dict[str, list[float]]


def quickstart(settings: Quickstart | dict[str, Any]) -> Result:
    """Run everything and write ``report.html``.

    Without labels the report holds pictures, curves and nearest neighbours only.

    Raises:
        MaekitError: E-DATA-, E-CONFIG-, E-ENV-, E-STOP-, as the stages do.
    """
    settings = typed(Quickstart, settings)
    data = settings.data or "builtin:fashion"
    out = settings.out or Path("runs") / (
        "quickstart" if data == "builtin:fashion" else f"quickstart-{Path(data).stem}"
    )
    run = open_run(out, "quickstart", settings)
    return carry_out(run, lambda: _run(settings, data, run))


def _run(settings: Quickstart, data: str, run: Run) -> Result:
    began, out = time.monotonic(), run.path
    device = resolve_device(settings.device)
    _leave_a_core_to_the_loader(device)
    train, held = (
        open_source(data, part, image_column=settings.image_column, label_column=settings.label_column)
        for part in ("train", "val")
    )
    fingerprint = train.fingerprint()
    same_data(run, len(train), fingerprint)
    recipe = _recipe(settings, data, train, out / "pretrain", device)
    describe(run, settings, Resolved(images=len(train), fingerprint=fingerprint, classes=train.classes))
    log.info("1/4 pre-training on %d unlabelled images; %d held out", len(train), len(held))
    done = pretrain(recipe, dataset=train)
    if done.exit_code:
        return done
    model = load_model(out / "pretrain").to(device).eval()
    here = World(0, 1, device)

    log.info("2/4 features of %d + %d images", min(len(train), MOST_TRAIN), min(len(held), MOST_HELD))
    parts = [_evenly(train, MOST_TRAIN), _evenly(held, MOST_HELD)]
    ours = [_features(model, part, here, settings) for part in parts]
    measures = None
    if train.labels is not None and len(train.classes or []) > 1:
        scored = _measure(settings, recipe, model, parts, ours, here)
        log.info("4/4 fine-tuning with few labels, %d seeds, from the pre-trained and from random weights", len(SEEDS))
        arms = _few_labels(settings, data, train, held, out, device)
        if isinstance(arms, Result):
            return arms
        measures = Measures(*scored, arms)
    else:
        log.info("3/4, 4/4: no labels, so no accuracies")
    seconds = time.monotonic() - began
    report = _report(out, data, recipe, model, train, held, parts, ours, measures, seconds)
    metrics: dict[str, Any] = {"run": str(out), "report": str(report), **done.metrics, "seconds": round(seconds, 1)}
    metrics |= {"run": str(out)}
    if measures is not None:
        metrics |= {"knn": measures.knn, "probe": measures.probe, "few_labels": measures.few_labels}
    finish(run, metrics)
    return Result(metrics, _summary(measures) + f"took {clock(seconds)}; the report: {report.resolve()}")


def _leave_a_core_to_the_loader(device: torch.device) -> None:
    """Compute with one thread less than there are cores.

    With all of them, the loader's process takes a core from a thread for which the others then wait, spinning: on two
    busy cores that was seen to be ten times slower and worse.
    """
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))


def _recipe(settings: Quickstart, data: str, train: Source, run: Path, device: torch.device) -> Pretrain:
    """Return the pre-training's settings, those of an unfinished run if there is one, and say what was chosen."""
    if (run / "config.yaml").exists():
        return resolve(Pretrain, file=run / "config.yaml")[0]
    given = {"data": data, "out": run, "device": settings.device, "seed": settings.seed}
    given |= {"image_column": settings.image_column, "label_column": settings.label_column}
    if (
        data == "builtin:fashion"
        and settings.minutes == Quickstart.model_fields["minutes"].default
        and settings.img_size is None
    ):
        recipe = pretrain_fashion().settings.model_copy(
            update=given | {"workers": 1 if settings.workers == "auto" else settings.workers}
        )
        why = "builtin/pretrain-fashion"
    else:
        recipe, why = _choose(settings, train, device)
        recipe = recipe.model_copy(update=given)
    log.info(
        "recipe: %s. Images %d x %d, patches of %s, encoder %s wide with %s blocks, decoder %d x %d, %s, "
        "mask ratio %g, batch %d, %g epochs",
        why, *recipe.img_size, recipe.patch_size, recipe.embed_dim, recipe.depth, recipe.decoder_dim,
        recipe.decoder_depth, recipe.target, recipe.mask_ratio, recipe.batch_size, recipe.epochs,
    )  # fmt: skip
    return recipe


def _choose(settings: Quickstart, train: Source, device: torch.device) -> tuple[Pretrain, str]:
    """Choose a recipe from the images' side and count, the minutes and the measured speed of this machine.

    About 7 to 8 patches a side for small budgets: the encoder then sees some 14 tokens, and even a CPU makes enough
    steps. Half of the minutes go into pre-training.
    """
    sizes = survey(train, channels=settings.channels, limit=200).sizes
    if not sizes:
        raise MaekitError(
            "E-DATA-BAD", f"{train.name}", found="no readable image among the first", hint="maekit data PATH"
        )
    side = sorted(min(size) for size in sizes.elements())[sum(sizes.values()) // 2]
    rich = device.type != "cpu" or settings.minutes >= 120
    shown = settings.img_size or (
        (28, 28)
        if side < 32
        else (32, 32)
        if side < 64
        else (64, 64)
        if side < 96
        else (224, 224)
        if rich and side >= 160
        else (96, 96)
    )
    patch = next((p for p in (shown[0] // 8, shown[0] // 7, 16, 8, 4, 2, 1) if p and all(s % p == 0 for s in shown)), 1)
    width, depth = (192, 6) if rich else (96, 4)
    small = max(shown) < 64
    base = Pretrain(
        model="vit_tiny_patch16_224",
        img_size=shown,
        patch_size=patch,
        channels=channels_of(train, settings.channels),
        embed_dim=width,
        depth=depth,
        num_heads=4,
        decoder_dim=96 if rich else 64,
        decoder_depth=2 if rich else 1,
        decoder_heads=4,
        target="pixel" if small else "norm_pixel",
        mask_ratio=0.6 if math.prod(shown) // patch**2 < 36 else 0.75,
        batch_size=max(8, min(128, len(train) // 8)),
        base_lr=2e-3,
        crop_scale=(0.5, 1.0),
        workers=settings.workers
        if settings.workers != "auto"
        else max(1, number_of_workers("auto", len(train), shown)),
    )
    rate = _images_per_second(base, device)
    epochs = max(1.0, min(800.0, 0.5 * settings.minutes * 60 * rate / len(train)))
    epochs = float(f"{epochs:.2g}")
    why = f"chosen for {len(train)} images of about {side} px and {settings.minutes:g} minutes at {rate:.0f} images/s"
    return base.model_copy(update={"epochs": epochs}), why


def _images_per_second(recipe: Pretrain, device: torch.device) -> float:
    """Measure training steps on made-up images; reading the real ones takes about as long again on small machines."""
    seed_all(0)
    model = create_model(
        recipe.model, img_size=recipe.img_size, patch_size=recipe.patch_size, in_chans=recipe.channels or 3,
        embed_dim=recipe.embed_dim, depth=recipe.depth, num_heads=recipe.num_heads, decoder_dim=recipe.decoder_dim,
        decoder_depth=recipe.decoder_depth, decoder_heads=recipe.decoder_heads,
    ).to(device)  # fmt: skip
    images = torch.randn(recipe.batch_size, recipe.channels or 3, *recipe.img_size, device=device)
    began = 0.0
    for step in range(6):
        if step == 2:  # the first ones allocate
            began = time.monotonic()
        loss = model.loss(images, mask_ratio=recipe.mask_ratio)
        loss.backward()
        loss.item()  # waits for the device
    return 0.5 * 4 * recipe.batch_size / (time.monotonic() - began)


def _evenly(source: Source, most: int) -> Source:
    return source if len(source) <= most else source.subset([i * len(source) // most for i in range(most)])


def _features(model: MaskedAutoencoder, part: Source, here: World, settings: Quickstart) -> Features:
    return extract(model, part, here, pool="mean", workers=settings.workers, title="features")


def _measure(
    settings: Quickstart,
    recipe: Pretrain,
    model: MaskedAutoencoder,
    parts: list[Source],
    ours: list[Features],
    here: World,
) -> tuple[dict[str, float], dict[str, float]]:
    """Return kNN and probe accuracy of the encoder, a random one and raw pixels."""
    log.info("3/4 kNN and linear probe of the encoder, a random encoder and raw pixels")
    seed_all(settings.seed, 1)
    random = create_model(**model.spec).to(here.device).eval()
    size, channels = model.img_size, len(model.mean)
    arms = {
        "MAE encoder": ours,
        "random encoder": [_features(random, part, here, settings) for part in parts],
        "raw pixels": [pixels(part, size, channels, workers=settings.workers) for part in parts],
    }
    classes = len(parts[0].classes or [])
    knn, probe = {}, {}
    for name, (bank, queries) in arms.items():
        knn[name] = knn_top1(bank.labelled, queries.labelled, classes, k=20, temperature=0.07)
        probe[name] = logistic_top1(bank, queries, seed=settings.seed)[0]
        log.info("%s: kNN %.4f, linear probe %.4f", name, knn[name], probe[name])
    return knn, probe


def _few_labels(
    settings: Quickstart, data: str, train: Source, held: Source, out: Path, device: torch.device
) -> dict[str, list[float]] | Result:
    """Fine-tune with few labels a class: two arms alike but for the start; a seed sets weights, order and labels."""
    fewest = min(train.labels.count(label) for label in set(train.labels or [])) if train.labels else 0
    spec = f"{min(LABELS_PER_CLASS, fewest)}/class"
    scored = _evenly(held, MOST_HELD)
    arms: dict[str, list[float]] = {"from MAE": [], "from scratch": []}
    for seed in SEEDS:
        labelled = train.subset(label_subset(train, spec, seed))
        recipe = finetune_fashion().settings
        update: dict[str, Any] = {
            "data": data,
            "run": out / "pretrain",
            "labels": spec,
            "label_seed": seed,
            "seed": seed,
        }
        update |= {"device": settings.device, "workers": 0}
        update |= dict.fromkeys(("model", "patch_size", "embed_dim", "depth", "num_heads", "channels", "img_size"))
        update |= {"model": Finetune.model_fields["model"].default}
        # a hundred labels see as many steps as the recipe says; many classes or few minutes fewer epochs
        share = min(1.0, 100 / len(labelled), settings.minutes / 2)
        epochs = max(5, round(share * (recipe.epochs or 0)))
        # scores and checkpoints on the way would take longer than these few seconds of training
        update |= {"epochs": float(epochs), "eval_every": epochs, "save_every": 10**6}
        for arm, scores in arms.items():
            scratch = arm == "from scratch"
            folder = out / f"finetune-{'scratch' if scratch else 'mae'}-{seed}"
            one = recipe.model_copy(update=update | {"from_scratch": scratch, "out": folder})
            done = finetune(one, splits=(labelled, scored))
            if done.exit_code:
                return done
            scores.append(float(done.metrics["top1"]))  # type: ignore[arg-type]
        log.info("seed %d: from MAE %.4f, from scratch %.4f", seed, arms["from MAE"][-1], arms["from scratch"][-1])
    return arms


def _summary(measures: Measures | None) -> str:
    if measures is None:
        return ""
    lines = [f"{'':16}{'kNN':>8}{'linear':>8}"]
    lines += [f"{name:16}{measures.knn[name]:8.3f}{measures.probe[name]:8.3f}" for name in measures.knn]
    lines += [f"{'':16}{'fine-tuned with few labels, ' + str(len(SEEDS)) + ' seeds':>8}"]
    lines += [f"{name:16}{_spread(values)}" for name, values in measures.few_labels.items()]
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def _report(
    out: Path, data: str, recipe: Pretrain, model: MaskedAutoencoder, train: Source, held: Source,
    parts: list[Source], ours: list[Features], measures: Measures | None, seconds: float,
) -> Path:  # fmt: skip
    images = some_images(held, model)
    shown = ratio_figure(reconstruct_images(model, images, recipe.mask_ratio if recipe.mask_ratio > 0.75 else 0.75, 0))
    neighbours = _neighbours(parts, ours, model)
    write_png(out / "reconstructions.png", shown)
    sections = [
        *_accuracies(measures, len(parts[0]), len(parts[1])),
        Section(
            "Reconstructions",
            ["Held-out images at a mask ratio of 75 %: what the encoder saw and what the decoder made of it."],
            figures=[Figure(shown, "original, masked, prediction in place of what was removed, whole prediction")],
        ),
        Section(
            "Nearest neighbours",
            ["For held-out images (left), the training images whose features are most alike (cosine)."],
            figures=[Figure(neighbours, "a held-out image and its five nearest training images")],
        ),
        Section(
            "Training curves",
            figures=[Figure(curves(read_metrics(out / "pretrain" / "metrics.jsonl")), "loss and learning rate")],
        ),
        _what_ran(data, recipe, model, train, held, seconds),
        Section("What next", commands=_next(out, data, measures is not None)),
    ]
    report = out / "report.html"
    intro = (
        f"A masked autoencoder was pre-trained on {len(train):,} unlabelled images of {data} and looked at on "
        f"{len(held):,} held-out ones."
    )
    write_report(report, title="maekit quickstart", intro=intro, sections=sections)
    return report


def _accuracies(measures: Measures | None, bank: int, queries: int) -> list[Section]:
    if measures is None:
        return [
            Section(
                "What the encoder learned",
                ["These images have no labels, so there is nothing to score: look at reconstructions and neighbours."],
            )
        ]
    arms = measures.few_labels
    mae, scratch = arms["from MAE"], arms["from scratch"]
    gain, spread = (
        statistics.mean(mae) - statistics.mean(scratch),
        max(statistics.stdev(mae), statistics.stdev(scratch)),
    )
    verdict = "by more than" if gain > spread else "which is within"
    text = [
        f"Fine-tuned with few labels, the pre-trained encoder reaches {_spread(mae)}, random weights "
        f"{_spread(scratch)} (mean and standard deviation of {len(mae)} seeds): a difference of {gain:+.3f}, {verdict} "
        "the spread of the seeds."
    ]
    best = max(measures.knn, key=lambda name: measures.knn[name])
    if best != "MAE encoder":
        text.append(
            f"Under kNN {best} are strong here ({measures.knn[best]:.3f}): centred pictures of one size lie near their "
            "like pixel by pixel."
        )
    rows = [[name, f"{measures.knn[name]:.3f}", f"{measures.probe[name]:.3f}"] for name in measures.knn]
    seeds = [[name, *(f"{v:.3f}" for v in values), _spread(values)] for name, values in arms.items()]
    return [
        Section(
            "What the encoder learned",
            text,
            figures=[Figure(bars({"few labels": arms}), "fine-tuning with few labels; dots are seeds")],
            tables=[
                Table(
                    ["fine-tuned with few labels", *(f"seed {s}" for s in SEEDS), "mean ± sd"],
                    seeds,
                    "Same recipe, budget, labels and seeds; score of the last epoch.",
                ),
                Table(
                    ["frozen features", "kNN", "linear probe"],
                    rows,
                    f"{bank:,} labelled training images, {queries:,} held-out ones; kNN: k 20, temperature .07.",
                    [0],
                ),
            ],
        )
    ]


def _neighbours(parts: list[Source], ours: list[Features], model: MaskedAutoencoder) -> Any:
    """Return a grid: held-out image, then its nearest training images."""
    bank, queries = zip(parts, ours, strict=True)
    count = len(ours[1].index)
    asked = [i * count // 8 for i in range(min(8, count))]
    return neighbour_grid(model, bank, queries, asked, nearest(ours[0].values, ours[1].values, 5))


def _what_ran(
    data: str, recipe: Pretrain, model: MaskedAutoencoder, train: Source, held: Source, seconds: float
) -> Section:
    facts = {
        "data": data,
        "images": f"{len(train):,} for pre-training, {len(held):,} held out",
        "trainable parameters": f"{sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6:.2f} M",
        "seed": recipe.seed,
        "time": clock(seconds),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {next(model.parameters()).device}",
        "versions": f"maekit {__version__}, torch {torch.__version__}, timm {timm.__version__}, "
        f"Python {platform.python_version()}",
    }
    return Section("What was run", facts=facts, details={"settings of the pre-training": dump_yaml(recipe)})


def _next(out: Path, data: str, labelled: bool) -> list[str]:
    run = out / "pretrain"
    commands = [
        f"maekit reconstruct {run} --data {data} --ratios 75 85 95 --out {out / 'more-pictures'}",
        f"maekit embed {run} --data {data} --out {out / 'features.parquet'}",
    ]
    if labelled:
        commands.append(
            f"maekit finetune {run} --data {data} --labels 1% --epochs 50 --batch-size 64 --layer-decay 0.75 "
            f"--out {out / 'finetune-1-percent'}"
        )
    return [
        *commands,
        "maekit pretrain --data YOUR_IMAGES --recipe small/pretrain-32 --out runs/mine",
        "maekit quickstart --data YOUR_IMAGES --minutes 30",
    ]
