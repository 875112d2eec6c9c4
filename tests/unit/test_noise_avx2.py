"""The kernels as they are compiled for processors with AVX2 alone, which count bits by tables: the same bits."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

AVX2 = "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+popcnt,+sse,+sse2,+sse3,+sse4.1,+sse4.2,+ssse3"
PROGRAM = """
import numpy as np
from llvmlite import binding
from estune.es.noise import noise_ints, noise_key
from estune.es.noise import cpu
from estune.es.noise import lanes

count, start, seeds = 4096 + 77, 2**32 - 5000, [3, 2**64 - 1, 99]
theta = np.random.default_rng(0).standard_normal(count).astype(np.float32)
keys = np.array([noise_key(seed, "w") for seed in seeds], dtype=np.uint32)
q = np.array([32767, -32767, 12345], dtype=np.int32)
for distribution in ("normal", "rademacher"):
    flag = distribution == "rademacher"
    noise = [noise_ints(seed, "w", start, count, distribution).astype(np.int64) for seed in seeds]
    out = np.empty_like(theta)
    cpu.perturb_into(out, theta, start, *keys[0], np.float32(0.25), flag)
    assert (out == theta + np.float32(0.25) * noise[0].astype(np.float32)).all()
    moved = theta.copy()
    cpu.update_into(moved, start, keys, q, 2.0**-20, flag, np.float32(0), np.empty(0, np.float32))
    total = sum(int(weight) * n for weight, n in zip(q, noise))
    assert (moved == (theta.astype(np.float64) + 2.0**-20 * total).astype(np.float32)).all()
code = next(iter(cpu.update_into.inspect_asm().values()))
print("vpmaddubsw" in code, "vpopcntd" in code, "zmm" in code)
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instructions of x86")
def test_bits_counted_by_tables_are_the_same(tmp_path: Path) -> None:
    target = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": AVX2, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=os.environ | target, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "False", "False"]
