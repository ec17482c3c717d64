"""The oldest versions of what reads other people's bytes; below them known holes are open.

pip keeps them at installation, and nothing keeps them afterwards: another package may take one back. So they are looked
at when a verb begins, before anything of them is imported. CPython has no floor of its own beside the 3.11 of the
package: the holes mended in 3.11.13, 3.12.11 and 3.13.4 are in unpacking tar files, and nothing here unpacks any.
"""

import re
from importlib import metadata

from maekit.errors import MaekitError

FLOORS = {
    "torch": "2.11",  # CVE-2025-32434 and CVE-2026-24747: code and memory through torch.load(weights_only=True)
    "pillow": "13",  # fourteen advisories in 12.3, two of them critical ones of decoders
    "safetensors": "0.8",  # files are written whole or not at all
    "numpy": "2.0",
    "pyarrow": "18",
}
"""As in pyproject.toml, which a test compares."""


def check() -> None:
    """Refuse to begin with a library that is too old; what is not installed is said where it is imported.

    Raises:
        MaekitError: E-ENV-VERSION, naming all of them.
    """
    old = [f"{name} {found}" for name, found in _installed().items() if _number(found) < _number(FLOORS[name])]
    if old:
        floors = ", ".join(f"{name} >= {FLOORS[name]}" for name in (one.split()[0] for one in old))
        raise MaekitError(
            "E-ENV-VERSION", "a library with known holes", found=", ".join(old), expected=floors,
            hint=f"pip install {' '.join(repr(one.replace(' ', '')) for one in floors.split(', '))}",
        )  # fmt: skip


def _installed() -> dict[str, str]:
    found = {}
    for name in FLOORS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _number(version: str) -> tuple[int, ...]:
    """Return what stands before a suffix as numbers: 2.11.0+cpu is (2, 11, 0), and so is 2.11.0rc1."""
    numbers = [int(part) for part in re.match(r"\d*(\.\d+)*", version)[0].split(".") if part]  # type: ignore[index]
    return tuple(numbers + [0] * (4 - len(numbers)))
