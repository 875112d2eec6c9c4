"""Conciseness: answer a short question in as few characters as its shortest right answer has.

The reward is minus the difference between a completion's length and that answer's, in characters (arXiv 2509.24372,
section on conciseness). It ignores the content. The accuracy is 1 if an accepted answer occurs in the completion as
whole words. There are 2 training, 8 validation and 8 test prompts, as in the paper, in our own words. The split
``knowledge`` has 200 short questions with accepted answers; it shows whether a model that became brief has kept its
knowledge. ``knowledge_validation`` has 100 more, for choosing settings. No two splits share a question.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from estune.errors import UserError
from estune.tasks.answers import completion_text

DATA = Path(__file__).parent / "data"
FILES = {"knowledge": "short_answers.jsonl", "knowledge_validation": "short_answers_validation.jsonl"}
NUMBER = r"(?:(?<![\w.])-)?\d+(?:[./]\d+)*(?![^\W_])"
NUMBER_WORDS = frozenset(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million".split()
)
WHOLE_NUMBERS = ("hundred", "thousand", "million")
SPLITS = ("train", "validation", "test", *FILES)

# A question, then its accepted answers; the first one's length is the target.
QUESTIONS: dict[str, tuple[tuple[str, ...], ...]] = {
    "train": (
        ("Which writer is the author of the play Hamlet?", "Shakespeare"),
        ("At what temperature, in degrees Celsius, does water boil at sea level?", "100", "hundred"),
    ),
    "validation": (
        ("Which animal do we get wool from?", "Sheep"),
        ("How many wings does a bee have?", "4", "four"),
        ("Which tool do we drive nails into wood with?", "Hammer"),
        ("What is the opposite of tall?", "Short", "small"),
        ("In which country do kangaroos live in the wild?", "Australia"),
        ("Which colour is the inside of a ripe watermelon?", "Red", "pink"),
        ("How many quarters make a whole?", "4", "four"),
        ("Which meal do people eat in the morning?", "Breakfast"),
    ),
    "test": (
        ("What is the name of the planet we live on?", "Earth"),
        ("How many legs does a spider have?", "8", "eight"),
        ("Which gas do plants take in from the air to grow?", "CO2", "carbon dioxide"),
        ("Which metal do magnets attract most?", "Iron"),
        ("What is the opposite of hot?", "Cold"),
        ("In which country do the pyramids of Giza stand?", "Egypt"),
        ("Which colour do you get when you mix blue and yellow paint?", "Green"),
        ("How many minutes are there in one hour?", "60", "sixty"),
    ),
}


@cache
def _questions(split: str) -> tuple[tuple[str, ...], ...]:
    if split in QUESTIONS:
        return QUESTIONS[split]
    rows = [json.loads(line) for line in (DATA / FILES[split]).read_text(encoding="utf-8").splitlines()]
    return tuple((row["question"], *row["answers"]) for row in rows)


def load(split: str) -> list[dict[str, Any]]:
    """Return the rows of a split of `SPLITS`: a conversational prompt, ``answer`` and ``answers``."""
    return [
        {"prompt": [{"role": "user", "content": question}], "answer": answers[0], "answers": list(answers)}
        for question, *answers in _questions(split)
    ]


def prepare_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a user's row with all columns, from ``answer`` (text) or ``answers`` (a list; the first is the target)."""
    answers = row.get("answers")
    if answers is None and row.get("answer") is not None:
        answers = [row["answer"]]
    if not isinstance(answers, (list, tuple)) or not answers or not all(str(answer).strip() for answer in answers):
        raise UserError("task conciseness needs the column answer (text), or answers (a list of texts)")
    texts = [str(answer) for answer in answers]
    answer = str(row["answer"]) if row.get("answer") is not None else texts[0]
    return {**row, "answer": answer, "answers": texts}


def reward(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Return -|characters of the completion - characters of the answer| per completion."""
    return [-float(abs(len(completion_text(c)) - len(a))) for c, a in zip(completions, answer, strict=True)]


def accuracy(completions: list[Any], answers: list[list[str]], **_: Any) -> list[float]:
    """Return 1 per completion that holds an accepted answer as whole words, else 0.

    Case, punctuation and the composition of accents do not count; "1,000" is read as "1000". A completion that denies
    an answer ("not Paris") or lists several also gets 1: the measure is not meant for models trained on it.
    """
    return [
        float(any(says(completion_text(completion), answer) for answer in accepted))
        for completion, accepted in zip(completions, answers, strict=True)
    ]


def words(text: str, fold: bool = True) -> list[str]:
    """Return the words and numbers of a text. Hyphens separate words; commas within numbers are removed.

    A number is one word with its sign, decimals and fraction: "-4", "4.5" and "1/2" do not hold 4, 4 and 2. With
    ``fold`` words are in lower case.
    """
    plain = unicodedata.normalize("NFKC", text).replace("\u2212", "-").replace("\u2044", "/")
    plain = plain.casefold() if fold else plain
    return re.findall(NUMBER + r"|[^\W_]+", re.sub(r"(?<=\d),(?=\d{3})", "", plain))


def says(text: str, answer: str) -> bool:
    """Return whether a text holds an answer. In symbols of one or two letters ("O", "Fe") the case counts."""
    symbol = len(answer) <= 2 and answer.isalpha()
    return holds(words(text, not symbol), words(answer, not symbol))


def holds(text: Sequence[str], answer: Sequence[str]) -> bool:
    """Return whether ``answer`` occurs in ``text`` as consecutive words; the last word may be in the plural.

    A number word that is part of a larger number does not count ("twenty-six" does not hold "six"), nor does its
    plural. "One hundred" counts as "hundred".
    """
    n = len(answer)
    if not n:
        return False
    name = answer[-1].isalpha() and answer[-1] not in NUMBER_WORDS
    accepted = {answer[-1], f"{answer[-1]}s", f"{answer[-1]}es"} if name else {answer[-1]}
    for i in range(len(text) - n + 1):
        *first, last = text[i : i + n]
        if first != list(answer[:-1]) or last not in accepted:
            continue
        before = [word for word in text[max(0, i - 1) : i] if not (word == "one" and answer[0] in WHOLE_NUMBERS)]
        beside = [*before, *text[i + n : i + n + 1]]
        if n == 1 and answer[0] in NUMBER_WORDS and any(word in NUMBER_WORDS for word in beside):
            continue
        return True
    return False
