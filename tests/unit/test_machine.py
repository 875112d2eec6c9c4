"""The machine that a result records, and the setting of its allocator."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from estune import console, environment
from estune.engines.hf import allocator
from estune.engines.hf.engine import HFEngine


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The only directory of the search path."""
    monkeypatch.setenv("PATH", str(tmp_path))
    environment.gpus.cache_clear()
    yield tmp_path
    environment.gpus.cache_clear()


@pytest.mark.parametrize(
    ("script", "named"),
    [
        ("echo 'NVIDIA H100 80GB HBM3'; echo 'NVIDIA T4'", ("NVIDIA H100 80GB HBM3", "NVIDIA T4")),
        ("exit 9", ()),
        ("", ()),
    ],
    ids=["two", "no driver", "none"],
)
def test_gpus_are_named_by_their_driver(place: Path, script: str, named: tuple[str, ...]) -> None:
    tool = place / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    tool.chmod(0o755)
    assert environment.gpus() == named
    assert environment.environment()["gpus"] == list(named)
    assert environment.machine().endswith(", ".join([f"{environment.cores()} cores", *named]))


def test_without_a_driver_there_are_none(place: Path) -> None:
    assert environment.gpus() == ()


# --- freed memory stays with the process, unless its user has set glibc's allocator -----------------------------------

PROGRAM = """
import ctypes, torch
from estune.engines.hf.allocator import keep_freed_memory

class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Mallinfo2
keep_freed_memory()
blocks = mallinfo().hblks  # those that go back to the system at once
x = torch.ones(10 << 20)  # 40 MiB
print(mallinfo().hblks - blocks, end=" ")
arena = mallinfo().arena
del x
print(arena - mallinfo().arena)
"""

needs_mallinfo2 = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc of 2.33 or later, which says what it holds"
)


def run(**environment: str) -> list[int]:
    """Return how many blocks a large tensor took from the system, and how many it returned when freed."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return [int(word) for word in done.stdout.split()]


@needs_mallinfo2
def test_a_freed_tensor_stays_with_the_process() -> None:
    assert run() == [0, 0]


@needs_mallinfo2
def test_the_users_own_setting_stays() -> None:
    assert run(MALLOC_MMAP_THRESHOLD_="131072") == [1, 0]


@pytest.mark.parametrize("owned", [False, True])
def test_the_engine_sets_it_in_processes_of_the_command_line_alone(
    owned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: calls.append(True))
    monkeypatch.setattr(console, "owns_process", lambda: owned)
    HFEngine.load("tiny")
    assert calls == [True] * owned
