"""The checks of `estune fetch` before a download."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from estune.errors import UserError
from estune.files import try_lock
from estune.models.fetch import fetch


def test_what_a_killed_fetch_left_goes_and_what_another_one_holds_stays(tmp_path: Path) -> None:
    for name in (".estune-fetch-dead", ".estune-fetch-alive", ".partial-thesis"):
        (tmp_path / name / "model").mkdir(parents=True)
    lock = try_lock(tmp_path / ".estune-fetch-alive")
    assert lock is not None
    with pytest.raises(UserError):
        fetch("smollm2-135m", tmp_path / "model", "registry", [tmp_path / "other.whl"])
    os.close(lock)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".estune-fetch-alive", ".partial-thesis"]
