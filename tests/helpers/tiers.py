"""Where a test runs: its parameters' tier, its file's worker of pytest-xdist, and kernels that have a sandbox."""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

LEAST_ABI = 3  # Landlock version; from it on, a readable file cannot be truncated
LANDLOCK_CREATE_RULESET, VERSION = 444, 1  # a system call's number on all architectures; its flag for the version


def few(values: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """Return all parameters; ``kept`` run in `make test`, the others in `make test-e2e`."""
    values = list(values)
    assert all(value in values for value in kept), f"{kept} are not all among {values}"
    return [value if value in kept else full(value) for value in values]


def full(*values: Any) -> Any:
    """Return one set of parameters that runs only in `make test-e2e`."""
    return pytest.param(*values, marks=pytest.mark.e2e)


@cache
def group_of(file: Path) -> str | None:
    """Return the `xdist_group` of a file of tests; None if it has none."""
    match = re.search(r'mark\.xdist_group\("(\w+)"\)', file.read_text(encoding="utf-8"))
    return match[1] if match else None


def kernel_has_sandbox() -> bool:
    """Return whether the kernel has Landlock and seccomp filters, on an architecture that the sandbox supports.

    The kernel itself is asked, independently of the code under test.
    """
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
