"""The noise hash on vectors of 32-bit words, written in LLVM instructions, for the kernels of `cpu`.

numba cannot express this hash efficiently, for two reasons. It widens uint32 arithmetic to 64 bits, and LLVM narrows
only part of it again. And if LLVM vectorises a loop by itself, the code computes one vector register after another, and
each multiplication waits for the one before it. So this module builds the instructions itself: for one word, or for a
vector of `LANES` words. LLVM splits the vector into registers of the processor's width (AVX2, AVX-512, NEON) and
interleaves their instructions.

Functions with a ``builder`` emit instructions: their arguments and results are LLVM values, each a word or a vector of
words. An intrinsic makes such instructions callable from a numba function; `kernel` compiles that function.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba import extending, njit, types
from numba.core import cgutils as _cgutils
from numba.np import arrayobj as _arrayobj

# Most of numba has no types, and the type of `intrinsic` is wrong for the functions that it returns.
intrinsic: Any = extending.intrinsic
cgutils: Any = _cgutils
arrayobj: Any = _arrayobj


# Digest of this folder's source files, 8 hexadecimal digits.
SOURCES = blake2b(
    b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))), digest_size=4
).hexdigest()


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function with numba, without the GIL, and cache the machine code on disk.

    A kernel's machine code includes the intrinsics and kernels that it calls, also those of other files. numba discards
    cached code only if the kernel's own file has changed. So `SOURCES` becomes a part of the qualified name, from which
    numba makes the name of the cached file.
    """
    function.__qualname__ += f"_{SOURCES}"
    return njit(nogil=True, cache=True, boundscheck=False)(function)


LANES = 64  # words per vector: four AVX-512 registers or eight AVX2 registers; 32 and 16 words are slower on both
CACHE_LINE = 64  # bytes
_I32, _F32 = ir.IntType(32), ir.FloatType()
_INTS, _FLOATS = ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)


def _splat(builder: Any, x: Any) -> Any:
    """Return a vector whose lanes all hold the scalar ``x``."""
    vector = ir.VectorType(x.type, LANES)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), x, _I32(0))
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), ir.Constant(_INTS, [0] * LANES))


def _word(like: Any, n: int) -> Any:
    """Return the constant ``n`` in the type of ``like``."""
    return ir.Constant(like.type, [n] * LANES if isinstance(like.type, ir.VectorType) else n)


def _xor_shift(builder: Any, x: Any, n: int) -> Any:
    return builder.xor(x, builder.lshr(x, _word(x, n)))


def _mix_rest(builder: Any, x: Any) -> Any:
    """Return `mix` of a word to which the caller has already applied the first step, ``x ^= x >> 16``."""
    x = _xor_shift(builder, builder.mul(x, _word(x, 0x21F0AAAD)), 15)
    return _xor_shift(builder, builder.mul(x, _word(x, 0xD35A2D97)), 15)


def _ctpop(builder: Any, x: Any) -> Any:
    """Return the number of set bits by LLVM's ctpop (VPOPCNTD, or a shuffle on AVX2)."""
    suffix = f"v{LANES}i32" if isinstance(x.type, ir.VectorType) else "i32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(x.type, [x.type]), f"llvm.ctpop.{suffix}")
    return builder.call(function, [x])


def _counts_by_bytes(context: Any) -> bool:
    """Return whether bits are counted by a table of half-bytes: on x86 with AVX2 and without VPOPCNTD."""
    features = str(getattr(context.codegen(), "_tm_features", ""))
    return "+avx2" in features and "+avx512vpopcntdq" not in features


