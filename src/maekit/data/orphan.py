"""The first thing that the fork server imports: whatever else it still has to import, it ends with its parent.

Python's fork server ends when its parent is gone, but looks only once it has imported what it was told to, and torch
and torchvision take seconds, on a busy machine half a minute. A thread looks in the meantime; it is over before the
first fork, since a thread does not survive one. Who its parent is stands in the environment: it may be gone already.
"""

import os
import threading

_PARENT = int(os.environ.get("MAEKIT_PARENT", os.getppid()))
_over = threading.Event()


def _watch() -> None:
    while not _over.wait(0.2):
        if os.getppid() != _PARENT:
            os._exit(1)


def _stop() -> None:
    _over.set()
    _thread.join()


_thread = threading.Thread(target=_watch, daemon=True)
_thread.start()
os.register_at_fork(before=_stop)
