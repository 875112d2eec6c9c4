"""The meaning of a model's name, and the anchor, which is theta_0 or absent."""

import json
from pathlib import Path

import numpy as np
import pytest

from estune.engines.local import anchor_reader
from estune.engines.toy import ToyEngine
from estune.models.names import EMBEDDED_MODELS, FETCHED_FILE, fetched_name, local_directory, origin, public_name


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
