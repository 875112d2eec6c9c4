"""math: problems of its own and of others, boxes found in linear time, equal answers equal, hostile ones cheap."""

from __future__ import annotations

import hashlib
import json
import random
import re
import threading
from fractions import Fraction
from math import gcd, isqrt
from pathlib import Path

import pytest
from command_line import PATIENCE_S

from estune.cli import main
from estune.errors import UserError
from estune.rewards.pool import RewardBatch, RewardPool
from estune.tasks import equality, get_task, maths
from estune.tasks.answers import last_boxed

pytest.importorskip("math_verify", reason="an optional neighbour")
ROWS = {split: maths.load(split) for split in maths.SPLITS}


def score(reference: str, answer: str) -> float:
    return maths.reward([f"So \\boxed{{{answer}}}."], answer=[reference])[0]


# --- its own problems ---


def test_splits_have_their_sizes_and_share_nothing() -> None:
    assert {split: len(rows) for split, rows in ROWS.items()} == maths.SPLIT_SIZES
    prompts = [row["prompt"] for rows in ROWS.values() for row in rows]
    assert len(set(prompts)) == len(prompts)


def test_problems_never_change() -> None:
    assert hashlib.sha256(repr(ROWS).encode()).hexdigest()[:16] == "98cbaff48e4df4a7"


def number(text: str) -> Fraction:
    fraction = re.fullmatch(r"(-?)\\frac\{(\d+)\}\{(\d+)\}", text)
    if not fraction:
        return Fraction(text)
    sign, above, below = fraction.groups()
    assert gcd(int(above), int(below)) == 1 < int(below)
    return Fraction(int(sign + above), int(below))


def value_of(side: str, x: Fraction) -> Fraction:
    """Return what a polynomial is at x, read back from its text."""
    total = Fraction(0)
    for sign, size, letter, power in re.findall(r"([+-]?) ?(\d*)(x?)(?:\^(\d))?", side):
        if size or letter:
            total += (-1 if sign == "-" else 1) * int(size or 1) * (x ** int(power or 1) if letter else 1)
    return total


def test_answers_are_right() -> None:
    """Every kind is worked out anew from the problem's text."""
    for index, row in enumerate(row for rows in ROWS.values() for row in rows):
        problem, answer = row["prompt"], row["answer"]
        formulas = re.findall(r"\$([^$]*)\$", problem)
        kind = maths.KINDS[index % len(maths.KINDS)].__name__
        if kind == "_fractions":
            first, sign, second = re.fullmatch(r"(.*\S) ([+-]) (\S.*)", formulas[0]).groups()
            assert number(answer) == number(first) + (1 if sign == "+" else -1) * number(second)
        elif kind == "_equation":
            left, right = formulas[1].split(" = ")
            assert value_of(left, number(answer)) == value_of(right, number(answer))
        elif kind == "_value":
            polynomial = formulas[0].removeprefix("f(x) = ")
            assert value_of(polynomial, Fraction(formulas[1][2:-1])) == int(answer)
        elif kind == "_roots":
            low, high = map(int, answer[2:-2].split(", "))
            assert low < high and all(value_of(formulas[1].split(" = ")[0], Fraction(x)) == 0 for x in (low, high))
        elif kind == "_distance":
            (a, b), (c, d) = (map(int, point[1:-1].split(", ")) for point in formulas)
            outside, inside = re.fullmatch(r"(\d*)\\sqrt\{(\d+)\}", answer).groups()
            assert int(outside or 1) ** 2 * int(inside) == (a - c) ** 2 + (b - d) ** 2
            assert all(int(inside) % (k * k) for k in range(2, isqrt(int(inside)) + 1)) and int(inside) > 1
        elif kind == "_price":
            price, percent = map(int, re.findall(r"\d+", problem))
            assert Fraction(answer) == price * Fraction(100 + (percent if "rises" in problem else -percent), 100)
        else:
            low, high = map(int, answer[1:-1].split(", "))
            least, first, middle, second, most = re.split(r" (\\le|<) ", formulas[1])
            assert [value_of(middle, Fraction(end)) for end in (low, high)] == [int(least), int(most)]
            assert (answer[0] == "[") == (first == "\\le") and (answer[-1] == "]") == (second == "\\le")


