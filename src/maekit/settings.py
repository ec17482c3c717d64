"""Every setting of every verb: its meaning, default, range and source. Imports no torch, so help is fast.

One word is one setting everywhere: `mask_ratio` here, `--mask-ratio` on the command line, `mask_ratio:` in a
YAML file. Settings are grouped in mix-in classes (the groups of ``--help``); a verb's settings are their sum.
A value is decided by: default < recipe < config file < flag (`maekit.config.resolve`).

Sources: "T8", "T9" ... are tables of the paper (arXiv 2111.06377, appendix A), "OFF" the authors' public code.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from maekit.errors import MaekitError

FORMAT = 1
"""Format number written into config.yaml, weights and checkpoints; a higher one is refused."""


PEER_TIMEOUT = 300.0
"""Seconds that a process waits for the others: torch's own half an hour is a night's GPU time on a large cluster."""


def setting(default: Any, text: str, *, resume: Literal["same", "free"] = "same", **limits: Any) -> Any:
    """Declare one setting.

    Args:
        default: its value when nobody says otherwise.
        text: the line of ``--help``.
        resume: "same": a run goes on only with the same value; "free": may change between stop and resume.
        limits: pydantic's ``gt``, ``ge``, ``lt``, ``le``.
    """
    return Field(default, description=text, json_schema_extra={"resume": resume}, **limits)


def _pair(value: Any) -> Any:
    """Read ``224`` as 224 x 224, also from the command line's list of one."""
    if isinstance(value, str | int):
        value = [value]
    return tuple(value) * 2 if isinstance(value, list | tuple) and len(value) == 1 else value


def _at_commas(value: Any) -> Any:
    """Read ``1,5,20`` as three, from a list also where each of its texts holds several."""
    if isinstance(value, str):
        value = value.split(",")
    if isinstance(value, list | tuple):
        return [part.strip() if isinstance(part, str) else part for each in value for part in _parted(each)]
    return [value]


def _parted(value: Any) -> list[Any]:
    return value.split(",") if isinstance(value, str) else [value]


def _row_and_column(value: Any) -> Any:
    """Read ``3,5`` as row 3, column 5."""
    return value.split(",") if isinstance(value, str) else value


