"""Step control: how large a step the evidence of its population allows (docs/method.md).

z-scored utilities have the same length whether the ranking of the members is knowledge or chance. So at a peak of the
fitness theta walks at random with steps of full length, and every step costs fitness. Step control measures three
quantities and bounds the learning rate by them:

* the reliability of the ranking, from the table of rewards of N members on B prompts (a two-way analysis of variance):
  the share of the variance between members that would be there again on other prompts;
* a step's gain per unit of the learning rate, which is what the reliable part of the fitness promises;
* a step's drift, which is the loss that its random part causes per square of the learning rate. The population itself
  measures it: members lie below theta, and a step as long as a perturbation loses what a perturbation loses.

A bound of drift slows a run that still advances. So the control ``drift`` bounds only steps in which the members' mean
fitness does not rise. In the first steps it leaves a tenth of the rate, so that a run without evidence yet moves.

All sums are exact (`math.fsum`), so a step's values depend on its rewards alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

SMOOTHING = 0.8  # weight of the earlier steps in the running means
LARGEST = 1e140  # rewards and utilities are clipped to this absolute value, so that sums of squares do not overflow
DRIFT_SHARE = 0.02  # of a step's gain: how much the control ``drift`` lets its random part lose
FAST, SLOW = 0.6, 0.85  # weights of the earlier steps in the two means whose difference is the trend
CHANGE_SMOOTHING = 0.9  # weight of the earlier steps in the mean square of the changes
FIRST_CHANGES = 7  # changes of the fitness from step to step after which a run's first steps are over
FIRST_FACTOR = 0.1  # of the learning rate: what drift leaves in the first steps at least
TREND_DEVIATION = 0.29  # standard deviation of the trend, in units of one step's mean, if steps are independent


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one step's population says about its ranking; NaN: unknown."""

    members: float = math.nan  # mean square between members, or between the half differences of pairs
    residual: float = math.nan  # mean square of members by prompts
    even: float = math.nan  # reliability of the pairs' means, in which the gradient has no part
    drop: float = math.nan  # theta's fitness minus the members' mean fitness
    mean: float = math.nan  # the members' mean fitness

    @property
    def reliability(self) -> float:
        """Share of the variance between members that is not chance, estimated from this step alone."""
        return _share(self.members, self.residual)


UNKNOWN = Evidence()


@dataclass(frozen=True, slots=True)
class Signal:
    """Exponential means of `Evidence` over the steps of a run. Means of nothing have weight 0."""

    members: float = 0.0
    residual: float = 0.0
    weight: float = 0.0  # of the two means above
    drop: float = 0.0
    drop_weight: float = 0.0
    latest: float | None = None  # mean fitness of the latest step; None before the first
    fast: float = 0.0  # mean over the steps of the mean fitness, most weight on the latest
    slow: float = 0.0
    change: float = 0.0  # half the square of the mean fitness's change from step to step: a step's own variance
    change_weight: float = 0.0

    def after(self, evidence: Evidence) -> Signal:
        """Return the means after one more step; unknown values change nothing."""
        signal = self
        if not math.isnan(evidence.residual):
            signal = replace(
                signal,
                members=_blend(self.members, evidence.members),
                residual=_blend(self.residual, evidence.residual),
                weight=_blend(self.weight, 1.0),
            )
        if not math.isnan(evidence.drop):
            signal = replace(signal, drop=_blend(self.drop, evidence.drop), drop_weight=_blend(self.drop_weight, 1.0))
        mean = evidence.mean
        if math.isnan(mean):
            return signal
        if self.latest is None:
            return replace(signal, latest=mean, fast=mean, slow=mean)
        return replace(
            signal,
            latest=mean,
            fast=_blend(self.fast, mean, FAST),
            slow=_blend(self.slow, mean, SLOW),
            change=_blend(self.change, (mean - self.latest) ** 2 / 2, CHANGE_SMOOTHING),
            change_weight=_blend(self.change_weight, 1.0, CHANGE_SMOOTHING),
        )

    @property
    def reliability(self) -> float:
        """Share of the variance between members that is not chance, in [0, 1]; NaN before the first evidence."""
        if not self.weight:
            return math.nan
        return _share(self.members, self.residual)

    @property
    def mean_drop(self) -> float:
        """How far the members' mean lies below theta's fitness; NaN if theta never answered."""
        return self.drop / self.drop_weight if self.drop_weight else math.nan

    @property
    def is_first(self) -> bool:
        """Whether the step is one of the first, whose evidence is of few populations."""
        return self.change_weight < 1.0 - CHANGE_SMOOTHING**FIRST_CHANGES - 1e-9

    @property
    def rises(self) -> bool:
        """Whether the members' mean fitness rises, by more than two standard deviations of the trend."""
        if not self.change_weight:
            return False
        return self.fast - self.slow > 2 * TREND_DEVIATION * math.sqrt(self.change / self.change_weight)


