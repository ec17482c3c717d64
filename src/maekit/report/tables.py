"""Tables as files: CSV for programs, Markdown for people."""

import csv
import io
from collections.abc import Sequence

Cell = str | float | int | None


def to_csv(headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> bytes:
    """Return a table as CSV; an unknown value is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(headers)
    writer.writerows([["" if value is None else value for value in row] for row in rows])
    return text.getvalue().encode()


def to_markdown(headers: Sequence[str], rows: Sequence[Sequence[Cell]], notes: Sequence[str] = ()) -> bytes:
    """Return a table as Markdown, numbers to three digits, with lines underneath."""
    lines = [headers, ["---"] * len(headers), *([_spell(value) for value in row] for row in rows)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return (table + "".join(f"\n{note}\n" for note in notes)).encode()


def _spell(value: Cell) -> str:
    if value is None:
        return "–"  # noqa: RUF001
    return f"{value:.3f}" if isinstance(value, float) else str(value).replace("|", "\\|")
