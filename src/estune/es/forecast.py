"""What one population of pairs says about a run that is not paid for yet (docs/choosing.md).

Half the difference of a pair's rewards on a prompt is the effect of its noise there. If effects on different prompts
agree, the prompts share a direction, and an update gains on prompts that it has not seen. If they do not, a step moves
theta at random. `Outlook` holds the agreement and the variances; its methods derive a step's gain and loss, and the
members and prompts that a run needs. Utilities are z-scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from estune.es.step_control import LARGEST

LEVEL = 0.05  # probability of an error: of the test over all sigmas, of an interval, and of a one-sided bound
EXACT_PROMPTS = 12  # prompts up to which all sign patterns are tried
PATTERNS = 10_000  # random sign patterns for more prompts
CHUNK = 500  # sign patterns computed at a time
LOSS_SHARE = 0.05  # of a step's gain: what its random part may lose at the proposed rate
RELIABLE = 0.5  # reliability that a run's prompts should reach


@dataclass(frozen=True)
class Split:
    """Rewards of P pairs on B prompts, split by what the sign does to them.

    Prompts without a reward for some member are left out, and pairs without any reward.
    """

    odd: np.ndarray  # (P, B), half the difference of a pair's rewards
    even: np.ndarray  # (P, B), the mean of a pair's rewards
    drop: np.ndarray  # (P, B'), theta's reward minus the pair's mean, on the prompts where theta has a reward
    known: np.ndarray  # (all prompts,), bool: the B prompts


def split_pairs(rows: np.ndarray, theta: np.ndarray) -> Split:
    """Return the parts of weighted rewards.

    Args:
        rows: (N, B, G), members in the order +, -; NaN: no reward.
        theta: (B, G), theta's rewards on the same prompts.
    """
    means = np.clip(rows, -LARGEST, LARGEST).mean(axis=2)  # (N, B)
    own = np.clip(theta, -LARGEST, LARGEST).mean(axis=1)  # (B,)
    empty = np.isnan(means).all(axis=1).reshape(-1, 2).any(axis=1)  # (P,)
    means = means[~np.repeat(empty, 2)]
    known = ~np.isnan(means).any(axis=0) if len(means) else np.zeros(means.shape[1], dtype=bool)
    plus, minus = means[0::2, known], means[1::2, known]
    even = (plus + minus) / 2
    answered = ~np.isnan(own[known])
    return Split((plus - minus) / 2, even, (own[known] - even)[:, answered], known)


@dataclass(frozen=True)
class Agreement:
    """How the effects of pairs on two prompts correlate, over all pairs of prompts."""

    correlation: float = math.nan  # estimate; it can be below 0 by chance
    error: float = math.nan  # standard error over pairs and prompts
    low: float = 0.0  # interval of probability 1 - `LEVEL`, within [0, 1]
    high: float = 1.0
    upper: float = 1.0  # one-sided bound: the correlation lies above with probability `LEVEL`

    def reliability(self, n_prompts: float) -> float:
        """Return the reliability of members' effects on this number of prompts (Spearman and Brown's formula)."""
        return spearman_brown(max(0.0, self.correlation), n_prompts)

    @property
    def prompts_needed(self) -> float:
        """Number of prompts at which the reliability is `RELIABLE`; infinite without a positive correlation."""
        if not self.correlation > 0:
            return math.inf
        return RELIABLE / (1 - RELIABLE) * (1 - self.correlation) / self.correlation


def spearman_brown(correlation: float, n_prompts: float) -> float:
    """Return the reliability of a mean over prompts whose single values have this correlation."""
    return n_prompts * correlation / (1 + (n_prompts - 1) * correlation)


def agreement_of(odd: np.ndarray) -> Agreement:
    """Return the correlation of the effects (P, B) between prompts, with its interval.

    The correlation is the mean product of effects on two prompts, divided by the mean square of an effect; that equals
    the intraclass correlation of the two-way analysis of variance. Its variance is the sum of the jackknife's variances
    over pairs and over prompts, and at least the variance that it has if every prompt's sign is a coin's.
    """
    n_pairs, n_prompts = odd.shape
    scale = float(np.abs(odd).max(initial=0.0))
    if n_prompts < 2 or n_pairs < 1:
        return Agreement()
    if scale == 0:
        return Agreement(0.0)
    odd = odd / scale
    gram = odd.T @ odd  # (B, B)
    value = _correlation(gram)
    if n_pairs < 3 or n_prompts < 3:
        return Agreement(value)
    without_pair = [_correlation(gram - np.outer(row, row)) for row in odd]
    total, diagonal, rows = gram.sum(), gram.diagonal(), gram.sum(axis=1)
    left = np.trace(gram) - diagonal  # (B,), the traces without each prompt
    between = total - 2 * rows + diagonal - left
    without_prompt = np.divide(between, (n_prompts - 2) * left, out=np.zeros(n_prompts), where=left > 0)
    error = math.sqrt(max(_jackknife(without_pair) + _jackknife(without_prompt), _coin_variance(gram)))
    freedom = min(n_pairs, n_prompts) - 1
    reach, one_sided = (student(probability, freedom) * error for probability in (1 - LEVEL / 2, 1 - LEVEL))
    low, high, upper = (min(1.0, max(0.0, value + way)) for way in (-reach, reach, one_sided))
    return Agreement(value, error, low, high, upper)


def _correlation(gram: np.ndarray) -> float:
    """Return the mean off the diagonal of (B, B) products, divided by the mean of the diagonal."""
    trace, n_prompts = float(np.trace(gram)), len(gram)
    return (float(gram.sum()) - trace) / ((n_prompts - 1) * trace) if trace > 0 else 0.0


def _coin_variance(gram: np.ndarray) -> float:
    """Return the variance of `_correlation` if each prompt's effects have a random sign."""
    off = float((gram**2).sum() - (gram.diagonal() ** 2).sum())
    return 2 * off / ((len(gram) - 1) * float(np.trace(gram))) ** 2


