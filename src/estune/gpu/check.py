"""The comparison of a device's kernels with the CPU kernels, bit for bit; it runs once, before the device is used.

An H100 with Triton 3.6 passes. On untested hardware, drivers and versions the comparison keeps wrong bits out of the
journal. It takes milliseconds, apart from the compilation of the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from estune.es.noise import cpu, cpu_lowrank, factor_names, noise_key
from estune.es.noise.reference import round_to_bits
from estune.gpu import launch

SEED, NAME = 0x9E3779B97F4A7C15, "check.weight"
COUNT = 3 * launch.BLOCK + 17  # elements; the last program is only partly filled
START = (1 << 32) - COUNT  # element index; the elements are the last ones of a key block
SCALE = -round_to_bits(1e-3 / 8**0.5, 16)
A = round_to_bits(3.1e-9, 22)
DECAY = float(np.float32(0.013))
DISTRIBUTIONS = ("normal", "rademacher")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Q = np.array([32767, -3, 1, -20000, 7], dtype=np.int32)
STACK = (2, 37, 71)  # shape for the low-rank kernels: two matrices, whose last tiles are only partly filled
ROWS = launch.Rows(37, 71, matrix0=0, matrices=2, row0=0, rows=37)  # all rows of the stack
RANK = 2
Q_LOWRANK = np.array([9, -3, 1], dtype=np.int32)
NO_ANCHOR = np.empty(0, dtype=np.float32)


def theta_values(count: int) -> np.ndarray:
    """Return float32 weights (count,) of every kind: normal, zeros of both signs, subnormal, beyond float16's range."""
    rng = np.random.default_rng(0)
    theta: np.ndarray = (rng.standard_normal(count) * 10.0 ** rng.integers(-8, 3, count)).astype(np.float32)
    theta[::17] = -0.0
    theta[5::19] = 0.0
    theta[7::101] = 1e-40
    theta[11::103] = 65520.0  # rounds to infinity in float16
    return theta


def keys_of(name: str, members: int) -> np.ndarray:
    """Return the members' key words, uint32 (M, 2)."""
    return np.array([noise_key(SEED + m, name) for m in range(members)], dtype=np.uint32)


def decays(count: int) -> list[tuple[str, float, np.ndarray | None]]:
    """Return every kind of decay: its description, its value, and its anchor (count,) or None."""
    anchor = theta_values(count)[::-1].copy()
    return [("without decay", 0.0, None), ("with decay to 0", DECAY, None), ("with decay to an anchor", DECAY, anchor)]


def check(device: torch.device, distributions: Sequence[str] = DISTRIBUTIONS) -> list[str]:
    """Return descriptions of the results that differ from the CPU kernels; an empty list if all are equal.

    Every distribution, weight dtype and kind of decay compiles to a separate kernel, so each one is compared.
    """
    wrong = _checksum(device)
    for distribution in distributions:
        rademacher = distribution == "rademacher"
        for compare in (_members, _updates, _lowrank_members, _lowrank_updates):
            wrong += [f"{what} ({distribution})" for what in compare(device, rademacher)]
    return wrong


def _checksum(device: torch.device) -> list[str]:
    """Return the checksum's description if it differs."""
    theta = theta_values(COUNT)
    total = int(launch.checksum_of(torch.from_numpy(theta).to(device), START))
    return [] if total % 2**64 == int(cpu.checksum_of(theta, START)) else ["a checksum"]


def _members(device: torch.device, rademacher: bool) -> list[str]:
    """Return the weight dtypes for which a member of full noise differs."""
    theta = theta_values(COUNT)
    (k0, k1), expected = noise_key(SEED, NAME), np.empty_like(theta)
    cpu.perturb_into(expected, theta, START, np.uint32(k0), np.uint32(k1), np.float32(SCALE), rademacher)
    wrong, on_device = [], torch.from_numpy(theta).to(device)
    for dtype in DTYPES:
        out = torch.empty(COUNT, dtype=dtype, device=device)
        launch.perturb_into(out, on_device, START, (k0, k1), SCALE, rademacher)
        if not _same(out, torch.from_numpy(expected).to(dtype)):
            wrong.append(f"a member in {dtype}")
    return wrong


