"""The values of a recipe, each beside the place that published it: a value without a source cannot be written down."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from maekit.settings import Settings

S = TypeVar("S", bound=Settings)

OURS = "our own"
"""Source of a value that nobody published."""


class Cited(NamedTuple):
    """One value and where it is from.

    Attributes:
        value: as the settings class takes it.
        source: "paper T8" (a table of arXiv 2111.06377), "repo (FINETUNE.md)" (the authors' public code), `OURS`.
        others: what other sources say, by source: where paper and code disagree, both are shown.
    """

    value: Any
    source: str
    others: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Recipe(Generic[S]):
    """The settings that a named run decides, and the source of each of them.

    Attributes:
        settings: the verb's; what the recipe leaves open has its default.
        cited: exactly the settings decided, by name.
    """

    settings: S
    cited: dict[str, Cited]


def recipe(kind: type[S], values: Mapping[str, Cited]) -> Recipe[S]:
    """Build the settings of a recipe from cited values; an unknown name or a wrong value is refused by `kind`."""
    return Recipe(kind(**{name: cited.value for name, cited in values.items()}), dict(values))


def ours(**values: Any) -> dict[str, Cited]:
    """Cite values that were chosen for this package."""
    return {name: Cited(value, OURS) for name, value in values.items()}
