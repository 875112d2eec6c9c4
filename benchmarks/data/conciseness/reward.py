"""Conciseness: answer a short question in as many characters as its shortest correct answer has.

The reward is minus the distance in characters between the completion's length and that answer's, of the completion
alone (arXiv 2509.24372, section on conciseness). Whether the answer is right is not looked at.
"""

from __future__ import annotations

from typing import Any


def text_of(completion: Any) -> str:
    """Return a completion's text, whether it is a string or a list with one assistant message."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def conciseness(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Return -|characters of the completion - characters of the shortest correct answer| per completion."""
    return [-float(abs(len(text_of(c)) - len(a))) for c, a in zip(completions, answer, strict=True)]
