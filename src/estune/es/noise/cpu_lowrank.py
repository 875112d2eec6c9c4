"""Low-rank noise at memory speed on CPUs: numba kernels, equal bit for bit to `reference`.

The product `A B^T` of a whole matrix is never stored. A kernel works on a contiguous range of rows of one matrix, tile
by tile. It draws a few columns ("factors") of A and B at a time and multiplies them into int32 accumulators. An update
sums over the `M * rank` factors of all members in one pass and writes theta once. The scratch memory (`ROWS` x `COLS`
accumulators and the factors) fits the second-level cache for any population.

Row indices count the rows of the whole stored tensor. In a stack (E, d0, d1) the rows of expert e begin at e * d0, both
in A and in the checksum's element index. Its columns begin at e * d1 in B.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from estune.es.noise.lanes import bits_of, kernel, mix, noise_at

ROWS = 192  # rows of a tile, even; every tile of rows draws B again, every tile of columns draws A again
COLS = 768  # columns of a tile at most
FACTORS = 32  # factors in scratch memory at a time, a multiple of 4


@kernel
def _draw(out, count, start, first, last, keys, weights, rank, rademacher):  # type: ignore[no-untyped-def]
    """Write the integers of factors ``first .. last`` times the members' weights, for rows ``start + j`` of A (or B).

    ``out`` is int32 (FACTORS, >= count); row ``f - first`` holds factor ``f = member * rank + k``. Zeros fill the rows
    up to the next multiple of 4.
    """
    step = np.uint32(rank)
    for f in range(first, last):
        row = out[f - first]
        member = f // rank
        k0 = keys[member, 0]
        k1 = keys[member, 1]
        weight = weights[member]
        base = np.uint32(start * rank + f % rank)
        for j in range(count):
            row[j] = np.int32(weight * noise_at(np.uint32(base + np.uint32(np.uint32(j) * step)), k0, k1, rademacher))
    for f in range(last - first, (last - first + 3) // 4 * 4):
        out[f, :count] = 0


@kernel
def factors_into(out, keys, scales, rademacher):  # type: ignore[no-untyped-def]
    """Write A or B of M members to ``out``, float32 (M, r, d): element (m, k, j) is ``scale_m * n[j * r + k]``.

    ``keys`` is uint32 (M, 2), ``scales`` float32 (M,).
    """
    members, rank, size = out.shape
    for m in range(members):
        k0, k1, scale = keys[m, 0], keys[m, 1], scales[m]
        for k in range(rank):
            row = out[m, k]
            for j in range(size):
                i = np.uint32(np.uint32(k) + np.uint32(np.uint32(j) * np.uint32(rank)))
                row[j] = scale * np.float32(noise_at(i, k0, k1, rademacher))


@kernel
def _accumulate(acc, a, b, n_factors, n_rows, n_cols):  # type: ignore[no-untyped-def]
    """Add ``sum_f a_fi * b_fj`` to ``acc``, int32 (ROWS, COLS), for rows i < n_rows and columns j < n_cols.

    The loop takes two rows and four factors at a time, which fit the sixteen vector registers of AVX2. If n_rows is
    odd, the last row is paired with a row whose sums are not read.
    """
    for i in range(0, n_rows, 2):
        upper = acc[i, :n_cols]
        lower = acc[i + 1, :n_cols]
        for f in range(0, n_factors, 4):
            u0, u1, u2, u3 = a[f, i], a[f + 1, i], a[f + 2, i], a[f + 3, i]
            l0, l1, l2, l3 = a[f, i + 1], a[f + 1, i + 1], a[f + 2, i + 1], a[f + 3, i + 1]
            b0, b1, b2, b3 = b[f, :n_cols], b[f + 1, :n_cols], b[f + 2, :n_cols], b[f + 3, :n_cols]
            for j in range(n_cols):
                # numba widens int32 arithmetic to 64 bits; the casts narrow it again to 32-bit lanes.
                x = np.int32(np.int32(u0 * b0[j]) + np.int32(u1 * b1[j]))
                x = np.int32(x + np.int32(np.int32(u2 * b2[j]) + np.int32(u3 * b3[j])))
                y = np.int32(np.int32(l0 * b0[j]) + np.int32(l1 * b1[j]))
                y = np.int32(y + np.int32(np.int32(l2 * b2[j]) + np.int32(l3 * b3[j])))
                upper[j] = np.int32(upper[j] + x)
                lower[j] = np.int32(lower[j] + y)


@kernel
def _sum_tile(acc, a, b, row, n_rows, col, n_cols, keys_a, keys_b, q, ones, rank, rademacher):  # type: ignore[no-untyped-def]
    """Set ``acc[i, j] = sum_m q_m * sum_k A_m[row + i, k] * B_m[col + j, k]`` for a tile; ``a``, ``b`` are scratch."""
    acc[:n_rows, :n_cols] = 0
    n_factors = q.size * rank
    for first in range(0, n_factors, FACTORS):
        last = min(first + FACTORS, n_factors)
        _draw(a, n_rows, row, first, last, keys_a, q, rank, rademacher)
        _draw(b, n_cols, col, first, last, keys_b, ones, rank, rademacher)
        _accumulate(acc, a, b, last - first, n_rows, n_cols)


@kernel
def _tile_width(cols):  # type: ignore[no-untyped-def]
    """Return the width of equal tiles of at most COLS columns: a multiple of 16."""
    n_tiles = max(1, (cols + COLS - 1) // COLS)
    return ((cols + n_tiles - 1) // n_tiles + 15) // 16 * 16


@njit(inline="always")
def _stepped(value, a_scale, noise):  # type: ignore[no-untyped-def]
    # A select instead of a branch lets the loop vectorise. If the sum is 0, theta keeps its bits.
    moved = np.float32(np.float64(value) + a_scale * np.float64(noise))
    return moved if noise != 0 else value


@kernel
def perturb_lowrank_into(out, theta, row, col, keys_a, keys_b, rank, scale, rademacher):  # type: ignore[no-untyped-def]
    """Write ``float32(float64(theta) + scale * (A B^T))`` to ``out``; both float32 (n, cols), rows of one matrix.

    ``row`` is the first row's index in A, ``col`` the first column's index in B. ``keys_a`` and ``keys_b`` are uint32
    (1, 2). ``scale`` is float64 and includes the member's sign.
    """
    n, cols = theta.shape
    acc = np.empty((ROWS, COLS), dtype=np.int32)
    a = np.zeros((FACTORS, ROWS), dtype=np.int32)
    b = np.empty((FACTORS, COLS), dtype=np.int32)
    one = np.ones(1, dtype=np.int32)
    width = _tile_width(cols)
    for top in range(0, n, ROWS):
        n_rows = min(ROWS, n - top)
        for left in range(0, cols, width):
            n_cols = min(width, cols - left)
            _sum_tile(acc, a, b, row + top, n_rows, col + left, n_cols, keys_a, keys_b, one, one, rank, rademacher)
            for i in range(n_rows):
                source = theta[top + i, left : left + n_cols]
                target = out[top + i, left : left + n_cols]
                noise = acc[i, :n_cols]
                for j in range(n_cols):
                    # + 0.0 turns a product of -0.0 into 0.0; see `cpu._perturb_singly`.
                    target[j] = np.float32(np.float64(source[j]) + (scale * np.float64(noise[j]) + 0.0))


@kernel
def update_lowrank_into(theta, row, col, keys_a, keys_b, q, rank, a_scale, rademacher, decay, anchor):  # type: ignore[no-untyped-def]
    """Move ``theta`` (float32 (n, cols), rows of one matrix) in place by one step; see `cpu.update_into`.

    Returns ``(checksum, moved, size)`` like `cpu.update_into`. ``acc = sum_m q_m * A_m B_m^T`` is exact in int32, so
    neither the order of members nor the cut into rows and tiles changes a bit.

    ``row`` is the first row's index in A and in the stored tensor, ``col`` the first column's index in B. ``keys_a``
    and ``keys_b`` are uint32 (M, 2). ``q`` is int32 (M,), times the members' signs. ``anchor`` is float32 (n * cols,),
    or (0,) for decay towards 0.
    """
    n, cols = theta.shape
    acc = np.empty((ROWS, COLS), dtype=np.int32)
    a = np.zeros((FACTORS, ROWS), dtype=np.int32)
    b = np.empty((FACTORS, COLS), dtype=np.int32)
    ones = np.ones(q.size, dtype=np.int32)
    before = np.empty(COLS, dtype=np.float32)
    # The squares are summed per column of a tile: this order is fixed and vectorises.
    moved = np.zeros(COLS, dtype=np.float64)
    size = np.zeros(COLS, dtype=np.float64)
    total = np.uint64(0)
    width = _tile_width(cols)
    for top in range(0, n, ROWS):
        n_rows = min(ROWS, n - top)
        for left in range(0, cols, width):
            n_cols = min(width, cols - left)
            _sum_tile(acc, a, b, row + top, n_rows, col + left, n_cols, keys_a, keys_b, q, ones, rank, rademacher)
            for i in range(n_rows):
                line = theta[top + i, left : left + n_cols]
                noise = acc[i, :n_cols]
                if decay != np.float32(0.0):
                    for j in range(n_cols):
                        before[j] = line[j]
                    if anchor.size > 0:
                        offset = (top + i) * cols + left
                        base = anchor[offset : offset + n_cols]
                        for j in range(n_cols):
                            line[j] = np.float32(line[j] - np.float32(decay * np.float32(line[j] - base[j])))
                    else:
                        for j in range(n_cols):
                            line[j] = np.float32(line[j] - np.float32(decay * line[j]))
                    for j in range(n_cols):
                        value = _stepped(line[j], a_scale, noise[j])
                        line[j] = value
                        moved[j] += (np.float64(value) - np.float64(before[j])) ** 2
                        size[j] += np.float64(value) ** 2
                else:  # the same without a copy of the row, because memory bandwidth limits this loop
                    for j in range(n_cols):
                        old = line[j]
                        value = _stepped(old, a_scale, noise[j])
                        line[j] = value
                        moved[j] += (np.float64(value) - np.float64(old)) ** 2
                        size[j] += np.float64(value) ** 2
                first = np.uint32((row + top + i) * cols + left)  # modulo 2^32, as all element indices
                for j in range(n_cols):
                    word = np.uint32(mix(np.uint32(first + np.uint32(j))) + bits_of(line[j]))
                    total += np.uint64(mix(word))
    return total, moved.sum(), size.sum()
