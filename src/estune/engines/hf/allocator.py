"""Keeps freed memory in the process, so that the next forward pass reuses it.

By default glibc returns large freed blocks to the system, and the next allocation gets new pages, which the system
zeroes one by one. A forward pass allocates the same activations again and again. On a CPU the page faults cost more
than the arithmetic of an elementwise operation.

The setting holds for the whole process, so the engine makes it only in processes of the command line.
"""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)
_LARGEST_KEPT = 1 << 30  # bytes of one block; larger blocks are returned to the system
_OLD_LIMIT = 1 << 25  # bytes; the largest threshold that glibc before 2.35 accepts
_MOST_KEPT = (1 << 31) - 1  # unused bytes at the end of the heap; mallopt takes an int


def keep_freed_memory() -> None:
    """Set glibc to keep freed memory for this process; do nothing without glibc, or if the user has set it."""
    if os.environ.keys() & {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"}:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # mallopt returns 0 for a value that it does not accept.
    if mallopt is not None and (mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT) or mallopt(_MMAP_THRESHOLD, _OLD_LIMIT)):
        mallopt(_TRIM_THRESHOLD, _MOST_KEPT)
