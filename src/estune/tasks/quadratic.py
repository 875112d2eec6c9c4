"""The toy engine's task: move every coordinate of a vector to a wanted value. No language, no model.

The reward of an answer is minus its squared distance to the row's wanted value. So the fitness of a member is minus
the mean squared distance over the step's coordinates, a quadratic whose ES gradient is known in closed form. Held-out
rows ask for sums of coordinates; training rows ask for single ones.
"""

from __future__ import annotations

import math
from typing import Any

from estune.errors import UserError

COORDINATES = 46  # number of perturbed coordinates of `estune.engines.toy`
TOLERANCE = 0.05


def wanted(index: int) -> float:
    """Return the wanted value of a coordinate, in [-0.5, 0.5]."""
    return (index * 7 % 11) / 10 - 0.5


def load(split: str) -> list[dict[str, Any]]:
    """Return the rows of a split: single coordinates to train on, sums of two to validate and of three to test."""
    terms = {"train": 1, "validation": 2, "test": 3}[split]
    return [_row([(first + 5 * term) % COORDINATES for term in range(terms)]) for first in range(COORDINATES)]


def _row(indices: list[int]) -> dict[str, Any]:
    return {
        "prompt": "+".join(f"x[{index}]" for index in indices),
        "wanted": math.fsum(wanted(index) for index in indices),
    }


def prepare_row(row: dict[str, Any]) -> dict[str, Any]:
    """Check a user's row; it needs ``prompt`` and ``wanted``."""
    if "prompt" not in row or "wanted" not in row:
        raise UserError("task quadratic needs the columns prompt and wanted")
    return row


def reward(completions: list[str], wanted: list[float], **_: Any) -> list[float]:
    """Return minus the squared distance of each answer to the wanted value."""
    return [-((float(text) - value) ** 2) for text, value in zip(completions, wanted, strict=True)]


def accuracy(completions: list[str], wanted: list[float], **_: Any) -> list[float]:
    """Return 1 per answer within 0.05 of the wanted value, else 0."""
    return [float(abs(float(text) - value) <= TOLERANCE) for text, value in zip(completions, wanted, strict=True)]
