"""TRL's reward contract: call a reward function on a batch, check its answer, and describe its errors.

Used inside a worker process, and inside the trainer if isolation is off. The file imports only the standard library,
because the fork server loads it (`estune.rewards.fork_server`).
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import types
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

TRL_KEYWORDS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


class AnswerError(Exception):
    """A reward function did not return one number or None per completion."""


def accepted_keywords(function: Callable[..., Any]) -> frozenset[str] | None:
    """Return the keywords that a function accepts; None means any (``**kwargs``, or no signature)."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def required_keywords(function: Callable[..., Any]) -> list[str]:
    """Return the parameters of a function that have no default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]


def call_function(
    function: Callable[..., Any],
    columns: dict[str, list[Any]],
    trainer_state: dict[str, Any],
    rows: Sequence[int],
    run: Callable[[Coroutine[Any, Any, Any]], Any],
) -> dict[str, Any]:
    """Call a reward function as TRL does, on some rows of a batch.

    Args:
        function: the reward function.
        columns: ``prompts``, ``completions``, ``completion_ids`` and every dataset column, one value per row.
        trainer_state: attributes of the ``trainer_state`` object.
        rows: indices of the rows.
        run: runs the coroutine of an ``async def``; always on one event loop, as clients that it caches expect.

    Returns:
        ``rewards`` (a float or None per row), ``metrics`` (name -> values logged) and ``extra`` (column -> values).

    Raises:
        AnswerError: the function did not return one number or None per row.
        BaseException: whatever the function raises.
    """
    metrics: dict[str, list[float]] = {}
    extra: dict[str, list[Any]] = {}

    def log_metric(name: str, value: float) -> None:
        if isinstance(name, str):
            metrics.setdefault(name, []).append(float(value))

    def log_extra(column: str, values: list[Any]) -> None:
        logged = extra.setdefault(str(column), [])
        # One value more than there are rows is kept: the trainer then sees that the number is wrong.
        logged.extend(itertools.islice(values, max(0, len(rows) + 1 - len(logged))))

    keywords: dict[str, Any] = {name: [values[row] for row in rows] for name, values in columns.items()}
    keywords |= {
        "trainer_state": types.SimpleNamespace(**trainer_state),
        "log_extra": log_extra,
        "log_metric": log_metric,
    }
    accepted = accepted_keywords(function)
    if accepted is not None:
        keywords = {name: value for name, value in keywords.items() if name in accepted}
    answer = function(**keywords)
    if inspect.isawaitable(answer):
        answer = run(_await(answer))
    return {"rewards": _numbers(answer, len(rows)), "metrics": metrics, "extra": extra}


async def _await(awaitable: Any) -> Any:
    return await awaitable


def _numbers(answer: Any, n_rows: int) -> list[float | None]:
    if answer is None or isinstance(answer, (str, bytes, dict)) or not hasattr(answer, "__iter__"):
        raise AnswerError(f"returned {type(answer).__name__} instead of a list of numbers")
    values = list(itertools.islice(answer, n_rows + 1))  # a generator may never end
    if len(values) != n_rows:
        count = len(answer) if hasattr(answer, "__len__") else "more" if len(values) > n_rows else len(values)
        raise AnswerError(f"returned {count} rewards for {n_rows} completions")
    return [None if value is None else _number(value) for value in values]


def _number(value: Any) -> float:
    try:
        if not isinstance(value, (str, bytes)):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise AnswerError(f"returned {str(value)[:40]!r} ({type(value).__name__}), which is not a number")


def to_json(reply: dict[str, Any]) -> str:
    """Return a reply as JSON: scalars of other libraries become numbers, other objects become text."""

    def plain(value: Any) -> Any:
        try:
            return value.item()
        except Exception:
            return str(value)

    return json.dumps(reply, default=plain)


def describe(error: BaseException, function: Callable[..., Any]) -> str:
    """Return ``Type: message (file.py:line)`` of an error, with the last line in the function's own file."""
    try:
        message = " ".join(str(error).split())[:300]
    except Exception:  # the __str__ of a user's exception class can raise
        message = ""
    if isinstance(error, AnswerError):
        return message
    code = getattr(inspect.unwrap(getattr(function, "func", function)), "__code__", None)
    own = os.path.dirname(__file__)
    where, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if os.path.dirname(file) != own and (not where or code is None or file == code.co_filename):
            where = f" ({os.path.basename(file)}:{trace.tb_lineno})"
        trace = trace.tb_next
    return f"{type(error).__name__}{': ' if message else ''}{message}{where}"
