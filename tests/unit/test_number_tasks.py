"""Countdown and chains: their problems, exact scoring against hostile answers, the paper's reward, foreign rows."""

from __future__ import annotations

import hashlib
import random
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from estune.config import ESConfig
from estune.errors import UserError
from estune.tasks import TASKS, chain, get_task, gsm_symbolic
from estune.tasks import countdown as cd
from estune.tasks.expressions import MAX_NESTING, evaluate, tokenize
from estune.train.setup import Rewards, resolve_rewards, resolve_rows


def solved(answer: str, numbers=(3, 5, 9), target=24) -> float:
    return cd.accuracy([f"<answer>{answer}</answer>"], numbers=[list(numbers)], target=[target])[0]


# --- countdown: problems ----------------------------------------------------------------------------------------------


def test_splits_have_their_sizes_and_are_disjoint_up_to_order():
    keys = []
    for split, size in cd.SPLIT_SIZES.items():
        rows = cd.load(split)
        assert len(rows) == size
        assert sum(len(row["numbers"]) == 3 for row in rows) == size // 2
        assert all(set(row) == {"prompt", "numbers", "target"} for row in rows)
        keys += [cd.problem_key(row["numbers"], row["target"]) for row in rows]
    assert len(set(keys)) == len(keys) == 2400


def test_problems_never_change():
    digest = hashlib.sha256(repr([cd.load(split) for split in cd.SPLIT_SIZES]).encode()).hexdigest()
    assert digest[:16] == "e8233dd45c5a8156"
    assert cd.load("train")[0] is not cd.load("train")[0]  # a caller may change its rows


def reachable(values: list[Fraction]) -> set[Fraction]:
    if len(values) == 1:
        return {values[0]}
    results: set[Fraction] = set()
    for i, left in enumerate(values):
        for j, right in enumerate(values):
            if i != j:
                rest = [value for k, value in enumerate(values) if k not in (i, j)]
                options = {left + right, left - right, left * right} | ({left / right} if right else set())
                for option in options:
                    results |= reachable([option, *rest])
    return results


def test_every_problem_can_be_solved():
    for row in cd.load("validation")[:60]:
        assert row["target"] in reachable([Fraction(number) for number in row["numbers"]])


def test_prompt_names_numbers_and_target():
    row = cd.load("test")[1]
    assert ", ".join(map(str, row["numbers"])) in row["prompt"] and f"make {row['target']}." in row["prompt"]


def test_unknown_split_and_task():
    with pytest.raises(UserError, match="no split 'dev'"):
        cd.load("dev")
    with pytest.raises(UserError, match="did you mean 'countdown'"):
        get_task("cuontdown")
    assert get_task("countdown") is TASKS["countdown"]


# --- countdown: answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "numbers", "target"),
    [
        ("3*5+9", (3, 5, 9), 24),
        (" 9 + (5 * 3) ", (3, 5, 9), 24),
        ("9+5×3", (3, 5, 9), 24),
        ("(9−5)÷2", (2, 5, 9), 2),
        ("-3+8", (3, 8), 5),
        ("8*-3", (3, 8), -24),
        ("8/(3-8/3)", (8, 3, 8, 3), 24),
        ("137/5", (137, 5), "27.4"),
        ("137/5", (137, 5), 27.4),
        ("137/5", (137, 5), "548/20"),
        ("100/3", (100, 3), "33.33333"),
        ("3*5+9", (3, 5, 9), "24"),
        ("3*5+9", (3, 5, 9), "24.0"),
        ("3*5+9", ["3", "5", "9"], 24.0),
        ("3*5+9", np.array([3, 5, 9]), np.int64(24)),
    ],
)
def test_right_answers(answer, numbers, target):
    assert cd.accuracy([f"<answer>{answer}</answer>"], numbers=[numbers], target=[target]) == [1.0]


