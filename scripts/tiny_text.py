"""Generates the pretraining text of `tiny`: Countdown problems outside every split, answered in two manners.

The first manner answers at once, often with an expression that misses the target. The second thinks: it works backwards
from the target, in trials of two-operand steps. An example of each:

    <answer>14+12+6</answer>
    <think>28-6=22; 28+12=40; 28/14=2, 12/6=2</think>
    <answer>12/6*14</answer>

A trial removes one number after another from the target until two numbers are left. If these two make the remaining
value, the steps in reverse order are the solution. A step is arithmetic on two numbers, and this search needs far fewer
trials than a forward search, so a model of this size learns it. "; " follows a failed trial, ", " continues a trial.
"""

import math
import random
from typing import Any

from estune.tasks import countdown

SHARE_RIGHT_DIRECT = 0.5  # share of right answers among those given at once
MAX_FAILED_TRIALS = {3: 5, 4: 5}  # count of a problem's numbers -> failed trials, at most
SPREAD_OF_PREFERENCE = 0.8  # log odds; see share_thinking
FAILED_CHOICE_WEIGHT = 0.2  # weight in the loss of the steps chosen in a failed trial
LARGEST_VALUE = 199  # that occurs in the text

# operation of a step -> the operation that undoes it. A step is value = rest `op` number; `r` and `R` swap the
# operands: number - rest and number / rest.
UNDONE_BY = {"+": "-", "-": "+", "r": "-", "*": "/", "/": "*", "R": "/"}
Peel = tuple[str, int, int]  # operation, number, and the value that remains to be made
Pieces = list[tuple[str, float]]  # text, and the weight of its tokens in the loss


def undo(value: int, number: int, operation: str) -> int:
    """Return the rest that `operation` with `number` turns into ``value``; 0 if it is not a positive integer."""
    if operation == "+":
        return max(0, value - number)
    if operation == "-":
        return value + number
    if operation == "r":
        return max(0, number - value)
    if operation == "*":
        return value // number if value % number == 0 else 0
    if operation == "/":
        return value * number
    return number // value if number % value == 0 else 0


def attach(text: str, level: int, operation: str, number: int) -> tuple[str, int]:
    """Return an expression combined with a number, and its level (1 sum, 2 product); ``level`` is that of ``text``."""
    new_level = 1 if operation in "+-r" else 2
    needed = new_level + (operation in "rR")  # the right operand of - or / must have a higher level
    inner = f"({text})" if level < needed else text
    mark = {"r": "-", "R": "/"}.get(operation, operation)
    return (f"{number}{mark}{inner}" if operation in "rR" else f"{inner}{mark}{number}"), new_level


def pair_operation(big: int, small: int, value: int) -> str | None:
    """Return the operation that makes ``value`` of two numbers, big >= small; None if there is none."""
    if big + small == value:
        return "+"
    if big - small == value:
        return "-"
    if big * small == value:
        return "*"
    return "/" if small * value == big else None


def draw_peels(generator: random.Random, numbers: list[int], target: int) -> tuple[list[Peel], int, int]:
    """Draw steps back from the target, all equally likely; return them and the last two numbers, the larger first."""
    while True:
        rest, value, peels = list(numbers), target, []
        while len(rest) > 2:
            options = []
            for number in rest:
                for operation in UNDONE_BY:
                    remaining = undo(value, number, operation)
                    if 1 <= remaining <= LARGEST_VALUE:
                        options.append((operation, number, remaining))
            if not options:
                break
            peel = options[int(generator.random() * len(options))]
            peels.append(peel)
            rest.remove(peel[1])
            value = peel[2]
        else:
            return peels, max(rest), min(rest)


def trial_pieces(target: int, peels: list[Peel], first: bool, solved: bool) -> Pieces:
    """Return the text of a trial. The weight of a failed trial's steps suffices to learn that no trial is repeated."""
    choice = 1.0 if solved else FAILED_CHOICE_WEIGHT
    pieces: Pieces = []
    value = target
    for depth, (operation, number, remaining) in enumerate(peels):
        left, right = (number, value) if operation in "rR" else (value, number)
        opening = ", " if depth else "" if first else "; "
        # The token of mark and number after a trial tells whether the trial failed, so it has full weight.
        pieces.append((f"{opening}{left}", 1.0 if not first and depth == 0 and left == value else choice))
        pieces.append((f"{UNDONE_BY[operation]}{right}", choice))
        pieces.append((f"={remaining}", 1.0))
        value = remaining
    return pieces


