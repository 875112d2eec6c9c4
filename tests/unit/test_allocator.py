"""Freed memory stays with the process, unless its user has set glibc's allocator."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from estune import console
from estune.engines.hf import allocator
from estune.engines.hf.engine import HFEngine

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

pytestmark = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc of 2.33 or later, which says what it holds"
)


def run(**environment: str) -> list[int]:
    """Return how many blocks a large tensor took from the system, and how many it returned when freed."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return [int(word) for word in done.stdout.split()]


def test_a_freed_tensor_stays_with_the_process() -> None:
    assert run() == [0, 0]


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
