"""The noise is as good as independent binomial draws, within tolerances that theory gives.

Every bound is a multiple of a standard error: `Z` = 4.5 for a single number (two-sided chance 7e-6), more where the
largest of many is taken. The draws are fixed, so nothing here is flaky; a failure means that the noise changed.
`n` is a sum of 32 fair bits minus 16, so its moments are those of a centred Binomial(32, 1/2), computed exactly.
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from estune.es.noise import cpu, noise_ints
from estune.es.noise.reference import noise_words
from estune.es.population import members_for_step

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