def test_a_perfect_a_random_and_an_empty_answerer() -> None:
    wanted = [row["answer"] for row in ROWS["test"]]
    assert maths.reward([f"\\boxed{{{answer}}}" for answer in wanted], wanted) == [1.0] * len(wanted)
    assert maths.accuracy([f"\\boxed{{ {answer} }}" for answer in wanted], wanted) == [1.0] * len(wanted)
    assert maths.reward([""] * len(wanted), wanted) == [0.0] * len(wanted)
    generator, some = random.Random(1), wanted[:350]
    guesses = [f"\\boxed{{{generator.choice(wanted)}}}" for _ in some]
    assert sum(maths.reward(guesses, some)) <= 5


def test_the_problem_itself_is_no_answer() -> None:
    for row in ROWS["test"][:70]:
        for formula in re.findall(r"\$([^$]*)\$", row["prompt"]):
            assert score(row["answer"], formula) == 0.0, row


# --- boxes and references ---


@pytest.mark.parametrize(
    ("text", "found"),
    [("\\boxed{3}", "3"), ("<think>\\boxed{3}</think> \\boxed{4}", "4"), ("\\boxed{3} \\boxed{4", "3"),
     ("\\boxed{}", ""),
     ("\\boxed {3}", "3"), ("\\fbox{3}", "3"), ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"), ("\\boxed{\\{1, 2\\}}",
     "\\{1, 2\\}"),
     ("\\boxed{\\boxed{3}}", "3"), ("\\boxed{3} {", "3"), ("} \\boxed{3}", "3"), ("{ \\boxed{3}", "3"),
     ("\\\\boxed{3}", None),
     ("\\boxed{a\\\\}", "a\\\\"), ("boxed{3}", None), ("\\boxed 3", None), ("\\boxed{3", None), ("", None), ("3", None),
     ("\\boxedx{3}", None), ("\\boxed{3}\\boxed{}", "")],
)  # fmt: skip
def test_the_last_box(text: str, found: str | None) -> None:
    assert last_boxed(text) == found


def test_boxes_are_found_in_linear_time() -> None:
    """Python's work for each pair of braces would take hours."""
    for part in ("\\boxed{", "{", "}", "\\", "\\boxed", "\\boxed ", " ", "\\boxed{}", "\\{"):
        for text in (part * 10**5, "\\boxed{" + part * 10**5, part * 10**5 + "}" * 10**5):
            found = last_boxed(text)
            assert found is None or len(found) < len(text)


@pytest.mark.parametrize(
    ("row", "answer"),
    [({"answer": "3"}, "3"), ({"answer": 3}, "3"), ({"answer": 3.0}, "3"), ({"answer": 2.5}, "2.5"),
     ({"answer": "0"}, "0"),
     ({"answer": 0}, "0"), ({"answer": ["$3$"]}, "$3$"), ({"final_answer": ["3"], "solution": ["..."]}, "3"),
     ({"answer": None, "solution": "so \\boxed{2}, no: \\boxed{\\frac{1}{2}}."}, "\\frac{1}{2}"),
     ({"solution": "$\\boxed 9$ of them"}, "9"), ({"answer": "9 eggs\n#### 9"}, "9"), ({"answer": "see \\boxed{9}"},
     "9"),
     ({"answer": "3", "solution": "\\boxed{4}"}, "3"), ({"answer": "", "solution": "\\boxed{4}"}, "4")],
)  # fmt: skip
def test_the_reference_of_a_row(row: dict, answer: str) -> None:
    prepared = get_task("math").prepare_row({"problem": "What?", **row})
    assert prepared["answer"] == answer
    assert prepared["prompt"] == maths.format_prompt("What?")


def test_rows_that_cannot_be_used() -> None:
    for row in ({"problem": "?"}, {"answer": None}, {"answer": ["1", "2"]}, {"answer": True}, {"solution": "no box"}):
        with pytest.raises(UserError, match=r"column answer .* it has the columns"):
            get_task("math").prepare_row(row)
    own = {"prompt": "mine", "question": "What?", "answer": "1"}
    assert get_task("math").prepare_row(own) == own


