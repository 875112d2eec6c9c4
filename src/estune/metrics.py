"""What `metrics.jsonl` says of a step and of an evaluation: TRL's metric names where TRL has one, else `es/`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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
LEAST_PROMPTS = 16  # whose mean says something of a trend
LEAST_ANSWERS = 16  # of the members to a step's rows, N * B, which can be compared with theta's
ENOUGH = 8  # members, prompts, or steps: fewer say little by themselves
TREND_ERRORS = 3.0  # standard errors that a trend over steps of few prompts must exceed
PROBE = "`estune probe` tries several sizes"


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
        "completions/non_finite_ratio": rollouts.non_finite_ratio,
        "es/frac_modal": rollouts.modal_ratio,
        "es/fitness_best": _number(float(known.max()) if known.size else np.nan),
        "es/fitness_mean": _number(mean(fitness)),
        "es/fitness_std": _number(float(known.std()) if known.size else np.nan),
        "es/reward_errors": int(rollouts.failed.sum()),
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


@dataclass(frozen=True)
class BesideMembers:
    """How theta itself answered a step's rows, beside the members; NaN where that was not measured."""

    equal: float = math.nan  # share of the members' completions that equal theta's
    fitness: float = math.nan
    rank: int | None = None  # among N + 1, 1 for the best
    is_scored: bool = False  # its completions were scored, and count as evaluations

    def record(self) -> dict[str, Any]:
        """Return theta's metrics; empty where its completions were not scored."""
        if not self.is_scored:
            return {}
        return {"es/theta_fitness": _number(self.fitness)} | ({} if self.rank is None else {"es/theta_rank": self.rank})


