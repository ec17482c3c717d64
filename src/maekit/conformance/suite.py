"""All checks, family by family, in the order in which a reader follows a model."""

from collections.abc import Sequence

from maekit.config import suggest
from maekit.conformance import compute, evaluation, finetuning, forward, initial, masking, positions, training
from maekit.conformance.check import Check
from maekit.errors import MaekitError, clean

FAMILIES: dict[str, tuple[Check, ...]] = {
    "initial weights": initial.CHECKS,
    "positions": positions.CHECKS,
    "masking": masking.CHECKS,
    "forward pass and loss": forward.CHECKS,
    "cost and size": compute.CHECKS,
    "pre-training": training.CHECKS,
    "fine-tuning": finetuning.CHECKS,
    "evaluation and files": evaluation.CHECKS,
}
CHECKS: tuple[Check, ...] = tuple(check for family in FAMILIES.values() for check in family)

OF_A_FILE = (*FAMILIES["positions"], *FAMILIES["forward pass and loss"])
"""What is asked of trained weights: places, finite numbers, and that they compute what the method computes."""


def chosen(names: Sequence[str]) -> tuple[Check, ...]:
    """Return the checks of these names; all for none.

    Raises:
        MaekitError: E-CONFIG-CHECK for an unknown name.
    """
    known = {check.name: check for check in CHECKS}
    for name in names:
        if name not in known:
            raise MaekitError("E-CONFIG-CHECK", f"unknown check {clean(name, 60)!r}{suggest(name, known)}",
                              hint="maekit doctor without --only lists them")  # fmt: skip
    return tuple(known[name] for name in names) or CHECKS