@pytest.mark.parametrize(
    "answer",
    [
        "", " ", "24", "3*5", "3*5+9+0", "3*5+9*1", "3+5+9", "3*5+9=24", "=3*5+9", "3*5+3", "5*3+9-3+3", "35-9",
        "NaN", "nan", "inf", "1e999", "3*5+9e0", "3*5+9.0", "3_*5+9", "0_3*5+9", "03*5+9", "0x3*5+9", "３*5+9", "٣*5+9",
        "3**5+9", "3^5+9", "3*5//9", "3/(5-5)+9", "9/(3-3)", "+3*5+9", "3*5++9", "3(5)+9", "(3*5+9", "3*5+9)",
        "()", ")3*5+9(", "3*5+9;", "eval('3*5+9')", "__import__('os').system('id')", "print(24)",
        "3*5+9 or so", "\\frac{3}{5}",
        "3 5 9", "*3*5+9", "3*5+9-", "-", "²", "3*5+9\0", "x", "3\u20035+9",
    ],
)  # fmt: skip
def test_wrong_answers(answer):
    assert solved(answer) == 0.0


def test_division_by_zero_and_a_number_given_twice():
    assert solved("5/(3-3)", (3, 3, 5), 5) == 0.0
    assert solved("3*3-5", (3, 3, 5), 4) == 1.0
    assert solved("3-5", (3, 3, 5), -2) == 0.0


def test_whole_targets_are_met_exactly():
    assert solved("24+1/1000000", (24, 1, 1000000), 24) == 0.0
    assert solved("24+1/1000000", (24, 1, 1000000), "24.0000001") == 1.0


def test_the_last_closed_answer_counts():
    def score(text: str) -> float:
        return cd.accuracy([text], numbers=[[3, 5, 9]], target=[24])[0]

    good, bad = "<answer>3*5+9</answer>", "<answer>3+5+9</answer>"
    assert score(bad + good) == 1.0 and score(good + bad) == 0.0
    assert score("<answer>3*5+9") == 0.0 and score("3*5+9</answer>") == 0.0 and score("3*5+9") == 0.0
    assert score("an <answer> is due: " + good) == 1.0 and score(good + " </answer>") == 1.0
    assert score("</answer><answer>") == 0.0


def test_limits_hold_for_texts_of_any_length():
    """They are so long that anything but a pass or two over them would take hours."""
    many = 10**6
    for answer in ("1" * many, "(" * many + "1" + ")" * many, "-" * 900 + "24", "9*" * 499 + "9", "9*" * many + "9"):
        assert solved(answer) == 0.0
    for text in ("<think>" * 10**6, "<answer>" * 10**6, "</answer>" * 10**6, "<think></think>\n" * 10**5):
        assert cd.reward([text], numbers=[[3, 5, 9]], target=[24])[0] < 0.2
    deep = "(" * MAX_NESTING + "7" + ")" * MAX_NESTING
    assert evaluate(tokenize(deep)) == 7 and evaluate(tokenize(f"({deep})")) is None
    assert evaluate(tokenize("-" * 999 + "7")) == -7


@pytest.mark.parametrize("seed", range(3))
def test_evaluation_agrees_with_python(seed):
    generator = np.random.default_rng(seed)
    for _ in range(300):
        text = str(generator.integers(1, 10))
        for _ in range(generator.integers(1, 6)):
            text = f"{text}{generator.choice(list('+-*/'))}{'-' * generator.integers(0, 3)}{generator.integers(1, 10)}"
            if generator.random() < 0.3:
                text = f"{generator.integers(1, 10)}-({text})"
        expected = eval(text, {"__builtins__": {}})  # our own text, not a model's
        value = evaluate(tokenize(text))
        assert value is not None and float(value) == pytest.approx(expected, rel=1e-12)


# --- countdown: reward ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("<think>a</think>\n<answer>b</answer>", 1.0),
        ("<think></think>\n<answer></answer>", 1.0),
        ("<think>a <answer>x</answer>\n\n</think>\n<answer>b</answer>", 1.0),
        ("<think>a</think>\n<answer>b</answer>\n", 0.6),
        (" <think>a</think>\n<answer>b</answer>", 0.6),
        ("<think>a</think><answer>b</answer>", 0.6),
        ("<think>a</think>\n\n<answer>b</answer>", 0.6),
        ("<think>a</think>\n<answer>b</answer>\n<answer>c</answer>", 0.6),
        ("<answer>b</answer>", 0.5),
        ("<think>a</think>", 0.1),
        ("<think>a\n<answer>b", 0.0),
        ("</think>\n<think></answer><answer>", 0.0),
        ("", 0.0),
    ],
)
def test_format(text, form):
    assert cd.format_score(text) == pytest.approx(form)


