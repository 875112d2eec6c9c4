"""The best constant answer: chosen on training rows, by the task's own accuracy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from estune.compare import measure
from estune.compare.config import from_mapping
from estune.compare.tables import _untrained_row
from estune.tasks import TASKS, get_task, reasoning


def compared(task: str) -> Any:
    return from_mapping({"task": task, "models": {"tiny": "tiny"}, "methods": {"es": {"method": "es"}}})


@pytest.mark.parametrize("name", ["chain", "chain:16", "gsm_symbolic", "math", "rg:gcd", "rg:gcd:exact"])
def test_the_right_answer_of_a_row_is_right(name: str) -> None:
    task, rows = get_task(name), get_task(name).load("train")[:20]
    assert task.right_answer is not None
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    assert task.accuracy(completions=[task.right_answer(row) for row in rows], **columns) == [1.0] * len(rows)


def test_the_best_constant_is_chosen_on_training_rows_and_reported_on_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def rows(digits: str) -> list[dict[str, Any]]:
        return [{"prompt": digit, "results": [int(digit)], "steps": 1} for digit in digits]

    def load(split: str) -> list[dict[str, Any]]:
        return rows({"train": "7331", "test": "7773"}[split])

    monkeypatch.setitem(TASKS, "chain", dataclasses.replace(TASKS["chain"], load=load))
    measure.measure_constant(compared("chain"), "tiny", tmp_path / "constant.json")
    found = json.loads((tmp_path / "constant.json").read_text(encoding="utf-8"))
    assert (found["says"], found["correct"], found["accuracy"]) == ("<answer>3</answer>", "0001", 0.25)
    assert found["train_accuracy"] == 0.5 and found["n"] == 4 and found["length"] > 0
    row = _untrained_row("always", found, "constant.json", 4)
    assert row["accuracy"]["mean"] == 0.25 and row["retention"] == {} and "pass_at_k" not in row


@pytest.mark.parametrize("digits", ["", "1234"])
def test_where_no_two_rows_have_the_same_answer_there_is_no_constant(
    digits: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    task = "chain" if digits else "countdown"
    if digits:
        own = [{"prompt": digit, "results": [int(digit)], "steps": 1} for digit in digits]
        monkeypatch.setitem(TASKS, "chain", dataclasses.replace(TASKS["chain"], load=lambda _: own))
    measure.measure_constant(compared(task), "tiny", tmp_path / "constant.json")
    assert not (tmp_path / "constant.json").exists()


def test_a_mixture_has_the_answers_of_its_parts_and_some_generators_have_none() -> None:
    task = get_task("chain:1=1,countdown=1")
    assert task.right_answer is not None
    found = {row["task"]: task.right_answer(row) for row in task.load("train")[:10]}
    assert found["countdown"] is None and str(found["chain:1"]).startswith("<answer>")
    assert reasoning.right_answer({"rg_entry": json.dumps({"answer": None})}) is None
