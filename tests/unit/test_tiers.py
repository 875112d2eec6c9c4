"""Every test belongs to one tier: `make test`, `make test-e2e` or `make test-real`."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TIERS = ("miniature", "e2e", "real")


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "integration").glob("test_*.py")), ids=lambda path: path.stem)
def test_an_integration_file_names_its_tier(path: Path) -> None:
    """By `pytestmark`; a single test of a miniature file may be marked as one of another tier."""
    marks = path.read_text(encoding="utf-8").split("\npytestmark = ")[1].split("\n\n")[0]
    assert len(re.findall(rf"pytest\.mark\.({'|'.join(TIERS)})\b", marks)) == 1


def test_the_default_selection_is_what_make_test_runs() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    assert "-m 'not e2e and not real'" in options["addopts"]
    assert {mark.partition(":")[0] for mark in options["markers"]} == {*TIERS, "xdist_group(name)"}


def test_ci_runs_every_tier() -> None:
    commands = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert {"make test", "make test-e2e", "make test-real"} <= set(commands)
