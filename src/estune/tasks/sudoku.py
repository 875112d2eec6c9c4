"""Sudoku: complete a grid so that every row, column and box holds every digit once.

``mini_sudoku`` has 4x4 grids with 6 to 10 empty cells, ``sudoku`` 9x9 grids with 20 to 50. Every puzzle has exactly one
solution. There are only 288 complete 4x4 grids, so the splits of ``mini_sudoku`` share no *solution*. The 9x9 puzzles
are in a file that `scripts/make_data.py` wrote, with no solution twice.

An answer is the whole grid inside <answer></answer>: one row a line, digits with or without spaces between them, and
nothing else. Reward: 1 for the solution. A grid of the right shape that keeps every given digit gets 0.2 times the
share of empty cells filled correctly. Everything else gets 0. Accuracy: 1 for the solution, else 0.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

from estune.errors import UserError
from estune.tasks.answers import completion_text, extract_answer

ANSWERS_HOLD_WORDS = False
MINI_SIZES = {"train": 800, "validation": 200, "test": 200}
MINI_GRIDS = {"train": 192, "validation": 48, "test": 48}  # of the 288 solutions
MINI_BLANKS = (6, 10)
SIZES = {"train": 200, "validation": 200, "test": 400}
SEED = 2509_24372
PARTIAL = 0.2
FILE = Path(__file__).parent / "data" / "sudoku.txt"
EMPTY = "_"

Grid = tuple[int, ...]  # row by row; 0 is empty


def side_of(grid: Sequence[int]) -> int:
    """Return 4 or 9."""
    return {16: 4, 81: 9}[len(grid)]


def units(side: int) -> list[tuple[int, ...]]:
    """Return the cells of every row, column and box."""
    box = {4: 2, 9: 3}[side]
    rows = [tuple(range(r * side, (r + 1) * side)) for r in range(side)]
    columns = [tuple(range(c, side * side, side)) for c in range(side)]
    boxes = [
        tuple((r + i) * side + c + j for i in range(box) for j in range(box))
        for r in range(0, side, box)
        for c in range(0, side, box)
    ]
    return [*rows, *columns, *boxes]


def is_solved(grid: Sequence[int]) -> bool:
    """Return whether every row, column and box holds every digit once."""
    side = side_of(grid)
    return all({grid[cell] for cell in unit} == set(range(1, side + 1)) for unit in units(side))


@cache
def mini_solutions() -> tuple[Grid, ...]:
    """Return all 288 complete 4x4 grids, in order."""
    rows = list(permutations(range(1, 5)))
    grids: list[Grid] = [()]
    for _ in range(4):
        grids = [grid + row for grid in grids for row in rows if _may_follow(grid, row)]
    return tuple(grids)


def _may_follow(grid: Grid, row: Grid) -> bool:
    """Return whether a row of four can follow the rows of a grid: no digit twice in a column or box."""
    if any(row[c] in grid[c::4] for c in range(4)):
        return False
    above = grid[-4:] if len(grid) % 8 == 4 else ()
    return not above or not any(row[c] in above[c - c % 2 : c - c % 2 + 2] for c in range(4))


def format_prompt(puzzle: Sequence[int]) -> str:
    """Return a puzzle's prompt."""
    side = side_of(puzzle)
    box = {4: 2, 9: 3}[side]
    lines = [" ".join(str(d) if d else EMPTY for d in puzzle[r * side : (r + 1) * side]) for r in range(side)]
    grid = "\n".join(lines)
    return (
        f"Fill in the empty cells ({EMPTY}) of this {side}x{side} grid. Every row, every column and every {box}x{box} "
        f"box must hold each of the digits 1 to {side} exactly once.\n{grid}\n"
        f"Write the whole grid inside <answer></answer>, one row a line, with the digits separated by spaces.\n"
    )


@cache
def _mini_splits() -> dict[str, tuple[tuple[Grid, Grid], ...]]:
    """Generate (puzzle, solution) of all splits; no two splits share a solution."""
    generator = random.Random(SEED)
    solutions = [grid for _, grid in sorted((generator.random(), grid) for grid in mini_solutions())]
    found, begin = {}, 0
    for split, size in MINI_SIZES.items():
        of_split = solutions[begin : begin + MINI_GRIDS[split]]
        begin += MINI_GRIDS[split]
        puzzles: dict[Grid, Grid] = {}
        while len(puzzles) < size:
            solution = of_split[len(puzzles) % len(of_split)]
            puzzles[mini_puzzle(generator, solution)] = solution
        found[split] = tuple(puzzles.items())
    return found


