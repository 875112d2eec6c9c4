"""Tasks of reasoning-gym: ``rg:<name>`` is the generator of that name, its problems and its own scoring.

Problems come from seeds: 200 to train on, 200 to validate, 1000 to test, no question in two splits; a generator of
fewer different questions gives each split its share of what there is. A completion's answer is what stands in
``<answer></answer>``, or all of it where there are no such tags; the package's scorer gives it 0 to 1, and the accuracy
is 1 where it gives 1. Scorers are code of that package, some evaluate what the model wrote: rewards run in workers of
their own.
"""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from typing import Any

from estune.errors import UserError
from estune.tasks.answers import ANSWER_CLOSE, ANSWER_OPEN, completion_text
from estune.words import nearest

PREFIX = "rg:"
WHO = "a task that begins with rg:"
SPLIT_SIZES = {"train": 200, "validation": 200, "test": 1000}
SEED = 2509_24372
ROUNDS = 20  # times that the questions wanted are drawn, at most
FEWEST = 70  # different questions of which splits can be made
TAG = "\0type"
INSTRUCTION = "\nWrite only the final answer inside <answer></answer>."


def names() -> list[str]:
    """Return the generators' names."""
    return sorted(package(WHO).factory.DATASETS)


def package(who: str) -> Any:
    """Return reasoning-gym, imported; UserError where it is not installed and ``who`` wants it."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError(f"{who} needs the package reasoning-gym: python -m pip install reasoning-gym")
    import reasoning_gym

    return reasoning_gym


@cache
def rows_of(name: str) -> dict[str, list[dict[str, Any]]]:
    """Return all splits' rows of a generator.

    Raises:
        UserError: there is no generator of that name, or it has too few different questions.
    """
    gym = package(WHO)
    if name not in gym.factory.DATASETS:
        raise UserError(f"reasoning-gym has no task {name!r}{nearest(name, gym.factory.DATASETS)}")
    wanted = sum(SPLIT_SIZES.values())
    seen: set[str] = set()
    rows: list[dict[str, Any]] = []
    for round_ in range(ROUNDS):
        # Its generators make problem i from seed + i: rounds must lie as far apart as a round is long.
        try:
            entries = list(gym.create_dataset(name, seed=SEED + round_ * wanted, size=wanted))
        except Exception as error:  # that package's code, before anything has begun
            raise UserError(f"reasoning-gym's {name} makes no problems by itself: {error}") from error
        for entry in entries:
            if entry["question"] not in seen:
                seen.add(entry["question"])
                rows.append(_row(name, entry))
        if len(rows) >= wanted:
            break
    if len(rows) < FEWEST:
        raise UserError(f"reasoning-gym's {name} has {len(rows)} different questions, too few for three splits")
    shares = {split: size * min(len(rows), wanted) // wanted for split, size in SPLIT_SIZES.items()}
    found, start = {}, 0
    for split, size in shares.items():
        found[split] = rows[start : start + size]
        start += size
    return found


def _row(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt": entry["question"] + INSTRUCTION,
        "rg_task": name,
        "rg_entry": json.dumps(pack(entry), default=str),  # nested, of mixed types: as text it passes any table
    }


def pack(value: Any) -> Any:
    """Return a value with what JSON would change (tuples, sets, keys that are no text) written as lists with a tag.

    Scorers compare what a model wrote with an entry's own tuples.
    """
    if isinstance(value, tuple):
        return {TAG: "tuple", "items": [pack(item) for item in value]}
    if isinstance(value, (set, frozenset)):
        return {TAG: "set", "items": [pack(item) for item in sorted(value, key=repr)]}
    if isinstance(value, list):
        return [pack(item) for item in value]
    if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
        return {TAG: "dict", "items": [[pack(key), pack(own)] for key, own in value.items()]}
    if isinstance(value, dict):
        return {key: pack(own) for key, own in value.items()}
    return value


def unpack(value: Any) -> Any:
    """Return what `pack` was given."""
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    if TAG not in value:
        return {key: unpack(own) for key, own in value.items()}
    items = [unpack(item) for item in value["items"]]
    return {"tuple": tuple, "set": set, "dict": dict}[value[TAG]](items)


def prepare_row(row: dict[str, Any]) -> dict[str, Any]:
    """Check a foreign row; it needs what `rows_of` makes."""
    missing = [name for name in ("rg_task", "rg_entry") if not isinstance(row.get(name), str)]
    if missing:
        raise UserError(f"a row of reasoning-gym needs the columns {', '.join(missing)}")
    return row


def answer_of(completion: str) -> str:
    """Return what a completion answers: the inside of its last answer tags, or all of it."""
    start = completion.rfind(ANSWER_OPEN)
    if start < 0:
        return completion.strip()
    inside = completion[start + len(ANSWER_OPEN) :]
    end = inside.find(ANSWER_CLOSE)
    return (inside if end < 0 else inside[:end]).strip()


@cache
def _scorer(name: str) -> Any:
    return package(WHO).create_dataset(name, seed=SEED, size=1)


def reward(completions: list[Any], rg_task: list[str], rg_entry: list[str], **_: Any) -> list[float]:
    """Return the package's score of each completion's answer, 0 to 1."""
    texts = [completion_text(completion) for completion in completions]
    return [
        float(_scorer(name).score_answer(answer=answer_of(text), entry=unpack(json.loads(entry))))
        for text, name, entry in zip(texts, rg_task, rg_entry, strict=True)
    ]


def accuracy(completions: list[Any], rg_task: list[str], rg_entry: list[str], **_: Any) -> list[float]:
    """Return 1 where the package gives an answer its highest score, else 0."""
    return [float(score >= 1.0) for score in reward(completions, rg_task, rg_entry)]
