"""Asks this machine's kernel which means of sandboxing it has, independently of the code under test."""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path

LEAST_ABI = 3  # Landlock version; from it on, a readable file cannot be truncated
LANDLOCK_CREATE_RULESET, VERSION = 444, 1  # a system call's number on all architectures; its flag for the version


def kernel_has_sandbox() -> bool:
    """Return whether the kernel has Landlock and seccomp filters, on an architecture that the sandbox supports."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64") or sys.maxsize < 1 << 32:
        return False
    return landlock_abi() >= LEAST_ABI and has_seccomp_filters()


def landlock_abi() -> int:
    """Return Landlock's version; -1 if the kernel has none or the system call is forbidden."""
    call = ctypes.CDLL(None).syscall
    call.restype = ctypes.c_long
    return int(call(ctypes.c_long(LANDLOCK_CREATE_RULESET), None, ctypes.c_long(0), ctypes.c_long(VERSION)))


def has_seccomp_filters() -> bool:
    """Return whether the kernel counts a process's seccomp filters, as Linux does since 5.9."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return any(line.startswith("Seccomp_filters:") for line in status.splitlines())
