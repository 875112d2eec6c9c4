"""Assigns a test's parameters to `make test` or `make test-e2e`, and files to workers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest


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
