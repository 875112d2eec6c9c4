"""Shared by the ARC tasks: grids of digits as text, and their partial credit.

The partial credit counts only right cells beyond those of two trivial answers, a copy of the input and a constant grid.
Both trivial answers score 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

PARTIAL = 0.2
LARGEST = 30  # rows and columns
DIGITS = "0123456789"

Grid = list[list[int]]


def is_grid(value: Any) -> bool:
    """Return whether a value is a rectangle of 1 to 30 rows and columns of integers 0 to 9, as plain lists."""
    if type(value) is not list or not 1 <= len(value) <= LARGEST or not all(type(row) is list for row in value):
        return False
    width = len(value[0])
    return 1 <= width <= LARGEST and all(
        len(row) == width and all(type(cell) is int and 0 <= cell <= 9 for cell in row) for row in value
    )


def format_grid(grid: Grid) -> str:
    """Return a grid as text: one row a line, digits separated by spaces."""
    return "\n".join(" ".join(map(str, row)) for row in grid)


def parse_grid(text: str) -> Grid | None:
    """Return a grid written one row a line, digits separated by one space or none; None for anything else."""
    if len(text) > 4 * LARGEST * LARGEST:
        return None
    grid = []
    for line in text.strip().split("\n"):
        line = line.strip()
        cells = line.split(" ") if " " in line else list(line)
        if not all(len(cell) == 1 and cell in DIGITS for cell in cells):
            return None
        grid.append([int(cell) for cell in cells])
    return grid if is_grid(grid) else None


def gain(grid: Grid, given: Grid, wanted: Grid) -> float:
    """Return the share of right cells beyond the better trivial answer: 0 to 1, and 1 only for ``wanted``.

    The trivial answers are the input ``given``, if it has the wanted shape, and a grid of the wanted grid's most common
    digit. Another shape than the wanted one scores 0.
    """
    if grid == wanted:
        return 1.0
    if [len(row) for row in grid] != [len(row) for row in wanted]:
        return 0.0
    cells = [cell for row in wanted for cell in row]
    free = Counter(cells).most_common(1)[0][1]
    if [len(row) for row in given] == [len(row) for row in wanted]:
        free = max(free, _agreeing(given, cells))
    return max(0, _agreeing(grid, cells) - free) / (len(cells) - free) if free < len(cells) else 0.0


def _agreeing(grid: Grid, cells: Sequence[int]) -> int:
    return sum(one == other for one, other in zip((cell for row in grid for cell in row), cells, strict=True))


def score(grid: Grid | None, given: Grid, wanted: Grid) -> float:
    """Return 1 for the wanted grid, 0.2 times the gain for another, 0 for none."""
    if grid is None:
        return 0.0
    return 1.0 if grid == wanted else PARTIAL * gain(grid, given, wanted)