def mini_puzzle(generator: random.Random, solution: Grid) -> Grid:
    """Empty 6 to 10 cells of a grid in random order, so that the solution stays unique."""
    low, high = MINI_BLANKS
    # For each other grid, the cells in which it differs: it fits the puzzle if all of them are empty.
    others = [{c for c in range(16) if grid[c] != solution[c]} for grid in mini_solutions() if grid != solution]
    while True:
        wanted = low + int(generator.random() * (high - low + 1))
        empty: set[int] = set()
        for cell in [cell for _, cell in sorted((generator.random(), cell) for cell in range(16))]:
            if not any(differing <= empty | {cell} for differing in others):
                empty.add(cell)
            if len(empty) == wanted:
                return tuple(0 if cell in empty else digit for cell, digit in enumerate(solution))


def _fits(puzzle: Sequence[int], grid: Sequence[int]) -> bool:
    return all(given in (0, digit) for given, digit in zip(puzzle, grid, strict=True))


@cache
def _splits() -> dict[str, tuple[tuple[Grid, Grid], ...]]:
    """Read the 9x9 puzzles."""
    pairs = []
    for line in FILE.read_text(encoding="ascii").splitlines():
        puzzle, solution = line.split()
        pairs.append((tuple(map(int, puzzle)), tuple(map(int, solution))))
    found, begin = {}, 0
    for split, size in SIZES.items():
        found[split] = tuple(pairs[begin : begin + size])
        begin += size
    return found


def _rows(splits: dict[str, tuple[tuple[Grid, Grid], ...]], split: str) -> list[dict[str, Any]]:
    if split not in splits:
        raise UserError(f"sudoku has no split {split!r}; it has {', '.join(splits)}")
    return [
        {"prompt": format_prompt(puzzle), "puzzle": list(puzzle), "solution": list(solution)}
        for puzzle, solution in splits[split]
    ]


def load_mini(split: str) -> list[dict[str, Any]]:
    """Return 4x4 rows of "train" (800), "validation" (200) or "test" (200): prompt, puzzle (16), solution (16)."""
    return _rows(_mini_splits(), split)


def load(split: str) -> list[dict[str, Any]]:
    """Return 9x9 rows of "train" (200), "validation" (200) or "test" (400): prompt, puzzle (81), solution (81)."""
    return _rows(_splits(), split)


def prepare_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a user's row with its prompt; it needs ``puzzle`` and ``solution`` as digits, 0 for empty."""
    grids = []
    for name in ("puzzle", "solution"):
        value = row.get(name)
        digits = [int(d) if str(d).isascii() and str(d).isdigit() else 0 for d in value] if value is not None else []
        if len(digits) not in (16, 81) or max(digits) > side_of(digits):
            raise UserError(f"a sudoku row needs the column {name}: 16 or 81 digits, 0 for an empty cell")
        grids.append(digits)
    puzzle, solution = grids
    if len(puzzle) != len(solution) or not is_solved(solution) or not _fits(puzzle, solution):
        raise UserError("a sudoku row's solution does not solve its puzzle")
    return {"prompt": format_prompt(puzzle), **row, "puzzle": puzzle, "solution": solution}


def parse_grid(text: str, side: int) -> list[int] | None:
    """Return the digits of a grid written one row a line; None for anything else, also for empty cells."""
    lines = [line.strip() for line in text.strip().split("\n")]
    if len(lines) != side:
        return None
    digits = []
    for line in lines:
        row = line.split(" ") if " " in line else list(line)
        if len(row) != side or not all(len(d) == 1 and d in "123456789"[:side] for d in row):
            return None
        digits += [int(d) for d in row]
    return digits


def final_answer(row: dict[str, Any], completion: str) -> str | None:
    """Return the digits of the grid in a completion's answer; None if the answer is no full grid."""
    answer = extract_answer(completion)
    grid = None if answer is None else parse_grid(answer, side_of(row["puzzle"]))
    return None if grid is None else "".join(map(str, grid))


def grid_score(text: str, puzzle: Sequence[int], solution: Sequence[int]) -> float:
    """Return 1 for the solution, 0.2 times the share of empty cells filled correctly, or 0."""
    answer = extract_answer(text)
    grid = parse_grid(answer, side_of(puzzle)) if answer is not None else None
    if grid is None or not _fits(puzzle, grid):
        return 0.0
    if grid == list(solution):
        return 1.0
    empty = [cell for cell, digit in enumerate(puzzle) if not digit]
    return PARTIAL * sum(grid[cell] == solution[cell] for cell in empty) / len(empty)


def reward(completions: list[Any], puzzle: list[Any], solution: list[Any], **_: Any) -> list[float]:
    """Return 1, or the partial credit, per completion."""
    texts = map(completion_text, completions)
    return [grid_score(text, given, wanted) for text, given, wanted in zip(texts, puzzle, solution, strict=True)]


def accuracy(completions: list[Any], puzzle: list[Any], solution: list[Any], **_: Any) -> list[float]:
    """Return 1 per completion that is the solution, else 0."""
    return [float(score == 1.0) for score in reward(completions, puzzle, solution)]
