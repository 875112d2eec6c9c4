"""Which of a test's parameters belong to `make test`, and which to `make test-e2e`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
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
