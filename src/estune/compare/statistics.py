"""The statistics of a comparison: 95 % intervals over seeds and problems, paired differences, corrected p-values.

A result varies with the seed, because another seed trains another model, and with the problems that are asked. The
intervals count both. There are only three to five seeds, so the intervals are made of variance components instead of
resampled seeds: a bootstrap of three seeds has two thirds of their variance. `docs/log.md` has the measured coverage.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from estune.errors import UserError, install_command
from estune.train.evaluation import Z_95, bootstrap, interval

ALPHA = 0.05
LEAST_P = 1e-9  # smaller p-values are returned as this value
Component = tuple[float, int]  # a part of a mean's variance, and the degrees of freedom of its estimate


def require_scipy() -> None:
    """Check that scipy, which computes Student's t, is installed.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("scipy") is None:
        raise UserError(f"estune compare needs the package scipy: {install_command(extra='compare')}")


@cache
def quantile(alpha: float, degrees: float) -> float:
    """Return the t that |T| exceeds with probability ``alpha``, for Student's T with ``degrees`` degrees of freedom."""
    from scipy import stats

    return float(stats.t.isf(alpha / 2, degrees))


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class OverSeeds:
    """The mean of one value per seed, its interval (None for a single seed) and its spread."""

    n: int
    mean: float
    interval: tuple[float, float] | None
    standard_deviation: float | None  # of the seeds, with n - 1 in the denominator; None for a single seed
    range: float  # highest minus lowest


@dataclass(frozen=True)
class Difference:
    """Mean of one method minus mean of another, its 95 % interval, and the p-value of "they are equal"."""

    difference: float
    low: float
    high: float
    p_value: float
    test: str  # "crossed", "paired t" or "mcnemar exact"


@dataclass(frozen=True)
class Transitions:
    """Problems by their answers before and after training, and the p-value of "as many were won as lost".

    ``p_value`` is of McNemar's exact test, two-sided.
    """

    both_right: int
    both_wrong: int
    progressions: int  # wrong before, right after
    regressions: int  # right before, wrong after
    p_value: float


@dataclass(frozen=True)
class Signs:
    """Rows by the sign of a difference, and the p-value of "as many are positive as negative" (sign test, exact)."""

    wins: int
    losses: int
    ties: int
    p_value: float


def transitions(before: Sequence[bool], after: Sequence[bool]) -> Transitions:
    """Return how the answers to the same problems changed; ``before`` and ``after`` (P,) say whether each is right."""
    pairs = list(zip(before, after, strict=True))
    won, lost = pairs.count((False, True)), pairs.count((True, False))
    return Transitions(pairs.count((True, True)), pairs.count((False, False)), won, lost, binomial_p(won, lost))


def signs(differences: Sequence[float]) -> Signs:
    """Return how many differences (rows,) are positive, negative and 0."""
    wins, losses = sum(value > 0 for value in differences), sum(value < 0 for value in differences)
    return Signs(wins, losses, len(differences) - wins - losses, binomial_p(wins, losses))


def binomial_p(a: int, b: int) -> float:
    """Return the exact two-sided p-value of ``a`` heads and ``b`` tails of a fair coin; 1 without a throw."""
    tail = sum(math.comb(a + b, i) for i in range(min(a, b) + 1))
    return min(1.0, 2 * tail / (1 << (a + b)))  # exact: whole numbers, divided once


def mean_difference(differences: Sequence[float]) -> dict[str, Any]:
    """Return the mean of paired differences (rows,) and its 95 % interval, a bootstrap over rows.

    Returns:
        ``difference`` and ``difference_ci95``, which is None for a single row.
    """
    ci95 = list(bootstrap(differences)) if len(differences) > 1 else None
    return {"difference": math.fsum(differences) / len(differences), "difference_ci95": ci95}


