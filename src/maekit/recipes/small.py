"""Runs for small colour images, such as the 32 x 32 of CIFAR-10, on one ordinary machine."""

from maekit.recipes.cited import Recipe, ours, recipe
from maekit.settings import Finetune, Pretrain

MODEL = "vit_tiny_patch16_224"


def pretrain_32() -> Recipe[Pretrain]:
    """Small images (32 px): a reduced encoder, 128 wide with 4 blocks, on 64 patches.

    Source: our own; patch 4 keeps as many patches as details of such images allow.
    Cost: CIFAR-10 in 1 h 25 min on one busy core (docs/experiments.md).
    Expect: CIFAR-10 with 10 % of the labels: kNN 0.424, linear probe 0.547; a random encoder 0.291 and 0.416.
    """
    values = ours(
        model=MODEL,
        img_size=(32, 32),
        patch_size=4,
        embed_dim=128,
        depth=4,
        num_heads=4,
        decoder_dim=64,
        decoder_depth=1,
        decoder_heads=4,
        target="norm_pixel",
        mask_ratio=0.75,
        epochs=50,
        batch_size=256,
        base_lr=1e-3,
        warmup_epochs=2,
        crop_scale=(0.5, 1.0),
    )
    return recipe(Pretrain, values)


def finetune_32() -> Recipe[Finetune]:
    """Small images (32 px) with labels, from small/pretrain-32.

    Source: our own; erasing and strong augmentation are off, since they leave little of 32 pixels.
    Cost: not measured here.
    Expect: not measured here.
    """
    values = ours(
        model=MODEL,
        img_size=(32, 32),
        patch_size=4,
        embed_dim=128,
        depth=4,
        num_heads=4,
        epochs=50,
        batch_size=256,
        base_lr=1e-3,
        warmup_epochs=5,
        layer_decay=0.75,
        drop_path=0.1,
        auto_augment=None,
        random_erasing=0.0,
        crop_scale=(0.4, 1.0),
        crop_pct=1.0,
    )
    return recipe(Finetune, values)