# --- equal answers ---

EQUAL = {
    "\\frac{1}{2}": ("1/2", "0.5", ".5", "0.50", "\\frac12", "\\dfrac{1}{2}", "\\tfrac12", "50\\%", "\\frac{2}{4}",
                     "$\\frac{1}{2}$",
                     "\\left(\\frac12\\right)", "x=\\frac12", "\\frac{1}{2}."),
    "-\\frac12": ("-0.5", "\\frac{-1}{2}"),
    "\\frac{3}{2}": ("1.5", "1\\frac{1}{2}"),
    "1/3": ("0.333333",),
    "10000": ("10,000", "10{,}000", "10\\,000", "10\\!000", "10,\\!000", "10 000", "\\$10,000", "10000.0",
              "10000\\text{ cm}"),
    "10,000": ("10000",),
    "50\\%": ("0.5", "50", "\\frac12"),
    "50": ("50\\%",),
    "3": ("x=3", "x = 3", "n=2+1=3", "3 cm", "3\\text{ cm}^2", "3\\text{ apples}", "\\text{3}", "(3)", "3^\\circ"),
    "x=3": ("3",),
    "\\{1,2\\}": ("\\{2,1\\}", "\\{ 1, 2 \\}", "1,2", "2, 1", "1 \\text{ and } 2", "1 \\text{ or } 2"),
    "(2,1)": ("(2, 1)", "\\left(2,1\\right)", "2,1"),
    "(1,2)": ("1,2", "\\{1,2\\}"),  # math-verify takes it for an open interval, and that for a pair
    "[0,\\infty)": ("\\left[0,\\infty\\right)", "[0, \\infty)"),
    "2\\sqrt{2}": ("\\sqrt8", "\\sqrt{8}", "2\\sqrt2", "2.828427", "\\frac{4}{\\sqrt2}"),
    "\\frac{\\pi}{2}": ("\\pi/2", "0.5\\pi", "\\frac12\\pi"),
    "x^2+2x+1": ("(x+1)^2", "1+2x+x^2"),
    "5\\sqrt{3}-2": ("-2+5\\sqrt3",),
    "2^{2024}": ("4^{1012}",),
    "e^{-x^2}": ("\\frac{1}{e^{x^2}}",),
    "\\text{even}": ("even", "\\text{Even}"),
    "\\text{C}": ("C", "(C)", "c"),
    "\\sum_{k=1}^n k^2": ("\\sum_{k=1}^n k^2", "\\sum_{k=1}^n  k^2"),  # word for word, whatever math-verify may see
    "\\begin{pmatrix}1\\\\2\\end{pmatrix}": ("\\begin{bmatrix}1\\\\2\\end{bmatrix}",),
}  # fmt: skip


@pytest.mark.parametrize("reference", EQUAL)
def test_what_is_equal(reference: str) -> None:
    for answer in EQUAL[reference]:
        assert score(reference, answer) == 1.0, answer


