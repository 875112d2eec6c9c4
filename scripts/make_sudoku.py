"""Makes `src/estune/tasks/data/sudoku.txt`: 9x9 puzzles with exactly one solution, no solution twice.

    python scripts/make_sudoku.py > src/estune/tasks/data/sudoku.txt      # half a minute

A line is a puzzle, a space, and its solution, each with 81 digits, 0 for an empty cell. A solution is a fixed valid
grid whose digits, rows, columns and bands are shuffled. Its cells are then emptied in random order, as long as the
puzzle has no second solution. 20 to 50 cells are empty.
"""

from __future__ import annotations

import random

from estune.tasks.sudoku import SEED, SIZES, Grid, units

BLANKS = (20, 50)  # empty cells of a puzzle, fewest and most
PEERS = [frozenset(c for unit in units(9) if cell in unit for c in unit) - {cell} for cell in range(81)]


def shuffled(generator: random.Random, items: list[int]) -> list[int]:
    """Return items in random order. Only `Random.random` is used: Python keeps its stream the same in all versions."""
    return [item for _, item in sorted((generator.random(), item) for item in items)]


def solution(generator: random.Random) -> Grid:
    """Return a solved grid."""

    def lines() -> list[int]:
        return [3 * band + line for band in shuffled(generator, [0, 1, 2]) for line in shuffled(generator, [0, 1, 2])]

    digits, rows, columns = shuffled(generator, list(range(1, 10))), lines(), lines()
    return tuple(digits[(3 * (r % 3) + r // 3 + c) % 9] for r in rows for c in columns)


def solvable(grid: list[int]) -> bool:
    """Return whether the empty cells of a grid can be filled; the grid is changed and restored."""
    fewest, candidates = None, set(range(1, 10))
    for cell in range(81):
        if not grid[cell]:
            free = set(range(1, 10)) - {grid[peer] for peer in PEERS[cell]}
            if fewest is None or len(free) < len(candidates):
                fewest, candidates = cell, free
                if len(free) < 2:
                    break
    if fewest is None:
        return True
    for digit in candidates:
        grid[fewest] = digit
        if solvable(grid):
            grid[fewest] = 0
            return True
    grid[fewest] = 0
    return False


def puzzle(generator: random.Random, solved: Grid) -> Grid:
    """Return a puzzle with one solution: a cell is emptied only if no other digit in it leads to a solution."""
    wanted = BLANKS[0] + int(generator.random() * (BLANKS[1] - BLANKS[0] + 1))
    grid = list(solved)
    for cell in shuffled(generator, list(range(81))):
        if grid.count(0) == wanted:
            break
        taken = {grid[peer] for peer in PEERS[cell]}
        for digit in set(range(1, 10)) - taken - {solved[cell]}:
            grid[cell] = digit
            if solvable(grid):
                grid[cell] = solved[cell]
                break
        else:
            grid[cell] = 0
    return tuple(grid)


def main() -> None:
    """Print the puzzles."""
    generator = random.Random(SEED)
    seen: set[Grid] = set()
    while len(seen) < sum(SIZES.values()):
        solved = solution(generator)
        if solved not in seen:
            seen.add(solved)
            print("".join(map(str, puzzle(generator, solved))), "".join(map(str, solved)))


if __name__ == "__main__":
    main()
