"""The bases that methods are compared on are the ones that were frozen."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

BASES = Path(__file__).parents[2] / "benchmarks" / "bases"
LINES = [line.split("  ") for line in (BASES / "SHA256SUMS").read_text(encoding="utf-8").splitlines()]


def test_all_files_have_a_hash() -> None:
    found = {
        path.relative_to(BASES).as_posix() for path in BASES.glob("*/*") if path.suffix in (".safetensors", ".json")
    }
    assert found == {name for _, name in LINES}
    assert {name.split("/")[0] for name in found} == {"llama", "qwen2", "gpt2", "sudoku"}


@pytest.mark.parametrize(("digest", "name"), LINES)
def test_every_file_is_the_frozen_one(digest: str, name: str) -> None:
    assert hashlib.sha256((BASES / name).read_bytes()).hexdigest() == digest
