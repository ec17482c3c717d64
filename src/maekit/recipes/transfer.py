"""Fine-tuning on other data sets: those of the paper's Table 6, CIFAR, and users' own by their size.

The paper follows T9 and adjusts learning rate and epochs for each data set (arXiv 2111.06377, appendix A.5) without
saying to what: here they are T9's. ViT-L and ViT-H: ``--recipe finetune-vit-l16-paper`` with the same ``--data``.

Own sets: what has to change with the number of labelled images is the length and how hard the images are augmented. A
transformer needs some thousands of steps whatever the set, so few images ask for many epochs and small batches; mixing
and erasing teach invariance where there is plenty, and from few images take away the little there is. Learning rates
are for encoders that were pre-trained; layers far down move little (`layer_decay`), the less the fewer the labels.
"""

from typing import Any

from maekit.recipes.cited import Cited, Recipe, ours, recipe
from maekit.recipes.paper import T9, finetune_vit_b16_paper
from maekit.settings import Finetune

A5 = "paper A.5"


def _table_6() -> Recipe[Finetune]:
    """Return T9 for ViT-B/16; learning rate and epochs were adjusted to each data set, to values not published."""
    values = dict(finetune_vit_b16_paper().cited)
    for name in ("base_lr", "epochs"):
        values[name] = Cited(values[name].value, T9, {A5: "adjusted for each data set, not published"})
    return recipe(Finetune, values)


def finetune_inat17() -> Recipe[Finetune]:
    """ViT-B/16 on iNaturalist 2017 (5,089 species): --data FOLDER with train2017.json and val2017.json.

    Source: T9, as appendix A.5 says; its adjusted learning rate and epochs are not published.
    Cost: not measured.
    Expect: 0.705 top-1, ViT-L 0.757, ViT-H 0.793, at 448 px 0.834; best before 0.754 (paper); not measured here.
    """
    return _table_6()


def finetune_inat18() -> Recipe[Finetune]:
    """ViT-B/16 on iNaturalist 2018 (8,142 species): --data FOLDER with train2018.json and val2018.json.

    Source: T9, as appendix A.5 says; its adjusted learning rate and epochs are not published.
    Cost: not measured.
    Expect: 0.754 top-1, ViT-L 0.801, ViT-H 0.830, at 448 px 0.868; best before 0.812 (paper); not measured here.
    """
    return _table_6()


def finetune_inat19() -> Recipe[Finetune]:
    """ViT-B/16 on iNaturalist 2019 (1,010 species): --data FOLDER with train2019.json and val2019.json.

    Source: T9, as appendix A.5 says; its adjusted learning rate and epochs are not published.
    Cost: not measured.
    Expect: 0.805 top-1, ViT-L 0.834, ViT-H 0.857, at 448 px 0.883; best before 0.841 (paper); not measured here.
    """
    return _table_6()


def finetune_places205() -> Recipe[Finetune]:
    """ViT-B/16 on Places205: --data train_places205.csv --val-data val_places205.csv.

    Source: T9, as appendix A.5 says; its adjusted learning rate and epochs are not published.
    Cost: not measured.
    Expect: 0.639 top-1, ViT-L 0.658, ViT-H 0.659, at 448 px 0.668; best before 0.660 (paper); not measured here.
    """
    return _table_6()


def finetune_places365() -> Recipe[Finetune]:
    """ViT-B/16 on Places365: --data places365_train_standard.txt --val-data places365_val.txt.

    Source: T9, as appendix A.5 says; its adjusted learning rate and epochs are not published.
    Cost: not measured.
    Expect: 0.579 top-1, ViT-L 0.594, ViT-H 0.598, at 448 px 0.603; best before 0.580 (paper); not measured here.
    """
    return _table_6()


def finetune_cifar_224() -> Recipe[Finetune]:
    """ViT-B/16 on CIFAR-10 or CIFAR-100 enlarged to 224 px: --data FOLDER of the hub's parquet files.

    Source: our own; the paper has no CIFAR. The whole image is scored: 32 px have no border to cut off.
    Cost: not measured.
    Expect: not measured here.
    """
    values: dict[str, Any] = dict(
        model="vit_base_patch16_224", img_size=(224, 224), crop_pct=1.0, crop_scale=(0.4, 1.0)
    )
    return recipe(Finetune, {**_own(epochs=100, batch_size=512, base_lr=1e-3), **ours(**values)})


def _own(**changes: Any) -> dict[str, Cited]:
    """Return T9's regularisation with what the size of the set changes."""
    values = dict(
        warmup_epochs=5, min_lr=1e-6, weight_decay=0.05, betas=(0.9, 0.999), layer_decay=0.75, drop_path=0.1,
        label_smoothing=0.1, mixup=0.8, cutmix=1.0, auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.25,
        crop_scale=(0.08, 1.0), flip=True, pool="mean",
    )  # fmt: skip
    return ours(**(values | changes))


def finetune_hundreds() -> Recipe[Finetune]:
    """Own set of a hundred to some thousand labelled images, from RUN: many passes, small batches, mild augmentation.

    Source: our own; no mixing and no erasing, crops of at least .35 of the area, and a gentle RandAugment, since each
        image must stay recognisable; 200 epochs of batches of 32 make thousands of steps; layer_decay .65 as the repo.
    Cost: 200 passes over the set.
    Expect: compare with a linear probe on the same labels, which is hard to beat below some hundred images.
    """
    return recipe(
        Finetune,
        _own(
            epochs=200, batch_size=32, base_lr=4e-3, warmup_epochs=10, layer_decay=0.65, mixup=0.0, cutmix=0.0,
            auto_augment="rand-m5-mstd0.5-inc1", random_erasing=0.0, crop_scale=(0.35, 1.0),
        ),
    )  # fmt: skip


def finetune_thousands() -> Recipe[Finetune]:
    """Own set of some thousand to a hundred thousand labelled images, from RUN: T9's regularisation, smaller batches.

    Source: our own; batches of 128 make ten thousand images 8,000 steps in 100 epochs; mixing pays once a class has
        tens of images, and crops stay above .2 of the area.
    Cost: 100 passes over the set.
    Expect: above the linear probe by more than with hundreds of images; not measured here.
    """
    return recipe(Finetune, _own(epochs=100, batch_size=128, base_lr=2e-3, layer_decay=0.7, crop_scale=(0.2, 1.0)))


def finetune_million() -> Recipe[Finetune]:
    """Own set of several hundred thousand images or more, from RUN: T9 as it stands.

    Source: T9 with the repo's random erasing; a set of ImageNet's size is what it was tuned on.
    Cost: 100 passes over the set; of ImageNet 7 h 11 min on 32 V100 for ViT-B (repo).
    Expect: as the paper's gains over training from scratch: 0.013 top-1 for ViT-B, 0.033 for ViT-L on ImageNet.
    """
    return recipe(Finetune, _own(epochs=100, batch_size=1024, base_lr=1e-3, drop_last=True))
