"""gsm_symbolic: numbers read strictly, templates kept apart, hostile answers worth nothing."""

from __future__ import annotations

import hashlib
import random
from fractions import Fraction

import pytest

from estune.errors import UserError
from estune.tasks import get_task, gsm_symbolic

pytest.importorskip("reasoning_gym", reason="an optional neighbour")
ROWS = {split: gsm_symbolic.load(split) for split in gsm_symbolic.SPLITS}


def score(text: str, wanted: str = "42") -> float:
    return gsm_symbolic.reward([text], answer=[wanted])[0]


def test_splits_share_no_question_and_the_last_one_no_template() -> None:
    assert {split: len(rows) for split, rows in ROWS.items()} == gsm_symbolic.SPLIT_SIZES
    prompts = [row["prompt"] for rows in ROWS.values() for row in rows]
    assert len(set(prompts)) == len(prompts)
    templates = {split: {row["template"] for row in rows} for split, rows in ROWS.items()}
    assert templates["train"] == templates["validation"] == templates["test"]
    assert (len(templates["train"]), len(templates["new_templates"])) == (68, 17)
    assert not templates["train"] & templates["new_templates"]
    assert all(gsm_symbolic.parse_number(row["answer"]) is not None for rows in ROWS.values() for row in rows)


def test_problems_never_change() -> None:
    assert hashlib.sha256(repr(ROWS).encode()).hexdigest()[:16] == "2965abd039905344"


@pytest.mark.parametrize(
    ("text", "number"),
    [("42", 42), (" 42\n", 42), ("+42", 42), ("-42", -42), ("042", 42), ("42.0", 42),
     ("1,234,567.50", Fraction("1234567.5")), ("0.1", Fraction(1, 10)), ("-0", 0), ("12345", 12345),
     ("9" * 40, 10**40 - 1)],
)  # fmt: skip
def test_numbers(text: str, number: Fraction | int) -> None:
    assert gsm_symbolic.parse_number(text) == number


@pytest.mark.parametrize(
    "text",
    ["", " ", "forty-two", "42 or 43", "42, 43", "42 43", "42 apples", "$42", "42%", "42.", ".5", "4 2", "4,2", "42,00",
     "1,0000", ",042", "0,042.", "40+2", "84/2", "6*7", "=42", "42=42", "(42)", "[42]", "**42**", "\\boxed{42}",
     "--42", "+-42", "- 42", "4_2", "4e1", "42e0", "1e400", "inf", "-inf", "nan", "NaN", "0x2a", "42\n42", "42<br>",
     "four 2", "42j", "1/0", "\N{FULLWIDTH DIGIT FOUR}\N{FULLWIDTH DIGIT TWO}", "\N{ARABIC-INDIC DIGIT FOUR}2",
     "4\N{SUPERSCRIPT TWO}", "\N{MINUS SIGN}42", "42\0", "\u200b42", "__import__('os')", "9" * 41, "9" * 10**6,
     "0" * 10**6 + "42", "1" + ",000" * 10**6, "4" + " " * 10**6 + "2", "+" * 10**6, "1." + "0" * 10**6],
)  # fmt: skip
def test_what_scores_nothing(text: str) -> None:
    assert score(f"<answer>{text}</answer>") == 0.0  # a million characters, tried from each of them, would take hours


@pytest.mark.parametrize(
    ("text", "value"),
    [("<answer>42</answer>", 1.0), ("so <answer> 42.00 </answer> it is", 1.0), ("<answer>41</answer>", 0.1),
     ("<answer>41.999999999999999999999</answer>", 0.1), ("<answer>42000</answer>", 0.1), ("<answer>-42</answer>", 0.1),
     ("<answer>42</answer><answer>41</answer>", 0.1), ("<answer>41</answer><answer>42</answer>", 1.0),
     ("<answer>42</answer><answer>41", 1.0), ("<answer>42</answer><answer></answer>", 0.0),
     ("42", 0.0), ("", 0.0), ("<answer>42", 0.0), ("42</answer>", 0.0), ("</answer>42<answer>", 0.0),
     ("<Answer>42</Answer>", 0.0), ("<answer>42 <answer>", 0.0),
     ("<answer>42</answer>" * 10**5 + "<answer>0</answer>", 0.1),
     ("<answer>" * 10**5 + "42" + "</answer>" * 10**5, 1.0), ("<answer>" * 10**6, 0.0), ("</answer>" * 10**6, 0.0)],
)  # fmt: skip
def test_scores(text: str, value: float) -> None:
    assert score(text) == value
    assert gsm_symbolic.accuracy([text], answer=["42"]) == [float(value == 1.0)]


def test_a_perfect_a_random_and_an_empty_answerer() -> None:
    generator = random.Random(1)
    for split in ("test", "new_templates"):
        wanted = [row["answer"] for row in ROWS[split]]
        perfect = [f"<answer>{answer}</answer>" for answer in wanted]
        assert gsm_symbolic.reward(perfect, wanted) == gsm_symbolic.accuracy(perfect, wanted) == [1.0] * len(wanted)
        assert gsm_symbolic.reward([""] * len(wanted), wanted) == [0.0] * len(wanted)
        guesses = [f"<answer>{generator.choice(wanted)}</answer>" for _ in wanted]
        assert sum(gsm_symbolic.accuracy(guesses, wanted)) / len(wanted) < 0.03
        assert 0.1 <= sum(gsm_symbolic.reward(guesses, wanted)) / len(wanted) < 0.13


def test_rows_from_elsewhere() -> None:
    prepare = get_task("gsm_symbolic").prepare_row
    assert prepare({"question": "How many?", "answer": "Two by two.\n#### 1,234"}) == {
        "question": "How many?", "answer": "1,234", "prompt": gsm_symbolic.format_prompt("How many?"),
    }  # fmt: skip
    assert prepare({"problem": "?", "answer": 4.5})["answer"] == "4.5"
    assert prepare({"prompt": "mine", "question": "?", "answer": 4})["prompt"] == "mine"
    assert prepare(ROWS["train"][0]) == ROWS["train"][0]
    for wrong in (None, "", "four", True, float("inf"), float("nan"), [4], "1/2"):
        with pytest.raises(UserError, match="needs the column answer"):
            prepare({"question": "?", "answer": wrong})
    with pytest.raises(UserError, match="no split 'tset'"):
        gsm_symbolic.load("tset")
