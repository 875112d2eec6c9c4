"""Tasks of reasoning-gym: ``rg:<name>`` is the generator of that name, its problems and its own scoring.

Problems come from seeds: 200 to train on, 200 to validate, 1000 to test, no question in two splits or twice in one;
questions that differ in round brackets or white space alone (``6 / 2``, ``( 6 / 2 )``) are one. A generator of fewer
different questions gives each split its share of what there is. A completion's answer is what stands in
``<answer></answer>``, or all of it where there are no such tags; the package's scorer gives it 0 to 1, and the accuracy
is 1 where it gives 1, if it can be taken at its word: a scorer that finds the right answer in "not 5, but 7" as well
makes exact only the very answer that the package keeps. Many scorers pay for the right answer among other text ("16"
for 6 is worth a half), which a constant guess can live on: ``rg:<name>:exact`` trains on the accuracy instead.
``rg:<name>:easy`` has the problems of the lowest level of the package's curriculum (sums of two digits, say), for
models to which the default ones are closed.

Problems are made in a process whose strings hash by seed 0, since some generators walk over sets. Some scorers run what
the model wrote as Python: those are refused, but for `allow_unsandboxed_code`. Some give any text, or one number, their
highest score: those are refused, too. An answer that is no number (`nan`, `inf`) scores 0 where the right one is one:
a scorer that measures a distance may take it for the nearest.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from estune.errors import UserError, nearest
from estune.tasks.answers import ANSWER_CLOSE, ANSWER_OPEN, completion_text, in_tags

PREFIX = "rg:"
WHO = "a task that begins with rg:"
SPLIT_SIZES = {"train": 200, "validation": 200, "test": 1000}
SEED = 2509_24372
ROUNDS = 20  # times that the questions wanted are drawn, at most
FEWEST = 70  # different questions of which splits can be made
TAG = "\0type"
INSTRUCTION = "\nWrite only the final answer inside <answer></answer>."
EXACT = ":exact"  # behind a name: the reward is the accuracy
EASY = ":easy"  # behind a name, before that: problems of the lowest level
STOCK = ("no answer", "0", "1", "x", "True", "False", "[]", "{}")  # answers that know nothing of a problem
AMONG = ("not {}, but 7", "{}, 1, 2, 3", "{} and anything else")  # hedges that hold the right answer
ASKED = 20  # problems that they answer
NO_NUMBER = re.compile(r"(?<![a-z])(?:nan|inf(?:inity)?)[ij]?(?![a-z])", re.IGNORECASE)
# In a generator's module: what the model wrote is evaluated (sympy's parsers call eval as well).
EVALUATES = re.compile(r"\b(?:eval|exec|parse_expr|sympify)\(\s*answer\b")
MAKE = (  # what a generator prints is not taken for its rows
    "import os, sys; told = os.fdopen(os.dup(1), 'w'); os.dup2(2, 1); "
    "from estune.tasks import reasoning; told.write(reasoning.made(sys.argv[1]))"
)


def names() -> list[str]:
    """Return the generators' names."""
    return sorted(package(WHO).factory.DATASETS)


def package(who: str) -> Any:
    """Return reasoning-gym, imported; UserError where it is not installed and ``who`` wants it."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError(f"{who} needs the package reasoning-gym: python -m pip install 'estune[tasks]'")
    import reasoning_gym

    return reasoning_gym


def generator_of(task: str) -> tuple[str, bool]:
    """Return the generator of a task's name behind ``rg:``, `:easy` with it, and whether its reward is exact.

    Raises:
        UserError: there is no generator of that name, or it has no levels.
    """
    problems, exact = task.removesuffix(EXACT), task.endswith(EXACT)
    name, factory = problems.removesuffix(EASY), package(WHO).factory
    if name not in factory.DATASETS:
        hint = f"; behind a name can stand {EASY} and {EXACT}, in this order" if ":" in name else ""
        raise UserError(f"reasoning-gym has no task {name!r}{nearest(name, factory.DATASETS)}{hint}")
    if name != problems and name not in factory.CURRICULA:
        raise UserError(f"reasoning-gym's {name} has no levels, and so no {EASY}")
    return problems, exact


def dataset(problems: str, seed: int, size: int) -> Any:
    """Return the package's data set of a generator's name, with or without `:easy`."""
    gym, name = package(WHO), problems.removesuffix(EASY)
    if name == problems:
        return gym.create_dataset(name, seed=seed, size=size)
    config = gym.factory.CURRICULA[name]().generate_configuration({"seed": seed, "size": size})
    return gym.factory.DATASETS[name][0](config)


@cache
def runs_answers(problems: str) -> bool:
    """Say whether a generator's scorer evaluates what the model wrote as Python."""
    module = inspect.getmodule(package(WHO).factory.DATASETS[problems.removesuffix(EASY)][0])
    return module is None or EVALUATES.search(inspect.getsource(module)) is not None


@cache
def rows_of(name: str, timeout_s: float | None = None) -> dict[str, list[dict[str, Any]]]:
    """Return all splits' rows of a generator, the same in every process.

    Raises:
        UserError: it makes no problems by itself, or too few different ones, or not within ``timeout_s``; or its scorer
            pays for an answer that knows nothing.
    """
    found_here = [str(Path(place).absolute()) for place in sys.path if place]
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(found_here)}
    with tempfile.TemporaryDirectory() as place:  # some generators write files where they are
        try:
            done = subprocess.run([sys.executable, "-P", "-c", MAKE, name], env=environment, cwd=place, check=False,
                                  capture_output=True, text=True, errors="replace", timeout=timeout_s)  # fmt: skip
        except subprocess.TimeoutExpired:
            raise UserError(f"reasoning-gym's {name} makes no problems within {timeout_s:g} s") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UserError(f"reasoning-gym's {name} makes no problems: {said[-1]}")
    found = json.loads(done.stdout)
    if "error" in found:
        raise UserError(found["error"])
    rows: dict[str, list[dict[str, Any]]] = found["rows"]
    return rows


