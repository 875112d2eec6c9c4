"""Student's t for any degrees of freedom, fractions included, without scipy."""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist

import numpy as np

NODES, WEIGHTS = np.polynomial.legendre.leggauss(64)
PLACES = ((NODES + 1) / 2) ** 4  # denser towards 0, where the density of few degrees has a kink
SPACING = WEIGHTS * 2 * ((NODES + 1) / 2) ** 3
MOST_DEGREES = 5000  # beyond, the normal distribution is right to three digits of a p-value


def outside(t: float, degrees: float) -> float:
    """Return the chance that |T| exceeds ``t``, not negative; ``degrees`` at least 1.

    With T = sqrt(degrees) / tan(angle) the angle's density is in proportion to sin(angle) ** (degrees - 1).
    """
    if degrees > MOST_DEGREES:
        return math.erfc(t / math.sqrt(2))
    angle = math.atan2(math.sqrt(degrees), t)
    area = angle * float(SPACING @ np.sin(angle * PLACES) ** (degrees - 1))
    log_whole = math.lgamma(degrees / 2) - math.lgamma((degrees + 1) / 2) + math.log(math.pi) / 2
    return min(1.0, 2 * area * math.exp(-log_whole))


@cache
def quantile(alpha: float, degrees: float) -> float:
    """Return the t that |T| exceeds with chance ``alpha`` in (0, 1): 4.3027 for 0.05 and two degrees."""
    low, high = 0.0, NormalDist().inv_cdf(1 - alpha / 2)
    while outside(high, degrees) > alpha:
        low, high = high, 2 * high
    for _ in range(45):
        middle = (low + high) / 2
        low, high = (middle, high) if outside(middle, degrees) > alpha else (low, middle)
    return high
