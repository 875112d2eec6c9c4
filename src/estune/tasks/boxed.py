"""The last \\boxed{...} of a text, and the reference answer that a row of somebody's own data holds.

One pass over the text, with a stack of open braces: linear in its length, however it is nested.
"""

from __future__ import annotations

import re
from typing import Any

BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox) *\{|\\.|[{}]", re.DOTALL)
BARE_BOX = "\\boxed "  # without braces, as some of the MATH data has it: up to the end of the formula


def last_boxed(text: str) -> str | None:
    """Return what stands in the last closed ``\\boxed{...}`` (or ``\\fbox{...}``); None where there is none.

    Of boxes in each other the inner one is the last. Braces written ``\\{`` and ``\\}`` are text.
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
    """Return the reference answer of a row, as text; None where it has none.

    It stands in ``answer`` or ``final_answer`` (text, a number, or a list of one), or ends the text of ``solution``.
    Of a text with a box or with ``####`` in it, only what is boxed, or follows the last of those marks, is the answer.
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