def over_seeds(values: Sequence[float]) -> OverSeeds:
    """Return the mean over seeds with Student's t interval; a single seed has no interval.

    Raises:
        ValueError: there is no value.
    """
    n = len(values)
    if not n:
        raise ValueError("no seeds")
    center = math.fsum(values) / n
    extent = max(values) - min(values)
    if n == 1:
        return OverSeeds(1, center, None, None, extent)
    deviation = math.sqrt(math.fsum((value - center) ** 2 for value in values) / (n - 1))
    half = quantile(ALPHA, n - 1) * deviation / math.sqrt(n)
    return OverSeeds(n, center, (center - half, center + half), deviation, extent)


def two_level(correct: Any) -> Estimate:
    """Return the mean of ``correct`` (S, P), in [0, 1], with an interval for other seeds and other problems.

    The model has two-way random effects: an effect of each seed, an effect of each problem, and a rest. The variance of
    the mean is var_seeds / S + var_problems / P + var_rest / (S P), estimated from the mean squares of the table; see
    `half_width` for the interval. Seeds, and problems, are assumed to be drawn independently. With one seed, or with
    seeds that agree on every problem, the interval is over problems alone (`estune.train.evaluation.interval`).

    Raises:
        ValueError: ``correct`` is not a table of seeds and problems in [0, 1].
    """
    table = _distinct(_table(correct))
    center = float(table.mean())
    if len(table) == 1:
        return Estimate(center, *interval(table[0].tolist()))
    seeds, problems = table.shape
    by_seed, rest = _seed_squares(table)
    by_problem = seeds * float(table.mean(0).var(ddof=1)) if problems > 1 else rest
    between = max(0.0, by_problem - rest) / table.size
    half = half_width([(by_seed / table.size, seeds - 1)], (between, problems - 1), ALPHA)
    return Estimate(center, max(0.0, center - half), min(1.0, center + half))


def paired_difference(a: Any, b: Any) -> Difference:
    """Return the mean of ``a`` (S, P) minus that of ``b`` (S', P), both in [0, 1] and on the same problems.

    Pairing removes a problem's difficulty for both methods. The variance that remains is that of each method's seeds,
    which are independent, and of the difference between the methods on a problem. The p-value is the alpha at which
    the interval touches 0.

    A method of one row, or of equal rows, counts as a single model without seeds, such as a base. Two such models whose
    answers are right or wrong are compared by the exact McNemar test, with Tango's score interval (Statistics in
    Medicine 17, 1998). The exact test is more conservative than the interval, so they can disagree near 0.05.

    Raises:
        ValueError: ``a`` and ``b`` are not two tables in [0, 1] with the same problems.
    """
    first, second = _table(a), _table(b)
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"{first.shape[1]} problems against {second.shape[1]}")
    first, second = _distinct(first), _distinct(second)
    if len(first) == len(second) == 1 and np.isin([first, second], (0.0, 1.0)).all():
        return _mcnemar(first[0], second[0])
    problems = first.shape[1]
    gaps = first.mean(0) - second.mean(0)
    between = float(gaps.var(ddof=1)) if problems > 1 else 0.0
    seeds: list[Component] = []
    for table in (first, second):
        if len(table) > 1:
            by_seed, rest = _seed_squares(table)
            seeds.append((by_seed / table.size, len(table) - 1))
            between -= rest / len(table)  # this part is counted with the seeds
    by_problem = (max(0.0, between) / problems, problems - 1)
    center = float(first.mean() - second.mean())
    half = half_width(seeds, by_problem, ALPHA)
    low, high = max(-1.0, center - half), min(1.0, center + half)
    return Difference(center, low, high, p_value_of(abs(center), seeds, by_problem), "crossed" if seeds else "paired t")


