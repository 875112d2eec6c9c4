"""Wrappers of rewards: noise, an exploit that pays, rewards that are lost, and preferences instead of numbers.

They show what a training method does with such a reward (docs/rewards.md). Evaluations of a run are not affected: a
wrapper returns the reward unchanged where ``trainer_state.is_evaluation`` is true.

What a wrapper draws at random is a function of its seed, the step, the member and the texts of prompt and completion.
So it does not depend on the number of workers, on the order of calls, or on a resume.
"""

from __future__ import annotations

import ast
import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from statistics import NormalDist
from typing import Any, Literal

from estune.errors import UserError
from estune.rewards.contract import accepted_keywords
from estune.rewards.loading import load_reward

Reward = Callable[..., Any]
Values = list[float | None]  # one reward per completion; None: the function does not apply
EXPLOIT_FILE = re.compile(r"[\w./~ -]+\.py:[\w.]+")  # of an exploit that is a function in a file


def noisy(
    reward: Reward,
    *,
    flip: float = 0.0,
    std: float = 0.0,
    per: Literal["call", "row"] = "call",
    low: float = 0.0,
    high: float = 1.0,
    seed: int = 0,
) -> Reward:
    """Return a reward function that is wrong at random.

    Args:
        reward: a reward function.
        flip: probability with which a reward r becomes ``low + high - r``.
        std: standard deviation of normal noise that is added.
        per: ``call``: every completion of every member draws anew, but equal completions of one member to one prompt
            share a draw. ``row``: all completions of a prompt share one draw in all steps, like a row with a wrong
            label.
        low: of the rewards that are flipped.
        high: of the rewards that are flipped.
        seed: of what is drawn.

    Raises:
        UserError: a value is out of its range.
    """
    _check_share("noisy", "flip", flip)
    _check_finite("noisy", low=low, high=high, std=std)
    if std < 0:
        raise UserError(f"noisy: std must not be negative, not {std!r}")
    _check_per("noisy", per)
    return _wrapped(_noisy, reward, dict(flip=flip, std=std, per=per, low=low, high=high, seed=seed))


def drop(reward: Reward, *, share: float, per: Literal["call", "row"] = "call", seed: int = 0) -> Reward:
    """Return a reward function that returns None for a random share of the completions.

    Args:
        reward: a reward function.
        share: probability that a reward is lost.
        per: as in `noisy`.
        seed: of what is drawn.

    Raises:
        UserError: a value is out of its range.
    """
    _check_share("drop", "share", share)
    _check_per("drop", per)
    return _wrapped(_drop, reward, dict(share=share, per=per, seed=seed))


def hackable(reward: Reward, *, exploit: str | Reward, bonus: float = 1.0) -> Reward:
    """Return a reward function that also pays a bonus for an exploit, which a wrong answer can take.

    The share of completions that take it is logged as ``exploited``.

    Args:
        reward: a reward function.
        exploit: a regular expression that is searched in the completion; or a reward function, or ``file.py:function``,
            whose value is multiplied by the bonus.
        bonus: added to the reward.

    Raises:
        UserError: the regular expression is invalid, or the function does not exist.
    """
    _check_finite("hackable", bonus=bonus)
    if isinstance(exploit, str) and EXPLOIT_FILE.fullmatch(exploit):
        exploit = load_reward(exploit)
    if isinstance(exploit, str):
        try:
            re.compile(exploit)
        except re.error as error:
            raise UserError(f"hackable: exploit {exploit!r} is no regular expression: {error}") from None
    elif not callable(exploit):
        raise UserError(f"hackable: exploit must be a regular expression or a function, not {exploit!r}")
    return _wrapped(_hackable, reward, dict(exploit=exploit, bonus=bonus))


def preference(reward: Reward, *, agree: float = 1.0, seed: int = 0) -> Reward:
    """Return a reward function that only says how often a completion's reward beats those of its opponents.

    Its value is the share of the opponents' completions of the same prompt that have a lower reward. Equal rewards
    count one half. Opponents without a reward do not count; without any opponent the value is None.

    Args:
        reward: a reward function that needs no token ids.
        agree: probability with which a comparison comes out right; otherwise it comes out the other way round.
        seed: of what is drawn.

    Raises:
        UserError: a value is out of its range.
    """
    _check_share("preference", "agree", agree)
    return _wrapped(_preference, reward, dict(agree=agree, per="call", seed=seed), adds=("opponents",))


