"""Checks of a dataset's columns: the columns that reward functions require, and prompts in two splits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from estune.data.datasets import Row
from estune.errors import UserError
from estune.identity import NoIdentityError, encode
from estune.rewards.contract import TRL_KEYWORDS, column_names, required_keywords


def shared_prompts(trained: Sequence[Row], held_out: Sequence[Row]) -> int:
    """Return how many held-out rows have exactly the same prompt as a training row."""

    def key(row: Row) -> bytes:
        try:
            return encode(row["prompt"])
        except NoIdentityError:  # such a prompt equals no other prompt
            return b""

    trained_keys = {key(row) for row in trained} - {b""}
    return sum(key(row) in trained_keys for row in held_out)


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
