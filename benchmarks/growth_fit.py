"""How a cost grows with x: a power law, a line with fixed costs, and what the two say together.

The exponent is the slope of log(time) against log(x); it is judged over the points from a given x on, below which
fixed costs outweigh what x adds, and over the last three. The line is time = a + b x, fixed costs and costs for each x,
with a not below 0 and relative residuals, so that small x weigh as much as large ones. The verdict:

* linear: the line meets every point but the smallest within 15 %, or the judged exponent lies in 0.9 to 1.1 and that of
  the last three points is not above;
* less than linear: otherwise, where neither exponent is above 1.1. Members that share a forward pass become cheaper,
  larger matrices run at a better rate. No fault: cost is at most linear;
* MORE than linear: everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LINEAR = (0.9, 1.1)  # exponents that are called linear
LARGEST_RESIDUAL = 0.15  # of a line that explains the times


@dataclass(frozen=True)
class Fit:
    """Least-squares fits of times (seconds) against x: exponent ~ slope of the logarithms, and a + b x."""

    exponent: float  # over all points
    r2: float
    judged_from: float  # x
    judged_exponent: float  # over the points from there on
    judged_r2: float
    last_exponent: float  # over the last three points
    a_s: float
    b_s: float
    line_r2: float
    line_residual: float  # the largest |line / time - 1|, the smallest x apart

    @property
    def verdict(self) -> str:
        """How cost grows; see the head of this file."""
        in_line = self.line_residual <= LARGEST_RESIDUAL
        if not in_line and max(self.judged_exponent, self.last_exponent) > LINEAR[1]:
            return "MORE than linear"
        return "linear" if in_line or self.judged_exponent >= LINEAR[0] else "less than linear"


def r_squared(y: np.ndarray, fitted: np.ndarray) -> float:
    """Return the share of the variance of y (n,) that fitted values explain."""
    rest, spread = y - fitted, y - y.mean()
    return float(1 - rest @ rest / (spread @ spread)) if spread.any() else 1.0


def power(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return the exponent and R^2 of the power law through points (n,)."""
    slope, intercept = np.polyfit(np.log(x), np.log(y), 1)
    return float(slope), r_squared(np.log(y), slope * np.log(x) + intercept)


def line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return intercept a >= 0 and slope b of the line a + b x through points (n,) of least relative residuals."""
    b, a = np.polyfit(x, y, 1, w=1 / y)
    if a >= 0:
        return float(a), float(b)
    # Fixed costs are not negative; a line that has them so would follow growth that is more than linear.
    ratio = x / y
    return 0.0, float(ratio.sum() / (ratio @ ratio))


def fit(x: Sequence[float], seconds: Sequence[float], judged_from: float = 0.0) -> Fit:
    """Fit at least three times against x, both above 0 and in ascending order of x; two points are judged at least."""
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
