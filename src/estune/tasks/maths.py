"""Mathematics with the answer in a box: the task's own small set, or any dataset of problems and answers.

``--task math --dataset_name X`` reads MATH, AIME, OlympiadBench, GSM8K and similar datasets. A row's problem is its
``problem`` or ``question``; a ``prompt`` of its own is kept. Its reference answer is `reference_of` the row.
Without a dataset the problems are of seven kinds in turn: a sum of fractions, a linear equation, a polynomial's value,
the roots of a quadratic, a distance, a changed price, an interval.

The answer is the content of the last closed \\boxed{}. Reward and accuracy are both 1 if the answer equals the
reference by `equality.same`, else 0. There is no partial credit.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any

from estune.errors import UserError
from estune.tasks import equality
from estune.tasks.answers import completion_text, last_boxed, reference_of

SPLIT_SIZES = {"train": 200, "validation": 200, "test": 1000}
SPLITS = tuple(SPLIT_SIZES)
PROBLEM_COLUMNS = ("problem", "question")
SEED = 2509_24372

Draw = Callable[[int, int], int]  # a whole number from low to high


def format_prompt(problem: str) -> str:
    """Return a problem's prompt."""
    return f"{problem}\nReason step by step. At the end, put the final answer, worked out, inside \\boxed{{}}.\n"


def latex(number: Fraction | int) -> str:
    """Return a number as LaTeX: a whole number, or a fraction in lowest terms."""
    number = Fraction(number)
    if number.denominator == 1:
        return str(number.numerator)
    sign = "-" if number < 0 else ""
    return f"{sign}\\frac{{{abs(number.numerator)}}}{{{number.denominator}}}"


def terms(*coefficients: int) -> str:
    """Return a polynomial in x as text, highest power first, without coefficients 0 and 1."""
    written = ""
    for power, factor in zip(range(len(coefficients) - 1, -1, -1), coefficients, strict=True):
        if factor:
            letter = {0: "", 1: "x"}.get(power, f"x^{power}")
            size = "" if abs(factor) == 1 and letter else str(abs(factor))
            sign = " - " if factor < 0 else " + "
            written += f"{sign}{size}{letter}" if written else f"{'-' if factor < 0 else ''}{size}{letter}"
    return written


def _fractions(draw: Draw) -> tuple[str, str]:
    first, second = Fraction(draw(1, 11), draw(2, 12)), Fraction(draw(1, 11), draw(2, 12))
    minus = draw(0, 1)
    value = first - second if minus else first + second
    question = f"Calculate ${latex(first)} {'-+'[1 - minus]} {latex(second)}$. Give one fraction in lowest terms."
    return question, latex(value)


def _equation(draw: Draw) -> tuple[str, str]:
    a, b, c, d = draw(2, 12), draw(-20, 20), draw(-9, 9), draw(-20, 20)
    c -= a == c
    return f"Find the number $x$ for which ${terms(a, b)} = {terms(c, d) or 0}$.", latex(Fraction(d - b, a - c))


def _value(draw: Draw) -> tuple[str, str]:
    a, b, c, x = draw(1, 9), draw(-9, 9), draw(-20, 20), draw(-9, 9)
    return f"Given $f(x) = {terms(a, b, c)}$, what is $f({x})$?", str(a * x * x + b * x + c)


def _roots(draw: Draw) -> tuple[str, str]:
    low = draw(-12, 11)
    high = draw(low + 1, 12)
    question = f"Which numbers $x$ satisfy ${terms(1, -low - high, low * high)} = 0$? List them as a set in braces."
    return question, f"\\{{{low}, {high}\\}}"


def _distance(draw: Draw) -> tuple[str, str]:
    while True:
        a, b, c, d = (draw(-9, 9) for _ in range(4))
        square = (a - c) ** 2 + (b - d) ** 2
        outside = max(k for k in range(1, 19) if square % (k * k) == 0) if square else 0
        inside = square // outside**2 if square else 1
        if inside > 1:
            break
    question = f"How far is the point $({a}, {b})$ from the point $({c}, {d})$? Give the exact length."
    return question, f"{outside if outside > 1 else ''}\\sqrt{{{inside}}}"


