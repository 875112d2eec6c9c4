"""The noise on GPUs: Triton kernels that equal `reference` bit for bit.

The tests compare the kernels with the CPU kernels, on a GPU or under Triton's interpreter. Without a GPU they also
compile every kernel for sm_80 and sm_90 and read the machine code. The bits rest on these properties:

* Integers wrap modulo 2^32, shifts of unsigned words are logical, and the sums over members are exact in int32.
* ``scale * n`` (16 bits times 5), ``a * acc`` (22 bits times 31, in float64) and the low-rank products are exact, so
  a fused multiply-add gives the same bits.
* The decay rounds three times in float32; a fused multiply-add would round less often. `estune.gpu.launch` compiles
  without contraction, so the kernels hold no fused multiply-add.
* The compiler keeps ``+ 0.0`` and float32 subnormals, and every cast rounds to nearest even.

The kernels mirror `estune.es.noise.cpu`: indices count within one key block of 2^32 elements, and the host computes
``keys``. This module must not import ``annotations`` from ``__future__``, because Triton reads annotations as types.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: N803, SIM108, SIM300

import triton
import triton.language as tl

# Triton's interpreter (3.9) truncates when it casts float32 to bfloat16. There `_cast` rounds with integers instead.
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
    # LLVM recognises this bit count and emits one popc.b32.
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit
def _noise(index, k0, k1, RADEMACHER: tl.constexpr):
    """Return the noise integers of uint32 indices: int32 of the same shape."""
    word = _mix(_mix(index ^ k0) + k1)
    if RADEMACHER:
        n = ((word >> 31) << 1).to(tl.int32) - 1
    else:
        n = _popcount(word).to(tl.int32) - 16
    return n


@triton.jit
def _cast(value, DTYPE: tl.constexpr):
    """Return float32 values in the output's dtype, rounded to nearest even."""
    if NATIVE_CAST or DTYPE != tl.bfloat16:
        result = value.to(DTYPE)
    else:
        bits = value.to(tl.uint32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        result = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return result


@triton.jit
def _decayed(value, anchor_ptr, offset, inside, decay, DECAY: tl.constexpr):
    """Return ``value - decay * (value - anchor)``, each operation rounded; DECAY 0: none, 1: to 0, 2: to the anchor."""
    if DECAY == 1:
        value = value - decay * value
    if DECAY == 2:
        value = value - decay * (value - tl.load(anchor_ptr + offset, mask=inside, other=0.0))
    return value


@triton.jit
def _step(value, a, acc):
    """Return ``float32(float64(value) + a * acc)``; if acc is 0, the value keeps its bits."""
    moved = (value.to(tl.float64) + a * acc.to(tl.float64)).to(tl.float32)
    return tl.where(acc != 0, moved, value)


@triton.jit
def _checksum(index, value, inside):
    """Return ``sum mix(mix(index) + bits(value))`` over the elements where ``inside`` holds: int64 that wraps."""
    word = _mix(_mix(index) + value.to(tl.uint32, bitcast=True))
    return tl.sum(tl.where(inside, word.to(tl.int64), 0))


@triton.jit
def _squares(value, inside):
    """Return the sum of squares of float64 values over the elements where ``inside`` holds."""
    value = tl.where(inside, value, 0.0)
    return tl.sum(value * value)


@triton.jit(do_not_specialize=["start", "k0", "k1"])
def perturb_kernel(
    out_ptr, theta_ptr, count, start: tl.int64, k0: tl.uint32, k1: tl.uint32, scale: tl.float32,
    RADEMACHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write ``out = cast(theta + scale * n)`` for the ``count`` elements from index ``start`` of a key block on."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = offset < count
    n = _noise((start + offset).to(tl.uint32), k0.to(tl.uint32), k1.to(tl.uint32), RADEMACHER)
    theta = tl.load(theta_ptr + offset, mask=inside, other=0.0)
    # + 0.0 turns scale * 0 = -0.0 into 0.0: the sign of scale must not decide whether a theta of -0.0 stays -0.0.
    value = theta + (scale * n.to(tl.float32) + 0.0)
    tl.store(out_ptr + offset, _cast(value, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["start", "n_members"], do_not_specialize_on_alignment=["keys_ptr"])
def update_kernel(
    theta_ptr, anchor_ptr, keys_ptr, q_ptr, sums_ptr, moved_ptr, size_ptr, count, start: tl.int64, n_members,
    a: tl.float64, decay: tl.float32, RADEMACHER: tl.constexpr, DECAY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Move ``count`` elements of theta by one step; see `cpu.update_into`.

    ``keys`` is uint32 (M, 2); ``q`` is int32 (M,), times the members' signs. Each program writes its checksum sum
    (int64) and its sums of squares (float64) of the change and of the new theta.
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
    """Write each program's part of the checksum of ``count`` elements of theta (int64); see `cpu.checksum_of`."""
    program = tl.program_id(0)
    offset = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = offset < count
    value = tl.load(theta_ptr + offset, mask=inside, other=0.0)
    tl.store(sums_ptr + program, _checksum((start + offset).to(tl.uint32), value, inside))


# Low-rank members. theta is a stack of E matrices (d0, d1). A launch covers the rows row0, ..., row0 + rows - 1 of each
# of the matrices matrix0, matrix0 + 1, .... The grid's axes are tiles of rows, tiles of columns, and matrices. Every
# program draws its own part of the factors A (E, d0, r) and B (E, d1, r): TILE_0 + TILE_1 integers per rank.


@triton.jit
def _tile(d0, d1, matrix0, row0, rows, TILE_0: tl.constexpr, TILE_1: tl.constexpr):
    """Return a program's tile: row indices in A, row indices in B, memory offsets, flat indices, mask."""
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
    """Return a tile of ``A B^T``: int32 (TILE_0, TILE_1)."""
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
    """Write ``out = cast(float32(theta + scale * (sign * (A B^T))))``; product and sum are float64."""
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
    """Move rows of a stack by one step of low-rank members; ``keys`` is uint32 (M, 4): A's two words, then B's."""
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
