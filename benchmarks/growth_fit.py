"""Fits times against a size x: a power law, a line with fixed costs, and a verdict from both.

The exponent is the slope of log(time) against log(x). It is judged over two ranges: the points from a given x on, below
which fixed costs dominate, and the last three points. The line is time = a + b x with fixed costs a >= 0. Its residuals
are relative, so that small x have the same weight as large x. The verdict is one of three:

* linear: the line meets every point except the smallest within 15 %, or the judged exponent lies in 0.9 to 1.1 and the
  exponent of the last three points is at most 1.1;
* less than linear: otherwise, if neither exponent is above 1.1. Members that share a forward pass become cheaper, and
  larger matrices run at a higher rate. This is no fault: the cost is at most linear;
* MORE than linear: all other cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LINEAR = (0.9, 1.1)  # range of exponents that count as linear
LARGEST_RESIDUAL = 0.15  # relative; a line with smaller residuals explains the times


@dataclass(frozen=True)
class Fit:
    """Least-squares fits of times in seconds against x: a power law and the line a + b x."""

    exponent: float  # over all points
    r2: float
    judged_from: float  # x
    judged_exponent: float  # over the points from `judged_from` on
    judged_r2: float
    last_exponent: float  # over the last three points
    a_s: float
    b_s: float
    line_r2: float
    line_residual: float  # the largest |line / time - 1|, without the smallest x

    @property
    def verdict(self) -> str:
        """How the cost grows; the module's docstring defines the verdicts."""
        in_line = self.line_residual <= LARGEST_RESIDUAL
        if not in_line and max(self.judged_exponent, self.last_exponent) > LINEAR[1]:
            return "MORE than linear"
        return "linear" if in_line or self.judged_exponent >= LINEAR[0] else "less than linear"


def r_squared(y: np.ndarray, fitted: np.ndarray) -> float:
    """Return the share of the variance of y (n,) that the fitted values (n,) explain."""
    rest, spread = y - fitted, y - y.mean()
    return float(1 - rest @ rest / (spread @ spread)) if spread.any() else 1.0


def power(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return the exponent and R^2 of the power law through points (n,)."""
    slope, intercept = np.polyfit(np.log(x), np.log(y), 1)
    return float(slope), r_squared(np.log(y), slope * np.log(x) + intercept)


def line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return intercept a >= 0 and slope b of the line a + b x with the least relative residuals to points (n,)."""
    b, a = np.polyfit(x, y, 1, w=1 / y)
    if a >= 0:
        return float(a), float(b)
    # Fixed costs cannot be negative: a line with a negative intercept could follow growth that is more than linear.
    ratio = x / y
    return 0.0, float(ratio.sum() / (ratio @ ratio))


def fit(x: Sequence[float], seconds: Sequence[float], judged_from: float = 0.0) -> Fit:
    """Fit three or more times in seconds against x, both above 0, in ascending order of x.

    The exponent is judged from ``judged_from`` on, over at least two points.
    """
    xs, ys = np.array(x, dtype=np.float64), np.array(seconds, dtype=np.float64)
    first = min(int(np.searchsorted(xs, judged_from)), len(xs) - 2)
    a, b = line(xs, ys)
    on_line = a + b * xs
    return Fit(
        *power(xs, ys),
        float(xs[first]),
        *power(xs[first:], ys[first:]),
        power(xs[-3:], ys[-3:])[0],
        a,
        b,
        r_squared(ys, on_line),
        float(abs(on_line / ys - 1)[1:].max()),
    )
