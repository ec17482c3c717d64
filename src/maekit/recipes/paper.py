"""The paper's runs on ImageNet-1K (arXiv 2111.06377): pre-training, fine-tuning, linear probe, training from scratch.

Sources: "paper T8" to "paper T11" are the tables of its appendix A, "paper Table 1", "Table 3" and "section" its text;
"repo" is the authors' public code, whose FINETUNE.md differs from T9. Where the two disagree there are two recipes,
``...-paper`` and ``...-repo``, and each value names what the other says. Costs are theirs, on their machines. None of
these runs was done with this package.
"""

from typing import Any, Literal, NamedTuple

from maekit.recipes.cited import OURS, Cited, Recipe, ours, recipe
from maekit.settings import Finetune, Pretrain, Probe

T3, T8, T9, T10, T11 = "paper Table 3", "paper T8", "paper T9", "paper T10", "paper T11"
REPO_MD = "repo (FINETUNE.md)"
MODELS = {
    "b16": "vit_base_patch16_224",
    "l16": "vit_large_patch16_224",
    "h14": "vit_huge_patch14_224",
}
GEOMETRY = {name: Cited(None, "paper section 4") for name in ("patch_size", "embed_dim", "depth", "num_heads")}
"""The encoder is the plain ViT of its name."""


def _pretrain(model: str, of: str = T3, side: Cited | None = None) -> Recipe[Pretrain]:
    """Return T8 as used for the paper's main results: 1600 epochs, normalised pixels, ImageNet's statistics."""
    code = "repo (main_pretrain.py)"
    return recipe(
        Pretrain,
        {
            "model": Cited(model, of),
            **GEOMETRY,
            "img_size": side or Cited((224, 224), "paper section 4"),
            "init": Cited(None, "paper section 4"),
            "stats": Cited("imagenet", code),
            "target": Cited("norm_pixel", T3, {"paper Table 1, default row": "pixel"}),
            "mask_ratio": Cited(0.75, "paper Fig. 5"),
            "decoder_dim": Cited(512, "paper Table 1"),
            "decoder_depth": Cited(8, "paper Table 1"),
            "decoder_heads": Cited(16, "repo (models_mae.py)"),
            "epochs": Cited(1600, T3, {"paper section 4.1": 800}),
            "batch_size": Cited(4096, T8),
            "drop_last": Cited(True, code),
            "base_lr": Cited(1.5e-4, T8),
            "min_lr": Cited(0.0, code),
            "warmup_epochs": Cited(40, T8),
            "weight_decay": Cited(0.05, T8),
            "betas": Cited((0.9, 0.95), T8),
            "clip_grad": Cited(None, code),
            "ema": Cited(None, code),
            "precision": Cited("auto", OURS, {"repo": "fp16"}),
            "drop_path": Cited(0.0, "paper A.1 and repo"),
            "crop_scale": Cited((0.2, 1.0), code),
            "flip": Cited(True, code),
        },
    )


def pretrain_vit_ti16() -> Recipe[Pretrain]:
    """ViT-Ti/16 at 224 px, the paper's schedule on the smallest model.

    Source: T8; the paper has no ViT-Ti.
    Cost: not measured.
    Expect: not measured here.
    """
    return _pretrain("vit_tiny_patch16_224", OURS)


def pretrain_vit_s16() -> Recipe[Pretrain]:
    """ViT-S/16 at 224 px, the paper's schedule on a small model.

    Source: T8; the paper has no ViT-S.
    Cost: not measured.
    Expect: not measured here.
    """
    return _pretrain("vit_small_patch16_224", OURS)


def pretrain_vit_b16() -> Recipe[Pretrain]:
    """ViT-B/16 at 224 px, the paper's main recipe.

    Source: T8, 1600 epochs as in its Table 3.
    Cost: 9.8 GMAC forward an image; 64 GPUs of 64 images each (repo).
    Expect: fine-tuned 0.836 top-1, linear probe 0.680 (paper); not measured here.
    """
    return _pretrain(MODELS["b16"])


