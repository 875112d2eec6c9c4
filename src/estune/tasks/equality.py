"""Whether two mathematical answers are equal, by math-verify, after estune's own checks of the text.

math-verify parses LaTeX into sympy, and sympy evaluates it: a tower of powers can take for ever, in one call that no
signal interrupts. So `is_harmless` first checks the text alone: only short and shallow texts with small powers pass. A
text that passes has two seconds of CPU time (not wall time, so a busy machine changes no reward). The time limit needs
the main thread, where reward workers call it; in other threads there is none.

An answer must also be finished. If the reference is a plain number, or several, ``3+4`` does not count as 7, nor
``5!/24`` as 5: otherwise a model could copy the question's expression into the box.
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

from estune.errors import UserError, install_command

MAX_CHARACTERS = 300
MAX_DEPTH = 12
MAX_DIGITS = 40  # digits of one number
MAX_POWER_DIGITS = 50_000  # digits of the value of a power or factorial, approximately
MAX_FACTORIAL = 999
CPU_LIMIT_S = 2.0

OPEN, CLOSE = "([{", ")]}"
COMMAND = re.compile(r"\\([A-Za-z]+)")
# Commands that sympy would have to evaluate; a final answer holds none of them.
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
    """Raise UserError if math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(f"task math needs the package math-verify: {install_command(extra='tasks')}")


def same(reference: str, answer: str) -> bool:
    """Return whether an answer is the reference: equal text except for white space, or equal by math-verify."""
    reference, answer = tidy(reference), tidy(answer)
    if not reference or not answer:
        return False
    if _closed_up(reference) == _closed_up(answer):
        return True
    if not is_harmless(answer) or not is_finished(reference, answer):
        return False
    return _equal(reference, answer)


def alike(first: str, second: str) -> bool:
    """Return whether two answers of a model are the `same`, each taken as the reference of the other."""
    if first == second:
        return True
    return all(map(is_harmless, (first, second))) and same(first, second) and same(second, first)


def _closed_up(text: str) -> str:
    """Return a text without spaces, except between two digits or letters: ``1 1/2`` is not 11/2."""
    return re.sub(r"(?<!\w) | (?!\w)", "", text)


@lru_cache(maxsize=1 << 14)  # members of a population often give equal answers
def _equal(reference: str, answer: str) -> bool:
    import math_verify

    with _cpu_limit(CPU_LIMIT_S) as passed:
        wanted, given = _parsed(reference), _parsed(answer)
        if wanted and given:
            with _without_warnings():
                passed.append(math_verify.verify(list(wanted), list(given), timeout_seconds=None))
    return passed == [True]


def tidy(text: str) -> str:
    """Return an answer without dollar signs, thin spaces and a final full stop; ``10 000`` becomes 10000."""
    if len(text) > 4 * MAX_CHARACTERS:
        return text
    for mark in ("\\$", "$", "\\(", "\\)", "\\[", "\\]", "\\!"):
        text = text.replace(mark, "")
    for space in ("\\,", "\\;", "\\:", "\\ ", "~", "\N{NO-BREAK SPACE}"):
        text = text.replace(space, " ")
    text = " ".join(text.replace("{,}", ",").split()).removesuffix(".").rstrip()
    return GROUPED.sub(lambda number: number.group().replace(" ", ""), text)


def is_harmless(text: str) -> bool:
    """Return whether a text is safe for math-verify, by length, depth, commands, numbers, powers and factorials."""
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
    # In a power of a power the exponents multiply. A power of a plain number or letter is never a base itself.
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
    """Yield, for each ``^``, whether its base is a plain number or letter, and its longest possible exponent."""
    text = text.replace(" ", "")
    for mark in re.finditer(r"\^", text):
        yield bool(PLAIN_BASE.search(text[: mark.start()])), text[mark.end() : _end_of_exponent(text, mark.end())]


def _end_of_exponent(text: str, begin: int) -> int:
    """Return the end of an exponent: a group, or a run of digits, letters, commands and their groups.

    TeX reads one character, other parsers read the whole number; this is the longest reading.
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
    """Return an upper bound of an exponent: the product of its integers."""
    return prod(max(int(run), 1) for run in re.findall(r"\d+", exponent))


def is_finished(reference: str, answer: str) -> bool:
    """Return whether an answer is evaluated as far as its reference.

    If the reference has no sums, products, powers, factorials or functions, the answer must have none either. It may
    have a root only if the reference has a root or a fraction of other terms than integers.
    """
    wanted = _kinds(reference)
    return not wanted <= SIMPLE or _kinds(answer) <= (SIMPLE if wanted else frozenset())


def _kinds(text: str) -> set[str]:
    """Return the kinds of operations in a text, after the last equals sign of each of its parts."""
    text = DEGREES.sub("", WORDS.sub(",", text))
    text = ",".join(part.rpartition("=")[2] for part in text.split(","))
    text = NUMBER.sub("#", FRACTION.sub("#", re.sub(r"_\{?\d+\}?", "", text)))
    return {kind for kind, pattern in KINDS.items() if pattern.search(text)}


@lru_cache(maxsize=4096)
def _parsed(text: str) -> tuple[Any, ...]:
    """Return math-verify's parse of an answer: one sympy object, or none."""
    import math_verify

    config = math_verify.LatexExtractionConfig(boxed_match_priority=0)
    with _without_warnings():
        found = math_verify.parse(f"\\boxed{{{text}}}", [config], "no_fallback", "first_match", parsing_timeout=None)
    return tuple(found)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppress math-verify's warnings that it has no time limit."""
    logger = logging.getLogger("math_verify")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        yield
    finally:
        logger.setLevel(level)


class _OutOfTime(BaseException):
    """The CPU time is used up. Not an Exception, so that no `except Exception` of a library catches it."""


@contextmanager
def _cpu_limit(seconds: float) -> Iterator[list[bool]]:
    """Leave the block after ``seconds`` of CPU time. A timeout clears the yielded list, which holds the result."""
    results: list[bool] = []
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield results
        return

    def stop(_number: int, _frame: Any) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGVTALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds, seconds)
        yield results
    except _OutOfTime:
        results.clear()
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, before)
