"""Does a device compute what the CPU kernels compute, to the bit? Asked once, before anything relies on it.

An H100 with Triton 3.6 does. On hardware, drivers and versions that nobody tried, this comparison is what stands
between a wrong bit and a journal. It takes milliseconds beside the compiler.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from estune.es.noise import cpu, cpu_lowrank, factor_names, noise_key
from estune.es.noise.reference import round_to_bits
from estune.gpu import launch

SEED, NAME = 0x9E3779B97F4A7C15, "check.weight"
COUNT = 3 * launch.BLOCK + 17  # ends in the middle of a program
START = (1 << 32) - COUNT  # the last elements of a key block
SCALE = -round_to_bits(1e-3 / 8**0.5, 16)
A = round_to_bits(3.1e-9, 22)
DECAY = float(np.float32(0.013))
DISTRIBUTIONS = ("normal", "rademacher")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Q = np.array([32767, -3, 1, -20000, 7], dtype=np.int32)
STACK = (2, 37, 71)  # of the low-rank kernels: two matrices, tiles that end outside
ROWS = launch.Rows(37, 71, matrix0=0, matrices=2, row0=0, rows=37)  # all of them
RANK = 2
Q_LOWRANK = np.array([9, -3, 1], dtype=np.int32)
NO_ANCHOR = np.empty(0, dtype=np.float32)


def theta_values(count: int) -> np.ndarray:
    """Return weights of every kind, float32 (count,): normal, zeros of both signs, subnormal, at float16's end."""
    rng = np.random.default_rng(0)
    theta: np.ndarray = (rng.standard_normal(count) * 10.0 ** rng.integers(-8, 3, count)).astype(np.float32)
    theta[::17] = -0.0
    theta[5::19] = 0.0
    theta[7::101] = 1e-40
    theta[11::103] = 65520.0  # to nearest even, float16's infinity
    return theta


def keys_of(name: str, members: int) -> np.ndarray:
    """Return members' key words, uint32 (M, 2)."""
    return np.array([noise_key(SEED + m, name) for m in range(members)], dtype=np.uint32)


def decays(count: int) -> list[tuple[str, float, np.ndarray | None]]:
    """Return the ways of decay: in words, how much of it, and the anchor (count,) where there is one."""
    anchor = theta_values(count)[::-1].copy()
    return [("without decay", 0.0, None), ("with decay to 0", DECAY, None), ("with decay to an anchor", DECAY, anchor)]


def check(device: torch.device, distributions: Sequence[str] = DISTRIBUTIONS) -> list[str]:
    """Return what differs from the CPU kernels, in words; nothing where a device can be trusted.

    Distributions, weight dtypes and ways of decay are kernels of their own once compiled, so each is compared.
    """
    wrong = _checksum(device)
    for distribution in distributions:
        rademacher = distribution == "rademacher"
        for compare in (_members, _updates, _lowrank_members, _lowrank_updates):
            wrong += [f"{what} ({distribution})" for what in compare(device, rademacher)]
    return wrong


def _checksum(device: torch.device) -> list[str]:
    """Compare a checksum."""
    theta = theta_values(COUNT)
    total = int(launch.checksum_of(torch.from_numpy(theta).to(device), START))
    return [] if total % 2**64 == int(cpu.checksum_of(theta, START)) else ["a checksum"]


def _members(device: torch.device, rademacher: bool) -> list[str]:
    """Compare members of full noise, in every dtype of weights."""
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
    """Compare updates of full noise, with every way of decay."""
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
    """Compare members of low-rank noise, in every dtype of weights."""
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
    """Compare updates of low-rank noise, with every way of decay."""
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
    """Move a stack (E, d0, d1) in place on the CPU, matrix by matrix; return its checksum and squares."""
    n_matrices, d0, d1 = theta.shape
    bases = [NO_ANCHOR] * n_matrices if anchor is None else anchor.reshape(n_matrices, d0 * d1)
    total, moved, size = 0, 0.0, 0.0
    for e, (matrix, base) in enumerate(zip(theta, bases, strict=True)):
        part = cpu_lowrank.update_lowrank_into(
            matrix, e * d0, e * d1, keys_a, keys_b, Q_LOWRANK, RANK, A, rademacher, np.float32(decay), base
        )
        total, moved, size = total + int(part[0]), moved + part[1], size + part[2]
    return total, moved, size


def _to(values: np.ndarray | None, device: torch.device) -> torch.Tensor | None:
    return None if values is None else torch.from_numpy(values).to(device)


def _same(out: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bits, which tells -0.0 from 0.0."""
    return torch.equal(out.cpu().view(torch.uint8), expected.view(torch.uint8))


def _near(sums: launch.Sums, wanted: tuple[int, float, float]) -> bool:
    """Equal checksums, and sums of squares that differ by their rounding alone."""
    same = int(sums.checksum) % 2**64 == int(wanted[0]) % 2**64
    return same and bool(np.allclose([float(sums.moved), float(sums.size)], wanted[1:], rtol=1e-12, atol=0.0))