ZERO = {
    "3": ("", " ", ".", "$$", "4", "33", "-3", "3 4", "1 2", "3,4", "4,3", "3;4", "3|4", "3 \\text{ or } 4",
          "x=3\\text{ or }x=4", "x=3,x=4",
          "x = 3 \\text{ or } 4", "\\{3,4\\}", "\\{3\\}\\cup\\{4\\}", "[0,10]", "0<x<10", "x<4", "\\mathbb{R}",
          "\\mathbb{N}", "3\\pm1",
          "x", "?", "*", "...", "\\text{three}", "three", "nan", "\\infty", "\\frac{0}{0}", "1/0", "3=4", "3.0000001",
          "2.9999",
          "\N{FULLWIDTH DIGIT THREE}", "\N{SUPERSCRIPT THREE}", "\\text{any number}", "\\text{3 or 4}",
          "\\text{the reference}",
          "1+2", "4-1", "1\\cdot3", "1*3", "(1)(3)", "\\sqrt{9}", "9^{1/2}", "3^1", "\\frac{3!}{2}", "3+0i", "|{-3}|",
          "6/2+0", "3\\pm0",
          "\\log_2 8", "\\max(3,2)", "\\gcd(3,6)", "\\lfloor 3.5\\rfloor", "\\binom{3}{1}", "\\int_0^1 3dx",
          "\\sum_{i=1}^{3}1",
          "\\prod_{i=3}^3 i", "\\lim_{x\\to3}x", "\\frac{1}{1}\\frac{3}{1}", "50 6\\%", "\\frac{\\frac{6}{2}}{1}",
          "n=3=2+1"),
    "10": ("20\\%50", "50(20\\%)", "20\\%(50)", "50\\cdot20\\%", "\\frac{20}{100}50", "1 0"),
    "10000": ("10^4", "10.000", "10,00", "1e4"),
    "42": ("4 2", "4\\ 2", "4~2"),
    "1230": ("12 30",),
    "11/2": ("1 1/2",),
    "1 1/2": ("11/2", "11 /2"),
    "2\\sqrt{2}": ("\\sqrt{2^2+2^2}", "\\sqrt{(1-3)^2+(1-3)^2}", "2.83", "8^{1/2}", "-2\\sqrt2"),
    "(2,1)": ("(1,2)", "\\{1,2\\}", "2", "(2,1),(1,2)"),
    "(1,2)": ("(2,1)", "[1,2]", "(1,2,3)"),
    "\\{1,2\\}": ("\\{1\\}", "1", "(1,2]", "\\{1,2,3\\}", "\\{1,2\\},\\{1,3\\}"),
    "[0,1)": ("[0,1]", "(0,1)", "0,1", "\\{0,1\\}", "[0,1),[0,1]", "[0,2)"),
    "x^2+2x+1": ("x^2+2x", "y^2+2y+1", "(x+1)^3"),
    "x>5": ("x>6", "x<5", "x\\ge5", "y>5"),
    "\\text{Monday}": ("Tuesday", "\\text{Monday or Tuesday}", "\\text{Monday},\\text{Tuesday}"),
    "\\emptyset": ("3", "\\{3\\}", ""),
    "1/3": ("0.33", "0.33333"),
}  # fmt: skip


@pytest.mark.parametrize("reference", ZERO)
def test_what_scores_nothing(reference: str) -> None:
    for answer in ZERO[reference]:
        assert score(reference, answer) == 0.0, answer


def test_an_answer_without_its_box_scores_nothing() -> None:
    for text in (
        "3",
        "It is 3.",
        "$3$",
        "\\boxed{3",
        "<answer>3</answer>",
        "\\boxed{3} or \\boxed{4}",
        "\\boxed{3}\\boxed{}",
    ):
        assert maths.reward([text], answer=["3"]) == [0.0], text
    messages = [[{"role": "assistant", "content": "\\boxed{4}, no, \\boxed{3}"}]]
    assert maths.reward(messages, answer=["3"]) == [1.0]


HOSTILE = (
    "10^{10^{10}}", "9^{9^{9^9}}", "((9^9)^9)^9", "(9^{999})^{999}", "9^{99999999}", "2^{3!!}", "9!!!!", "9999!",
    "(999!)^{999}", "9**9**9",
    "\\binom{99999999}{5555555}", "\\sum_{i=1}^{10^9}i", "9" * 10**6, "(" * 10**5 + "3" + ")" * 10**5,
    "{" * 10**5 + "}" * 10**5,
    "\\frac" * 10**5, "1+" * 10**5, "3" + " " * 10**6 + "4", "1," * 10**5, "\\sqrt" * 10**5, "__import__('os').abort()",
    "e^{e^{e^{e^9}}}", "\\tan^{99}x+\\cot^{99}y", "x" + "^x" * 100, "\\{1,2\\}\\cup[0,1]" * 18, "9" * 40 + "^{1249}",
    "9^{9999}" * 30,
)  # fmt: skip
POWERS = (
    "9^99999999", "9^ 99999999", "9^{-99999999}", "9^+{99999999}", "9^\\frac{99999999}{1}", "9^\\left(99999999\\right)",
    "9^|99999999|", "9^\\lfloor 99999999\\rfloor", "9^{9}^{9}", "9^9^9", "|9^{999}|^{999}", "{9^{999}}^{999}",
    "9^{9999\\cdot9999}",
    "\\lfloor 9^{999}\\rfloor^{999}", "9^\\text{99999999}", "9^(99999999)",
)  # fmt: skip
# What passes the gate and keeps sympy busy for longer than it is given.
ENDLESS = "(x+1)^{9999}"


