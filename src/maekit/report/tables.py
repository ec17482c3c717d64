"""Tables as files: CSV for programs, Markdown for people. Names in them come from others' disks."""

import csv
import io
from collections.abc import Sequence

Cell = str | float | int | None
FORMULA = ("=", "+", "-", "@", "\t")
"""What makes spreadsheets run the text of a cell (OWASP, CSV injection)."""


def text(name: str) -> str:
    """Return a name that any encoding can hold: what was read from a file may hold half a character."""
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode()


def harmless(name: str) -> str:
    r"""Return the text of a cell that no spreadsheet takes for a formula; numbers are none.

    A return, which readers of CSV take for the end of a line and the writer does not quote, is written ``\r``.
    """
    name = text(name).replace("\r", "\\r")
    return f"'{name}" if name.startswith(FORMULA) and not _is_number(name) else name


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True


def to_csv(headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> bytes:
    """Return a table as CSV; an unknown value is an empty cell, a text is `harmless`."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(map(harmless, headers))
    writer.writerows([[_cell(value) for value in row] for row in rows])
    return stream.getvalue().encode()


def _cell(value: Cell) -> str | float | int:
    return "" if value is None else harmless(value) if isinstance(value, str) else value


def to_markdown(headers: Sequence[str], rows: Sequence[Sequence[Cell]], notes: Sequence[str] = ()) -> bytes:
    """Return a table as Markdown, numbers to three digits, with lines underneath."""
    lines = [headers, ["---"] * len(headers), *([_spell(value) for value in row] for row in rows)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return (table + "".join(f"\n{note}\n" for note in notes)).encode()


def _spell(value: Cell) -> str:
    if value is None:
        return "–"  # noqa: RUF001
    return f"{value:.3f}" if isinstance(value, float) else str(value).replace("|", "\\|")
