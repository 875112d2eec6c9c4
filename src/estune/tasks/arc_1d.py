"""ARC in one dimension: find the rule that turns one row of digits into another, from three examples.

The puzzles come from reasoning-gym's generator ``arc_1d``: 70 kinds of rules in turn, 10 to 30 digits a row. No pair of
rows, example or test, is in two puzzles. The test's output always differs from its input.

An answer is the row's digits inside <answer></answer>, with or without spaces, and nothing else. Reward: 1 for the
right row. Another row of the right length gets 0.2 times `grids.gain`, which is 0 for a copy of the input. Everything
else gets 0. Accuracy: 1 for the right row, else 0.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from estune.errors import UserError
from estune.tasks import grids, reasoning
from estune.tasks.answers import completion_text, extract_answer

ANSWERS_HOLD_WORDS = False
EACH = {"train": 12, "validation": 3, "test": 15}  # puzzles of each kind
KINDS = 70
SEED = 2509_24372
MOST = 20_000  # puzzles drawn, at most

Row = list[int]
Pair = dict[str, Row]  # input, output


def format_prompt(examples: list[Pair], puzzle: Row) -> str:
    """Return a puzzle's prompt."""
    shown = "".join(f"Input: {_written(pair['input'])}\nOutput: {_written(pair['output'])}\n\n" for pair in examples)
    return (
        f"One rule turns each of these input rows into its output row. Find the rule.\n\n{shown}"
        f"Apply the rule to this row:\nInput: {_written(puzzle)}\n"
        "Write the output row inside <answer></answer>, its digits separated by spaces.\n"
    )


def _written(row: Row) -> str:
    return " ".join(map(str, row))


@cache
def made_splits() -> dict[str, list[dict[str, Any]]]:
    """Draw puzzles until every kind has enough; the rows of a split alternate the kinds."""
    wanted = sum(EACH.values())
    found: dict[str, list[dict[str, Any]]] = {}
    seen: set[str] = set()
    full = 0
    for entry in reasoning.package("task arc_1d").create_dataset("arc_1d", seed=SEED, size=MOST):
        facts = entry["metadata"]
        kind, asked, examples = facts["task_name"], facts["test_example"], facts["train_examples"]
        own = found.setdefault(kind, [])
        pairs = {repr(pair) for pair in (*examples, asked)}
        twice = seen & pairs or len(pairs) <= len(examples)
        if len(own) == wanted or twice or asked["input"] == asked["output"]:
            continue
        seen |= pairs
        own.append(_row(kind, examples, asked))
        full += len(own) == wanted
        if full == KINDS:
            break
    if full != KINDS:
        raise UserError(f"this version of reasoning-gym makes {full} of arc_1d's {KINDS} kinds: install 0.1.25")
    splits, begin = {}, 0
    for split, each in EACH.items():
        splits[split] = [found[kind][i] for i in range(begin, begin + each) for kind in sorted(found)]
        begin += each
    return splits


def _row(kind: str, examples: list[Pair], asked: Pair) -> dict[str, Any]:
    return {
        "prompt": format_prompt(examples, asked["input"]),
        "puzzle": asked["input"],
        "solution": asked["output"],
        "kind": kind,
    }


def load(split: str) -> list[dict[str, Any]]:
    """Return rows of "train" (840), "validation" (210) or "test" (1050): prompt, puzzle, solution (digits), kind."""
    if split not in EACH:
        raise UserError(f"arc_1d has no split {split!r}; it has {', '.join(EACH)}")
    return [dict(row) for row in made_splits()[split]]


def prepare_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a user's row; it needs ``puzzle`` and ``solution`` as digits, and ``examples`` or a ``prompt``."""
    rows = {}
    for name in ("puzzle", "solution"):
        value = row.get(name)
        digits = (
            [int(d) if str(d) in list(grids.DIGITS) else -1 for d in value] if isinstance(value, (str, list)) else []
        )
        if not grids.is_grid([digits]):
            raise UserError(f"task arc_1d needs the column {name}: 1 to {grids.LARGEST} digits")
        rows[name] = digits
    if "prompt" in row:
        return {**row, **rows}
    return {"prompt": format_prompt(_examples(row.get("examples")), rows["puzzle"]), **row, **rows}


def _examples(value: Any) -> list[Pair]:
    wrong = not isinstance(value, list) or not all(
        isinstance(pair, dict) and all(isinstance(pair.get(side), list) for side in ("input", "output"))
        for pair in value
    )
    if wrong or not value:
        raise UserError("task arc_1d needs the column prompt, or examples: a list of {input, output}")
    return list(value)


def answered(text: str) -> grids.Grid | None:
    """Return the row in a completion's answer as a grid of one row; None for anything else."""
    answer = (extract_answer(text) or "").strip()
    return None if "\n" in answer else grids.parse_grid(answer)


def final_answer(_row: dict[str, Any], completion: str) -> str | None:
    """Return the digits of the row in a completion's answer; None if there is no row."""
    grid = answered(completion)
    return None if grid is None else grids.format_grid(grid)


def row_score(text: str, puzzle: Row, solution: Row) -> float:
    """Return 1 for the solution, the partial credit, or 0."""
    return grids.score(answered(text), [puzzle], [solution])


def reward(completions: list[Any], puzzle: list[Any], solution: list[Any], **_: Any) -> list[float]:
    """Return 1, or the partial credit, per completion."""
    texts = map(completion_text, completions)
    return [row_score(text, given, wanted) for text, given, wanted in zip(texts, puzzle, solution, strict=True)]


def accuracy(completions: list[Any], puzzle: list[Any], solution: list[Any], **_: Any) -> list[float]:
    """Return 1 per completion that is the right row, else 0."""
    return [float(score == 1.0) for score in reward(completions, puzzle, solution)]
