"""Score frozen features with a linear classifier: solved (logistic) or trained as in the paper (lars)."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from maekit.data.augment import ProbeView
from maekit.data.loader import Batch
from maekit.errors import MaekitError
from maekit.interchange.weights import metadata
from maekit.model.heads import LinearHead
from maekit.model.mae import MaskedAutoencoder
from maekit.scores.regression import choose, standardise
from maekit.seeds import seed_all
from maekit.settings import Loop, Probe
from maekit.tasks import Result
from maekit.tasks.features import Features, extract_both, labelled_splits, load_encoder
from maekit.tasks.finetune import scorer
from maekit.tasks.run_folder import Resolved, Run, carry_out, describe, deviating, finish, open_run, stopped, typed
from maekit.tasks.training import channels_of, default_out, prepare, say_what_runs, train_loader
from maekit.train.device import World, world
from maekit.train.loop import Plan, fit
from maekit.train.optim import lars
from maekit.train.schedule import schedule

PER_PASS = 512
"""Images in one pass of the lars protocol: batch norm is over as many as on each GPU of official main_linprobe.py."""


def probe(settings: Probe | dict[str, Any]) -> Result:
    """Return top1 of a linear classifier on frozen features of held-out images.

    Raises:
        MaekitError: E-USAGE-, E-DATA-, E-CKPT-, E-CONFIG-.
    """
    settings = typed(Probe, settings)
    with world(settings.device) as here:
        if settings.protocol == "lars":
            run = open_run(settings.out or default_out("probe", settings.data), "probe", settings)
            return carry_out(run, lambda: _lars(settings, run, here))
        _only_for_lars(settings)
        if settings.out is None:
            return _logistic(settings, None, here)
        run = open_run(settings.out, "probe", settings)
        return carry_out(run, lambda: _logistic(settings, run, here))


def _only_for_lars(settings: Probe) -> None:
    fields = type(settings).model_fields
    given = [name for name in settings.only_for_lars if getattr(settings, name) != fields[name].default]
    if given:
        raise MaekitError(
            "E-CONFIG-BOTH",
            f"settings {' and '.join(given)}",
            found="protocol logistic, which is solved and not trained",
            expected="protocol lars",
            hint="--protocol lars",
        )


def _logistic(settings: Probe, run: Run | None, here: World) -> Result:
    """Solve the regression on features of every image; with a folder, keep settings and result there."""
    train, val = labelled_splits(settings)
    model = load_encoder(settings, here)
    top1, strength = logistic_top1(*extract_both(model, train, val, here, settings), seed=settings.seed)
    metrics = {"run": str(settings.run), "top1": top1, "protocol": "logistic", "strength": strength}
    metrics |= {"train_images": len(train), "val_images": len(val)}
    if run is not None and here.is_main:
        found = Resolved(
            images=len(train),
            fingerprint=train.fingerprint(),
            classes=train.classes,
            model=model.spec,
            deviations=deviating(settings),
        )
        describe(run, settings, found)
        finish(run, metrics)
    return Result(
        metrics,
        f"linear probe top-1 {top1:.4f} (logistic, C {strength:g}; {len(train)} labels, {len(val)} held-out images)",
    )


def logistic_top1(train: Features, val: Features, *, seed: int) -> tuple[float, float]:
    """Solve a regularised logistic regression on standardised features to convergence.

    The strength is chosen on a fifth of the *training* labels; `val` is looked at once.

    Returns:
        top-1 on `val`, and the strength C chosen (inverse regularisation, as in scikit-learn).
    """
    x, queries = standardise(train.values, val.values)
    solved = choose(x, train.labels, int(train.labels.max()) + 1, seed=seed).solved
    return solved.top1(queries, val.labels), solved.strength


class Probed(nn.Module):
    """Frozen encoder under a trained head: batch norm without affine part and a linear layer."""

    def __init__(self, model: MaskedAutoencoder, num_classes: int, pool: str) -> None:
        super().__init__()
        self.model, self.pool = model.requires_grad_(False), pool
        self.head = LinearHead(model.encoder.embed_dim, num_classes)

    def train(self, mode: bool = True) -> "Probed":
        """Let only the head change its mode: the encoder stays as it is when it is used."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes)."""
        return self.head(self.model.features(images, pool=self.pool))


def _loop(settings: Probe) -> Loop:
    """Return what the lars protocol trains with: table 10 where nothing else is said."""
    epochs = settings.epochs or 90
    return Loop(
        epochs=epochs,
        batch_size=settings.batch_size or 1024,
        micro_batch=settings.micro_batch,
        base_lr=settings.base_lr or 0.1,
        warmup_epochs=min(10, epochs / 9) if settings.warmup_epochs is None else settings.warmup_epochs,
        weight_decay=settings.weight_decay or 0.0,
        drop_last=True,
    )


def _lars(settings: Probe, run: Run, here: World) -> Result:
    """Train the head on the one loop as in the paper (table 10): LARS, no decay, warm-up, crops and flips."""
    train, val = labelled_splits(settings)
    model = load_encoder(settings, here)
    pool = settings.pool or ("cls" if model.encoder.has_class_token else "mean")
    loop = _loop(settings)
    channels_of(train, len(model.mean))
    statistics = (model.mean, model.std)
    resolved = prepare(
        run, settings, loop, train, here, model, statistics=statistics, classes=train.classes, per_pass=PER_PASS
    )
    seed_all(settings.seed)
    probed = Probed(model, len(train.classes or []), pool).to(here.device).train()
    view = ProbeView(model.img_size, settings.crop_scale or (0.08, 1.0), settings.flip is not False)
    loader = train_loader(
        train, view, loop, resolved, here, run,
        size=model.img_size, seed=settings.seed, workers=settings.workers,
    )  # fmt: skip
    plan = Plan(
        schedule(loop, loader.steps_per_epoch, loader.batch_size),
        loop.model_copy(update={"precision": resolved.precision}),
        settings.seed,
        metadata(model),
    )
    say_what_runs("probe", probed, train, plan.schedule.total, here, resolved)

    def step(module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(module(batch["images"]), batch["labels"])}

    optimizer = lars(probed.head, lr=plan.schedule.peak, weight_decay=loop.weight_decay)
    evaluate = scorer(
        val, model.img_size, model.mean, model.std, here, workers=settings.workers, precision=resolved.precision
    )
    outcome = fit(probed, step, loader, optimizer, plan, run=run.path, world=here, evaluate=evaluate)
    metrics = {"run": str(run.path), "steps": outcome.step, "loss": outcome.loss, "state_sha256": outcome.state_sha256}
    metrics |= {"top1": outcome.scores.get("val/top1"), "protocol": "lars"}
    if outcome.stopped:
        return stopped(metrics)
    if here.is_main:
        finish(run, metrics)
    return Result(metrics, f"linear probe top-1 {metrics['top1']:.4f} (lars, last epoch, {len(val)} held-out images)")
