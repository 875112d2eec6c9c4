"""The metrics of steps and evaluations in `metrics.jsonl`: TRL's name if TRL has the metric, otherwise `es/...`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from estune.console import warn
from estune.es.fitness import mean, share_of_tied_prompts, weigh
from estune.es.theta import Moved
from estune.train.evaluation import Evaluation
from estune.train.groups import Rollouts

if TYPE_CHECKING:
    from estune.train.setup import Rewards

COARSE_COSINE = 0.9  # cosine; below it, rounding has changed a perturbation too much
MOST_MESSAGES, MESSAGE_LENGTH = 5, 200  # messages of a function's failures in a step's record; characters of each
OTHER_MESSAGES, NOT_FINITE = "other messages", "the completion's logits were not finite"


@dataclass(frozen=True)
class Timing:
    """Clock readings of a step, in seconds."""

    started: float
    update_started: float
    ended: float


def step_metrics(rewards: np.ndarray, spec: Rewards, fitness: np.ndarray, rollouts: Rollouts) -> dict[str, Any]:
    """Return a training step's metrics before its update.

    Args:
        rewards: (N, B, G, F), failures filled.
        spec: names and weights of the reward functions.
        fitness: (N,).
        rollouts: of the members.
    """
    weighed = weigh(rewards, spec.weights)  # (N, B, G)
    lengths = rollouts.lengths  # (N, B, G)
    generate_s = sum(group.generate_s for group in rollouts.groups)
    perturb_s = sum(group.perturb_s for group in rollouts.groups)
    known = fitness[~np.isnan(fitness)]
    record: dict[str, Any] = {
        "reward": number(mean(weighed)),
        "reward_std": number(spread(weighed)),
        **{name: number(value) for name, value in of_functions(spec.names, rewards).items()},
        "frac_reward_zero_std": share_of_tied_prompts(weighed),
        **_lengths(lengths, np.array([group.finished for group in rollouts.groups])),
        "completions/clipped_ratio": rollouts.clipped_ratio,
        "completions/non_finite_ratio": rollouts.non_finite_ratio,
        "es/frac_modal": rollouts.modal_ratio,
        "es/fitness_best": number(float(known.max()) if known.size else np.nan),
        "es/fitness_mean": number(mean(fitness)),
        "es/fitness_std": number(float(known.std()) if known.size else np.nan),
        "es/fitness_error": number(_error_over_prompts(weighed)),
        "es/reward_errors": int(rollouts.failed.sum()),
        **{f"rewards/{name}/errors": int(rollouts.failed[..., f].sum()) for f, name in enumerate(spec.names)},
        **_without_reward(spec.names, rollouts),
        "es/perturb_s": perturb_s,
        "es/generate_s": generate_s,
        "es/score_s": rollouts.score_wait_s,
        "es/tokens_per_s": float(lengths.sum()) / max(generate_s + perturb_s, 1e-9),
    }
    for name in sorted({name for group in rollouts.groups for name in group.metrics}):
        values = [group.metrics[name] for group in rollouts.groups if name in group.metrics]
        record[_free_name(name, record)] = mean(np.array(values))
    return record


def spread(values: np.ndarray) -> float:
    """Return the population standard deviation of the values that are not NaN, or NaN if all are NaN."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.nanstd(values)) if np.isfinite(values).any() else math.nan


def of_functions(names: Sequence[str], rewards: np.ndarray) -> dict[str, float]:
    """Return mean and standard deviation of each reward function's rewards (..., F); NaN if it never applies."""
    columns = {name: rewards[..., f] for f, name in enumerate(names)}
    means = {f"rewards/{name}/mean": mean(column) for name, column in columns.items()}
    return means | {f"rewards/{name}/std": spread(column) for name, column in columns.items()}


def _lengths(lengths: np.ndarray, finished: np.ndarray) -> dict[str, float]:
    """Return TRL's metrics of lengths: of all completions, and of those that ended before the length limit.

    Args:
        lengths: (N, B, G), in tokens.
        finished: (N, B, G).
    """
    ended = lengths[finished] if finished.any() else np.zeros(1)  # 0 if no completion ended, as in TRL
    return {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/mean_terminated_length": float(ended.mean()),
        "completions/min_terminated_length": float(ended.min()),
        "completions/max_terminated_length": float(ended.max()),
    }


