"""Whether two mathematical answers are the same one: math-verify's judgement, behind a gate of our own.

math-verify reads LaTeX into sympy, and sympy evaluates what it is given: a tower of powers takes all the time there is,
in one call that no signal interrupts. So the gate comes first. It looks at the text alone, and lets through what is
short, shallow, and small in its powers; what passes has two seconds of processor time (not of the clock: a busy machine
changes no reward). The limit needs the main thread, as reward workers have it; elsewhere the gate stands alone.

The gate also wants an answer to be finished. Where the reference is a plain number, or several, ``3+4`` is no way to
write 7, nor is ``5!/24`` one to write 5: what a question asks to be worked out could be copied into the box.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from typing import Any

from estune.errors import UserError

MAX_CHARACTERS = 300
MAX_DEPTH = 12
MAX_DIGITS = 40  # of one number
MAX_POWER_DIGITS = 50_000  # of a number that powers or factorials stand for, roughly
MAX_FACTORIAL = 999
CPU_LIMIT_S = 2.0

OPEN, CLOSE = "([{", ")]}"
COMMAND = re.compile(r"\\([A-Za-z]+)")
# What sympy would have to work out; a final answer is worked out.
UNFINISHED = frozenset(
    "sum prod int iint iiint oint lim limsup liminf det binom dbinom tbinom choose diff partial".split()
)
WORDS = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{[^{}]*\}(?:\^(?:\d|\{\d\}))?")
DEGREES = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})")
GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d])", re.ASCII)
SMALL_POWER = re.compile(r"[a-df-zA-Z]\^(?:\d|\{\d\})", re.ASCII)
FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\d|\{\s*-?\s*\d+\s*\})\s*(?:\d|\{\s*\d+\s*\})|\d+\s*/\s*\d+", re.ASCII)
NUMBER = re.compile(  # with a fraction, or a percent sign, after it
    r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+|#)(?:\s*#)?(?:\s*\\?%)?", re.ASCII
)
TOWER = re.compile(r"\*\*|\^\s*(?:\d+|[A-Za-z]|\{[^{}]*\})\s*\^")
PLAIN_BASE = re.compile(r"(?:\d|(?<![A-Za-z\\])[A-Za-z])$", re.ASCII)
KINDS = {
    "sum": re.compile(r"\+|\\pm|\\mp|(?<=[\w#)\]}])\s*-"),
    "product": re.compile(r"[*×·÷]|\\cdot|\\times|\\div|\\ast|[#)]\s*[#(]"),
    "power": re.compile(r"\^"),
    "factorial": re.compile(r"!"),
    "function": re.compile(
        r"\\(?:log|ln|lg|exp|(?:arc)?(?:sin|cos|tan|cot|sec|csc)|[lr]?floor|[lr]?ceil|max|min|gcd|lcm|[bp]?mod)"
        r"(?![A-Za-z])|\|"
    ),
    "root": re.compile(r"\\sqrt|√"),
    "fraction": re.compile(r"\\[dtc]?frac|/"),
}
SIMPLE = frozenset({"root", "fraction"})


def require() -> None:
    """Raise UserError where math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("task math needs the package math-verify: python -m pip install 'estune[tasks]'")


def same(reference: str, answer: str) -> bool:
    """Say whether an answer is the reference: written alike but for white space, or equal by math-verify."""
    reference, answer = tidy(reference), tidy(answer)
    if not reference or not answer:
        return False
    if _closed_up(reference) == _closed_up(answer):
        return True
    if not is_harmless(answer) or not is_finished(reference, answer):
        return False
    return _equal(reference, answer)


def _closed_up(text: str) -> str:
    """Return a text without the spaces that part no two digits or letters: ``1 1/2`` is not 11/2."""
    return re.sub(r"(?<!\w) | (?!\w)", "", text)


@lru_cache(maxsize=1 << 14)  # a population says the same again and again
def _equal(reference: str, answer: str) -> bool:
    import math_verify

    with _cpu_limit(CPU_LIMIT_S) as passed:
        wanted, given = _parsed(reference), _parsed(answer)
        if wanted and given:
            passed.append(math_verify.verify(list(wanted), list(given), timeout_seconds=None))
    return passed == [True]


def tidy(text: str) -> str:
    """Return an answer without dollar signs, thin spaces, a full stop at its end; ``10 000`` becomes 10000."""
    if len(text) > 4 * MAX_CHARACTERS:
        return text
    for mark in ("\\$", "$", "\\(", "\\)", "\\[", "\\]", "\\!"):
        text = text.replace(mark, "")
    for space in ("\\,", "\\;", "\\:", "\\ ", "~", "\N{NO-BREAK SPACE}"):
        text = text.replace(space, " ")
    text = " ".join(text.replace("{,}", ",").split()).removesuffix(".").rstrip()
    return GROUPED.sub(lambda number: number.group().replace(" ", ""), text)


