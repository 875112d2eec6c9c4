"""The noise, bit for bit: check values, plain Python integers, the reference, the numba kernels; statistics; seeds."""

from __future__ import annotations

import math
import os
import platform
import shutil
import subprocess
import sys
from fractions import Fraction
from hashlib import blake2b
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_noise import (
    nearest_float32,
    plain_key,
    plain_mix,
    plain_noise,
    same_bits,
    wide_checksum,
    wide_noise,
)

import estune
from estune.es.noise import NOISE_VERSION, block_name, cpu, noise_deviation, noise_ints, noise_key, perturbation_scale
from estune.es.noise.reference import mix, noise_words, round_to_bits
from estune.es.population import EVAL_PERSON, MEMBER_PERSON, ROW_PERSON, derive_seed, members_for_step
from estune.es.types import SAMPLE_PERSON, Member

# Check values of noise version 1: seed, name, key, n_0 .. n_15, n_1000000 .. n_1000007
CHECK_VALUES = [
    (0, "w", (0x4E621213, 0xD7B48FDC),
     [1, -5, -3, 3, 2, 8, 2, -1, 4, 5, -1, 1, 3, -1, -5, 2], [-1, 0, 4, -2, -5, -3, 1, -1]),
    (1, "w", (0x01CF964C, 0x77ADEE50),
     [1, 0, 0, 1, 0, 0, -1, -1, 1, 2, 0, -3, -2, 0, 3, -3], [-1, -3, 1, -4, -2, -6, 2, -2]),
    (42, "model.layers.0.self_attn.q_proj.weight", (0x760A2EA5, 0x6011E2D6),
     [-4, 4, 0, 0, 3, -2, 2, 1, 2, 3, -1, 0, 3, -2, 2, 2], [2, 1, -4, 0, -2, 4, 5, 7]),
    (2**64 - 1, "model.norm.weight", (0xFFEB6A17, 0x6D1ED2E1),
     [-4, 1, 2, -4, -3, -5, -1, 2, 0, 4, -2, 2, 0, 1, -3, 1], [2, -3, -3, -1, 2, 0, 3, 0]),
]  # fmt: skip

# (start, count) within one key block; the last element of a block has index 2^32 - 1.
SLICES = [(0, 1), (0, 31), (0, 1_000_000), (2**31 - 7, 1000), (2**31 + 123, 4099), (2**32 - 1000, 1000)]


def fast_noise(seed: int, name: str, start: int, count: int, distribution: str) -> np.ndarray:
    """Noise integers by the numba kernel, for a slice within one block."""
    block, offset = divmod(start, 1 << 32)
    k0, k1 = noise_key(seed, block_name(name, block))
    out = np.empty(count, dtype=np.int32)
    cpu.noise_into(out, offset, np.uint32(k0), np.uint32(k1), distribution == "rademacher")
    return out


@pytest.mark.parametrize(("seed", "name", "key", "first", "far"), CHECK_VALUES)
def test_check_values(seed: int, name: str, key: tuple[int, int], first: list[int], far: list[int]) -> None:
    assert noise_key(seed, name) == plain_key(seed, name) == key
    assert noise_ints(seed, name, 0, 16).tolist() == first
    assert noise_ints(seed, name, 1_000_000, 8).tolist() == far
    assert [plain_noise(seed, name, i) for i in range(16)] == first
    assert fast_noise(seed, name, 0, 16, "normal").tolist() == first
    assert fast_noise(seed, name, 1_000_000, 8, "normal").tolist() == far


def test_public_shape_and_version() -> None:
    noise = noise_ints(3, "w", 5, 7)
    assert noise.dtype == np.int32 and noise.shape == (7,)
    assert noise_ints(3, "w", 0, 0).shape == (0,)
    assert NOISE_VERSION == 1
    assert noise_deviation() == math.sqrt(8) and noise_deviation("rademacher") == 1.0
    with pytest.raises(ValueError, match="unknown noise distribution"):
        noise_ints(0, "w", 0, 1, "gaussian")


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1))
def test_mix_equals_python_integers(x: int) -> None:
    assert int(mix(np.array([x], dtype=np.uint32))[0]) == plain_mix(x)


def test_mix_is_a_bijection_on_a_dense_range() -> None:
    words = mix(np.arange(1 << 20, dtype=np.uint32))
    assert np.unique(words).size == words.size


