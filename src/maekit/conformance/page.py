"""docs/conformance.md, from the JSON of audits and from the ledger; the same input gives the same text."""

from collections.abc import Iterable, Sequence
from typing import Any

from maekit.conformance.check import CRASHED, DEVIATES, NOT_SHOWN, OK
from maekit.conformance.ledger import DEFECTS, FACTS, KNOWN, TRAPS, Row, checks_of
from maekit.conformance.suite import CHECKS

Audit = dict[str, Any]
BY_NAME = {check.name: check for check in CHECKS}

HEAD = """# Conformance

What `maekit doctor` found, here and in other implementations, and what holds every row of the method. Written by
`make conformance` from the audits in `docs/conformance/`; a test keeps it so. How to audit your own model:
[audit.md](audit.md).

A defect of a peer is one of the version named, looked for by running it; peers are audited as they come, drawn from
scratch, three blocks deep. "Not shown" says that the peer has no such part, or that its adapter does not reach it.
"""


def slim(audit: Audit) -> Audit:
    """Keep of the JSON of ``maekit doctor --json`` what changes from run to run; the rest is in the checks."""
    keys = ("check", "status", "found", "expected")
    return {
        "audited": audit["audited"],
        "counts": audit["counts"],
        "checks": [{key: record[key] for key in keys} for record in audit["checks"]],
    }


def page(audits: Sequence[Audit]) -> str:
    """Return the page; the audit of maekit itself comes first, peers by name and version."""
    ordered = sorted(audits, key=lambda audit: (audit["audited"]["name"] != "maekit", *_name(audit)))
    sections = [HEAD, *(_own(a) if a["audited"]["name"] == "maekit" else _peer(a) for a in ordered)]
    return "\n".join([*sections, _defects(ordered), _ledger()])


def _name(audit: Audit) -> tuple[str, str]:
    return audit["audited"]["name"], audit["audited"]["version"]


def _title(audit: Audit) -> str:
    counts = ", ".join(f"{number} {status}" for status, number in audit["counts"].items() if number)
    head = audit["audited"]
    return (
        f"## {' '.join(_name(audit))}\n\n{head['how']}; looked at with {head['with']}.\n\n"
        f"{sum(audit['counts'].values())} checks: {counts}.\n"
    )


def _own(audit: Audit) -> str:
    rows = []
    for record in audit["checks"]:
        check = BY_NAME[record["check"]]
        tolerance = f"{check.tolerance}: {check.reason}"
        rows.append((f"`{check.name}`", check.title, record["status"], record["found"], tolerance, check.source))
    return _title(audit) + "\n" + _table(("check", "what", "status", "found", "tolerance: why", "source"), rows)


def _peer(audit: Audit) -> str:
    rows, missing = [], []
    for record in audit["checks"]:
        check = BY_NAME[record["check"]]
        if record["status"] in (DEVIATES, CRASHED):
            found = record["found"] if record["status"] == DEVIATES else f"crashed: {record['found']}"
            labels = ", ".join(check.rows)
            rows.append((f"`{check.name}`", found, record["expected"], check.consequence, f"{check.source}; {labels}"))
        elif record["status"] == NOT_SHOWN:
            missing.append((f"`{check.name}`", record["found"]))
    right = [f"`{record['check']}`" for record in audit["checks"] if record["status"] == OK]
    parts = [_title(audit), _table(("check", "found", "expected", "consequence", "reference"), rows)]
    parts.append(f"As it should be: {', '.join(right)}.\n")
    reasons: dict[str, list[str]] = {}
    for name, reason in missing:
        reasons.setdefault(reason, []).append(name)
    parts += ["Not shown:\n", *(f"- {reason}: {', '.join(names)}" for reason, names in reasons.items()), ""]
    return "\n".join(parts)


def _defects(audits: Sequence[Audit]) -> str:
    """Say of every known defect whether the versions looked at have it."""
    rows = []
    for defect in KNOWN:
        for audit in audits:
            if audit["audited"]["name"] != defect.peer:
                continue
            status = {record["check"]: record["status"] for record in audit["checks"]}
            there = [f"`{name}`" for name in defect.checks if status.get(name) in (DEVIATES, CRASHED)]
            gone = [f"`{name}`" for name in defect.checks if status.get(name) == OK]
            unseen = [f"`{name}`" for name in defect.checks if status.get(name) not in (DEVIATES, CRASHED, OK)]
            verdict = (
                "there"
                if there and not gone
                else "in part"
                if there
                else "mended or never there"
                if gone
                else "not shown"
            )
            rows.append((defect.label, " ".join(_name(audit)), verdict, _words(there), _words(gone), _words(unseen)))
    head = ("defect", "version looked at", "verdict", "deviates", "is right", "not shown")
    return "## Known defects, looked for by running\n\n" + _table(head, rows)


def _ledger() -> str:
    parts = ["## Ledger\n", "What holds each row: a check of `maekit doctor`, a test below `tests/`, or a reason.\n"]
    for title, rows in (("Defects found elsewhere", DEFECTS), ("Facts to match", FACTS), ("Traps", TRAPS)):
        parts += [f"### {title}\n", _table(("row", "what", "held by"), [(r.label, r.fact, held_by(r)) for r in rows])]
    return "\n".join(parts)


def held_by(row: Row) -> str:
    """Say what holds a row."""
    held = [f"check `{name}`" for name in checks_of(row.label)] + [f"test `{name}`" for name in row.tests]
    return "; ".join(held) or f"not applicable, because {row.reason}"


def _words(names: list[str]) -> str:
    return ", ".join(names) or "-"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [_line(head), "|" + "---|" * len(head), *map(_line, rows)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
