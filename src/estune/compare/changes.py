"""How far training moved the parameters, how the single changes are distributed, and how straight the way was.

Tensors are read one at a time, in two passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

CHUNK = 1 << 20  # elements held in float64 at a time
LIMIT, BINS = 6, 48  # the histogram's reach in RMS; its bins
EDGES = np.linspace(-LIMIT, LIMIT, BINS + 1)


@dataclass
class ParameterChanges:
    """How far the parameters moved, and the distribution of the single changes over all of them.

    ``density`` is the share of all parameters per RMS in each bin of ``edges``, which are in units of the changes' root
    mean square. ``kurtosis`` is the excess over the normal distribution's. Both are None where nothing moved.
    """

    parameters: int = 0
    moved: int = 0  # that are not the same float32
    norm: float = 0.0  # L2 of the change
    base_norm: float = 0.0  # L2 of the base
    edges: list[float] = field(default_factory=EDGES.tolist)
    density: list[float] | None = None
    kurtosis: float | None = None

    @property
    def ratio(self) -> float | None:
        """The change's norm in units of the base's; None where the base is 0."""
        return self.norm / self.base_norm if self.base_norm else None

    @property
    def moved_share(self) -> float:
        """The share of the parameters that moved at all."""
        return self.moved / self.parameters if self.parameters else 0.0


def walk_ratio(norm: float, records: Sequence[Mapping[str, Any]]) -> float | None:
    """Return how far a run went in units of a random walk of the same steps.

    Steps in independent directions add up in squares, and lead to about the root of the sum of the squared step norms.
    1 is such a walk; n equal steps straight ahead are sqrt(n); below 1, steps took each other back.

    Args:
        norm: L2 of the whole change.
        records: a run's metrics, `es/update_norm` among those of each step.

    Returns:
        The ratio; None where a step's norm was not recorded, or nothing moved.
    """
    steps = [record for record in records if "eval_reward" not in record]
    norms = [record.get("es/update_norm") for record in steps]
    if [record["step"] for record in steps] != list(range(1, len(steps) + 1)) or None in norms:
        return None
    walk = math.sqrt(math.fsum(step**2 for step in norms if step is not None))
    return norm / walk if walk else None


def parameter_changes(base: Mapping[str, np.ndarray], tuned: Mapping[str, np.ndarray]) -> ParameterChanges:
    """Compare float32 tensors of the same names and shapes; every sum is of float64.

    Memory is a chunk's, whatever the model, if the mappings read their tensors only when asked.

    Raises:
        ValueError: the two hold other names or shapes.
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
    """Yield the base's values and their changes in float64, piece by piece; the difference of two float32 is exact."""
    before, after = base[name], tuned[name]
    if before.shape != after.shape:
        raise ValueError(f"{name} has the shape {before.shape} in one model and {after.shape} in the other")
    before, after = before.reshape(-1), after.reshape(-1)
    for start in range(0, before.size, CHUNK):
        values = before[start : start + CHUNK].astype(np.float64)
        yield values, after[start : start + CHUNK].astype(np.float64) - values


def _distribution(result: ParameterChanges, base: Mapping[str, np.ndarray], tuned: Mapping[str, np.ndarray]) -> None:
    """Fill in histogram and kurtosis, in units of the RMS."""
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
    variance = 1.0 - m1**2  # the mean square is 1 by the choice of units
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 - 3 * m1**4
    result.density = (counts * BINS / (2 * LIMIT * n)).tolist()
    result.kurtosis = fourth / variance**2 - 3 if variance > 1e-12 else None  # all moved alike: no spread
