"""Shared by the tasks: the text of a completion, and the answer in it.

Every function is linear in the length of a completion: it finds tags by `str.find`, never by a backtracking pattern.
"""

from __future__ import annotations

from typing import Any

ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"


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
