"""Cached kernels do not outlive a change of the code that they were made of."""

from __future__ import annotations

import os
from pathlib import Path

from estune.es.noise.lanes import _drop_stale_kernels


def test_kernels_older_than_any_source_go(tmp_path: Path) -> None:
    (tmp_path / "__pycache__").mkdir()
    for name, time in (("a.py", 100), ("b.py", 200), ("__pycache__/old.nbi", 150), ("__pycache__/new.nbi", 250)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time, time))
    _drop_stale_kernels(tmp_path)
    assert [path.name for path in (tmp_path / "__pycache__").iterdir()] == ["new.nbi"]
