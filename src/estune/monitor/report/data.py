"""The data of a report, read from run directories: plain values, ready for JSON.

The report computes nothing that the run did not write, except the differences between two completions. A running run is
read up to its last step. Numbers are rounded to `DIGITS` digits, which is more than a chart shows.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from estune.config import OF_METHODS
from estune.errors import UserError
from estune.monitor.report.answers import Answers
from estune.run.best import chosen_state
from estune.run.checkpoint import read_state
from estune.run.journal import JOURNAL_FILE, Journal
from estune.run.records import is_right, read_metrics
from estune.run.saved_config import CONFIG_FILE, METHOD_FILE

MOST_ROWS = 24  # rows whose completions are shown side by side
MOST_CHARACTERS = 2000  # characters of a completion or a prompt that are shown
MOST_MESSAGES = 12  # messages of a reward function's failures that are shown
DIGITS = 6  # significant decimal digits
TIME_PARTS = ("es/generate_s", "es/perturb_s", "es/score_s", "es/update_s")
WORDS = re.compile(r"\s+|\w+|[^\w\s]")

Part = tuple[str, bool]  # a part of a text, and whether the other text lacks the part


def read_run(directory: Path, answers_bytes: int = 0) -> dict[str, Any]:
    """Return the data of one run.

    Args:
        directory: of the run.
        answers_bytes: most bytes of the members' answers (`Answers.of_page`).

    Raises:
        UserError: the directory holds no run.
    """
    if (directory / "comparison.json").is_file():
        raise UserError(f"{directory} holds a comparison: see its report.html; its runs are in {directory / 'runs'}")
    if not (directory / CONFIG_FILE).is_file():
        raise UserError(f"{directory} holds no run: there is no {CONFIG_FILE}")
    config = _json(directory / CONFIG_FILE)
    journal = Journal.open(directory / JOURNAL_FILE, repair=False) if (directory / JOURNAL_FILE).exists() else None
    records = read_metrics(directory)
    steps = [record for record in records if "eval_reward" not in record]
    header = dict(journal.header) if journal else {}
    checkpoints = journal.checkpoints if journal else {}
    chosen = chosen_state(directory, journal) if journal else None
    if chosen:
        checkpoints = {chosen["step"]: chosen["fingerprint"]}
    if journal is None and (directory / METHOD_FILE).is_file():  # a baseline's run
        header = _json(directory / METHOD_FILE)
        state = read_state(directory)
        checkpoints = {state["step"]: state["fingerprint"]} if state else {}
    return {
        "name": config.get("run_name") or directory.resolve().name,
        "steps_done": len(journal.steps) if journal else max((record["step"] for record in records), default=0),
        "max_steps": config["max_steps"],
        "config": options_of_use(config),
        "trainer": {name: header[name] for name in ("trainer", "arguments") if journal is None and name in header},
        "engine": header.get("engine", {}),
        "base": header.get("base", {}),
        "versions": header.get("versions", {}),
        "rollouts": header.get("rollouts"),
        "fingerprint": checkpoints[max(checkpoints)] if checkpoints else None,
        "environment": _json(directory / "env.json") if (directory / "env.json").is_file() else {},
        "steps": [_step(record) for record in steps],
        "rewards": reward_functions(steps, config.get("reward_weights")),
        "evaluations": [_evaluation(record) for record in records if "eval_reward" in record],
        "fitness": [[_finite(value) for value in line["fitness"]] for line in journal.steps] if journal else [],
        "answers": _answers(directory, config, journal, steps).of_page(answers_bytes),
        "completions": before_and_after(directory, chosen["step"] if chosen else None),
    }


def read_answers(directory: Path, step: int) -> dict[str, Any] | None:
    """Return the members' answers in a step of a run (`Answers.of_step`)."""
    path = directory / JOURNAL_FILE
    journal = Journal.open(path, repair=False) if path.exists() else None
    return _answers(directory, _json(directory / CONFIG_FILE), journal, read_metrics(directory)).of_step(step)


def _answers(
    directory: Path, config: dict[str, Any], journal: Journal | None, records: Sequence[dict[str, Any]]
) -> Answers:
    theta = {record["step"]: _finite(record["es/theta_fitness"]) for record in records if "es/theta_fitness" in record}
    return Answers(directory, journal.steps if journal else [], theta, config["num_generations"])


