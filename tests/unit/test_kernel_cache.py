"""Cached kernels do not outlive a change of the code that they were made of."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import estune

PROGRAM = """
import numpy as np
from estune.es.noise.cpu import noise_into
out = np.empty(2, np.int32)
noise_into(out, 0, np.uint32(1), np.uint32(2), False)
print(*out, *(sum(count.values()) for count in (noise_into.stats.cache_hits, noise_into.stats.cache_misses)))
"""


def run(place: Path) -> list[int]:
    """Return two noise integers, and how many kernels came from the cache on disk and how many were compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=place, env=environment | {"PYTHONPATH": str(place)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [int(word) for word in done.stdout.split()]


def test_a_kernel_is_compiled_again_after_a_change_of_another_file_and_no_import_deletes_a_file(tmp_path: Path) -> None:
    source = Path(estune.__file__).parent / "es"
    shutil.copytree(source, tmp_path / "estune" / "es", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "estune" / "__init__.py").touch()
    lanes = tmp_path / "estune" / "es" / "noise" / "lanes.py"
    first = run(tmp_path)
    assert first[2:] == [0, 1]
    assert run(tmp_path) == [*first[:2], 1, 0]
    kept, before = lanes.read_text(), lanes.stat()
    assert kept.count("_word(word, 16)") == 1
    lanes.write_text(kept.replace("_word(word, 16)", "_word(word, 17)"))
    os.utime(lanes, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run(tmp_path) == [first[0] - 1, first[1] - 1, 0, 1]
    lanes.write_text(kept)
    assert run(tmp_path) == [*first[:2], 1, 0]