@settings(max_examples=60)
@given(
    st.integers(0, 2**64 - 1), st.text(max_size=30).filter(lambda s: s.isprintable()), st.integers(0, 2**34),
    st.sampled_from(["normal", "rademacher"]),
)  # fmt: skip
def test_reference_equals_python_integers(seed: int, name: str, start: int, distribution: str) -> None:
    expected = [plain_noise(seed, name, start + j, distribution) for j in range(5)]
    assert noise_ints(seed, name, start, 5, distribution).tolist() == expected


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize(("start", "count"), SLICES)
def test_numba_equals_reference_and_definition(start: int, count: int, distribution: str) -> None:
    seed, name = 0xDEADBEEF12345678, "model.embed_tokens.weight"
    reference = noise_ints(seed, name, start, count, distribution)
    assert same_bits(fast_noise(seed, name, start, count, distribution), reference)
    assert np.array_equal(reference, wide_noise(plain_key(seed, name), start, count, distribution))
    assert reference[0] == plain_noise(seed, name, start, distribution)
    assert reference[-1] == plain_noise(seed, name, start + count - 1, distribution)


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("start", [2**32, 2**32 + 2**31 + 5, 3 * 2**32 + 17])
def test_blocks_past_2_to_the_32_have_separate_keys(start: int, distribution: str) -> None:
    seed, name, count = 7, "experts.down_proj", 501
    block, offset = divmod(start, 2**32)
    assert block_name(name, block) == f"{name}#{block}" and block_name(name, 0) == name
    reference = noise_ints(seed, name, start, count, distribution)
    assert np.array_equal(reference, wide_noise(plain_key(seed, f"{name}#{block}"), offset, count, distribution))
    assert same_bits(fast_noise(seed, name, start, count, distribution), reference)
    assert not np.array_equal(reference, noise_ints(seed, name, offset, count, distribution))


def test_a_slice_across_the_block_boundary_is_its_two_halves() -> None:
    start = 2**32 - 10
    whole = noise_ints(5, "w", start, 25)
    assert np.array_equal(whole[:10], noise_ints(5, "w", start, 10))
    assert np.array_equal(whole[10:], noise_ints(5, "w", 2**32, 15))
    assert whole.tolist() == [plain_noise(5, "w", start + j) for j in range(25)]


@settings(max_examples=20)
@given(st.integers(0, 5000), st.integers(0, 5000))
def test_any_slice_is_a_part_of_the_whole(start: int, count: int) -> None:
    whole = noise_ints(11, "w", 0, 10_000)
    assert np.array_equal(noise_ints(11, "w", start, count), whole[start : start + count])


def test_the_extremes_of_the_noise_are_reached() -> None:
    """popcount - 16 lies in [-16, 16]; the fast kernel shares the range with the reference on chosen words."""
    words = noise_words(0, "w", 0, 2_000_000)
    noise = noise_ints(0, "w", 0, 2_000_000)
    assert noise.min() >= -16 and noise.max() <= 16
    assert noise.min() <= -12 and noise.max() >= 12  # P(|n| >= 12) is 2e-5 a side
    assert np.array_equal(
        noise, np.array([bin(w).count("1") - 16 for w in words[:5000].tolist()] + noise[5000:].tolist())
    )


