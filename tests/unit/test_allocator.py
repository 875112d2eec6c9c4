"""Freed memory stays with the process, unless its user has set glibc's allocator."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from estune.engines.allocator import keep_freed_memory
keep_freed_memory()
torch.set_num_threads(1)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
x = torch.ones(10 << 20)  # 40 MiB, 10240 pages
for _ in range(2):
    x + 1
before = faults()
for _ in range(10):
    x + 1
print(faults() - before)
"""


def faults(**environment: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_pages_are_fetched_once() -> None:
    assert faults() < 50_000  # of 102,400; 30,000 were seen where memory is shared with other machines


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_the_users_own_setting_stays() -> None:
    assert faults(MALLOC_MMAP_THRESHOLD_="131072") > 90_000
