"""The account of images that cannot be read."""

import json
from pathlib import Path

from maekit.data.bad_images import FILE, BadImages

DAMAGED = [
    b"\xff\xfe",
    b'{"id": ["a"], "reason": "", "step": 0}',
    b'{"id": "a", "reason": "", "step": Infinity}',
    b"[" * 100_000,
    b"[]",
]


def test_lines_of_the_list_that_cannot_be_read_are_passed_over(tmp_path: Path) -> None:
    good = json.dumps({"id": "b", "reason": "b: broken", "step": 1}).encode()
    (tmp_path / FILE).write_bytes(b"\n".join([*DAMAGED, good]) + b"\n")
    account = BadImages(["a", "b"], file=tmp_path / FILE)
    account.begin(2, 2)
    assert account.found == {"b": "b: broken"}
