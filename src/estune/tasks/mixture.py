"""Several tasks at once: ``countdown=2,conciseness=1`` has two rows of one for every row of the other.

Rows keep their task in the column ``task``; reward and accuracy hand every completion to its own task's. Weights are
shares of rows: a task whose rows are too few for its share repeats them in training, and lends fewer to an evaluation.
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
        UserError: a weight is no positive number, or a name comes twice.
    """
    parts = []
    for item in text.split(","):
        name, _, weight = item.strip().partition("=")
        try:
            value = float(weight) if weight else 1.0
        except ValueError:
            value = 0.0
        if not name or not 0 < value < float("inf"):
            raise UserError(f"task {text!r} is no mixture, for its part {item.strip()!r}: write "
                            "name=weight,name=weight with positive weights")  # fmt: skip
        parts.append((name, value))
    names = [name for name, _ in parts]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"task {text!r} names {twice} twice")
    return parts


def blend(rows: Sequence[Sequence[Row]], weights: Sequence[float], names: Sequence[str], repeat: bool) -> list[Row]:
    """Return rows of several tasks in the proportion of their weights, evenly interleaved.

    With ``repeat`` there are as many as all tasks have together, and small tasks start over; otherwise as many as the
    proportion allows without repeating any.
    """
    shares = [weight / sum(weights) for weight in weights]
    if repeat:
        total = float(sum(map(len, rows)))
    else:
        total = min(len(own) / share for own, share in zip(rows, shares, strict=True))
    counts = [max(1, round(total * share + 1e-9)) for share in shares]
    if not repeat:
        counts = [min(count, len(own)) for count, own in zip(counts, rows, strict=True)]
    # The i-th of n rows stands at (i + 1/2) / n: every stretch has the proportion of the whole.
    places = [((i + 0.5) / count, task, i) for task, count in enumerate(counts) for i in range(count)]
    return [{**rows[task][i % len(rows[task])], "task": names[task]} for _, task, i in sorted(places)]


@dataclass(frozen=True)
class Dispatch:
    """A reward that hands every completion to its row's task; a name and TRL's contract make it a reward function."""

    functions: dict[str, Callable[..., list[float]]]
    __name__: str

    def __call__(self, completions: list[Any], task: list[str], **columns: Any) -> list[float]:
        """Return one value per completion."""
        found: list[float] = [0.0] * len(completions)
        for name, function in self.functions.items():
            at = [i for i, own in enumerate(task) if own == name]
            if not at:
                continue
            own = {key: [value[i] for i in at] if _per_row(value, task) else value for key, value in columns.items()}
            for i, value in zip(at, function(completions=[completions[i] for i in at], **own), strict=True):
                found[i] = value
        return found


def _per_row(value: Any, task: list[str]) -> bool:
    return isinstance(value, list) and len(value) == len(task)
