"""Keep memory that was freed: a step frees what the next one needs again, and Linux would clear every page anew.

torch takes the memory of a CPU's tensors from the C library. The GNU one gives large pieces back to the system as soon
as they are freed, so a step asks for them again, and the system maps and clears each page of 4 KiB. Told to keep what
it has, it does without. On top of that the first GiB is asked for in pages of 2 MiB, which saves the processor looking
up 512 small ones. Results do not change, nor does memory at its peak. ``benchmarks/allocator.py`` measures what it is
worth: a tenth of a step of the quickstart's model (docs/benchmarks.md).

mallopt(3), madvise(2) and the kernel's admin-guide/mm/transhuge say what is asked for here.
"""

import ctypes
import functools
import resource
import sys

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""Of mallopt: what lies free at the end of the heap before it is given back; what the heap grows by beyond what is
needed; how large a piece is mapped by itself, and given back when it is freed."""
HUGE = 14
"""MADV_HUGEPAGE."""
KEPT = 2**30
"""Bytes: smaller pieces come from the heap, which is not given back; and so much of it in large pages."""
HUGE_PAGE = 2**21


@functools.cache
def keep_freed_memory() -> bool:
    """Let this process keep memory that it has freed; True if the C library could be told.

    Others than the GNU C library, and systems other than Linux, go on as before.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is None or not hasattr(library, "gnu_get_libc_version"):
        return False
    if not (library.mallopt(TRIM_THRESHOLD, 2**31 - 1) and library.mallopt(MMAP_THRESHOLD, KEPT)):
        return False
    if all(
        resource.getrlimit(kind)[0] == resource.RLIM_INFINITY for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    ):
        _first_in_large_pages(library)
    return True


def _first_in_large_pages(library: ctypes.CDLL) -> None:
    """Let the heap grow by `KEPT` bytes of addresses, which take memory when they are used, in large pages then."""
    library.sbrk.restype, library.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    before = library.sbrk(0)
    library.mallopt(TOP_PAD, KEPT)
    library.free(library.malloc(KEPT // 16))  # more than lies free: the heap has to grow
    library.mallopt(TOP_PAD, 2**17)  # its default
    after = library.sbrk(0)
    first = -(-before // HUGE_PAGE) * HUGE_PAGE
    if 0 <= after - before <= 2 * KEPT and after > first:
        library.madvise(first, (after - first) // HUGE_PAGE * HUGE_PAGE, HUGE)  # a system without them says no
