"""The noise at memory speed on CPUs: numba kernels, equal bit for bit to `reference`.

Every kernel works on a contiguous piece of one parameter's flat tensor that lies within one key block and releases
the GIL; the callers (`estune.master`) cut tensors into pieces and spread them over threads. Nothing here allocates
anything of a tensor's size.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

TILE = 2048  # elements whose int32 accumulators (8 KiB) stay in the first-level cache


@intrinsic
def _popcount(typingctx, x):  # type: ignore[no-untyped-def]
    """Count the set bits of a uint32 by LLVM's ctpop, which vectorises (VPOPCNTDQ, or a shuffle on AVX2)."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.ctpop(args[0])

    return types.uint32(types.uint32), codegen


@intrinsic
def _bits_of(typingctx, x):  # type: ignore[no-untyped-def]
    """Reinterpret a float32 as its uint32 bit pattern."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@njit(inline="always")
def _mix(x):  # type: ignore[no-untyped-def]
    # numba widens uint32 arithmetic to 64 bits; the casts narrow it again, which LLVM folds into 32-bit lanes.
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(0x21F0AAAD))
    x = np.uint32(x ^ (x >> np.uint32(15)))
    x = np.uint32(x * np.uint32(0xD35A2D97))
    return np.uint32(x ^ (x >> np.uint32(15)))


@njit(inline="always")
def _noise(i, k0, k1, rademacher):  # type: ignore[no-untyped-def]
    word = _mix(np.uint32(_mix(np.uint32(i ^ k0)) + k1))
    if rademacher:
        return np.int32((word >> np.uint32(31)) << np.uint32(1)) - np.int32(1)
    return np.int32(_popcount(word)) - np.int32(16)  # type: ignore[call-arg]


@njit(nogil=True, cache=True, boundscheck=False)
def noise_into(out, start, k0, k1, rademacher):  # type: ignore[no-untyped-def]
    """Write the noise integers of elements ``start + j`` (within one block) to ``out``, int32 (count,)."""
    base = np.uint32(start)
    for j in range(out.size):
        out[j] = _noise(np.uint32(base + np.uint32(j)), k0, k1, rademacher)


@njit(nogil=True, cache=True, boundscheck=False)
def perturb_into(out, theta, start, k0, k1, scale, rademacher):  # type: ignore[no-untyped-def]
    """Write ``theta + scale * n`` (float32, scale carries the sign) to ``out``; both (count,)."""
    base = np.uint32(start)
    for j in range(out.size):
        n = _noise(np.uint32(base + np.uint32(j)), k0, k1, rademacher)
        # + 0.0: where n = 0 the sign of scale must not turn up as -0.0 and keep a theta of -0.0 as it is.
        out[j] = theta[j] + (scale * np.float32(n) + np.float32(0.0))


@njit(nogil=True, cache=True, boundscheck=False)
def checksum_of(theta, start):  # type: ignore[no-untyped-def]
    """Return ``sum_j mix(mix(start + j) + bits(theta_j))`` modulo 2^64 over a float32 (count,)."""
    base = np.uint32(start)
    total = np.uint64(0)
    for j in range(theta.size):
        total += np.uint64(_mix(np.uint32(_mix(np.uint32(base + np.uint32(j))) + _bits_of(theta[j]))))  # type: ignore[call-arg]
    return total


@njit(nogil=True, cache=True, boundscheck=False)
def update_into(theta, start, keys, q, a, rademacher, decay, anchor):  # type: ignore[no-untyped-def]
    """Move ``theta`` (float32, (count,)) in place by one step.

    Returns ``(checksum, moved, size)``: the checksum of theta afterwards, the sum of squares of what was added, and
    of theta afterwards.

    ``keys`` is uint32 (M, 2) and ``q`` int32 (M,), the utilities as integers with the members' signs multiplied in;
    members of utility 0 may be left out. ``acc = sum_m q_m * n_m`` is exact in int32, so the order of members does
    not matter. ``decay`` is float32, 0 for none; ``anchor`` is float32, (count,) or (0,) for decay towards 0.
    """
    acc = np.empty(TILE, dtype=np.int32)  # (TILE,)
    total = np.uint64(0)
    moved = 0.0
    size = 0.0
    for lo in range(0, theta.size, TILE):
        n_tile = min(TILE, theta.size - lo)
        base = np.uint32(np.uint32(start) + np.uint32(lo))
        for j in range(n_tile):
            acc[j] = 0
        for m in range(q.size):
            k0 = keys[m, 0]
            k1 = keys[m, 1]
            weight = q[m]
            for j in range(n_tile):
                acc[j] += np.int32(weight * _noise(np.uint32(base + np.uint32(j)), k0, k1, rademacher))
        for j in range(n_tile):
            before = theta[lo + j]
            value = before
            if decay != np.float32(0.0):
                difference = value
                if anchor.size > 0:
                    difference = np.float32(value - anchor[lo + j])
                value = np.float32(value - np.float32(decay * difference))
            if acc[j] != 0:
                value = np.float32(np.float64(value) + a * np.float64(acc[j]))
            theta[lo + j] = value
            total += np.uint64(_mix(np.uint32(_mix(np.uint32(base + np.uint32(j))) + _bits_of(value))))  # type: ignore[call-arg]
            moved += (np.float64(value) - np.float64(before)) ** 2
            size += np.float64(value) ** 2
    return total, moved, size
