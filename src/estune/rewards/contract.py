"""TRL's reward contract: a reward function's arguments, the call, its reply as JSON, and a description of its errors.

Used inside a worker process, and inside the trainer if isolation is off. The file imports only the standard library,
because the fork server loads it (`estune.rewards.fork_server`).
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
import os
import types
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

NOT_COLUMNS = ("prompt", "completion", "completion_ids")  # as in TRL, reward functions receive every other column
TRL_KEYWORDS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
OUR_KEYWORDS = ("opponents",)  # unless the data has a column of this name

MAX_METRIC = 1e300  # a larger metric is dropped, so that sums of metrics do not overflow
MAX_NAME_LENGTH = 200  # characters in the name of a metric or column
MAX_ERROR_LENGTH = 1000  # characters
MAX_LEVELS = 20  # nested lists and dicts within a value given to log_extra


class AnswerError(Exception):
    """A reward function did not return one number or None per completion."""


def reward_inputs(
    rows: Sequence[dict[str, Any]], completions_text: Sequence[str], response_prefix: str
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


def opposed(prompts: Sequence[Any], opponents: Sequence[Sequence[Sequence[str]]]) -> list[list[Any]]:
    """Return for each completion the opponents' completions, in the form of its prompt.

    Args:
        prompts: of the completions, (B * G,).
        opponents: each opponent's texts (B, G), with the response prefix.
    """
    flat = [[text for row in texts for text in row] for texts in opponents]  # (K, B * G)
    return [
        [text if isinstance(prompt, str) else [{"role": "assistant", "content": text}] for text in texts]
        for prompt, *texts in zip(prompts, *flat, strict=True)
    ]


def wants_opponents(function: Callable[..., Any]) -> bool:
    """Return whether a reward function names the argument ``opponents``."""
    try:
        return "opponents" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def column_names(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the columns that reward functions receive, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row if name not in NOT_COLUMNS))


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


def read_reply(message: str | bytes | bytearray, call: int | None = None, n_rows: int | None = None) -> dict[str, Any]:
    """Parse and check a worker's reply. Code that a model wrote may have sent it.

    Returns:
        ``error`` (a str); or, with ``n_rows``, ``rewards`` (a float or None per row), ``metrics`` (name -> finite
        floats) and ``extra`` (column -> JSON values); otherwise nothing.

    Raises:
        ValueError: the message is not a reply, or the reply to another call.
    """
    try:
        reply = json.loads(message)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(reply, dict) or reply.get("call") != call:
        raise ValueError("not the reply to this call")
    if "error" in reply:
        return {"error": _writable(_checked(reply["error"], str)[:MAX_ERROR_LENGTH])}
    if n_rows is None:
        return {}
    rewards = _checked(reply.get("rewards"), list)
    if len(rewards) != n_rows or not all(value is None or type(value) is float for value in rewards):
        raise ValueError("not one number or None per row")
    metrics: dict[str, list[float]] = {}
    for name, values in _checked(reply.get("metrics"), dict).items():
        finite = [value for value in _checked(values, list) if abs(_checked(value, float)) <= MAX_METRIC]  # not NaN
        if finite and len(name) <= MAX_NAME_LENGTH:
            metrics[_writable(name)] = finite
    extra: dict[str, list[Any]] = {}
    for name, values in _checked(reply.get("extra"), dict).items():
        if len(name) <= MAX_NAME_LENGTH:
            extra[_writable(name)] = [_writable(value) for value in _checked(values, list)]
    return {"rewards": rewards, "metrics": metrics, "extra": extra}


def _checked(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{type(value).__name__} instead of {kind.__name__}")
    return value


def _writable(value: Any, levels: int = MAX_LEVELS) -> Any:
    """Return a parsed JSON value with lone surrogates, NaN, huge integers and deep nesting replaced."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int):  # also bool
        return value if value.bit_length() < 64 else str(value)
    if isinstance(value, (list, dict)) and not levels:
        return "..."
    if isinstance(value, list):
        return [_writable(item, levels - 1) for item in value]
    if isinstance(value, dict):
        return {_writable(name): _writable(item, levels - 1) for name, item in value.items()}
    return value


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
