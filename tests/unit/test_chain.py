"""Chains: every step matters, nothing but the last digit counts, and hostile answers score nothing."""

from __future__ import annotations

import hashlib
import random

import pytest

from estune.errors import UserError
from estune.tasks import chain, get_task

ROWS = chain.load("test")


def written(results: list[int], answer: object) -> str:
    lines = "".join(f"Step {i}: {digit}\n" for i, digit in enumerate(results, 1))
    return f"{lines}<answer>{answer}</answer>"


def score(completion: object, results: list[int]) -> tuple[float, float]:
    given = {"completions": [completion], "results": [results]}
    return chain.reward(**given)[0], chain.reward_steps(**given)[0]


def problem_of(prompt: str) -> tuple[int, list[tuple[str, int]]]:
    """Parse a problem's text, independently of the generator."""
    lines = prompt.split("\n")
    start = int(lines[0].split("digit ")[1][0])
    steps = [line.split(": ")[1].rsplit(" ", 1) for line in lines if line.startswith("Step ")]
    return start, [(name, int(operand)) for name, operand in steps]


def test_results_are_arithmetic() -> None:
    for row in ROWS[:200]:
        digit, steps = problem_of(row["prompt"])
        assert len(steps) == row["steps"] == len(row["results"])
        for (name, operand), wanted in zip(steps, row["results"], strict=True):
            value = {"add": digit + operand, "subtract": digit - operand, "multiply by": digit * operand}[name]
            digit = value % 10
            assert digit == wanted


def test_one_wrong_step_loses_the_reward() -> None:
    """One wrong step makes the result wrong, if all other steps are right."""
    for row in ROWS[:100]:
        start, steps = problem_of(row["prompt"])
        for wrong in range(len(steps)):
            for off in range(1, 10):
                digit, said = start, []
                for i, (name, operand) in enumerate(steps):
                    digit = chain.apply(digit, name, operand)
                    if i == wrong:
                        digit = (digit + off) % 10
                    said.append(digit)
                outcome, by_steps = score(written(said, said[-1]), row["results"])
                assert outcome == 0.0
                assert by_steps == wrong / len(steps)


def test_every_operation_permutes_the_digits_and_moves_some() -> None:
    for name, operand in chain.OPERATIONS:
        images = [chain.apply(digit, name, operand) for digit in range(10)]
        assert sorted(images) == list(range(10)) != images


def test_splits_have_their_sizes_and_share_nothing() -> None:
    prompts: list[str] = []
    for split, size in chain.SPLIT_SIZES.items():
        rows = chain.load(split)
        assert len(rows) == size
        assert [row["steps"] for row in rows[:5]] == [1, 2, 4, 8, 16]
        for k in chain.LENGTHS:
            own = chain.load(split, (k,))
            assert len(own) == size and {row["steps"] for row in own} == {k}
            prompts += [row["prompt"] for row in own]
    assert len(set(prompts)) == len(prompts)


def test_problems_never_change() -> None:
    digest = hashlib.sha256(repr([chain.load(split) for split in chain.SPLIT_SIZES]).encode()).hexdigest()
    assert digest[:16] == "43253b0a240bb08c"


@pytest.mark.parametrize(
    "text",
    ["", "7", "<answer></answer>", "<answer>17</answer>", "<answer>7 or 8</answer>", "<answer>7.0</answer>",
     "<answer>seven</answer>", "<answer>-7</answer>", "<answer>7</answer><answer>8</answer>", "<answer>7", "7</answer>",
     "<answer>\N{FULLWIDTH DIGIT SEVEN}</answer>", "<answer>\N{SUPERSCRIPT SEVEN}</answer>", "<answer>[7]</answer>",
     "<answer>0123456789</answer>", "<answer>7\n7</answer>", "<answer>+7</answer>"],
)  # fmt: skip
def test_what_scores_nothing(text: str) -> None:
    assert score(text, [7]) == (0.0, 0.0)


def test_a_perfect_a_random_and_an_empty_answerer() -> None:
    results = [row["results"] for row in ROWS]
    perfect = [written(r, r[-1]) for r in results]
    for scores in (chain.reward, chain.reward_steps, chain.accuracy):
        assert scores(completions=perfect, results=results) == [1.0] * len(ROWS)
        assert scores(completions=[""] * len(ROWS), results=results) == [0.0] * len(ROWS)
    generator = random.Random(1)
    guesses = [f"<answer>{generator.randrange(10)}</answer>" for _ in ROWS]
    assert 0.07 < sum(chain.reward(completions=guesses, results=results)) / len(ROWS) < 0.13


def test_steps_are_read_from_lines_and_the_last_claim_counts() -> None:
    assert score(written([1, 2, 3], 3), [1, 2, 3]) == (1.0, 1.0)
    assert score(written([1, 9, 3], 3), [1, 2, 3]) == (1.0, pytest.approx(2 / 3))
    assert score("Step 1: 9\nstep 1: 1\n<answer>3</answer>", [1, 2, 3]) == (1.0, pytest.approx(2 / 3))
    assert score("Step 3: 3\n", [1, 2, 3]) == (0.0, 0.0)  # the last step is the answer
    assert score("So Step 1: 1 and Step 2: 2", [1, 2, 3]) == (0.0, 0.0)
    every = "".join(f"Step 1: {digit}\n" for digit in range(10))
    assert score(every, [1, 2, 3])[1] == 0.0


def test_names() -> None:
    assert {row["steps"] for row in get_task("chain:8").load("train")} == {8}
    assert get_task("chain:all:steps").reward is chain.reward_steps
    assert get_task("chain:all:steps").accuracy is chain.accuracy
    assert get_task("chain").reward is chain.reward
    for wrong in ("chain:3", "chain:4:half", "chain::::", "chain:4:steps:x"):
        with pytest.raises(UserError, match="write chain, chain:K"):
            get_task(wrong)


def test_steps_are_read_in_linear_time() -> None:
    """On so long a text, a search that restarts at every blank line would take an hour."""
    assert chain.STEP.findall("\n" * 1_000_000 + "step 1: 3") == [("1", "3")]
