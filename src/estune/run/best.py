"""The best step of a run by its held-out evaluations, and early stopping; the rules and names of transformers.

The choice is a pure function of the run's evaluations and options, so a resume repeats it. An evaluation is the best if
its metric is strictly better than that of every earlier one: ties keep the earlier step. Patience counts evaluations
that are not better than the best by more than a threshold. `es_state.json` and `trainer_state.json` beside the run's
model record the choice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from estune.config import ESConfig
from estune.errors import UserError, nearest
from estune.run.checkpoint import Best, State, read_state
from estune.run.journal import Journal
from estune.run.records import evaluation_path, read_metrics

PREFIX = "eval_"
# Metrics that every evaluation has. `metric_for_best_model` names one of them, or the accuracy if the task has one.
METRICS = ("reward", "reward_failures", "mean_length_tokens", "clipped_ratio", "non_finite_ratio")
IF_ABSENT = {f"{PREFIX}non_finite_ratio": 0.0}  # values of metrics that an evaluation omits
_TEST_SPLIT = re.compile(r"tests?(?![a-z])", re.IGNORECASE)

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Ranking:
    """The best of a run's evaluations so far."""

    step: int | None = None  # steps done at the best evaluation; None: no evaluation has a value
    value: float = math.nan
    waited: int = 0  # evaluations since the best one improved by more than the threshold


def chooses(args: ESConfig) -> bool:
    """Return whether held-out evaluations choose the run's model or its end."""
    return args.load_best_model_at_end or args.early_stopping_patience > 0


def check_metric(args: ESConfig, has_accuracy: bool) -> None:
    """Raise UserError if the run's evaluations will not have the metric that chooses.

    ``has_accuracy`` is whether the evaluations measure an accuracy.
    """
    if args.metric_for_best_model is None:
        return
    known = ("accuracy", *METRICS) if has_accuracy else METRICS
    name = args.metric_for_best_model.removeprefix(PREFIX)
    if name not in known:
        listed = ", ".join(f"{PREFIX}{each}" for each in known)
        raise UserError(
            f"metric_for_best_model is {args.metric_for_best_model!r}; the evaluations of this run have {listed}"
            f"{nearest(name, known)}"
        )


def refuse_test_rows(split: str | None) -> None:
    """Raise UserError if the rows that choose a step are called test rows.

    A result on rows that chose the model is too high, and nothing in that result shows it.

    Args:
        split: name of the split of the held-out rows; None: it has no name.
    """
    if split is not None and _TEST_SPLIT.match(split):
        raise UserError(
            f"load_best_model_at_end and early_stopping_patience choose on the held-out rows, and the split {split!r} "
            "is for the final measurement: give validation rows, such as --dataset_test_split validation"
        )


def metric_of(args: ESConfig, evaluations: Sequence[Record]) -> str:
    """Return the metric that chooses, with its prefix; by default the accuracy if it is measured, else the reward."""
    if args.metric_for_best_model is not None:
        return PREFIX + args.metric_for_best_model.removeprefix(PREFIX)
    has_accuracy = any("eval_accuracy" in record for record in _alike(evaluations))
    return "eval_accuracy" if has_accuracy else "eval_reward"


def is_greater_better(args: ESConfig, metric: str) -> bool:
    """Return whether higher values of a metric are better; by default unless its name ends with `loss`."""
    return not metric.endswith("loss") if args.greater_is_better is None else args.greater_is_better


def rank(evaluations: Sequence[Record], metric: str, greater: bool, threshold: float = 0.0) -> Ranking:
    """Return the best of a run's evaluations, which are in the order of their steps.

    An evaluation without a value of the metric (no reward applied) is not better than any other.

    Args:
        evaluations: records as in `metrics.jsonl`.
        metric: name of a field of the records.
        greater: whether higher values are better.
        threshold: an improvement that ends the waiting is larger than this.
    """
    step, best, waited = None, -math.inf if greater else math.inf, 0
    for number, record in enumerate(evaluations):
        value = record.get(metric, IF_ABSENT.get(metric))
        value = math.nan if value is None else float(value)
        improves = value > best if greater else value < best
        waited = 0 if number == 0 or (improves and abs(value - best) > threshold) else waited + 1
        if improves:
            step, best = int(record["step"]), value
    return Ranking(step, best, waited)


def evaluations_of(run_dir: Path) -> list[dict[str, Any]]:
    """Return a run's held-out evaluations in the order of their steps, without those whose rows are not on disk."""
    records = {record["step"]: record for record in read_metrics(run_dir) if "eval_reward" in record}
    return [records[step] for step in sorted(records) if evaluation_path(run_dir, step).exists()]


def _alike(evaluations: Sequence[Record]) -> list[Record]:
    return [record for record in evaluations if record.get("eval_rows") == evaluations[-1].get("eval_rows")]


def ranking_of(args: ESConfig, evaluations: Sequence[Record]) -> Ranking:
    """Return the ranking of a run's evaluations; those of another number of rows than the last one are left out."""
    alike, metric = _alike(evaluations), metric_of(args, evaluations)
    return rank(alike, metric, is_greater_better(args, metric), args.early_stopping_threshold)


def stops_early(args: ESConfig, evaluations: Sequence[Record], steps_done: int) -> bool:
    """Return whether the evaluation after ``steps_done`` steps has used up ``early_stopping_patience``."""
    if not args.early_stopping_patience or not evaluations or evaluations[-1]["step"] != steps_done:
        return False
    return ranking_of(args, evaluations).waited >= args.early_stopping_patience


def choose(args: ESConfig, evaluations: Sequence[Record], steps_done: int) -> Best | None:
    """Return the choice of the run's model after ``steps_done`` steps; None: the model is that of the last step."""
    if not args.load_best_model_at_end or not evaluations:
        return None
    ranking, metric = ranking_of(args, evaluations), metric_of(args, evaluations)
    if ranking.step is None:
        return None
    return {
        "step": ranking.step,
        "metric": metric,
        "value": ranking.value,
        "greater_is_better": is_greater_better(args, metric),
        "global_step": steps_done,
    }


def chosen_state(run_dir: Path, journal: Journal) -> State | None:
    """Return the `es_state.json` of a run's model if it is the choice among all steps of the journal, else None."""
    state = read_state(run_dir)
    if state is None or "best" not in state or state["best"]["global_step"] != len(journal.steps):
        return None
    later = journal.steps[state["step"] :]
    return state if not later or later[0]["checksum"] == state["checksum"] else None


def described(best: Best, evaluations: Sequence[Record] = ()) -> str:
    """Return the choice of a run's model as text, with the last evaluation's value if it is known and another one."""
    text = (
        f"the model is step {best['step']} of {best['global_step']}, the best by {best['metric']}: {best['value']:.4g}"
    )
    last = evaluations[-1] if evaluations else None
    if last is None or last["step"] == best["step"]:
        return text
    value = last.get(best["metric"], IF_ABSENT.get(best["metric"]))
    return text if value is None else f"{text} (the last step: {value:.4g})"