def pretrain_vit_l16() -> Recipe[Pretrain]:
    """ViT-L/16 at 224 px, the paper's main recipe.

    Source: T8, 1600 epochs as in its Table 3.
    Cost: 20.8 GMAC forward an image; 31 h on 128 TPU-v3 cores (paper).
    Expect: fine-tuned 0.859 top-1, linear probe 0.758 (paper); not measured here.
    """
    return _pretrain(MODELS["l16"])


def pretrain_vit_h14() -> Recipe[Pretrain]:
    """ViT-H/14 at 224 px, the paper's main recipe.

    Source: T8, 1600 epochs as in its Table 3.
    Cost: 48.6 GMAC forward an image; 34.5 h on 128 TPU-v3 cores for 800 epochs (paper).
    Expect: fine-tuned 0.869 top-1, linear probe 0.766 (paper); not measured here.
    """
    return _pretrain(MODELS["h14"])


def pretrain_vit_h14_448() -> Recipe[Pretrain]:
    """ViT-H/14 at 448 px: 1024 patches an image.

    Source: T8 at a larger side; the paper pre-trains at 224 px and goes to 448 px only when it fine-tunes.
    Cost: more than four times that of 224 px.
    Expect: not measured here.
    """
    return _pretrain(MODELS["h14"], side=Cited((448, 448), OURS, {"paper section 4": "224 224"}))


class Differing(NamedTuple):
    """The values of fine-tuning in which paper, code and models differ."""

    epochs: float
    base_lr: float
    layer_decay: float
    drop_path: float
    random_erasing: float


Variant = Literal["paper", "repo"]
PUBLISHED: dict[Variant, dict[str, Differing]] = {
    "paper": {
        "b16": Differing(100, 1e-3, 0.75, 0.1, 0.0),
        "l16": Differing(50, 1e-3, 0.75, 0.1, 0.0),
        "h14": Differing(50, 1e-3, 0.75, 0.2, 0.0),
    },
    "repo": {
        "b16": Differing(100, 5e-4, 0.65, 0.1, 0.25),
        "l16": Differing(50, 1e-3, 0.75, 0.2, 0.25),
        "h14": Differing(50, 1e-3, 0.75, 0.3, 0.25),
    },
}
"""T9, which lists no random erasing, and FINETUNE.md with the defaults of main_finetune.py."""


def _either(variant: Variant, model: str) -> dict[str, Cited]:
    """Return one variant's values, each with the other's where they differ."""
    named: dict[Variant, str] = {"paper": T9, "repo": REPO_MD}
    other: Variant = "repo" if variant == "paper" else "paper"
    chosen, beside = PUBLISHED[variant][model]._asdict(), PUBLISHED[other][model]._asdict()
    return {
        name: Cited(value, f"{T9} and repo")
        if value == beside[name]
        else Cited(value, named[variant], {named[other].partition(" (")[0]: beside[name]})
        for name, value in chosen.items()
    }


def _strong_augmentation(table: str) -> dict[str, Cited]:
    """Return what T9 and T11 have in common, and the crops that only the code states."""
    return {
        "label_smoothing": Cited(0.1, table),
        "mixup": Cited(0.8, table),
        "cutmix": Cited(1.0, table),
        "auto_augment": Cited("rand-m9-mstd0.5-inc1", f"{table} (9, 0.5)"),
        "crop_scale": Cited((0.08, 1.0), "repo (main_finetune.py)"),
        "flip": Cited(True, "repo (main_finetune.py)"),
    }


def _finetune(model: str, variant: Variant, side: Cited | None = None) -> Recipe[Finetune]:
    """Return what T9 and the code have in common with the values of one of them where they differ."""
    code = "repo (main_finetune.py)"
    return recipe(
        Finetune,
        {
            "model": Cited(MODELS[model], T3),
            **GEOMETRY,
            "img_size": side or Cited((224, 224), "paper section 4"),
            "labels": Cited(None, "paper section 4"),
            "from_scratch": Cited(False, "paper section 4"),
            "pool": Cited("mean", code),
            "batch_size": Cited(1024, T9),
            "drop_last": Cited(True, code),
            "min_lr": Cited(1e-6, code),
            "warmup_epochs": Cited(5, T9),
            "weight_decay": Cited(0.05, T9),
            "betas": Cited((0.9, 0.999), T9),
            "clip_grad": Cited(None, code),
            "ema": Cited(None, code),
            "precision": Cited("auto", OURS, {"repo": "fp16"}),
            **_either(variant, model),
            **_strong_augmentation(T9),
        },
    )


