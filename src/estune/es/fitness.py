"""Rewards to fitness to utilities: pure functions of NumPy arrays.

    rewards   (N, B, G, F)  one number per completion and reward function; NaN: the function does not apply
    rows      (N, B, G)     failures filled, weighted sum over functions
    fitness   (N,)          mean over prompts and completions, in row order, by `math.fsum`
    utilities (N,)          shaped fitness of zero mean; the update multiplies the noise with them

A reward fails when its function raises, hangs, or returns a number that is not finite. `fill_failures` replaces it by
the worst finite reward of its row, so that no member gains by failing (docs/method.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

TIE_TOLERANCE = 1e-9  # values tie if they differ by at most this, times max(1, largest absolute value)
LARGEST_REWARD = 1e300  # weighted rewards and their sums are clipped to this absolute value


def fill_failures(rewards: np.ndarray, failed: np.ndarray, weights: Sequence[float] | None = None) -> np.ndarray:
    """Return rewards (N, B, G, F) in which a failure holds the worst finite reward of its row and function.

    The worst reward is the lowest one that any member got, or the highest one for a function of negative weight. If a
    failed function gave no member a finite reward for a row, the row becomes NaN for all members and functions: the
    step leaves it out. Failures of a function of weight 0 are ignored.
    """
    filled = np.where(failed, np.nan, rewards)  # (N, B, G, F)
    for b, f in zip(*np.nonzero(failed.any(axis=(0, 2))), strict=True):
        if weights is not None and weights[f] == 0:
            continue
        column = filled[:, b, :, f]  # (N, G), a view
        finite = column[np.isfinite(column)]
        if finite.size:
            column[failed[:, b, :, f]] = finite.max() if weights is not None and weights[f] < 0 else finite.min()
        else:
            filled[:, b] = np.nan
    return filled


def weigh(rewards: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Return the weighted sum over functions, (..., F) -> (...). If every function applies, it equals TRL's sum.

    Functions that do not apply (NaN) are left out. The weights of the others are scaled so that their absolute values
    sum to what all absolute weights sum to. The result is NaN where no function applies. Sums are clipped to ±1e300,
    so that later sums and squares cannot overflow.
    """
    w = np.asarray(weights, dtype=np.float64)  # (F,)
    applies = ~np.isnan(rewards)  # (..., F)
    present = (applies * np.abs(w)).sum(axis=-1)  # (...)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        total = np.where(applies, np.clip(rewards * w, -LARGEST_REWARD, LARGEST_REWARD), 0.0).sum(axis=-1)
        factor = np.where(applies.all(axis=-1), 1.0, np.abs(w).sum() / present)
        weighed = np.clip(total * factor, -LARGEST_REWARD, LARGEST_REWARD)
        return np.where(applies.any(axis=-1) & (present > 0), weighed, np.nan)


def mean(values: np.ndarray) -> float:
    """Return the mean of the values that are not NaN, or NaN if all are NaN.

    The sum is rounded only once, at its end.
    """
    numbers = [float(value) for value in values.reshape(-1) if not math.isnan(value)]
    if not numbers:
        return math.nan
    scaled, exponent = _scaled(numbers)
    return math.ldexp(math.fsum(scaled) / len(numbers), exponent)


def _scaled(values: Sequence[float]) -> tuple[list[float], int]:
    """Return (values / 2^exponent, exponent): exact values in [-1, 1], whose sums and squares cannot overflow."""
    exponent = math.frexp(max(map(abs, values)))[1]
    return [math.ldexp(value, -exponent) for value in values], exponent


def population_fitness(rows: np.ndarray) -> np.ndarray:
    """Return each member's fitness: (N, B, G) -> (N,); NaN for a member without rewards."""
    return np.array([mean(rows[m]) for m in range(rows.shape[0])])


def is_tie(values: Sequence[float]) -> bool:
    """Return whether the values are equal apart from rounding errors (`TIE_TOLERANCE`)."""
    lowest, highest = min(values), max(values)
    return highest - lowest <= TIE_TOLERANCE * max(1.0, abs(highest), abs(lowest))


def z_score(values: Sequence[float]) -> list[float]:
    """Return (f - mean) / population standard deviation, or zeros for a tie (arXiv 2509.24372)."""
    if is_tie(values):
        return [0.0] * len(values)
    scaled, _ = _scaled(values)
    center = math.fsum(scaled) / len(scaled)
    deviation = math.sqrt(math.fsum((value - center) ** 2 for value in scaled) / len(scaled))
    return [(value - center) / deviation for value in scaled]


def centered_rank(values: Sequence[float]) -> list[float]:
    """Return ranks spread evenly over [-0.5, 0.5] (Salimans et al. 2017); equal values share their mid-rank."""
    if is_tie(values):
        return [0.0] * len(values)
    below = [sum(other < value for other in values) for value in values]
    equal = [sum(other == value for other in values) for value in values]
    mid_ranks = [b + (e - 1) / 2 for b, e in zip(below, equal, strict=True)]
    return [rank / (len(values) - 1) - 0.5 for rank in mid_ranks]


def centered(values: Sequence[float]) -> list[float]:
    """Return f - mean, or zeros for a tie."""
    if is_tie(values):
        return [0.0] * len(values)
    center = math.fsum(values) / len(values)
    return [value - center for value in values]


# Each function maps one number per member to one utility per member. With `per_prompt_z` the numbers are means of
# z-scores, which `shape_fitness` computes; otherwise they are the fitness.
SHAPINGS: dict[str, Callable[[Sequence[float]], list[float]]] = {
    "z_score": z_score,
    "centered_rank": centered_rank,
    "per_prompt_z": z_score,
    "none": centered,
}


def shape_fitness(rows: np.ndarray, shaping: str) -> tuple[np.ndarray, list[float]]:
    """Return ``(fitness, utilities)``, both (N,), of weighted rewards (N, B, G).

    ``per_prompt_z`` computes each member's z-score for each prompt (0 for a tie), averages a member's z-scores over
    prompts, and returns the z-scores of the averages. A member without rewards has fitness NaN and utility 0. If the
    other members tie, all utilities are 0.
    """
    fitness = population_fitness(rows)  # (N,)
    shaped = _per_prompt_z(rows) if shaping == "per_prompt_z" else fitness  # (N,), what the shaping is applied to
    rewarded = np.flatnonzero(~np.isnan(shaped))  # members with a reward
    utilities = [0.0] * len(fitness)
    if rewarded.size >= 2:
        for m, value in zip(rewarded, SHAPINGS[shaping](shaped[rewarded].tolist()), strict=True):
            utilities[m] = value
    return fitness, utilities


def _per_prompt_z(rows: np.ndarray) -> np.ndarray:
    """Return each member's mean over prompts of its z-score within the prompt: (N, B, G) -> (N,)."""
    n_members, n_prompts, _ = rows.shape
    scores = np.full((n_members, n_prompts), np.nan)  # (N, B)
    for b in range(n_prompts):
        column = np.array([mean(rows[m, b]) for m in range(n_members)])  # (N,)
        rewarded = ~np.isnan(column)
        if rewarded.any():
            scores[rewarded, b] = z_score(column[rewarded].tolist())
    return np.array([mean(scores[m]) for m in range(n_members)])


def share_of_tied_prompts(rows: np.ndarray) -> float:
    """Return the share of prompts for which all members got the same reward (TRL's ``frac_reward_zero_std``)."""
    tied = [is_tie(values) for values in (r[~np.isnan(r)].tolist() for r in rows.swapaxes(0, 1)) if values]
    return sum(tied) / len(tied) if tied else 1.0
