"""Conciseness: answer a short question in as few characters as its shortest right answer has.

The reward is minus the distance in characters between a completion's length and that answer's (arXiv 2509.24372,
section on conciseness); it never looks at what is said. The accuracy does: an accepted answer must stand in the
completion, as whole words. There are two prompts to train on, eight to validate and eight to test, as many as the paper
has of each kind but in words of our own; and the split ``knowledge``: 200 short questions with their accepted answers,
to see whether a model that became brief still knows what it knew. A hundred more, ``knowledge_validation``, are for
choosing settings. No split shares an answerable question with another.
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
    """Return a foreign row with all columns: ``answer`` (text), or ``answers`` (a list, the first one the target)."""
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
    """Return 1 where one of the accepted answers stands in the completion as whole words, else 0.

    Case, accents' composition, and punctuation do not count; "1,000" reads as "1000". A completion that denies an
    answer ("not Paris") or lists several passes: the measure is for models that answer, not for ones that know of it.
    """
    return [
        float(any(says(completion_text(completion), answer) for answer in accepted))
        for completion, accepted in zip(completions, answers, strict=True)
    ]


def words(text: str, fold: bool = True) -> list[str]:
    """Return the words and numbers of a text, in lower case; hyphens separate words, commas within numbers vanish.

    A number is one word with its sign, its decimals and its fraction: "-4", "4.5" and "1/2" do not hold 4, 4 and 2.
    ``fold`` off keeps the case.
    """
    plain = unicodedata.normalize("NFKC", text).replace("\u2212", "-").replace("\u2044", "/")
    plain = plain.casefold() if fold else plain
    return re.findall(NUMBER + r"|[^\W_]+", re.sub(r"(?<=\d),(?=\d{3})", "", plain))


def says(text: str, answer: str) -> bool:
    """Say whether a text holds an answer. In symbols of one or two letters ("O", "Fe") the case counts."""
    symbol = len(answer) <= 2 and answer.isalpha()
    return holds(words(text, not symbol), words(answer, not symbol))


def holds(text: Sequence[str], answer: Sequence[str]) -> bool:
    """Say whether ``answer`` stands in ``text`` as consecutive words; its last one may stand there in the plural.

    A number in words that is part of a larger one does not count ("twenty-six" holds no six), nor does its plural; "one
    hundred" is a hundred.
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
