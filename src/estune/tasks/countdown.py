"""Countdown: reach a target from given numbers, each used exactly once, with + - * / and parentheses.

This file holds a seeded generator of solvable problems, the check of an answer in exact rational arithmetic, and the
paper's reward (answer + 0.1 * format, arXiv 2509.24372). Every function is linear in the length of a completion: it
finds tags by `str.find`, never by a backtracking pattern.
"""

import random
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from math import isfinite
from typing import Any

from estune.errors import UserError
from estune.tasks.answers import ANSWER_CLOSE, ANSWER_OPEN, completion_text, extract_answer
from estune.tasks.expressions import evaluate, tokenize

# The problems suit both a real model and a very small one. As in the game, numbers have one or two digits, the target
# has two, and a solution in integer steps exists. 15 numbers and about 200 intermediate values make an arithmetic table
# that a million parameters can hold. There are about 5900 such problems of three numbers and 110 000 of four.
SMALLEST_NUMBER, LARGEST_NUMBER = 1, 15
SMALLEST_TARGET, LARGEST_TARGET = 10, 99
ANSWERS_HOLD_WORDS = False
LARGEST_INTERMEDIATE = 199
SPLIT_SIZES = {"train": 200, "validation": 200, "test": 2000}
GENERATOR_SEED = 2509_24372

TOLERANCE = Fraction(1, 100_000)  # the paper's, for targets written as decimals
MAX_TARGET_CHARACTERS = 64

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


# --- problems ---


def problem_key(numbers: Sequence[int], target: int) -> tuple[tuple[int, ...], int]:
    """Return the key of a problem: the sorted numbers, and the target."""
    return tuple(sorted(numbers)), target


def format_prompt(numbers: Sequence[int], target: object) -> str:
    """Return a problem's prompt."""
    listed = ", ".join(str(number) for number in numbers)
    return (
        f"Use each of the numbers {listed} exactly once, with + - * / and parentheses, to make {target}. "
        "Work it out inside <think></think>, then write only the final expression inside <answer></answer>.\n"
    )


def draw_chain(generator: random.Random, count: int) -> tuple[int, list[tuple[str, int]], int]:
    """Draw a start number, `count` - 1 steps (operation, number) with integer results, and the target.

    The operations are `+ - r * /`; `r` is the number minus the value. Only `Random.random()` is used, because Python
    promises to keep its stream for a seed between versions.
    """
    while True:
        numbers = [_integer(generator, SMALLEST_NUMBER, LARGEST_NUMBER) for _ in range(count)]
        value, steps = numbers[0], []
        for number in numbers[1:]:
            operation = "+-r*/"[_integer(generator, 0, 4)]
            value = _combine(value, number, operation)
            if not 1 <= value <= LARGEST_INTERMEDIATE:
                break
            steps.append((operation, number))
        else:
            if SMALLEST_TARGET <= value <= LARGEST_TARGET:
                return numbers[0], steps, value


def draw_problem(generator: random.Random, count: int) -> tuple[list[int], int]:
    """Draw `count` numbers, in random order, and a target that they reach with integer steps."""
    start, steps, target = draw_chain(generator, count)
    return _shuffled(generator, [start, *(number for _, number in steps)]), target


def _combine(left: int, right: int, operation: str) -> int:
    """Apply `+ - r * /` (`r` is right - left) to integers; return 0 if a quotient is not an integer."""
    if operation == "+":
        return left + right
    if operation == "-":
        return left - right
    if operation == "r":
        return right - left
    if operation == "*":
        return left * right
    return left // right if left % right == 0 else 0


def _integer(generator: random.Random, low: int, high: int) -> int:
    return low + int(generator.random() * (high - low + 1))


def _shuffled(generator: random.Random, items: list[int]) -> list[int]:
    return [item for _, item in sorted((generator.random(), item) for item in items)]


@cache
def _splits() -> dict[str, tuple[tuple[tuple[int, ...], int], ...]]:
    """Generate all splits at once, disjoint up to the order of the numbers. Rows alternate 3 and 4 numbers."""
    generator = random.Random(GENERATOR_SEED)
    seen: set[tuple[tuple[int, ...], int]] = set()
    splits: dict[str, tuple[tuple[tuple[int, ...], int], ...]] = {}
    for split, size in SPLIT_SIZES.items():
        problems: list[tuple[tuple[int, ...], int]] = []
        while len(problems) < size:
            numbers, target = draw_problem(generator, 3 + len(problems) % 2)
            key = problem_key(numbers, target)
            if key not in seen:
                seen.add(key)
                problems.append((tuple(numbers), target))
        splits[split] = tuple(problems)
    return splits


def load(split: str) -> list[dict[str, Any]]:
    """Return the rows of "train" (200), "validation" (200) or "test" (2000): prompt, numbers, target."""
    if split not in SPLIT_SIZES:
        raise UserError(f"countdown has no split {split!r}; it has {', '.join(SPLIT_SIZES)}.")
    return [
        {"prompt": format_prompt(numbers, target), "numbers": list(numbers), "target": target}
        for numbers, target in _splits()[split]
    ]


