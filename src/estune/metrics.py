"""What `metrics.jsonl` says of a step and of an evaluation: TRL's metric names where TRL has one, else `es/`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from estune.console import warn
from estune.evaluation import Evaluation
from estune.fitness import mean, share_of_tied_prompts, weigh
from estune.master import Moved
from estune.rollouts import Rollouts

if TYPE_CHECKING:
    from estune.inputs import Rewards

COARSE_COSINE = 0.9
SILENT = 0.9  # share of completions that equal theta's


@dataclass(frozen=True)
class Timing:
    """Clock readings of a step, in seconds."""

    started: float
    update_started: float
    ended: float


def step_metrics(rewards: np.ndarray, spec: Rewards, fitness: np.ndarray, rollouts: Rollouts) -> dict[str, Any]:
    """Return a training step's metrics before its update, from filled rewards (N, B, G, F) and fitness (N,)."""
    weighed = weigh(rewards, spec.weights)  # (N, B, G)
    lengths = rollouts.lengths  # (N, B, G)
    generate_s = sum(group.generate_s for group in rollouts.groups)
    perturb_s = sum(group.perturb_s for group in rollouts.groups)
    known = fitness[~np.isnan(fitness)]
    record: dict[str, Any] = {
        "reward": _number(mean(weighed)),
        "reward_std": _number(float(np.nanstd(weighed)) if np.isfinite(weighed).any() else np.nan),
        **{f"rewards/{name}/mean": _number(mean(rewards[..., f])) for f, name in enumerate(spec.names)},
        "frac_reward_zero_std": share_of_tied_prompts(weighed),
        "completions/mean_length": float(lengths.mean()),
        "completions/clipped_ratio": rollouts.clipped_ratio,
        "es/frac_modal": rollouts.modal_ratio,
        "es/fitness_best": _number(float(known.max()) if known.size else np.nan),
        "es/fitness_mean": _number(mean(fitness)),
        "es/fitness_std": _number(float(known.std()) if known.size else np.nan),
        "es/reward_errors": int(rollouts.failed.sum()),
        **{f"rewards/{name}/errors": int(rollouts.failed[..., f].sum()) for f, name in enumerate(spec.names)},
        "es/perturb_s": perturb_s,
        "es/generate_s": generate_s,
        "es/score_s": rollouts.score_wait_s,
        "es/tokens_per_s": float(lengths.sum()) / max(generate_s + perturb_s, 1e-9),
    }
    for name in sorted({name for group in rollouts.groups for name in group.metrics}):
        values = [group.metrics[name] for group in rollouts.groups if name in group.metrics]
        record[_free_name(name, record)] = mean(np.array(values))
    return record


def _free_name(name: str, record: dict[str, Any]) -> str:
    """Return a reward's own metric name, put under ``user/`` where it would pass for one of ours."""
    taken = name in record or name in ("step", "num_tokens", "learning_rate", "step_time")
    return f"user/{name}" if taken or name.startswith(("eval_", "es/")) else name


def update_metrics(measured: dict[str, Any], moved: Moved, timing: Timing | None) -> dict[str, Any]:
    """Return what is known once theta has moved; without ``timing`` (a killed run) the time of its parts."""
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
    record = {"eval_rows": summary.pop("n"), "eval_reward": summary.pop("reward")}
    return record | {f"eval_{name}": value for name, value in summary.items()}


def warn_of_coarse_weights(cosines: dict[str, float]) -> None:
    """Warn where the compute dtype rounds the perturbation away."""
    for kind, cosine in sorted(cosines.items()):
        if cosine < COARSE_COSINE:
            warn(f"the perturbation of {kind} parameters has cosine {cosine:.2f} with the exact one: "
                 "the compute dtype is too coarse for this sigma; raise sigma or use --dtype float32")  # fmt: skip


@dataclass
class Watch:
    """Warns, once each, of what `estune probe` would have shown: a population that nobody hears, or that breaks."""

    best_mean: float = -math.inf  # of the population's fitness so far
    warned: set[str] = field(default_factory=set)

    @classmethod
    def of_steps(cls, fitness: Iterable[Sequence[float | None]]) -> Watch:
        """Return one that has seen steps already, from their members' fitness (N,) each; None stands for NaN."""
        means = [mean(np.array(values, dtype=np.float64)) for values in fitness]
        return cls(max((value for value in means if value == value), default=-math.inf))

    def step(self, record: dict[str, Any], equal_to_theta: Callable[[], float]) -> None:
        """Look at a training step's metrics; ``equal_to_theta`` gives the share of completions that equal theta's.

        It is asked only where the members' most frequent completions have so large a share, without which theta's
        cannot: theta has to answer for it.
        """
        if "silent" not in self.warned and record["es/frac_modal"] > SILENT:
            share = equal_to_theta()
            if share > SILENT:
                self._warn("silent", f"{share:.0%} of the completions equal the unperturbed model's: sigma is too "
                           "small to change what it says")  # fmt: skip
        mean_now = record["es/fitness_mean"]
        if mean_now is None:
            return
        spread = record["es/fitness_std"] or 0.0
        if mean_now < self.best_mean - max(abs(self.best_mean) / 2, spread):  # within the spread it may be the prompts
            self._warn("halved", "the population's mean fitness has halved since its best step: sigma or "
                       "learning_rate is too large")  # fmt: skip
        self.best_mean = max(self.best_mean, mean_now)

    def _warn(self, what: str, text: str) -> None:
        if what not in self.warned:
            self.warned.add(what)
            warn(f"{text}; `estune probe` tries several sizes")


def _number(value: float) -> float | None:
    """Return a JSON number, or None for NaN."""
    return None if value != value else value