@dataclass
class Watch:
    """Warns, once each, of what keeps a run from learning: members that nobody hears, that break, or that get worse.

    The members are compared with theta where theta answered the same rows, as in the first step; otherwise with the
    best mean fitness so far. A step of few prompts says little of a trend, so that means are taken over as many steps
    as have `LEAST_PROMPTS` together.
    """

    population_size: int = LEAST_ANSWERS
    rows_per_step: int = LEAST_PROMPTS
    theta_fitness: float = math.nan  # theta_0's, on the first step's rows
    means: list[float] = field(default_factory=list)  # the population's mean fitness, step by step
    best_mean: float = -math.inf  # over enough prompts
    best_error: float = 0.0  # its standard error, as far as known
    first_held_out: float | None = None  # reward of the first evaluation
    steps_seen: int = 0
    never_paid: dict[str, int] = field(default_factory=dict)  # steps in which a reward was None for everything
    warned: set[str] = field(default_factory=set)

    @classmethod
    def of_run(
        cls,
        population_size: int,
        rows_per_step: int,
        fitness: Iterable[Sequence[float | None]],
        records: Iterable[Mapping[str, Any]] = (),
    ) -> Watch:
        """Return one that has seen a run's steps already; what they showed was told.

        Args:
            population_size: N.
            rows_per_step: B.
            fitness: (N,) of each journalled step; None stands for NaN.
            records: of `metrics.jsonl`.
        """
        watch = cls(population_size, rows_per_step)
        for record in records:
            if "eval_reward" in record:
                watch.first_held_out = record["eval_reward"] if watch.first_held_out is None else watch.first_held_out
            else:
                watch.know_theta(record)
                if watch._are_harmed(record):
                    watch.warned.add("sigma")
        for values in fitness:
            watch.steps_seen += 1
            watch._take(mean(np.array(values, dtype=np.float64)))
        return watch

    def know_theta(self, record: Mapping[str, Any]) -> None:
        """Take theta_0's fitness from the first step's metrics."""
        if record["step"] == 1 and record.get("es/theta_fitness") is not None:
            self.theta_fitness = record["es/theta_fitness"]

    def wants_theta(self, modal_ratio: float) -> bool:
        """Return whether theta should answer a step's prompts, because the members agree so much with one another.

        Unless they do, the share of their completions that equal theta's cannot be large either.
        """
        return "silent" not in self.warned and modal_ratio > SILENT

    def step(self, record: Mapping[str, Any], theta: BesideMembers, unpaid: Sequence[str] = ()) -> None:
        """Look at a training step.

        Args:
            record: its metrics, theta's among them, and its number (1-based).
            theta: how theta answered its rows.
            unpaid: reward functions that returned None for all of its completions.
        """
        if theta.equal > SILENT:
            self._warn("silent", f"{theta.equal:.0%} of the completions equal the unperturbed model's: sigma is too "
                       f"small to change what it says; {PROBE}")  # fmt: skip
        self._look_at_completions(record)
        self._look_at_rewards(record, unpaid)
        self.know_theta(record)
        now = record["es/fitness_mean"]
        if now is None:
            return
        if self._are_harmed(record):
            self._warn("sigma", f"sigma {record['es/sigma']:g} is too large: the members' mean fitness is {now:.3g}, "
                       f"theta's is {theta.fitness:.3g}; {PROBE}")  # fmt: skip
        self._look_at_trend(now, record["es/fitness_std"] or 0.0)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Look at the metrics of an evaluation; its rows are always the same, the first time for theta_0."""
        broken, reward = record.get("eval_non_finite_ratio", 0.0), record["eval_reward"]
        if broken:
            self._warn("broken theta", f"the logits behind {broken:.1%} of theta's completions of held-out rows are "
                       "not finite: they count as wrong (eval_non_finite_ratio)")  # fmt: skip
        if reward is None:
            return
        first = self.first_held_out = reward if self.first_held_out is None else self.first_held_out
        if record["eval_rows"] >= LEAST_PROMPTS and reward < first - abs(first) / 2:
            self._warn("worse", f"the held-out reward was {first:.3g} at first and is {reward:.3g} now: learning_rate "
                       f"or sigma is too large; {PROBE}")  # fmt: skip

    def _look_at_completions(self, record: Mapping[str, Any]) -> None:
        broken = record["completions/non_finite_ratio"]
        if broken:
            self._warn("broken", f"the logits behind {broken:.1%} of the members' completions are not finite: they "
                       "count as failed rewards (completions/non_finite_ratio)")  # fmt: skip
        if record["completions/clipped_ratio"] == 1.0:
            self._warn("clipped", "every completion of every member was cut off at max_completion_length: raise it, or "
                       "give --stop_strings")  # fmt: skip
        elif record["completions/clipped_ratio"] == 0.0 and record["completions/mean_length"] <= 1.0:
            self._warn("empty", "every completion of every member ended with its first token: see whether the prompts "
                       "end as the model expects (chat template, --response_prefix)")  # fmt: skip

    def _look_at_rewards(self, record: Mapping[str, Any], unpaid: Sequence[str]) -> None:
        self.steps_seen += 1
        for name in unpaid:
            self.never_paid[name] = self.never_paid.get(name, 0) + 1
            is_never = self.never_paid[name] == self.steps_seen
            if is_never and self.steps_seen * self.rows_per_step >= LEAST_PROMPTS:
                self._warn(f"never {name}", f"reward {name} returned None for every completion so far, so it has no "
                           "part in the fitness")  # fmt: skip
        if record["es/fitness_mean"] is None:
            self._warn("nothing", "no reward applied to anything in this step, so theta stays")

    def _are_harmed(self, record: Mapping[str, Any]) -> bool:
        """Return whether the members are far worse than theta on the same rows: their mean, and also their best.

        Where most of the fitness is lost over several prompts, the best one may be lucky. On Countdown with the
        embedded model and the demo's sigma the rule holds in fewer than 1 of 100 first steps of 4 to 30 members and 1
        to 32 prompts; at 0.1, which breaks that model, in nearly all of those with several prompts.
        """
        theta, now, n_members = record.get("es/theta_fitness"), record["es/fitness_mean"], self.population_size
        if theta is None or now is None or n_members * self.rows_per_step < LEAST_ANSWERS:
            return False
        lost = theta - now
        is_deep = lost > 3 / 4 * abs(theta)
        is_best = record["es/fitness_best"] < theta
        is_sure = (is_best and (is_deep or n_members >= ENOUGH)) or (is_deep and self.rows_per_step >= ENOUGH)
        return is_sure and lost > max(abs(theta) / 2, record["es/fitness_std"] or 0.0)

    def _look_at_trend(self, now: float, spread: float) -> None:
        """Compare with the best so far; with theta_0, too, where one step has prompts enough."""
        best, error = self.best_mean, self.best_error
        recent = self._take(now)
        if recent is None:
            return
        value, noise = recent[0], TREND_ERRORS * math.hypot(recent[1], error)
        if self._has_fallen(value, best, max(spread, noise)):
            self._warn("halved", "the population's mean fitness has halved since its best step: sigma or learning_rate "
                       f"is too large; {PROBE}")  # fmt: skip
        elif self._window == 1 and "sigma" not in self.warned and self._has_fallen(value, self.theta_fitness, spread):
            self._warn("halved", f"the population's mean fitness is {value:.3g}, theta's was {self.theta_fitness:.3g} "
                       f"before the first step: learning_rate or sigma is too large; {PROBE}")  # fmt: skip

    def _has_fallen(self, value: float, reference: float, noise: float) -> bool:
        """Return whether half of the reference is lost, and more than noise explains; False where it is unknown."""
        return math.isfinite(reference) and value < reference - max(abs(reference) / 2, noise)

    @property
    def _window(self) -> int:
        """Steps whose prompts together are enough for a mean."""
        return -(-LEAST_PROMPTS // self.rows_per_step)

    def _take(self, now: float) -> tuple[float, float] | None:
        """Take a step's mean fitness; return the latest mean over enough prompts and its error, None where unknown."""
        if now != now:
            return None
        self.means.append(now)
        steps = self._window
        recent, before = self.means[-steps:], self.means[:-steps]
        if steps > 1 and len(before) < ENOUGH:
            return None
        # of the differences between a step and the next, which a steady rise hardly changes
        error = float(np.sqrt(np.mean(np.diff(before) ** 2) / 2 / steps)) if steps > 1 else 0.0
        value = mean(np.array(recent))
        if value > self.best_mean:
            self.best_mean, self.best_error = value, error
        return value, error

    def _warn(self, what: str, text: str) -> None:
        if what not in self.warned:
            self.warned.add(what)
            warn(text)


def _number(value: float) -> float | None:
    """Return a JSON number, or None for NaN."""
    return None if value != value else value
