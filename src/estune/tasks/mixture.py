"""Mixtures of tasks: ``countdown=2,conciseness=1`` has two countdown rows for every row of conciseness.

The column ``task`` names a row's task; reward and accuracy score every completion by its row's task. Weights are shares
of rows. If a task has too few rows for its share, training repeats them, and an evaluation has fewer rows in all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from estune.errors import UserError

Row = dict[str, Any]


def parse(text: str) -> list[tuple[str, float]]:
    """Return the names and weights of ``name=weight,name=weight``; a name alone weighs 1.

    Raises:
        UserError: a weight is not a positive number, or a name occurs twice.
    """
    parts = []
    for item in text.split(","):
        name, _, weight = item.strip().partition("=")
        try:
            value = float(weight) if weight else 1.0
        except ValueError:
            value = 0.0
        if not name or not 0 < value < float("inf"):
            raise UserError(
                f"task {text!r} is not a mixture, because of {item.strip()!r}: write name=weight,name=weight with "
                "positive weights"
            )
        parts.append((name, value))
    names = [name for name, _ in parts]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"task {text!r} names {twice} twice")
    return parts


def blend(rows: Sequence[Sequence[Row]], weights: Sequence[float], names: Sequence[str], repeat: bool) -> list[Row]:
    """Return rows of several tasks in the proportion of their weights, evenly interleaved.

    With ``repeat`` the result has as many rows as all tasks together, and rows of small tasks occur again. Without it
    the result has as many rows as the proportion allows with no row twice.
    """
    shares = [weight / sum(weights) for weight in weights]
    if repeat:
        total = float(sum(map(len, rows)))
    else:
        total = min(len(of_task) / share for of_task, share in zip(rows, shares, strict=True))
    counts = [max(1, round(total * share + 1e-9)) for share in shares]
    if not repeat:
        counts = [min(count, len(of_task)) for count, of_task in zip(counts, rows, strict=True)]
    # Row i of n gets the position (i + 1/2) / n: every part of the result has the proportion of the whole.
    places = [((i + 0.5) / count, task, i) for task, count in enumerate(counts) for i in range(count)]
    return [{**rows[task][i % len(rows[task])], "task": names[task]} for _, task, i in sorted(places)]


@dataclass(frozen=True)
class Dispatch:
    """A reward function with TRL's contract that scores every completion by its row's task."""

    functions: dict[str, Callable[..., list[float]]]
    __name__: str

    def __call__(self, completions: list[Any], task: list[str], **columns: Any) -> list[float]:
        """Return one value per completion."""
        scores: list[float] = [0.0] * len(completions)
        for name, function in self.functions.items():
            at = [i for i, row_task in enumerate(task) if row_task == name]
            if not at:
                continue
            own_columns = {
                key: [value[i] for i in at] if _per_row(value, task) else value for key, value in columns.items()
            }
            for i, value in zip(at, function(completions=[completions[i] for i in at], **own_columns), strict=True):
                scores[i] = value
        return scores


def _per_row(value: Any, task: list[str]) -> bool:
    return isinstance(value, list) and len(value) == len(task)
