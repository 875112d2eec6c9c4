"""Warnings during training: perturbations without effect, broken members, falling fitness. Each is printed once.

A resumed run reads its earlier steps' metrics, and does not repeat warnings that these steps have caused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from estune.console import warn
from estune.es.fitness import mean

SILENT = 0.9  # share of the members' completions that equal theta's; above it, sigma is too small
LEAST_PROMPTS = 16  # prompts whose mean fitness shows a trend
LEAST_ANSWERS = 16  # answers (N * B) that a comparison of the members with theta needs
LEAST_HELD_OUT = 50  # rows of an evaluation that is compared with the first evaluation
ENOUGH = 8  # members, prompts or steps: with fewer, chance decides
PROBE = "`estune probe` tries several sizes"


@dataclass(frozen=True)
class ThetaAnswers:
    """Theta's answers to a step's rows, compared with the members'; NaN: not measured."""

    equal: float = math.nan  # share of the members' completions that equal theta's
    fitness: float = math.nan  # theta's fitness on the step's rows
    rewards: np.ndarray | None = None  # theta's weighted rewards, (B, G)
    rank: int | None = None  # among theta and the N members; 1 is the best
    is_scored: bool = False  # whether theta's completions were scored; they then count as evaluations

    def record(self) -> dict[str, Any]:
        """Return theta's metrics; empty if its completions were not scored."""
        if not self.is_scored:
            return {}
        ranked = {} if self.rank is None else {"es/theta_rank": self.rank}
        return {"es/theta_fitness": None if math.isnan(self.fitness) else self.fitness, **ranked}