def theta_values(count: int, seed: int = 0) -> np.ndarray:
    """Weights of every kind: normal, zeros of both signs, tiny, huge, subnormal."""
    rng = np.random.default_rng(seed)
    theta = (rng.standard_normal(count) * 10.0 ** rng.integers(-8, 3, count)).astype(np.float32)
    special = np.array([0.0, -0.0, 1e-45, -1e-45, 1e-38, 3e38, -3e38, 1.0, -1.0], dtype=np.float32)
    theta[rng.integers(0, count, count // 20 + 1)] = rng.choice(special, count // 20 + 1)
    return theta


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("start", "count"), [*SLICES, (2**32 + 2**31 + 5, 777)])
def test_perturb_kernel_equals_reference(start: int, count: int, sign: int, distribution: str) -> None:
    seed, name = 99, "w"
    block, offset = divmod(start, 2**32)
    theta = theta_values(count)
    scale = perturbation_scale(1e-3, distribution)
    k0, k1 = (np.uint32(word) for word in noise_key(seed, block_name(name, block)))
    out = np.empty_like(theta)
    cpu.perturb_into(out, theta, offset, k0, k1, np.float32(scale * sign), distribution == "rademacher")
    noise = (sign * noise_ints(seed, name, start, count, distribution)).astype(np.float32)
    assert same_bits(out, theta + np.float32(scale) * noise)
    for j in range(0, count, max(1, count // 300)):
        exact = Fraction(float(theta[j])) + Fraction(scale) * sign * plain_noise(seed, name, start + j, distribution)
        assert out[j] == nearest_float32(exact)


@pytest.mark.parametrize("count", [1, 15, 16, 63, 64, 65, 1000, 4096])
@pytest.mark.parametrize("offset", [0, 1, 3, 15, 16])
def test_writing_past_the_caches_changes_no_bit(offset: int, count: int) -> None:
    """Wherever the target begins in a cache line; and nothing around it is written."""
    theta = theta_values(count)
    cached, memory = np.empty_like(theta), np.full(offset + count + 64, 7.0, dtype=np.float32)
    k0, k1, scale = np.uint32(5), np.uint32(6), np.float32(-1e-3)
    cpu.perturb_into(cached, theta, 3, k0, k1, scale, False)
    cpu.perturb_into(memory[offset : offset + count], theta, 3, k0, k1, scale, False, True)
    assert same_bits(memory[offset : offset + count], cached)
    assert (memory[:offset] == 7).all() and (memory[offset + count :] == 7).all()


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize(("start", "count"), [*SLICES, (2**32 + 2**31 + 5, 777)])
def test_update_kernel_equals_reference(start: int, count: int, distribution: str) -> None:
    name, seeds = "w", [3, 2**64 - 1, 12345678901234567]
    block, offset = divmod(start, 2**32)
    stored = block_name(name, block)
    theta = theta_values(count, seed=1)
    q = np.array([32767, -1234, 15], dtype=np.int32)
    a = round_to_bits(3.7e-9, 22)
    acc = sum(
        int(weight) * wide_noise(plain_key(seed, stored), offset, count, distribution)
        for weight, seed in zip(q, seeds, strict=True)
    )
    expected = np.where(acc == 0, theta, (theta.astype(np.float64) + a * acc.astype(np.float64)).astype(np.float32))
    keys = np.array([noise_key(seed, stored) for seed in seeds], dtype=np.uint32)
    moved = theta.copy()
    checksum, change, size = cpu.update_into(
        moved, offset, keys, q, a, distribution == "rademacher", np.float32(0.0), np.empty(0, dtype=np.float32)
    )
    assert same_bits(moved, expected)
    assert int(checksum) == int(cpu.checksum_of(moved, offset)) == wide_checksum(moved, offset)
    difference = moved.astype(np.float64) - theta.astype(np.float64)
    assert change == pytest.approx(math.fsum((difference**2).tolist()), rel=1e-9)
    assert size == pytest.approx(math.fsum((moved.astype(np.float64) ** 2).tolist()), rel=1e-9)


def test_checksum_shards_add_up() -> None:
    theta = theta_values(100_003)
    start = 2**31 - 50_000
    whole = int(cpu.checksum_of(theta, start))
    cuts = [0, 1, 2047, 2048, 50_000, 99_999, 100_003]
    parts = [int(cpu.checksum_of(theta[lo:hi], start + lo)) for lo, hi in pairwise(cuts)]
    assert sum(parts) % 2**64 == whole == wide_checksum(theta, start)


@settings(max_examples=200)
@given(st.floats(min_value=1e-300, max_value=1e300), st.integers(1, 40))
def test_round_to_bits_is_the_nearest_half_to_even(value: float, bits: int) -> None:
    rounded = Fraction(round_to_bits(value, bits))
    exponent = math.frexp(value)[1]
    assert rounded == round(Fraction(value) / Fraction(2) ** (exponent - bits)) * Fraction(2) ** (exponent - bits)
    assert round_to_bits(-value, bits) == -float(rounded)


def test_round_to_bits_leaves_what_has_no_digits() -> None:
    assert round_to_bits(0.0, 16) == 0.0
    assert round_to_bits(math.inf, 16) == math.inf
    assert math.isnan(round_to_bits(math.nan, 16))
    assert round_to_bits(float(2**17 + 1), 16) == 2**17  # a tie goes to the even neighbour
    assert round_to_bits(float(2**17 + 3 * 2), 16) == 2**17 + 8


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_fused_multiply_add_cannot_change_a_member(distribution: str) -> None:
    """s has at most 16 significant bits, so s * n is exact in float32 for every |n| <= 16."""
    rng = np.random.default_rng(0)
    sigmas = [1e-30, 1e-10, 5e-4, 1e-3, 1.5e-3, 0.1, 1.0, 1e3, *(10.0 ** rng.uniform(-30, 3, 200)).tolist()]
    for sigma in sigmas:
        s = perturbation_scale(sigma, distribution)
        assert Fraction(s) == Fraction(float(np.float32(s)))
        numerator = Fraction(s).numerator
        assert (numerator >> ((numerator & -numerator).bit_length() - 1)).bit_length() <= 16
        assert abs(s * math.sqrt({"normal": 8, "rademacher": 1}[distribution]) / sigma - 1) <= 2.0**-16 * 1.001
        for n in range(-16, 17):
            assert Fraction(float(np.float32(s) * np.float32(n))) == Fraction(s) * n


# --- compiled kernels: the cache on disk does not outlive a change of the code; AVX2 alone counts bits by tables ------


CACHED = """
import numpy as np
from estune.es.noise.cpu import noise_into
out = np.empty(2, np.int32)
noise_into(out, 0, np.uint32(1), np.uint32(2), False)
print(*out, *(sum(count.values()) for count in (noise_into.stats.cache_hits, noise_into.stats.cache_misses)))
"""
AVX2 = "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+popcnt,+sse,+sse2,+sse3,+sse4.1,+sse4.2,+ssse3"
COUNTING = """
import numpy as np
from llvmlite import binding
from estune.es.noise import noise_ints, noise_key
from estune.es.noise import cpu
from estune.es.noise import lanes

count, start, seeds = 4096 + 77, 2**32 - 5000, [3, 2**64 - 1, 99]
theta = np.random.default_rng(0).standard_normal(count).astype(np.float32)
keys = np.array([noise_key(seed, "w") for seed in seeds], dtype=np.uint32)
q = np.array([32767, -32767, 12345], dtype=np.int32)
for distribution in ("normal", "rademacher"):
    flag = distribution == "rademacher"
    noise = [noise_ints(seed, "w", start, count, distribution).astype(np.int64) for seed in seeds]
    out = np.empty_like(theta)
    cpu.perturb_into(out, theta, start, *keys[0], np.float32(0.25), flag)
    assert (out == theta + np.float32(0.25) * noise[0].astype(np.float32)).all()
    moved = theta.copy()
    cpu.update_into(moved, start, keys, q, 2.0**-20, flag, np.float32(0), np.empty(0, np.float32))
    total = sum(int(weight) * n for weight, n in zip(q, noise))
    assert (moved == (theta.astype(np.float64) + 2.0**-20 * total).astype(np.float32)).all()
code = next(iter(cpu.update_into.inspect_asm().values()))
print("vpmaddubsw" in code, "vpopcntd" in code, "zmm" in code)
"""


def run_cached(place: Path) -> list[int]:
    """Return two noise integers, and how many kernels came from the cache on disk and how many were compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", CACHED], cwd=place, env=environment | {"PYTHONPATH": str(place)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [int(word) for word in done.stdout.split()]


def test_a_kernel_is_compiled_again_after_a_change_of_another_file_and_no_import_deletes_a_file(tmp_path: Path) -> None:
    source = Path(estune.__file__).parent / "es"
    shutil.copytree(source, tmp_path / "estune" / "es", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "estune" / "__init__.py").touch()
    lanes = tmp_path / "estune" / "es" / "noise" / "lanes.py"
    first = run_cached(tmp_path)
    assert first[2:] == [0, 1]
    assert run_cached(tmp_path) == [*first[:2], 1, 0]
    kept, before = lanes.read_text(), lanes.stat()
    assert kept.count("_word(word, 16)") == 1
    lanes.write_text(kept.replace("_word(word, 16)", "_word(word, 17)"))
    os.utime(lanes, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run_cached(tmp_path) == [first[0] - 1, first[1] - 1, 0, 1]
    lanes.write_text(kept)
    assert run_cached(tmp_path) == [*first[:2], 1, 0]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instructions of x86")
def test_bits_counted_by_tables_are_the_same(tmp_path: Path) -> None:
    target = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": AVX2, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COUNTING], env=os.environ | target, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "False", "False"]


# --- statistics -------------------------------------------------------------------------------------------------------
# The noise is as good as independent binomial draws, within tolerances that theory gives.
#
# Every bound is a multiple of a standard error: `Z` = 4.5 for a single number (two-sided chance 7e-6), more where the
# largest of many is taken. The draws are fixed, so nothing here is flaky; a failure means that the noise changed.
# `n` is a sum of 32 fair bits minus 16, so its moments are those of a centred Binomial(32, 1/2), computed exactly.


Z = 4.5
COUNT = 1 << 20
STREAMS = [(0, "w"), (1, "w"), (42, "model.layers.0.self_attn.q_proj.weight"), (2**64 - 1, "model.norm.weight")]


def exact_moment(power: int) -> float:
    """E n^power of a centred Binomial(32, 1/2)."""
    return sum(math.comb(32, ones) * (ones - 16) ** power for ones in range(33)) / 2**32


def stream(seed: int, name: str, count: int = COUNT, start: int = 0) -> np.ndarray:
    return noise_ints(seed, name, start, count).astype(np.float64)


def standardised(seed: int, name: str, count: int) -> np.ndarray:
    return stream(seed, name, count) / math.sqrt(8)


def test_the_moments_theory_gives() -> None:
    assert exact_moment(1) == exact_moment(3) == 0
    assert exact_moment(2) == 8
    assert exact_moment(4) / 64 == 3 - 2 / 32  # kurtosis 2.9375, the 2.94 of docs/method.md


@pytest.mark.parametrize(("seed", "name"), STREAMS)
@pytest.mark.parametrize("power", [1, 2, 3, 4])
def test_moments(seed: int, name: str, power: int) -> None:
    values = stream(seed, name) ** power
    deviation = math.sqrt(exact_moment(2 * power) - exact_moment(power) ** 2)
    assert abs(values.mean() - exact_moment(power)) < Z * deviation / math.sqrt(COUNT)


@pytest.mark.parametrize(("seed", "name"), STREAMS)
def test_all_levels_have_their_binomial_frequency(seed: int, name: str) -> None:
    counts = np.bincount(noise_ints(seed, name, 0, COUNT) + 16, minlength=33)
    expected = np.array([math.comb(32, ones) / 2**32 for ones in range(33)]) * COUNT
    kept = expected >= 20  # the rest is pooled
    chi2 = (((counts - expected) ** 2 / expected)[kept]).sum()
    chi2 += (counts[~kept].sum() - expected[~kept].sum()) ** 2 / expected[~kept].sum()
    degrees = kept.sum()
    assert abs(chi2 - degrees) < Z * math.sqrt(2 * degrees)


def test_rademacher_is_fair_and_uncorrelated() -> None:
    signs = noise_ints(3, "w", 0, COUNT, "rademacher").astype(np.float64)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert abs(signs.mean()) < Z / math.sqrt(COUNT)
    for lag in (1, 2, 3, 1024, 65536):
        assert abs((signs[:-lag] * signs[lag:]).mean()) < Z / math.sqrt(COUNT - lag)


@pytest.mark.parametrize(("seed", "name"), STREAMS)
def test_autocorrelation_within_a_tensor(seed: int, name: str) -> None:
    values = standardised(seed, name, COUNT)
    lags = sorted({*range(1, 33), *(1 << p for p in range(20)), *((1 << p) + 1 for p in range(3, 19)), 768, 896, 4864})
    for lag in lags:
        r = (values[:-lag] * values[lag:]).mean()
        assert abs(r) < Z / math.sqrt(COUNT - lag), lag


def test_autocorrelation_at_all_lags_and_of_the_squares() -> None:
    """By FFT, circular: the largest of 2^17 correlations of Gaussian size is near sqrt(2 ln 2^17) = 4.9."""
    count = 1 << 18
    for transform in (lambda n: n / math.sqrt(8), lambda n: (n**2 - 8) / math.sqrt(exact_moment(4) - 64)):
        values = transform(stream(17, "w", count))
        r = np.fft.irfft(np.abs(np.fft.rfft(values)) ** 2) / count  # (count,), r[0] = 1
        assert abs(r[0] - 1) < Z * math.sqrt(exact_moment(8) / 8**4) / math.sqrt(count)
        assert np.abs(r[1 : count // 2]).max() * math.sqrt(count) < 6.5
        power = np.abs(np.fft.rfft(values)[1:-1]) ** 2 / count  # exponential of mean 1 under independence
        assert power.max() < math.log(power.size) + 10


def streams_of_every_kind() -> dict[str, tuple[int, str]]:
    """Streams that must be independent: members, steps, run seeds, tensors; every pair differs in at least one."""
    kinds = {}
    names = ["w", "w2", "layers.0.weight", "layers.1.weight", "layers.10.weight", "w#A", "w#B"]
    for run_seed, step, member in product((0, 1, 42), (0, 1), (0, 1, 2)):
        seed = members_for_step(run_seed, step, 4, antithetic=False)[member].seed
        for name in names if (run_seed, step) == (0, 0) else names[:2]:
            kinds[f"run {run_seed} step {step} member {member} {name}"] = (seed, name)
    for near in (0, 1, 2, 3, 2**32, 2**63):  # raw seeds beside each other must not overlap either
        kinds[f"seed {near}"] = (near, "w")
    return kinds


def test_correlation_across_tensors_members_steps_and_run_seeds() -> None:
    count = 1 << 16
    kinds = streams_of_every_kind()
    matrix = np.stack([standardised(seed, name, count) for seed, name in kinds.values()])  # (S, count)
    z = matrix @ matrix.T / math.sqrt(count)  # (S, S); off the diagonal standard normal under independence
    pairs = z[np.triu_indices(len(kinds), 1)]
    assert pairs.size > 1500
    assert np.abs(pairs).max() < 5.0  # the largest of ~1800 is near 3.5
    assert abs(pairs.mean()) < Z / math.sqrt(pairs.size)
    assert abs((pairs**2).mean() - 1) < Z * math.sqrt(2 / pairs.size)


def test_equal_shaped_tensors_differ_and_seeds_s_and_s_plus_1_differ() -> None:
    """Two independent draws agree on sum_k P(n = k)^2 = C(64, 32) / 2^64 = 9.93 % of elements, no more."""
    agree = math.comb(64, 32) / 2**64
    count = 100_000
    pairs = [((0, "layers.0.weight"), (0, "layers.1.weight")), ((0, "q_proj"), (0, "k_proj"))]
    pairs += [((s, "w"), (s + 1, "w")) for s in (0, 1, 7, 2**32 - 1, 2**63)]
    for left, right in pairs:
        same = (stream(*left, count) == stream(*right, count)).mean()
        assert abs(same - agree) < Z * math.sqrt(agree * (1 - agree) / count)


def test_no_member_is_another_one_shifted() -> None:
    """Cross-correlation at every index shift, by FFT: no overlap of `seed + index` kind hides between members."""
    count = 1 << 17
    pairs = [
        ((0, "w"), (1, "w")),
        ((1000, "w"), (1001, "w")),
        ((0, "w"), (0, "v")),
        tuple((m.seed, "w") for m in members_for_step(0, 0, 2, False)),
    ]
    for left, right in pairs:
        spectrum = np.fft.rfft(standardised(*left, count)) * np.conj(np.fft.rfft(standardised(*right, count)))
        r = np.fft.irfft(spectrum) / math.sqrt(count)  # (count,), standard normal under independence
        assert np.abs(r).max() < 6.3  # the largest of 2^17 is near 4.9
        assert abs((r**2).mean() - 1) < Z * math.sqrt(6 / count)  # a mean of count / 2 products of two exponentials


def test_keys_that_differ_in_one_bit_are_uncorrelated() -> None:
    """The worst case for the mixing: same k0, one bit of k1 flipped, and the same the other way round."""
    count = 1 << 17
    out = np.empty(count, dtype=np.int32)

    def draw(k0: int, k1: int) -> np.ndarray:
        cpu.noise_into(out, 0, np.uint32(k0), np.uint32(k1), False)
        return out / math.sqrt(8)

    k0, k1 = 0x12345678, 0x9ABCDEF0
    base = draw(k0, k1)
    zs = []
    for bit in range(32):
        zs.append((base * draw(k0, k1 ^ (1 << bit))).sum() / math.sqrt(count))
        zs.append((base * draw(k0, (k1 + (1 << bit)) & 0xFFFFFFFF)).sum() / math.sqrt(count))
        if bit >= 17:  # a lower bit only exchanges elements of this slice
            zs.append((base * draw(k0 ^ (1 << bit), k1)).sum() / math.sqrt(count))
    assert np.abs(zs).max() < 4.8


def test_antithetic_members_mirror_each_other_exactly() -> None:
    plus, minus = members_for_step(0, 0, 2, antithetic=True)
    assert (plus.seed, plus.sign, minus.sign) == (minus.seed, 1, -1)


def test_every_bit_of_the_words_is_fair_and_uncorrelated_with_the_others() -> None:
    count = 1 << 18
    words = noise_words(5, "w", 0, count)
    bits = ((words[:, None] >> np.arange(32, dtype=np.uint32)) & 1).astype(np.float64) * 2 - 1  # (count, 32)
    z = bits.sum(axis=0) / math.sqrt(count)
    assert np.abs(z).max() < Z
    pairs = (bits.T @ bits / math.sqrt(count))[np.triu_indices(32, 1)]  # (496,)
    assert np.abs(pairs).max() < 4.8
    lagged = bits[:-1].T @ bits[1:] / math.sqrt(count)  # (32, 32), bit against bit of the next element
    assert np.abs(lagged).max() < 5.0


def test_spectrum_of_a_square_matrix_follows_marchenko_pastur() -> None:
    """512 x 512: eigenvalues of E E^T / n have moments 1, 2, 5, 14 (Catalan) and edges 0 and 4.

    Traces fluctuate by O(1): with x = 2 + 2 cos(phi), tr x^k has variance 1/2 sum_j j (2 C(2k, k-j))^2 around
    n * Catalan + (0, 1, 6, 29) for Gaussian entries (Bai and Silverstein 2004), a little less for ours. The largest
    eigenvalue follows Tracy-Widom (beta = 1: mean -1.21, deviation 1.27) around (sqrt(n-1) + sqrt(n))^2 / n
    (Johnstone 2001).
    """
    n = 512
    matrix = standardised(123, "model.layers.3.mlp.up_proj.weight", n * n).reshape(n, n)
    eigenvalues = np.linalg.eigvalsh(matrix @ matrix.T / n)  # (n,)
    assert abs(eigenvalues.sum() - n) < Z * math.sqrt(2.9375 - 1)
    for power, catalan, bias in ((1, 1, 0), (2, 2, 1), (3, 5, 6), (4, 14, 29)):
        variance = sum(j * (2 * math.comb(2 * power, power - j)) ** 2 for j in range(1, power + 1)) / 2
        assert abs((eigenvalues**power).sum() - n * catalan - bias) < Z * math.sqrt(variance)
    center = (math.sqrt(n - 1) + math.sqrt(n)) ** 2
    spread = (math.sqrt(n - 1) + math.sqrt(n)) * (1 / math.sqrt(n - 1) + 1 / math.sqrt(n)) ** (1 / 3)
    assert abs((eigenvalues[-1] * n - center) / spread + 1.2065) < Z * 1.268
    assert 0 <= eigenvalues[0] < 40 / n**2  # the hard edge: the smallest is of order 1 / n^2
    # Share of eigenvalues below 1 by the density sqrt(x (4 - x)) / (2 pi x): 1/3 + sqrt(3) / (2 pi) = 0.6090
    assert abs((eigenvalues < 1).mean() - (1 / 3 + math.sqrt(3) / (2 * math.pi))) < 6 / n


def test_spectrum_of_a_rectangle_stays_within_its_edges() -> None:
    rows, columns = 256, 1024
    matrix = standardised(9, "lm_head.weight", rows * columns).reshape(rows, columns)
    eigenvalues = np.linalg.eigvalsh(matrix @ matrix.T / columns)
    ratio = rows / columns
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    # Both differences are of order n^(-2/3) = 0.01 to 0.02.
    assert abs(eigenvalues[0] - low) < 0.05 and abs(eigenvalues[-1] - high) < 0.1
    assert abs((eigenvalues**2).mean() - (1 + ratio)) < 10 / rows


def test_symmetric_part_follows_the_semicircle() -> None:
    """(E + E^T) / sqrt(2 n): moments 0, 1, 0, 2, 0, 5 and edges -2 and 2.

    With x = 2 cos(theta), tr x^k has variance 1/2 sum_j j (2 C(k, (k-j)/2))^2 around n * moment + (0, 1, 0, 5, 0, 22)
    for Gaussian entries (Johansson 1998).
    """
    n = 512
    matrix = standardised(77, "w", n * n).reshape(n, n)
    eigenvalues = np.linalg.eigvalsh((matrix + matrix.T) / math.sqrt(2 * n))
    for power, moment, bias in ((1, 0, 0), (2, 1, 1), (3, 0, 0), (4, 2, 5), (5, 0, 0), (6, 5, 22)):
        variance = sum(j * (2 * math.comb(power, (power - j) // 2)) ** 2 for j in range(power, 0, -2)) / 2
        assert abs((eigenvalues**power).sum() - n * moment - bias) < Z * math.sqrt(variance)
    edge = 2 + np.array([-1.0, 1.0]) * Z * 1.27 * n ** (-2 / 3) - 1.21 * n ** (-2 / 3)
    assert edge[0] < eigenvalues[-1] < edge[1] and edge[0] < -eigenvalues[0] < edge[1]


def test_singular_vectors_are_spread_out() -> None:
    """No row or column stands out: the leading singular vectors of noise are delocalised, max |v_i|^2 ~ 2 ln n / n."""
    n = 512
    u, _, vt = np.linalg.svd(standardised(5, "k_proj", n * n).reshape(n, n))
    assert max((u[:, :8] ** 2).max(), (vt[:8] ** 2).max()) < 4 * math.log(n) / n


# --- members and their seeds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("integers", "expected"),
    [((0, 0, 0), 3223307810061058218), ((0, 0, 1), 10006586124726633620), ((42, 7, 29), 16124779221802376495)],
)
def test_seed_check_values(integers: tuple[int, int, int], expected: int) -> None:
    assert derive_seed(*integers, person=MEMBER_PERSON) == expected
    run_seed, step, index = integers
    assert members_for_step(run_seed, step, 30, antithetic=False)[index] == Member(expected, +1)


def test_seed_is_blake2b_over_little_endian_words() -> None:
    words = b"".join(x.to_bytes(8, "little") for x in (2**64 - 1, 500, 1))
    digest = blake2b(words, digest_size=8, person=b"estune-seed-v1").digest()
    assert derive_seed(2**64 - 1, 500, 1, person=b"estune-seed-v1") == sum(b << 8 * i for i, b in enumerate(digest))


def test_every_use_has_a_separate_person() -> None:
    persons = [MEMBER_PERSON, ROW_PERSON, SAMPLE_PERSON, EVAL_PERSON]
    assert len(set(persons)) == 4
    assert all(len(person) <= 16 for person in persons)  # blake2b's limit: longer ones would not be accepted
    assert len({derive_seed(0, 0, 0, person=person) for person in persons}) == 4


@pytest.mark.parametrize("bad", [-1, 2**64])
def test_seed_outside_64_bits_is_refused(bad: int) -> None:
    with pytest.raises(OverflowError):
        derive_seed(bad, person=MEMBER_PERSON)


def test_independent_members_have_positive_signs_and_a_prefix_property() -> None:
    members = members_for_step(3, 4, 30, antithetic=False)
    assert len(members) == 30 and {m.sign for m in members} == {1}
    assert members[:7] == members_for_step(3, 4, 7, antithetic=False)


def test_antithetic_pairs_share_a_seed_in_the_order_plus_minus() -> None:
    members = members_for_step(3, 4, 8, antithetic=True)
    assert [m.sign for m in members] == [1, -1] * 4
    assert [m.seed for m in members[::2]] == [m.seed for m in members[1::2]]
    assert [m.seed for m in members[::2]] == [derive_seed(3, 4, pair, person=MEMBER_PERSON) for pair in range(4)]


def test_no_seed_repeats_between_members_steps_and_run_seeds() -> None:
    """seed + step and seed + index overlap; a hash of the triple does not. Run seed 0 is a seed like any other."""
    seeds = [
        member.seed
        for run_seed, step in product([0, 1, 2, 42, 2**63, 2**64 - 1], range(40))
        for member in members_for_step(run_seed, step, 30, antithetic=False)
    ]
    assert len(set(seeds)) == len(seeds) == 6 * 40 * 30
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_members_are_values() -> None:
    assert members_for_step(0, 1, 4, True) == members_for_step(0, 1, 4, True)
    with pytest.raises(AttributeError):
        members_for_step(0, 0, 2, False)[0].seed = 1  # type: ignore[misc]
