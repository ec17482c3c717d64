"""Writing: what outlasts a power cut, and through no link that somebody else has put into a run folder."""

import contextlib
import errno
import os
import stat
from pathlib import Path

REFUSES = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}
"""What file systems answer that cannot sync a file or a folder at all."""
NO_FILE = {errno.ELOOP: "a link", errno.ENXIO: "not a regular file", errno.EISDIR: "a folder"}
"""Errors of `own_file`, in its words."""


def sync(path: Path) -> None:
    """Wait until what a file holds, or the names in a folder, lie on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in REFUSES:
            raise
    finally:
        os.close(descriptor)


def put(temporary: Path, path: Path) -> None:
    """Give a written file, or folder of files, its name: after a power cut it is whole under it, or not there.

    Raises:
        OSError: if it cannot be synced or renamed; that the new name could not be synced is no error.
    """
    for inner in sorted(temporary.rglob("*")) if temporary.is_dir() else []:
        sync(inner)
    sync(temporary)
    os.replace(temporary, path)
    with contextlib.suppress(OSError):  # a folder that may be written but not read; the file is there
        sync(path.parent)


def own_file(path: str, flags: int) -> int:
    """Open a file of a run folder that keeps its name: as ``opener`` of `open`.

    A link there may lead to a file of whoever runs this, a FIFO would be waited at forever.

    Raises:
        OSError: for anything but a regular file under that very name.
    """
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise OSError(error.errno, NO_FILE.get(error.errno or 0, error.strerror), path) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.ENXIO, NO_FILE[errno.ENXIO], path)
    return handle