@dataclass
class SigmaWatch:
    """Warns once about each problem that prevents learning: a wrong sigma, broken members, falling fitness.

    If theta answered a step's rows too, as in step 1, the members are compared with theta. In other steps their mean
    fitness is compared with the best mean so far. A mean covers as many steps as have `LEAST_PROMPTS` prompts together,
    because a single step of few prompts shows no trend.
    """

    population_size: int = LEAST_ANSWERS
    rows_per_step: int = LEAST_PROMPTS
    theta_fitness: float = math.nan  # fitness of theta_0 on the first step's rows
    means: list[float] = field(default_factory=list)  # (steps,), the population's mean fitness
    jumps: list[float] = field(default_factory=list)  # (steps,), running sum of squared differences of ``means``
    # Number of steps with a known standard error over prompts, and the sum of the errors' squares.
    errors: tuple[int, float] = (0, 0.0)
    best: dict[int, tuple[float, float]] = field(default_factory=dict)  # steps per mean -> best mean, standard error
    first_held_out: float | None = None  # reward of the first evaluation
    steps_seen: int = 0
    steps_without_value: dict[str, int] = field(default_factory=dict)  # reward -> steps with None only
    warned: set[str] = field(default_factory=set)  # names of the warnings printed
    is_silent: bool = False  # True while a resumed run reads its earlier steps

    @classmethod
    def of_run(
        cls,
        population_size: int,
        rows_per_step: int,
        fitness: Iterable[Sequence[float | None]],
        records: Iterable[Mapping[str, Any]] = (),
    ) -> SigmaWatch:
        """Return a watch that has read a run's earlier steps and does not repeat their warnings.

        Args:
            population_size: N.
            rows_per_step: B.
            fitness: (steps, N), from the journal; None stands for NaN.
            records: the lines of `metrics.jsonl`.
        """
        watch, steps = cls(population_size, rows_per_step, is_silent=True), dict[int, Mapping[str, Any]]()
        for record in records:
            if "eval_reward" in record:
                watch.evaluation(record)
                continue
            steps[record["step"]] = record
            watch.store_theta_fitness(record)
            watch._look_at_completions(record)
            if watch._members_lost_fitness(record):
                watch.warned.add("sigma")
        for values in fitness:
            watch.steps_seen += 1
            known = np.array([value for value in values if value is not None])
            if known.size:
                error = _float(steps.get(watch.steps_seen, {}).get("es/fitness_error"))
                with np.errstate(over="ignore"):
                    spread = float(known.std())
                watch._look_at_trend(mean(known), error, spread)
        watch.is_silent = False
        return watch

    def store_theta_fitness(self, record: Mapping[str, Any]) -> None:
        """Store theta_0's fitness if ``record`` holds the first step's metrics and they include it."""
        if record["step"] == 1 and record.get("es/theta_fitness") is not None:
            self.theta_fitness = record["es/theta_fitness"]

    def needs_theta(self, modal_ratio: float) -> bool:
        """Return whether theta should answer a step's prompts, to find out whether its completions equal the members'.

        If members differ from one another, most of them also differ from theta.

        Args:
            modal_ratio: the members' `Rollouts.modal_ratio`.
        """
        return "silent" not in self.warned and modal_ratio > SILENT

    def step(self, record: Mapping[str, Any], theta: ThetaAnswers, without_value: Sequence[str] = ()) -> None:
        """Check a training step and print its warnings.

        Args:
            record: the step's metrics with theta's, and its number (1-based).
            theta: theta's answers to the step's rows.
            without_value: names of the reward functions that returned None for all completions.
        """
        if theta.equal > SILENT:
            self._warn(
                "silent",
                f"{theta.equal:.0%} of the completions equal those of the unperturbed model: sigma is too "
                f"small to change the completions; {PROBE}",
            )
        self._look_at_completions(record)
        self._look_at_rewards(record, without_value)
        self.store_theta_fitness(record)
        now = record["es/fitness_mean"]
        if now is None:
            return
        if self._members_lost_fitness(record):
            self._warn(
                "sigma",
                f"sigma {record['es/sigma']:g} is too large: the members' mean fitness is {now:.3g}, "
                f"theta's is {theta.fitness:.3g}; {PROBE}",
            )
        self._look_at_trend(now, _float(record.get("es/fitness_error")), record["es/fitness_std"] or 0.0)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Check an evaluation's metrics; the first evaluation is that of theta_0."""
        broken, reward = record.get("eval_non_finite_ratio", 0.0), record["eval_reward"]
        if broken:
            self._warn(
                "broken theta",
                f"the logits of {broken:.1%} of theta's completions of held-out rows are "
                "not finite: these completions count as wrong (eval_non_finite_ratio)",
            )
        if reward is None:
            return
        first = self.first_held_out = reward if self.first_held_out is None else self.first_held_out
        if record["eval_rows"] >= LEAST_HELD_OUT and first != 0 and reward < first - abs(first) / 2:
            self._warn(
                "worse",
                f"the held-out reward was {first:.3g} at first and is {reward:.3g} now: learning_rate "
                f"or sigma is too large; {PROBE}",
            )

    def _look_at_completions(self, record: Mapping[str, Any]) -> None:
        broken = record.get("completions/non_finite_ratio", 0.0)
        if broken:
            self._warn(
                "broken",
                f"the logits of {broken:.1%} of the members' completions are not finite: their rewards "
                "count as failed (completions/non_finite_ratio)",
            )
        if record["completions/clipped_ratio"] == 1.0:
            self._warn(
                "clipped",
                "every completion of every member was cut off at max_completion_length: raise it, or "
                "set --stop_strings",
            )
        elif record["completions/clipped_ratio"] == 0.0 and record["completions/mean_length"] <= 1.0:
            self._warn(
                "empty",
                "every completion of every member ended with its first token: check that the prompts "
                "end as the model expects (chat template, --response_prefix)",
            )

    def _look_at_rewards(self, record: Mapping[str, Any], without_value: Sequence[str]) -> None:
        self.steps_seen += 1
        for name in without_value:
            self.steps_without_value[name] = self.steps_without_value.get(name, 0) + 1
            is_never = self.steps_without_value[name] == self.steps_seen
            if is_never and self.steps_seen * self.rows_per_step >= LEAST_PROMPTS:
                self._warn(
                    f"never {name}",
                    f"reward {name} has returned None for every completion so far, so it does not affect the fitness",
                )
        if record["es/fitness_mean"] is None:
            what = "failed or was None" if record.get("es/reward_errors") else "was None"
            self._warn("nothing", f"every reward {what} in this step, so theta does not move")

    def _members_lost_fitness(self, record: Mapping[str, Any]) -> bool:
        """Return whether the members' mean and best fitness are far below theta's on the same rows.

        If the mean has lost most of theta's fitness over several prompts, the best member does not count: it may
        be above theta by luck. Measured on Countdown with the embedded model, for first steps of 4 to 30 members and 1
        to 32 prompts: the rule holds in fewer than 1 of 100 steps at the demo's sigma, and in nearly all steps with
        several prompts at sigma 0.1, which breaks that model.
        """
        theta, now, n_members = record.get("es/theta_fitness"), record["es/fitness_mean"], self.population_size
        if theta is None or now is None or n_members * self.rows_per_step < LEAST_ANSWERS:
            return False
        lost = theta - now
        lost_most = lost > 3 / 4 * abs(theta)
        all_below = record["es/fitness_best"] < theta
        is_sure = (all_below and (lost_most or n_members >= ENOUGH)) or (lost_most and self.rows_per_step >= ENOUGH)
        return is_sure and lost > max(abs(theta) / 2, record["es/fitness_std"] or 0.0)

    def _look_at_trend(self, now: float, error: float, spread: float) -> None:
        """Compare the recent mean fitness with the best mean so far, and with theta_0's if one step is enough."""
        best = dict(self.best)
        self._add_step(now, error)
        for steps in self._windows:
            recent = self._recent(steps)
            if recent is None:
                continue
            if steps in best and self._has_fallen(recent, best[steps], spread):
                self._warn(
                    "halved",
                    "the population's mean fitness has halved since its best step: sigma or "
                    f"learning_rate is too large; {PROBE}",
                )
                continue
            if steps > 1 or len(self.means) == 1 or self.warned & {"sigma", "halved"}:
                continue
            first, theta = (self.means[0], recent[1]), (self.theta_fitness, recent[1])
            # If the first step's members were equally far below theta, the fitness has not fallen since then.
            if self._has_fallen(recent, theta, spread) and not self._has_fallen(first, theta, spread):
                self._warn(
                    "fell",
                    f"the population's mean fitness is {now:.3g}, theta's was {self.theta_fitness:.3g} "
                    f"before the first step: learning_rate or sigma is too large; {PROBE}",
                )

    def _has_fallen(self, now: tuple[float, float], before: tuple[float, float], spread: float) -> bool:
        """Return whether a mean has halved by more than chance explains; both arguments are (mean, standard error).

        The best of n means is about sqrt(2 ln n) standard errors too high, and the worst equally far too low. Together
        that is 2 sqrt(ln n) standard errors of the difference.
        """
        if not math.isfinite(before[0]):
            return False
        noise = (1 + 2 * math.sqrt(math.log(max(1, len(self.means))))) * math.hypot(now[1], before[1])
        return now[0] < before[0] - max(abs(before[0]) / 2, spread, noise)

    @property
    def _windows(self) -> tuple[int, int]:
        """Two numbers of steps to average over: those with `LEAST_PROMPTS` prompts, and `ENOUGH` times as many."""
        least = -(-LEAST_PROMPTS // self.rows_per_step)
        return least, least * ENOUGH

    def _add_step(self, now: float, error: float) -> None:
        """Add a step's mean fitness and its standard error over prompts (NaN: unknown)."""
        jump = now - self.means[-1] if self.means else 0.0
        self.jumps.append(jump * jump + (self.jumps[-1] if self.jumps else 0.0))  # infinite if rewards are huge
        self.means.append(now)
        if error == error:
            self.errors = (self.errors[0] + 1, self.errors[1] + error * error)
        for steps in self._windows:
            recent = self._recent(steps)
            if recent is not None:
                self.best[steps] = max(self.best.get(steps, recent), recent)

    def _recent(self, steps: int) -> tuple[float, float] | None:
        """Return the mean fitness of the latest steps and its standard error, or None if the error is unknown.

        The error is pooled over all steps so far, because a few prompts may agree by chance. Steps of one prompt have
        no error over prompts; their error comes from the differences between consecutive steps, which a steady rise
        hardly changes.
        """
        recent, before = self.means[-steps:], len(self.means) - steps
        if before < 0:
            return None
        count, squares = self.errors
        if not count and before >= ENOUGH:
            count, squares = before - 1, self.jumps[before - 1] / 2
        elif not count and steps > 1:
            return None
        return mean(np.array(recent)), math.sqrt(squares / max(count, 1) / steps)

    def _warn(self, what: str, text: str) -> None:
        if what not in self.warned:
            self.warned.add(what)
            if not self.is_silent:
                warn(text)


def _float(value: float | None) -> float:
    """Return a number of JSON; NaN for None."""
    return math.nan if value is None else value
