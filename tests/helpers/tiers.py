"""Which of a test's parameters belong to `make test`, which to `make test-e2e`; which files share a worker."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest


def few(values: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """Return parameters of which only ``kept`` run in `make test`, the others in `make test-e2e`."""
    values = list(values)
    assert all(value in values for value in kept), f"{kept} are not all among {values}"
    return [value if value in kept else full(value) for value in values]


def full(*values: Any) -> Any:
    """Return one set of parameters that runs in `make test-e2e` alone."""
    return pytest.param(*values, marks=pytest.mark.e2e)


@cache
def group_of(file: Path) -> str | None:
    """Return the `xdist_group` that a file of tests names; None where it names none."""
    found = re.search(r'mark\.xdist_group\("(\w+)"\)', file.read_text(encoding="utf-8"))
    return found[1] if found else None
