"""Names from others' disks do no harm in a table; numbers stay numbers."""

import csv
import io

import pytest

from maekit.report.tables import harmless, to_csv, to_markdown


@pytest.mark.parametrize("name", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\tx"])
def test_what_a_spreadsheet_would_run_stands_behind_an_apostrophe(name: str) -> None:
    (line,) = csv.reader(io.StringIO(to_csv([name], []).decode(), newline=""))
    assert line == ["'" + name]


def test_numbers_and_names_stay_as_they_are_and_what_is_unknown_is_empty() -> None:
    rows = list(csv.reader(io.StringIO(to_csv(["a"], [["-0.25"], [-0.25], [None], ["a|b, c"], ["-1e-3"]]).decode())))
    assert rows == [["a"], ["-0.25"], ["-0.25"], [""], ["a|b, c"], ["-1e-3"]]


def test_half_a_character_and_a_return_can_be_written() -> None:
    assert harmless("a\r=b") == "a\\r=b"  # a reader would begin a line there
    assert harmless("a\udc80") == "a\\udc80" and to_csv(["x"], [["a\udc80"]]) == b"x\na\\udc80\n"


def test_a_bar_in_a_name_does_not_end_the_cell() -> None:
    assert to_markdown(["a|b"], [["c|d", 0.5]]).decode().splitlines()[2] == "| c\\|d | 0.500 |"
