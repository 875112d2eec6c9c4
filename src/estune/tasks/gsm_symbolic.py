"""GSM-Symbolic: school problems as short stories with changing names and numbers; the answer is one number.

The stories come from reasoning-gym's generator, from the 85 templates that it lists as correct. 17 templates are held
out: ``train`` (200), ``validation`` (200) and ``test`` (1000) use the other 68 in turn, with no question twice.
``new_templates`` (400) uses the 17, and shows whether a model generalises beyond the templates of its training.

An answer is a number inside <answer></answer> and nothing else: digits, perhaps a sign, commas between groups of three,
decimals. No unit, currency, percent, fraction, exponent or sum. Reward: 1 for the right number, 0.1 for any other
number, else 0. Accuracy: 1 for the right number, compared as exact fractions, else 0.
"""

from __future__ import annotations

import importlib.util
import random
import re
from fractions import Fraction
from functools import cache
from typing import Any

from estune.errors import UserError, install_command
from estune.tasks.answers import completion_text, extract_answer, in_tags

SPLIT_SIZES = {"train": 200, "validation": 200, "test": 1000, "new_templates": 400}
SPLITS = tuple(SPLIT_SIZES)
PROBLEM_COLUMNS = ("question", "problem")
HELD_OUT = 17  # templates
SEED = 2509_24372
PARTIAL = 0.1
MAX_CHARACTERS = 40
NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?", re.ASCII)


def format_prompt(question: str) -> str:
    """Return a question's prompt."""
    return (
        f"{question}\n"
        "Work out the answer one step at a time, then write it inside <answer></answer>: the number alone, without its "
        "unit.\n"
    )


def parse_number(text: str) -> Fraction | None:
    """Return the number that a text holds, without white space around it; None for anything else.

    Texts over 40 characters are refused first, so that Python's limit on the digits of an int is never met.
    """
    text = text.strip()
    if len(text) > MAX_CHARACTERS or not NUMBER.fullmatch(text):
        return None
    return Fraction(text.replace(",", ""))


@cache
def _splits() -> dict[str, tuple[dict[str, Any], ...]]:
    """Generate one story of each template in turn, with consecutive seeds, and divide them into the splits."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError(f"task gsm_symbolic needs the package reasoning-gym: {install_command(extra='tasks')}")
    from reasoning_gym.arithmetic.gsm_symbolic import gsm_symbolic

    generators = gsm_symbolic.GSMSymbolicDataset(gsm_symbolic.GSMSymbolicDatasetConfig(seed=SEED, size=1)).generators
    shuffle = random.Random(SEED)
    templates = [template for _, template in sorted((shuffle.random(), one) for one in gsm_symbolic.tasks_ok)]
    seen: set[str] = set()
    found: dict[str, tuple[dict[str, Any], ...]] = {}
    seed = SEED
    for split, size in SPLIT_SIZES.items():
        of_split = templates[:HELD_OUT] if split == "new_templates" else templates[HELD_OUT:]
        rows: list[dict[str, Any]] = []
        while len(rows) < size:
            template = of_split[len(rows) % len(of_split)]
            seed += 1
            story = generators[template](random.Random(seed), 1.0)
            question, answer = story["question"], story["answer"]
            value = parse_number(answer)
            if question not in seen and value is not None and value >= 0:  # some stories have a negative answer
                seen.add(question)
                rows.append({"prompt": format_prompt(question), "answer": answer, "template": template})
        found[split] = tuple(rows)
    return found


def load(split: str) -> list[dict[str, Any]]:
    """Return the rows of a split: prompt, answer (a number, as text), template (its index in reasoning-gym)."""
    if split not in SPLIT_SIZES:
        raise UserError(f"gsm_symbolic has no split {split!r}; it has {', '.join(SPLIT_SIZES)}")
    return [dict(row) for row in _splits()[split]]


def prepare_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a user's row with its answer; ``answer`` is a number, or text that ends in ``#### number`` as in GSM8K.

    The prompt is the row's own, or made of ``question`` or ``problem``.
    """
    answer = row.get("answer")
    text = "" if answer is None or isinstance(answer, bool) else str(answer).rpartition("####")[2].strip()
    if parse_number(text) is None:
        raise UserError(
            "a gsm_symbolic row needs the column answer: a number, or text that ends in #### and a number; it has "
            f"{str(answer)[:80]!r}"
        )
    question = next((row[name] for name in PROBLEM_COLUMNS if row.get(name) is not None), None)
    prepared = {**row, "answer": text}
    if row.get("prompt") is None and question is not None:
        prepared["prompt"] = format_prompt(str(question))
    return prepared


def right_answer(row: dict[str, Any]) -> str:
    """Return a right completion of a row."""
    return in_tags(row["answer"])


def final_answer(_row: dict[str, Any], completion: str) -> str | None:
    """Return the number in a completion's answer as a fraction in lowest terms; None if the answer is no number."""
    answer = extract_answer(completion)
    number = None if answer is None else parse_number(answer)
    return None if number is None else str(number)


def number_score(text: str, wanted: Fraction | None) -> float:
    """Return 1 for the wanted number, 0.1 for another one, 0 for anything else."""
    answer = extract_answer(text)
    number = None if answer is None else parse_number(answer)
    if number is None:
        return 0.0
    return 1.0 if number == wanted else PARTIAL


def reward(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Return 1, 0.1 or 0 per completion."""
    texts = map(completion_text, completions)
    return [number_score(text, parse_number(str(wanted))) for text, wanted in zip(texts, answer, strict=True)]


def accuracy(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Return 1 per completion with the right number, else 0."""
    return [float(score == 1.0) for score in reward(completions, answer)]
