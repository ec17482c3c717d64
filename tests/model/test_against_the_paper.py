"""The fast path equals the method as the paper tells it (tests/model/reference.py), in values and gradients."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from maekit.model.mae import MaskedAutoencoder
from maekit.model.masking import len_keep
from maekit.model.patches import patchify


def _load_reference() -> ModuleType:
    # tests are no package (importmode importlib), so a neighbour is loaded by its path
    spec = importlib.util.spec_from_file_location("reference", Path(__file__).with_name("reference.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
