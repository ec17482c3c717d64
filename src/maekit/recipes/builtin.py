"""Runs on the images that come with the package (``builtin:fashion``): minutes on two CPU cores."""

from maekit.recipes.cited import Recipe, ours, recipe
from maekit.settings import Finetune, Pretrain

DATA = "builtin:fashion"
MODEL = "vit_tiny_patch16_224"


def pretrain_fashion() -> Recipe[Pretrain]:
    """Built-in clothes (28 px, grey): an encoder 96 wide with 4 blocks on 16 patches.

    Source: our own; plain pixels, since normalised ones suffer from this set's empty patches.
    Cost: about 2 minutes on 2 CPU cores.
    Expect: kNN 0.756, linear probe 0.805 with all labels; a random encoder 0.681 and 0.746 (docs/experiments.md).
    """
    values = ours(
        data=DATA,
        model=MODEL,
        img_size=(28, 28),
        channels=1,
        patch_size=7,
        embed_dim=96,
        depth=4,
        num_heads=4,
        decoder_dim=64,
        decoder_depth=1,
        decoder_heads=4,
        target="pixel",
        mask_ratio=0.6,
        epochs=24,
        batch_size=128,
        base_lr=2e-3,
        crop_scale=(0.5, 1.0),
    )
    return recipe(Pretrain, values)


def finetune_fashion() -> Recipe[Finetune]:
    """Built-in clothes with 10 labels a class, from builtin/pretrain-fashion.

    Source: our own; few labels ask for many passes and mild augmentation.
    Cost: less than a minute on 2 CPU cores.
    Expect: 0.661 +- 0.019 from MAE, 0.598 +- 0.007 from scratch, three seeds (docs/experiments.md).
    """
    values = ours(
        data=DATA,
        labels="10/class",
        model=MODEL,
        img_size=(28, 28),
        channels=1,
        patch_size=7,
        embed_dim=96,
        depth=4,
        num_heads=4,
        epochs=80,
        batch_size=50,
        base_lr=1.5e-2,
        layer_decay=0.75,
        drop_path=0.1,
        mixup=0.0,
        cutmix=0.0,
        auto_augment=None,
        random_erasing=0.0,
        crop_scale=(0.6, 1.0),
        crop_pct=1.0,
        label_smoothing=0.1,
    )
    return recipe(Finetune, values)