def _without_reward(names: Sequence[str], rollouts: Rollouts) -> dict[str, Any]:
    """Return for each reward function how often it returned None, and the messages of its failed calls.

    ``rewards/<name>/none`` counts completions. ``rewards/<name>/failed_calls`` counts members by the first failure
    in their completions: message -> members. It is absent if no call failed.
    """
    found: dict[str, Any] = {}
    for f, name in enumerate(names):
        failed = rollouts.failed[..., f]  # (N, B, G)
        found[f"rewards/{name}/none"] = int((np.isnan(rollouts.rewards[..., f]) & ~failed).sum())
        members = np.flatnonzero(failed.any(axis=(1, 2)))
        messages = Counter(_message(rollouts.groups[m].errors, name) for m in members)
        if messages:
            kept = messages.most_common(MOST_MESSAGES)
            rest = messages.total() - sum(count for _, count in kept)
            found[f"rewards/{name}/failed_calls"] = dict(kept) | ({OTHER_MESSAGES: rest} if rest else {})
    return found


def _message(errors: Sequence[str], name: str) -> str:
    """Return the message of a function's failure, as one line, from a member's errors, which begin with names."""
    for error in errors:
        if error.startswith(f"{name}: "):
            return " ".join(error.removeprefix(f"{name}: ").split())[:MESSAGE_LENGTH]
    return NOT_FINITE  # the function was not at fault


def _free_name(name: str, record: dict[str, Any]) -> str:
    """Return the name of a metric that a reward function logged, under ``user/`` if estune uses that name."""
    taken = name in record or name in ("step", "num_tokens", "learning_rate", "step_time")
    return f"user/{name}" if taken or name.startswith(("eval_", "es/")) else name


def update_metrics(measured: dict[str, Any], moved: Moved, timing: Timing | None) -> dict[str, Any]:
    """Return the metrics of an update.

    ``timing`` is None if a resume logs a step of a killed process: ``step_time`` is then the sum of the times in
    ``measured``, in seconds.
    """
    parts_s = measured["es/perturb_s"] + measured["es/generate_s"] + measured["es/score_s"]
    return {
        "es/update_norm": moved.norm,
        "es/update_ratio": moved.ratio,
        "es/update_s": timing.ended - timing.update_started if timing else None,
        "step_time": timing.ended - timing.started if timing else parts_s,
    }


def evaluation_record(evaluation: Evaluation) -> dict[str, Any]:
    """Return an evaluation's metrics under their ``eval_`` names."""
    summary = evaluation.summary()
    others = {f"eval_{name}": value for name, value in summary.items() if name not in ("n", "reward", "rewards")}
    others |= {f"eval_rewards/{name}/mean": value for name, value in summary.get("rewards", {}).items()}
    return {"eval_rows": summary["n"], "eval_reward": summary["reward"], **others}


def warn_of_coarse_weights(cosines: dict[str, float]) -> None:
    """Warn of kinds of parameters for which the compute dtype rounds too much of the perturbation away."""
    for kind, cosine in sorted(cosines.items()):
        if cosine < COARSE_COSINE:
            warn(
                f"the rounded perturbation of {kind} parameters has cosine {cosine:.2f} with the exact perturbation: "
                "the compute dtype is too coarse for this sigma; raise sigma or use --dtype float32"
            )


def _error_over_prompts(weighed: np.ndarray) -> float:
    """Return the standard error over prompts of the mean of weighted rewards (N, B, G); NaN if it is unknown."""
    of_prompts = np.array([mean(weighed[:, b]) for b in range(weighed.shape[1])])  # (B,)
    of_prompts = of_prompts[~np.isnan(of_prompts)]
    if of_prompts.size < 2:
        return math.nan
    with np.errstate(over="ignore", invalid="ignore"):
        error = float(of_prompts.std(ddof=1)) / math.sqrt(of_prompts.size)
    return error if math.isfinite(error) else math.nan


def number(value: float) -> float | None:
    """Return a JSON number, or None for NaN and infinity."""
    return value if math.isfinite(value) else None
