"""The definition of the noise; every fast implementation must equal it bit for bit.

`noise_key(seed, name)` hashes a member's seed and a parameter's stored name into two words, k0 and k1. `mix` is a
32-bit integer hash. The word of element `i` of the whole stored tensor is `mix(mix(i ^ k0) + k1)`. The noise is the
word's number of set bits, minus 16. That is a sum of 32 fair bits: an integer in [-16, 16] of variance 8, close to
normal (kurtosis 2.94). Rademacher noise is the top bit of the same word: -1 or +1, variance 1.

A key serves a block of 2^32 elements. The keys of later blocks are those of the names `name#1`, `name#2` and so on.

A low-rank member (EGGROLL, arXiv 2511.16652) perturbs a matrix (d0, d1) by `E = A B^T`. The integers A (d0, r) and B
(d1, r) are the noise of the names `name#A` and `name#B`. A stack (E, d0, d1) holds one matrix per expert: A is
(E, d0, r) and B is (E, d1, r). The elements of `A B^T` are integers with standard deviation `lowrank_deviation`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

NOISE_VERSION = 1
NOISE_PERSON = b"estune-noise-v1"
BLOCK_SIZE = 1 << 32  # elements that share one key
DISTRIBUTIONS = ("normal", "rademacher")
_VARIANCE = {"normal": 8.0, "rademacher": 1.0}


@lru_cache(maxsize=1 << 16)  # a step uses each key twice: for the member, and for the update
def noise_key(seed: int, name: str) -> tuple[int, int]:
    """Return the two 32-bit key words of one member's noise for one parameter, or for one block of a parameter."""
    message = seed.to_bytes(8, "little") + name.encode("utf-8")
    digest = blake2b(message, digest_size=8, person=NOISE_PERSON).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def noise_keys(seeds: Sequence[int], name: str) -> np.ndarray:
    """Return the members' key words for one name: uint32 (M, 2)."""
    return np.array([noise_key(seed, name) for seed in seeds], dtype=np.uint32).reshape(-1, 2)


def block_name(name: str, block: int) -> str:
    """Return the name under which block ``block`` (of 2^32 elements) of a parameter draws its key."""
    return name if block == 0 else f"{name}#{block}"


Words = npt.NDArray[np.uint32]


def mix(x: Words) -> Words:
    """Return the mixed uint32 words, in the same shape; the mapping is a bijection."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x21F0AAAD)  # wraps modulo 2^32 on purpose
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0xD35A2D97)
    x ^= x >> np.uint32(15)
    return x


def noise_words(seed: int, name: str, start: int, count: int) -> Words:
    """Return the mixed words of elements ``start .. start + count``: uint32 (count,)."""
    words = np.empty(count, dtype=np.uint32)  # (count,)
    done = 0
    while done < count:
        block, offset = divmod(start + done, BLOCK_SIZE)
        n = min(count - done, BLOCK_SIZE - offset)
        k0, k1 = noise_key(seed, block_name(name, block))
        index = np.arange(offset, offset + n, dtype=np.uint64).astype(np.uint32)  # (n,)
        words[done : done + n] = mix(mix(index ^ np.uint32(k0)) + np.uint32(k1))
        done += n
    return words


def noise_ints(seed: int, name: str, start: int, count: int, distribution: str = "normal") -> np.ndarray:
    """Return the noise integers ``n_i`` of elements ``start .. start + count``: int32 (count,).

    ``eps_i = n_i / noise_deviation(distribution)`` has mean 0 and variance 1.

    Args:
        seed: the member's seed, unsigned 64-bit.
        name: the parameter's name as ``save_pretrained`` writes it.
        start: flat row-major index of the first element in the full stored tensor.
        count: number of elements.
        distribution: ``normal`` (popcount, [-16, 16]) or ``rademacher`` (-1 or +1).

    Raises:
        ValueError: the distribution is unknown.
    """
    words = noise_words(seed, name, start, count)
    if distribution == "rademacher":
        return np.where(words >> np.uint32(31), np.int32(1), np.int32(-1)).astype(np.int32)
    if distribution != "normal":
        raise ValueError(f"unknown noise distribution {distribution!r}; known: {', '.join(DISTRIBUTIONS)}")
    n: np.ndarray = np.bitwise_count(words).astype(np.int32) - np.int32(16)
    return n


def noise_deviation(distribution: str = "normal") -> float:
    """Return the standard deviation of the noise integers; ``eps_i = n_i / noise_deviation`` has variance 1."""
    return math.sqrt(_VARIANCE[distribution])


def round_to_bits(value: float, bits: int) -> float:
    """Return the value rounded to ``bits`` significant bits, half to even; 0 and non-finite values are unchanged."""
    if value == 0.0 or not math.isfinite(value):
        return value
    mantissa, exponent = math.frexp(value)  # value = mantissa * 2^exponent, 0.5 <= |mantissa| < 1
    return math.ldexp(round(math.ldexp(mantissa, bits)), exponent - bits)


def factor_names(name: str) -> tuple[str, str]:
    """Return the names under which a matrix's low-rank factors A and B draw their noise."""
    return f"{name}#A", f"{name}#B"