@pytest.mark.parametrize("answer", HOSTILE, ids=lambda answer: answer[:20])
def test_hostile_answers_are_answered(answer: str) -> None:
    for reference in ("3", "x^2+2x+1"):
        assert score(reference, answer) == 0.0  # without gate and limit this takes hours, and pytest's limit ends it


def test_large_powers_are_not_let_through() -> None:
    for answer in POWERS:
        assert not equality.is_harmless(answer), answer
    for answer in ("2^{2024}-2^{1012}", "x^2y^3", "10^{-9}", "(x+1)^2(x-1)^3", "2^3\\cdot3^2", "e^{-x^2}", "\\pi r^2"):
        assert equality.is_harmless(answer), answer


# Where the first signal falls into a callback of the garbage collector (Hypothesis has one), Python tells of the
# exception and goes on; the next signal ends the answer.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("isolation", ["process", "inline"])
def test_an_endless_answer_ends(isolation: str) -> None:
    """In a worker, and in the trainer's own main thread; the row beside it keeps its reward."""
    answers = [f"\\boxed{{{answer}}}" for answer in (ENDLESS, "x^2+2x+1", "(1+x)^2")]
    batch = RewardBatch(["?"] * 3, answers, [[]] * 3, {"answer": ["x^2+2x+1"] * 3})
    with RewardPool([maths.reward], ["math"], timeout_s=PATIENCE_S, workers=1, isolation=isolation) as pool:
        result = pool.submit(batch).result()
    assert result.rewards.tolist() == [[0.0], [1.0], [1.0]] and not result.failed.any()


def test_grading_works_in_any_thread() -> None:
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.append(score("\\frac{1}{7}", "2/14")))
    thread.start()
    thread.join()
    assert found == [1.0]


# --- by the command line ---


def test_a_users_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Score, evaluate and train on a directory with splits; a problem in both is told."""
    rows = [{"problem": f"What is ${i}+{i}$?", "solution": f"It is $\\boxed{{{2 * i}}}$."} for i in range(1, 9)]
    for split, own in {"learn": rows[:5], "check": rows[4:]}.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")
    texts = ("\\boxed{2}", "\\boxed{2+2}", "6", "\\boxed{8.0}")
    said = [{**row, "completion": text} for row, text in zip(rows, texts, strict=False)]
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said), encoding="utf-8")
    assert main(["score", "--task", "math", "--completions", str(tmp_path / "said.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rewards"] == [1.0, 0.0, 0.0, 1.0]
    common = ["--model", "tiny", "--task", "math", "--max_completion_length", "4", "--num_threads", "1"]
    data = ["--dataset_name", str(tmp_path), "--dataset_test_split", "check"]
    assert main(["evaluate", *common, *data, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 4
    run = ["--max_steps", "1", "--population_size", "2", "--report_to", "none", "--output_dir", str(tmp_path / "run")]
    assert main(["train", *common, *data, "--dataset_train_split", "learn", "--eval_steps", "1", *run]) == 0
    captured = capsys.readouterr()
    assert "5 training rows, 4 held out" in captured.out
    assert "warning: 1 of 4 held-out rows have a prompt that is also a training prompt" in captured.err
    assert main(["evaluate", *common, "--limit", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["split"] == "test"
    (tmp_path / "bare.jsonl").write_text('{"answer": "1"}\n', encoding="utf-8")
    assert main(["evaluate", *common, "--dataset_name", str(tmp_path / "bare.jsonl")]) == 2
    assert "no column 'prompt' or 'problem' or 'question'" in capsys.readouterr().err


def test_without_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equality.importlib.util, "find_spec", lambda name: None)
    for call in (lambda: maths.load("train"), lambda: maths.prepare_row({"answer": "1"})):
        with pytest.raises(UserError, match=r"python -m pip install .*\[tasks\]"):
            call()