def _updates(device: torch.device, rademacher: bool) -> list[str]:
    """Return the kinds of decay for which an update of full noise differs."""
    wrong, keys = [], keys_of(NAME, len(Q))
    words, q = launch.words(keys, device), torch.from_numpy(Q).to(device)
    for how, decay, anchor in decays(COUNT):
        theta = theta_values(COUNT)
        moved = torch.from_numpy(theta).to(device, copy=True)
        sums = launch.update_into(moved, START, words, q, A, rademacher, decay, _to(anchor, device))
        base = NO_ANCHOR if anchor is None else anchor
        wanted = cpu.update_into(theta, START, keys, Q, A, rademacher, np.float32(decay), base)
        if not _same(moved, torch.from_numpy(theta)) or not _near(sums, wanted):
            wrong.append(f"an update {how}")
    return wrong


def _lowrank_members(device: torch.device, rademacher: bool) -> list[str]:
    """Return the weight dtypes for which a member of low-rank noise differs."""
    _, d0, d1 = STACK
    theta = theta_values(ROWS.count)
    expected = np.empty(STACK, dtype=np.float32)
    keys_a, keys_b = (keys_of(name, 1) for name in factor_names(NAME))
    for e, matrix in enumerate(theta.reshape(STACK)):
        cpu_lowrank.perturb_lowrank_into(expected[e], matrix, e * d0, e * d1, keys_a, keys_b, RANK, SCALE, rademacher)
    wrong, on_device = [], torch.from_numpy(theta).to(device)
    words = [int(word) for word in (*keys_a[0], *keys_b[0])]
    for dtype in DTYPES:
        out = torch.empty(ROWS.count, dtype=dtype, device=device)
        launch.perturb_lowrank_into(out, on_device, ROWS, RANK, words, -1, -SCALE, rademacher)
        if not _same(out, torch.from_numpy(expected.reshape(-1)).to(dtype)):
            wrong.append(f"a low-rank member in {dtype}")
    return wrong


def _lowrank_updates(device: torch.device, rademacher: bool) -> list[str]:
    """Return the kinds of decay for which an update of low-rank noise differs."""
    keys_a, keys_b = (keys_of(name, len(Q_LOWRANK)) for name in factor_names(NAME))
    words = launch.words(np.concatenate([keys_a, keys_b], axis=1), device)
    wrong, q = [], torch.from_numpy(Q_LOWRANK).to(device)
    for how, decay, anchor in decays(ROWS.count):
        theta = theta_values(ROWS.count)
        moved = torch.from_numpy(theta).to(device, copy=True)
        sums = launch.update_lowrank_into(moved, ROWS, RANK, words, q, A, rademacher, decay, _to(anchor, device))
        wanted = _update_stack(theta.reshape(STACK), keys_a, keys_b, rademacher, decay, anchor)
        if not _same(moved, torch.from_numpy(theta)) or not _near(sums, wanted):
            wrong.append(f"a low-rank update {how}")
    return wrong


def _update_stack(
    theta: np.ndarray, keys_a: np.ndarray, keys_b: np.ndarray, rademacher: bool, decay: float, anchor: np.ndarray | None
) -> tuple[int, float, float]:
    """Move a stack (E, d0, d1) in place on the CPU, matrix by matrix; return `cpu.update_into`'s sums."""
    n_matrices, d0, d1 = theta.shape
    bases = [NO_ANCHOR] * n_matrices if anchor is None else anchor.reshape(n_matrices, d0 * d1)
    total, change_squares, theta_squares = 0, 0.0, 0.0
    for e, (matrix, base) in enumerate(zip(theta, bases, strict=True)):
        part = cpu_lowrank.update_lowrank_into(
            matrix, e * d0, e * d1, keys_a, keys_b, Q_LOWRANK, RANK, A, rademacher, np.float32(decay), base
        )
        total, change_squares, theta_squares = total + int(part[0]), change_squares + part[1], theta_squares + part[2]
    return total, change_squares, theta_squares


def _to(values: np.ndarray | None, device: torch.device) -> torch.Tensor | None:
    return None if values is None else torch.from_numpy(values).to(device)


def _same(out: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether all bits are equal; -0.0 differs from 0.0."""
    return torch.equal(out.cpu().view(torch.uint8), expected.view(torch.uint8))


def _near(sums: launch.Sums, wanted: tuple[int, float, float]) -> bool:
    """Return whether the checksums are equal and the sums of squares are equal to rounding."""
    same = int(sums.checksum) % 2**64 == int(wanted[0]) % 2**64
    return same and bool(
        np.allclose([float(sums.change_squares), float(sums.theta_squares)], wanted[1:], rtol=1e-12, atol=0.0)
    )
