"""Chains: arithmetic on one digit in k dependent steps; only the last digit counts.

This is a small model of long-delayed, outcome-only rewards, with k = 1, 2, 4, 8 or 16. Every operation permutes the ten
digits (add, subtract, multiply by a number prime to 10). So one wrong step, followed by right ones, always ends in a
wrong digit. ``chain`` mixes all lengths, ``chain:4`` has only length 4, and ``chain:4:steps`` rewards its single steps.

Outcome reward: 1 for the right last digit inside <answer></answer>, else 0, without partial credit. Reward of the
steps: the share of right results, with the answer as the last one. The accuracy is always the outcome.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from estune.errors import UserError
from estune.tasks.answers import completion_text, extract_answer, in_tags

LENGTHS = (1, 2, 4, 8, 16)
SPLIT_SIZES = {"train": 200, "validation": 200, "test": 1000}
SEED = 2509_24372
LARGEST_OPERAND = 99
STEP = re.compile(r"^[ \t]*step (\d{1,2}): ?(\d)[ \t\r]*$", re.IGNORECASE | re.ASCII | re.MULTILINE)

# Operation -> its operands; each permutes the digits, and none is the identity.
OPERANDS: dict[str, tuple[int, ...]] = {
    "add": tuple(n for n in range(1, LARGEST_OPERAND + 1) if n % 10),
    "subtract": tuple(n for n in range(1, LARGEST_OPERAND + 1) if n % 10),
    "multiply by": tuple(n for n in range(1, LARGEST_OPERAND + 1) if n % 10 in (3, 7, 9)),
}
OPERATIONS = tuple((name, n) for name, numbers in OPERANDS.items() for n in numbers)

Problem = tuple[int, tuple[tuple[str, int], ...]]


def apply(digit: int, operation: str, operand: int) -> int:
    """Return the result of an operation modulo 10."""
    if operation == "add":
        return (digit + operand) % 10
    if operation == "subtract":
        return (digit - operand) % 10
    return digit * operand % 10


def results_of(problem: Problem) -> list[int]:
    """Return the digit after each step, (k,)."""
    digit, steps = problem
    found = []
    for operation, operand in steps:
        digit = apply(digit, operation, operand)
        found.append(digit)
    return found


def format_prompt(problem: Problem) -> str:
    """Return a problem's prompt."""
    start, steps = problem
    listed = "\n".join(f"Step {i}: {operation} {operand}" for i, (operation, operand) in enumerate(steps, 1))
    return (
        f"Begin with the digit {start}. Carry out the steps in order, each on the result of the one before, and always "
        "keep the last digit only (counting modulo 10).\n"
        f"{listed}\n"
        'Write one line "Step 1: digit" for each step, then the last digit inside <answer></answer>.\n'
    )


@cache
def _problems(length: int) -> dict[str, tuple[Problem, ...]]:
    """Generate all splits of one length at once, so that no problem is in two of them."""
    generator = random.Random(SEED * 100 + length)
    seen: set[Problem] = set()
    problems: list[Problem] = []
    while len(problems) < sum(SPLIT_SIZES.values()):
        start = int(generator.random() * 10)
        problem = (start, tuple(OPERATIONS[int(generator.random() * len(OPERATIONS))] for _ in range(length)))
        if problem not in seen:
            seen.add(problem)
            problems.append(problem)
    found, begin = {}, 0
    for split, size in SPLIT_SIZES.items():
        found[split] = tuple(problems[begin : begin + size])
        begin += size
    return found


def load(split: str, lengths: Sequence[int] = LENGTHS) -> list[dict[str, Any]]:
    """Return the rows of a split, with alternating lengths: prompt, results (k digits), steps (k)."""
    if split not in SPLIT_SIZES:
        raise UserError(f"chain has no split {split!r}; it has {', '.join(SPLIT_SIZES)}")
    each = SPLIT_SIZES[split] // len(lengths)
    problems = [_problems(length)[split][i] for i in range(each) for length in lengths]
    return [
        {"prompt": format_prompt(problem), "results": results_of(problem), "steps": len(problem[1])}
        for problem in problems
    ]


def prepare_row(row: dict[str, Any]) -> dict[str, Any]:
    """Check a row from elsewhere: it needs ``prompt`` and ``results``, the digits after each step."""
    results = row.get("results")
    if not isinstance(results, (list, tuple)) or not results or not all(r in range(10) for r in results):
        raise UserError("task chain needs the column results: the digit after each step")
    return {**row, "results": [int(r) for r in results], "steps": len(results)}


def right_answer(row: dict[str, Any]) -> str:
    """Return a right completion of a row."""
    return in_tags(row["results"][-1])


def answered(text: str) -> int | None:
    """Return the digit in a completion's answer; None if the answer is not one digit."""
    answer = (extract_answer(text) or "").strip()
    return int(answer) if len(answer) == 1 and answer.isascii() and answer.isdigit() else None


def final_answer(_row: dict[str, Any], completion: str) -> str | None:
    """Return the digit in a completion's answer; None if the answer is not one digit."""
    digit = answered(completion)
    return None if digit is None else str(digit)


def accuracy(completions: list[Any], results: list[list[int]], **_: Any) -> list[float]:
    """Return 1 per completion whose last digit is right, else 0."""
    texts = map(completion_text, completions)
    return [float(answered(text) == wanted[-1]) for text, wanted in zip(texts, results, strict=True)]


def reward(completions: list[Any], results: list[list[int]], **_: Any) -> list[float]:
    """Return the outcome per completion: 1 or 0."""
    return accuracy(completions, results)


def reward_steps(completions: list[Any], results: list[list[int]], **_: Any) -> list[float]:
    """Return the share of right steps per completion: lines "Step i: digit" (the last of each i), and the answer."""
    shares = []
    for completion, wanted in zip(completions, results, strict=True):
        text = completion_text(completion)
        results_given = {int(i): int(digit) for i, digit in STEP.findall(text)}
        results_given[len(wanted)] = -1 if (last := answered(text)) is None else last
        shares.append(sum(results_given.get(i) == digit for i, digit in enumerate(wanted, 1)) / len(wanted))
    return shares


def variant(name: str) -> tuple[tuple[int, ...], Callable[..., list[float]]]:
    """Return the lengths and the reward of ``chain``, ``chain:4`` or ``chain:4:steps``.

    Raises:
        UserError: there is no such length or mode.
    """
    length, _, mode = name.removeprefix("chain").removeprefix(":").partition(":")
    lengths = {"": LENGTHS, "all": LENGTHS, **{str(k): (k,) for k in LENGTHS}}.get(length)
    modes = {"": reward, "outcome": reward, "steps": reward_steps}
    if lengths is None or mode not in modes:
        raise UserError(
            f"task {name!r} is not a chain: write chain, chain:K or chain:K:steps with K one of "
            f"{', '.join(map(str, LENGTHS))} or all"
        )
    return lengths, modes[mode]