def _share(members: float, residual: float) -> float:
    """Return the reliability that two mean squares imply, in [0, 1]; 0 if all members tie, NaN if they are unknown."""
    if math.isnan(members):
        return math.nan
    return max(0.0, 1.0 - residual / members) if members > 0 else 0.0


def _clipped(value: float) -> float:
    """Return the value within ±`LARGEST`; NaN stays NaN."""
    return value if math.isnan(value) else max(-LARGEST, min(LARGEST, value))


def _blend(mean: float, value: float, weight: float = SMOOTHING) -> float:
    return weight * mean + (1.0 - weight) * value


def evidence_of(rows: np.ndarray, antithetic: bool, drop: float = math.nan) -> Evidence:
    """Return the evidence of weighted rewards (N, B, G).

    Args:
        rows: rewards; a prompt without a reward for some member (NaN) is left out.
        antithetic: members are pairs (+, -). Half the difference of a pair holds the gradient's part of the fitness
            alone; the mean of a pair holds the curvature's, which is reliable and tells no direction.
        drop: theta's fitness minus the members' mean fitness, on the same prompts.
    """
    table = _complete(_means_of_prompts(rows), 2 if antithetic else 1)  # (N, B)
    drop = _clipped(drop)
    if table.shape[1] < 2 or table.shape[0] < (4 if antithetic else 2):
        return Evidence(drop=drop)
    mean = _mean(table)
    if not antithetic:
        members, residual = _mean_squares(table - _columns(table), len(table) - 1)
        return Evidence(members, residual, drop=drop, mean=mean)
    plus, minus = table[0::2], table[1::2]  # (P, B)
    members, residual = _mean_squares((plus - minus) / 2, len(plus))
    middle = (plus + minus) / 2
    even = _share(*_mean_squares(middle - _columns(middle), len(plus) - 1))
    return Evidence(members, residual, even, drop, mean)


def drop_of(rows: np.ndarray, theta: np.ndarray) -> float:
    """Return theta's fitness minus the members' mean fitness, on the prompts for which all have a reward; else NaN.

    Args:
        rows: weighted rewards (N, B, G); members without any reward are left out.
        theta: theta's weighted rewards (B, G) on the same prompts.
    """
    means, own = _means_of_prompts(rows), _means_of_prompts(theta[None])[0]  # (N, B), (B,)
    means = means[~np.isnan(means).all(axis=1)]
    known = ~np.isnan(means).any(axis=0) & ~np.isnan(own)
    return _mean(own[known]) - _mean(means[:, known]) if known.any() and len(means) else math.nan


def _means_of_prompts(rows: np.ndarray) -> np.ndarray:
    """Return the mean over completions of clipped rewards, (N, B, G) -> (N, B)."""
    clipped = np.clip(rows, -LARGEST, LARGEST)
    return np.array([[_mean(cell) for cell in member] for member in clipped])


def _mean_squares(values: np.ndarray, freedom: int) -> tuple[float, float]:
    """Return the mean squares between the rows of a table (M, B), whose columns have the mean 0, and of the residuals.

    ``freedom`` is the degrees of freedom of a column: M, or M - 1 if the columns were centered.
    """
    n_prompts = values.shape[1]
    means = [_mean(row) for row in values]  # (M,)
    between = n_prompts * math.fsum(mean**2 for mean in means) / freedom
    errors = ((value - mean) ** 2 for row, mean in zip(values.tolist(), means, strict=True) for value in row)
    return between, math.fsum(errors) / (freedom * (n_prompts - 1))


def _complete(table: np.ndarray, size: int) -> np.ndarray:
    """Return a table (N, B) without members that have no reward at all, and then without prompts that lack a reward.

    Members are left out in groups of ``size`` neighbours.
    """
    empty = np.isnan(table).all(axis=1).reshape(-1, size).any(axis=1)  # (N / size,)
    kept: np.ndarray = table[~np.repeat(empty, size)]
    known: np.ndarray = kept[:, ~np.isnan(kept).any(axis=0)]
    return known