def factor_shapes(shape: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of A and B for a matrix (d0, d1) or stacked experts (E, d0, d1).

    Raises:
        ValueError: the shape has another number of dimensions, or a factor has 2^32 elements or more, which one key
            cannot cover.
    """
    if len(shape) not in (2, 3):
        raise ValueError(f"low-rank noise is for matrices (d0, d1) and stacks (E, d0, d1), not for shape {shape}")
    *experts, d0, d1 = shape
    shapes = ((*experts, d0, rank), (*experts, d1, rank))
    if any(math.prod(factor) >= BLOCK_SIZE for factor in shapes):
        raise ValueError(f"shape {shape} at rank {rank} has a factor of 2^32 elements or more")
    return shapes


def lowrank_factors(
    seed: int, name: str, shape: tuple[int, ...], rank: int, distribution: str = "normal"
) -> tuple[np.ndarray, np.ndarray]:
    """Return a member's factors ``(A, B)``: int32 of `factor_shapes`, with the noise's elements in row-major order."""
    a, b = (
        noise_ints(seed, factor, 0, math.prod(extents), distribution).reshape(extents)
        for factor, extents in zip(factor_names(name), factor_shapes(shape, rank), strict=True)
    )
    return a, b


def lowrank_ints(seed: int, name: str, shape: tuple[int, ...], rank: int, distribution: str = "normal") -> np.ndarray:
    """Return the noise integers ``A B^T`` of a matrix or a stack: int32 of ``shape``.

    ``E = lowrank_ints / lowrank_deviation`` has mean 0 and variance 1 in every element; |A B^T| <= 256 * rank.
    """
    a, b = lowrank_factors(seed, name, shape, rank, distribution)
    product: np.ndarray = a @ b.swapaxes(-1, -2)
    return product


def lowrank_deviation(rank: int, distribution: str = "normal") -> float:
    """Return the standard deviation of an element of ``A B^T``, which is a sum of ``rank`` products of two integers."""
    return _VARIANCE[distribution] * math.sqrt(rank)


def lowrank_scale(sigma: float, rank: int, distribution: str = "normal") -> float:
    """Return the low-rank scale ``s``: sigma / `lowrank_deviation`, rounded to 16 significant bits.

    A member's weights are ``float32(float64(theta) + s * (A B^T))``. The product is exact in float64, so a processor
    that fuses the multiplication with the addition computes the same bits.
    """
    return round_to_bits(sigma / lowrank_deviation(rank, distribution), 16)


def perturbation_scale(sigma: float, distribution: str = "normal") -> float:
    """Return the scale ``s``: sigma / `noise_deviation`, rounded to 16 significant bits.

    A member's weights are ``theta + s * n`` in float32. The product (|n| <= 16) is exact, so a processor that fuses the
    multiplication with the addition computes the same bits.
    """
    return round_to_bits(sigma / noise_deviation(distribution), 16)