def half_width(seeds: Sequence[Component], problems: Component, alpha: float) -> float:
    """Return half the width of the interval of a mean whose variance is the sum of the components.

    It is sqrt(V (z^2 + (t_s^2 - z^2) (V_s / V)^2 + (t_p^2 - z^2) (V_p / V)^2)): V_s and V_p are the variance due to
    seeds and to problems, V is their sum, and t_s has the degrees of freedom that Satterthwaite's rule gives the seeds
    of two methods. This is Student's interval if one component is 0, the normal interval if the degrees are many, and
    correct to the first order in 1 / degrees otherwise. So is Satterthwaite's rule for the whole sum, but its intervals
    are too narrow if a component with two degrees holds nine tenths of the variance: they hold the truth in 92.2 % of
    cases, these in 94.2 %.

    Args:
        seeds: the components of each method's seeds.
        problems: the component of the problems.
        alpha: the probability that the interval misses the truth.
    """
    by_seeds = math.fsum(part for part, _ in seeds)
    total = by_seeds + problems[0]
    if total <= 0:
        return 0.0
    z2 = quantile(alpha, math.inf) ** 2
    square = z2
    if by_seeds:
        degrees = by_seeds**2 / math.fsum(part**2 / degrees for part, degrees in seeds)
        square += (quantile(alpha, degrees) ** 2 - z2) * (by_seeds / total) ** 2
    if problems[0]:
        square += (quantile(alpha, problems[1]) ** 2 - z2) * (problems[0] / total) ** 2
    return math.sqrt(total * square)


def p_value_of(distance: float, seeds: Sequence[Component], problems: Component) -> float:
    """Return the alpha at which `half_width` equals ``distance``."""
    if distance == 0:
        return 1.0
    low, high = math.log(LEAST_P), 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if half_width(seeds, problems, math.exp(middle)) > distance else (low, middle)
    return math.exp(high)


def _mcnemar(a: np.ndarray, b: np.ndarray) -> Difference:
    gained, lost = int((a > b).sum()), int((a < b).sum())
    low, high = tango(gained, lost, a.size)
    return Difference((gained - lost) / a.size, low, high, max(binomial_p(gained, lost), LEAST_P), "mcnemar exact")


def tango(gained: int, lost: int, n: int) -> tuple[float, float]:
    """Return the score interval of (gained - lost) / n for n paired answers (Tango 1998, equation 14).

    Args:
        gained: pairs of which only the first answer is right.
        lost: pairs of which only the second answer is right.
        n: all pairs.
    """

    def score(delta: float) -> float:
        b = -gained - lost + (2 * n - gained + lost) * delta
        root = math.sqrt(max(0.0, b * b + 8 * n * lost * delta * (1 - delta)))
        only_lost = (root - b) / (4 * n)  # the maximum-likelihood share of lost pairs if the difference is delta
        spread = n * (2 * only_lost + delta * (1 - delta))
        return (gained - lost - n * delta) / math.sqrt(spread) if spread > 0 else math.copysign(math.inf, gained - lost)

    center = (gained - lost) / n
    bounds = []
    for end in (-1.0, 1.0):
        inside, outside = center, end
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if abs(score(middle)) <= Z_95 else (inside, middle)
        bounds.append(outside)
    return bounds[0], bounds[1]


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values corrected for their number (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected


def _table(correct: Any) -> np.ndarray:
    """Return ``correct`` as float64, (S, P).

    Raises:
        ValueError: it is not a table in [0, 1].
    """
    table = np.asarray(correct, dtype=np.float64)
    if table.ndim != 2 or not table.size or not ((table >= 0) & (table <= 1)).all():
        raise ValueError("correctness must be a table (seeds, problems) in [0, 1]")
    return table


def _distinct(table: np.ndarray) -> np.ndarray:
    """Return the first row alone if all rows are equal, else the table."""
    return table[:1] if (table == table[0]).all() else table


def _seed_squares(table: np.ndarray) -> tuple[float, float]:
    """Return two mean squares of a table (S, P), S > 1: of the seeds, and of the rest."""
    seeds, problems = table.shape
    by_seed = problems * float(table.mean(1).var(ddof=1))
    if problems == 1:
        return by_seed, 0.0
    rest = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
    return by_seed, float((rest**2).sum()) / ((seeds - 1) * (problems - 1))
