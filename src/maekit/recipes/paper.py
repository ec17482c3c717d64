"""The paper's runs on ImageNet-1K (arXiv 2111.06377, appendix A): pre-training, fine-tuning, training from scratch.

T8, T9, T11 are its tables; OFF is the authors' public code with the values of its FINETUNE.md, which differ from T9.
Costs are theirs, on their machines. None of these runs was done with this package.
"""

from maekit.settings import Finetune, Pretrain


def _pretrain(model: str, side: int = 224) -> Pretrain:
    """Return T8 as used for the paper's main results: 1600 epochs, normalised pixels, ImageNet's statistics."""
    return Pretrain(
        model=model,
        img_size=(side, side),
        stats="imagenet",
        target="norm_pixel",
        mask_ratio=0.75,
        decoder_dim=512,
        decoder_depth=8,
        decoder_heads=16,
        epochs=1600,
        batch_size=4096,
        drop_last=True,
        base_lr=1.5e-4,
        min_lr=0.0,
        warmup_epochs=40,
        weight_decay=0.05,
        betas=(0.9, 0.95),
        crop_scale=(0.2, 1.0),
        flip=True,
    )


def pretrain_vit_ti() -> Pretrain:
    """ViT-Ti/16 at 224 px, the paper's schedule on the smallest model.

    Source: T8; the paper has no ViT-Ti.
    Cost: not measured.
    Expect: not measured here.
    """
    return _pretrain("vit_tiny_patch16_224")


def pretrain_vit_s() -> Pretrain:
    """ViT-S/16 at 224 px, the paper's schedule on a small model.

    Source: T8; the paper has no ViT-S.
    Cost: not measured.
    Expect: not measured here.
    """
    return _pretrain("vit_small_patch16_224")


def pretrain_vit_b() -> Pretrain:
    """ViT-B/16 at 224 px, the paper's main recipe.

    Source: T8, 1600 epochs as in its Table 3.
    Cost: 9.8 GMAC forward an image; 64 GPUs of 64 images each in OFF.
    Expect: fine-tuned 0.836 top-1, linear probe 0.680 (paper); not measured here.
    """
    return _pretrain("vit_base_patch16_224")


def pretrain_vit_l() -> Pretrain:
    """ViT-L/16 at 224 px, the paper's main recipe.

    Source: T8, 1600 epochs as in its Table 3.
    Cost: 20.8 GMAC forward an image; 31 h on 128 TPU-v3 cores (paper).
    Expect: fine-tuned 0.859 top-1, linear probe 0.758 (paper); not measured here.
    """
    return _pretrain("vit_large_patch16_224")


def pretrain_vit_h() -> Pretrain:
    """ViT-H/14 at 224 px, the paper's main recipe.

    Source: T8, 1600 epochs as in its Table 3.
    Cost: 48.6 GMAC forward an image; 34.5 h on 128 TPU-v3 cores for 800 epochs (paper).
    Expect: fine-tuned 0.869 top-1, linear probe 0.766 (paper); not measured here.
    """
    return _pretrain("vit_huge_patch14_224")


def pretrain_vit_h448() -> Pretrain:
    """ViT-H/14 at 448 px: 1024 patches an image.

    Source: T8 at a larger side; the paper pre-trains at 224 px and goes to 448 px only when it fine-tunes.
    Cost: more than four times that of 224 px.
    Expect: not measured here.
    """
    return _pretrain("vit_huge_patch14_224", side=448)


def _finetune(
    model: str,
    epochs: int,
    base_lr: float,
    layer_decay: float,
    drop_path: float,
    random_erasing: float,
    side: int = 224,
) -> Finetune:
    """Return what T9 and OFF have in common with the five values in which they or the models differ."""
    return Finetune(
        model=model,
        img_size=(side, side),
        pool="mean",
        epochs=epochs,
        batch_size=1024,
        drop_last=True,
        base_lr=base_lr,
        min_lr=1e-6,
        warmup_epochs=5,
        weight_decay=0.05,
        betas=(0.9, 0.999),
        layer_decay=layer_decay,
        drop_path=drop_path,
        label_smoothing=0.1,
        mixup=0.8,
        cutmix=1.0,
        auto_augment="rand-m9-mstd0.5-inc1",
        random_erasing=random_erasing,
        crop_scale=(0.08, 1.0),
        flip=True,
    )


def finetune_vit_b() -> Finetune:
    """ViT-B/16 with all labels, the values behind the released model.

    Source: OFF.
    Cost: 7 h 11 min on 32 V100 (OFF).
    Expect: 0.8366 top-1, 0.8357 +- 0.0008 over four seeds (OFF); not measured here.
    """
    return _finetune("vit_base_patch16_224", 100, 5e-4, 0.65, 0.1, random_erasing=0.25)


