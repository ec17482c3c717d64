"""One file = one verb: each reads top to bottom like a script and composes data, model and train."""

from dataclasses import dataclass

STOPPED = 75
"""Exit code of what the same command goes on with (EX_TEMPFAIL of sysexits.h)."""


@dataclass(frozen=True)
class Result:
    """What a verb found.

    Attributes:
        metrics: JSON-able, printed with ``--json``.
        text: for people.
        exit_code: the process's.
    """

    metrics: dict[str, object]
    text: str = ""
    exit_code: int = 0
