"""docs/conformance.md says what the audits and the ledger say, and the ledger names nothing that is not there."""

import ast
import json
import re
from pathlib import Path

import pytest

from maekit.conformance import ledger, page, suite
from maekit.conformance.check import CRASHED, DEVIATES, OK

REPO = Path(__file__).parents[2]
AUDITS = {file.stem: json.loads(file.read_text("utf-8")) for file in sorted((REPO / "docs/conformance").glob("*.json"))}
LABELS = {row.label for row in ledger.ROWS}


def statuses(audit: str) -> dict[str, str]:
    return {record["check"]: record["status"] for record in AUDITS[audit]["checks"]}


def test_the_page_is_what_the_generator_gives_now() -> None:
    assert (REPO / "docs/conformance.md").read_text("utf-8") == page.page(list(AUDITS.values())), "make conformance"


def test_every_defect_family_of_facts_and_trap_has_a_row_and_every_row_an_answer() -> None:
    assert {f"D{n}" for n in range(1, 24)} | {f"trap 4.{n}" for n in range(1, 19)} <= LABELS
    assert {label.split()[0] for label in LABELS if label.startswith("3.")} == {f"3.{n}" for n in range(1, 11)}
    assert len(LABELS) == len(ledger.ROWS)
    for row in ledger.ROWS:
        assert bool(row.reason) != bool(row.tests or ledger.checks_of(row.label)), row.label


def test_every_label_that_a_check_carries_is_a_row() -> None:
    assert not {label for check in suite.CHECKS for label in check.rows} - LABELS


def test_every_test_that_the_ledger_names_exists() -> None:
    for row in ledger.ROWS:
        for name in row.tests:
            file, _, function = name.partition("::")
            tree = ast.parse((REPO / "tests" / file).read_text())
            assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


def test_known_defects_name_checks_that_are_there_and_carry_their_label() -> None:
    names = {check.name: check for check in suite.CHECKS}
    for defect in ledger.KNOWN:
        assert {name for name in defect.checks if defect.label in names[name].rows}, defect


def test_every_check_says_source_tolerance_reason_and_consequence() -> None:
    assert len({check.name for check in suite.CHECKS}) == len(suite.CHECKS)
    for check in suite.CHECKS:
        assert all([check.title, check.source, check.tolerance, check.reason, check.consequence]), check.name
        assert re.fullmatch(r"[a-z-]+", check.name)


def test_the_audit_of_maekit_that_is_kept_is_clean_and_of_these_checks() -> None:
    (own,) = [name for name, audit in AUDITS.items() if audit["audited"]["name"] == "maekit"]
    assert statuses(own) == dict.fromkeys((check.name for check in suite.CHECKS), OK)


@pytest.mark.parametrize(
    ("audit", "defect"),
    [
        ("transformers-5.24.0", "D1"),
        ("transformers-4.57.6", "D2"),
        ("lightly-1.6.0", "D4"),
        ("lightly-1.6.0", "D5"),
        ("lightly-1.6.0", "D6"),
        ("stable-pretraining-0.1.8", "D12"),
        ("transformers-5.24.0", "D21"),
        ("transformers-5.24.0", "D23"),
    ],
)
def test_the_audits_that_are_kept_show_the_defects(audit: str, defect: str) -> None:
    (known,) = [entry for entry in ledger.KNOWN if entry.label == defect]
    assert {statuses(audit)[name] for name in known.checks} == {DEVIATES}


def test_no_kept_audit_crashed() -> None:
    assert not [name for name in AUDITS if CRASHED in statuses(name).values()]