def _rising(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("the smaller value first")
    return pair


Beta = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Index = Annotated[int, Field(ge=0)]
Severity = Annotated[int, Field(ge=1, le=5)]
Shares = Annotated[tuple[Share, Share], AfterValidator(_rising)]
ImageSize = Annotated[tuple[int, int], BeforeValidator(_pair)]
Commas = BeforeValidator(_at_commas)
"""Of a list that is one word on the command line: ``--k 1,5,20``."""
Counts = Annotated[list[Annotated[int, Field(ge=1)]], Commas, Field(min_length=1)]
Temperatures = Annotated[list[Annotated[float, Field(gt=0)]], Commas, Field(min_length=1)]
Names = Annotated[list[str], Commas, Field(min_length=1)]
Points = Annotated[list[Annotated[float, Field(gt=0)]], Commas, Field(min_length=1)]
WorkerCounts = Annotated[list[Annotated[int, Field(ge=0, le=512)]], Commas, Field(min_length=1)]
Paths = Annotated[list[Path], Commas]
Pool = Literal["mean", "cls"]
GridPlace = Annotated[tuple[Index, Index], BeforeValidator(_row_and_column)]
GalleryPart = Literal["beside", "masks", "ratios", "training", "attention", "features", "failures"]
GalleryParts = Annotated[list[GalleryPart], Commas, Field(min_length=1)]
Pools = Annotated[list[Pool], Commas, Field(min_length=1)]
AutoCount = Annotated[int, Field(ge=1)] | Literal["auto"]
AutoJobs = Annotated[int, Field(ge=1, le=64)] | Literal["slurm"]
AllOrBlocks = Annotated[float, Field(ge=0)] | Literal["all"]
AutoWorkers = Annotated[int, Field(ge=0, le=512)] | Literal["auto"]


class Settings(BaseModel):
    """Base of all settings: unknown keys are refused, NaN and infinity too."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)

    recipe: str | None = setting(
        None, "the named run that these settings started from; what differs from it is said and kept", resume="free"
    )
    """Set by `maekit.config.resolve`, which alone applies a recipe: naming one here changes no other setting."""

    one_of: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Sets of settings of which one replaces the other: the later layer wins, two in one layer are refused."""

    takes_recipes_of: ClassVar[tuple[type["Settings"], ...]] = ()
    """Settings of other verbs whose recipes serve this one too."""

    only_flags: ClassVar[tuple[str, ...]] = ()
    """Settings that a config file may not give: they name code that is run, and a file is data."""

    takes_only: ClassVar[tuple[str, ...]] = ()
    """What such a recipe decides here; empty: all that it says."""

    takes_along: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Settings that a lower layer's lose with what they were meant for, when a higher layer gives the first."""

    @model_validator(mode="before")
    @classmethod
    def _replace(cls, values: Any) -> Any:
        """Let a given setting take the place of its rivals' defaults: ``Pretrain(steps=5)`` has no epochs."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for names in cls.one_of:
            given = [name for name in names if values.get(name) is not None]
            if given:
                values |= dict.fromkeys(set(names) - set(given))
        return values

    @model_validator(mode="after")
    def _only_one(self) -> Self:
        for names in self.one_of:
            given = [name for name in names if getattr(self, name) is not None]
            if len(given) > 1:
                raise MaekitError("E-CONFIG-BOTH", f"settings {' and '.join(given)}", expected="one of them")
        return self

    positional: ClassVar[tuple[str, ...]] = ()
    """Settings that the command line takes without a flag, in order; a list takes all that is left."""


class Machine(Settings):
    """Where it runs"""

    device: str = setting("auto", "auto | cpu | cuda | cuda:N | mps", resume="free")
    seed: int = setting(0, "seed of order, crops, flips, masks and initial weights", ge=0, lt=2**63)


class Processes(Machine):
    """Where it runs"""

    nproc: int = setting(1, "processes to start on this machine", ge=1, resume="free")
    peer_timeout: float = setting(
        PEER_TIMEOUT, "seconds to wait for another process before giving up", gt=0, resume="free"
    )


class Place(Settings):
    """Images"""

    data: str | None = setting(
        None,
        "folder of images, list (.txt/.csv, .json as iNaturalist's), .parquet file or folder, or builtin:fashion",
        resume="free",
    )
    image_column: str | None = setting(None, "parquet column with the image bytes; default: found by content")
    label_column: str | None = setting(
        None, "list or parquet column with the label; default: label, labels, class, target, ..."
    )


class Images(Place):
    """Images"""

    workers: AutoWorkers = setting(
        "auto", "loader processes; 0 loads in the main one; any number gives the same bits", resume="free"
    )


class Faults(Images):
    """Images"""

    bad_images: Literal["skip", "stop"] = setting(
        "skip",
        "unreadable images: skip up to 5 or 1 % of those seen and take the next, or stop at the first",
        resume="free",
    )


class Reading(Faults):
    """Images"""

    read_timeout: float = setting(
        120.0,
        "seconds for one image; a loader process that takes longer is killed, its batch done again, the second time "
        "the image is unreadable; no part with workers 0",
        gt=0, resume="free",
    )  # fmt: skip


class Steady(Reading):
    """Images"""

    data_changed: Literal["stop", "accept"] = setting(
        "stop",
        "when a run goes on with other images than it began with: stop, or accept and keep a note",
        resume="free",
    )
    verify_data: bool = setting(
        False, "compare contents too (SHA-256 of every image, kept in data.parquet), not only names and sizes",
        resume="free",
    )  # fmt: skip
    decoded_mb: int = setting(
        1024,
        "MiB of memory in which pictures stay decoded, for all loader processes together, where all of them fit; "
        "0: each is decoded every time",
        ge=0, resume="free",
    )  # fmt: skip
    dct_scaling: bool = setting(
        False,
        "decode large JPEG at 1/2, 1/4 or 1/8, as long as no crop must be enlarged: sooner, with other crops and "
        "slightly other pixels than the paper's recipes see",
    )


class Size(Settings):
    """Images"""

    img_size: ImageSize = setting((224, 224), "side in pixels, or height and width")
    channels: int | None = setting(None, "channels per image; default: 3, or what .npy arrays hold", ge=1, le=4096)


class Statistics(Settings):
    """Normalisation"""

    stats: Literal["dataset", "imagenet"] = setting(
        "dataset", "dataset: mean and std measured once on the training images; imagenet: those of the paper"
    )


class Architecture(Settings):
    """Model"""

    model: str = setting("vit_base_patch16_224", "any plain timm VisionTransformer")
    patch_size: int | None = setting(None, "patch side in pixels; default: the model's own", ge=1)
    embed_dim: int | None = setting(None, "encoder width; default: the model's own", ge=4)
    depth: int | None = setting(None, "encoder blocks; default: the model's own", ge=1)
    num_heads: int | None = setting(None, "encoder attention heads; default: the model's own", ge=1)


class Autoencoder(Architecture):
    """Model"""

    class_tokens: int | None = setting(
        None, "0, 1 or more (the others as timm's register tokens); default: the model's own", ge=0, le=1024
    )
    positions: Literal["sincos", "learned"] = setting("sincos", "position embeddings: fixed sine-cosine, or learned")
    decoder_dim: int = setting(512, "decoder width (paper section 4, default row); no part at depth 0", ge=4)
    decoder_depth: int = setting(
        8, "decoder blocks (paper section 4, default row); 0: a linear head on all places", ge=0
    )
    decoder_heads: int = setting(16, "decoder attention heads (OFF); no part at depth 0", ge=1)
    decoder_kind: Literal["self", "cross"] = setting(
        "self", "attention among all places, or from mask tokens to visible ones (CrossMAE)"
    )
    decode_ratio: Share | None = setting(None, "share of all patches that are decoded; default: all that are removed")
    encoder_mask_token: bool = setting(
        False, "run the encoder on all places, with mask tokens in it (paper Table 1c; BEiT)"
    )
    target: Literal["norm_pixel", "pixel", "pca", "token", "low_pass", "hog"] = setting(
        "norm_pixel",
        "norm_pixel: each patch by its own mean and variance; pixel; pca; token; low_pass: no fine texture; "
        "hog: gradient histograms",
    )
    target_from: Path | None = setting(None, "for target pca or token: folder of maekit pca or maekit tokenizer")
    loss_on: Literal["masked", "all", "visible"] = setting("masked", "patches whose error counts (paper section 3)")


class Masks(Settings):
    """Masks"""

    mask_ratio: float = setting(
        0.75, "share of patches removed (paper Fig. 5); no part with mask_kind none", gt=0, lt=1
    )
    mask_ratio_max: float | None = setting(
        None, "draw the ratio of each step between mask_ratio and this; default: always mask_ratio", gt=0, lt=1
    )
    mask_kind: Literal["random", "block", "grid", "centre", "given", "none"] = setting(
        "random", "which patches: random, block (as BEiT), grid, centre (one block), given (mask_from), none"
    )
    mask_unit: int = setting(1, "side, in patches, of the squares removed or kept whole (long_seq_mae: 2)", ge=1)
    mask_from: Path | None = setting(
        None, "for mask_kind given: .npy of one mask or one per image, or a folder of grey pictures"
    )
    add_noise: float = setting(
        0.0, "deviation of noise on what the encoder sees, of normalised pixels (denoising)", ge=0, le=1e6
    )


class Loop(Settings):
    """Training"""

    one_of: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("epochs", "steps"),
        ("base_lr", "lr"),
        ("warmup_epochs", "warmup_steps"),
    )
    # a length in steps is chosen for short runs: a recipe's warm-up of many epochs is not meant for it
    takes_along: ClassVar[dict[str, tuple[str, ...]]] = {"steps": ("warmup_epochs",)}

    epochs: float | None = setting(None, "length of the schedule in passes over the data", gt=0)
    steps: int | None = setting(None, "length of the schedule in optimizer steps", gt=0)
    batch_size: int = setting(4096, "global batch: all processes, all accumulation steps", ge=1)
    micro_batch: AutoCount = setting("auto", "images per process and pass; must divide the global batch", resume="free")
    drop_last: bool = setting(
        False, "leave an incomplete batch at the end of an epoch out, as the paper's recipes do; else it is a short one"
    )
    base_lr: float | None = setting(None, "learning rate per 256 images; lr = base_lr * batch_size / 256", gt=0)
    lr: float | None = setting(None, "peak learning rate itself, in place of base_lr", gt=0)
    min_lr: float = setting(0.0, "where the half-cosine ends", ge=0)
    warmup_epochs: float | None = setting(
        None, "linear warm-up from 0, in epochs; default: 5 % of the schedule (T8: 40 of 800, T9: 5 of 100)", ge=0
    )
    warmup_steps: int | None = setting(None, "the same in steps", ge=0)
    weight_decay: float = setting(0.05, "AdamW weight decay (T8, T9)", ge=0)
    betas: tuple[Beta, Beta] = setting((0.9, 0.95), "AdamW betas (T8: .9 .95; T9: .9 .999)")
    clip_grad: float | None = setting(None, "largest gradient norm; default: no clipping (OFF)", gt=0)
    bad_numbers: Literal["stop", "skip"] = setting(
        "stop",
        "a loss or gradient that is NaN or infinite: stop, or skip that update (20 in a row stop)",
        resume="free",
    )
    spike_sigma: float | None = setting(
        None, "skip updates whose loss is so many deviations above the last 128; default: none", gt=0
    )
    roll_back: int = setting(
        0, "after 20 spikes in a row: back to a checkpoint, on with later batches; at most so often", ge=0
    )
    sdc_check: int = setting(
        0,
        "look for silent corruption: weights that change between steps, and every so many steps one computed twice; "
        "0: never",
        ge=0, resume="free",
    )  # fmt: skip
    ema: float | None = setting(None, "decay of an average of the weights, kept beside them; default: none", gt=0, lt=1)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", "auto: what the hardware does well")
    compile: bool = setting(False, "compile the model with torch.compile (needs a C++ compiler on CPU)")
    save_every: int | None = setting(None, "steps between checkpoints; default: once per epoch", ge=1, resume="free")
    keep: int = setting(2, "newest checkpoints that stay on disk", ge=1, resume="free")
    keep_every: int | None = setting(None, "checkpoints of multiples of this step stay, too", ge=1, resume="free")
    save_errors: Literal["stop", "keep-going"] = setting(
        "stop", "a checkpoint that cannot be written: stop, or train on and try the next", resume="free"
    )
    log_every: int = setting(10, "steps between lines of metrics.jsonl", ge=1)
    stop_at: int | None = setting(
        None, "stop after this step of the unchanged schedule, save, exit 75", ge=1, resume="free"
    )
    resume: bool | None = setting(
        None,
        "insist on going on with the run in --out, or with --no-resume on a new one; default: go on if there is one",
        resume="free",
    )
    nproc: int = setting(1, "processes to start on this machine", ge=1, resume="free")
    peer_timeout: float = setting(
        PEER_TIMEOUT, "seconds to wait for another process before giving up", gt=0, resume="free"
    )


class Views(Settings):
    """Views"""

    crop: Literal["random", "fixed", "centre"] = setting(
        "random", "random: size and place; fixed: place only, after a resize; centre (paper Table 1e)"
    )
    crop_scale: Shares = setting((0.2, 1.0), "area range of crop random (OFF); 1 1: whole image")
    flip: bool = setting(True, "mirror half of the images (T8)")
    color_jitter: float = setting(
        0.0, "brightness, contrast, saturation by 1 - this to 1 + this (paper Table 1e: + color jit)", ge=0, le=1
    )


class Pretrain(Steady, Size, Views, Statistics, Autoencoder, Masks, Loop, Machine):
    """Pre-train a masked autoencoder on unlabelled images."""

    out: Path | None = setting(None, "run folder; resumed when it holds this run", resume="free")
    init: Path | None = setting(None, "start from these weights (decoder too if it is there)")
    epochs: float | None = setting(800, "length of the schedule in passes over the data (T8)", gt=0)
    base_lr: float | None = setting(1.5e-4, "learning rate per 256 images (T8)", gt=0)
    drop_path: float = setting(0.0, "stochastic depth of the encoder (the paper uses none)", ge=0, lt=1)
    repeats: int = setting(
        1,
        "samples of each image that is decoded: other crops, other masks (arXiv 1901.09335); the batch counts samples, "
        "and an epoch has so many times more steps",
        ge=1,
    )
    resize_on: Literal["loader", "device"] = setting(
        "loader",
        "where random crops are resized: in loader processes, or on the device, which spares them that work",
    )
    checkpointing: bool = setting(
        False, "compute activations twice to save memory: encoder and decoder blocks", resume="free"
    )
    checkpointing_encoder: int = setting(
        1, "with checkpointing: encoder blocks computed anew together; 0: none", ge=0, resume="free"
    )
    checkpointing_decoder: int = setting(
        1, "with checkpointing: decoder blocks computed anew together; 0: none", ge=0, resume="free"
    )


class Held(Settings):
    """Labels"""

    val_data: str | None = setting(
        None, "images to score on; default: DATA/val or DATA/test, otherwise 20 % per class held out by a hash"
    )


class Labels(Held):
    """Labels"""

    labels: str | None = setting(None, "part of the training labels: 10/class, 1%, 100% or a count; default: all")
    label_seed: int = setting(0, "which images that part holds; the same for every arm compared", ge=0, lt=2**63)


class Kept(Settings):
    """Feature cache"""

    cache: str | None = setting(
        "auto", "folder that keeps features between calls; auto: RUN/features where RUN is a run folder; none: nowhere",
        resume="free",
    )  # fmt: skip


class Finetune(Steady, Size, Labels, Architecture, Loop, Machine):
    """Train encoder and head on labelled images."""

    positional: ClassVar[tuple[str, ...]] = ("run",)

    unless_said: ClassVar[dict[str, dict[str, Any]]] = {
        "multilabel": {"loss": "bce", "label_smoothing": 0.0},
        "regression": {"loss": "mse", "label_smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0},
    }
    """Defaults that a task brings along in the place of those for classes."""

    @model_validator(mode="before")
    @classmethod
    def _by_task(cls, values: Any) -> Any:
        more = cls.unless_said.get(str(values.get("task")), {}) if isinstance(values, dict) else {}
        return {**more, **values} if more else values

    run: Path | None = setting(None, "run folder or weights to start from", resume="free")
    task: Literal["classes", "multilabel", "regression"] = setting(
        "classes",
        "of --label-column: classes: one an image; multilabel: names at a separator, or columns of 0 and 1; "
        "regression: numbers, several as x,y",
    )
    label_separator: str = setting("|", "multilabel: what stands between the names in one cell, as cat|dog")
    model: str | None = setting(  # pyright: ignore[reportIncompatibleVariableOverride]
        None, "any plain timm VisionTransformer; default: that of RUN; from scratch without a RUN: vit_base_patch16_224"
    )
    img_size: ImageSize | None = setting(None, "default: that of RUN; from scratch without a RUN: 224")  # pyright: ignore[reportIncompatibleVariableOverride]
    from_scratch: bool = setting(False, "random weights; with RUN: of RUN's architecture")
    eval_only: bool = setting(False, "train nothing: RUN is a classifier, score it")
    new_head: bool = setting(False, "RUN is a fine-tuned classifier: its head and the norm under it are drawn anew")
    out: Path | None = setting(None, "run folder; resumed when it holds this run", resume="free")
    pool: Literal["mean", "cls"] = setting("mean", "mean of patch tokens under a new norm (OFF), or the class token")
    epochs: float | None = setting(100, "length of the schedule in passes over the data (T9, ViT-B)", gt=0)
    batch_size: int = setting(1024, "global batch (T9)", ge=1)
    base_lr: float | None = setting(5e-4, "learning rate per 256 images (OFF, ViT-B)", gt=0)
    min_lr: float = setting(1e-6, "where the half-cosine ends (OFF)", ge=0)
    betas: tuple[Beta, Beta] = setting((0.9, 0.999), "AdamW betas (T9)")
    layer_decay: float = setting(0.65, "learning rate factor per block downwards (OFF, ViT-B; T9: .75)", gt=0, le=1)
    drop_path: float = setting(0.1, "stochastic depth, rising linearly over the blocks (T9, ViT-B)", ge=0, lt=1)
    label_smoothing: float = setting(
        0.1, "label smoothing (T9); multilabel: 0 where nothing is said, else towards 1/2; regression: none", ge=0, lt=1
    )
    mixup: float = setting(0.8, "mixup alpha; 0: off (T9); regression: off, as cutmix", ge=0)
    cutmix: float = setting(1.0, "cutmix alpha; 0: off (T9)", ge=0)
    mixup_prob: float = setting(1.0, "share of batches that are mixed at all (OFF)", gt=0, le=1)
    mixup_switch: float = setting(0.5, "share of mixed batches that take cutmix where both are on (OFF)", ge=0, le=1)
    loss: Literal["cross-entropy", "bce", "mse", "huber"] = setting(
        "cross-entropy",
        "against soft targets where images are mixed; bce: binary, class by class (arXiv 2110.00476), always so of "
        "multilabel; regression: mse (default), or huber, linear beyond one standard deviation",
    )
    class_weights: Literal["balanced"] | None = setting(
        None,
        "balanced: a class of few images weighs more, n / (classes * images of it); multilabel: images with a tag as "
        "much as those without; default: all images the same",
    )
    auto_augment: str | None = setting(
        "rand-m9-mstd0.5-inc1", "timm's RandAugment string, or tensor-m9-n2: torchvision's, on tensors; none: off (T9)"
    )
    color_jitter: float = setting(
        0.0,
        "brightness, contrast and saturation change by up to this share, before RandAugment; 0: off (T9)",
        ge=0,
        le=1,
    )
    random_erasing: float = setting(0.25, "probability of random erasing (OFF; the paper lists none)", ge=0, le=1)
    crop_scale: Shares = setting((0.08, 1.0), "area range of the random crop (OFF)")
    flip: bool = setting(True, "mirror half of the images")
    crop_pct: float | None = setting(
        None, "part of the resized image that is scored; default: .875 from 112 to 224 px, otherwise 1", gt=0, le=1
    )
    eval_every: int | None = setting(None, "epochs between scores; default: ten scores in all", ge=1)
    select: Literal["last", "held-out"] = setting(
        "last",
        "epoch that is scored: the last, or the best on a fifth of the training images, held out by a hash of their "
        "names; the images to score on choose nothing",
    )
    tta: Literal["flip", "5-crop", "10-crop"] | None = setting(
        None,
        "at the final score, average over the image and its mirror, centre and corners, or both; default: one view",
    )
    tune_blocks: AllOrBlocks = setting(
        "all",
        "last blocks that are trained, the rest frozen in eval mode; 0: head and the norm under it, 0.5: the MLP of "
        "the last block too (paper section 4.4); all: embeddings too",
    )


class Partial(Finetune):
    """Fine-tune only the last blocks, for a series of numbers of them, beside the linear probe."""

    takes_recipes_of: ClassVar[tuple[type[Settings], ...]] = (Finetune,)

    tune_blocks: list[AllOrBlocks] = setting(  # pyright: ignore[reportIncompatibleVariableOverride]
        [0, 0.5, 1, 2, 4, 6, 12, 18, "all"],
        "numbers of last blocks that are trained, each in a run of its own; default: 0 0.5 1 2 4 6 12 18 all, as far "
        "as the model has them (paper Fig. 9)",
    )


class Probe(Steady, Labels, Kept, Machine):
    """Score frozen features with a small classifier: solved or trained, after one block or all."""

    positional: ClassVar[tuple[str, ...]] = ("run",)

    run: Path | None = setting(None, "run folder or weights")
    labels: str | None = setting(
        None, "part of the training labels: 10/class, 1%, 100% or a count; logistic: several, as 1%,10%; default: all"
    )
    out: Path | None = setting(
        None,
        "folder for result.json, table and plot; the trained protocols keep their checkpoints there",
        resume="free",
    )
    protocol: Literal["logistic", "lars", "attentive"] = setting(
        "logistic",
        "logistic: regression solved on features computed once; lars: batch norm + linear layer trained, momentum .9, "
        "trust .001 (T10); attentive: a query that attends to the patch tokens + linear layer, AdamW (CAE, 2202.03026)",
    )
    pool: Pool | Pools | None = setting(
        None,
        "mean of patch tokens, or the class token; logistic: also mean,cls; default: mean; lars: cls where there is "
        "one (OFF)",
    )
    layers: Counts | Literal["all"] | None = setting(
        None, "logistic: blocks after which to probe, counted from 1, as 6,9,12, or all; default: the last"
    )
    random_init: bool = setting(False, "the same architecture with random weights, for comparison")
    epochs: float | None = setting(None, "trained: passes over the data; default: 90 (T10)", gt=0)
    batch_size: int | None = setting(None, "trained: global batch; default: 1024 (T10: 16384)", ge=1)
    micro_batch: AutoCount = setting(
        "auto",
        "trained: images per process and pass; lars: one batch of the batch norm, auto: up to 512 (OFF)",
        resume="free",
    )
    base_lr: float | None = setting(
        None, "trained: learning rate per 256 images; default: 0.1 (T10); attentive: 1e-3", gt=0
    )
    warmup_epochs: float | None = setting(
        None, "trained: linear warm-up from 0; default: 10 (T10), or a ninth of fewer than 90 epochs", ge=0
    )
    weight_decay: float | None = setting(None, "trained: weight decay; default: 0 (T10); attentive: 0.05", ge=0)
    crop_scale: Shares | None = setting(
        None, "trained: area range of the random crop; default: .08 1 (OFF); 1 1: whole image"
    )
    flip: bool | None = setting(None, "trained: mirror half of the images; default: yes (OFF)")

    only_trained: ClassVar[tuple[str, ...]] = (
        "epochs",
        "batch_size",
        "micro_batch",
        "base_lr",
        "warmup_epochs",
        "weight_decay",
        "crop_scale",
        "flip",
        "bad_images",
        "read_timeout",
        "data_changed",
        "verify_data",
    )
    """Settings of training, which a regression that is solved has not."""


class Knn(Images, Labels, Kept, Machine):
    """Score frozen features by their nearest neighbours."""

    positional: ClassVar[tuple[str, ...]] = ("run",)

    run: Path | None = setting(None, "run folder or weights")
    pool: Pool | None = setting(None, "mean of patch tokens, or the class token; default: mean")
    k: Counts = setting([20], "neighbours that vote; several for a table, as 1,5,20: the first is the score")
    temperature: Temperatures = setting(
        [0.07],
        "a neighbour of cosine c weighs exp(c / temperature) (DINO, arXiv 2104.14294); several, as .05,.1: the first "
        "is the score",
    )
    random_init: bool = setting(False, "the same architecture with random weights, for comparison")
    raw_pixels: bool = setting(False, "no encoder: neighbours by the pixels themselves, for comparison")


class Robustness(Images, Machine):
    """Score a classifier on corrupted, occluded and otherwise foreign images."""

    positional: ClassVar[tuple[str, ...]] = ("run",)

    run: Path | None = setting(None, "run of finetune, or weights with a head")
    out: Path | None = setting(
        None, "folder for table, plot and robustness.json; an unfinished one is gone on with", resume="free"
    )
    protocol: Literal[
        "corruptions", "occlusion", "in-c", "in-a", "in-r", "in-sketch", "in-v2",
        "in-real", "mapped",
    ] = setting(
        "corruptions",
        "corruptions: those of ImageNet-C on any images, needs maekit[robust]; occlusion: patches dropped, black, "
        "shuffled; in-...: ImageNet-C, -A, -R, -Sketch, -V2, -ReaL as published; mapped: other class folders, by "
        "--class-map",
    )  # fmt: skip
    all_images: bool = setting(False, "score all images of DATA where it has no val part; default: those held out")
    limit: int | None = setting(None, "score so many images only, the same ones for every model", ge=1)
    crop_pct: float | None = setting(
        None, "part of the resized image that is scored; default: as the run was scored", gt=0, le=1
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("fp32", "auto: what the hardware does well")
    kinds: list[str] = setting([], "corruptions by name or group: noise blur weather digital extra; default: all 19")
    severities: list[Severity] = setting([1, 2, 3, 4, 5], "of the corruptions")
    reference: str | None = setting(
        None,
        "what corruptions are measured against: alexnet (its published errors), another classifier, or the --out of "
        "one scored before; default: alexnet for ImageNet's classes",
    )
    occlusions: list[Literal["drop", "black", "shuffle"]] = setting(
        ["drop", "black", "shuffle"],
        "drop: the encoder runs on the other patches only; black: pixels 0 (arXiv 2105.10497); shuffle: they change "
        "places",
    )
    fractions: list[Fraction] = setting(
        [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], "of the patches that are occluded"
    )
    class_map: Path | None = setting(
        None, "mapped: JSON, class of the data -> output, class name or list of them; or one number a line"
    )


class Predict(Images, Processes):
    """Write what a classifier says of every image into a file."""

    positional: ClassVar[tuple[str, ...]] = ("run",)

    run: Path | None = setting(None, "run of finetune, or weights with a head")
    out: Path | None = setting(None, "FILE.parquet or FILE.csv; one that was stopped is gone on with")
    split: Literal["all", "train", "val"] = setting(
        "all", "which images of DATA: all, or those that finetune trains on (train) or scores (val)"
    )
    limit: int | None = setting(None, "so many images only, the same ones for every model", ge=1)
    probabilities: Literal["all", "top"] | None = setting(
        None, "of all classes, or of the five likeliest; default: all up to 100 classes"
    )
    grid: Path | None = setting(None, "FILE.png: a picture of some of the images, each with its prediction")
    count: int = setting(24, "images in the grid, evenly spaced", ge=1, le=1000)
    crop_pct: float | None = setting(
        None, "part of the resized image that is seen; default: as the run was scored", gt=0, le=1
    )
    tta: Literal["flip", "5-crop", "10-crop"] | None = setting(
        None, "average over the image and its mirror, centre and corners, or both; default: one view"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("fp32", "auto: what the hardware does well")


class Lowshot(Images, Held, Kept, Machine):
    """Score frozen features with few labels a class, over many draws of them."""

    positional: ClassVar[tuple[str, ...]] = ("run",)

    run: Path | None = setting(None, "run folder or weights")
    pool: Pool | None = setting(None, "mean of patch tokens, or the class token; default: mean")
    shots: Counts = setting([1, 2, 5, 10], "labels a class, as 1,5,10")
    draws: int = setting(20, "draws of the labels", ge=1, le=10_000)
    label_seed: int = setting(0, "of the first draw; the others follow", ge=0, lt=2**62)
    random_init: bool = setting(False, "the same architecture with random weights, for comparison")


class Retrieve(Images, Held, Kept, Machine):
    """Show the training images nearest to held-out ones."""

    positional: ClassVar[tuple[str, ...]] = ("run",)

    run: Path | None = setting(None, "run folder or weights")
    pool: Pool | None = setting(None, "mean of patch tokens, or the class token; default: mean")
    k: int = setting(6, "nearest images shown for each", ge=1, le=100)
    queries: int = setting(8, "held-out images in the picture, evenly spaced", ge=1, le=1000)
    random_init: bool = setting(False, "the same architecture with random weights, for comparison")
    out: Path | None = setting(
        None, "folder for neighbours.png and neighbours.csv; default: RUN/retrieve", resume="free"
    )


class Evaluate(Images, Labels, Kept, Machine):
    """Score several encoders by the same protocols, side by side in one table."""

    positional: ClassVar[tuple[str, ...]] = ("runs",)

    runs: list[str] = setting(
        [], "run folders or weights, each an arm of the table; NAME=PATH: several of one name are seeds of one arm",
        resume="free",
    )  # fmt: skip
    suite: Names = setting(
        ["quick"],
        "quick: knn,logistic,lowshot; full: these and lars,attentive,finetune,occlusion; or protocols by name, "
        "corruptions too",
        resume="free",
    )
    labels: str | None = setting(
        None, "part of the training labels: 10/class, 1%, 100% or a count; several, as 1%,10%; default: all",
        resume="free",
    )  # fmt: skip
    seeds: int = setting(
        3, "draws of a part of the labels, and seeds of what is trained: the same for every arm", ge=1, resume="free"
    )
    random_arm: bool = setting(
        True, "one arm more: random weights of the first arm's architecture under the same protocols", resume="free"
    )
    pool: Pool | None = setting(None, "mean of patch tokens, or the class token; default: mean")
    shots: Counts = setting([1, 2, 5, 10], "lowshot: labels a class, as 1,5,10")
    draws: int = setting(20, "lowshot: draws of the labels", ge=1, le=10_000)
    finetune: str | None = setting(
        None, "finetune: a recipe or a YAML file of its other settings; default: those of the verb", resume="free"
    )
    probe: str | None = setting(
        None, "lars, attentive: a recipe or a YAML file of their other settings; default: those of the verb",
        resume="free",
    )  # fmt: skip
    robustness: str | None = setting(
        None, "occlusion, corruptions: a YAML file of their other settings; default: those of the verb", resume="free"
    )
    out: Path | None = setting(
        None, "folder for table and report; scores that it holds already are not measured again", resume="free"
    )


class Ablate(Images, Labels, Machine):
    """Run a table or figure of the paper on your images, beside its figures."""

    positional: ClassVar[tuple[str, ...]] = ("table",)

    table: str | None = setting(None, "name of the table, or its beginning: fig5, table1d; maekit recipes lists them")
    scale: Literal["paper", "small", "tiny"] = setting(
        "tiny", "paper: its recipes; small: tens of minutes of a CPU core a row; tiny: minutes (docs/ablations.md)"
    )
    seeds: int = setting(
        3, "seeds of each row: of weights, masks and order, and of the labels drawn", ge=1, resume="free"
    )
    rows: Names | None = setting(None, "rows by name, as 50,75,90; default: all", resume="free")
    labels: str | None = setting(
        None, "part of the training labels: 10/class, 1%, 100% or a count; default: 10%, at scale paper all"
    )
    pretrain: list[str] = setting([], "settings of the pre-training of every row, as steps=500 batch_size=64")
    finetune: list[str] = setting([], "settings of the fine-tuning of every row, as steps=100")
    jobs: AutoJobs = setting(
        1, "runs beside one another, each with a GPU of its own where there are several; slurm: as its jobs",
        resume="free",
    )  # fmt: skip
    slurm: list[str] = setting(
        [], "jobs slurm: submitit's parameters, as slurm_partition=gpu timeout_min=600 gpus_per_node=1", resume="free"
    )
    dry_run: bool = setting(False, "run nothing: rows, operations, time on this machine, disk", resume="free")
    parts: Path | None = setting(
        None, "folder of the runs themselves, shared by tables; default: ablate-parts beside OUT", resume="free"
    )
    out: Path | None = setting(
        None, "folder for the table; default: runs/ablate-TABLE; one that was stopped is gone on with", resume="free"
    )


class Compare(Settings):
    """Set two finished runs side by side: settings, scores, what chance explains."""

    positional: ClassVar[tuple[str, ...]] = ("a", "b")

    a: Paths = setting([], "finished run, prediction file or seeds of one arm at commas: runs/a0,runs/a1")
    b: Paths = setting([], "the same for the other arm; seeds in the same order")
    out: Path | None = setting(None, "folder for report.html, table.csv and table.md")


class Ckpt(Settings):
    """List, verify, prune or repair the checkpoints of a run."""

    positional: ClassVar[tuple[str, ...]] = ("action", "run")

    action: Literal["list", "verify", "prune", "repair"] | None = setting(
        None,
        "list: steps, sizes, which are whole; verify: read all and compare sums; prune: delete all but the newest; "
        "repair: put aside what is damaged",
    )
    run: Path | None = setting(None, "run folder")
    keep: int = setting(2, "prune: newest checkpoints that verify and stay", ge=1)
    keep_every: int | None = setting(None, "prune: those of multiples of this step stay, too", ge=1)
    dry_run: bool = setting(False, "prune, repair: tell, do nothing")


class Soak(Settings):
    """Put a small run under faults drawn at random, and compare its end bit by bit."""

    minutes: float = setting(1.0, "how long", gt=0)
    seed: int = setting(0, "of the faults: the same seed draws the same ones", ge=0, lt=2**63)
    kinds: Names | None = setting(
        None,
        "kill,failpoint,signal,two,worker,hang,flip,truncate,missing,swapped,errno,unread,full,clock,nan,memory,fuzz",
    )
    trial: int | None = setting(None, "only this one, as a report of a loss names it", ge=0)
    out: Path | None = setting(None, "folder for what is left of a trial that lost something; default: not kept")


class Reconstruct(Machine):
    """Show images masked, predicted and original."""

    positional: ClassVar[tuple[str, ...]] = ("run", "images")

    run: Path | None = setting(None, "run folder or weights")
    images: list[Path] = setting([], "image files")
    data: str | None = setting(None, "take images from here in place of files")
    count: int = setting(8, "images taken from --data", ge=1, le=1000)
    ratios: list[float] = setting([75, 85, 95], "mask ratios in per cent")
    out: Path | None = setting(None, "folder for the pictures")


class Gallery(Place, Machine):
    """Draw a page of pictures: reconstructions, attention, features, failures."""

    positional: ClassVar[tuple[str, ...]] = ("runs",)

    runs: list[Path] = setting([], "run folders or weights; several are set side by side")
    only: GalleryParts = setting(
        ["beside", "masks", "ratios", "training", "attention", "features", "failures"],
        "parts: beside (several runs), masks, ratios, training, attention, features, failures; several as "
        "ratios,failures; default: all",
    )
    split: Literal["val", "train", "all"] = setting("val", "which images of DATA: those held out, trained on, or all")
    count: int = setting(8, "images shown, evenly spaced", ge=1, le=1000)
    ratios: list[float] = setting([75, 85, 95], "mask ratios in per cent of the part of that name")
    mask_ratio: float | None = setting(
        None, "share of patches removed in the other parts; default: that of the run", gt=0, lt=1
    )
    blocks: Counts | Literal["all"] | None = setting(
        None, "attention, features: blocks, counted from 1, as 6,12, or all; default: up to six"
    )
    patches: list[GridPlace] = setting(
        [], "attention: patches that look, as 3,5 7,7: row,column from 0; default: middle"
    )
    among: int = setting(256, "failures: images that are looked through", ge=1, le=1_000_000)
    out: Path | None = setting(None, "folder of index.html and its pictures; default: RUN/gallery")


class Embed(Images, Processes):
    """Write the features of a data set into a file."""

    positional: ClassVar[tuple[str, ...]] = ("run",)

    run: Path | None = setting(None, "run folder or weights")
    pool: Literal["mean", "cls", "tokens"] = setting("mean", "mean of patch tokens, class token, or all tokens (.npy)")
    out: Path | None = setting(None, "FILE.parquet (id, path, label, embedding) or FILE.npy (ids beside it)")


class Data(Place):
    """Look at a data set before any training."""

    channels: int | None = setting(None, "channels per image; default: 3, or what .npy arrays hold", ge=1, le=4096)

    positional: ClassVar[tuple[str, ...]] = ("data",)


class Pack(Faults):
    """Write a data set once as something that reads fast: resized images in parquet files."""

    positional: ClassVar[tuple[str, ...]] = ("data",)

    workers: AutoWorkers = setting(
        "auto", "threads that decode and encode; any number gives the same bytes; auto: one a core", resume="free"
    )
    format: Literal["jpeg", "webp", "png", "raw"] = setting(
        "jpeg",
        "of what is encoded; png: no pixel changes; raw: arrays of one size, mapped into memory (small images)",
    )
    quality: int = setting(90, "of jpeg and webp; jpeg from 95 on keeps colours at full resolution", ge=1, le=100)
    short_side: int | None = setting(
        256,
        "largest shorter side in pixels: larger images are resized, none is enlarged; none: as they are; 501 keeps the "
        "pixels of crops of 20 % of the area for 224 px",
        ge=4,
    )
    square: bool = setting(False, "cut the centre square out")
    channels: int | None = setting(
        None, "channels of what is encoded, 1: grey; default: 3, or what .npy arrays hold", ge=1, le=4096
    )
    recompress: bool = setting(False, "encode small enough images too; default: they stay the files they are")
    task: Literal["classes", "multilabel", "regression"] = setting(
        "classes", "what --label-column holds: a class, tags or numbers, as for finetune"
    )
    label_separator: str = setting("|", "multilabel: what stands between the names in one cell, as cat|dog")
    shard_images: AutoCount = setting("auto", "images of a file; auto: about 128 MB of them")
    out: Path | None = setting(None, "folder that is made; one that was stopped is gone on with", resume="free")


class Unsaid(Settings):
    """What a file of another library may not say"""

    model: str | None = setting(None, "timm's name of its architecture; default: read off the shapes")
    num_heads: int | None = setting(None, "its encoder's heads; default: usual for its width", ge=1)
    decoder_heads: int | None = setting(None, "its decoder's heads; default: usual for its width", ge=1)
    target: Literal["norm_pixel", "pixel"] | None = setting(None, "what its decoder predicts; default: norm_pixel")
    source_size: ImageSize | None = setting(None, "its images, height and width in pixels; default: square")


class Reshape(Settings):
    """Changes of shape"""

    img_size: ImageSize | None = setting(None, "other images: positions resampled, bicubic, encoder and decoder")
    patch_size: int | None = setting(None, "other patches at the same grid: pseudo-inverse, as in FlexiViT", ge=1)
    channels: int | None = setting(None, "other channels: kernels repeated and scaled", ge=1, le=4096)
    channel_matrix: Path | None = setting(None, "JSON file: for each new channel, its weights of the old ones")
    class_token: Literal["add", "drop"] | None = setting(None, "add one of zeros, or drop it")

    one_of: ClassVar[tuple[tuple[str, ...], ...]] = (("channels", "channel_matrix"),)


class Graph(Settings):
    """onnx and pt2"""

    what: Literal["encoder", "autoencoder"] | None = setting(None, "default: encoder; with a head: classifier")
    pool: Literal["mean", "cls", "tokens"] | None = setting(None, "what the encoder gives; default: mean")
    dynamic_size: bool | None = setting(None, "take images of any multiple of the patch side; default: one size")
    mask_ratio: float | None = setting(None, "of the autoencoder; default: 0.75", gt=0, lt=1)


class Convert(Unsaid, Reshape, Graph):
    """Turn weights into another library's; proved by running both, nothing dropped silently."""

    positional: ClassVar[tuple[str, ...]] = ("src", "dst")

    src: Path | None = setting(None, "run folder, file or folder of weights, whatever library wrote it")
    dst: Path | None = setting(None, "what to write: a folder for timm and transformers, else a file; must not exist")
    to: Literal["official", "timm", "transformers", "detectron2", "safetensors", "onnx", "pt2"] | None = setting(
        None, "the library, or safetensors of maekit, or a graph"
    )
    encoder_only: bool = setting(False, "leave the decoder out")
    licence: str | None = setting(None, "write a model card (README.md) with this licence: mit, apache-2.0, ...")


class Inspect(Unsaid):
    """Say what a file of weights holds: layout, architecture, tensors, what it leaves unsaid."""

    positional: ClassVar[tuple[str, ...]] = ("file",)

    file: Path | None = setting(None, "run folder, file or folder of weights, whatever library wrote it")


class Replay(Settings):
    """Make a bad step of a training again: which images, which module, which gradient."""

    positional: ClassVar[tuple[str, ...]] = ("file",)

    file: Path | None = setting(None, "RUN/replay/step-K.safetensors, where the training wrote it")
    data: str | None = setting(None, "where the images are now; default: where they were")
    device: str = setting("auto", "auto | cpu | cuda | cuda:N | mps", resume="free")


class Doctor(Settings):
    """Audit an implementation of the method: this one, a library's, a file of weights, your own."""

    one_of: ClassVar[tuple[tuple[str, ...], ...]] = (("model", "checkpoint", "module"),)
    only_flags: ClassVar[tuple[str, ...]] = ("module",)

    model: str | None = setting(
        None, "a library: transformers:vit-mae-base, timm:NAME, lightly, stable-pretraining; default: this installation"
    )
    checkpoint: Path | None = setting(None, "a run folder or file of weights, whatever layout is read")
    module: str | None = setting(None, "your own adapter, package.module:factory (docs/audit.md); its code is run")
    only: list[str] = setting([], "names of checks; default: all")


class Quickstart(Images, Size, Machine):
    """From images to a report: pre-train, look, measure, fine-tune with few labels."""

    data: str | None = setting("builtin:fashion", "your own images; default: the built-in ones", resume="free")
    img_size: ImageSize | None = setting(None, "default: chosen from the images")  # pyright: ignore[reportIncompatibleVariableOverride]
    minutes: float = setting(5.0, "time to spend", gt=0)
    out: Path | None = setting(None, "folder for runs and report; default: runs/quickstart")


class Seen(Size, Views, Statistics):
    """What pre-training sees"""

    takes_recipes_of: ClassVar[tuple[type[Settings], ...]] = (Pretrain,)
    takes_only: ClassVar[tuple[str, ...]] = (
        "data", "image_column", "img_size", "channels", "stats", "model", "patch_size", "crop", "crop_scale", "flip",
        "color_jitter",
    )  # fmt: skip

    model: str = setting("vit_base_patch16_224", "encoder to be pre-trained: its patch side where none is said")
    patch_size: int | None = setting(None, "patch side in pixels; default: the model's own", ge=1)


class Bench(Place, Size, Views, Autoencoder, Masks, Machine):
    """Measure how fast this machine trains, reads and masks, and what holds it up."""

    positional: ClassVar[tuple[str, ...]] = ("action",)
    takes_recipes_of: ClassVar[tuple[type[Settings], ...]] = (Pretrain,)
    takes_only: ClassVar[tuple[str, ...]] = (
        *Place.model_fields, *Size.model_fields, *Views.model_fields, *Autoencoder.model_fields, *Masks.model_fields,
        "batch_size", "save_every", "checkpointing_encoder", "checkpointing_decoder", "decoded_mb",
    )  # fmt: skip

    action: Literal["train", "scale", "memory", "checkpoint", "mask", "data", "decode"] | None = setting(
        None,
        "train: steps of pre-training, the machine's peak, MFU; scale: how a step's cost grows; memory: its peak in "
        "training; checkpoint: what saving costs; mask: drawing masks; data: what the loader delivers, and how many "
        "workers that takes; decode: from a JPEG to a crop",
    )
    batch_size: int = setting(32, "images of a step", ge=1)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", "auto: what the hardware does well")
    compile: bool = setting(False, "train: compile maekit's model with torch.compile")
    checkpointing_encoder: int = setting(
        1, "memory: encoder blocks computed anew together, with checkpointing; 0: none", ge=0
    )
    checkpointing_decoder: int = setting(
        1, "memory: decoder blocks computed anew together, with checkpointing; 0: none", ge=0
    )
    vs: Names | None = setting(
        None, "train, memory: peers in turns: transformers,timm-forward,lightly; NAME:fp32 in that precision"
    )
    rounds: int = setting(7, "train, scale, checkpoint, mask: turns of each contender", ge=1)
    over: Literal["batch-size", "mask-ratio", "img-size", "threads"] = setting("mask-ratio", "scale: what is swept")
    points: Points | None = setting(None, "scale: its values, as 32,64; default: by model and machine")
    save_every: int | None = setting(None, "checkpoint: steps between saves; default: an epoch of --data", ge=1)
    out: Path | None = setting(None, "scale: folder for plot and table; checkpoint: on the disk to be measured")
    threads: int | None = setting(None, "threads of the CPU; default: torch's own choice", ge=1)
    decoded_mb: int = setting(1024, "data: MiB in which pictures stay decoded where all fit; 0: none", ge=0)
    workers: WorkerCounts = setting([0, 1, 2], "data: numbers of loader processes to try")
    seconds: float = setting(20.0, "data, decode: how long in all; data first reads what stays decoded", gt=0)
    profile: Path | None = setting(None, "train: write a trace of two steps here, for chrome://tracing")


class Pca(Reading, Seen):
    """Fit principal components of patches: the target pca of pretrain."""

    components: int | None = setting(
        None, "coefficients of a patch; default: 96 (paper section 4.1), at most half of its values", ge=1, le=65536
    )
    patches: int = setting(100_000, "patches to fit on, from images all over the set", ge=2)
    seed: int = setting(0, "seed of images, crops, flips and patches", ge=0, lt=2**63)
    out: Path | None = setting(None, "folder for target.safetensors, pictures and report", resume="free")


class Tokenizer(Steady, Seen, Loop, Machine):
    """Train a discrete tokenizer of patches: the target token of pretrain."""

    vocabulary: int = setting(512, "codes to choose from", ge=2, le=65536)
    val_data: str | None = setting(
        None, "images to score on; default: DATA/val or DATA/test, otherwise 20 % per class held out by a hash"
    )
    out: Path | None = setting(None, "run folder; resumed when it holds this run", resume="free")
    epochs: float | None = setting(20, "length of the schedule in passes over the data", gt=0)
    batch_size: int = setting(256, "global batch", ge=1)
    base_lr: float | None = setting(2e-3, "learning rate per 256 images", gt=0)
    weight_decay: float = setting(0.0, "AdamW weight decay", ge=0)
    betas: tuple[Beta, Beta] = setting((0.9, 0.99), "AdamW betas")
    precision: Literal["fp32", "bf16"] = setting("fp32", "of the convolutions; the codebook is fp32 in any case")  # pyright: ignore[reportIncompatibleVariableOverride]
