"""Audit an implementation: this installation, a peer's, a file of weights or a user's own model.

Exit code 1 when a check deviates, or crashes on the model.
"""

import textwrap
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from maekit import __version__
from maekit.conformance.adapter import Adapter, load_adapter
from maekit.conformance.check import CRASHED, DEVIATES, NOT_SHOWN, OK, Finding, audit
from maekit.conformance.peers import peer
from maekit.conformance.suite import OF_A_FILE, chosen
from maekit.settings import Doctor
from maekit.tasks import Result

FINDINGS = 1
"""Exit code when something deviates."""
SHOWN = 110
"""Columns of a found value in the table; ``--json`` has it whole."""


def doctor(settings: Doctor) -> Result:
    """Run the checks and return every finding.

    Raises:
        MaekitError: E-CONFIG-CHECK, E-CONFIG-PEER, E-CONFIG-MODEL, E-USAGE-MODULE,
            E-USAGE-ADAPTER, E-ENV-IMPORT, E-CKPT-.
    """
    adapter: Any = _adapter(settings)
    checks = OF_A_FILE if settings.checkpoint and not settings.only else chosen(settings.only)
    findings = audit(adapter, checks)
    head = {
        "name": getattr(adapter, "name", settings.module),
        "version": getattr(adapter, "version", ""),
        "how": getattr(adapter, "how", ""),
        "with": f"maekit {__version__}, torch {version('torch')}, timm {version('timm')}",
    }
    counts = Counter(finding.status for finding in findings)
    metrics: dict[str, Any] = {
        "audited": head,
        "counts": {status: counts[status] for status in (OK, DEVIATES, NOT_SHOWN, CRASHED)},
        "checks": [as_record(finding) for finding in findings],
    }
    return Result(metrics, "\n".join(_table(head, metrics["counts"], findings)), FINDINGS * bool(_wrong(findings)))


def _adapter(settings: Doctor) -> Adapter:
    """Return what is to be audited."""
    if settings.model is not None:
        return peer(settings.model)
    if settings.module is not None:
        return load_adapter(settings.module)
    # only now: a peer's environment need not hold all that maekit itself rests on
    from maekit.conformance.own import File, Own

    return Own() if settings.checkpoint is None else File(settings.checkpoint)


def as_record(finding: Finding) -> dict[str, Any]:
    """Return a finding as plain values."""
    check = finding.check
    return {
        "check": check.name,
        "status": finding.status,
        "found": finding.found,
        "expected": finding.expected,
        "title": check.title,
        "tolerance": check.tolerance,
        "reason": check.reason,
        "consequence": check.consequence,
        "source": check.source,
        "rows": list(check.rows),
    }


def _wrong(findings: Sequence[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.status in (DEVIATES, CRASHED)]


def _table(head: dict[str, str], counts: dict[str, int], findings: Sequence[Finding]) -> list[str]:
    """Return one line a check; under those that deviate what was expected, what it means, where the rule stands."""
    lines = [
        f"{head['name']} {head['version']}".rstrip(),
        *filter(None, (head["how"], f"looked at with {head['with']}")),
        "",
    ]
    for finding in findings:
        lines.append(f"{finding.status:<9}  {finding.check.name:<25}  {_cut(finding.found)}")
        if finding.status in (DEVIATES, CRASHED):
            where = ", ".join([finding.check.source, *finding.check.rows])
            more = {"expected": finding.expected, "means": finding.check.consequence, "source": where}
            lines += [_indented(word, text) for word, text in more.items() if text]
    numbers = ", ".join(f"{number} {status}" for status, number in counts.items() if number)
    return [*lines, "", f"{len(findings)} checks: {numbers}"]


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def _indented(word: str, text: str) -> str:
    return textwrap.fill(text, 140, initial_indent=f"{'':13}{word:<9} ", subsequent_indent=" " * 23)
