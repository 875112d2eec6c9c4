"""The update rule: utilities to integers, scale factors, schedules and weight decay.

    theta += learning_rate / N * sum_m utilities_m * sign_m * eps(seed_m)          (arXiv 2509.24372; 1/sigma folded in)

The sum over members is exact, so its order does not matter (docs/reproducibility.md). Utilities become integers ``q``
with a common exponent ``e``: ``utilities ~ q / 2^e``. The sum of ``q`` times noise fits int32. A scale ``a`` of 22
significant bits converts the sum into a change of the weights; low-rank matrices have a scale of their own. This module
computes these scalars, the journal records them, and `estune.es.theta` applies them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from estune.es.noise.reference import lowrank_deviation, noise_deviation, round_to_bits
from estune.es.types import Member

MAX_Q = 32767  # largest |q|, an integer utility
MAX_NOISE = 16  # largest |n| of normal noise; Rademacher noise uses the same bound, although its |n| is 1
SCALE_BITS = 22  # significant bits of `a`; the product with a 31-bit sum is exact in float64

SCHEDULES = ("constant", "linear", "cosine", "constant_with_warmup")
SIGMA_SCHEDULES = ("constant", "linear", "cosine")
STEP_CONTROLS = ("none", "reliability", "drift")  # `estune.es.step_control`


@dataclass(frozen=True, slots=True)
class Update:
    """The seeds and scalars that move theta by one step."""

    members: tuple[Member, ...]  # (N,)
    q: tuple[int, ...]  # (N,), integer utilities
    e: int  # utilities ~ q / 2^e
    a: float  # theta += a * sum_m q_m * sign_m * n(seed_m)
    decay: float = 0.0  # theta -= decay * (theta - anchor), a float32 value; applied before the ES term
    anchored: bool = False  # the anchor is theta_0; otherwise 0
    distribution: str = "normal"
    rank: int = 0  # rank of the low-rank noise; 0: every parameter has full noise
    a_lowrank: float = 0.0  # low-rank matrices: theta += a_lowrank * sum_m q_m * sign_m * A_m B_m^T

    @property
    def is_zero(self) -> bool:
        """Whether all utilities are 0. Theta then stays as it is: it does not decay either."""
        return not any(self.q)


def integer_utilities(utilities: Sequence[float], rank: int = 0) -> tuple[list[int], int]:
    """Return ``(q, e)`` with ``q = rint(utilities * 2^e)``, half to even, for the largest exponent that fits.

    An exponent fits if max|q| <= 32767 and max|q| * 16 * N < 2^31 (with low-rank noise max|q| * 256 * N * rank < 2^31).
    Then no order of summation overflows int32. Utilities that are all zero give ``e = 0``.

    Raises:
        ValueError: a utility is not finite.
    """
    largest = max((abs(value) for value in utilities), default=0.0)
    if largest == 0.0:
        return [0] * len(utilities), 0
    if not math.isfinite(largest):
        raise ValueError("utilities must be finite")

    largest_noise = MAX_NOISE**2 * rank if rank else MAX_NOISE

    def fits(exponent: int) -> bool:
        top = round(math.ldexp(largest, exponent))
        return top <= MAX_Q and top * largest_noise * len(utilities) < 1 << 31

    exponent = 15 - math.frexp(largest)[1]  # ldexp(largest, exponent) lies in [2^14, 2^15)
    while not fits(exponent):
        exponent -= 1
    return [round(math.ldexp(value, exponent)) for value in utilities], exponent


def make_update(
    members: Sequence[Member],
    utilities: Sequence[float],
    learning_rate: float,
    *,
    weight_decay: float = 0.0,
    anchored: bool = False,
    distribution: str = "normal",
    rank: int = 0,
) -> Update:
    """Turn a step's utilities into the exact update.

    Args:
        members: (N,) in population order.
        utilities: (N,), shaped fitness.
        learning_rate: this step's learning rate, after the schedule.
        weight_decay: lambda of ``theta -= learning_rate * lambda * (theta - anchor)``, decoupled as in AdamW.
        anchored: whether the decay goes towards theta_0 (arXiv 2605.30148) instead of 0.
        distribution: the noise's distribution.
        rank: rank of the low-rank noise; 0: full noise.
    """
    q, e = integer_utilities(utilities, rank)

    def scale(deviation: float) -> float:
        return round_to_bits(math.ldexp(learning_rate / (len(members) * deviation), -e), SCALE_BITS)

    a = scale(noise_deviation(distribution))
    a_lowrank = scale(lowrank_deviation(rank, distribution)) if rank else 0.0
    decay = float(np.float32(learning_rate * weight_decay))
    return Update(tuple(members), tuple(q), e, a, decay, anchored, distribution, rank, a_lowrank)


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors in [0, 1] by which the schedules multiply a step's configured values."""

    learning_rate: float = 1.0
    sigma: float = 1.0


def scheduled(schedule: str, step: float, max_steps: int, warmup_steps: int = 0) -> float:
    """Return the factor in [0, 1] by which ``step`` (0-based, of ``max_steps``) multiplies the configured value.

    ``step`` lies between two steps where time, not steps, says how far the run is.

    During warm-up the factor is ``(step + 1) / warmup_steps``, so that the first step moves theta. After warm-up,
    ``constant`` and ``constant_with_warmup`` stay at 1. The two are the same here; transformers ignores warm-up for
    ``constant``. ``linear`` and ``cosine`` fall towards 0 and would reach it at step ``max_steps``. So the last step,
    ``max_steps - 1``, still moves theta.

    Raises:
        ValueError: the schedule is unknown.
    """
    if step < warmup_steps:
        return min(1.0, (step + 1) / warmup_steps)
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    if schedule == "linear":
        return max(0.0, 1.0 - progress)
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    if schedule in ("constant", "constant_with_warmup"):
        return 1.0
    raise ValueError(f"unknown schedule {schedule!r}; known: {', '.join(SCHEDULES)}")
