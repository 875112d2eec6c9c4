"""The row of who says the same whatever is asked: chosen on training rows, by the task's own accuracy."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from estune import inputs
from estune.compare import measure
from estune.compare.config import from_mapping
from estune.compare.tables import _fixed
from estune.config import ESConfig
from estune.tasks import TASKS, get_task


def compared(task: str) -> Any:
    return from_mapping({"task": task, "models": {"tiny": "tiny"}, "methods": {"es": {"method": "es"}}})


@pytest.mark.parametrize("name", ["chain", "chain:16", "gsm_symbolic", "math", "rg:gcd", "rg:gcd:exact"])
def test_the_right_answer_of_a_row_is_right(name: str) -> None:
    task, rows = get_task(name), get_task(name).load("train")[:20]
    assert task.right_answer is not None
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    assert task.accuracy(completions=[task.right_answer(row) for row in rows], **columns) == [1.0] * len(rows)


def test_the_best_constant_is_chosen_on_training_rows_and_reported_on_others(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = inputs.load_engine(inputs.resolve_config(ESConfig(model="tiny", task="chain:1"), 1))

    def rows(digits: str) -> list[dict[str, Any]]:
        return [{"prompt": digit, "results": [int(digit)], "steps": 1} for digit in digits]

    def load(split: str) -> list[dict[str, Any]]:
        return rows({"train": "7331", "test": "7773"}[split])

    monkeypatch.setitem(TASKS, "chain", dataclasses.replace(TASKS["chain"], load=load))
    found = measure.best_constant(compared("chain"), engine, load("test"))
    assert found is not None
    assert (found["says"], found["correct"], found["accuracy"]) == ("<answer>3</answer>", "0001", 0.25)
    assert found["train_accuracy"] == 0.5 and found["n"] == 4
    assert found["length"] == len(engine.tokenizer.encode("<answer>3</answer>"))
    row = _fixed("always", found, "constant.json", 4)
    assert row["accuracy"]["mean"] == 0.25 and row["retention"] == {} and "pass_at_k" not in row


def test_a_task_whose_answers_fit_one_row_has_none() -> None:
    engine = inputs.load_engine(inputs.resolve_config(ESConfig(model="tiny", task="countdown"), 1))
    assert measure.best_constant(compared("countdown"), engine, get_task("countdown").load("test")) is None
