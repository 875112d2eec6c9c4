"""The noise on CPUs: numba kernels, equal bit for bit to `reference` and about as fast as memory can be written.

Every kernel works on a contiguous piece of one parameter's flat tensor and releases the GIL. All elements of a piece
share one key: the piece lies within one block of 2^32 elements (`reference.BLOCK_SIZE`). `estune.es.theta` cuts tensors
into pieces and spreads the pieces over threads. A kernel allocates only the scratch memory of a tile. `lanes` computes
the hash.
"""

from __future__ import annotations

import numpy as np

from estune.es.noise.lanes import (
    CACHE_LINE,
    LANES,
    address_of,
    bits_of,
    fence,
    kernel,
    mix,
    noise_at,
    perturb_lanes,
    plus,
    stream_lanes,
    sum_lanes,
)

TILE = 4 * LANES  # elements that an update works on at once; their sums (5 KiB) fit the first-level cache


@kernel
def noise_into(out, start, k0, k1, rademacher):  # type: ignore[no-untyped-def]
    """Write the noise integers of elements ``start + j`` of one block to ``out``, int32 (count,)."""
    first_index = np.uint32(start)
    for j in range(out.size):
        out[j] = noise_at(plus(first_index, j), k0, k1, rademacher)


@kernel
def _perturb_singly(out, theta, first, last, first_index, k0, k1, scale, rademacher):  # type: ignore[no-untyped-def]
    """Do the same as `perturb_into` for the elements ``first .. last`` of the piece, one at a time."""
    for j in range(first, last):
        n = noise_at(plus(first_index, j), k0, k1, rademacher)
        # + 0.0 turns scale * 0 = -0.0 into 0.0: the sign of scale must not decide whether a theta of -0.0 stays -0.0.
        out[j] = theta[j] + (scale * np.float32(n) + np.float32(0.0))


@kernel
def perturb_into(out, theta, start, k0, k1, scale, rademacher, streamed=False):  # type: ignore[no-untyped-def]
    """Write ``theta + scale * n`` to ``out``; both float32 (count,). ``scale`` includes the member's sign.

    ``streamed`` makes the writes bypass the caches, which is faster if the whole model does not fit them. Only whole
    cache lines can bypass the caches, so the elements before the first cache line and after the last one do not.
    """
    first_index = np.uint32(start)
    first = 0
    if streamed:
        first = min(out.size, (-address_of(out, 0) % CACHE_LINE) // 4)
        _perturb_singly(out, theta, 0, first, first_index, k0, k1, scale, rademacher)
    last = out.size - (out.size - first) % LANES
    if streamed:
        for j in range(first, last, LANES):
            stream_lanes(out, theta, j, plus(first_index, j), k0, k1, scale, rademacher)
        fence()
    else:
        for j in range(first, last, LANES):
            perturb_lanes(out, theta, j, plus(first_index, j), k0, k1, scale, rademacher)
    _perturb_singly(out, theta, last, out.size, first_index, k0, k1, scale, rademacher)


@kernel
def checksum_of(theta, start):  # type: ignore[no-untyped-def]
    """Return ``sum_j mix(mix(start + j) + bits(theta_j))`` modulo 2^64; theta is float32 (count,)."""
    first_index = np.uint32(start)
    total = np.uint64(0)
    for j in range(theta.size):
        total += np.uint64(mix(plus(mix(plus(first_index, j)), bits_of(theta[j]))))
    return total


@kernel
def _update_tile(theta, acc, start, a, decay, anchor, change_squares, theta_squares):  # type: ignore[no-untyped-def]
    """Apply the decay and ``a * acc`` to one tile of theta and return the tile's checksum sum.

    ``change_squares`` and ``theta_squares``, both float64 (TILE,), hold one sum of squares per position in the tile: of
    the change, and of the new theta. The tile's squares are added to them. A single sum would be slow, and its bits
    would depend on the vector width.
    """
    total = np.uint64(0)
    for j in range(theta.size):
        before = theta[j]
        value = before
        if decay != np.float32(0.0):
            difference = value
            if anchor.size > 0:
                difference = np.float32(value - anchor[j])
            value = np.float32(value - np.float32(decay * difference))
        if acc[j] != 0:
            value = np.float32(np.float64(value) + a * np.float64(acc[j]))
        theta[j] = value
        total += np.uint64(mix(plus(mix(plus(start, j)), bits_of(value))))
        change_squares[j] += (np.float64(value) - np.float64(before)) ** 2
        theta_squares[j] += np.float64(value) ** 2
    return total


@kernel
def update_into(theta, start, keys, q, a, rademacher, decay, anchor):  # type: ignore[no-untyped-def]
    """Move ``theta`` (float32 (count,)) in place by one step.

    ``theta += a * acc`` with ``acc = sum_m q_m * n_m``, after the decay. The sum is exact in int32, so the order of the
    members does not matter. Members of utility 0 may be omitted.

    ``keys`` is uint32 (M, 2). ``q`` is int32 (M,): the integer utilities times the members' signs. ``decay`` is
    float32, 0 for no decay. ``anchor`` is float32 (count,), or (0,) for decay towards 0.

    Returns the checksum sum of the new theta, and the sums of squares of the change and of the new theta.
    """
    table = np.empty((q.size, 3), dtype=np.uint32)  # (M, 3), see `sum_lanes`
    for m in range(q.size):
        table[m, 0] = keys[m, 0] ^ (keys[m, 0] >> np.uint32(16))
        table[m, 1] = keys[m, 1]
        table[m, 2] = np.uint32(q[m])
    acc = np.empty(TILE, dtype=np.int32)  # (TILE,)
    change_squares = np.zeros(TILE, dtype=np.float64)  # (TILE,)
    theta_squares = np.zeros(TILE, dtype=np.float64)  # (TILE,)
    total = np.uint64(0)
    for lo in range(0, theta.size, TILE):
        hi = min(theta.size, lo + TILE)
        first_index = plus(np.uint32(start), lo)
        for j in range(0, hi - lo, LANES):  # sums beyond the end of theta are not read
            sum_lanes(acc, j, plus(first_index, j), table, rademacher)
        tile, towards = theta[lo:hi], anchor[lo:hi]
        total += _update_tile(tile, acc, first_index, a, decay, towards, change_squares, theta_squares)
    return total, change_squares.sum(), theta_squares.sum()
