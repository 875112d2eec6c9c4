"""Mixtures of tasks: shares of rows, and every completion judged by its own task."""

from __future__ import annotations

from collections import Counter

import cloudpickle
import pytest

from estune.errors import UserError
from estune.tasks import get_task, mixture


def test_names_and_weights() -> None:
    assert mixture.parse("countdown=2, conciseness=0.5,rg:gcd") == [
        ("countdown", 2.0), ("conciseness", 0.5), ("rg:gcd", 1.0),
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["a=0", "a=-1,b=1", "a=x,b=1", "=1", "a=1,", "a=nan,b=1", "a=inf,b=1", "a,a"])
def test_what_is_no_mixture(text: str) -> None:
    with pytest.raises(UserError):
        mixture.parse(text)


def test_shares_of_rows() -> None:
    rows = [[{"n": i} for i in range(100)], [{"n": i} for i in range(10)]]
    trained = mixture.blend(rows, [1, 1], ["a", "b"], repeat=True)
    assert Counter(row["task"] for row in trained) == {"a": 55, "b": 55}
    assert Counter(row["task"] for row in trained[:10]) == {"a": 5, "b": 5}
    assert {row["n"] for row in trained if row["task"] == "b"} == set(range(10))
    held_out = mixture.blend(rows, [1, 1], ["a", "b"], repeat=False)
    assert Counter(row["task"] for row in held_out) == {"a": 10, "b": 10}
    assert len({(row["task"], row["n"]) for row in held_out}) == 20
    assert Counter(row["task"] for row in mixture.blend(rows, [30, 1], ["a", "b"], repeat=True)) == {"a": 106, "b": 4}


def test_every_completion_is_judged_by_its_own_task() -> None:
    task = get_task("countdown=1,conciseness=1")
    rows = task.load("validation")
    assert Counter(row["task"] for row in rows) == {"countdown": 8, "conciseness": 8}
    columns = {name: [row.get(name) for row in rows] for name in ("task", "numbers", "target", "answer", "answers")}
    said = ["<answer>1+1</answer>" if row["task"] == "countdown" else row["answer"] for row in rows]
    assert [value for value, row in zip(task.reward(completions=said, **columns), rows, strict=True)
            if row["task"] == "conciseness"] == [0.0] * 8  # fmt: skip
    right = task.accuracy(completions=said, **columns)
    assert [value for value, row in zip(right, rows, strict=True) if row["task"] == "countdown"] == [0.0] * 8
    again = cloudpickle.loads(cloudpickle.dumps(task.accuracy))  # as it travels to a worker
    assert again(completions=said, **columns) == right
    assert again.__name__ == "accuracy"


def test_what_does_not_mix() -> None:
    with pytest.raises(UserError, match="cannot be part of a mixture"):
        get_task("quadratic=1,countdown=1")
    with pytest.raises(UserError, match="did you mean 'countdown'"):
        get_task("countdwn=1,conciseness=1")
