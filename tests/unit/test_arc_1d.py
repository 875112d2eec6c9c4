"""ARC in one dimension: splits without common puzzles, exact scoring, no reward for copies or hostile answers."""

from __future__ import annotations

import hashlib
import importlib.util
import random
from collections import Counter

import pytest

from estune.errors import UserError
from estune.tasks import arc_1d, get_task

pytest.importorskip("reasoning_gym", reason="an optional neighbour")

ROWS = {split: arc_1d.load(split) for split in arc_1d.EACH}
ROW = next(row for row in ROWS["test"] if row["kind"] == "fill_from_pixel")


def written(row: list[int], between: str = " ") -> str:
    return f"<answer>{between.join(map(str, row))}</answer>"


def score(text: str, row: dict) -> float:
    return arc_1d.reward([text], puzzle=[row["puzzle"]], solution=[row["solution"]])[0]


def pairs_of(prompt: str) -> list[tuple[str, str]]:
    """Read the examples back from a prompt."""
    lines = [line for line in prompt.split("\n") if line.startswith(("Input: ", "Output: "))]
    return [(lines[i].split(": ")[1], lines[i + 1].split(": ")[1]) for i in range(0, len(lines) - 1, 2)]


def test_splits_share_nothing() -> None:
    assert {split: len(rows) for split, rows in ROWS.items()} == {"train": 840, "validation": 210, "test": 1050}
    seen: list[tuple[str, str]] = []
    for rows in ROWS.values():
        for row in rows:
            examples = pairs_of(row["prompt"])
            assert len(examples) == 3
            seen += [*examples, tuple(" ".join(map(str, row[side])) for side in ("puzzle", "solution"))]
            assert len(row["puzzle"]) == len(row["solution"]) and row["puzzle"] != row["solution"]
    assert len(set(seen)) == len(seen) == 4 * 2100


def test_every_kind_is_there_as_often() -> None:
    for split, rows in ROWS.items():
        counts = Counter(row["kind"] for row in rows)
        assert len(counts) == arc_1d.KINDS and set(counts.values()) == {arc_1d.EACH[split]}
        assert len({row["kind"] for row in rows[: arc_1d.KINDS]}) == arc_1d.KINDS


def test_puzzles_never_change() -> None:
    digest = hashlib.sha256(repr(list(ROWS.values())).encode()).hexdigest()[:16]
    assert digest == "826cdd1eb968bcec", "made by reasoning-gym 0.1.25"


def test_scores() -> None:
    puzzle, solution = ROW["puzzle"], ROW["solution"]
    assert score(written(solution), ROW) == score(written(solution, ""), ROW) == 1.0
    assert score(f"The rule is plain.\n<answer>\n{' '.join(map(str, solution))}\n</answer>", ROW) == 1.0
    assert score(written(puzzle), ROW) == 0.0
    changed = [i for i, cell in enumerate(puzzle) if cell != solution[i]]
    free = max(len(puzzle) - len(changed), max(Counter(solution).values()))
    wrong = list(solution)
    wrong[changed[0]] = (solution[changed[0]] + 1) % 10
    right = len(puzzle) - 1
    assert score(written(wrong), ROW) == pytest.approx(0.2 * max(0, right - free) / (len(puzzle) - free))
    columns = {"puzzle": [puzzle], "solution": [solution]}
    assert arc_1d.accuracy([written(wrong)], **columns) == [0.0]
    assert arc_1d.accuracy([written(solution)], **columns) == [1.0]


@pytest.mark.parametrize("row", ROWS["validation"][: arc_1d.KINDS], ids=lambda row: row["kind"])
def test_what_scores_nothing(row: dict) -> None:
    solution = row["solution"]
    good = written(solution)
    inside = " ".join(map(str, solution))
    for text in (
        "", inside, good.replace("</answer>", ""), written(row["puzzle"]), written(solution[:-1]),
        written([*solution, 0]), *(written([digit] * len(solution)) for digit in range(10)),
        f"<answer>[{inside}]</answer>", f"<answer>{inside}\n{inside}</answer>", good.replace(" ", ", "),
        good.replace(" ", "  "), good.replace(" ", "\n"), f"<answer>The row is {inside}</answer>",
        good + written(row["puzzle"]), "<answer>" + "1" * 10**6 + "</answer>", "<answer>" + "\n" * 10**6 + "</answer>",
        good.replace(str(solution[0]), "\N{FULLWIDTH DIGIT ZERO}"),
        good.replace(str(solution[0]), "\N{SUPERSCRIPT ONE}"),
        good.replace("<answer>", "<answer>-"),
    ):  # fmt: skip
        assert score(text, row) == 0.0, text[:80]


def test_a_perfect_a_random_and_an_empty_answerer() -> None:
    rows = ROWS["test"]
    columns = {name: [row[name] for row in rows] for name in ("puzzle", "solution")}
    assert arc_1d.reward([written(row["solution"]) for row in rows], **columns) == [1.0] * len(rows)
    assert arc_1d.reward([""] * len(rows), **columns) == [0.0] * len(rows)
    assert arc_1d.reward([written(row["puzzle"]) for row in rows], **columns) == [0.0] * len(rows)
    generator = random.Random(1)
    guesses = [written([generator.choice(row["puzzle"]) for _ in row["puzzle"]]) for row in rows]
    assert sum(arc_1d.reward(guesses, **columns)) / len(rows) < 0.01
    assert sum(arc_1d.accuracy(guesses, **columns)) <= 2


def test_rows_from_elsewhere() -> None:
    task = get_task("arc_1d")
    examples = [{"input": [1, 0], "output": [0, 1]}]
    row = task.prepare_row({"puzzle": "20", "solution": [0, 2], "examples": examples})
    assert (row["puzzle"], row["solution"]) == ([2, 0], [0, 2])
    assert "Input: 1 0\nOutput: 0 1\n" in row["prompt"] and "Input: 2 0\n" in row["prompt"]
    assert task.prepare_row({"puzzle": "20", "solution": "02", "prompt": "mine"})["prompt"] == "mine"
    for wrong in (
        {}, {"puzzle": "20", "solution": "02"}, {"puzzle": "2x", "solution": "02", "prompt": ""},
        {"puzzle": "1" * 31, "solution": "1", "prompt": ""}, {"puzzle": 20, "solution": "02", "prompt": ""},
        {"puzzle": "20", "solution": [12], "prompt": ""}, {"puzzle": "20", "solution": "02", "examples": [1]},
    ):  # fmt: skip
        with pytest.raises(UserError, match="arc_1d needs the column"):
            task.prepare_row(wrong)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    arc_1d.made_splits.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="arc_1d needs the package reasoning-gym: python -m pip install"):
        arc_1d.load("train")
