"""Tasks of reasoning-gym: ``rg:<name>`` has the problems and the scorer of that generator.

Problems come from seeds: 200 for training, 200 for validation, 1000 for the test, and no question twice. Questions that
differ only in round brackets or white space (``6 / 2``, ``( 6 / 2 )``) count as one. A generator with fewer questions
fills the splits in the same proportion. The answer is the content of ``<answer></answer>``, or the whole completion
without such tags.

The reward is the scorer's value, 0 to 1. The accuracy is 1 if the scorer gives 1. A scorer that also gives 1 for hedged
answers ("not 5, but 7") is not trusted: then only the package's own answer has accuracy 1. Many scorers give partial
credit for the right answer within other text ("16" for 6 gets a half), which rewards constant guesses;
``rg:<name>:exact`` trains on the accuracy instead. ``rg:<name>:easy`` has the problems of the lowest level of the
package's curriculum, such as sums of two digits, for models that cannot solve the default problems.

A process with PYTHONHASHSEED=0 makes the problems, because some generators iterate over sets. Scorers that run the
model's answer as Python are refused without `allow_unsandboxed_code`. Scorers that give any text, or one number, their
highest score are always refused. The answers `nan` and `inf` score 0 unless the right answer holds one of them: a
scorer that measures a distance could take them for the nearest number.
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

from estune.errors import UserError, install_command, nearest
from estune.tasks.answers import ANSWER_CLOSE, ANSWER_OPEN, completion_text, in_tags

PREFIX = "rg:"
WHO = "a task that begins with rg:"
SPLIT_SIZES = {"train": 200, "validation": 200, "test": 1000}
SEED = 2509_24372
ROUNDS = 20  # maximum number of draws of 1400 questions
FEWEST = 70  # minimum number of different questions
TAG = "\0type"
INSTRUCTION = "\nWrite only the final answer inside <answer></answer>."
EXACT = ":exact"  # suffix of a name: the reward is the accuracy
EASY = ":easy"  # suffix of a name, before `EXACT`: problems of the lowest level
STOCK = ("no answer", "0", "1", "x", "True", "False", "[]", "{}")  # uninformative answers, which no scorer may reward
AMONG = ("not {}, but 7", "{}, 1, 2, 3", "{} and anything else")  # hedged answers that hold the right one
ASKED = 20  # problems on which the `STOCK` answers are tried
NO_NUMBER = re.compile(r"(?<![a-z])(?:nan|inf(?:inity)?)[ij]?(?![a-z])", re.IGNORECASE)
# Source of a scorer that evaluates the model's answer (sympy's parsers call eval too).
EVALUATES = re.compile(r"\b(?:eval|exec|parse_expr|sympify)\(\s*answer\b")
MAKE = (  # the generator's own output goes to stderr, the rows to stdout
    "import os, sys; stdout = os.fdopen(os.dup(1), 'w'); os.dup2(2, 1); "
    "from estune.tasks import reasoning; stdout.write(reasoning.made(sys.argv[1]))"
)


def names() -> list[str]:
    """Return the names of all generators."""
    return sorted(package(WHO).factory.DATASETS)


def package(who: str) -> Any:
    """Import and return reasoning-gym; raise UserError if it is not installed. ``who`` is the task in the message."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError(f"{who} needs the package reasoning-gym: {install_command(extra='tasks')}")
    import reasoning_gym

    return reasoning_gym


def generator_of(task: str) -> tuple[str, bool]:
    """Split a task's name after ``rg:`` into the generator (with `:easy`), and whether the reward is the accuracy.

    Raises:
        UserError: there is no such generator, or it has no levels.
    """
    problems, exact = task.removesuffix(EXACT), task.endswith(EXACT)
    name, factory = problems.removesuffix(EASY), package(WHO).factory
    if name not in factory.DATASETS:
        hint = f"; a name can have the suffixes {EASY} and {EXACT}, in this order" if ":" in name else ""
        raise UserError(f"reasoning-gym has no task {name!r}{nearest(name, factory.DATASETS)}{hint}")
    if name != problems and name not in factory.CURRICULA:
        raise UserError(f"reasoning-gym's {name} has no levels, so {EASY} does not exist for it")
    return problems, exact


def dataset(problems: str, seed: int, size: int) -> Any:
    """Return the package's dataset of a generator, whose name may end in `:easy`."""
    gym, name = package(WHO), problems.removesuffix(EASY)
    if name == problems:
        return gym.create_dataset(name, seed=seed, size=size)
    config = gym.factory.CURRICULA[name]().generate_configuration({"seed": seed, "size": size})
    return gym.factory.DATASETS[name][0](config)


@cache
def runs_answers(problems: str) -> bool:
    """Return whether a generator's scorer evaluates the model's answer as Python."""
    module = inspect.getmodule(package(WHO).factory.DATASETS[problems.removesuffix(EASY)][0])
    return module is None or EVALUATES.search(inspect.getsource(module)) is not None


