"""Masked autoencoders: from a folder of images to an encoder, its scores and its pictures.

The public API on one screen. Every name is loaded when it is first used, so that ``import maekit`` and the command's
help cost no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maekit.errors import MaekitError
    from maekit.interchange.weights import load_classifier, load_model, save_model
    from maekit.model.mae import MaskedAutoencoder, create_model
    from maekit.model.variant import Variant
    from maekit.settings import (
        Ablate,
        Compare,
        Convert,
        Data,
        Doctor,
        Embed,
        Evaluate,
        Finetune,
        Gallery,
        Inspect,
        Knn,
        Lowshot,
        Pack,
        Partial,
        Pca,
        Predict,
        Pretrain,
        Probe,
        Quickstart,
        Reconstruct,
        Retrieve,
        Robustness,
        Tokenizer,
    )
    from maekit.tasks import Result
    from maekit.tasks.ablate import ablate
    from maekit.tasks.compare import compare
    from maekit.tasks.convert import convert
    from maekit.tasks.doctor import doctor
    from maekit.tasks.embed import embed
    from maekit.tasks.evaluate import evaluate
    from maekit.tasks.finetune import finetune
    from maekit.tasks.gallery import gallery
    from maekit.tasks.inspect import inspect
    from maekit.tasks.knn import knn
    from maekit.tasks.lowshot import lowshot
    from maekit.tasks.pack import pack
    from maekit.tasks.partial import partial
    from maekit.tasks.pca import pca
    from maekit.tasks.predict import predict
    from maekit.tasks.pretrain import pretrain
    from maekit.tasks.probe import probe
    from maekit.tasks.quickstart import quickstart
    from maekit.tasks.reconstruct import reconstruct
    from maekit.tasks.retrieve import retrieve
    from maekit.tasks.robustness import robustness
    from maekit.tasks.tokenizer import tokenizer

__version__ = "0.1.0"

__all__ = [
    "Ablate",
    "Compare",
    "Convert",
    "Data",
    "Doctor",
    "Embed",
    "Evaluate",
    "Finetune",
    "Gallery",
    "Inspect",
    "Knn",
    "Lowshot",
    "MaekitError",
    "MaskedAutoencoder",
    "Pack",
    "Partial",
    "Pca",
    "Predict",
    "Pretrain",
    "Probe",
    "Quickstart",
    "Reconstruct",
    "Result",
    "Retrieve",
    "Robustness",
    "Tokenizer",
    "Variant",
    "__version__",
    "ablate",
    "compare",
    "convert",
    "create_model",
    "doctor",
    "embed",
    "evaluate",
    "finetune",
    "gallery",
    "inspect",
    "knn",
    "load_classifier",
    "load_model",
    "lowshot",
    "pack",
    "partial",
    "pca",
    "predict",
    "pretrain",
    "probe",
    "quickstart",
    "reconstruct",
    "retrieve",
    "robustness",
    "save_model",
    "tokenizer",
]

_HOMES = {
    "maekit.errors": ("MaekitError",),
    "maekit.interchange.weights": ("load_classifier", "load_model", "save_model"),
    "maekit.model.mae": ("MaskedAutoencoder", "create_model"),
    "maekit.model.variant": ("Variant",),
    "maekit.settings": (
        "Ablate",
        "Compare",
        "Convert",
        "Data",
        "Doctor",
        "Embed",
        "Evaluate",
        "Finetune",
        "Gallery",
        "Inspect",
        "Knn",
        "Lowshot",
        "Pack",
        "Partial",
        "Pca",
        "Predict",
        "Pretrain",
        "Probe",
        "Quickstart",
        "Reconstruct",
        "Retrieve",
        "Robustness",
        "Tokenizer",
    ),
    "maekit.tasks": ("Result",),
    "maekit.tasks.ablate": ("ablate",),
    "maekit.tasks.compare": ("compare",),
    "maekit.tasks.convert": ("convert",),
    "maekit.tasks.doctor": ("doctor",),
    "maekit.tasks.embed": ("embed",),
    "maekit.tasks.evaluate": ("evaluate",),
    "maekit.tasks.finetune": ("finetune",),
    "maekit.tasks.gallery": ("gallery",),
    "maekit.tasks.inspect": ("inspect",),
    "maekit.tasks.knn": ("knn",),
    "maekit.tasks.lowshot": ("lowshot",),
    "maekit.tasks.pack": ("pack",),
    "maekit.tasks.partial": ("partial",),
    "maekit.tasks.pca": ("pca",),
    "maekit.tasks.predict": ("predict",),
    "maekit.tasks.pretrain": ("pretrain",),
    "maekit.tasks.probe": ("probe",),
    "maekit.tasks.quickstart": ("quickstart",),
    "maekit.tasks.reconstruct": ("reconstruct",),
    "maekit.tasks.retrieve": ("retrieve",),
    "maekit.tasks.robustness": ("robustness",),
    "maekit.tasks.tokenizer": ("tokenizer",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(home), name)
            return value
    raise AttributeError(f"module 'maekit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