def options_of_use(config: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a run that its method uses."""
    method = config.get("method", "es")
    return {name: value for name, value in config.items() if method in OF_METHODS.get(name, (method,))}


def _json(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _finite(value: Any) -> float | None:
    if isinstance(value, int):
        return value
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) and math.isfinite(value) else None


def _step(record: dict[str, Any]) -> dict[str, Any]:
    """Return a training step's numbers; ``other`` is the step's time that no part accounts for, in seconds."""
    parts = {name.removeprefix("es/").removesuffix("_s"): record.get(name) or 0.0 for name in TIME_PARTS}
    parts["other"] = max(0.0, (record.get("step_time") or 0.0) - math.fsum(parts.values()))
    numbers = {name: _finite(value) for name, value in record.items() if not isinstance(value, (str, list, dict))}
    return {**numbers, "time": parts}


def _evaluation(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "step": record["step"],
        "reward": _finite(record.get("eval_reward")),
        "accuracy": _finite(record.get("eval_accuracy")),
        "accuracy_ci95": record.get("eval_accuracy_ci95"),
        "length": _finite(record.get("eval_mean_length_tokens")),
        "rows": record.get("eval_rows"),
    }


def reward_functions(steps: Sequence[dict[str, Any]], weights: Sequence[float] | None) -> list[dict[str, Any]]:
    """Return name, weight and failed calls of each reward function of a run, in the run's order.

    A message of ``failed`` has the number of members whose call failed with it, and the first and the last step in
    which it did. The most frequent message comes first.

    Args:
        steps: records of training steps.
        weights: of the functions; None: all 1.
    """
    names = [name.removeprefix("rewards/").removesuffix("/mean") for name in (steps[-1] if steps else {})
             if name.startswith("rewards/") and name.endswith("/mean")]  # fmt: skip
    found = []
    for index, name in enumerate(names):
        messages: dict[str, dict[str, Any]] = {}
        for record in steps:
            calls = record.get(f"rewards/{name}/failed_calls")
            for message, members in (calls if isinstance(calls, dict) else {}).items():
                entry = messages.setdefault(message, {"message": message, "members": 0, "first": record["step"]})
                entry["members"] += members
                entry["last"] = record["step"]
        most = sorted(messages.values(), key=lambda entry: -entry["members"])
        found.append({
            "name": name,
            "weight": weights[index] if weights is not None and index < len(weights) else 1.0,
            "failed": most[:MOST_MESSAGES],
            "other_messages": len(most[MOST_MESSAGES:]),
        })  # fmt: skip
    return found


def before_and_after(directory: Path, last_step: int | None = None) -> dict[str, Any]:
    """Return the held-out completions of the first and the last evaluation, with their differences marked.

    Evaluations after ``last_step``, the step of the run's model, are left out.
    """
    files = sorted((directory / "eval").glob("step_*.jsonl"), key=_number_of)
    if last_step is not None:
        files = [file for file in files if _number_of(file) <= last_step]
    if len(files) < 2:
        return {"first_step": None, "last_step": None, "rows": []}
    first, last = (_rows(file) for file in (files[0], files[-1]))
    shown = []
    for row_id in list(first)[:MOST_ROWS]:
        if row_id not in last:
            continue
        one, other = first[row_id], last[row_id]
        before, after = mark(one["completions"][0][:MOST_CHARACTERS], other["completions"][0][:MOST_CHARACTERS])
        shown.append(
            {
                "prompt": (one["question"] or one["prompt"])[:MOST_CHARACTERS],
                "before": before,
                "after": after,
                "before_reward": one["rewards"][0],
                "after_reward": other["rewards"][0],
                "before_right": _right(one),
                "after_right": _right(other),
            }
        )
    return {"first_step": _number_of(files[0]), "last_step": _number_of(files[-1]), "rows": shown}


def _rows(file: Path) -> dict[int, dict[str, Any]]:
    rows = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    return {row["row_id"]: row for row in rows}


def _right(row: dict[str, Any]) -> bool | None:
    return is_right(row["accuracy"][0]) if row.get("accuracy") else None


def _number_of(file: Path) -> int:
    return int(file.stem.removeprefix("step_"))


def mark(before: str, after: str) -> tuple[list[Part], list[Part]]:
    """Split two texts into parts, and mark the parts that the other text lacks."""
    ours, theirs = WORDS.findall(before), WORDS.findall(after)
    left: list[Part] = []
    right: list[Part] = []
    matcher = difflib.SequenceMatcher(None, ours, theirs, autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        if a < b:
            left.append(("".join(ours[a:b]), kind != "equal"))
        if c < d:
            right.append(("".join(theirs[c:d]), kind != "equal"))
    return left, right


def read_runs(directories: Sequence[Path], answers_bytes: int = 0) -> dict[str, Any]:
    """Return the data of several runs; runs that share a name are named by their directories.

    ``answers_bytes`` bounds the members' answers of all runs together.
    """
    runs = [read_run(directory, answers_bytes // len(directories)) for directory in directories]
    names = [run["name"] for run in runs]
    for run, directory in zip(runs, directories, strict=True):
        if names.count(run["name"]) > 1:
            run["name"] = str(directory)
    return {"runs": runs}
