"""Collects what the parity tests measured; `make parity` prints the table and renews docs/parity.md."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from .comparison import END, START, TABLE, Row, markdown, too_far

Report = Callable[[Sequence[Row]], None]


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Report:
    """Return a function: put rows into the table, then fail if one is above its limit."""

    def book(rows: Sequence[Row]) -> None:
        for row in rows:
            record_property("parity", list(row))
        assert not too_far(rows), "\n" + markdown(rows)

    return book


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TABLE is None:
        return
    reports = [one for group in ("passed", "failed") for one in terminalreporter.stats.get(group, [])]
    rows = sorted(Row(*row) for one in reports for name, row in one.user_properties if name == "parity")
    terminalreporter.write_line(markdown(rows))
    file = Path(TABLE)
    before, _, rest = file.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    file.write_text(f"{before}{START}\n{markdown(rows)}\n{END}{after}", encoding="utf-8")