def solution_text(peels: list[Peel], big: int, small: int, operation: str) -> str:
    """Return the expression of a solution: steps back, and an operation on the last two numbers."""
    text, level = f"{big}{operation}{small}", 1 if operation in "+-" else 2
    for peeled, number, _ in reversed(peels):
        text, level = attach(text, level, peeled, number)
    return text


def think_pieces(generator: random.Random, numbers: list[int], target: int, solution: str, steps: Any) -> Pieces:
    """Return a completion with some failed trials, a successful one and the answer.

    ``steps`` is the solution as `draw_solved_problem` returns it.
    """
    peels, big, small, operation = steps
    pieces: Pieces = [("<think>", 1.0)]
    failed: set[tuple[Peel, ...]] = set()
    wanted = min(int(-math.log(1 - generator.random()) * 1.8), MAX_FAILED_TRIALS[len(numbers)])
    for _ in range(2 * wanted):
        if len(failed) == wanted:
            break
        tried, left, right = draw_peels(generator, numbers, target)
        if tuple(tried) not in failed and pair_operation(left, right, tried[-1][2]) is None:
            pieces += trial_pieces(target, tried, first=not failed, solved=False)
            failed.add(tuple(tried))
    pieces += trial_pieces(target, peels, first=not failed, solved=True)
    pieces.append((f", {big}", 1.0))
    pieces.append((f"{operation}{small}", 1.0))
    pieces.append((f"={peels[-1][2]}</think>\n<answer>{solution}</answer>", 1.0))
    return pieces


def direct_pieces(generator: random.Random, numbers: list[int], target: int, solution: str) -> Pieces:
    """Return a completion that answers at once: the solution, or often an expression that misses the target."""
    if generator.random() >= SHARE_RIGHT_DIRECT:
        order = [number for _, number in sorted((generator.random(), number) for number in numbers)]
        big, small = max(order[:2]), min(order[:2])
        operation = "+-*"[int(generator.random() * 3)]
        solution, level = f"{big}{operation}{small}", 1 if operation in "+-" else 2
        for number in order[2:]:
            solution, level = attach(solution, level, "+-*"[int(generator.random() * 3)], number)
    return [(f"<answer>{solution}</answer>", 1.0)]


def share_thinking(numbers: list[int], preference: float, spread: float = SPREAD_OF_PREFERENCE) -> float:
    """Return the probability that the completion of a problem thinks first.

    It is the logistic function of ``preference`` plus a term in [-spread, spread] that depends on the first number. So
    a small change of the model changes the manner for some problems only, and the reward changes smoothly with the
    weights.
    """
    middle = (countdown.SMALLEST_NUMBER + countdown.LARGEST_NUMBER) / 2
    return 1 / (1 + math.exp(-preference - spread * (numbers[0] - middle) / middle))


def draw_solved_problem(generator: random.Random, held_out: set[Any]) -> tuple[list[int], int, Any]:
    """Draw a problem that is not held out; return its numbers, its target, and (peels, big, small, operation)."""
    while True:
        start, steps, target = countdown.draw_chain(generator, 3 + int(generator.random() * 2))
        numbers = [start, *(number for _, number in steps)]
        if countdown.problem_key(numbers, target) in held_out:
            continue
        value, peels = target, []
        for operation, number in reversed(steps[1:]):
            remaining = undo(value, number, operation)
            peels.append((operation, number, remaining))
            value = remaining
        big, small = max(start, steps[0][1]), min(start, steps[0][1])
        pair = pair_operation(big, small, value)
        assert pair is not None
        shuffled = [number for _, number in sorted((generator.random(), number) for number in numbers)]
        return shuffled, target, (peels, big, small, pair)


def draw_example(
    generator: random.Random, held_out: set[Any], preference: float, spread: float = SPREAD_OF_PREFERENCE
) -> tuple[list[int], int, Pieces]:
    """Draw a problem and its completion; ``preference`` is the mean log odds that the completion thinks first."""
    numbers, target, steps = draw_solved_problem(generator, held_out)
    solution = solution_text(*steps)
    if generator.random() < share_thinking(numbers, preference, spread):
        return numbers, target, think_pieces(generator, numbers, target, solution, steps)
    return numbers, target, direct_pieces(generator, numbers, target, solution)


def held_out_problems() -> set[Any]:
    """Return the keys of all problems of all splits of the task; a key ignores the order of the numbers."""
    rows = [row for split in countdown.SPLIT_SIZES for row in countdown.load(split)]
    return {countdown.problem_key(row["numbers"], row["target"]) for row in rows}