def made(name: str) -> str:
    """Return a generator's rows as JSON, ``{"rows": ...}`` or ``{"error": ...}``; see `rows_of`."""
    try:
        return json.dumps({"rows": _make(name)})
    except UserError as error:
        return json.dumps({"error": str(error)})


def asked(question: str) -> str:
    """Return what tells a question from others: it without round brackets, and white space only between two words."""
    return re.sub(r"(?<!\w) | (?!\w)", "", " ".join(re.sub(r"[()]", " ", question).split()))


def _make(name: str, asked: Callable[[str], str] = asked) -> dict[str, list[dict[str, Any]]]:
    wanted = sum(SPLIT_SIZES.values())
    seen: set[str] = set()
    rows: list[dict[str, Any]] = []
    for round_ in range(ROUNDS):
        # Its generators make problem i from seed + i: rounds must lie as far apart as a round is long.
        try:
            entries = list(dataset(name, SEED + round_ * wanted, wanted))
        except Exception as error:  # that package's code, before anything has begun
            raise UserError(f"reasoning-gym's {name} makes no problems by itself: {error}") from error
        for entry in entries:
            if (key := asked(entry["question"])) not in seen:
                seen.add(key)
                rows.append(_row(name, entry))
        if len(rows) >= wanted:
            break
    if len(rows) < FEWEST:
        raise UserError(f"reasoning-gym's {name} has {len(rows)} different questions, too few for three splits")
    if paid := _paid_to_anybody(name, rows[:ASKED]):
        raise UserError(f"reasoning-gym's scorer of {name} pays in full for {paid!r}, whatever the problem")
    shares = {split: size * min(len(rows), wanted) // wanted for split, size in SPLIT_SIZES.items()}
    found, start = {}, 0
    for split, size in shares.items():
        found[split] = rows[start : start + size]
        start += size
    return found


def _paid_to_anybody(name: str, rows: list[dict[str, Any]]) -> str | None:
    """Return an answer that gets the highest score in half of the rows or more in which it is not the right one."""
    for answer in STOCK:
        others = [entry for row in rows if (entry := unpack(json.loads(row["rg_entry"])))["answer"] != answer]
        paid = 0
        for entry in others:
            with suppress(Exception):  # that package's code: a scorer that raises pays nothing
                paid += _scorer(name).score_answer(answer=answer, entry=entry) >= 1.0
        if others and 2 * paid >= len(others):
            return answer
    return None


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


def prepare_row(row: dict[str, Any], name: str) -> dict[str, Any]:
    """Check a foreign row; it needs what `rows_of` makes, of the generator ``name``: its scorer is what was let in."""
    missing = [name for name in ("rg_task", "rg_entry") if not isinstance(row.get(name), str)]
    if missing:
        raise UserError(f"a row of reasoning-gym needs the columns {', '.join(missing)}")
    if row["rg_task"] != name:
        raise UserError(f"a row of rg:{name} cannot have rg_task {row['rg_task']!r}")
    return row


def right_answer(row: dict[str, Any]) -> str | None:
    """Return a right completion of a row; None where the package keeps none."""
    answer = json.loads(row["rg_entry"])["answer"]
    return in_tags(answer) if isinstance(answer, str) else None


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
    return dataset(name, SEED, 1)


def reward(completions: list[Any], rg_task: list[str], rg_entry: list[str], **_: Any) -> list[float]:
    """Return the package's score of each completion's answer, 0 to 1."""
    texts = [completion_text(completion) for completion in completions]
    return [
        _score(name, answer_of(text), unpack(json.loads(entry)))
        for text, name, entry in zip(texts, rg_task, rg_entry, strict=True)
    ]


def _score(name: str, answer: str, entry: dict[str, Any]) -> float:
    if NO_NUMBER.search(answer) and not NO_NUMBER.search(str(entry["answer"])):
        return 0.0
    return float(_scorer(name).score_answer(answer=answer, entry=entry))


def accuracy(completions: list[Any], rg_task: list[str], rg_entry: list[str], **_: Any) -> list[float]:
    """Return 1 where the package gives an answer its highest score, and no answer among others has it, else 0."""
    texts = [answer_of(completion_text(completion)) for completion in completions]
    return [
        float(_score(name, text, own := unpack(json.loads(entry))) >= 1.0 and _is_exact(name, text, own))
        for name, text, entry in zip(rg_task, texts, rg_entry, strict=True)
    ]


def _is_exact(name: str, answer: str, entry: dict[str, Any]) -> bool:
    """Say whether an answer with the highest score is the one that is kept, or the scorer finds none among others."""
    kept = entry["answer"]
    if not isinstance(kept, str) or " ".join(answer.split()) == " ".join(kept.split()):
        return True
    for among in AMONG:
        with suppress(Exception):  # that package's code: a scorer that raises pays nothing
            if _score(name, among.format(kept), entry) >= 1.0:
                return False
    return True