def test_reward_is_answer_plus_a_tenth_of_format():
    texts = [
        "<think>a</think>\n<answer>3*5+9</answer>",
        "<answer>3*5+9</answer>",
        "<think>a</think>\n<answer>3</answer>",
        "",
    ]
    columns = {"numbers": [[3, 5, 9]] * 4, "target": [24] * 4}
    assert cd.reward(texts, **columns, prompts=None) == pytest.approx([1.1, 1.05, 0.1, 0.0])
    assert cd.accuracy(texts, **columns, trainer_state=None) == [1.0, 1.0, 0.0, 0.0]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert cd.reward(messages, **columns) == cd.reward(texts, **columns)


# --- countdown: foreign rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [[3, 5, 9], ["3", " 5", "9"], np.array([3, 5, 9]), (3, 5.0, np.int32(9))])
@pytest.mark.parametrize("column", ["numbers", "nums"])
def test_foreign_rows(numbers, column):
    row = cd.prepare_row({column: numbers, "target": "548/20", "id": 7})
    assert row == {
        "numbers": [3, 5, 9],
        "target": "548/20",
        "id": 7,
        "prompt": cd.format_prompt([3, 5, 9], "548/20"),
    }
    assert cd.prepare_row({column: numbers, "target": 24, "prompt": "mine"})["prompt"] == "mine"


def test_own_rows_pass_through():
    row = cd.load("train")[0]
    assert cd.prepare_row(row) == row


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"target": 24}, r"lacks the column numbers \(or nums\); it has the columns: target"),
        ({"nums": [1, 2]}, "lacks the column target"),
        ({}, r"lacks the columns numbers \(or nums\) and target"),
        ({"nums": [], "target": 1}, "non-empty list"),
        ({"nums": "1 2", "target": 1}, "non-empty list"),
        ({"nums": [1, -2], "target": 1}, "integer of at least 0, but one is -2"),
        ({"nums": [1, 2.5], "target": 1}, "integer of at least 0"),
        ({"nums": [1, "٣"], "target": 1}, "integer of at least 0"),
        ({"nums": [1, True], "target": 1}, "integer of at least 0"),
        ({"nums": [1], "target": "1e999999999"}, "finite number"),
        ({"nums": [1], "target": float("nan")}, "finite number"),
        ({"nums": [1], "target": "1/0"}, "finite number"),
        ({"nums": [1], "target": "1_0"}, "finite number"),
        ({"nums": [1], "target": ""}, "finite number"),
        ({"nums": [1], "target": [1]}, "finite number"),
    ],
)
def test_bad_rows_get_one_sentence(row, message):
    with pytest.raises(UserError, match=message):
        cd.prepare_row(row)


# --- chain ------------------------------------------------------------------------------------------------------------
# Every step of a chain matters, and nothing but the last digit counts.


CHAINS = chain.load("test")


def written_chain(results: list[int], answer: object) -> str:
    lines = "".join(f"Step {i}: {digit}\n" for i, digit in enumerate(results, 1))
    return f"{lines}<answer>{answer}</answer>"


def score_chain(completion: object, results: list[int]) -> tuple[float, float]:
    given = {"completions": [completion], "results": [results]}
    return chain.reward(**given)[0], chain.reward_steps(**given)[0]


def problem_of(prompt: str) -> tuple[int, list[tuple[str, int]]]:
    """Parse a problem's text, independently of the generator."""
    lines = prompt.split("\n")
    start = int(lines[0].split("digit ")[1][0])
    steps = [line.split(": ")[1].rsplit(" ", 1) for line in lines if line.startswith("Step ")]
    return start, [(name, int(operand)) for name, operand in steps]


