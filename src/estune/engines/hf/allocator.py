"""Memory that torch gives back stays with the process, so that the next forward pass finds it in place.

glibc hands large blocks straight back to the system when they are freed and fetches new ones, zeroed page by page,
at the next allocation. A forward pass allocates the same activations over and over, and on a CPU the page faults cost
more than the arithmetic of an elementwise operation.
"""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGEST_KEPT = 1 << 30  # bytes of one block; larger ones still go back at once
_OLD_LIMIT = 1 << 25
_MOST_KEPT = (1 << 31) - 1  # bytes unused at the end of the heap; mallopt takes an int


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory for this process; without glibc, or where its user has set it, do nothing."""
    if os.environ.keys() & {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"}:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Before glibc 2.35 the threshold had a limit of its own, and 0 says that nothing was set.
    if mallopt is not None and (mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT) or mallopt(_MMAP_THRESHOLD, _OLD_LIMIT)):
        mallopt(_TRIM_THRESHOLD, _MOST_KEPT)
