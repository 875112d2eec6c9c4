"""Names that tasks have elsewhere: what is told of them, and that foreign tasks are not mistaken for ours."""

from __future__ import annotations

import importlib.util

import pytest

from estune.errors import UserError
from estune.tasks import TASKS, get_task
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