def _jackknife(values: Sequence[float] | np.ndarray) -> float:
    """Return the jackknife's variance from the estimates without one value each."""
    return float(np.var(values)) * (len(values) - 1)


def student(probability: float, degrees: int) -> float:
    """Return Student's quantile for 2 or more degrees of freedom (expansion of Fisher and Cornish, 1960)."""
    z = NormalDist().inv_cdf(probability)
    if degrees == 2:
        return z if probability == 0.5 else (2 * probability - 1) / math.sqrt(2 * probability * (1 - probability))
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + first / degrees + second / degrees**2 + third / degrees**3 + fourth / degrees**4


def p_values(tables: Sequence[np.ndarray]) -> list[float]:
    """Return one p-value for each table of effects (P, B): how likely prompts without a shared direction agree as much.

    Without a shared direction, the effects on a prompt could as well have the opposite sign. So the agreement is
    compared with that of the same table after a coin's sign for every prompt: all patterns of signs for few prompts,
    else random ones. The tables, one for each sigma, share prompts and signs, and each is compared with the largest
    agreement of all tables. So the probability of any false alarm is at most the level, however many tables there are.

    Args:
        tables: with the same prompts; a prompt without rewards is a column of zeros.
    """
    grams = []
    for table in tables:
        scale = float(np.abs(table).max(initial=0.0))
        gram = (table / scale).T @ (table / scale) if scale else np.zeros((table.shape[1],) * 2)
        np.fill_diagonal(gram, 0.0)
        spread = math.sqrt(2 * float((gram**2).sum()))
        grams.append(gram / spread if spread else gram)
    observed = [float(gram.sum()) for gram in grams]
    exceeded, tried = np.zeros(len(grams)), 0
    for signs in _patterns(tables[0].shape[1] if tables else 0):  # (CHUNK, B)
        agreements = np.stack([((signs @ gram) * signs).sum(axis=1) for gram in grams])  # (tables, CHUNK)
        largest = agreements.max(axis=0)
        exceeded += [float((largest >= value - 1e-9 * abs(value)).sum()) for value in observed]
        tried += len(signs)
    return [float(count / tried) if gram.any() else 1.0 for count, gram in zip(exceeded, grams, strict=True)]


