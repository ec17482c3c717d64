"""Writing: through no link that somebody else has put into a run folder."""

import errno
import os
import stat

NO_FILE = {errno.ELOOP: "a link", errno.ENXIO: "not a regular file", errno.EISDIR: "a folder"}
"""Errors of `own_file`, in its words."""


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