def is_harmless(text: str) -> bool:
    """Say whether math-verify may see a text: by its length, depth, commands, numbers, powers and factorials."""
    if len(text) > MAX_CHARACTERS or _depth(text) > MAX_DEPTH:
        return False
    if UNFINISHED.intersection(COMMAND.findall(text)) or TOWER.search(text) or re.search(r"\d\s+\d", text):
        return False
    sizes = [len(run) for run in re.findall(r"\d+", text)]
    if max(sizes, default=0) > MAX_DIGITS:
        return False
    for factorial in re.finditer(r"(.?)!", text):
        before = re.search(r"\d+$", text[: factorial.end() - 1])
        if before is None or int(before.group()) > MAX_FACTORIAL:
            return False
        sizes.append(3 * int(before.group()))
    exponents = list(_exponents(SMALL_POWER.sub("x", DEGREES.sub("", text))))
    if any("^" in exponent or "!" in exponent for _, exponent in exponents):
        return False
    # A power of a power multiplies their exponents; one of a number or a letter is the base of none.
    plain = [_factor(exponent) for is_plain, exponent in exponents if is_plain]
    grouped = [_factor(exponent) for is_plain, exponent in exponents if not is_plain]
    return max(sizes, default=1) * max(plain, default=1) * prod(grouped) <= MAX_POWER_DIGITS


def _depth(text: str) -> int:
    deepest = depth = 0
    for character in text:
        depth += (character in OPEN) - (character in CLOSE)
        deepest = max(deepest, depth)
    return deepest


def _exponents(text: str) -> Iterator[tuple[bool, str]]:
    """Yield, for each ``^``, whether its base is a plain number or letter, and all that its exponent may be."""
    text = text.replace(" ", "")
    for mark in re.finditer(r"\^", text):
        yield bool(PLAIN_BASE.search(text[: mark.start()])), text[mark.end() : _end_of_exponent(text, mark.end())]


def _end_of_exponent(text: str, begin: int) -> int:
    """Return where an exponent ends: behind a group, or behind a run of digits, letters, commands and their groups.

    TeX takes one character, other readers take the whole number: this takes the most that anyone could.
    """
    while text[begin : begin + 1] in ("+", "-"):
        begin += 1
    is_group = text[begin : begin + 1] in ("(", "[", "{")
    depth = 0
    for at, character in enumerate(text[begin:], begin):
        if depth == 0 and not (character.isalnum() or character in "\\.|'([{"):
            return at
        depth += (character in OPEN) - (character in CLOSE)
        if depth == 0 and is_group:
            return at + 1
    return len(text)


def _factor(exponent: str) -> int:
    """Return a bound of an exponent: the product of its whole numbers."""
    return prod(max(int(run), 1) for run in re.findall(r"\d+", exponent))


def is_finished(reference: str, answer: str) -> bool:
    """Say whether an answer is worked out as far as its reference is.

    Only a reference without sums, products, powers, factorials, functions asks for it: then the answer has none either,
    and a root only where the reference has a root or a fraction that is no plain one.
    """
    wanted = _kinds(reference)
    return not wanted <= SIMPLE or _kinds(answer) <= (SIMPLE if wanted else frozenset())


def _kinds(text: str) -> set[str]:
    """Return what there is to work out in a text: after the last equals sign of each of its parts."""
    text = DEGREES.sub("", WORDS.sub(",", text))
    text = ",".join(part.rpartition("=")[2] for part in text.split(","))
    text = NUMBER.sub("#", FRACTION.sub("#", re.sub(r"_\{?\d+\}?", "", text)))
    return {kind for kind, pattern in KINDS.items() if pattern.search(text)}


@lru_cache(maxsize=4096)
def _parsed(text: str) -> tuple[Any, ...]:
    """Return what math-verify reads in an answer: one sympy object, or none."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that the time limit is ours
    config = math_verify.LatexExtractionConfig(boxed_match_priority=0)
    found = math_verify.parse(f"\\boxed{{{text}}}", [config], "no_fallback", "first_match", parsing_timeout=None)
    return tuple(found)


class _OutOfTime(BaseException):
    """No `except Exception` of a library holds it up."""


@contextmanager
def _cpu_limit(seconds: float) -> Iterator[list[bool]]:
    """Leave the block after that much processor time; yields a list for what the block finds in time."""
    found: list[bool] = []
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield found
        return

    def stop(_number: int, _frame: Any) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGVTALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds, seconds)
        yield found
    except _OutOfTime:
        found.clear()
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, before)