def test_results_are_arithmetic() -> None:
    for row in CHAINS[:200]:
        digit, steps = problem_of(row["prompt"])
        assert len(steps) == row["steps"] == len(row["results"])
        for (name, operand), wanted in zip(steps, row["results"], strict=True):
            value = {"add": digit + operand, "subtract": digit - operand, "multiply by": digit * operand}[name]
            digit = value % 10
            assert digit == wanted


def test_one_wrong_step_loses_the_reward() -> None:
    """One wrong step makes the result wrong, if all other steps are right."""
    for row in CHAINS[:100]:
        start, steps = problem_of(row["prompt"])
        for wrong in range(len(steps)):
            for off in range(1, 10):
                digit, said = start, []
                for i, (name, operand) in enumerate(steps):
                    digit = chain.apply(digit, name, operand)
                    if i == wrong:
                        digit = (digit + off) % 10
                    said.append(digit)
                outcome, by_steps = score_chain(written_chain(said, said[-1]), row["results"])
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


def test_chains_never_change() -> None:
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
    assert score_chain(text, [7]) == (0.0, 0.0)


def test_a_perfect_a_random_and_an_empty_answerer() -> None:
    results = [row["results"] for row in CHAINS]
    perfect = [written_chain(r, r[-1]) for r in results]
    for scores in (chain.reward, chain.reward_steps, chain.accuracy):
        assert scores(completions=perfect, results=results) == [1.0] * len(CHAINS)
        assert scores(completions=[""] * len(CHAINS), results=results) == [0.0] * len(CHAINS)
    generator = random.Random(1)
    guesses = [f"<answer>{generator.randrange(10)}</answer>" for _ in CHAINS]
    assert 0.07 < sum(chain.reward(completions=guesses, results=results)) / len(CHAINS) < 0.13


def test_steps_are_read_from_lines_and_the_last_claim_counts() -> None:
    assert score_chain(written_chain([1, 2, 3], 3), [1, 2, 3]) == (1.0, 1.0)
    assert score_chain(written_chain([1, 9, 3], 3), [1, 2, 3]) == (1.0, pytest.approx(2 / 3))
    assert score_chain("Step 1: 9\nstep 1: 1\n<answer>3</answer>", [1, 2, 3]) == (1.0, pytest.approx(2 / 3))
    assert score_chain("Step 3: 3\n", [1, 2, 3]) == (0.0, 0.0)  # the last step is the answer
    assert score_chain("So Step 1: 1 and Step 2: 2", [1, 2, 3]) == (0.0, 0.0)
    every = "".join(f"Step 1: {digit}\n" for digit in range(10))
    assert score_chain(every, [1, 2, 3])[1] == 0.0


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


def test_a_task_scores_conversations_and_columns_of_other_names(capsys: pytest.CaptureFixture[str]) -> None:
    """A task makes the prompt if it can; otherwise the rows' layout does, before the task reads the answer."""
    task = get_task("gsm_symbolic")
    asked, said = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "So it is 2.\n#### 2"}

    def row_of(row: dict[str, Any], **options: Any) -> dict[str, Any]:
        args = ESConfig(task=task.name, **options)
        [prepared] = resolve_rows(args, [row], task, "train", resolve_rewards(args, None, task))
        return prepared

    conversation = row_of({"messages": [asked, said]})
    assert (conversation["prompt"], conversation["answer"]) == ([asked], "2")
    assert "the reference answer is answer" in capsys.readouterr().err
    mapped = row_of({"text": "1 + 1?", "gold": 2}, column_mapping={"question": "text", "answer": "gold"})
    assert (mapped["prompt"], mapped["answer"]) == (gsm_symbolic.format_prompt("1 + 1?"), "2")
    assert row_of({"prompt": "p", "messages": [asked, said], "answer": "#### 2"})["prompt"] == "p"
    with pytest.raises(UserError, match=r"""no column 'prompt' or 'question' or .*'{"question": "text"}'"""):
        row_of({"text": "1 + 1?", "answer": "2"})
    with pytest.raises(UserError, match="column_mapping needs dataset_name"):
        resolve_rows(
            ESConfig(task=task.name, column_mapping={"a": "b"}), None, task, "train", Rewards([], [], [], None)
        )
