"""Warnings while a run trains: members that nobody hears, that break, or that get worse; each is given once.

What a step is compared with is told in `SigmaWatch`. A resumed run sees its earlier steps again and repeats no warning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from estune.console import warn
from estune.es.fitness import mean

SILENT = 0.9  # share of completions that equal theta's
LEAST_PROMPTS = 16  # whose mean says something of a trend
LEAST_ANSWERS = 16  # answers (N * B) that a comparison of the members with theta needs
LEAST_HELD_OUT = 50  # rows of an evaluation that is compared with the first
ENOUGH = 8  # members, prompts, or steps: fewer say little by themselves
PROBE = "`estune probe` tries several sizes"


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
        ranked = {} if self.rank is None else {"es/theta_rank": self.rank}
        return {"es/theta_fitness": None if math.isnan(self.fitness) else self.fitness, **ranked}


@dataclass
class SigmaWatch:
    """Warns, once each, of what keeps a run from learning: members that nobody hears, that break, or that get worse.

    The members are compared with theta where theta answered the same rows, as in the first step; otherwise with the
    best mean fitness so far. A step of few prompts says little of a trend, so that means are taken over as many steps
    as have `LEAST_PROMPTS` together.
    """

    population_size: int = LEAST_ANSWERS
    rows_per_step: int = LEAST_PROMPTS
    theta_fitness: float = math.nan  # theta_0's, on the first step's rows
    means: list[float] = field(default_factory=list)  # the population's mean fitness, step by step
    jumps: list[float] = field(default_factory=list)  # sum of the squared differences between them, so far
    errors: tuple[int, float] = (0, 0.0)  # steps whose standard error over prompts is known, and the sum of its squares
    best: dict[int, tuple[float, float]] = field(default_factory=dict)  # best mean over so many steps, and its error
    first_held_out: float | None = None  # reward of the first evaluation
    steps_seen: int = 0
    never_paid: dict[str, int] = field(default_factory=dict)  # steps in which a reward was None for everything
    warned: set[str] = field(default_factory=set)
    is_silent: bool = False  # while it sees what a run had told before

    @classmethod
    def of_run(
        cls,
        population_size: int,
        rows_per_step: int,
        fitness: Iterable[Sequence[float | None]],
        records: Iterable[Mapping[str, Any]] = (),
    ) -> SigmaWatch:
        """Return one that has seen a run's steps already; what they showed was told.

        Args:
            population_size: N.
            rows_per_step: B.
            fitness: (N,) of each journalled step; None stands for NaN.
            records: of `metrics.jsonl`.
        """
        watch, steps = cls(population_size, rows_per_step, is_silent=True), dict[int, Mapping[str, Any]]()
        for record in records:
            if "eval_reward" in record:
                watch.evaluation(record)
                continue
            steps[record["step"]] = record
            watch.know_theta(record)
            watch._look_at_completions(record)
            if watch._are_harmed(record):
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
            self._warn(
                "silent",
                f"{theta.equal:.0%} of the completions equal the unperturbed model's: sigma is too "
                f"small to change what it says; {PROBE}",
            )
        self._look_at_completions(record)
        self._look_at_rewards(record, unpaid)
        self.know_theta(record)
        now = record["es/fitness_mean"]
        if now is None:
            return
        if self._are_harmed(record):
            self._warn(
                "sigma",
                f"sigma {record['es/sigma']:g} is too large: the members' mean fitness is {now:.3g}, "
                f"theta's is {theta.fitness:.3g}; {PROBE}",
            )
        self._look_at_trend(now, _float(record.get("es/fitness_error")), record["es/fitness_std"] or 0.0)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Look at the metrics of an evaluation; its rows are always the same, the first time for theta_0."""
        broken, reward = record.get("eval_non_finite_ratio", 0.0), record["eval_reward"]
        if broken:
            self._warn(
                "broken theta",
                f"the logits behind {broken:.1%} of theta's completions of held-out rows are "
                "not finite: they count as wrong (eval_non_finite_ratio)",
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
                f"the logits behind {broken:.1%} of the members' completions are not finite: they "
                "count as failed rewards (completions/non_finite_ratio)",
            )
        if record["completions/clipped_ratio"] == 1.0:
            self._warn(
                "clipped",
                "every completion of every member was cut off at max_completion_length: raise it, or "
                "give --stop_strings",
            )
        elif record["completions/clipped_ratio"] == 0.0 and record["completions/mean_length"] <= 1.0:
            self._warn(
                "empty",
                "every completion of every member ended with its first token: see whether the prompts "
                "end as the model expects (chat template, --response_prefix)",
            )

    def _look_at_rewards(self, record: Mapping[str, Any], unpaid: Sequence[str]) -> None:
        self.steps_seen += 1
        for name in unpaid:
            self.never_paid[name] = self.never_paid.get(name, 0) + 1
            is_never = self.never_paid[name] == self.steps_seen
            if is_never and self.steps_seen * self.rows_per_step >= LEAST_PROMPTS:
                self._warn(
                    f"never {name}",
                    f"reward {name} returned None for every completion so far, so it has no part in the fitness",
                )
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

    def _look_at_trend(self, now: float, error: float, spread: float) -> None:
        """Compare with the best so far, over a few steps and over many; with theta_0, too, where one step will do."""
        best = dict(self.best)
        self._take(now, error)
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
            # where the first members, whose sigma was not too large, were as far below theta, nothing has fallen since
            if self._has_fallen(recent, theta, spread) and not self._has_fallen(first, theta, spread):
                self._warn(
                    "fell",
                    f"the population's mean fitness is {now:.3g}, theta's was {self.theta_fitness:.3g} "
                    f"before the first step: learning_rate or sigma is too large; {PROBE}",
                )

    def _has_fallen(self, now: tuple[float, float], before: tuple[float, float], spread: float) -> bool:
        """Return whether half of a mean is lost, and more than chance explains: both are (mean, standard error).

        The best of n means lies about sqrt(2 ln n) errors too high, the worst as far too low, which is 2 sqrt(ln n)
        errors of the difference.
        """
        if not math.isfinite(before[0]):
            return False
        noise = (1 + 2 * math.sqrt(math.log(max(1, len(self.means))))) * math.hypot(now[1], before[1])
        return now[0] < before[0] - max(abs(before[0]) / 2, spread, noise)

    @property
    def _windows(self) -> tuple[int, int]:
        """Steps whose means are taken together: as many as have prompts enough, and several times as many."""
        least = -(-LEAST_PROMPTS // self.rows_per_step)
        return least, least * ENOUGH

    def _take(self, now: float, error: float) -> None:
        """Take a step's mean fitness and its standard error over prompts, NaN where unknown."""
        jump = now - self.means[-1] if self.means else 0.0
        self.jumps.append(jump * jump + (self.jumps[-1] if self.jumps else 0.0))  # infinite where rewards are huge
        self.means.append(now)
        if error == error:
            self.errors = (self.errors[0] + 1, self.errors[1] + error * error)
        for steps in self._windows:
            recent = self._recent(steps)
            if recent is not None:
                self.best[steps] = max(self.best.get(steps, recent), recent)

    def _recent(self, steps: int) -> tuple[float, float] | None:
        """Return the mean of the latest steps and its standard error; None where that is unknown yet.

        The error is that of all steps so far, since a few prompts may agree by chance. Steps of one prompt have none;
        there it comes from the differences between a step and the next, which a steady rise hardly changes.
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
