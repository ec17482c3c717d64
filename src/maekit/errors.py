"""The one error that users see: what, where, found, expected, what to try.

Every fault a user can cause is raised as `MaekitError`; the command line prints it as one line and
exits with the code of its family. `assert` is for invariants of our own code only.
"""

import re

EXIT_CODES = {"USAGE": 2, "CONFIG": 2, "DATA": 3, "NUM": 4, "CKPT": 4, "ENV": 5, "STOP": 75}
"""Family (the word after ``E-``) -> exit code of the process; a code is ``E-FAMILY-DETAIL``."""

HINTS = {
    "E-CONFIG-DEVICE": "--device auto",
    "E-CONFIG-FILE": "the config.yaml of a run, or maekit config show --verb VERB > FILE.yaml",
    "E-CONFIG-YAML": "the config.yaml of a run, or maekit config show --verb VERB > FILE.yaml",
    "E-CONFIG-VERB": "the verb that the file names",
    "E-CKPT-MISSING": "the folder that --out named when the run was made",
    "E-CKPT-FORMAT": "a run folder, or its encoder.safetensors",
    "E-CKPT-KEYS": "another copy of the file",
    "E-CKPT-SHAPE": "another copy of the file",
    "E-CKPT-NAN": "an earlier checkpoint: RUN/checkpoints/step-N",
    "E-DATA-PATH": "maekit data PATH with the right path",
    "E-DATA-EMPTY": "maekit data PATH shows what is there",
    "E-DATA-LIST": "one path a line, or a header with path and label",
    "E-DATA-COLUMN": "maekit data PATH shows what is there",
    "E-DATA-LABELS": "maekit data PATH shows what is there",
    "E-DATA-TARGETS": "mend the cell, or another --label-column",
    "E-ENV-OUT": "another --out",
}
"""What to try where the place that raises the error knows nothing better."""


class MaekitError(ValueError):
    """One line: ``what: found x, expected y. Try: z`` with a code ``E-FAMILY-DETAIL``.

    Args:
        code: ``E-FAMILY-DETAIL``; the family is a key of `EXIT_CODES`.
        what: what went wrong and where (path, setting, step).
        found: what was there; text from files is escaped and cut.
        expected: what should have been there.
        hint: one action that mends it.
    """

    def __init__(
        self,
        code: str,
        what: str,
        *,
        found: object = None,
        expected: str | None = None,
        hint: str | None = None,
    ) -> None:
        assert re.fullmatch(r"E-[A-Z]+-[A-Z0-9-]+", code) and code.split("-")[1] in EXIT_CODES, code
        self.code, self.exit_code = code, EXIT_CODES[code.split("-")[1]]
        given = {"found": found, "expected": expected}
        facts = ", ".join(f"{word} {clean(value, 400)}" for word, value in given.items() if value is not None)
        hint = hint or HINTS.get(code)
        line = clean(what, 600) + (f": {facts}" if facts else "")
        super().__init__(line + (f". Try: {clean(hint, 400)}" if hint else ""))

    def __reduce__(self) -> tuple[object, ...]:
        return type(self).__new__, (type(self), *self.args), self.__dict__  # what another process gets is the line

    def __str__(self) -> str:
        return f"error[{self.code}]: {self.args[0]}"


def clean(text: object, limit: int = 200) -> str:
    """Return `text` on one line, control characters escaped, cut to `limit` characters.

    File names and file contents can carry newlines and terminal escapes (reliability: message style).
    """
    escaped = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"
