"""Named runs. A recipe is a function that returns the settings it decides; all others keep their defaults.

Its docstring is what ``maekit recipes`` shows: one line of purpose, then the labelled lines Source, Cost and Expect.
A figure that nobody measured with this package says so.
"""

import difflib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass

from maekit.errors import MaekitError, clean
from maekit.recipes import builtin, paper, small
from maekit.settings import Settings

RECIPES: dict[str, Callable[[], Settings]] = {
    "builtin/pretrain-fashion": builtin.pretrain_fashion,
    "builtin/finetune-fashion": builtin.finetune_fashion,
    "small/pretrain-32": small.pretrain_32,
    "small/finetune-32": small.finetune_32,
    "paper/pretrain-vit-ti": paper.pretrain_vit_ti,
    "paper/pretrain-vit-s": paper.pretrain_vit_s,
    "paper/pretrain-vit-b": paper.pretrain_vit_b,
    "paper/pretrain-vit-l": paper.pretrain_vit_l,
    "paper/pretrain-vit-h": paper.pretrain_vit_h,
    "paper/pretrain-vit-h448": paper.pretrain_vit_h448,
    "paper/finetune-vit-b": paper.finetune_vit_b,
    "paper/finetune-vit-l": paper.finetune_vit_l,
    "paper/finetune-vit-h": paper.finetune_vit_h,
    "paper/finetune-vit-h448": paper.finetune_vit_h448,
    "paper/finetune-t9-vit-b": paper.finetune_t9_vit_b,
    "paper/finetune-t9-vit-l": paper.finetune_t9_vit_l,
    "paper/finetune-t9-vit-h": paper.finetune_t9_vit_h,
    "paper/scratch-vit-b": paper.scratch_vit_b,
    "paper/scratch-vit-l": paper.scratch_vit_l,
    "paper/scratch-vit-h": paper.scratch_vit_h,
}


@dataclass(frozen=True)
class Entry:
    """What a recipe's docstring says, and the verb it is for."""

    name: str
    verb: str
    purpose: str
    source: str
    cost: str
    expect: str


def find(name: str) -> Callable[[], Settings]:
    """Return the recipe of that name.

    Raises:
        MaekitError: E-CONFIG-RECIPE, with the nearest name.
    """
    if name in RECIPES:
        return RECIPES[name]
    near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.4)
    guess = f" (did you mean {near[0]!r}?)" if near else ""
    raise MaekitError("E-CONFIG-RECIPE", f"unknown recipe {clean(name, 60)!r}{guess}", hint="maekit recipes")


def describe() -> list[Entry]:
    """Return one entry for each recipe, in the order of `RECIPES`."""
    return [_entry(name, recipe) for name, recipe in RECIPES.items()]


def _entry(name: str, recipe: Callable[[], Settings]) -> Entry:
    text = inspect.getdoc(recipe) or ""
    labelled = {
        label: " ".join(part.split())
        for label, part in re.findall(r"^(Source|Cost|Expect): (.*?)(?=^\w+: |\Z)", text, re.MULTILINE | re.DOTALL)
    }
    purpose = text.partition("\n")[0].rstrip(".")
    verb = type(recipe()).__name__.lower()
    return Entry(name, verb, purpose, labelled["Source"], labelled["Cost"], labelled["Expect"])
