"""Rewards to fitness to utilities: plain functions of NumPy arrays, no model, no state.

    rewards (N, B, G, F)  one number per completion and reward function; NaN = "not applicable"
    rows    (N, B, G)     failures filled, functions weighed together
    fitness (N,)          mean over prompts and completions, in row order, by `math.fsum`
    utilities (N,)        shaped fitness of zero mean: what the update multiplies the noise with

A failure (a reward that raised, hung, or was not a finite number) never pays: it gets the lowest finite reward (the
highest, if the function's weight is negative) that the same function gave any member for the same row; where nobody
got one the row is left out for all (DESIGN section 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

TIE_TOLERANCE = 1e-9
LARGEST_REWARD = 1e300


def fill_failures(rewards: np.ndarray, failed: np.ndarray, weights: Sequence[float] | None = None) -> np.ndarray:
    """Return rewards (N, B, G, F) with failures replaced by the row's lowest finite reward of that function.

    Where a function's weight is negative its highest finite reward is the worst one, and taken instead.
    A row for which a function failed and gave nobody a finite reward becomes NaN for all members and functions; a
    function of weight 0 only watches, and its failures drop nothing.
    """
    filled = np.where(failed, np.nan, rewards)  # (N, B, G, F)
    for b, f in zip(*np.nonzero(failed.any(axis=(0, 2))), strict=True):
        if weights is not None and weights[f] == 0:
            continue
        given = filled[:, b, :, f][np.isfinite(filled[:, b, :, f])]
        if given.size:
            column = filled[:, b, :, f]
            column[failed[:, b, :, f]] = given.max() if weights is not None and weights[f] < 0 else given.min()
        else:
            filled[:, b] = np.nan
    return filled


def weigh(rewards: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Return the weighted sum over functions, (..., F) -> (...), as in TRL where every function applies.

    Functions that do not apply (NaN) are left out and the other weights grow to the same total of absolute weights;
    where none applies the result is NaN. Sums beyond ±1e300 count as that, so that no reward can overflow a step.
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
    """Return the mean of the values that are not NaN, exactly rounded before the division; NaN where none is left."""
    kept = [float(value) for value in values.reshape(-1) if not math.isnan(value)]
    if not kept:
        return math.nan
    scaled, exponent = _scaled(kept)
    return math.ldexp(math.fsum(scaled) / len(kept), exponent)


def _scaled(values: Sequence[float]) -> tuple[list[float], int]:
    """Return values / 2^exponent within [-1, 1], exactly, so that sums and squares of huge rewards do not overflow."""
    exponent = math.frexp(max(map(abs, values)))[1]
    return [math.ldexp(value, -exponent) for value in values], exponent


def population_fitness(rows: np.ndarray) -> np.ndarray:
    """Return each member's fitness: (N, B, G) -> (N,); NaN for a member to whom no reward applied."""
    return np.array([mean(rows[m]) for m in range(rows.shape[0])])


def is_tie(values: Sequence[float]) -> bool:
    """Say whether values differ by no more than rounding, as thirty times 0.1 do."""
    lowest, highest = min(values), max(values)
    return highest - lowest <= TIE_TOLERANCE * max(1.0, abs(highest), abs(lowest))


def z_score(values: Sequence[float]) -> list[float]:
    """Return (f - mean) / population standard deviation, or zeros for a tie: the paper's shaping."""
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


# Shapings of one number per member; `per_prompt_z` needs the rows and is told apart in `shape_fitness`.
SHAPINGS: dict[str, Callable[[Sequence[float]], list[float]]] = {
    "z_score": z_score,
    "centered_rank": centered_rank,
    "per_prompt_z": z_score,
    "none": centered,
}


def shape_fitness(rows: np.ndarray, shaping: str) -> tuple[np.ndarray, list[float]]:
    """Return ``(fitness, utilities)``, both (N,), of weighed rewards (N, B, G).

    ``per_prompt_z`` takes the z-score over members per prompt (0 where tied), averages it over prompts and z-scores
    again. A member to whom no reward applied has fitness NaN and utility 0; all utilities are 0 where the others tie.
    """
    fitness = population_fitness(rows)  # (N,)
    signal = _per_prompt_z(rows) if shaping == "per_prompt_z" else fitness
    alive = np.flatnonzero(~np.isnan(signal))
    utilities = [0.0] * len(fitness)
    if alive.size >= 2:
        for m, value in zip(alive, SHAPINGS[shaping](signal[alive].tolist()), strict=True):
            utilities[m] = value
    return fitness, utilities


def _per_prompt_z(rows: np.ndarray) -> np.ndarray:
    """Return each member's mean over prompts of its z-score within the prompt: (N, B, G) -> (N,)."""
    n_members, n_prompts, _ = rows.shape
    scores = np.full((n_members, n_prompts), np.nan)  # (N, B)
    for b in range(n_prompts):
        column = np.array([mean(rows[m, b]) for m in range(n_members)])  # (N,)
        alive = ~np.isnan(column)
        if alive.any():
            scores[alive, b] = z_score(column[alive].tolist())
    return np.array([mean(scores[m]) for m in range(n_members)])


def share_of_tied_prompts(rows: np.ndarray) -> float:
    """Return the share of prompts on which all members got the same reward (TRL's ``frac_reward_zero_std``)."""
    tied = [is_tie(kept) for kept in (r[~np.isnan(r)].tolist() for r in rows.swapaxes(0, 1)) if kept]
    return sum(tied) / len(tied) if tied else 1.0
