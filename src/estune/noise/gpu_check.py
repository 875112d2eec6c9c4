"""Does a device compute what the CPU kernels compute, to the bit? Asked once, before anything relies on it.

The kernels were never executed on a GPU: until they were, and on hardware, drivers and Triton versions that nobody
tried, this comparison is what stands between a wrong bit and a journal. It takes milliseconds beside the compiler.
"""

from __future__ import annotations

import numpy as np
import torch

from estune.noise import cpu, cpu_lowrank, factor_names, gpu, noise_key
from estune.noise.reference import round_to_bits

SEED, NAME = 0x9E3779B97F4A7C15, "check.weight"
COUNT = 3 * gpu.BLOCK + 17  # ends in the middle of a program
START = (1 << 32) - COUNT  # the last elements of a key block
SCALE = -round_to_bits(1e-3 / 8**0.5, 16)
A = round_to_bits(3.1e-9, 22)
DECAY = float(np.float32(0.013))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STACK = (2, 37, 71)  # of the low-rank kernels: two matrices, tiles that end outside


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


def check(device: torch.device, distributions: tuple[str, ...] = ("normal",)) -> list[str]:
    """Return what differs from the CPU kernels, in words; nothing where a device can be trusted."""
    wrong = []
    for distribution in distributions:
        rademacher = distribution == "rademacher"
        wrong += [f"{what} ({distribution})" for what in _full(device, rademacher) + _lowrank(device, rademacher)]
    return wrong


def _full(device: torch.device, rademacher: bool) -> list[str]:
    """Check members and updates of full noise."""
    wrong = []
    theta, anchor = theta_values(COUNT), theta_values(COUNT)[::-1].copy()
    (k0, k1), expected = noise_key(SEED, NAME), np.empty_like(theta)
    cpu.perturb_into(expected, theta, START, np.uint32(k0), np.uint32(k1), np.float32(SCALE), rademacher)
    for dtype in DTYPES:
        out = torch.empty(COUNT, dtype=dtype, device=device)
        gpu.perturb_into(out, torch.from_numpy(theta).to(device), START, (k0, k1), SCALE, rademacher)
        if not _same(out, torch.from_numpy(expected).to(dtype)):
            wrong.append(f"a member in {dtype}")
    keys, q = keys_of(NAME, 5), np.array([32767, -3, 1, -20000, 7], dtype=np.int32)
    for decay, base in ((0.0, None), (DECAY, None), (DECAY, anchor)):
        moved, expected = torch.from_numpy(theta.copy()).to(device), theta.copy()
        wanted = cpu.update_into(
            expected,
            START,
            keys,
            q,
            A,
            rademacher,
            np.float32(decay),
            np.empty(0, np.float32) if base is None else base,
        )
        sums = gpu.update_into(
            moved,
            START,
            gpu.words(keys, device),
            torch.from_numpy(q).to(device),
            A,
            rademacher,
            decay,
            _to(base, device),
        )
        if not _same(moved, torch.from_numpy(expected)) or not _near(sums, wanted):
            wrong.append(f"an update with decay {decay}{'' if base is None else ' to an anchor'}")
    if int(gpu.checksum_of(torch.from_numpy(theta).to(device), START)) % 2**64 != int(cpu.checksum_of(theta, START)):
        wrong.append("a checksum")
    return wrong


def _lowrank(device: torch.device, rademacher: bool, rank: int = 2) -> list[str]:
    """Check members and updates of low-rank noise."""
    wrong = []
    n_matrices, d0, d1 = STACK
    rows = gpu.Rows(d0, d1, 0, n_matrices, 0, d0)
    theta = theta_values(rows.count).reshape(STACK)
    q = np.array([9, -3, 1], dtype=np.int32)
    keys_a, keys_b = (keys_of(name, 3) for name in factor_names(NAME))
    member, moved_to = np.empty_like(theta), theta.copy()
    wanted = [0, 0.0, 0.0]
    for e in range(n_matrices):
        at, columns = e * d0, e * d1
        cpu_lowrank.perturb_lowrank_into(
            member[e], theta[e], at, columns, keys_a[:1], keys_b[:1], rank, SCALE, rademacher
        )
        part = cpu_lowrank.update_lowrank_into(
            moved_to[e], at, columns, keys_a, keys_b, q, rank, A, rademacher, np.float32(DECAY), np.empty(0, np.float32)
        )
        wanted = [total + value for total, value in zip(wanted, (int(part[0]), part[1], part[2]), strict=True)]
    flat = torch.from_numpy(theta.reshape(-1)).to(device)
    out = torch.empty_like(flat)
    pair = [int(word) for word in (*keys_a[0], *keys_b[0])]
    gpu.perturb_lowrank_into(out, flat, rows, rank, pair, -1, -SCALE, rademacher)
    if not _same(out, torch.from_numpy(member.reshape(-1))):
        wrong.append("a low-rank member")
    moved = flat.clone()
    both = gpu.words(np.concatenate([keys_a, keys_b], axis=1), device)
    sums = gpu.update_lowrank_into(moved, rows, rank, both, torch.from_numpy(q).to(device), A, rademacher, DECAY, None)
    if not _same(moved, torch.from_numpy(moved_to.reshape(-1))) or not _near(sums, wanted):
        wrong.append("a low-rank update")
    return wrong


def _to(values: np.ndarray | None, device: torch.device) -> torch.Tensor | None:
    return None if values is None else torch.from_numpy(values).to(device)


def _same(out: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bits, which tells -0.0 from 0.0."""
    return torch.equal(out.cpu().view(torch.uint8), expected.view(torch.uint8))


def _near(sums: gpu.Sums, wanted: list[float] | tuple[int, float, float]) -> bool:
    """Equal checksums, and sums of squares that differ by their rounding alone."""
    same = int(sums.checksum) % 2**64 == int(wanted[0]) % 2**64
    return same and bool(np.allclose([float(sums.moved), float(sums.size)], wanted[1:], rtol=1e-12, atol=0.0))