def finetune_vit_l() -> Finetune:
    """ViT-L/16 with all labels, the values behind the released model.

    Source: OFF.
    Cost: 8 h 52 min on 32 V100 (OFF).
    Expect: 0.8595 top-1 (OFF); not measured here.
    """
    return _finetune("vit_large_patch16_224", 50, 1e-3, 0.75, 0.2, random_erasing=0.25)


def finetune_vit_h() -> Finetune:
    """ViT-H/14 with all labels, the values behind the released model.

    Source: OFF.
    Cost: 13 h 9 min on 64 V100 (OFF).
    Expect: 0.8693 top-1 (OFF); not measured here.
    """
    return _finetune("vit_huge_patch14_224", 50, 1e-3, 0.75, 0.3, random_erasing=0.25)


def finetune_vit_h448() -> Finetune:
    """ViT-H/14 at 448 px with all labels, from weights pre-trained at 224 px.

    Source: the values of OFF at 224 px; neither the paper nor OFF lists others for 448 px.
    Cost: more than four times that of 224 px.
    Expect: 0.878 top-1 (paper); not measured here.
    """
    return _finetune("vit_huge_patch14_224", 50, 1e-3, 0.75, 0.3, random_erasing=0.25, side=448)


def finetune_t9_vit_b() -> Finetune:
    """ViT-B/16 with all labels, the values printed in the paper.

    Source: T9, which lists no random erasing.
    Cost: as paper/finetune-vit-b.
    Expect: 0.836 top-1 (paper); not measured here.
    """
    return _finetune("vit_base_patch16_224", 100, 1e-3, 0.75, 0.1, random_erasing=0.0)


def finetune_t9_vit_l() -> Finetune:
    """ViT-L/16 with all labels, the values printed in the paper.

    Source: T9, which lists no random erasing.
    Cost: as paper/finetune-vit-l.
    Expect: 0.859 top-1 (paper); not measured here.
    """
    return _finetune("vit_large_patch16_224", 50, 1e-3, 0.75, 0.1, random_erasing=0.0)


def finetune_t9_vit_h() -> Finetune:
    """ViT-H/14 with all labels, the values printed in the paper.

    Source: T9, which lists no random erasing.
    Cost: as paper/finetune-vit-h.
    Expect: 0.869 top-1 (paper); not measured here.
    """
    return _finetune("vit_huge_patch14_224", 50, 1e-3, 0.75, 0.2, random_erasing=0.0)


def _scratch(model: str, epochs: int, drop_path: float) -> Finetune:
    """Return T11; it decays no layer more than another and averages the weights."""
    return Finetune(
        from_scratch=True,
        model=model,
        img_size=(224, 224),
        epochs=epochs,
        batch_size=4096,
        drop_last=True,
        base_lr=1e-4,
        min_lr=0.0,
        warmup_epochs=20,
        weight_decay=0.3,
        betas=(0.9, 0.95),
        layer_decay=1.0,
        drop_path=drop_path,
        label_smoothing=0.1,
        mixup=0.8,
        cutmix=1.0,
        auto_augment="rand-m9-mstd0.5-inc1",
        random_erasing=0.0,
        crop_scale=(0.08, 1.0),
        flip=True,
        ema=0.9999,
    )


def scratch_vit_b() -> Finetune:
    """ViT-B/16 from random weights: the supervised arm of the paper.

    Source: T11; it is silent on crop, erasing and lowest rate, which stay those of fine-tuning, none and 0.
    Cost: not measured.
    Expect: 0.823 top-1, 0.821 without the averaged weights (paper); not measured here.
    """
    return _scratch("vit_base_patch16_224", 300, 0.1)


def scratch_vit_l() -> Finetune:
    """ViT-L/16 from random weights: the supervised arm of the paper.

    Source: T11; it is silent on crop, erasing and lowest rate, which stay those of fine-tuning, none and 0.
    Cost: not measured.
    Expect: 0.826 top-1, 0.815 without the averaged weights (paper); not measured here.
    """
    return _scratch("vit_large_patch16_224", 200, 0.2)


def scratch_vit_h() -> Finetune:
    """ViT-H/14 from random weights: the supervised arm of the paper.

    Source: T11; it is silent on crop, erasing and lowest rate, which stay those of fine-tuning, none and 0.
    Cost: not measured.
    Expect: 0.831 top-1, 0.809 without the averaged weights (paper); not measured here.
    """
    return _scratch("vit_huge_patch14_224", 200, 0.2)
