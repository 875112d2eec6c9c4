"""The members' answers to a step's prompts, as the page shows them: a bounded part of what `log_completions` keeps.

A page that is a file holds at most `PAGE_BYTES` of answers, from steps spread over the run. `estune watch` serves the
answers of every step, one step at a time, of at most `STEP_BYTES`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from estune.files import parse_json
from estune.run.records import completions_path

PAGE_BYTES, STEP_BYTES = 1_000_000, 250_000  # of the JSON of all answers in a page, and of one step's answers
MOST_STEPS, MOST_PROMPTS, MOST_MEMBERS, MOST_COMPLETIONS = 12, 8, 64, 4  # completions: of one member and prompt
PLACED_CHARACTERS, OTHER_CHARACTERS = 2000, 300  # of a text of the best, median, worst or theta, and of other members
SHARES = (1, 4, 16)  # texts are cut to such a part of those characters if a step's first prompt exceeds the limit
FIELDS: dict[str, tuple[type, ...]] = {  # of a record, and their types
    "member": (int, type(None)), "prompt": (str,), "completion": (str,), "rewards": (list,)
}  # fmt: skip

Fitness = Mapping[int | None, float | None]  # of a step: member, or None for theta -> fitness; None: unknown
Models = dict[int | None, list[dict[str, Any]]]  # of a prompt: member, or None for theta -> its records, (G,)


@dataclass(frozen=True)
class Answers:
    """The completions that a run keeps, in files of one record for each member, prompt and completion, in this order.

    Args:
        directory: of the run.
        steps: the journal's step lines; they hold the members' fitness.
        theta: theta's fitness by step, where theta answered.
        num_generations: G of the run.
    """

    directory: Path
    steps: Sequence[Mapping[str, Any]]
    theta: Mapping[int, float | None]
    num_generations: int

    def kept(self) -> list[int]:
        """Return the finished steps whose completions are kept, in order."""
        names = (file.stem.removeprefix("step_") for file in (self.directory / "completions").glob("step_*.jsonl"))
        found = (int(name) for name in names if name.isdecimal())
        return sorted(step for step in found if 1 <= step <= len(self.steps))

    def of_page(self, limit: int) -> dict[str, Any]:
        """Return the ``steps`` with completions, and the answers of those ``shown``, at most ``limit`` bytes."""
        steps, shown, size = self.kept(), [], 0
        for step in spread(steps)[:MOST_STEPS] if limit else []:
            answers = self.of_step(step, min(STEP_BYTES, limit))
            if answers is None:
                continue
            size += _size(answers)
            if size > limit:
                break
            shown.append(answers)
        return {"steps": steps, "shown": sorted(shown, key=lambda answers: answers["step"])}

    def of_step(self, step: int, limit: int = STEP_BYTES) -> dict[str, Any] | None:
        """Return the answers to a step's first prompts, as many as ``limit`` bytes of JSON hold.

        Returns:
            ``step`` (1-based), ``prompts`` (see `_prompt`), and ``n_prompts`` of the step. None if the step's
            completions are not kept, their file is damaged, or not even one prompt fits.
        """
        if not 1 <= step <= len(self.steps):
            return None
        line = self.steps[step - 1]
        fitness: Fitness = {**dict(enumerate(line["fitness"])), None: self.theta.get(step)}
        n_prompts = len(line["rows"])
        prompts = _read(completions_path(self.directory, step), len(line["fitness"]), n_prompts, self.num_generations)
        for share in SHARES if prompts else ():
            found: list[dict[str, Any]] = []
            size = 100
            for models in prompts:
                prompt = _prompt(models, fitness, self.num_generations, share)
                size += _size(prompt)
                if size > limit:
                    break
                found.append(prompt)
            if found:
                return {"step": step, "prompts": found, "n_prompts": n_prompts}
        return None


def spread(steps: Sequence[int]) -> list[int]:
    """Return sorted steps in another order: the last, the first, the middle, then the middles of the gaps between."""
    order = list(dict.fromkeys([*steps[-1:], *steps[:1]]))
    gaps = [(0, len(steps) - 1)]  # pairs of indices
    while gaps:
        low, high = gaps.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            order.append(steps[middle])
            gaps += [(low, middle), (middle, high)]
    return order


def _read(path: Path, n_members: int, n_prompts: int, num_generations: int) -> list[Models]:
    """Return what the members said to each of a step's first prompts, and what theta said if it answered.

    The list is empty if the file is absent or does not hold what its run writes.
    """
    shown = min(n_prompts, MOST_PROMPTS)
    found: list[Models] = [{} for _ in range(shown)]
    n_lines = 0
    try:
        with path.open("rb") as file:
            for n_lines, line in enumerate(file, start=1):
                row, completion = divmod(n_lines - 1, num_generations)  # row: of members by prompts
                if row % n_prompts < shown and completion < MOST_COMPLETIONS:
                    record = parse_json(line)
                    if not _is_record(record):
                        return []
                    found[row % n_prompts].setdefault(record["member"], []).append(record)
    except (FileNotFoundError, ValueError):
        return []
    size = n_prompts * num_generations  # lines of one model
    return found if n_lines in (n_members * size, (n_members + 1) * size) else []


def _is_record(record: Any) -> bool:
    return isinstance(record, dict) and all(isinstance(record.get(name), types) for name, types in FIELDS.items())


def _prompt(models: Models, fitness: Fitness, num_generations: int, share: int) -> dict[str, Any]:
    """Return one prompt's answers, with texts cut to 1 / ``share`` of their characters.

    Returns:
        ``prompt``; ``texts``, of which each has its beginning, its length in characters, and the number of members
        that gave it; ``models``, best first and theta last; ``n_members`` and ``n_completions`` (G) of the step. A
        model has ``member`` (None: theta), ``place`` ("best", "median", "worst", "theta" or None), ``rank`` (from 1),
        ``fitness`` in the whole step, and ``answers``: index of the text, rewards (F,), indices of failed functions.
    """
    ranked, places = _ranked([member for member in models if member is not None], fitness)
    shown: list[tuple[int, int | None]] = [(rank, ranked[rank]) for rank in sorted({*_evenly(len(ranked)), *places})]
    if None in models:
        shown.append((len(ranked), None))
        places[len(ranked)] = "theta"
    said = Counter(text for member in ranked for text in {record["completion"] for record in models[member]})
    lengths: dict[str, int] = {}  # text -> characters shown
    for rank, member in shown:
        for text in (record["completion"] for record in models[member]):
            length = (PLACED_CHARACTERS if rank in places else OTHER_CHARACTERS) // share
            lengths[text] = max(lengths.get(text, 0), length)
    index = {text: number for number, text in enumerate(lengths)}
    return {
        "prompt": next(iter(models.values()))[0]["prompt"][: PLACED_CHARACTERS // share],
        "texts": [[text[:length], len(text), said[text]] for text, length in lengths.items()],
        "models": [
            {
                "member": member,
                "place": places.get(rank),
                "rank": rank + 1,
                "fitness": _rounded(fitness.get(member)),
                "answers": [
                    [index[record["completion"]], list(map(_rounded, record["rewards"])), record.get("failed", [])]
                    for record in models[member]
                ],
            }
            for rank, member in shown
        ],
        "n_members": len(ranked),
        "n_completions": num_generations,
    }


def _ranked(members: Sequence[int], fitness: Fitness) -> tuple[list[int], dict[int, str]]:
    """Return members from best to worst, those without fitness last, and the places of some ranks (from 0)."""
    ranked = sorted(members, key=lambda member: (fitness.get(member) is None, -(fitness.get(member) or 0.0), member))
    known = sum(fitness.get(member) is not None for member in members)
    return ranked, {known // 2: "median", known - 1: "worst", 0: "best"} if known else {}


def _evenly(n: int) -> Iterator[int]:
    """Yield at most `MOST_MEMBERS` of n indices, evenly, with the first and the last."""
    count = min(n, MOST_MEMBERS)
    yield from (round(i * (n - 1) / max(1, count - 1)) for i in range(count))


def _rounded(value: Any) -> float | None:
    return float(f"{value:.6g}") if isinstance(value, (int, float)) and math.isfinite(value) else None


def _size(value: Any) -> int:
    """Return the bytes of a value's JSON in a page, where "<" is escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return len(text.encode("utf-8", errors="replace")) + 5 * text.count("<") + 2
