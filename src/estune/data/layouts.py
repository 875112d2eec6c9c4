"""Layouts of rows: the user's own names for columns, and the columns that make the prompt of a row without one.

A layout is recognised by the column that holds the question. Rows keep all their columns, so reward functions get each
under its own name; only `prompt` is added, and the reference answer of a conversation as `answer`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from estune.errors import UserError, nearest
from estune.rewards.contract import TRL_KEYWORDS

Row = dict[str, Any]

PROMPT, MESSAGES, INSTRUCTION = "prompt", "messages", "instruction"
MESSAGES_ANSWER = "answer"  # the column that rewards get a conversation's reference answer in
# Layout, named after the column that makes the prompt -> the column of the reference answer.
LAYOUTS = {"question": "answer", MESSAGES: MESSAGES_ANSWER, INSTRUCTION: "output", "problem": "solution"}
LIKELY_PROMPTS = ("input", "text", "query", "prompts")  # columns of no layout that may hold prompts
CONTEXTS = ("context", "passage", "choices", "options")  # columns that may belong to a question and are in no prompt
ROLES = ("system", "developer", "user", "assistant", "tool")  # of a conversation; most chat templates skip other ones
BETWEEN_PARTS = " "  # between text parts where no chat template joins them, as in transformers' server
BEFORE_INPUT = "\n\n"  # between an instruction and its input


# --- the user's names -------------------------------------------------------------------------------------------------


def with_mapped_columns(rows: Sequence[Row], mapping: Mapping[str, str], *, completions: bool = False) -> list[Row]:
    """Return rows in which each column of a mapping also has its further name.

    Args:
        rows: rows that all have the same columns.
        mapping: further name -> column. A layout's name may be mapped to itself, which chooses that layout.
        completions: whether the rows hold completions, so that a name may be ``completion``.

    Raises:
        UserError: a column does not exist or gets two names, or a name is taken, reserved, or without effect.
    """
    columns = dict.fromkeys(name for row in rows for name in row)
    reserved = TRL_KEYWORDS if completions else (*TRL_KEYWORDS, "completion")
    for name, column in mapping.items():
        _check_mapped(name, column, columns, reserved)
        twin = next(other for other, its in mapping.items() if its == column)
        if twin != name:
            raise UserError(f"column_mapping gives the column {column!r} two names, {twin} and {name}: give it one")
    return [{**row, **{name: row[column] for name, column in mapping.items()}} for row in rows] if mapping else [*rows]


def _check_mapped(name: str, column: str, columns: Collection[str], reserved: Collection[str]) -> None:
    """Raise UserError if a name cannot stand for a column."""
    if name in reserved:
        raise UserError(
            f"column_mapping cannot name a column {name!r}: reward functions get the run's own {name} under this name"
        )
    if column not in columns:
        listed = ", ".join(columns)
        outer = next((known for known in columns if column.startswith((f"{known}.", f"{known}["))), None)
        if outer is not None:
            hint = f"a value inside the column {outer} has no name of its own; read it in the reward function, or make "
            hint += "it a column first"
        elif name in columns:
            hint = f"the dataset's column comes second: {json.dumps({column: name})}"
        else:
            hint = f"it has {listed}{nearest(column, columns)}"
        raise UserError(f"column_mapping maps {name} to {column!r}, and the dataset has no such column: {hint}")
    if name == column and name not in (PROMPT, *LAYOUTS):
        raise UserError(f"column_mapping maps {name} to itself, which has no effect")
    if name != column and name in columns:
        raise UserError(
            f"column_mapping maps {name} to {column}, but the dataset has a column {name!r}: rename one of the two"
        )


def hidden_columns(rows: Sequence[Row], mapping: Mapping[str, str]) -> list[str]:
    """Return the columns that no reward function can get, because TRL's keywords have their names.

    A column with a further name in ``mapping`` is not hidden.
    """
    columns = dict.fromkeys(name for row in rows for name in row)
    return [name for name in columns if name in TRL_KEYWORDS and name not in mapping.values()]


# --- recognising a layout ---------------------------------------------------------------------------------------------


def layout_of(rows: Sequence[Row], mapping: Mapping[str, str]) -> str | None:
    """Return the column that makes the prompts of rows: ``prompt``, or a name of `LAYOUTS`; None if there is none.

    A name in ``mapping`` decides, then ``prompt``, then the only layout that fits. A layout does not fit if its column
    is null in every row.

    Raises:
        UserError: several layouts fit; the message names column_mapping.
    """
    if PROMPT in mapping:
        return PROMPT
    chosen = [name for name in LAYOUTS if name in mapping]
    if not chosen and any(row.get(PROMPT) is not None for row in rows):
        return PROMPT
    fitting = chosen or [name for name in LAYOUTS if any(row.get(name) is not None for row in rows)]
    if len(fitting) > 1:
        raise UserError(
            f"the prompt can be {' or '.join(fitting)}: choose with --column_mapping "
            + " or ".join(f"'{json.dumps({name: mapping.get(name, name)})}'" for name in fitting)
        )
    if fitting:
        return fitting[0]
    return PROMPT if any(PROMPT in row for row in rows) else None


def described(layout: str, columns: Collection[str]) -> str:
    """Return what a layout makes of columns, as one clause."""
    if layout == MESSAGES and MESSAGES_ANSWER in columns:
        return f"the prompt is {MESSAGES} without the last answer, and the reference answer is {MESSAGES_ANSWER}"
    reference = LAYOUTS[layout]
    beside = [name for name in CONTEXTS if name in columns]
    left_out = f"; it does not hold {' or '.join(beside)}" if beside else ""
    with_input = " with its input" if layout == INSTRUCTION and "input" in columns else ""
    answered = f", the reference answer is {reference}" if reference in columns else ""
    return f"the prompt is {layout}{with_input}{answered}{left_out}"


# --- making prompts ---------------------------------------------------------------------------------------------------


def with_prompts(rows: Sequence[Row], layout: str, split: str) -> list[Row]:
    """Return rows of a layout with their column ``prompt``; rows of the layout ``prompt`` stay as they are.

    A conversation's reference answer becomes the column ``answer``, unless the rows have such a column, or no
    conversation ends with an answer.

    Raises:
        UserError: a row does not fit the layout; the message names the row and the column.
    """
    if layout == PROMPT:
        return list(rows)
    if layout != MESSAGES:
        return [{**row, PROMPT: _prompt(row, layout, f"row {i} of the {split} split")} for i, row in enumerate(rows)]
    pairs = [_conversation(row[MESSAGES], f"row {i} of the {split} split") for i, row in enumerate(rows)]
    asked: list[Row] = [{**row, PROMPT: prompt} for row, (prompt, _) in zip(rows, pairs, strict=True)]
    if all(answer is None for _, answer in pairs) or any(row.get(MESSAGES_ANSWER) is not None for row in rows):
        return asked
    return [{**row, MESSAGES_ANSWER: answer} for row, (_, answer) in zip(asked, pairs, strict=True)]


def _prompt(row: Row, layout: str, where: str) -> Any:
    """Return the prompt of a row with a question, a problem or an instruction."""
    asked, more = row[layout], row.get("input") if layout == INSTRUCTION else None
    if asked is None:
        raise UserError(f"{where}: its {layout} is null")
    if not isinstance(asked, str) and (layout == INSTRUCTION or not isinstance(asked, list)):
        raise UserError(f"{where}: its {layout} is a {type(asked).__name__}, not text")
    if more is None or more == "":
        return asked
    if not isinstance(more, str):
        raise UserError(f"{where}: its input is a {type(more).__name__}, not text")
    return f"{asked}{BEFORE_INPUT}{more}"


def _conversation(messages: Any, where: str) -> tuple[list[Any], str | None]:
    """Return the prompt and the reference answer of a conversation; None if the conversation does not end with one."""
    if messages is None:
        raise UserError(f"{where}: its messages are null")
    if not isinstance(messages, list) or not all(isinstance(one, Mapping) and "role" in one for one in messages):
        raise UserError(f"{where}: its messages should be a list of objects with 'role' and 'content'")
    for message in messages:
        if message["role"] not in ROLES:
            raise UserError(f"{where}: a message has the role {message['role']!r}; roles are {', '.join(ROLES)}")
        if message.get("tool_calls") or message.get("function_call"):
            raise UserError(f"{where}: a message calls a tool: tools and images are not supported")
    ends = bool(messages) and messages[-1]["role"] == "assistant"
    asked = messages[:-1] if ends else messages
    if not any(message["role"] == "user" for message in asked):
        raise UserError(f"{where}: its messages have no user turn to answer")
    if asked[-1]["role"] == "assistant":
        raise UserError(f"{where}: its messages end with two answers in a row")
    return asked, text_of(messages[-1].get("content"), f"{where}: its last answer") if ends else None


# --- text parts -------------------------------------------------------------------------------------------------------


def text_of(content: Any, where: str) -> str:
    """Return the text of a message's content: a string, or a list of text parts, joined by a space.

    A part is an object such as ``{"type": "text", "text": "Hello"}``.

    Raises:
        UserError: the content is neither, or a part is no text; the message begins with ``where``.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content or not all(isinstance(part, Mapping) for part in content):
        raise UserError(f"{where} should have a 'content' that is text or a list of text parts")
    for part in content:
        if part.get("type") != "text":
            raise UserError(
                f"{where} has a part of type {part.get('type')!r}: only text parts are supported, no images, no audio"
            )
        if not isinstance(part.get("text"), str):
            raise UserError(f"{where} has a text part whose text is a {type(part.get('text')).__name__}")
    return BETWEEN_PARTS.join(part["text"] for part in content)