def _price(draw: Draw) -> tuple[str, str]:
    price, percent, up = 5 * draw(4, 100), draw(1, 60), draw(0, 1)
    cents = price * (100 + percent if up else 100 - percent)
    question = (f"A coat costs {price} dollars. Its price {'rises' if up else 'falls'} by {percent} percent. "
                "How many dollars does it cost now?")  # fmt: skip
    return question, f"{cents // 100}.{cents % 100:02}".rstrip("0").rstrip(".")


def _interval(draw: Draw) -> tuple[str, str]:
    low = draw(-12, 10)
    high = draw(low + 1, 12)
    a, b, closed_low = draw(2, 9), draw(-20, 20), draw(0, 1)
    signs = ("\\le", "<") if closed_low else ("<", "\\le")
    bounds = f"{a * low + b} {signs[0]} {terms(a, b)} {signs[1]} {a * high + b}"
    question = f"Write all real numbers $x$ with ${bounds}$ as one interval."
    return question, f"[{low}, {high})" if closed_low else f"({low}, {high}]"


KINDS = (_fractions, _equation, _value, _roots, _distance, _price, _interval)


@cache
def _splits() -> dict[str, tuple[tuple[str, str], ...]]:
    """Generate (problem, answer) of all splits at once, so that no problem is in two of them."""
    generator = random.Random(SEED)

    def draw(low: int, high: int) -> int:
        return low + int(generator.random() * (high - low + 1))

    problems: dict[str, str] = {}
    while len(problems) < sum(SPLIT_SIZES.values()):
        problem, answer = KINDS[len(problems) % len(KINDS)](draw)
        problems.setdefault(problem, answer)
    pairs = list(problems.items())
    found, begin = {}, 0
    for split, size in SPLIT_SIZES.items():
        found[split] = tuple(pairs[begin : begin + size])
        begin += size
    return found


def load(split: str) -> list[dict[str, Any]]:
    """Return the rows of "train" (200), "validation" (200) or "test" (1000): prompt, answer (LaTeX)."""
    if split not in SPLIT_SIZES:
        raise UserError(f"math has no split {split!r}; it has {', '.join(SPLIT_SIZES)}")
    equality.require()
    return [{"prompt": format_prompt(problem), "answer": answer} for problem, answer in _splits()[split]]


def prepare_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a user's row with its prompt and ``answer``, the reference as text."""
    equality.require()
    answer = reference_of(row)
    if answer is None:
        raise UserError(
            "a row for task math needs a reference answer: the column answer (or final_answer), or the column solution "
            f"with the answer in \\boxed{{}}; it has the columns {', '.join(row) or 'none'}"
        )
    problem = next((row[name] for name in PROBLEM_COLUMNS if row.get(name) is not None), None)
    prepared = {**row, "answer": answer}
    if row.get("prompt") is None and problem is not None:
        prepared["prompt"] = format_prompt(str(problem))
    return prepared


def right_answer(row: dict[str, Any]) -> str:
    """Return a right completion of a row."""
    return f"\\boxed{{{row['answer']}}}"


def final_answer(_row: dict[str, Any], completion: str) -> str | None:
    """Return the content of a completion's last box; None if there is no box, or an empty one."""
    box = last_boxed(completion)
    return None if box is None else equality.tidy(box) or None


def equal_answers(_row: dict[str, Any], first: str, second: str) -> bool:
    """Return whether two answers of a model are equal, each as finished as the other."""
    return equality.alike(first, second)


def reward(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Return 1 per completion whose last box holds the reference answer, else 0."""
    boxes = [last_boxed(completion_text(completion)) for completion in completions]
    return [
        float(box is not None and equality.same(str(wanted), box)) for box, wanted in zip(boxes, answer, strict=True)
    ]


def accuracy(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Return the reward, which is 1 or 0."""
    return reward(completions, answer)