def _weighted_bits(builder: Any, words: Any, weight: Any) -> Any:
    """Return the number of set bits of each word times ``weight`` (int16), in AVX2 instructions.

    A shuffle looks up the counts of half-bytes. Two multiply-add instructions sum a word's four bytes; the second one
    also multiplies by the weight. LLVM's own code has twice as many instructions. The result is exact: 32 * 32767 fits
    32 bits.
    """
    byte, short = ir.VectorType(ir.IntType(8), 32), ir.VectorType(ir.IntType(16), 16)
    word = ir.VectorType(_I32, 8)

    def intrinsic_of(name: str, result: Any, argument: Any) -> Any:
        kind = ir.FunctionType(result, [argument, argument])
        return cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.avx2.{name}")

    look_up = intrinsic_of("pshuf.b", byte, byte)
    add_bytes, add_shorts = intrinsic_of("pmadd.ub.sw", short, byte), intrinsic_of("pmadd.wd", word, short)
    table = ir.Constant(byte, [value.bit_count() for value in range(16)] * 2)
    low_half, ones = ir.Constant(byte, [15] * 32), ir.Constant(byte, [1] * 32)
    first = builder.insert_element(ir.Constant(short, ir.Undefined), weight, _I32(0))
    weights = builder.shuffle_vector(
        first, ir.Constant(short, ir.Undefined), ir.Constant(ir.VectorType(_I32, 16), [0] * 16)
    )
    parts = []
    for start in range(0, LANES, 8):
        where = ir.Constant(word, list(range(start, start + 8)))
        part = builder.shuffle_vector(words, ir.Constant(words.type, ir.Undefined), where)
        low = builder.and_(builder.bitcast(part, byte), low_half)
        high = builder.and_(builder.bitcast(builder.lshr(part, ir.Constant(word, [4] * 8)), byte), low_half)
        counts = builder.add(builder.call(look_up, [table, low]), builder.call(look_up, [table, high]))
        pairs = builder.call(add_bytes, [counts, ones])
        parts.append(builder.call(add_shorts, [pairs, weights]))
    while len(parts) > 1:
        parts = [_joined(builder, a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _joined(builder: Any, a: Any, b: Any) -> Any:
    """Return the concatenation of two vectors of equal length."""
    places = ir.Constant(ir.VectorType(_I32, 2 * a.type.count), list(range(2 * a.type.count)))
    return builder.shuffle_vector(a, b, places)


def _word_from(builder: Any, index: Any, k0: Any, k1: Any) -> Any:
    """Return the mixed words of elements, from ``index`` and ``k0`` after the first step of `mix`.

    The hash begins with the first step of ``i ^ k0``. That equals the first step of ``i`` xor the first step of ``k0``.
    So the caller applies the step once to an index and uses the result for all members.
    """
    word = _mix_rest(builder, builder.xor(index, k0))
    return _mix_rest(builder, _xor_shift(builder, builder.add(word, k1), 16))


def _noise_from(builder: Any, index: Any, k0: Any, k1: Any, rademacher: Any, by_bytes: bool = False) -> Any:
    """Return the noise integers of elements; see `_word_from` for the arguments."""
    word = _word_from(builder, index, k0, k1)
    bits = _weighted_bits(builder, word, ir.IntType(16)(1)) if by_bytes else _ctpop(builder, word)
    count = builder.sub(bits, _word(word, 16))
    # 2 * (top bit) - 1
    sign = builder.sub(builder.shl(builder.lshr(word, _word(word, 31)), _word(word, 1)), _word(word, 1))
    return builder.select(rademacher, sign, count)


def _indices(builder: Any, start: Any) -> Any:
    """Return the indices ``start .. start + LANES`` after the first step of `mix`."""
    index = builder.add(_splat(builder, start), ir.Constant(_INTS, list(range(LANES))))
    return _xor_shift(builder, index, 16)


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, vector: Any) -> Any:
    """Return a pointer to ``array[offset:]`` of type ``vector``."""
    data = arrayobj.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [offset]), vector.as_pointer())


@intrinsic
def mix(typingctx, x):  # type: ignore[no-untyped-def]
    """Return the mixed uint32; see `reference.mix`."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _mix_rest(builder, _xor_shift(builder, args[0], 16))

    return types.uint32(types.uint32), codegen


@intrinsic
def bits_of(typingctx, x):  # type: ignore[no-untyped-def]
    """Return the bit pattern of a float32 as uint32."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], _I32)

    return types.uint32(types.float32), codegen


@intrinsic
def plus(typingctx, x, j):  # type: ignore[no-untyped-def]
    """Return ``x + j`` modulo 2^32 for a uint32 ``x`` and any integer ``j``."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.add(args[0], builder.trunc(args[1], _I32))

    return types.uint32(types.uint32, types.int64), codegen


@intrinsic
def noise_at(typingctx, i, k0, k1, rademacher):  # type: ignore[no-untyped-def]
    """Return the noise integer (int32) of element ``i`` within a block of keys ``k0, k1``, all uint32."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        index, k0, k1, rademacher = args
        return _noise_from(builder, _xor_shift(builder, index, 16), _xor_shift(builder, k0, 16), k1, rademacher)

    return types.int32(types.uint32, types.uint32, types.uint32, types.boolean), codegen


