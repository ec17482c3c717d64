"""Score frozen features with a head that is trained on the one loop, from crops and flips: lars and attentive.

lars is the paper's linear probe (arXiv 2111.06377, table 10). attentive puts one cross-attention in the place of the
pooling (attentive probing: CAE, arXiv 2202.03026): a linear layer can use only what the pooling kept.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maekit.data.augment import ProbeView
from maekit.data.loader import Batch
from maekit.data.sources import Source
from maekit.interchange.weights import metadata
from maekit.model.heads import AttentiveHead, LinearHead
from maekit.model.mae import MaskedAutoencoder, check_pool
from maekit.seeds import seed_all
from maekit.settings import Loop, Probe
from maekit.tasks import Result
from maekit.tasks.features import labelled_splits, load_encoder
from maekit.tasks.run_folder import Run, finish, stopped
from maekit.tasks.scoring import scorer
from maekit.tasks.training import Training, channels_of, narrowed, prepare, say_what_runs, train_loader
from maekit.train.device import World
from maekit.train.loop import Plan
from maekit.train.optim import adamw, lars, pretrain_groups
from maekit.train.schedule import schedule

PER_PASS = 512
"""Images in one pass of the lars protocol: batch norm is over as many as on each GPU of official main_linprobe.py."""


class Probed(nn.Module):
    """Frozen encoder under a trained head.

    Args:
        pool: "mean" | "cls", under batch norm and a linear layer; "attentive": under an `AttentiveHead`.
    """

    def __init__(self, model: MaskedAutoencoder, num_classes: int, pool: str) -> None:
        super().__init__()
        self.model, self.pool = model.requires_grad_(False), pool
        width = model.encoder.embed_dim
        attentive = pool == "attentive"
        self.head = AttentiveHead(width, num_classes, model.num_heads) if attentive else LinearHead(width, num_classes)

    def train(self, mode: bool = True) -> "Probed":
        """Let only the head change its mode: the encoder stays as it is when it is used."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes)."""
        if self.pool == "attentive":
            return self.head(self.model.features(images, "tokens")[:, self.model.encoder.num_prefix_tokens :])
        return self.head(self.model.features(images, pool=self.pool))


def _loop(settings: Probe) -> Loop:
    """Return what the head is trained with: table 10 where nothing else is said; rate and decay of AdamW are ours."""
    epochs = settings.epochs or 90
    rate, decay = (1e-3, 0.05) if settings.protocol == "attentive" else (0.1, 0.0)
    return Loop(
        epochs=epochs,
        batch_size=settings.batch_size or 1024,
        micro_batch=settings.micro_batch,
        base_lr=settings.base_lr or rate,
        warmup_epochs=min(10, epochs / 9) if settings.warmup_epochs is None else settings.warmup_epochs,
        weight_decay=decay if settings.weight_decay is None else settings.weight_decay,
        betas=(0.9, 0.999),
        drop_last=True,
    )


def _pool(settings: Probe, model: MaskedAutoencoder) -> str:
    if settings.protocol == "attentive":
        return "attentive"
    assert not isinstance(settings.pool, list)
    pool = settings.pool or ("cls" if model.encoder.has_class_token else "mean")
    check_pool(model.encoder, pool)
    return pool


def _optimizer(probed: Probed, loop: Loop, lr: float) -> torch.optim.Optimizer:
    if probed.pool == "attentive":
        return adamw(pretrain_groups(probed.head, loop.weight_decay), betas=loop.betas, lr=lr)
    return lars(probed.head, lr=lr, weight_decay=loop.weight_decay)


def train_probe(settings: Probe, run: Run, here: World) -> Result:
    """Train the head: top1 is that after the last epoch, on images that were held out.

    Raises:
        MaekitError: E-USAGE-, E-DATA-, E-CKPT-, E-CONFIG-.
    """
    train, val = labelled_splits(settings)
    ready = training(settings, train, val, run, here)
    probed = ready.model
    assert isinstance(probed, Probed)
    model = probed.model
    evaluate = scorer(
        val, model.img_size, model.mean, model.std, here, workers=settings.workers,
        precision=ready.plan.settings.precision,
    )  # fmt: skip
    outcome = ready.fit(run, here, evaluate)
    metrics = {"run": str(run.path), "steps": outcome.step, "loss": outcome.loss, "state_sha256": outcome.state_sha256}
    metrics |= {"top1": outcome.scores.get("val/top1"), "protocol": settings.protocol}
    if outcome.stopped:
        return stopped(metrics)
    if here.is_main:
        finish(run, metrics)
    what = "attentive" if settings.protocol == "attentive" else "linear"
    return Result(
        metrics,
        f"{what} probe top-1 {metrics['top1']:.4f} ({settings.protocol}, last epoch, {len(val)} held-out images)",
    )


def training(settings: Probe, train: Source, val: Source, run: Run, here: World) -> Training:
    """Build all that the training runs with; a new run's config.yaml is written."""
    model = load_encoder(settings, here)
    pool = _pool(settings, model)
    loop = _loop(settings)
    channels_of(train, len(model.mean))
    statistics = (model.mean, model.std)
    resolved = prepare(
        run,
        settings,
        loop,
        train,
        here,
        model,
        statistics=statistics,
        classes=train.classes,
        beside={"val": val},
        per_pass=PER_PASS if pool != "attentive" else None,
    )
    seed_all(settings.seed)
    probed = Probed(model, len(train.classes or []), pool).to(here.device).train()
    view = ProbeView(model.img_size, settings.crop_scale or (0.08, 1.0), settings.flip is not False)
    loader = train_loader(
        train, view, loop, resolved, here, run,
        size=model.img_size, seed=settings.seed, reading=settings,
    )  # fmt: skip
    plan = Plan(
        schedule(loop, loader.steps_per_epoch, loader.batch_size),
        loop.model_copy(update={"precision": resolved.precision}),
        settings.seed,
        metadata(model),
        identity=resolved.identity,
        narrowed=narrowed(run, settings, resolved),
    )
    say_what_runs("probe", probed, train, plan.schedule.total, here, resolved)

    def step(module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(module(batch["images"]), batch["labels"])}

    optimizer = _optimizer(probed, loop, plan.schedule.peak)
    return Training(probed, step, loader, optimizer, plan)
