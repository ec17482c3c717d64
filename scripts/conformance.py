"""Renew docs/conformance.md: audit maekit and every peer that is installed, keep the audits, write the page.

    python scripts/conformance.py [AUDIT.json ...]

AUDIT.json: output of ``maekit doctor --json`` from other environments, as other versions of a peer. An audit is kept as
``docs/conformance/NAME-VERSION.json``; those of versions not installed here stay as they are.
"""

import json
import subprocess
import sys
from pathlib import Path

from maekit.conformance.page import page, slim

DOCS = Path(__file__).parents[1] / "docs"
SUBJECTS = ([], *(["--model", name] for name in ("transformers:vit-mae-base", "lightly", "stable-pretraining",
                                                 "timm:vit_base_patch16_224.mae")))  # fmt: skip


def run(words: list[str]) -> str | None:
    """Return the JSON of an audit, None where the library is not installed."""
    command = [sys.executable, "-m", "maekit", "doctor", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        sys.stderr.write(done.stderr)
        return None
    return done.stdout


def keep(text: str) -> None:
    """Write one audit."""
    audit = slim(json.loads(text.strip().splitlines()[-1]))
    name = "-".join(audit["audited"][key] for key in ("name", "version")).replace(":", "-")
    (DOCS / "conformance").mkdir(exist_ok=True)
    (DOCS / "conformance" / f"{name}.json").write_text(json.dumps(audit, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for file in sys.argv[1:]:
        keep(Path(file).read_text(encoding="utf-8"))
    for words in SUBJECTS:
        if (found := run(words)) is not None:
            keep(found)
    audits = [json.loads(file.read_text("utf-8")) for file in sorted((DOCS / "conformance").glob("*.json"))]
    (DOCS / "conformance.md").write_text(page(audits), encoding="utf-8")
