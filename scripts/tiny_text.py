"""The synthetic text that `tiny` is pretrained on: Countdown problems outside every split, answered in two manners.

At once, often with an expression that misses the target, or backwards from the target in trials of two-operand steps:

    <answer>14+12+6</answer>
    <think>28-6=22; 28+12=40; 28/14=2, 12/6=2</think>
    <answer>12/6*14</answer>

A trial takes one number after another away from the target until two are left; if those make what remains, the steps
read backwards are the solution. A step back needs the arithmetic of two numbers only, and far fewer trials than forward
search, which a model of this size learns. A trial that fails ends with "; ", one that works goes on with ", ".
"""

import math
import random
from typing import Any

from estune.tasks import countdown

SHARE_RIGHT_DIRECT = 0.5  # of the answers given at once
MAX_FAILED_TRIALS = {3: 5, 4: 5}  # per count of numbers
SPREAD_OF_PREFERENCE = 0.8  # log odds, see share_thinking
FAILED_CHOICE_WEIGHT = 0.2  # in the loss, of what a trial that fails tries
LARGEST_VALUE = 199  # of a value that the text writes down

# How a step of a solution is undone. value = rest `op` number; `r` and `R` are number - rest and number / rest.
UNDONE_BY = {"+": "-", "-": "+", "r": "-", "*": "/", "/": "*", "R": "/"}
Peel = tuple[str, int, int]  # operation, number, and the value that remains to be made
Pieces = list[tuple[str, float]]  # text, and how much its tokens count in the loss


def undo(value: int, number: int, operation: str) -> int:
    """Return the rest that `operation` with `number` turns into the value; 0 where it is no whole number above 0."""
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
    """Write an expression combined with a number; `level` is how tightly it binds (1 sum, 2 product)."""
    new_level = 1 if operation in "+-r" else 2
    needed = new_level + (operation in "rR")  # what stands on the right of - or / must bind tighter
    inner = f"({text})" if level < needed else text
    mark = {"r": "-", "R": "/"}.get(operation, operation)
    return (f"{number}{mark}{inner}" if operation in "rR" else f"{inner}{mark}{number}"), new_level


def pair_operation(big: int, small: int, value: int) -> str | None:
    """Return the operation by which two numbers, big >= small, make a value; None where there is none."""
    if big + small == value:
        return "+"
    if big - small == value:
        return "-"
    if big * small == value:
        return "*"
    return "/" if small * value == big else None


def draw_peels(generator: random.Random, numbers: list[int], target: int) -> tuple[list[Peel], int, int]:
    """Draw steps back from the target, all equally likely, until two numbers are left; those come larger one first."""
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
    """Write a trial. What a failed one tries counts little, just enough to learn that nothing is tried twice."""
    choice = 1.0 if solved else FAILED_CHOICE_WEIGHT
    pieces: Pieces = []
    value = target
    for depth, (operation, number, remaining) in enumerate(peels):
        left, right = (number, value) if operation in "rR" else (value, number)
        opening = ", " if depth else "" if first else "; "
        # Whether a trial goes on is learned from the mark, which is one token with the number.
        pieces.append((f"{opening}{left}", 1.0 if not first and depth == 0 and left == value else choice))
        pieces.append((f"{UNDONE_BY[operation]}{right}", choice))
        pieces.append((f"={remaining}", 1.0))
        value = remaining
    return pieces


def solution_text(peels: list[Peel], big: int, small: int, operation: str) -> str:
    """Write the expression that the steps back lead to."""
    text, level = f"{big}{operation}{small}", 1 if operation in "+-" else 2
    for peeled, number, _ in reversed(peels):
        text, level = attach(text, level, peeled, number)
    return text


def think_pieces(generator: random.Random, numbers: list[int], target: int, solution: str, steps: Any) -> Pieces:
    """Write a completion that tries, fails some times, succeeds and answers; `steps`: as draw_solved_problem gives."""
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
    """Write a completion that answers at once: the solution, or often an expression that misses the target."""
    if generator.random() >= SHARE_RIGHT_DIRECT:
        order = [number for _, number in sorted((generator.random(), number) for number in numbers)]
        big, small = max(order[:2]), min(order[:2])
        operation = "+-*"[int(generator.random() * 3)]
        solution, level = f"{big}{operation}{small}", 1 if operation in "+-" else 2
        for number in order[2:]:
            solution, level = attach(solution, level, "+-*"[int(generator.random() * 3)], number)
    return [(f"<answer>{solution}</answer>", 1.0)]


def share_thinking(numbers: list[int], preference: float, spread: float = SPREAD_OF_PREFERENCE) -> float:
    """Return how often the text about a problem thinks first: the logistic function of the preference, give or take.

    It depends a little on the number that is listed first, so that a small change of the model turns the preference for
    some problems and not for others: the reward then changes smoothly with the weights.
    """
    middle = (countdown.SMALLEST_NUMBER + countdown.LARGEST_NUMBER) / 2
    return 1 / (1 + math.exp(-preference - spread * (numbers[0] - middle) / middle))


def draw_solved_problem(generator: random.Random, held_out: set[Any]) -> tuple[list[int], int, Any]:
    """Draw a problem outside the held-out ones, and a solution as (peels, big, small, operation)."""
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
    """Draw a problem and a completion for it; `preference` is the log odds that it thinks first, on average."""
    numbers, target, steps = draw_solved_problem(generator, held_out)
    solution = solution_text(*steps)
    if generator.random() < share_thinking(numbers, preference, spread):
        return numbers, target, think_pieces(generator, numbers, target, solution, steps)
    return numbers, target, direct_pieces(generator, numbers, target, solution)


def held_out_problems() -> set[Any]:
    """Return every problem of every split of the task, up to the order of its numbers."""
    rows = [row for split in countdown.SPLIT_SIZES for row in countdown.load(split)]
    return {countdown.problem_key(row["numbers"], row["target"]) for row in rows}
