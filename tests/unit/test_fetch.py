"""What `estune fetch` does before it fetches."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from estune.errors import UserError
from estune.fetch import fetch
from estune.files import try_lock


def test_what_a_killed_fetch_left_goes_and_what_another_one_holds_stays(tmp_path: Path) -> None:
    for name in (".partial-dead", ".partial-alive"):
        (tmp_path / name / "model").mkdir(parents=True)
    lock = try_lock(tmp_path / ".partial-alive")
    assert lock is not None
    with pytest.raises(UserError):
        fetch("smollm2-135m", tmp_path / "model", "registry", [tmp_path / "other.whl"])
    os.close(lock)
    assert [path.name for path in tmp_path.iterdir()] == [".partial-alive"]