def _mean(values: np.ndarray) -> float:
    return math.fsum(values.reshape(-1).tolist()) / values.size


def _columns(table: np.ndarray) -> np.ndarray:
    """Return the mean of each prompt over members, (1, B)."""
    return np.array([[_mean(column) for column in table.T]])


@dataclass(frozen=True, slots=True)
class Forecast:
    """A step of learning rate a is expected to gain ``a * gain`` and to lose ``a^2 * drift``; NaN: unknown."""

    gain: float
    drift: float


@dataclass(frozen=True, slots=True)
class UnitStep:
    """An update of learning rate 1: its effect on the members' fitness, and its length."""

    effect: float  # sum over noise vectors of the coefficient times the effect on the fitness
    squares: float  # sum of the squared coefficients
    sigma: float  # standard deviation of the perturbations

    def forecast(self, reliability: float, drop: float) -> Forecast:
        """Return what a step is expected to gain and to lose.

        Args:
            reliability: of the ranking.
            drop: theta's fitness minus the members' mean fitness.
        """
        return Forecast(reliability / self.sigma * self.effect, drop / self.sigma / self.sigma * self.squares)


def unit_step(fitness: Sequence[float], utilities: Sequence[float], *, antithetic: bool, sigma: float) -> UnitStep:
    """Return the update that utilities (N,), before quantisation, make of fitness (N,).

    ``antithetic``: whether members are pairs. ``sigma``: the standard deviation of the perturbations.
    """
    moves = moves_of(fitness, utilities, antithetic)
    return UnitStep(
        effect=math.fsum(move * effect for move, effect in moves),
        squares=math.fsum(move**2 for move, _ in moves),
        sigma=sigma,
    )


def rate_factor(control: str, signal: Signal, step: UnitStep, learning_rate: float) -> float:
    """Return the factor in [0, 1] by which a step's learning rate is multiplied.

    ``reliability`` multiplies by the reliability. ``drift`` bounds the rate, so that a step's expected loss by drift is
    at most `DRIFT_SHARE` of its expected gain; while the fitness rises, the rate has no bound, and in the first steps
    `FIRST_FACTOR` of it stays.

    Args:
        control: ``none``, ``reliability`` or ``drift``.
        signal: with this step's evidence.
        step: the step at learning rate 1.
        learning_rate: after the schedule.
    """
    if control == "none" or (control == "drift" and signal.rises):
        return 1.0
    reliability = signal.reliability
    if math.isnan(reliability):
        return 1.0
    if control == "reliability":
        return reliability
    return max(_drift_factor(reliability, signal.mean_drop, step, learning_rate), FIRST_FACTOR * signal.is_first)


def _drift_factor(reliability: float, drop: float, step: UnitStep, learning_rate: float) -> float:
    """Return the largest factor in [0, 1] at which drift loses at most `DRIFT_SHARE` of the step's expected gain."""
    if not drop > 0:  # the members are as good as theta: a step loses nothing by drift
        return 1.0 if reliability > 0 else 0.0
    expected = step.forecast(reliability, drop)
    if expected.gain <= 0 or expected.drift <= 0:
        return 0.0
    return min(1.0, DRIFT_SHARE * expected.gain / expected.drift / learning_rate)


def moves_of(fitness: Sequence[float], utilities: Sequence[float], antithetic: bool) -> list[tuple[float, float]]:
    """Return for each noise vector of a step its coefficient in the update and its effect on the fitness.

    The update is the learning rate times the sum of coefficient times noise. The effect is the member's fitness minus
    the mean; of a pair, half of the difference. A member without fitness (NaN) has no effect.
    """
    known = [_clipped(value) for value in fitness if not math.isnan(value)]
    center = math.fsum(known) / len(known) if known else 0.0
    effects = [0.0 if math.isnan(value) else _clipped(value) - center for value in fitness]
    utilities, n = [_clipped(value) for value in utilities], len(utilities)
    if not antithetic:
        return [(utility / n, effect) for utility, effect in zip(utilities, effects, strict=True)]
    return [((utilities[m] - utilities[m + 1]) / n, (effects[m] - effects[m + 1]) / 2) for m in range(0, n, 2)]
