"""The parameters' changes in training: their norm, their distribution, and their norm relative to a random walk.

Tensors are read one at a time, in two passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

CHUNK = 1 << 20  # elements of a chunk in float64
LIMIT, BINS = 6, 48  # the histogram's largest value in units of the root mean square; its number of bins
EDGES = np.linspace(-LIMIT, LIMIT, BINS + 1)


@dataclass
class ParameterChanges:
    """How far the parameters moved, and the distribution of the changes over all parameters.

    ``edges`` (BINS + 1,) are in units of the changes' root mean square (RMS). ``density`` (BINS,) is the share of all
    parameters in each bin, per RMS. ``kurtosis`` is the excess over the normal distribution's. ``density`` and
    ``kurtosis`` are None if no parameter moved.
    """

    parameters: int = 0
    moved: int = 0  # parameters whose float32 differs from the base's
    norm: float = 0.0  # L2 of the change
    base_norm: float = 0.0  # L2 of the base
    edges: list[float] = field(default_factory=EDGES.tolist)
    density: list[float] | None = None
    kurtosis: float | None = None

    @property
    def ratio(self) -> float | None:
        """The change's norm in units of the base's norm; None if the base is 0."""
        return self.norm / self.base_norm if self.base_norm else None

    @property
    def moved_share(self) -> float:
        """The share of the parameters that moved."""
        return self.moved / self.parameters if self.parameters else 0.0


def walk_ratio(norm: float, records: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the norm of a run's whole change in units of a random walk with the same step norms.

    A walk of steps in independent directions reaches about the root of the sum of the squared step norms. The ratio is
    1 for such a walk and sqrt(n) for n equal steps in one direction; below 1, steps partly undid each other.

    Args:
        norm: L2 of the whole change.
        records: the run's metrics, with `es/update_norm` for each step.

    Returns:
        The ratio; None if a step has no recorded norm, or if no parameter moved.
    """
    steps = [record for record in records if "eval_reward" not in record]
    norms = [record.get("es/update_norm") for record in steps]
    if [record["step"] for record in steps] != list(range(1, len(steps) + 1)) or None in norms:
        return None
    walk = math.sqrt(math.fsum(step**2 for step in norms if step is not None))
    return norm / walk if walk else None


def parameter_changes(base: Mapping[str, np.ndarray], tuned: Mapping[str, np.ndarray]) -> ParameterChanges:
    """Return the changes between float32 tensors of the same names and shapes; sums are in float64.

    The memory needed is that of a chunk if the mappings read a tensor only when it is accessed.

    Raises:
        ValueError: the two have different names or shapes.
    """
    if base.keys() != tuned.keys():
        raise ValueError(f"one model alone has {', '.join(sorted(base.keys() ^ tuned.keys())[:3])}")
    result = ParameterChanges()
    squares, base_squares = [], []
    for name in base:
        for before, change in _chunks(name, base, tuned):
            result.parameters += change.size
            result.moved += int(np.count_nonzero(change))
            squares.append(float(change @ change))
            base_squares.append(float(before @ before))
    result.norm, result.base_norm = (math.sqrt(math.fsum(sums)) for sums in (squares, base_squares))
    if result.moved:
        _distribution(result, base, tuned)
    return result


def _chunks(
    name: str, base: Mapping[str, np.ndarray], tuned: Mapping[str, np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the base's values and their changes in float64, chunk by chunk; a difference of two float32 is exact."""
    before, after = base[name], tuned[name]
    if before.shape != after.shape:
        raise ValueError(f"{name} has the shape {before.shape} in one model and {after.shape} in the other")
    before, after = before.reshape(-1), after.reshape(-1)
    for start in range(0, before.size, CHUNK):
        values = before[start : start + CHUNK].astype(np.float64)
        yield values, after[start : start + CHUNK].astype(np.float64) - values


def _distribution(result: ParameterChanges, base: Mapping[str, np.ndarray], tuned: Mapping[str, np.ndarray]) -> None:
    """Set the histogram and the kurtosis of ``result``, in units of the RMS."""
    n, rms = result.parameters, result.norm / math.sqrt(result.parameters)
    counts = np.zeros(BINS, dtype=np.int64)
    powers = []
    for name in base:
        for _, change in _chunks(name, base, tuned):
            scaled = change / rms
            counts += np.histogram(scaled, EDGES)[0]
            square = scaled * scaled
            powers.append((float(scaled.sum()), float(square @ scaled), float(square @ square)))
    m1, m3, m4 = (math.fsum(column) / n for column in zip(*powers, strict=True))
    variance = 1.0 - m1**2  # the mean square is 1 in units of the RMS
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 - 3 * m1**4
    result.density = (counts * BINS / (2 * LIMIT * n)).tolist()
    result.kurtosis = fourth / variance**2 - 3 if variance > 1e-12 else None  # None: every change is equal
