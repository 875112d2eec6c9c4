"""The columns of a dataset: the arguments of reward functions, and the check that no required column is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from estune.data.datasets import Row
from estune.errors import UserError
from estune.identity import NoIdentityError, encode
from estune.rewards.contract import TRL_KEYWORDS, required_keywords

NOT_COLUMNS = ("prompt", "completion", "completion_ids")  # as in TRL, reward functions receive every other column


def reward_inputs(
    rows: Sequence[Row], completions_text: Sequence[str], response_prefix: str
) -> tuple[list[Any], list[Any], dict[str, list[Any]]]:
    """Return (prompts, completions, columns) for reward functions, one entry per completion.

    ``rows[i]`` is the row of completion i. Prompts are the rows' own. Completions start with the response prefix. A
    completion is a string if its prompt is one, and a list of one assistant message if its prompt is conversational.
    A column that a row lacks is None for this row.
    """
    prompts = [row["prompt"] for row in rows]
    completions: list[Any] = []
    for prompt, text in zip(prompts, completions_text, strict=True):
        whole = response_prefix + text
        completions.append(whole if isinstance(prompt, str) else [{"role": "assistant", "content": whole}])
    columns = {name: [row.get(name) for row in rows] for name in column_names(rows)}
    return prompts, completions, columns


def shared_prompts(trained: Sequence[Row], held_out: Sequence[Row]) -> int:
    """Return how many held-out rows have exactly the same prompt as a training row."""

    def key(row: Row) -> bytes:
        try:
            return encode(row["prompt"])
        except NoIdentityError:  # such a prompt equals no other prompt
            return b""

    trained_keys = {key(row) for row in trained} - {b""}
    return sum(key(row) in trained_keys for row in held_out)


def column_names(rows: Sequence[Row]) -> list[str]:
    """Return the columns that reward functions receive, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row if name not in NOT_COLUMNS))


def check_columns(rows: Sequence[Row], reward_funcs: Sequence[Callable[..., Any]], names: Sequence[str]) -> None:
    """Check that the dataset has every column that a reward function requires (a parameter without a default).

    Raises:
        UserError: columns are missing; the message names the columns and the function.
    """
    columns = column_names(rows)
    for function, name in zip(reward_funcs, names, strict=True):
        missing = [word for word in required_keywords(function) if word not in (*TRL_KEYWORDS, *columns)]
        if missing:
            raise UserError(
                f"the dataset lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)} that reward {name} "
                f"needs (it has {', '.join(columns) or 'only prompts'})"
            )
