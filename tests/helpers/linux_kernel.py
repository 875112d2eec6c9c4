"""What this machine's kernel has to hold code with, asked of the kernel itself and not of the code under test."""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path

LEAST_ABI = 3  # from which on a file that may be read cannot be emptied
LANDLOCK_CREATE_RULESET, VERSION = 444, 1  # a system call, the same everywhere, and its flag that asks for the ABI


def kernel_has_it() -> bool:
    """Say whether there are Landlock and seccomp filters, on an architecture that the sandbox knows."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64") or sys.maxsize < 1 << 32:
        return False
    return landlock_abi() >= LEAST_ABI and has_seccomp_filters()


def landlock_abi() -> int:
    """Return Landlock's version; -1 where the kernel has none, or whoever runs it forbids to ask."""
    call = ctypes.CDLL(None).syscall
    call.restype = ctypes.c_long
    return int(call(ctypes.c_long(LANDLOCK_CREATE_RULESET), None, ctypes.c_long(0), ctypes.c_long(VERSION)))


def has_seccomp_filters() -> bool:
    """Say whether the kernel counts a process's filters; it does since Linux 5.9, older than Landlock."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return any(line.startswith("Seccomp_filters:") for line in status.splitlines())
