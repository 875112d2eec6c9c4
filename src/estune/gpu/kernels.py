"""The noise on GPUs: Triton kernels that equal `reference` bit for bit.

The tests say so of an H100. Where there is no GPU the same source runs under Triton's interpreter, where the tests
compare it with the CPU kernels, and every kernel is compiled for sm_80 and sm_90, where the tests read the machine
code. Where bits depend on the compiler:

* integers wrap modulo 2^32, shifts of unsigned words are logical, the sums over members are exact in int32;
* ``scale * n`` (16 bits times 5), ``a * acc`` (22 bits times 31, in float64) and the low-rank products are exact, so
  a fused multiply-add would give the same bits;
* the decay rounds three times in float32 and a fused multiply-add would round less often: `estune.gpu.launch` compiles
  without contraction, and the compiled kernels hold no fused multiply-add at all;
* ``+ 0.0`` must not be folded away, float32 must keep its subnormals, and every cast rounds to nearest even.

Kernels mirror `cpu`: indices count within one key block of 2^32 elements, and ``keys`` are hashed on the host. This
module holds no ``from __future__ import annotations``: Triton reads the annotations as types.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: N803, SIM108, SIM300

import triton
import triton.language as tl

# Triton's interpreter (3.9) truncates when it casts float32 to bfloat16, so there the cast is spelled out in integers.
NATIVE_CAST = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def _mix(x):
    x = x ^ (x >> 16)
    x = x * 0x21F0AAAD
    x = x ^ (x >> 15)
    x = x * 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit
def _popcount(x):
    # The textbook bit count, which LLVM recognises: it becomes one popc.b32.
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit
def _noise(index, k0, k1, RADEMACHER: tl.constexpr):
    """Return the noise integers of uint32 indices, int32 of the same shape."""
    word = _mix(_mix(index ^ k0) + k1)
    if RADEMACHER:
        n = ((word >> 31) << 1).to(tl.int32) - 1
    else:
        n = _popcount(word).to(tl.int32) - 16
    return n


@triton.jit
def _cast(value, DTYPE: tl.constexpr):
    """Cast float32 to the output's dtype, to nearest even."""
    if NATIVE_CAST or DTYPE != tl.bfloat16:
        result = value.to(DTYPE)
    else:
        bits = value.to(tl.uint32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        result = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return result


@triton.jit
def _decayed(value, anchor_ptr, offset, inside, decay, DECAY: tl.constexpr):
    """Return ``value - decay * (value - anchor)``, each operation rounded; DECAY is 0 for none, 1: to 0, 2: anchor."""
    if DECAY == 1:
        value = value - decay * value
    if DECAY == 2:
        value = value - decay * (value - tl.load(anchor_ptr + offset, mask=inside, other=0.0))
    return value


@triton.jit
def _step(value, a, acc):
    """Return ``float32(float64(value) + a * acc)``; where acc is 0 the value is kept as it is."""
    moved = (value.to(tl.float64) + a * acc.to(tl.float64)).to(tl.float32)
    return tl.where(acc != 0, moved, value)


@triton.jit
def _checksum(index, value, inside):
    """Return ``sum mix(mix(index) + bits(value))`` over the elements that are ``inside``, as int64 that wraps."""
    word = _mix(_mix(index) + value.to(tl.uint32, bitcast=True))
    return tl.sum(tl.where(inside, word.to(tl.int64), 0))


@triton.jit
def _squares(value, inside):
    """Return the sum of squares of float64 values over the elements that are ``inside``."""
    value = tl.where(inside, value, 0.0)
    return tl.sum(value * value)


@triton.jit(do_not_specialize=["start", "k0", "k1"])
def perturb_kernel(
    out_ptr, theta_ptr, count, start: tl.int64, k0: tl.uint32, k1: tl.uint32, scale: tl.float32,
    RADEMACHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out = cast(theta + scale * n)`` for ``count`` elements that begin at index ``start`` of a key block."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = offset < count
    n = _noise((start + offset).to(tl.uint32), k0.to(tl.uint32), k1.to(tl.uint32), RADEMACHER)
    theta = tl.load(theta_ptr + offset, mask=inside, other=0.0)
    # + 0.0: where n = 0 the sign of scale must not turn up as -0.0 and keep a theta of -0.0 as it is.
    value = theta + (scale * n.to(tl.float32) + 0.0)
    tl.store(out_ptr + offset, _cast(value, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["start", "n_members"], do_not_specialize_on_alignment=["keys_ptr"])
def update_kernel(
    theta_ptr, anchor_ptr, keys_ptr, q_ptr, sums_ptr, moved_ptr, size_ptr, count, start: tl.int64, n_members,
    a: tl.float64, decay: tl.float32, RADEMACHER: tl.constexpr, DECAY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Move ``count`` elements of theta by one step; see `cpu.update_into`.

    ``keys`` is uint32 (M, 2), ``q`` int32 (M,) with the signs multiplied in. Each program writes its checksum (int64)
    and its sums of squares (float64) of the change and of theta afterwards.
    """
    program = tl.program_id(0)
    offset = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = offset < count
    index = (start + offset).to(tl.uint32)
    acc = tl.zeros((BLOCK,), dtype=tl.int32)
    for m in range(n_members):
        k0 = tl.load(keys_ptr + 2 * m)
        k1 = tl.load(keys_ptr + 2 * m + 1)
        acc += tl.load(q_ptr + m) * _noise(index, k0, k1, RADEMACHER)
    before = tl.load(theta_ptr + offset, mask=inside, other=0.0)
    value = _step(_decayed(before, anchor_ptr, offset, inside, decay, DECAY), a, acc)
    tl.store(theta_ptr + offset, value, mask=inside)
    tl.store(sums_ptr + program, _checksum(index, value, inside))
    tl.store(moved_ptr + program, _squares(value.to(tl.float64) - before.to(tl.float64), inside))
    tl.store(size_ptr + program, _squares(value.to(tl.float64), inside))


@triton.jit(do_not_specialize=["start"])
def checksum_kernel(theta_ptr, sums_ptr, count, start: tl.int64, BLOCK: tl.constexpr):
    """Each program writes its part of the checksum of ``count`` elements of theta (int64); see `cpu.checksum_of`."""
    program = tl.program_id(0)
    offset = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = offset < count
    value = tl.load(theta_ptr + offset, mask=inside, other=0.0)
    tl.store(sums_ptr + program, _checksum((start + offset).to(tl.uint32), value, inside))


# Low-rank members. theta is a stack of E matrices (d0, d1). A launch covers `rows` rows from `row0` on of each of the
# matrices matrix0, matrix0 + 1, ...; the grid's axes are tiles of rows, tiles of columns, matrices. The factors
# A (E, d0, r) and B (E, d1, r) are drawn where they are needed; a tile needs TILE_0 + TILE_1 of them per rank.


@triton.jit
def _tile(d0, d1, matrix0, row0, rows, TILE_0: tl.constexpr, TILE_1: tl.constexpr):
    """Return where a program's tile lies: first elements of A's and B's lines, memory offsets, flat index, mask."""
    row = tl.program_id(0) * TILE_0 + tl.arange(0, TILE_0)  # (TILE_0,), within the launch's rows
    column = tl.program_id(1) * TILE_1 + tl.arange(0, TILE_1)  # (TILE_1,)
    inside = (row < rows)[:, None] & (column < d1)[None, :]  # (TILE_0, TILE_1)
    local = tl.program_id(2).to(tl.int64)
    matrix = local + matrix0
    line_a = matrix * d0 + row0 + row  # (TILE_0,) int64
    line_b = matrix * d1 + column  # (TILE_1,) int64
    offset = (local * rows + row)[:, None] * d1 + column[None, :]  # (TILE_0, TILE_1) int64, in the launch's memory
    index = (line_a[:, None] * d1 + column[None, :]).to(tl.uint32)  # in the full tensor, modulo 2^32
    return line_a, line_b, offset, index, inside


@triton.jit
def _product(line_a, line_b, rank, a_k0, a_k1, b_k0, b_k1, RADEMACHER: tl.constexpr):
    """Return the tile of ``A B^T``: int32 (TILE_0, TILE_1)."""
    total = tl.zeros((line_a.shape[0], line_b.shape[0]), dtype=tl.int32)
    for k in range(rank):
        n_a = _noise((line_a * rank + k).to(tl.uint32), a_k0, a_k1, RADEMACHER)  # (TILE_0,)
        n_b = _noise((line_b * rank + k).to(tl.uint32), b_k0, b_k1, RADEMACHER)  # (TILE_1,)
        total += n_a[:, None] * n_b[None, :]
    return total


@triton.jit(do_not_specialize=["matrix0", "row0", "rows", "rank", "a_k0", "a_k1", "b_k0", "b_k1", "sign"])
def perturb_lowrank_kernel(
    out_ptr, theta_ptr, d0, d1, matrix0: tl.int64, row0, rows, rank, a_k0: tl.uint32, a_k1: tl.uint32,
    b_k0: tl.uint32, b_k1: tl.uint32, sign: tl.int32, scale: tl.float64,
    RADEMACHER: tl.constexpr, TILE_0: tl.constexpr, TILE_1: tl.constexpr,
):  # fmt: skip
    """``out = cast(float32(theta + scale * (sign * (A B^T))))``, product and sum in float64."""
    line_a, line_b, offset, _, inside = _tile(d0, d1, matrix0, row0, rows, TILE_0, TILE_1)
    n = sign * _product(line_a, line_b, rank, a_k0.to(tl.uint32), a_k1.to(tl.uint32), b_k0.to(tl.uint32),
                        b_k1.to(tl.uint32), RADEMACHER)  # fmt: skip
    theta = tl.load(theta_ptr + offset, mask=inside, other=0.0)
    value = (theta.to(tl.float64) + scale * n.to(tl.float64)).to(tl.float32)
    tl.store(out_ptr + offset, _cast(value, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["matrix0", "row0", "rows", "rank", "n_members"], do_not_specialize_on_alignment=["keys_ptr"]
)
def update_lowrank_kernel(
    theta_ptr, anchor_ptr, keys_ptr, q_ptr, sums_ptr, moved_ptr, size_ptr, d0, d1, matrix0: tl.int64, row0, rows,
    rank, n_members, a: tl.float64, decay: tl.float32,
    RADEMACHER: tl.constexpr, DECAY: tl.constexpr, TILE_0: tl.constexpr, TILE_1: tl.constexpr,
):  # fmt: skip
    """Move a stack's rows by one step of low-rank members; ``keys`` is uint32 (M, 4): A's two words, then B's."""
    line_a, line_b, offset, index, inside = _tile(d0, d1, matrix0, row0, rows, TILE_0, TILE_1)
    acc = tl.zeros((TILE_0, TILE_1), dtype=tl.int32)
    for m in range(n_members):
        a_k0 = tl.load(keys_ptr + 4 * m)
        a_k1 = tl.load(keys_ptr + 4 * m + 1)
        b_k0 = tl.load(keys_ptr + 4 * m + 2)
        b_k1 = tl.load(keys_ptr + 4 * m + 3)
        acc += tl.load(q_ptr + m) * _product(line_a, line_b, rank, a_k0, a_k1, b_k0, b_k1, RADEMACHER)
    before = tl.load(theta_ptr + offset, mask=inside, other=0.0)
    value = _step(_decayed(before, anchor_ptr, offset, inside, decay, DECAY), a, acc)
    tl.store(theta_ptr + offset, value, mask=inside)
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums_ptr + program, _checksum(index, value, inside))
    tl.store(moved_ptr + program, _squares(value.to(tl.float64) - before.to(tl.float64), inside))
    tl.store(size_ptr + program, _squares(value.to(tl.float64), inside))
