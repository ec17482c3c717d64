"""Files of a report: whole or absent, after a power cut too."""

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path

from maekit.disk import put
from maekit.errors import MaekitError


def write_whole(path: Path, data: bytes) -> None:
    """Write beside, then rename, so that a reader never sees half a file.

    Raises:
        MaekitError: E-ENV-OUT if the place cannot be written.
    """
    with whole(path) as place, place.open("xb") as file:
        file.write(data)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a place beside, for a file that is written piece by piece; rename it when the block ends well.

    Raises:
        MaekitError: E-ENV-OUT if the place cannot be written.
    """
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        put(temporary, path)
    except OSError as error:
        raise MaekitError("E-ENV-OUT", f"cannot write {path}", found=error.strerror or error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
