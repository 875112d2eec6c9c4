"""Names of tasks: names from elsewhere, which a message explains, and mixtures of tasks."""

from __future__ import annotations

import importlib.util
from collections import Counter

import cloudpickle
import pytest

from estune.errors import UserError
from estune.tasks import TASKS, get_task, mixture
from estune.tasks.other_names import OTHER_NAMES

needs_reasoning_gym = pytest.mark.skipif(not importlib.util.find_spec("reasoning_gym"), reason="wants reasoning-gym")


def told(name: str) -> str:
    with pytest.raises(UserError, match="there is no task") as caught:
        get_task(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


NAMES = {
    "gsm_symbolic": "gsm8k GSM8K gsm-8k openai/gsm8k GSM-Symbolic gsmsymbolic",
    "math": "MATH math500 MATH-500 HuggingFaceH4/MATH-500 hendrycks_math AIME24 olympiadbench",
    "arc_agi": "arc ARC arc-agi ARC-AGI ARC_AGI_1 arcagi",
    "arc_agi:python": "arc-agi:python ARC_AGI:python",
    "arc_agi:1500": "arc:1500",
    "arc_1d": "1d-arc ARC-1D arc1d",
    "mini_sudoku": "sudoku4 4x4_sudoku mini-sudoku MiniSudoku Mini_Sudoku sudoku-4x4",
    "sudoku": "SUDOKU sudoku9x9 9x9-sudoku",
    "countdown": "countdown-tasks Jiayi-Pan/Countdown-Tasks-3to4 Countdown TinyZero cuontdown",
    "chain:4": "Chain:4 CHAIN:4",
    "conciseness": "concise Conciseness concisenes",
    "quadratic": "quadratics Quadratic",
}


@pytest.mark.parametrize(("task", "names"), NAMES.items(), ids=str)
def test_a_name_from_elsewhere_names_our_task(task: str, names: str) -> None:
    for name in names.split():
        assert f"; did you mean '{task}'?" in told(name), name


@needs_reasoning_gym
@pytest.mark.parametrize(
    ("task", "names"),
    {
        "rg:leg_counting": "leg_counting LEG_COUNTING leg-counting leg_countin rg_leg_counting RG:leg_counting "
        "reasoning_gym/leg_counting reasoning-gym:leg_counting",
        "rg:gcd": "gcd GCD rg/gcd",
        "rg:chain_sum": "chain_sum chainsum",
        "rg:chain_sum:easy": "chain_sum:easy Chain-Sum:easy",
    }.items(),
    ids=str,
)
def test_a_generators_name_needs_its_prefix(task: str, names: str) -> None:
    for name in names.split():
        assert f"; did you mean '{task}'?" in told(name), name


def test_a_users_data_get_a_message() -> None:
    for name in ("gsm8k", "math500", "countdown=2,GSM8K=1"):
        assert "--dataset_name" in told(name), name
    assert "write rg:NAME" in told("reasoning_gym") and "write rg:NAME" in told("rg")


@pytest.mark.parametrize("name", "foo x mmlu gpqa hellaswag humaneval mbpp hotpotqa arc_challenge arc_easy".split())
def test_a_foreign_task_is_none_of_ours(name: str) -> None:
    assert "did you mean" not in told(name)


def test_without_reasoning_gym_its_names_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    assert "did you mean" not in told("leg_counting")


def test_the_table_names_tasks_there_are() -> None:
    for name, (task, _) in OTHER_NAMES.items():
        assert task in TASKS and name not in TASKS
        assert name == "".join(filter(str.isalnum, name.lower()))


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