@cache
def rows_of(name: str, timeout_s: float | None = None) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of a generator by split, the same in every process.

    Raises:
        UserError: the generator makes no problems, or too few different ones, or not within ``timeout_s``; or its
            scorer rewards an uninformative answer.
    """
    found_here = [str(Path(place).absolute()) for place in sys.path if place]
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(found_here)}
    with tempfile.TemporaryDirectory() as place:  # some generators write into the working directory
        try:
            done = subprocess.run([sys.executable, "-P", "-c", MAKE, name], env=environment, cwd=place, check=False,
                                  capture_output=True, text=True, errors="replace", timeout=timeout_s)  # fmt: skip
        except subprocess.TimeoutExpired:
            raise UserError(f"reasoning-gym's {name} makes no problems within {timeout_s:g} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UserError(f"reasoning-gym's {name} makes no problems: {lines[-1]}")
    found = json.loads(done.stdout)
    if "error" in found:
        raise UserError(found["error"])
    rows: dict[str, list[dict[str, Any]]] = found["rows"]
    return rows


def made(name: str) -> str:
    """Return a generator's rows as JSON, ``{"rows": ...}`` or ``{"error": ...}``; see `rows_of`."""
    try:
        return json.dumps({"rows": make_rows(name)})
    except UserError as error:
        return json.dumps({"error": str(error)})


def asked(question: str) -> str:
    """Return a question's key: its text without round brackets, and with white space only between two words."""
    return re.sub(r"(?<!\w) | (?!\w)", "", " ".join(re.sub(r"[()]", " ", question).split()))


def make_rows(name: str, asked: Callable[[str], str] = asked) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every split of a task; two questions with one key, ``asked``, count as equal.

    Raises:
        UserError: the task has too few different questions for three splits.
    """
    wanted = sum(SPLIT_SIZES.values())
    seen: set[str] = set()
    rows: list[dict[str, Any]] = []
    for round_ in range(ROUNDS):
        # Generators make problem i from seed + i, so the seeds of two rounds differ by the length of a round.
        try:
            entries = list(dataset(name, SEED + round_ * wanted, wanted))
        except Exception as error:  # the package's code can raise anything
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
        raise UserError(f"reasoning-gym's scorer of {name} gives {paid!r} the full score for most problems")
    shares = {split: size * min(len(rows), wanted) // wanted for split, size in SPLIT_SIZES.items()}
    found, start = {}, 0
    for split, size in shares.items():
        found[split] = rows[start : start + size]
        start += size
    return found


def _paid_to_anybody(name: str, rows: list[dict[str, Any]]) -> str | None:
    """Return a `STOCK` answer with the highest score on at least half of the rows where it is wrong; None if none."""
    for answer in STOCK:
        others = [entry for row in rows if (entry := unpack(json.loads(row["rg_entry"])))["answer"] != answer]
        paid = 0
        for entry in others:
            with suppress(Exception):  # a scorer that raises gives 0
                paid += _scorer(name).score_answer(answer=answer, entry=entry) >= 1.0
        if others and 2 * paid >= len(others):
            return answer
    return None


def _row(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt": entry["question"] + INSTRUCTION,
        "rg_task": name,
        "rg_entry": json.dumps(
            pack(entry), default=str
        ),  # as text, because tables do not hold nested values of mixed types
    }


def pack(value: Any) -> Any:
    """Return a JSON value for any entry: tuples, sets, and dicts with keys other than text become tagged lists.

    Scorers compare answers with the entry's own tuples, so `unpack` must restore them.
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
    """Return the value that `pack` encoded."""
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    if TAG not in value:
        return {key: unpack(own) for key, own in value.items()}
    items = [unpack(item) for item in value["items"]]
    return {"tuple": tuple, "set": set, "dict": dict}[value[TAG]](items)


def prepare_row(row: dict[str, Any], name: str) -> dict[str, Any]:
    """Check a user's row; its columns must be those of `rows_of`, and its generator ``name``."""
    missing = [name for name in ("rg_task", "rg_entry") if not isinstance(row.get(name), str)]
    if missing:
        raise UserError(f"a row of reasoning-gym needs the columns {', '.join(missing)}")
    if row["rg_task"] != name:
        raise UserError(f"a row of rg:{name} cannot have rg_task {row['rg_task']!r}")
    return row


def right_answer(row: dict[str, Any]) -> str | None:
    """Return a right completion of a row; None if the package has none."""
    answer = json.loads(row["rg_entry"])["answer"]
    return in_tags(answer) if isinstance(answer, str) else None


def answer_of(completion: str) -> str:
    """Return a completion's answer: the content of its last answer tags, or the whole completion."""
    start = completion.rfind(ANSWER_OPEN)
    if start < 0:
        return completion.strip()
    inside = completion[start + len(ANSWER_OPEN) :]
    end = inside.find(ANSWER_CLOSE)
    return (inside if end < 0 else inside[:end]).strip()


def final_answer(_row: dict[str, Any], completion: str) -> str | None:
    """Return a completion's answer with single spaces; None if it is empty.

    The package's scorers compare an answer with the problem only, so two answers are equal if their texts are.
    """
    return " ".join(answer_of(completion).split()) or None


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
    """Return 1 per completion with the package's highest score, unless only a hedge (`_is_exact`) gets it, else 0."""
    texts = [answer_of(completion_text(completion)) for completion in completions]
    return [
        float(_score(name, text, own := unpack(json.loads(entry))) >= 1.0 and _is_exact(name, text, own))
        for name, text, entry in zip(rg_task, texts, rg_entry, strict=True)
    ]


def _is_exact(name: str, answer: str, entry: dict[str, Any]) -> bool:
    """Return whether an answer is the package's own, or its scorer gives no hedged answer the highest score."""
    kept = entry["answer"]
    if not isinstance(kept, str) or " ".join(answer.split()) == " ".join(kept.split()):
        return True
    for among in AMONG:
        with suppress(Exception):  # a scorer that raises gives 0
            if _score(name, among.format(kept), entry) >= 1.0:
                return False
    return True
