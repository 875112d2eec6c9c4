"""Loads programs of `benchmarks/` and `scripts/`, which are not packages, for tests."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def loaded(path: str) -> Iterator[ModuleType]:
    """Yield the module of a file; meanwhile other modules of its directory can be imported.

    ``path`` is relative to the repository's root.
    """
    file = ROOT / path
    spec = importlib.util.spec_from_file_location(f"estune_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look up their module
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(file.parent))
        del sys.modules[module.__name__]
