"""Named runs. A recipe is a function that returns the settings it decides, each with its source.

All other settings keep their defaults. The function's docstring is what ``maekit recipes`` shows: one line of purpose,
then the labelled lines Source, Cost and Expect. A figure that nobody measured with this package says so.
"""

import difflib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from maekit.errors import MaekitError, clean
from maekit.recipes import builtin, cost, paper, small, tables, transfer
from maekit.recipes.cited import Recipe

RECIPES: dict[str, Callable[[], Recipe[Any]]] = {
    "builtin/pretrain-fashion": builtin.pretrain_fashion,
    "builtin/finetune-fashion": builtin.finetune_fashion,
    "small/pretrain-32": small.pretrain_32,
    "small/finetune-32": small.finetune_32,
    "paper/pretrain-vit-ti16": paper.pretrain_vit_ti16,
    "paper/pretrain-vit-s16": paper.pretrain_vit_s16,
    "paper/pretrain-vit-b16": paper.pretrain_vit_b16,
    "paper/pretrain-vit-l16": paper.pretrain_vit_l16,
    "paper/pretrain-vit-h14": paper.pretrain_vit_h14,
    "paper/pretrain-vit-h14-448": paper.pretrain_vit_h14_448,
    "paper/finetune-vit-b16-repo": paper.finetune_vit_b16_repo,
    "paper/finetune-vit-l16-repo": paper.finetune_vit_l16_repo,
    "paper/finetune-vit-h14-repo": paper.finetune_vit_h14_repo,
    "paper/finetune-vit-h14-448-repo": paper.finetune_vit_h14_448_repo,
    "paper/finetune-vit-b16-paper": paper.finetune_vit_b16_paper,
    "paper/finetune-vit-l16-paper": paper.finetune_vit_l16_paper,
    "paper/finetune-vit-h14-paper": paper.finetune_vit_h14_paper,
    "paper/finetune-vit-h14-448-paper": paper.finetune_vit_h14_448_paper,
    "paper/probe-vit-b16": paper.probe_vit_b16,
    "paper/probe-vit-l16": paper.probe_vit_l16,
    "paper/probe-vit-h14": paper.probe_vit_h14,
    "paper/scratch-vit-b16": paper.scratch_vit_b16,
    "paper/scratch-vit-l16": paper.scratch_vit_l16,
    "paper/scratch-vit-h14": paper.scratch_vit_h14,
    "transfer/finetune-inat17": transfer.finetune_inat17,
    "transfer/finetune-inat18": transfer.finetune_inat18,
    "transfer/finetune-inat19": transfer.finetune_inat19,
    "transfer/finetune-places205": transfer.finetune_places205,
    "transfer/finetune-places365": transfer.finetune_places365,
    "transfer/finetune-cifar-224": transfer.finetune_cifar_224,
    "own/finetune-hundreds": transfer.finetune_hundreds,
    "own/finetune-thousands": transfer.finetune_thousands,
    "own/finetune-million": transfer.finetune_million,
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


def find(word: str) -> tuple[str, Recipe[Any]]:
    """Return name and content of the recipe that `word` names, with its group or without where one only has the name.

    Beside `RECIPES` these are the rows of the paper's tables: ``paper/table1a-decoder-depth/1``.

    Raises:
        MaekitError: E-CONFIG-RECIPE, with the nearest name.
    """
    named = [name for name in RECIPES if word in (name, name.partition("/")[2])]
    if len(named) == 1:
        return named[0], RECIPES[named[0]]()
    rows = tables.named()
    for name in (word, f"{tables.GROUP}/{word}"):
        if name in rows:
            return name, tables.row_recipe(*rows[name])
    raise MaekitError("E-CONFIG-RECIPE", f"unknown recipe {clean(word, 60)!r}{nearest(word)}", hint="maekit recipes")


def nearest(word: str) -> str:
    """Return `` (did you mean 'x'?)`` for a name that no recipe has, or an empty string where none is near."""
    every = [*RECIPES, *(f"{tables.GROUP}/{name}" for name in tables.TABLES), *tables.named()]
    names = {name.partition("/")[2]: name for name in every} | {name: name for name in every}
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.4)
    return f" (did you mean {names[near[0]]!r}?)" if near else ""


def is_known(name: str) -> bool:
    """Tell whether a recipe has this full name."""
    return name in RECIPES or name in tables.named()


def describe() -> list[Entry]:
    """Return one entry for each recipe, in the order of `RECIPES`."""
    return [entry(name) for name in RECIPES]


def entry(name: str) -> Entry:
    """Return what the docstring of the recipe of this full name says, or a table of its row."""
    if name not in RECIPES:
        return _of_row(name, *tables.named()[name])
    recipe = RECIPES[name]
    text = inspect.getdoc(recipe) or ""
    labelled = {
        label: " ".join(part.split())
        for label, part in re.findall(r"^(Source|Cost|Expect): (.*?)(?=^\w+: |\Z)", text, re.MULTILINE | re.DOTALL)
    }
    purpose = text.partition("\n")[0].rstrip(".")
    verb = type(recipe().settings).__name__.lower()
    return Entry(name, verb, purpose, labelled["Source"], labelled["Cost"], labelled["Expect"])


def _of_row(name: str, table: tables.Table, row: tables.Row) -> Entry:
    """Return what the table says of a row."""
    hours = ", ".join(f"{value:,.0f} {what}" for what, value in tables.hours(table, row).items())
    figures = {"finetune": "fine-tuned {:g} top-1", "probe": "linear probe {:g}", "hours": "{:g} h on 128 TPU-v3 cores"}
    found = ", ".join(figures[measure].format(value) for measure, value in row.paper.items())
    return Entry(
        name,
        type(tables.row_recipe(table, row).settings).__name__.lower(),
        f"{table.title}: {row.label}",
        table.source + (f"; {row.note}" if row.note else ""),
        f"{hours} hours of one {cost.GPU} at {cost.MFU:.0%} of its {cost.GPU_FLOPS / 1e12:g} TFLOP/s (estimated)",
        f"{found} (paper); not measured here" if found else "no published figure; not measured here",
    )
