"""Every test belongs to one tier: `make test`, `make test-e2e` or `make test-real`."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from tiers import few, full, group_of

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


def test_files_share_a_worker_where_they_name_a_group() -> None:
    assert group_of(ROOT / "tests" / "unit" / "test_sandbox.py") == "processes"
    assert group_of(ROOT / "tests" / "integration" / "test_compare.py") == "compared"
    assert group_of(ROOT / "tests" / "unit" / "test_noise.py") is None


def test_what_is_not_kept_belongs_to_the_other_tier() -> None:
    kept, left = few(["a", "b"], ("a",))
    assert kept == "a" and left == full("b") and [mark.name for mark in left.marks] == ["e2e"]
    with pytest.raises(AssertionError):
        few(["a"], ("c",))