LARGE = Cited((448, 448), T3)


def finetune_vit_b16_repo() -> Recipe[Finetune]:
    """ViT-B/16 with all labels, the values behind the released model.

    Source: FINETUNE.md of the repo.
    Cost: 7 h 11 min on 32 V100 (repo).
    Expect: 0.8366 top-1, 0.8357 +- 0.0008 over four seeds (repo); not measured here.
    """
    return _finetune("b16", "repo")


def finetune_vit_l16_repo() -> Recipe[Finetune]:
    """ViT-L/16 with all labels, the values behind the released model.

    Source: FINETUNE.md of the repo.
    Cost: 8 h 52 min on 32 V100 (repo).
    Expect: 0.8595 top-1, 0.8587 +- 0.0007 over several seeds (repo); not measured here.
    """
    return _finetune("l16", "repo")


def finetune_vit_h14_repo() -> Recipe[Finetune]:
    """ViT-H/14 with all labels, the values behind the released model.

    Source: FINETUNE.md of the repo, which reports NaN for fp16 with the class token in place of the mean.
    Cost: 13 h 9 min on 64 V100 (repo).
    Expect: 0.8693 top-1 (repo); not measured here.
    """
    return _finetune("h14", "repo")


def finetune_vit_h14_448_repo() -> Recipe[Finetune]:
    """ViT-H/14 at 448 px with all labels, from weights pre-trained at 224 px.

    Source: the values of the repo at 224 px; neither the paper nor the repo lists others for 448 px.
    Cost: more than four times that of 224 px.
    Expect: 0.878 top-1 (paper); not measured here.
    """
    return _finetune("h14", "repo", LARGE)


def finetune_vit_b16_paper() -> Recipe[Finetune]:
    """ViT-B/16 with all labels, the values printed in the paper.

    Source: T9, which lists no random erasing.
    Cost: as paper/finetune-vit-b16-repo.
    Expect: 0.836 top-1 (paper); not measured here.
    """
    return _finetune("b16", "paper")


def finetune_vit_l16_paper() -> Recipe[Finetune]:
    """ViT-L/16 with all labels, the values printed in the paper.

    Source: T9, which lists no random erasing.
    Cost: as paper/finetune-vit-l16-repo.
    Expect: 0.859 top-1 (paper); not measured here.
    """
    return _finetune("l16", "paper")


def finetune_vit_h14_paper() -> Recipe[Finetune]:
    """ViT-H/14 with all labels, the values printed in the paper.

    Source: T9, which lists no random erasing.
    Cost: as paper/finetune-vit-h14-repo.
    Expect: 0.869 top-1 (paper); not measured here.
    """
    return _finetune("h14", "paper")


def finetune_vit_h14_448_paper() -> Recipe[Finetune]:
    """ViT-H/14 at 448 px with all labels, from weights pre-trained at 224 px.

    Source: T9 at 224 px; neither the paper nor the repo lists other values for 448 px.
    Cost: more than four times that of 224 px.
    Expect: 0.878 top-1 (paper); not measured here.
    """
    return _finetune("h14", "paper", LARGE)


def _probe(epochs: Cited | None = None) -> Recipe[Probe]:
    """Return T10; momentum .9 and trust .001 belong to the protocol."""
    code = "repo (main_linprobe.py)"
    return recipe(
        Probe,
        {
            "protocol": Cited("lars", T10),
            "labels": Cited(None, "paper section 4"),
            "random_init": Cited(False, "paper section 4"),
            "pool": Cited("cls", code),
            "epochs": epochs or Cited(90, T10),
            "batch_size": Cited(16384, T10),
            "micro_batch": Cited(512, code),
            "base_lr": Cited(0.1, T10),
            "warmup_epochs": Cited(10, T10),
            "weight_decay": Cited(0.0, T10),
            "crop_scale": Cited((0.08, 1.0), code),
            "flip": Cited(True, code),
        },
    )


