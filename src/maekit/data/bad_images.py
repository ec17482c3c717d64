"""The account of images that could not be read: named once, listed in a file, and a stop when they are too many.

The list outlives a stop. A run that goes on at step N counts again what was found before step N, and takes the images
before it as seen, so it stops at the same image as a run that was never interrupted.
"""

import contextlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from maekit.data.samples import Bad
from maekit.disk import own_file
from maekit.errors import MaekitError

FILE = "bad_files.jsonl"
"""Where a run folder lists them."""
AT_LEAST = 5
"""Bad images that are put up with in any case."""
ONE_IN = 100
"""Of so many images seen one may be bad."""

UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""What a damaged line of the list comes to."""

Policy = Literal["skip", "stop"]

log = logging.getLogger("maekit")


def most_bad(seen: int, policy: Policy = "skip") -> int:
    """Return how many bad images are put up with of those seen."""
    return 0 if policy == "stop" else max(AT_LEAST, seen // ONE_IN)


class BadImages:
    """What could not be read so far.

    Args:
        ids: names of all images.
        policy: "skip" up to the limit, or "stop" at the first.
        looked_at: images that were read before training: they count as seen.
        file: list of them for the user, one JSON object a line: id, reason, and the step that met it.

    Attributes:
        found: name -> reason.
        seen: images of this process so far, at first those of earlier launches.
        step: the step that is read for.
    """

    def __init__(
        self, ids: Sequence[str], policy: Policy = "skip", *, looked_at: int = 0, file: Path | None = None
    ) -> None:
        self.ids, self.looked_at, self.file = ids, looked_at, file
        self.policy: Policy = policy
        self.found: dict[str, str] = {}
        self.seen = self.step = 0
        self._listed: dict[str, tuple[str, int]] = {}
        self._end = 0

    def begin(self, step: int, seen: int) -> None:
        """Start at `step`, before which `seen` images of an epoch were seen."""
        self._read_file()
        self.found = {name: reason for name, (reason, at) in self._listed.items() if at < step}
        self.seen, self.step = seen, step
        if self.found:
            log.warning("skipped before step %d: %d images, listed in %s", step, len(self.found), self.file)

    def book(self, bad: Iterable[Bad], seen: int) -> None:
        """Count `seen` more images, among them `bad` ones.

        Raises:
            MaekitError: E-DATA-BAD (exit 3) if there are too many.
        """
        self.seen += seen
        for index, reason in bad:
            if (name := self.ids[index]) not in self.found:
                self.found[name] = reason
                if self.policy == "skip":  # otherwise the error names it
                    log.warning("skipped: %s", reason)
                self._list(name, reason)
        of = min(max(self.seen, self.looked_at), len(self.ids))
        if len(self.found) <= most_bad(of, self.policy):
            return
        last = next(reversed(self.found.values()))
        if self.policy == "stop":
            raise MaekitError(
                "E-DATA-BAD", f"unreadable image: {last}", expected="none (bad_images: stop)",
                hint="mend or remove it; --bad-images skip passes over a few",
            )  # fmt: skip
        raise MaekitError(
            "E-DATA-BAD",
            f"too many unreadable images, the last: {last}",
            found=f"{len(self.found)} of {of} seen",
            expected="at most 5 or 1 %",
            hint="maekit data PATH lists them",
        )

    def _list(self, name: str, reason: str) -> None:
        """Add to the file, unless an earlier launch or another process has."""
        if self.file is None:
            return
        with contextlib.suppress(OSError):  # a full disk stops no training; the line is in the log too
            self._read_file()
            if name in self._listed:
                return
            with open(self.file, "a+b", opener=own_file) as file:
                half = self._end and file.seek(-1, 2) >= 0 and file.read(1) != b"\n"  # left by a kill
                entry = json.dumps({"id": name, "reason": reason, "step": self.step})
                file.write(b"\n" * bool(half) + entry.encode() + b"\n")

    def _read_file(self) -> None:
        """Take up what an earlier launch or another process has written since the last time."""
        if self.file is None or not self.file.exists():
            return
        with contextlib.suppress(OSError), open(self.file, "rb", opener=own_file) as file:
            file.seek(self._end)
            data = file.read()
            self._end += len(data)
            for line in data.splitlines():
                with contextlib.suppress(*UNREADABLE):  # a line that a kill cut short
                    entry = json.loads(line.decode())
                    self._listed.setdefault(entry["id"], (entry["reason"], int(entry.get("step", 0))))
