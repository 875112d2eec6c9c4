"""A second implementation of the noise from its definition: Python integers, and 64-bit NumPy with explicit masks.

It shares no code with `estune.es.noise`; tests compare the two.
"""

from __future__ import annotations

from fractions import Fraction
from hashlib import blake2b

import numpy as np

MASK = 0xFFFFFFFF
ONES_IN_BYTE = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.int64)


def plain_mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x21F0AAAD & MASK
    x ^= x >> 15
    x = x * 0xD35A2D97 & MASK
    return x ^ (x >> 15)


def plain_key(seed: int, name: str) -> tuple[int, int]:
    digest = blake2b(seed.to_bytes(8, "little") + name.encode(), digest_size=8, person=b"estune-noise-v1").digest()
    both = int.from_bytes(digest, "little")
    return both & MASK, both >> 32


def plain_noise(seed: int, name: str, element: int, distribution: str = "normal") -> int:
    """Return one noise integer; ``element`` is the flat index in the whole tensor."""
    block, index = divmod(element, 1 << 32)
    k0, k1 = plain_key(seed, f"{name}#{block}" if block else name)
    word = plain_mix((plain_mix(index ^ k0) + k1) & MASK)
    if distribution == "rademacher":
        return 1 if word >> 31 else -1
    return bin(word).count("1") - 16


def wide_mix(x: np.ndarray) -> np.ndarray:
    x = x ^ (x >> np.uint64(16))
    x = x * np.uint64(0x21F0AAAD) & np.uint64(MASK)
    x = x ^ (x >> np.uint64(15))
    x = x * np.uint64(0xD35A2D97) & np.uint64(MASK)
    return x ^ (x >> np.uint64(15))


def wide_noise(key: tuple[int, int], start: int, count: int, distribution: str = "normal") -> np.ndarray:
    """Return noise integers of elements in one key block: int64 (count,)."""
    index = np.arange(start, start + count, dtype=np.uint64)
    word = wide_mix((wide_mix(index ^ np.uint64(key[0])) + np.uint64(key[1])) & np.uint64(MASK))
    if distribution == "rademacher":
        return np.where(word >= np.uint64(1 << 31), 1, -1)
    return ONES_IN_BYTE[word.astype("<u4").view(np.uint8).reshape(-1, 4)].sum(axis=1) - 16


def wide_checksum(values: np.ndarray, start: int = 0) -> int:
    """Return the checksum's sum over a tensor's float32 bits; ``start`` is the first element's index in its block."""
    flat = np.ascontiguousarray(values).reshape(-1)
    index = np.arange(start, start + flat.size, dtype=np.uint64)
    words = wide_mix((wide_mix(index) + flat.view(np.uint32).astype(np.uint64)) & np.uint64(MASK))
    return sum(int(part) for part in words.reshape(-1)) % (1 << 64)


def nearest_float32(value: Fraction) -> np.float32:
    """Return an exact number rounded once to float32, half to even; normal and subnormal numbers only."""
    if value == 0:
        return np.float32(0.0)
    magnitude = abs(value)
    exponent = (
        magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    )  # 2^exponent is within a factor of 2
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    ulp = Fraction(2) ** (max(exponent, -126) - 23)
    rounded = round(magnitude / ulp) * ulp  # round() of a Fraction is half to even
    return np.float32(float(rounded) * (1 if value > 0 else -1))


def fused_float64(theta: Fraction, product: Fraction) -> float:
    """Return the exact sum rounded once to float64, as a fused multiply-add does."""
    return float(theta + product)


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    """Return whether two arrays have equal bits: -0.0 differs from 0.0, and NaN equals NaN."""
    left, right = np.ascontiguousarray(left), np.ascontiguousarray(right)
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
