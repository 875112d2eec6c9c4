"""How far training moved the parameters, and whether it looks like a random walk of that size.

Steps in random directions, which is what evolution strategies take where rewards tell nothing, leave changes of a
normal distribution, the same in every tensor. Tensors are read one at a time, in two passes.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np

CHUNK = 1 << 20  # elements held in float64 at a time
LIMIT, BINS, FINE = 6, 48, 64  # the histogram's reach in RMS; its bins; narrow bins in each, for the distance
EDGES = np.linspace(-LIMIT, LIMIT, BINS + 1)
BLOCK = re.compile(r"\.\d+(?=\.|$)")


@dataclass
class Movement:
    """How far some parameters moved."""

    parameters: int = 0
    moved: int = 0  # that are not the same float32
    change_norm: float = 0.0  # L2
    norm: float = 0.0  # L2, of the base

    @property
    def ratio(self) -> float | None:
        """The change's norm in units of the base's; None where the base is 0."""
        return self.change_norm / self.norm if self.norm else None

    @property
    def moved_share(self) -> float:
        """The share of the parameters that moved at all."""
        return self.moved / self.parameters if self.parameters else 0.0

    @property
    def rms(self) -> float:
        """The root of the mean square change."""
        return self.change_norm / math.sqrt(self.parameters) if self.parameters else 0.0


@dataclass
class ParameterChanges:
    """The whole model's movement, that of every kind of tensor, and the distribution of the single changes.

    ``density`` is the share of all parameters per RMS in each bin of `EDGES`; ``normal_density`` is what the standard
    normal has there. ``kurtosis`` is the excess over the normal's. ``distance`` is the largest gap between the two
    cumulative distributions (Kolmogorov-Smirnov), at the edges of narrow bins: at most 0.0016 too small, from -6 to 6.
    The three are None where nothing moved.
    """

    total: Movement
    kinds: dict[str, Movement] = field(default_factory=dict)
    edges: list[float] = field(default_factory=EDGES.tolist)
    density: list[float] | None = None
    normal_density: list[float] = field(default_factory=list)
    outside: float = 0.0  # share beyond the histogram
    kurtosis: float | None = None
    distance: float | None = None


def kind(name: str) -> str:
    """Return a tensor's name without the number of its block: the same for every layer."""
    return BLOCK.sub(".*", name)


def parameter_changes(base: Mapping[str, np.ndarray], tuned: Mapping[str, np.ndarray]) -> ParameterChanges:
    """Compare float32 tensors of the same names and shapes; every sum is of float64.

    Memory is a chunk's, whatever the model, if the mappings read their tensors only when asked.

    Raises:
        ValueError: the two hold other names or shapes.
    """
    if base.keys() != tuned.keys():
        raise ValueError(f"one model alone has {', '.join(sorted(base.keys() ^ tuned.keys())[:3])}")
    sums: dict[str, list[tuple[int, int, float, float]]] = defaultdict(list)
    for name in base:
        for before, change in _chunks(name, base, tuned):
            moved = int(np.count_nonzero(change))
            sums[kind(name)].append((change.size, moved, float(change @ change), float(before @ before)))
    kinds = {name: _movement(parts) for name, parts in sorted(sums.items())}
    result = ParameterChanges(_movement([part for parts in sums.values() for part in parts]), kinds)
    cumulative = np.array([NormalDist().cdf(edge) for edge in np.linspace(-LIMIT, LIMIT, BINS * FINE + 1)])
    width = 2 * LIMIT / BINS
    result.normal_density = (np.diff(cumulative[::FINE]) / width).tolist()
    if result.total.moved:
        _distribution(result, base, tuned, cumulative, width)
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


def _movement(parts: list[tuple[int, int, float, float]]) -> Movement:
    sizes, moved, changes, values = zip(*parts, strict=True) if parts else ((), (), (), ())
    return Movement(sum(sizes), sum(moved), math.sqrt(math.fsum(changes)), math.sqrt(math.fsum(values)))


def _distribution(
    result: ParameterChanges,
    base: Mapping[str, np.ndarray],
    tuned: Mapping[str, np.ndarray],
    cumulative: np.ndarray,
    width: float,
) -> None:
    """Fill in histogram, kurtosis and distance, in units of the RMS."""
    n, rms = result.total.parameters, result.total.rms
    counts = np.zeros(BINS * FINE, dtype=np.int64)
    below, powers = 0, []
    for name in base:
        for _, change in _chunks(name, base, tuned):
            scaled = change / rms
            counts += np.histogram(scaled, BINS * FINE, (-LIMIT, LIMIT))[0]
            below += int(np.count_nonzero(scaled < -LIMIT))
            square = scaled * scaled
            powers.append((float(scaled.sum()), float(square @ scaled), float(square @ square)))
    m1, m3, m4 = (math.fsum(column) / n for column in zip(*powers, strict=True))
    variance = 1.0 - m1**2  # the mean square is 1 by the choice of units
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 - 3 * m1**4
    inside = int(counts.sum())
    shares = (below + np.concatenate([[0], np.cumsum(counts)])) / n
    result.density = (counts.reshape(BINS, FINE).sum(1) / (n * width)).tolist()
    result.outside = (n - inside) / n
    result.kurtosis = fourth / variance**2 - 3 if variance > 1e-12 else None  # all moved alike: no spread
    result.distance = float(np.abs(shares - cumulative).max())