def _patterns(n_prompts: int) -> list[np.ndarray]:
    """Return sign patterns (CHUNK, B); the first pattern has only plus signs."""
    if n_prompts <= EXACT_PROMPTS:
        numbers = np.arange(1 << max(0, n_prompts - 1))
        every = 1.0 - 2.0 * ((numbers[:, None] >> np.arange(n_prompts)) & 1)
        return [every[first : first + CHUNK] for first in range(0, len(every), CHUNK)]
    generator = np.random.default_rng(0)
    chunks = [generator.choice((-1.0, 1.0), (CHUNK, n_prompts)) for _ in range(PATTERNS // CHUNK)]
    chunks[0][0] = 1.0
    return chunks


@dataclass(frozen=True)
class Parts:
    """Variance of a mean over B prompts: ``shared`` by all prompts, plus ``noise`` / B."""

    shared: float = math.nan  # an estimate; it can be below 0 by chance
    noise: float = math.nan

    def total(self, n_prompts: float) -> float:
        """Return the variance of a mean over so many prompts."""
        return max(0.0, self.shared) + self.noise / n_prompts


def parts_of(values: np.ndarray, freedom: int) -> Parts:
    """Return the parts of the variance between the rows of a table (P, B) whose columns have the mean 0."""
    n_pairs, n_prompts = values.shape
    if n_prompts < 2 or not n_pairs:
        return Parts()
    means = values.mean(axis=1)
    between = n_prompts * float((means**2).sum()) / freedom
    residual = float(((values - means[:, None]) ** 2).sum()) / (freedom * (n_prompts - 1))
    return Parts((between - residual) / n_prompts, residual)


def drop_of(table: np.ndarray) -> tuple[float, float]:
    """Return the mean of a table (P, B) of drops and its standard error over pairs and prompts; NaN if unknown."""
    n_pairs, n_prompts = table.shape
    if not table.size:
        return math.nan, math.nan
    mean = float(table.mean())
    if n_pairs < 2 or n_prompts < 2:
        return mean, math.nan
    rows, columns = table.mean(axis=1) - mean, table.mean(axis=0) - mean
    residual = table - mean - rows[:, None] - columns
    of_rows = n_prompts * float((rows**2).sum()) / (n_pairs - 1)
    of_columns = n_pairs * float((columns**2).sum()) / (n_prompts - 1)
    of_rest = float((residual**2).sum()) / ((n_pairs - 1) * (n_prompts - 1))
    return mean, math.sqrt(max(of_rows + of_columns - of_rest, of_rows, of_columns) / table.size)


@dataclass(frozen=True)
class Outlook:
    """What a population at one sigma predicts for a run. N and B of a method's arguments are those of the run."""

    sigma: float
    n_prompts: int  # of the population, those with rewards
    agreement: Agreement
    odd: Parts  # of the effects
    even: Parts  # of the pairs' means
    even_reliability: float  # of the pairs' means, in which the gradient has no part
    drop: float  # theta's fitness minus the members' mean fitness
    drop_error: float
    antithetic: bool = False  # whether the run's members are pairs
    p_value: float = math.nan

    @property
    def is_flat(self) -> bool:
        """Whether no pair's rewards differ: the population holds no gradient at all."""
        return self.odd.noise == 0 and self.odd.shared == 0

    def gain(self, n_prompts: float, correlation: float | None = None) -> float:
        """Return a step's expected gain per unit of the learning rate.

        Args:
            n_prompts: B.
            correlation: of the effects on two prompts, instead of the estimate.
        """
        one = self.odd.total(1)  # variance of the effect on one prompt
        shared = max(0.0, self.agreement.correlation if correlation is None else correlation) * one
        spread = math.sqrt(self.odd.total(n_prompts) + self.even.total(n_prompts))
        return shared / (self.sigma * spread) if spread else 0.0

    def randomness(self, n_members: int, n_prompts: float) -> float:
        """Return the sum of squares of the noise vectors' coefficients in an update with learning rate 1."""
        if not self.antithetic:
            return 1 / n_members
        odd, even = self.odd.total(n_prompts), self.even.total(n_prompts)
        return 2 / n_members * odd / (odd + even) if odd else 0.0

    def drift(self, n_members: int, n_prompts: float) -> float:
        """Return a step's expected loss by its random part, per square of the learning rate; 0 without a drop."""
        return max(0.0, self.drop) / self.sigma / self.sigma * self.randomness(n_members, n_prompts)

    def net(
        self, rate: float, n_members: int, n_prompts: float, steps: int = 1, correlation: float | None = None
    ) -> float:
        """Return the expected gain of steps, less what their random parts lose; linear in the steps."""
        loss = self.drift(n_members, n_prompts) if not math.isnan(self.drop) else 0.0
        return steps * (rate * self.gain(n_prompts, correlation) - rate * rate * loss)

    def allowed_rate(self, n_members: int, n_prompts: float) -> float:
        """Return the learning rate at which drift loses `LOSS_SHARE` of a step's gain; infinite without a drop."""
        drift, gain = self.drift(n_members, n_prompts), self.gain(n_prompts)
        if gain <= 0:
            return 0.0
        return LOSS_SHARE * gain / drift if drift > 0 else math.inf

    def members_needed(self, rate: float, n_prompts: float) -> float:
        """Return the N at which drift loses `LOSS_SHARE` of a step's gain."""
        allowed = self.allowed_rate(1, n_prompts)
        return rate / allowed if allowed else math.inf

    def walk(self, rate: float, n_members: int, n_prompts: float, steps: int) -> float:
        """Return the length of the random part of theta's movement after some steps, in lengths of a perturbation."""
        return rate / self.sigma * math.sqrt(steps * self.randomness(n_members, n_prompts))


def outlook_of(split: Split, sigma: float, antithetic: bool, p_value: float = math.nan) -> Outlook:
    """Return the outlook of a population at one sigma."""
    n_pairs, n_prompts = split.odd.shape
    even = split.even - split.even.mean(axis=0) if n_pairs else split.even
    parts = parts_of(even, n_pairs)  # divided by P, as the variance in the z-scores is
    exact = parts_of(even, n_pairs - 1) if n_pairs > 1 else Parts()
    total = exact.shared + exact.noise / n_prompts if n_prompts else math.nan
    drop, drop_error = drop_of(split.drop)
    return Outlook(
        sigma=sigma,
        n_prompts=n_prompts,
        agreement=agreement_of(split.odd),
        odd=parts_of(split.odd, n_pairs),
        even=parts,
        even_reliability=max(0.0, exact.shared / total) if total > 0 else (0.0 if total == 0 else math.nan),
        drop=drop,
        drop_error=drop_error,
        antithetic=antithetic,
        p_value=p_value,
    )
