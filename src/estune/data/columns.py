"""The columns of a dataset: what reward functions are given, and whether all that they need is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from estune.data.datasets import Row
from estune.errors import UserError
from estune.identity import NoIdentityError, encode
from estune.rewards.worker import TRL_KEYWORDS, required_keywords

NOT_COLUMNS = ("prompt", "completion", "completion_ids")  # TRL's rule: every other column goes to the rewards


def reward_inputs(
    rows: Sequence[Row], completions_text: Sequence[str], response_prefix: str
) -> tuple[list[Any], list[Any], dict[str, list[Any]]]:
    """Return (prompts, completions, columns) for reward functions, one entry per completion; row i has completion i.

    Prompts are as in the row. Completions start with the response prefix; they are strings for string prompts and
    lists with one assistant message for conversational ones. A column that a row lacks is None there.
    """
    prompts = [row["prompt"] for row in rows]
    completions: list[Any] = []
    for prompt, text in zip(prompts, completions_text, strict=True):
        whole = response_prefix + text
        completions.append(whole if isinstance(prompt, str) else [{"role": "assistant", "content": whole}])
    columns = {name: [row.get(name) for row in rows] for name in column_names(rows)}
    return prompts, completions, columns


def shared_prompts(trained: Sequence[Row], held_out: Sequence[Row]) -> int:
    """Return how many held-out rows have a prompt that is trained on, word for word."""

    def key(row: Row) -> bytes:
        try:
            return encode(row["prompt"])
        except NoIdentityError:  # no prompt that any row can have in common with another
            return b""

    known = {key(row) for row in trained} - {b""}
    return sum(key(row) in known for row in held_out)


def column_names(rows: Sequence[Row]) -> list[str]:
    """Return the columns that reward functions are given, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row if name not in NOT_COLUMNS))


def check_columns(rows: Sequence[Row], reward_funcs: Sequence[Callable[..., Any]], names: Sequence[str]) -> None:
    """Refuse a dataset without the columns that a reward function has to be given (parameters with no default).

    Raises:
        UserError: names the missing columns and the function.
    """
    columns = column_names(rows)
    for function, name in zip(reward_funcs, names, strict=True):
        missing = [word for word in required_keywords(function) if word not in (*TRL_KEYWORDS, *columns)]
        if missing:
            raise UserError(
                f"the dataset lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)} that reward {name} "
                f"needs (it has {', '.join(columns) or 'only prompts'})"
            )