def _perturbation_intrinsic(streamed: bool) -> Any:
    """Return the intrinsic `perturb_lanes`, or `stream_lanes` if ``streamed``."""

    @intrinsic
    def lanes(typingctx, out, theta, j, start, k0, k1, scale, rademacher):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            out, theta, j, start, k0, k1, scale, rademacher = args
            shifted_k0 = _splat(builder, _xor_shift(builder, k0, 16))
            by_bytes = _counts_by_bytes(context)
            n = _noise_from(builder, _indices(builder, start), shifted_k0, _splat(builder, k1), rademacher, by_bytes)
            change = builder.fmul(builder.sitofp(n, _FLOATS), _splat(builder, scale))
            # + 0.0 turns scale * 0 = -0.0 into 0.0; see `cpu._perturb_singly`.
            change = builder.fadd(change, ir.Constant(_FLOATS, [0.0] * LANES))
            source = _pointer(context, builder, signature.args[1], theta, j, _FLOATS)
            value = builder.fadd(builder.load(source, align=4), change)
            target = _pointer(context, builder, signature.args[0], out, j, _FLOATS)
            store = builder.store(value, target, align=CACHE_LINE if streamed else 4)
            if streamed:
                store.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))
            return context.get_dummy_value()

        words = (types.uint32,) * 3
        return types.void(out, theta, types.int64, *words, types.float32, types.boolean), codegen

    return lanes


# Write out[j + l] = theta[j + l] + scale * n[start + l] for 0 <= l < LANES.
perturb_lanes = _perturbation_intrinsic(streamed=False)
# Write the same past the caches; out[j] must be the first element of a cache line.
stream_lanes = _perturbation_intrinsic(streamed=True)


@intrinsic
def address_of(typingctx, array, j):  # type: ignore[no-untyped-def]
    """Return the address of ``array[j]``, int64."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        array, j = args
        return builder.ptrtoint(_pointer(context, builder, signature.args[0], array, j, _F32), ir.IntType(64))

    return types.int64(array, types.int64), codegen


@intrinsic
def fence(typingctx):  # type: ignore[no-untyped-def]
    """Wait until the writes of `stream_lanes` are in memory, because other threads read them next."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def sum_lanes(typingctx, acc, j, start, table, rademacher):  # type: ignore[no-untyped-def]
    """Write ``acc[j + l] = sum_m q_m * n_m[start + l]`` (int32) for 0 <= l < LANES: the sum over all members.

    A row of ``table``, uint32 (M, 3), describes a member: k0 after the first step of `mix`, k1, and q in two's
    complement.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        acc, j, start, table, rademacher = args
        index = _indices(builder, start)
        members = arrayobj.make_array(signature.args[3])(context, builder, table)
        total = cgutils.alloca_once(builder, _INTS)  # stays in registers
        builder.store(ir.Constant(_INTS, [0] * LANES), total)

        sum_of_q = cgutils.alloca_once(builder, _I32)

        def add_members(contribution: Callable[[Any, Any, Any], Any]) -> None:
            builder.store(_I32(0), sum_of_q)
            with cgutils.for_range(builder, cgutils.unpack_tuple(builder, members.shape)[0]) as loop:
                row = builder.mul(loop.index, loop.index.type(3))
                k0, k1, q = (builder.load(builder.gep(members.data, [builder.add(row, row.type(i))])) for i in range(3))
                added = contribution(_splat(builder, k0), _splat(builder, k1), q)
                builder.store(builder.add(builder.load(total), added), total)
                builder.store(builder.add(builder.load(sum_of_q), q), sum_of_q)

        def weighted_noise(k0: Any, k1: Any, q: Any) -> Any:
            return builder.mul(_noise_from(builder, index, k0, k1, rademacher), _splat(builder, q))

        def weighted_bits(k0: Any, k1: Any, q: Any) -> Any:  # |q| <= 32767
            return _weighted_bits(builder, _word_from(builder, index, k0, k1), builder.trunc(q, ir.IntType(16)))

        if _counts_by_bytes(context):
            with builder.if_else(rademacher) as (then, otherwise):
                with then:
                    add_members(weighted_noise)
                with otherwise:
                    # sum_m q_m * (bits_m - 16) = sum_m q_m * bits_m - 16 * sum_m q_m
                    add_members(weighted_bits)
                    sixteenfold = _splat(builder, builder.shl(builder.load(sum_of_q), _I32(4)))
                    builder.store(builder.sub(builder.load(total), sixteenfold), total)
        else:
            add_members(weighted_noise)
        builder.store(builder.load(total), _pointer(context, builder, signature.args[0], acc, j, _INTS), align=4)
        return context.get_dummy_value()

    return types.void(acc, types.int64, types.uint32, table, types.boolean), codegen