def judged(judge: Any) -> Reward:
    """Return a reward function from a judge of pairs: how often the judge prefers a completion to its opponents'.

    Args:
        judge: a function ``judge(prompts, first, second, **columns)`` that returns for each pair the probability that
            the first completion is better, or None. Or an object with TRL's method ``judge(prompts, completions)``: it
            gets pairs and returns the index of the better one, or -1.

    Raises:
        UserError: the judge is neither.
    """
    if not callable(judge) and not callable(getattr(judge, "judge", None)):
        raise UserError(f"a judge is a function, or an object with a method judge, not {type(judge).__name__}")
    has_method = hasattr(judge, "judge")
    function = judge.judge if has_method else judge
    return _wrapped(_judged, function, {"has_method": has_method}, adds=("opponents",), makes=("first", "second"))


WRAPPERS: dict[str, Callable[..., Reward]] = {
    "noisy": noisy, "drop": drop, "hackable": hackable, "preference": preference,
}  # fmt: skip


def parsed(text: str) -> tuple[str, dict[str, Any]]:
    """Return name and arguments of a wrapper that is written as a call, such as ``noisy(flip=0.2, per=row)``.

    A word without quotes is text.

    Raises:
        UserError: the text is no such call, or names no wrapper or argument.
    """
    known = ", ".join(WRAPPERS)
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        raise UserError(f"reward_wrappers: {text!r} is no call such as noisy(flip=0.2)") from None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise UserError(f"reward_wrappers: {text!r} is no call such as noisy(flip=0.2), with named arguments")
    name = call.func.id
    if name not in WRAPPERS:
        raise UserError(f"reward_wrappers: there is no wrapper {name!r}; there are {known}")
    accepted = [p.name for p in inspect.signature(WRAPPERS[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    values: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg not in accepted:
            raise UserError(f"reward_wrappers: {name} has no argument {keyword.arg!r}; it has {', '.join(accepted)}")
        try:
            node = keyword.value
            values[keyword.arg] = node.id if isinstance(node, ast.Name) else ast.literal_eval(node)
        except ValueError:
            raise UserError(f"reward_wrappers: {keyword.arg} of {name} must be a number or text") from None
    return name, values


def wrap(reward: Reward, wrappers: Sequence[str], seed: int = 0) -> Reward:
    """Return a reward function within wrappers, the first of them innermost.

    The mean of the reward before all wrappers is logged as ``true_reward/<name>``.

    Args:
        reward: a reward function.
        wrappers: calls for `parsed`.
        seed: of the run; each wrapper that draws and names no seed gets one that follows from it.

    Raises:
        UserError: a wrapper or its arguments are wrong.
    """
    if wrappers:
        reward = _wrapped(_logged, reward, {"name": getattr(reward, "__name__", type(reward).__name__)})
    for index, text in enumerate(wrappers):
        name, values = parsed(text)
        accepted = inspect.signature(WRAPPERS[name]).parameters
        missing = [p.name for p in accepted.values() if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
        if lacking := [argument for argument in missing if argument not in values]:
            raise UserError(f"reward_wrappers: {name} needs {lacking[0]}")
        if "seed" in accepted and "seed" not in values:
            values["seed"] = seed * 1000 + index
        try:
            reward = WRAPPERS[name](reward, **values)
        except TypeError as error:
            raise UserError(f"reward_wrappers: {text!r}: {error}") from None
    return reward


def _wrapped(
    function: Callable[..., Any],
    reward: Reward,
    settings: dict[str, Any],
    *,
    adds: Sequence[str] = (),
    makes: Sequence[str] = (),
) -> Reward:
    """Return ``reward`` within ``function``, with the name of ``reward``.

    The result is a `functools.partial`, so that the reward's source still identifies it (`estune.rewards.sources`).

    Args:
        function: calls the reward.
        reward: a reward function.
        settings: of ``function``.
        adds: arguments that ``function`` needs beside those of the reward.
        makes: arguments of the reward that ``function`` makes itself.
    """
    wrapped: Any = functools.partial(function, reward, settings)
    wrapped.__name__ = getattr(reward, "__name__", type(reward).__name__)
    if hasattr(reward, "prepare"):  # a reward model, which a worker loads before the first call
        wrapped.prepare = reward.prepare
    parameters = [p for p in _parameters(reward) if p.name not in (*adds, *makes)]
    parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in adds]
    every = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
    wrapped.__signature__ = inspect.Signature([*parameters, every])
    return wrapped  # type: ignore[no-any-return]


def _parameters(reward: Reward) -> list[inspect.Parameter]:
    """Return the parameters of a function that can be given by name; empty if it has no signature."""
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (TypeError, ValueError):
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.replace(kind=p.KEYWORD_ONLY) for p in parameters if p.kind in named]


def _logged(reward: Reward, settings: Mapping[str, Any], /, **columns: Any) -> Any:
    def change(values: Values) -> Values:
        known = [value for value in values if value is not None and math.isfinite(value)]
        if known:
            columns["log_metric"](f"true_reward/{settings['name']}", math.fsum(known) / len(known))
        return values

    return _changed(reward, columns, change)


def _noisy(reward: Reward, settings: Mapping[str, Any], /, **columns: Any) -> Any:
    def change(values: Values) -> Values:
        ends, normal = settings["low"] + settings["high"], NormalDist()
        changed: Values = []
        for value, (flip, noise) in zip(values, _draws("noisy", settings, columns), strict=True):
            if value is not None:
                value = ends - value if flip < settings["flip"] else value
                value += settings["std"] * normal.inv_cdf(noise) if settings["std"] else 0.0
            changed.append(value)
        return changed

    return _changed(reward, columns, change)


def _drop(reward: Reward, settings: Mapping[str, Any], /, **columns: Any) -> Any:
    def change(values: Values) -> Values:
        draws = _draws("drop", settings, columns)
        return [None if draw < settings["share"] else v for v, (draw, _) in zip(values, draws, strict=True)]

    return _changed(reward, columns, change)


def _hackable(reward: Reward, settings: Mapping[str, Any], /, **columns: Any) -> Any:
    exploit, bonus = settings["exploit"], settings["bonus"]
    if isinstance(exploit, str):
        taken: Any = [float(bool(re.search(exploit, _text(c)))) for c in columns["completions"]]
    else:
        taken = _call(exploit, columns)

    def change(values: Values) -> Values:
        columns["log_metric"]("exploited", math.fsum(1.0 for found in taken if found) / max(1, len(taken)))
        pairs = zip(values, taken, strict=True)
        return [v if v is None or found is None else v + bonus * found for v, found in pairs]

    return _changed(reward, columns, change)


def _preference(reward: Reward, settings: Mapping[str, Any], /, **columns: Any) -> Any:
    opponents = columns.pop("opponents")
    if getattr(columns["trainer_state"], "is_evaluation", False):
        return _call(reward, columns)
    rows, first, second, theirs = _pairs(columns, opponents)
    # What the reward logs about an opponent is left out: it is no completion of this member.
    theirs |= {"completions": second, "log_metric": _log_nothing, "log_extra": _log_nothing}
    answers = _call(reward, columns), _call(reward, theirs) if rows else []
    texts = [f"{_text(one)}\0{_text(other)}" for one, other in zip(first, second, strict=True)]
    draws = [draw for draw, _ in _draws("preference", settings, {**theirs, "completions": texts})]

    def win_rates(own: Values, others: Values) -> Values:
        won: Values = []
        for row, value, draw in zip(rows, others, draws, strict=True):
            mine = own[row]
            if mine is None or value is None:
                won.append(None)
                continue
            win = 0.5 if mine == value else float(mine > value)
            won.append(win if draw < settings["agree"] else 1 - win)
        return _means(rows, won, len(own))

    return _then(win_rates, *answers)


def _judged(judge: Reward, settings: Mapping[str, Any], /, **columns: Any) -> Any:
    rows, first, second, given = _pairs(columns, columns.pop("opponents"))
    n_rows = len(columns["completions"])
    if not rows:
        return [None] * n_rows
    if settings["has_method"]:
        pairs = [list(pair) for pair in zip(first, second, strict=True)]
        ranks = judge(prompts=given["prompts"], completions=pairs)
        return _means(rows, [None if rank not in (0, 1) else 1.0 - rank for rank in ranks], n_rows)
    found = _call(judge, {**given, "first": first, "second": second})
    return _then(lambda values: _means(rows, values, n_rows), found)


def _pairs(columns: Mapping[str, Any], opponents: Sequence[Any]) -> tuple[list[int], list[Any], list[Any], Any]:
    """Return for each comparison the completion's row, the completion, the opponent's, and the other columns."""
    rows = [row for row, others in enumerate(opponents) for _ in others or ()]
    second = [other for others in opponents for other in others or ()]
    others = {name: values for name, values in columns.items() if name not in ("completions", "completion_ids")}
    given = {name: [vs[row] for row in rows] if isinstance(vs, list) else vs for name, vs in others.items()}
    return rows, [columns["completions"][row] for row in rows], second, given


def _log_nothing(name: str, value: Any) -> None:
    """Log nothing."""


def _means(rows: Sequence[int], values: Values, n_rows: int) -> Values:
    """Return the mean of the values of each row, (n_rows,); None for a row without values."""
    known: list[list[float]] = [[] for _ in range(n_rows)]
    for row, value in zip(rows, values, strict=True):
        if value is not None:
            known[row].append(value)
    return [math.fsum(found) / len(found) if found else None for found in known]


def _call(reward: Reward, columns: Mapping[str, Any]) -> Any:
    """Call a reward function with the keywords that it accepts."""
    accepted = accepted_keywords(reward)
    return reward(**{name: value for name, value in columns.items() if accepted is None or name in accepted})


def _changed(reward: Reward, columns: Mapping[str, Any], change: Callable[[Values], Values]) -> Any:
    """Return the changed rewards, or unchanged ones in an evaluation."""
    answer = _call(reward, columns)
    return answer if getattr(columns["trainer_state"], "is_evaluation", False) else _then(change, answer)


def _then(change: Callable[..., Values], *answers: Any) -> Any:
    """Return what ``change`` makes of the answers of functions; a coroutine if one of the functions is async."""

    def values(answer: Any) -> Values:
        return [None if value is None else float(value) for value in answer]

    async def later() -> Values:
        return change(*[values(await answer if inspect.isawaitable(answer) else answer) for answer in answers])

    return later() if any(map(inspect.isawaitable, answers)) else change(*map(values, answers))


def _draws(purpose: str, settings: Mapping[str, Any], columns: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Return two numbers in (0, 1) for each completion."""
    state, is_row = columns["trainer_state"], settings["per"] == "row"
    now = () if is_row else (getattr(state, "global_step", 0), getattr(state, "member", None))
    draws = []
    for prompt, completion in zip(columns["prompts"], columns["completions"], strict=True):
        key = (purpose, settings["seed"], str(prompt), *(() if is_row else (*now, _text(completion))))
        hashed = blake2b(repr(key).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        first, second = (int.from_bytes(part, "little") for part in (hashed[:8], hashed[8:]))
        draws.append(((first + 0.5) / 2**64, min((second + 0.5) / 2**64, math.nextafter(1.0, 0.0))))
    return draws


def _text(completion: Any) -> str:
    """Return the text of a completion, which is text or a list of messages."""
    return completion if isinstance(completion, str) else str(completion[-1].get("content", ""))


def _check_share(wrapper: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise UserError(f"{wrapper}: {name} must be between 0 and 1, not {value!r}")


def _check_per(wrapper: str, value: Any) -> None:
    if value not in ("call", "row"):
        raise UserError(f"{wrapper}: per is {value!r}; it can be call, row")


def _check_finite(wrapper: str, **values: Any) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"{wrapper}: {name} must be a finite number, not {value!r}")