def prepare_row(row: dict[str, Any]) -> dict[str, Any]:
    """Turn a user's row (`numbers` or `nums`, `target`, perhaps `prompt`) into a row of this task.

    Other columns are kept, and a target given as text keeps its spelling.

    Raises:
        UserError: a column is missing, or a value is not a number.
    """
    source = "numbers" if row.get("numbers") is not None else "nums"
    missing = [
        name for name, value in (("numbers (or nums)", row.get(source)), ("target", row.get("target"))) if value is None
    ]
    if missing:
        present = ", ".join(name for name, value in row.items() if value is not None) or "none"
        raise UserError(
            f"A countdown row lacks the column{'s' * (len(missing) > 1)} {' and '.join(missing)}; "
            f"it has the columns: {present}."
        )
    numbers = normalise_numbers(row[source])
    target = _unboxed(row["target"])
    parse_target(target)
    prepared = {name: value for name, value in row.items() if name != "nums"}
    prepared["numbers"] = numbers
    prepared["target"] = target
    if prepared.get("prompt") is None:
        prepared["prompt"] = format_prompt(numbers, target)
    return prepared


def normalise_numbers(numbers: Any) -> list[int]:
    """Read a list, tuple or array of integers >= 0, each an int, an integral float or decimal text."""
    numbers = _unboxed(numbers)
    if not isinstance(numbers, list | tuple) or not numbers:
        raise UserError(f"The numbers of a countdown row must be a non-empty list, not {_short(numbers)}.")
    normalised = []
    for item in numbers:
        item = _unboxed(item)
        value = None
        if isinstance(item, str):
            text = item.strip()
            if text.isascii() and text.isdigit() and len(text) <= MAX_TARGET_CHARACTERS:
                value = int(text)
        elif isinstance(item, float):
            value = int(item) if isfinite(item) and item == int(item) else None
        elif isinstance(item, int) and not isinstance(item, bool):
            value = item
        if value is None or value < 0:
            raise UserError(
                f"Each number of a countdown row must be an integer of at least 0, but one is {_short(item)}."
            )
        normalised.append(value)
    return normalised


def parse_target(target: Any) -> tuple[Fraction, bool]:
    """Read a target (int, float, "24", "27.4" or "548/20") as (value, whether an answer must equal it exactly).

    Integers and fractions must be met exactly; decimals and floats, which may be rounded, within the paper's 1e-5.

    Raises:
        UserError: the target is anything else.
    """
    target = _unboxed(target)
    if isinstance(target, int) and not isinstance(target, bool):
        return Fraction(target), True
    if isinstance(target, float) and isfinite(target):
        return Fraction(target), target == int(target)
    if isinstance(target, str) and len(target) <= MAX_TARGET_CHARACTERS:
        text = target.strip()
        digits = text.removeprefix("-")
        whole, mark, rest = digits.partition("/" if "/" in digits else ".")
        parts = (whole, rest) if mark else (whole,)
        if all(part.isascii() and part.isdigit() for part in parts) and not (mark == "/" and int(rest) == 0):
            return Fraction(text), mark != "."
    raise UserError(f"The target of a countdown row must be a finite number, not {_short(target)}.")


def _unboxed(value: Any) -> Any:
    """Return numpy scalars and arrays as Python values (without importing numpy), other values unchanged."""
    return value.tolist() if hasattr(value, "tolist") else value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- scoring ---


def answer_score(text: str, numbers: Any, target: Any) -> float:
    """Return 1.0 if the last answer uses exactly the given numbers, each once, and makes the target, else 0.0."""
    given = normalise_numbers(numbers)
    wanted, exact = parse_target(target)
    answer = extract_answer(text)
    tokens = tokenize(answer) if answer is not None else None
    if tokens is None or sorted(token for token in tokens if isinstance(token, int)) != sorted(given):
        return 0.0
    value = evaluate(tokens)
    if value is None:
        return 0.0
    return float(value == wanted if exact else abs(value - wanted) < TOLERANCE)


def final_answer(_row: dict[str, Any], completion: str) -> str | None:
    """Return the expression in a completion's answer, without spaces; None if it is no expression.

    Expressions with the same value are different answers: ``3+8`` and ``8+3`` are two.
    """
    answer = extract_answer(completion)
    tokens = tokenize(answer) if answer is not None else None
    return None if tokens is None or evaluate(tokens) is None else "".join(map(str, tokens))


def format_score(text: str) -> float:
    """Return the paper's format part: 1 for a think block, a newline, an answer block and nothing else.

    Otherwise 0.1 for a think block anywhere plus 0.5 for an answer block anywhere. A block ends at the first closing
    tag after its opening tag, so text around or between the blocks loses the 1.
    """
    think_open = text.find(THINK_OPEN)
    think_close = text.find(THINK_CLOSE, think_open) if think_open >= 0 else -1
    answer_open = text.find(ANSWER_OPEN)
    answer_close = text.find(ANSWER_CLOSE, answer_open) if answer_open >= 0 else -1
    if think_open == 0 and think_close >= 0:
        rest = think_close + len(THINK_CLOSE)
        if text.startswith("\n" + ANSWER_OPEN, rest):
            end = text.find(ANSWER_CLOSE, rest)
            if end >= 0 and end + len(ANSWER_CLOSE) == len(text):
                return 1.0
    return 0.1 * (think_close >= 0) + 0.5 * (answer_close >= 0)


def reward(completions: list[Any], numbers: list[Any], target: list[Any], **_: Any) -> list[float]:
    """Return the paper's reward per completion: answer + 0.1 * format, between 0 and 1.1."""
    texts = map(completion_text, completions)
    return [
        answer_score(text, given, wanted) + 0.1 * format_score(text)
        for text, given, wanted in zip(texts, numbers, target, strict=True)
    ]


def accuracy(completions: list[Any], numbers: list[Any], target: list[Any], **_: Any) -> list[float]:
    """Return the answer part of the reward per completion: 1.0 if solved, else 0.0."""
    texts = map(completion_text, completions)
    return [answer_score(text, given, wanted) for text, given, wanted in zip(texts, numbers, target, strict=True)]
