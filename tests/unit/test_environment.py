"""The machine that a result records."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from estune import environment


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The only directory of the search path."""
    monkeypatch.setenv("PATH", str(tmp_path))
    environment.gpus.cache_clear()
    yield tmp_path
    environment.gpus.cache_clear()


@pytest.mark.parametrize(
    ("script", "named"),
    [
        ("echo 'NVIDIA H100 80GB HBM3'; echo 'NVIDIA T4'", ("NVIDIA H100 80GB HBM3", "NVIDIA T4")),
        ("exit 9", ()),
        ("", ()),
    ],
    ids=["two", "no driver", "none"],
)
def test_gpus_are_named_by_their_driver(place: Path, script: str, named: tuple[str, ...]) -> None:
    tool = place / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    tool.chmod(0o755)
    assert environment.gpus() == named
    assert environment.environment()["gpus"] == list(named)
    assert environment.machine().endswith(", ".join([f"{environment.cores()} cores", *named]))


def test_without_a_driver_there_are_none(place: Path) -> None:
    assert environment.gpus() == ()
