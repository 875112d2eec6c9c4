"""Convert values from YAML, JSON and the command line to an option's type: YAML reads `1e-3` as a string."""

from __future__ import annotations

import datetime
import json
import re
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from estune.errors import UserError


def convert(name: str, value: Any, hint: Any) -> Any:
    """Convert a value to an option's type.

    Args:
        name: the option's name.
        value: the value, as given.
        hint: the option's type.

    Raises:
        UserError: the value does not fit the type; the message names option, value and type.
    """
    options = _alternatives(hint)
    if name in _OF_OTHERS and (found := _OF_OTHERS[name](value)) is not None:
        return found
    if type(None) in options and value in (["none"], ["null"]):  # `--reward_funcs none` on the command line
        return None
    for kind in options:
        converted = _convert(value, kind)
        if converted is not _MISFIT:
            return converted
    wanted = " or ".join(_describe(kind) for kind in options if kind is not type(None))
    advice = _quoting_hint(value, options) or _ratio_hint(value, options)
    raise UserError(f"{name} must be {wanted}, not {value!r}{advice}")


def is_text(value: Any) -> bool:
    """Return whether all strings in a value, at any depth, can be encoded as UTF-8."""
    if isinstance(value, dict):
        return all(is_text(key) and is_text(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(is_text, value))
    return not isinstance(value, str) or value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)


def _quoting_hint(value: Any, options: list[Any]) -> str:
    """Return advice for text that YAML read as another type: `no` as a boolean, `0123` as 83, 2026-01-01 as a date."""
    items = value if isinstance(value, list) else [value]
    if options[0] in (str, list[str]) and any(isinstance(item, (bool, int, float, datetime.date)) for item in items):
        return "; if it is meant as text, write it in quotes"
    return ""


def _ratio_hint(value: Any, options: list[Any]) -> str:
    """Return advice for a share of the steps, which transformers takes for some numbers of steps."""
    is_share = int in options and re.fullmatch(r"0?\.\d+", str(value)) is not None
    return "; shares of max_steps are not read: give a number" if is_share else ""


# Option -> our value for a value that other libraries read, or None.
_OF_OTHERS: dict[str, Callable[[Any], Any]] = {
    "top_k": lambda value: 0 if value is None or str(value) == "-1" else None,  # off in transformers and vLLM
    "report_to": lambda value: ["none"] if value is None else None,
    "dtype": lambda value: str(value).removeprefix("torch.") if str(value).startswith("torch.") else None,
}
_MISFIT = object()


def _alternatives(hint: Any) -> list[Any]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return list(typing.get_args(hint)) if union else [hint]


def _convert(value: Any, kind: Any) -> Any:
    """Convert a value to one type; return _MISFIT if it does not fit."""
    origin = typing.get_origin(kind)
    if kind is type(None):
        return None if value is None or value in ("none", "null", "None") else _MISFIT
    if origin is Literal:
        return value if value in typing.get_args(kind) else _MISFIT
    if origin is list:
        items = [value] if isinstance(value, (str, int, float)) and not isinstance(value, bool) else value
        if not isinstance(items, (list, tuple)):
            return _MISFIT
        converted = [_convert(item, typing.get_args(kind)[0]) for item in items]
        return _MISFIT if any(item is _MISFIT for item in converted) else converted
    if origin is dict:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                return _MISFIT
        try:  # values without a JSON type (dates, NaN) do not fit; keys become strings, as in the journal
            return json.loads(json.dumps(value, allow_nan=False)) if isinstance(value, Mapping) else _MISFIT
        except (TypeError, ValueError):
            return _MISFIT
    if kind is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        return words.get(str(value).lower(), _MISFIT)
    if kind is str:
        return str(value) if isinstance(value, (str, Path)) else _MISFIT
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return _MISFIT
    try:
        number = float(value)
        if kind is float:
            return number
        return (
            int(value)
            if isinstance(value, int) or re.fullmatch(r"[+-]?\d+", str(value))
            else (int(number) if number.is_integer() else _MISFIT)
        )
    except (ValueError, OverflowError):
        return _MISFIT


def _describe(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin is Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    if origin is list:
        return f"a list of {_describe(typing.get_args(kind)[0]).split(' ', 1)[-1]}s"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    return "a JSON object" if origin is dict else names.get(kind, str(kind))
