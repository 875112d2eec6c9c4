"""Both sudokus: puzzles with one solution, splits that share none, exact scoring of hostile grids."""

from __future__ import annotations

import hashlib
import random

import pytest
from script_loading import loaded

from estune.errors import UserError
from estune.tasks import get_task, sudoku

MINI = {split: sudoku.load_mini(split) for split in sudoku.MINI_SIZES}
FULL = {split: sudoku.load(split) for split in sudoku.SIZES}


def written(grid: list[int], between: str = " ") -> str:
    side = sudoku.side_of(grid)
    lines = [between.join(map(str, grid[r * side : (r + 1) * side])) for r in range(side)]
    return "<answer>\n" + "\n".join(lines) + "\n</answer>"


def score(text: str, row: dict) -> float:
    return sudoku.reward([text], puzzle=[row["puzzle"]], solution=[row["solution"]])[0]


def solutions(puzzle: list[int], most: int = 2) -> int:
    """Count solutions by plain search, at most ``most``: another program than the one that made the puzzles."""
    side = sudoku.side_of(puzzle)
    box = int(side**0.5)
    grid = list(puzzle)

    def options(cell: int) -> list[int]:
        r, c = divmod(cell, side)
        used = {grid[r * side + i] for i in range(side)} | {grid[i * side + c] for i in range(side)}
        used |= {grid[(r - r % box + i) * side + c - c % box + j] for i in range(box) for j in range(box)}
        return [digit for digit in range(1, side + 1) if digit not in used]

    def count(left: int) -> int:
        empty = [cell for cell in range(side * side) if not grid[cell]]
        if not empty:
            return 1
        cell = min(empty, key=lambda one: len(options(one)))
        found = 0
        for digit in options(cell):
            grid[cell] = digit
            found += count(left - found)
            grid[cell] = 0
            if found >= left:
                break
        return found

    return count(most)


def test_all_small_grids() -> None:
    grids = sudoku.mini_solutions()
    assert len(set(grids)) == len(grids) == 288
    assert all(sudoku.is_solved(grid) for grid in grids)


@pytest.mark.parametrize(
    ("rows", "sizes", "blanks"), [(MINI, sudoku.MINI_SIZES, (6, 10)), (FULL, sudoku.SIZES, (20, 50))]
)
def test_puzzles(rows: dict, sizes: dict[str, int], blanks: tuple[int, int]) -> None:
    assert {split: len(own) for split, own in rows.items()} == sizes
    of = {split: {tuple(row["solution"]) for row in own} for split, own in rows.items()}
    assert not of["train"] & of["validation"] and not of["train"] & of["test"] and not of["validation"] & of["test"]
    puzzles = [tuple(row["puzzle"]) for own in rows.values() for row in own]
    assert len(set(puzzles)) == len(puzzles)
    for own in rows.values():
        for row in own:
            assert sudoku.is_solved(row["solution"])
            assert all(given in (0, digit) for given, digit in zip(row["puzzle"], row["solution"], strict=True))
            assert blanks[0] <= row["puzzle"].count(0) <= blanks[1]
    for row in rows["test"][:40]:
        assert solutions(row["puzzle"]) == 1


def test_puzzles_never_change() -> None:
    digests = [hashlib.sha256(repr(rows).encode()).hexdigest()[:16] for rows in (MINI, FULL)]
    assert digests == ["48f1071b4a5a8e02", "b6b96d2e54a118a5"]


def test_the_script_makes_the_file() -> None:
    generator = random.Random(sudoku.SEED)
    with loaded("scripts/make_data.py") as script:
        for row in FULL["train"][:10]:
            solved = script.solution(generator)
            assert (list(script.puzzle(generator, solved)), list(solved)) == (row["puzzle"], row["solution"])


@pytest.mark.parametrize("row", [MINI["test"][0], FULL["test"][0]], ids=["mini", "full"])
def test_scores(row: dict) -> None:
    solution, puzzle = row["solution"], row["puzzle"]
    assert score(written(solution), row) == score(written(solution, ""), row) == 1.0
    empty = [cell for cell, digit in enumerate(puzzle) if not digit]
    wrong = list(solution)
    wrong[empty[0]] = wrong[empty[0]] % sudoku.side_of(puzzle) + 1
    assert score(written(wrong), row) == pytest.approx(0.2 * (len(empty) - 1) / len(empty))
    assert sudoku.accuracy([written(wrong)], puzzle=[puzzle], solution=[solution]) == [0.0]
    given = next(cell for cell, digit in enumerate(puzzle) if digit)
    cheated = list(solution)
    cheated[given] = cheated[given] % sudoku.side_of(puzzle) + 1
    assert score(written(cheated), row) == 0.0


@pytest.mark.parametrize("row", [MINI["test"][1], FULL["test"][1]], ids=["mini", "full"])
def test_what_scores_nothing(row: dict) -> None:
    good, side = written(row["solution"]), sudoku.side_of(row["puzzle"])
    inside = good.removeprefix("<answer>\n").removesuffix("\n</answer>")
    other = [digit % side + 1 for digit in row["solution"]]  # solved, but another puzzle's
    for text in (
        "", inside, good.replace("</answer>", ""), f"<answer>{inside}\n{inside}</answer>",
        f"<answer>[{inside}]</answer>", good.replace(" ", ", "), good.replace(" ", "  "), good.replace("\n", " "),
        written(row["puzzle"]), written(other),
        f"<answer>The grid is:\n{inside}</answer>", good + written(other), good.replace("1", "\N{FULLWIDTH DIGIT ONE}"),
        good.replace("1", "\N{SUPERSCRIPT ONE}"), "<answer>" + "1" * 10**6 + "</answer>",
        "<answer>" + "\n" * 10**6 + "</answer>",
        good.replace("2", "_"),
    ):  # fmt: skip
        assert score(text, row) == 0.0, text[:80]


def test_a_perfect_a_random_and_an_empty_answerer() -> None:
    generator = random.Random(1)
    for rows in (MINI["test"], FULL["test"][:50]):
        columns = {name: [row[name] for row in rows] for name in ("puzzle", "solution")}
        assert sudoku.reward([written(row["solution"]) for row in rows], **columns) == [1.0] * len(rows)
        assert sudoku.reward([""] * len(rows), **columns) == [0.0] * len(rows)
        side = sudoku.side_of(rows[0]["puzzle"])
        filled = [written([digit or generator.randint(1, side) for digit in row["puzzle"]]) for row in rows]
        assert sum(sudoku.accuracy(filled, **columns)) <= 2
        assert 0.2 / side * 0.7 < sum(sudoku.reward(filled, **columns)) / len(rows) < 0.2 / side * 1.6


def test_rows_from_elsewhere() -> None:
    row = MINI["train"][0]
    text = {name: "".join(map(str, row[name])) for name in ("puzzle", "solution")}
    assert get_task("mini_sudoku").prepare_row(text) == row
    assert (
        get_task("sudoku").prepare_row({"puzzle": text["puzzle"].replace("0", "."), "solution": text["solution"]})
        == row
    )
    for wrong in ({}, {"puzzle": "12"}, {**text, "solution": text["solution"][::-1]}, {**text, "puzzle": "9" * 16}):
        with pytest.raises(UserError, match="sudoku row"):
            get_task("sudoku").prepare_row(wrong)
