"""Low-rank noise on CPUs: numba kernels, equal bit for bit to `reference`.

`A B^T` is a sum of `rank` products: column k of A times column k of B, for each k. This file calls such a product a
term; M members have `M * rank` terms. The product of a whole matrix is never stored. A kernel works on a contiguous
range of rows of one matrix, tile by tile. It draws a few terms at a time and adds them to the int32 sums of the tile.
An update adds the terms of all members and then writes the tile of theta once. The scratch memory (the `ROWS` x `COLS`
sums, and the columns of A and B) fits the second-level cache for any number of members.

Row indices count the rows of the whole stored tensor. In a stack (E, d0, d1), the matrix of expert e begins at row
`e * d0` of the stack and of A. Its first column belongs to row `e * d1` of B.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from estune.es.noise.lanes import bits_of, kernel, mix, noise_at

ROWS = 192  # rows of a tile at most, an even number; each tile draws its columns of A and B again
COLS = 768  # columns of a tile at most
TERMS = 32  # terms in scratch memory at a time, a multiple of 4


@kernel
def _draw_columns(out, count, start, first, last, keys, multipliers, rank, rademacher):  # type: ignore[no-untyped-def]
    """Write the columns of A (or of B) of the terms ``first .. last``, from row ``start`` on, ``count`` rows.

    ``out`` is int32 (TERMS, >= count). For term ``t = m * rank + k``, row ``t - first`` of ``out`` receives column k of
    member m, times ``multipliers[m]``. Zeros fill the next rows of ``out`` up to a multiple of 4.
    """
    step = np.uint32(rank)
    for term in range(first, last):
        row = out[term - first]
        member = term // rank
        k0 = keys[member, 0]
        k1 = keys[member, 1]
        multiplier = multipliers[member]
        first_index = np.uint32(start * rank + term % rank)
        for j in range(count):
            index = np.uint32(first_index + np.uint32(np.uint32(j) * step))
            row[j] = np.int32(multiplier * noise_at(index, k0, k1, rademacher))
    for term in range(last - first, (last - first + 3) // 4 * 4):
        out[term, :count] = 0


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
def _add_terms(acc, a, b, n_terms, n_rows, n_cols):  # type: ignore[no-untyped-def]
    """Add ``sum_t a_ti * b_tj`` to ``acc``, int32 (ROWS, COLS), for rows i < n_rows and columns j < n_cols.

    The loop takes two rows and four terms at a time, which fit the sixteen vector registers of AVX2. If n_rows is odd,
    the last row is paired with a row whose sums are not read.
    """
    for i in range(0, n_rows, 2):
        upper = acc[i, :n_cols]
        lower = acc[i + 1, :n_cols]
        for t in range(0, n_terms, 4):
            u0, u1, u2, u3 = a[t, i], a[t + 1, i], a[t + 2, i], a[t + 3, i]
            l0, l1, l2, l3 = a[t, i + 1], a[t + 1, i + 1], a[t + 2, i + 1], a[t + 3, i + 1]
            b0, b1, b2, b3 = b[t, :n_cols], b[t + 1, :n_cols], b[t + 2, :n_cols], b[t + 3, :n_cols]
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
    n_terms = q.size * rank
    for first in range(0, n_terms, TERMS):
        last = min(first + TERMS, n_terms)
        _draw_columns(a, n_rows, row, first, last, keys_a, q, rank, rademacher)
        _draw_columns(b, n_cols, col, first, last, keys_b, ones, rank, rademacher)
        _add_terms(acc, a, b, last - first, n_rows, n_cols)


@kernel
def _tile_width(cols):  # type: ignore[no-untyped-def]
    """Return the number of columns of a tile: a multiple of 16, at most COLS, for tiles of nearly equal width."""
    n_tiles = max(1, (cols + COLS - 1) // COLS)
    return ((cols + n_tiles - 1) // n_tiles + 15) // 16 * 16


@njit(inline="always")
def _add_scaled(value, a_scale, noise):  # type: ignore[no-untyped-def]
    """Return ``value + a_scale * noise`` as float32; the value keeps its bits if ``noise`` is 0."""
    total = np.float32(np.float64(value) + a_scale * np.float64(noise))
    return total if noise != 0 else value  # compiled to a select instead of a branch, so the caller's loop vectorises


@kernel
def perturb_lowrank_into(out, theta, row, col, keys_a, keys_b, rank, scale, rademacher):  # type: ignore[no-untyped-def]
    """Write ``float32(float64(theta) + scale * (A B^T))`` to ``out``; both float32 (n, cols), rows of one matrix.

    ``row`` is the first row's index in A, ``col`` the first column's index in B. ``keys_a`` and ``keys_b`` are uint32
    (1, 2). ``scale`` is float64 and includes the member's sign.
    """
    n, cols = theta.shape
    acc = np.empty((ROWS, COLS), dtype=np.int32)
    a = np.zeros((TERMS, ROWS), dtype=np.int32)  # zeros: `_add_terms` also reads the row after an odd number of rows
    b = np.empty((TERMS, COLS), dtype=np.int32)
    ones = np.ones(1, dtype=np.int32)  # the member's q
    width = _tile_width(cols)
    for top in range(0, n, ROWS):
        n_rows = min(ROWS, n - top)
        for left in range(0, cols, width):
            n_cols = min(width, cols - left)
            _sum_tile(acc, a, b, row + top, n_rows, col + left, n_cols, keys_a, keys_b, ones, ones, rank, rademacher)
            for i in range(n_rows):
                source = theta[top + i, left : left + n_cols]
                target = out[top + i, left : left + n_cols]
                noise = acc[i, :n_cols]
                for j in range(n_cols):
                    # + 0.0 turns a product of -0.0 into 0.0; see `cpu._perturb_singly`.
                    target[j] = np.float32(np.float64(source[j]) + (scale * np.float64(noise[j]) + 0.0))


@kernel
def update_lowrank_into(theta, row, col, keys_a, keys_b, q, rank, a_scale, rademacher, decay, anchor):  # type: ignore[no-untyped-def]
    """Move ``theta`` (float32 (n, cols), rows of one matrix) in place by one step, like `cpu.update_into`.

    ``acc = sum_m q_m * A_m B_m^T`` is exact in int32, so neither the order of the members nor the choice of pieces and
    tiles changes a bit of theta.

    ``row`` is the first row's index in A and in the stored tensor, ``col`` the first column's index in B. ``keys_a``
    and ``keys_b`` are uint32 (M, 2). ``q`` is int32 (M,): the integer utilities times the members' signs. ``anchor`` is
    float32 (n * cols,), or (0,) for decay towards 0.
    """
    n, cols = theta.shape
    acc = np.empty((ROWS, COLS), dtype=np.int32)
    a = np.zeros((TERMS, ROWS), dtype=np.int32)  # zeros: `_add_terms` also reads the row after an odd number of rows
    b = np.empty((TERMS, COLS), dtype=np.int32)
    ones = np.ones(q.size, dtype=np.int32)
    before = np.empty(COLS, dtype=np.float32)
    # One sum of squares per column of a tile: the order of summation is fixed, and the loop vectorises.
    change_squares = np.zeros(COLS, dtype=np.float64)
    theta_squares = np.zeros(COLS, dtype=np.float64)
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
                        towards = anchor[offset : offset + n_cols]
                        for j in range(n_cols):
                            line[j] = np.float32(line[j] - np.float32(decay * np.float32(line[j] - towards[j])))
                    else:
                        for j in range(n_cols):
                            line[j] = np.float32(line[j] - np.float32(decay * line[j]))
                    for j in range(n_cols):
                        value = _add_scaled(line[j], a_scale, noise[j])
                        line[j] = value
                        change_squares[j] += (np.float64(value) - np.float64(before[j])) ** 2
                        theta_squares[j] += np.float64(value) ** 2
                else:  # no decay: the same without a copy of the row, because memory bandwidth limits this loop
                    for j in range(n_cols):
                        old = line[j]
                        value = _add_scaled(old, a_scale, noise[j])
                        line[j] = value
                        change_squares[j] += (np.float64(value) - np.float64(old)) ** 2
                        theta_squares[j] += np.float64(value) ** 2
                first = np.uint32((row + top + i) * cols + left)  # modulo 2^32, as all element indices
                for j in range(n_cols):
                    word = np.uint32(mix(np.uint32(first + np.uint32(j))) + bits_of(line[j]))
                    total += np.uint64(mix(word))
    return total, change_squares.sum(), theta_squares.sum()