def probe_vit_b16() -> Recipe[Probe]:
    """Linear probe of ViT-B/16 with all labels.

    Source: T10, with batch norm, crop and class token of the repo.
    Cost: 2 h 20 min on 32 V100 (repo).
    Expect: 0.680 top-1 (paper), 0.678 (repo); not measured here.
    """
    return _probe()


def probe_vit_l16() -> Recipe[Probe]:
    """Linear probe of ViT-L/16 with all labels.

    Source: T10, with batch norm, crop and class token of the repo.
    Cost: not published.
    Expect: 0.758 top-1 (paper), 0.760 (repo); not measured here.
    """
    return _probe(Cited(90, T10, {"repo": "50 suffice"}))


def probe_vit_h14() -> Recipe[Probe]:
    """Linear probe of ViT-H/14 with all labels.

    Source: T10, with batch norm, crop and class token of the repo.
    Cost: not published.
    Expect: 0.766 top-1 (paper), 0.772 (repo); not measured here.
    """
    return _probe(Cited(90, T10, {"repo": "50 suffice"}))


def _scratch(model: str, epochs: int, drop_path: float) -> Recipe[Finetune]:
    """Return T11; it decays no layer more than another and averages the weights.

    T11 states the decay of the average alone; ours warms up as timm's does (`maekit.train.state.Average`).
    """
    values: dict[str, Any] = {
        "from_scratch": Cited(True, T11),
        "model": Cited(MODELS[model], T11),
        **GEOMETRY,
        "img_size": Cited((224, 224), "paper section 4"),
        "labels": Cited(None, "paper section 4"),
        "epochs": Cited(epochs, T11),
        "batch_size": Cited(4096, T11),
        "base_lr": Cited(1e-4, T11),
        "warmup_epochs": Cited(20, T11),
        "weight_decay": Cited(0.3, T11),
        "betas": Cited((0.9, 0.95), T11),
        "drop_path": Cited(drop_path, T11),
        "ema": Cited(0.9999, T11),
        "layer_decay": Cited(1.0, f"{T11} (lists none)"),
        "random_erasing": Cited(0.0, f"{T11} (lists none)"),
        "clip_grad": Cited(None, f"{T11} (lists none)"),
        **_strong_augmentation(T11),
    }
    return recipe(Finetune, values | ours(min_lr=0.0, drop_last=True, pool="mean"))


def scratch_vit_b16() -> Recipe[Finetune]:
    """ViT-B/16 from random weights: the supervised arm of the paper.

    Source: T11; it is silent on crop, pooling, erasing and lowest rate, which are those of fine-tuning, none and 0;
        pixels are normalised by mean and deviation of the training images.
    Cost: not measured.
    Expect: 0.823 top-1 of the averaged weights (ema_top1), 0.821 without averaging (paper); not measured here.
    """
    return _scratch("b16", 300, 0.1)


def scratch_vit_l16() -> Recipe[Finetune]:
    """ViT-L/16 from random weights: the supervised arm of the paper.

    Source: T11; it is silent on crop, pooling, erasing and lowest rate, which are those of fine-tuning, none and 0;
        pixels are normalised by mean and deviation of the training images.
    Cost: not measured.
    Expect: 0.826 top-1 of the averaged weights (ema_top1), 0.815 without averaging (paper); not measured here.
    """
    return _scratch("l16", 200, 0.2)


def scratch_vit_h14() -> Recipe[Finetune]:
    """ViT-H/14 from random weights: the supervised arm of the paper.

    Source: T11; it is silent on crop, pooling, erasing and lowest rate, which are those of fine-tuning, none and 0;
        pixels are normalised by mean and deviation of the training images.
    Cost: not measured.
    Expect: 0.831 top-1 of the averaged weights (ema_top1), 0.809 without averaging (paper); not measured here.
    """
    return _scratch("h14", 200, 0.2)
