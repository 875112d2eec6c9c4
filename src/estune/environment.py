"""Machine and versions, for `estune env`, a run's `env.json`, and the versions in a journal's header."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from contextlib import suppress
from functools import cache
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import Any

VERSION = "0.1.0"  # as in pyproject.toml
PACKAGES = ("estune", "torch", "transformers", "numba", "numpy", "tokenizers", "safetensors", "datasets")


def versions(*more: str) -> dict[str, str]:
    """Return the versions that can change a bit of a run, and those of ``more`` packages; only installed ones."""
    installed = {"python": platform.python_version()}
    for package in (*PACKAGES, *more):
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def code_digest() -> str:
    """Return a short hash of this package's source, which distinguishes results of edited code with equal versions."""
    root = Path(__file__).parent
    digest = blake2b(digest_size=8)
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def cores() -> int:
    """Return the CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> str:
    """Return the parts that decide a run's speed as text: processor, cores, NVIDIA GPUs."""
    return ", ".join([processor(), f"{cores()} cores", *gpus()])


@cache
def gpus() -> tuple[str, ...]:
    """Return the names of the NVIDIA GPUs, from `nvidia-smi`: torch would open the driver in this process."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip())


def environment() -> dict[str, Any]:
    """Return versions, platform, processor, cores, memory and NVIDIA GPUs as a JSON-able dict."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": cores(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "executable_bits": 64 if sys.maxsize > 1 << 32 else 32,
        "byteorder": sys.byteorder,
        "gpus": list(gpus()),
    }


def processor() -> str:
    """Return the processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def free_memory_bytes() -> int:
    """Return the bytes that this process can still allocate: the system's free memory, within the control group.

    A group's usage counts its page cache. Inactive cached files are subtracted, because the kernel reclaims them.
    """
    free = _memory_bytes()
    with suppress(OSError, StopIteration, ValueError), open("/proc/meminfo", encoding="ascii") as file:
        free = int(next(line for line in file if line.startswith("MemAvailable")).split()[1]) * 1024
    with suppress(OSError, ValueError):  # "max" means no limit and raises ValueError
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            limit = int(file.read())
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as file:
            used = int(file.read())
        with open("/sys/fs/cgroup/memory.stat", encoding="ascii") as file:
            used -= next((int(line.split()[1]) for line in file if line.startswith("inactive_file ")), 0)
        free = min(free, max(0, limit - used))
    return free


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0
