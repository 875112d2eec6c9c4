"""The tasks that come with estune: one file each, and the one dict that names them."""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from estune.errors import UserError
from estune.tasks import countdown, quadratic

__all__ = ["TASKS", "Task", "get_task"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A task: where its rows come from, and how completions are scored (both functions follow TRL's contract)."""

    name: str
    description: str
    load: Callable[[str], list[Row]]
    """Rows of the split "train", "validation" or "test"; each has "prompt" and the columns below."""
    prepare_row: Callable[[Row], Row]
    """A row of somebody's own file -> a row of this task; UserError names missing columns."""
    reward: Callable[..., list[float]]
    """What training maximises."""
    accuracy: Callable[..., list[float]]
    """1.0 or 0.0 per completion, what evaluation reports."""
    columns: tuple[str, ...]
    """The columns that the two functions need."""


TASKS: dict[str, Task] = {
    "countdown": Task(
        name="countdown",
        description="reach a target from 3 or 4 numbers, each used exactly once, with + - * / and parentheses",
        load=countdown.load,
        prepare_row=countdown.prepare_row,
        reward=countdown.reward,
        accuracy=countdown.accuracy,
        columns=("numbers", "target"),
    ),
    "quadratic": Task(
        name="quadratic",
        description="the toy engine's: move every coordinate of a vector to a wanted value",
        load=quadratic.load,
        prepare_row=quadratic.prepare_row,
        reward=quadratic.reward,
        accuracy=quadratic.accuracy,
        columns=("wanted",),
    ),
}


def get_task(name: str) -> Task:
    """Return the task of that name; UserError with the nearest name where there is none."""
    if name in TASKS:
        return TASKS[name]
    nearest = get_close_matches(name, TASKS, n=1, cutoff=0.0)
    raise UserError(f"There is no task {name!r}; did you mean {nearest[0]!r}?")
