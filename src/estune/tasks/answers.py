"""Shared by the tasks: the text of a completion, the answer in its tags or box, and the reference answer of a row.

Every function is linear in the length of a completion: it finds tags by `str.find`, never by a backtracking pattern,
and boxes in one pass with a stack of open braces.
"""

from __future__ import annotations

import re
from typing import Any

ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox) *\{|\\.|[{}]", re.DOTALL)
BARE_BOX = "\\boxed "  # without braces, as in parts of MATH: the box ends with the formula


def completion_text(completion: Any) -> str:
    """Return a completion's text, whether it is a string or a list of chat messages (the last one counts)."""
    if isinstance(completion, str):
        return completion
    return str(completion[-1].get("content") or "") if completion else ""


def in_tags(answer: Any) -> str:
    """Return an answer inside answer tags."""
    return f"{ANSWER_OPEN}{answer}{ANSWER_CLOSE}"


def extract_answer(text: str) -> str | None:
    """Return the content of the last closed <answer> block; None if there is none."""
    last_close = text.rfind(ANSWER_CLOSE)
    start = text.rfind(ANSWER_OPEN, 0, last_close) if last_close >= 0 else -1
    if start < 0:
        return None
    start += len(ANSWER_OPEN)
    return text[start : text.find(ANSWER_CLOSE, start)]


def last_boxed(text: str) -> str | None:
    """Return the content of the last closed ``\\boxed{...}`` (or ``\\fbox{...}``); None if there is none.

    Of nested boxes the inner one is the last. The braces ``\\{`` and ``\\}`` are text.
    """
    open_at: list[int] = []  # where the content of each open brace begins; minus that for a box
    begin = end = -1
    for token in BOX_OR_BRACE.finditer(text):
        found = token.group()
        if found == "}":
            start = open_at.pop() if open_at else 0
            if -start > begin:
                begin, end = -start, token.start()
        elif found.endswith("{") and found != "\\{":
            open_at.append(token.end() if found == "{" else -token.end())
    return text[begin:end] if begin >= 0 else None


def reference_of(row: dict[str, Any]) -> str | None:
    """Return the reference answer of a row as text; None if there is none.

    It is in ``answer`` or ``final_answer`` (text, a number, or a list of one), or at the end of ``solution``. If the
    text holds a box or ``####``, only the content of the last box, or the text after the last mark, is the answer.
    """
    for name in ("answer", "final_answer", "solution"):
        value = row.get(name)
        if isinstance(value, (list, tuple)) and len(value) == 1:
            value = value[0]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None or isinstance(value, (bool, list, tuple, dict)):
            continue
        found = _final(str(value), whole=name != "solution")
        if found:
            return found
    return None


def _final(text: str, whole: bool) -> str:
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    if BARE_BOX in text:
        return text.rpartition(BARE_BOX)[2].partition("$")[0].partition("\n")[0].strip()
    if "####" in text:
        return text.rpartition("####")[2].strip()
    return text.strip() if whole else ""
