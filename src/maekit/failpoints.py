"""Named places at which a fault can be made to happen, for tests and for `maekit soak`.

``MAEKIT_FAILPOINT=NAME:ACTION`` in the environment, several with commas, ``NAME:ACTION@3`` at the third time that the
place is reached instead of the first, ``@3+`` there and ever after. A place costs one look at an empty dictionary when
the variable is not set. Child processes inherit the variable, and count for themselves.

Actions: ``kill``, ``segv``, ``stop``, ``int``, ``term``, ``usr1`` (that signal to this process), ``hang``, ``error``
(RuntimeError), an errno's name in small letters (``enospc``, ``eio``, ...: that OSError), ``on`` (`reach` returns True:
the place itself knows what its fault is, as a NaN).
"""

import errno
import os
import signal
import time
from dataclasses import dataclass

from maekit.errors import MaekitError

VARIABLE = "MAEKIT_FAILPOINT"
SIGNALS = {
    "kill": "SIGKILL", "int": "SIGINT", "term": "SIGTERM", "usr1": "SIGUSR1", "segv": "SIGSEGV", "stop": "SIGSTOP",
}  # fmt: skip
ERRNOS = {name.lower(): number for number, name in errno.errorcode.items()}


@dataclass
class Fault:
    """What happens at a place.

    Attributes:
        action: one of the module's docstring.
        at: at which time of reaching the place, from 1.
        ever: and every time after it.
        reached: how often the place has been reached.
    """

    action: str
    at: int = 1
    ever: bool = False
    reached: int = 0


def read(text: str) -> dict[str, Fault]:
    """Return the faults that the environment variable asks for, by place.

    Raises:
        MaekitError: E-CONFIG-FAILPOINT.
    """
    found = {}
    for part in filter(None, text.split(",")):
        name, _, rest = part.partition(":")
        action, _, when = rest.partition("@")
        number = when.removesuffix("+") or "1"
        known = action in SIGNALS or action in ERRNOS or action in ("hang", "error", "on")
        if not (name and known and number.isdecimal() and int(number)):
            raise MaekitError(
                "E-CONFIG-FAILPOINT", f"environment variable {VARIABLE}", found=part,
                expected="NAME:ACTION or NAME:ACTION@N", hint=f"unset {VARIABLE}: it is for tests",
            )  # fmt: skip
        found[name] = Fault(action, int(number), when.endswith("+"))
    return found


_faults = read(os.environ.get(VARIABLE, ""))


def arm(text: str) -> None:
    """Let the faults of `text` happen in this process from now on, in place of the environment's.

    Raises:
        MaekitError: E-CONFIG-FAILPOINT.
    """
    _faults.clear()
    _faults.update(read(text))


def reach(name: str) -> bool:
    """Let the fault asked for at this place happen; return whether the place itself has to make it.

    Raises:
        OSError: for an errno's name.
        RuntimeError: for ``error``.
    """
    return bool(_faults) and name in _faults and _happen(_faults[name], name)


def _happen(fault: Fault, name: str) -> bool:
    fault.reached += 1
    if fault.reached < fault.at or (fault.reached > fault.at and not fault.ever):
        return False
    if fault.action in SIGNALS:
        os.kill(os.getpid(), getattr(signal, SIGNALS[fault.action]))
    elif fault.action in ERRNOS:
        raise OSError(ERRNOS[fault.action], os.strerror(ERRNOS[fault.action]), name)
    elif fault.action == "error":
        raise RuntimeError(f"failpoint {name}")
    elif fault.action == "hang":
        while True:
            time.sleep(60)
    return fault.action == "on"
