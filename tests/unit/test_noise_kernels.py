"""The compiled kernels of the noise: their cache on disk, and their bits on processors with AVX2 alone.

Cached kernels do not outlive a change of the code that they were made of. Kernels for AVX2 alone count bits by tables.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import estune

CACHED = """
import numpy as np
from estune.es.noise.cpu import noise_into
out = np.empty(2, np.int32)
noise_into(out, 0, np.uint32(1), np.uint32(2), False)
print(*out, *(sum(count.values()) for count in (noise_into.stats.cache_hits, noise_into.stats.cache_misses)))
"""
AVX2 = "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+popcnt,+sse,+sse2,+sse3,+sse4.1,+sse4.2,+ssse3"
COUNTING = """
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


def run_cached(place: Path) -> list[int]:
    """Return two noise integers, and how many kernels came from the cache on disk and how many were compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", CACHED], cwd=place, env=environment | {"PYTHONPATH": str(place)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [int(word) for word in done.stdout.split()]


def test_a_kernel_is_compiled_again_after_a_change_of_another_file_and_no_import_deletes_a_file(tmp_path: Path) -> None:
    source = Path(estune.__file__).parent / "es"
    shutil.copytree(source, tmp_path / "estune" / "es", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "estune" / "__init__.py").touch()
    lanes = tmp_path / "estune" / "es" / "noise" / "lanes.py"
    first = run_cached(tmp_path)
    assert first[2:] == [0, 1]
    assert run_cached(tmp_path) == [*first[:2], 1, 0]
    kept, before = lanes.read_text(), lanes.stat()
    assert kept.count("_word(word, 16)") == 1
    lanes.write_text(kept.replace("_word(word, 16)", "_word(word, 17)"))
    os.utime(lanes, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run_cached(tmp_path) == [first[0] - 1, first[1] - 1, 0, 1]
    lanes.write_text(kept)
    assert run_cached(tmp_path) == [*first[:2], 1, 0]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instructions of x86")
def test_bits_counted_by_tables_are_the_same(tmp_path: Path) -> None:
    target = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": AVX2, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COUNTING], env=os.environ | target, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "False", "False"]
