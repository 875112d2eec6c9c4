"""Low-rank noise, bit for bit: factors, members and updates against products in 64-bit integers and float64."""

from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from plain_noise import nearest_float32, plain_key, plain_noise, same_bits, wide_checksum, wide_noise

from estune.config import ESConfig
from estune.data.batches import Batches
from estune.engines.toy import ToyEngine
from estune.es.noise import (
    cpu_lowrank,
    factor_names,
    factor_shapes,
    lowrank_deviation,
    lowrank_factors,
    lowrank_ints,
    lowrank_scale,
    noise_ints,
    perturbation_scale,
)
from estune.es.population import members_for_step
from estune.es.theta import PIECE, HostTheta, row_pieces
from estune.es.types import GroupJob, Member, Noise, ParameterSpec, Perturbation, Prompt, Sampling
from estune.es.update import make_update
from estune.train.step import plan_step

DISTRIBUTIONS = ["normal", "rademacher"]
NONE = np.empty(0, dtype=np.float32)
# Odd sizes, single rows and columns, several tiles either way, rows longer than a piece, experts, nothing at all.
SHAPES: dict[str, tuple[int, ...]] = {
    "one": (1, 1),
    "row": (1, 37),
    "column": (41, 1),
    "odd": (33, 65),
    "wide": (7, 2 * cpu_lowrank.COLS + 5),
    "tall": (2 * cpu_lowrank.ROWS + 3, 19),
    "pieces": (700, 1000),
    "long_rows": (67, PIECE // 50),
    "experts": (3, 35, 50),
    "one_expert": (1, 5, 9),
    "many_experts": (40, 3, 2),
    "no_rows": (0, 4),
    "no_columns": (4, 0),
    "no_experts": (0, 3, 4),
}


def values(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Weights with zeros of both signs and subnormals among them."""
    rng = np.random.default_rng(seed)
    theta = np.asarray(rng.standard_normal(shape) * 0.02, dtype=np.float32).reshape(shape)
    flat = theta.reshape(-1)
    flat[::17] = -0.0
    flat[5::19] = 0.0
    flat[7::101] = 1e-40
    return theta


def make_theta(shapes: dict[str, tuple[int, ...]] = SHAPES, num_threads: int = 1) -> HostTheta:
    """Every parameter has low-rank noise but `full.*` and `frozen.*`."""
    specs = [
        ParameterSpec(name, shape, not name.startswith("frozen"), not name.startswith(("full", "frozen")))
        for name, shape in shapes.items()
    ]
    return HostTheta(specs, {name: values(shape) for name, shape in shapes.items()}, {}, num_threads)


def plain_factors(
    seed: int, name: str, shape: tuple[int, ...], rank: int, distribution: str
) -> tuple[np.ndarray, np.ndarray]:
    """A (..., d0, r) and B (..., d1, r) from the independent noise, int64."""
    *experts, d0, d1 = shape
    made = []
    for suffix, rows in (("#A", d0), ("#B", d1)):
        extents = (*experts, rows, rank)
        flat = wide_noise(plain_key(seed, name + suffix), 0, math.prod(extents), distribution)
        made.append(flat.reshape(extents).astype(np.int64))
    return made[0], made[1]


def product(seed: int, name: str, shape: tuple[int, ...], rank: int, distribution: str = "normal") -> np.ndarray:
    """A B^T in float64, which holds these integers exactly; a float64 matrix product of the independent factors."""
    a, b = plain_factors(seed, name, shape, rank, distribution)
    return a.astype(np.float64) @ b.astype(np.float64).swapaxes(-1, -2)


def expected_update(
    name: str,
    theta: np.ndarray,
    members: list[Member],
    q: list[int],
    rank: int,
    a: float,
    distribution: str = "normal",
    decay: float = 0.0,
    anchor: np.ndarray | None = None,
) -> np.ndarray:
    """One float64 matrix product over all members' factors, then the rule."""
    if theta.size == 0:
        return theta
    lefts, rights = zip(*(plain_factors(m.seed, name, theta.shape, rank, distribution) for m in members), strict=True)
    weighted = [m.sign * weight * left for m, weight, left in zip(members, q, lefts, strict=True)]
    left, right = (
        np.concatenate(weighted, axis=-1),
        np.concatenate(rights, axis=-1),
    )  # (..., d0, N * r), (..., d1, N * r)
    acc = left.astype(np.float64) @ right.astype(np.float64).swapaxes(-1, -2)
    assert np.abs(acc).max() < 2**31 and np.array_equal(acc, np.rint(acc))
    value = theta
    if decay:
        difference = theta if anchor is None else theta - anchor
        value = theta - np.float32(decay) * difference
    return np.where(acc == 0, value, (value.astype(np.float64) + a * acc).astype(np.float32))


# --- the definition ---------------------------------------------------------------------------------------------------


# seed, name, shape, rank, A, B, A B^T: what they have been since low-rank noise was first journalled
CHECK_VALUES = [
    (0, "w", (2, 3), 2, [[0, 4], [-2, 0]], [[1, -2], [-2, 4], [-2, -3]], [[-8, 16, -12], [-2, 4, 4]]),
    (42, "model.layers.0.self_attn.q_proj.weight", (3, 2), 1, [[-2], [-2], [2]], [[2], [-1]],
     [[-4, 2], [-4, 2], [4, -2]]),
    (7, "experts.down_proj", (2, 2, 2), 1, [[[-1], [-2]], [[-3], [0]]], [[[2], [4]], [[-2], [-1]]],
     [[[-2, -4], [-4, -8]], [[6, 3], [0, 0]]]),
]  # fmt: skip


@pytest.mark.parametrize(("seed", "name", "shape", "rank", "a", "b", "noise"), CHECK_VALUES)
def test_check_values(
    seed: int, name: str, shape: tuple[int, ...], rank: int, a: list[object], b: list[object], noise: list[object]
) -> None:
    found = lowrank_factors(seed, name, shape, rank)
    assert (found[0].tolist(), found[1].tolist()) == (a, b)
    assert lowrank_ints(seed, name, shape, rank).tolist() == noise


def test_factors_are_the_noise_of_separate_names() -> None:
    assert factor_names("model.embed.weight") == ("model.embed.weight#A", "model.embed.weight#B")
    a, b = lowrank_factors(5, "w", (3, 4), 2, "rademacher")
    assert (a.shape, b.shape) == ((3, 2), (4, 2)) and a.dtype == b.dtype == np.int32
    assert a.reshape(-1).tolist() == noise_ints(5, "w#A", 0, 6, "rademacher").tolist()
    assert b.reshape(-1).tolist() == noise_ints(5, "w#B", 0, 8, "rademacher").tolist()
    a, b = lowrank_factors(5, "x", (2, 3, 4), 3)  # stacked experts
    assert (a.shape, b.shape) == ((2, 3, 3), (2, 4, 3))
    assert a[1, 2, 0] == plain_noise(5, "x#A", (1 * 3 + 2) * 3 + 0)
    assert b[1, 3, 2] == plain_noise(5, "x#B", (1 * 4 + 3) * 3 + 2)
    assert not np.array_equal(lowrank_factors(5, "x", (4, 4), 3)[0], lowrank_factors(5, "x", (4, 4), 3)[1])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("rank", [1, 3, 16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (2, 3, 4)])
def test_the_noise_is_the_product_of_the_factors(shape: tuple[int, ...], rank: int, distribution: str) -> None:
    """By sums of plain Python integers."""
    seed, name = 2**64 - 1, "layers.3.mlp.weight"
    found = lowrank_ints(seed, name, shape, rank, distribution)
    assert found.shape == shape and found.dtype == np.int32
    *experts, d0, d1 = shape
    for e in range(math.prod(experts)):
        for i in range(d0):
            for j in range(d1):
                index = (e, i, j) if experts else (i, j)
                assert found[index] == sum(
                    plain_noise(seed, f"{name}#A", (e * d0 + i) * rank + k, distribution)
                    * plain_noise(seed, f"{name}#B", (e * d1 + j) * rank + k, distribution)
                    for k in range(rank)
                )


def test_scales() -> None:
    assert [lowrank_deviation(rank) for rank in (1, 4, 16)] == [8.0, 16.0, 32.0]
    assert lowrank_deviation(9, "rademacher") == 3.0 and lowrank_deviation(2) == 8 * math.sqrt(2)
    for rank in (1, 2, 3, 7, 16, 256):
        for sigma in (1e-30, 5e-4, 1e-3, 0.1, 3.0):
            for distribution in DISTRIBUTIONS:
                s = lowrank_scale(sigma, rank, distribution)
                assert s == pytest.approx(sigma / lowrank_deviation(rank, distribution), rel=2.0**-16)
                numerator = Fraction(s).numerator
                assert (numerator // (numerator & -numerator)).bit_length() <= 16
                for n in (1, -3, 255 * rank, -256 * rank):
                    assert Fraction(s * float(n)) == Fraction(s) * n  # exact in float64


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("rank", [1, 2, 8])
def test_a_members_noise_has_mean_0_and_variance_1(rank: int, distribution: str) -> None:
    """Over 200 seeds of a 40 x 50 matrix: elements of one member are uncorrelated, not independent."""
    shape, count = (40, 50), 200
    noise = np.stack([lowrank_ints(seed, "w", shape, rank, distribution) for seed in range(count)])  # (seeds, d0, d1)
    e = noise / lowrank_deviation(rank, distribution)
    assert abs(e.mean()) < 5 / math.sqrt(e.size)
    # A member's mean square is the mean of rank products of two chi-squares over 40 and 50 elements: it deviates by
    # about sqrt((2 / 40 + 2 / 50) / rank) for the normal distribution.
    spread = math.sqrt((2 / 40 + 2 / 50) / rank / count) if distribution == "normal" else math.sqrt(2 / e.size * count)
    assert abs((e**2).mean() - 1) < 5 * spread
    assert np.linalg.matrix_rank(noise[0]) == rank
    flat = e.reshape(count, -1)
    assert abs((flat[:, 0] * flat[:, 1]).mean()) < 5 / math.sqrt(count)  # elements of one row


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4, 5)])
def test_only_matrices_and_stacks_have_factors(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="matrices"):
        factor_shapes(shape, 1)
    with pytest.raises(ValueError, match="matrices"):
        HostTheta([ParameterSpec("w", shape, True, True)], {"w": np.zeros(shape, dtype=np.float32)})


def test_factors_have_fewer_than_2_to_the_32_elements() -> None:
    assert factor_shapes((2**28, 3), 15) == ((2**28, 15), (3, 15))
    for shape in ((2**28, 3), (3, 2**28), (2**8, 2**20, 3)):
        with pytest.raises(ValueError, match=r"2\^32 elements or more"):
            factor_shapes(shape, 16)


# --- members ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize(("rank", "sign"), [(1, 1), (1, -1), (3, -1), (4, 1), (16, 1), (33, -1)])
def test_a_member_equals_the_float64_definition(rank: int, sign: int, num_threads: int, distribution: str) -> None:
    host_theta = make_theta(num_threads=num_threads)
    member = Member(0xDEADBEEF12345678, sign)
    scale = lowrank_scale(1e-2, rank, distribution)
    perturbation = Perturbation(member, Noise(perturbation_scale(1e-2, distribution), distribution, rank, scale))
    for name, shape in SHAPES.items():
        theta = host_theta.arrays[name].copy()
        weights = host_theta.perturb(name, perturbation)
        noise = product(member.seed, name, shape, rank, distribution)
        assert np.array_equal(noise, lowrank_ints(member.seed, name, shape, rank, distribution))
        expected = (theta.astype(np.float64) + scale * (sign * noise + 0.0)).astype(np.float32)
        assert same_bits(weights, expected), name
        assert same_bits(host_theta.arrays[name], theta) and not np.shares_memory(weights, host_theta.arrays[name])
        if noise.any():
            assert not np.array_equal(weights, theta)
    assert host_theta.version == 0


def test_a_member_is_rounded_as_documented_and_fusing_cannot_change_it() -> None:
    host_theta, rank, scale = make_theta({"odd": (33, 65)}), 3, lowrank_scale(7e-4, 3)
    weights = host_theta.perturb("odd", Perturbation(Member(8, -1), Noise(0.0, "normal", rank, scale))).reshape(-1)
    theta = host_theta.arrays["odd"].reshape(-1)
    noise = product(8, "odd", (33, 65), rank).reshape(-1)
    for i in range(0, theta.size, 7):
        exact = Fraction(float(theta[i])) - Fraction(scale) * int(noise[i])
        assert weights[i] == nearest_float32(Fraction(float(exact)))  # to float64 once, to float32 once


def test_minus_zero_under_zero_noise_is_the_same_for_both_signs() -> None:
    """As with full noise: the noise is an integer, it has no -0."""
    host_theta = HostTheta([ParameterSpec("w", (30, 30), True, True)], {"w": np.full((30, 30), -0.0, dtype=np.float32)})
    still = lowrank_ints(3, "w", (30, 30), 1) == 0
    assert 100 < still.sum() < 500
    for sign in (1, -1):
        weights = host_theta.perturb("w", Perturbation(Member(3, sign), Noise(1.0, "normal", 1, 0.5)))
        assert not np.signbit(weights[still]).any()


def test_other_parameters_keep_full_noise() -> None:
    """A run of low-rank noise: vectors have full noise at the full scale, frozen ones none."""
    shapes = {"w": (9, 11), "full.norm": (50,), "full.w": (9, 11), "frozen.w": (4, 4)}
    lowrank, full = make_theta(shapes), make_theta(shapes)
    full = HostTheta([ParameterSpec(s.name, s.shape, s.perturbed) for s in lowrank.specs], lowrank.arrays)
    member = Member(12, -1)
    with_rank = Perturbation(member, Noise(perturbation_scale(1e-2), "normal", 2, lowrank_scale(1e-2, 2)))
    without = Perturbation(member, Noise(perturbation_scale(1e-2)))
    for name in ("full.norm", "full.w", "frozen.w"):
        assert same_bits(lowrank.perturb(name, with_rank), full.perturb(name, without))
        assert same_bits(full.perturb(name, with_rank), full.perturb(name, without))  # a rank that nothing uses
    assert not same_bits(lowrank.perturb("w", with_rank), full.perturb("w", without))
    assert same_bits(lowrank.perturb("frozen.w", with_rank), lowrank.arrays["frozen.w"])


def test_low_rank_parameters_need_a_rank() -> None:
    host_theta = make_theta({"w": (9, 11), "full.norm": (50,)})
    members = members_for_step(0, 0, 4, True)
    for name in ("w", "full.norm"):
        with pytest.raises(ValueError, match="rank of at least 1"):
            host_theta.perturb(name, Perturbation(members[0], Noise(1e-3)))
    for utilities in ([1.0, 0.5, 0.0, 0.0], [0.0] * 4):
        with pytest.raises(ValueError, match="rank of at least 1"):
            host_theta.apply(make_update(members, utilities, 1e-3))
    assert same_bits(host_theta.perturb("w", None), values((9, 11)))
    assert host_theta.version == 0


# --- what a step hands to an engine -----------------------------------------------------------------------------------


def test_a_steps_members_have_the_scales_of_its_sigma() -> None:
    args = ESConfig(noise="lowrank", rank=4, sigma=0.1, sigma_scheduler_type="linear", max_steps=4, population_size=6)
    batches = Batches(10, 2, 0)
    for index in range(4):
        step = plan_step(args, batches, index)
        sigma = 0.1 * (1 - index / 4)
        found = step.perturbations[1]
        assert found == Perturbation(
            step.members[1], Noise(perturbation_scale(sigma), "normal", 4, lowrank_scale(sigma, 4))
        )
        assert step.noise.rank == 4 and found.noise.lowrank_scale == pytest.approx(sigma / 16, rel=2.0**-16)
    full = plan_step(ESConfig(noise_distribution="rademacher", sigma=0.1), batches, 0)
    assert full.noise == Noise(perturbation_scale(0.1, "rademacher"), "rademacher")


def test_the_toy_engine_has_low_rank_matrices() -> None:
    engine = ToyEngine(noise="lowrank")
    assert {spec.name: spec.kind for spec in engine.theta.specs} == {
        "body.bias": "full", "body.weight": "lowrank", "frozen.weight": False, "head.weight": "lowrank",
    }  # fmt: skip
    assert not any(spec.lowrank for spec in ToyEngine().theta.specs)
    members = [Perturbation(m, Noise(0.1, "normal", 2, 0.05)) for m in members_for_step(0, 0, 3, False)]
    prompts = [Prompt(i, f"x[{i}]", (1,)) for i in range(engine.coordinates)]
    sampling = Sampling(0, 0, 100)
    job = GroupJob((0, 1, 2), tuple(members), engine.checksum(), tuple(prompts), sampling)
    [answers] = [answer.completions for answer in engine.answers([job])]  # (M, B, G)
    assert answers == [engine.generate(member, prompts, sampling) for member in members]
    texts = [engine.assets.decode(answer[0].token_ids) for answer in answers[1]]
    matrix = [float(text) for text in texts[8:40]]  # body.weight, behind the bias
    noise = members[1].member.sign * lowrank_ints(members[1].member.seed, "body.weight", (4, 8), 2)
    assert np.array(matrix, dtype=np.float32).tolist() == (0.05 * noise.reshape(-1)).astype(np.float32).tolist()


# --- updates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize(
    ("size", "rank", "antithetic"), [(2, 1, True), (3, 1, False), (30, 1, True), (30, 4, False), (64, 16, True)]
)
def test_an_update_equals_one_float64_matrix_product(
    size: int, rank: int, antithetic: bool, num_threads: int, distribution: str
) -> None:
    host_theta = make_theta(num_threads=num_threads)
    before = {name: array.copy() for name, array in host_theta.arrays.items()}
    members = members_for_step(1, 2, size, antithetic)
    utilities = np.random.default_rng(size).standard_normal(size).tolist()
    update = make_update(members, utilities, 5e-2, distribution=distribution, rank=rank)
    moved = host_theta.apply(update)
    squares = sizes = 0.0
    for name, theta in before.items():
        after = expected_update(name, theta, members, list(update.q), rank, update.a_lowrank, distribution)
        assert same_bits(host_theta.arrays[name], after), name
        squares += float(((after.astype(np.float64) - theta) ** 2).sum())
        sizes += float((after.astype(np.float64) ** 2).sum())
    assert moved.checksum == host_theta.checksum() != make_theta().checksum()
    assert moved.norm == pytest.approx(math.sqrt(squares), rel=1e-9)
    assert moved.ratio == pytest.approx(math.sqrt(squares / sizes), rel=1e-9)
    assert host_theta.version == 1


@pytest.mark.parametrize("anchored", [False, True])
def test_decay_comes_before_the_update_and_rounds_each_operation(anchored: bool) -> None:
    host_theta = make_theta(num_threads=2)
    before = {name: array.copy() for name, array in host_theta.arrays.items()}
    base = {name: values(shape, seed=9) for name, shape in SHAPES.items()}
    members = members_for_step(1, 2, 6, True)
    update = make_update(members, [1.0, 0.5, -1.5, 0.1, 0.2, -0.3], 5e-3, weight_decay=10, anchored=anchored, rank=2)
    asked: list[int] = []

    def anchor(name: str, start: int, count: int) -> np.ndarray:
        asked.append(count)
        return base[name].reshape(-1)[start : start + count]

    moved = host_theta.apply(update, anchor)
    for name, theta in before.items():
        origin = base[name] if anchored else None
        after = expected_update(
            name, theta, members, list(update.q), 2, update.a_lowrank, decay=update.decay, anchor=origin
        )
        assert same_bits(host_theta.arrays[name], after), name
    assert moved.checksum == host_theta.checksum()
    assert bool(asked) == anchored and max(asked, default=0) <= 2 * PIECE  # never a resident copy


def test_full_and_frozen_parameters_move_as_without_low_rank_noise() -> None:
    """But for the bound on the integers, which holds for all parameters of the run."""
    shapes = {"w": (9, 11), "full.norm": (50,), "frozen.w": (4, 4)}
    members = members_for_step(0, 0, 4, False)
    update = make_update(members, [1.0, -0.25, 0.5, 0.75], 1e-2, rank=3)
    host_theta = make_theta(shapes)
    before = {name: array.copy() for name, array in host_theta.arrays.items()}
    moved = host_theta.apply(update)
    acc = sum(q * wide_noise(plain_key(m.seed, "full.norm"), 0, 50) for m, q in zip(members, update.q, strict=True))
    theta = before["full.norm"].astype(np.float64)
    assert same_bits(
        host_theta.arrays["full.norm"],
        np.where(acc == 0, before["full.norm"], (theta + update.a * acc).astype(np.float32)),
    )
    assert same_bits(host_theta.arrays["frozen.w"], before["frozen.w"])
    change = {name: host_theta.arrays[name].astype(np.float64) - before[name] for name in shapes}
    norm = math.sqrt(sum(float((change[name] ** 2).sum()) for name in shapes))
    assert moved.norm == pytest.approx(norm, rel=1e-9)


def test_where_the_sum_is_zero_theta_keeps_its_bits() -> None:
    """Also -0.0 and NaN payloads: equal utilities of a mirrored pair cancel everywhere."""
    bits = np.array([0x80000000, 0, 1, 0x7F7FFFFF, 0x80000001, 0x7FC00123] * 800, dtype=np.uint32).reshape(60, 80)
    host_theta = HostTheta([ParameterSpec("w", (60, 80), True, True)], {"w": bits.view(np.float32).copy()})
    pair = members_for_step(0, 0, 2, antithetic=True)
    host_theta.apply(make_update(pair, [1.0, 1.0], 1.0, rank=2))
    assert np.array_equal(host_theta.arrays["w"].view(np.uint32), bits)
    single = members_for_step(0, 0, 2, antithetic=False)
    host_theta.apply(make_update(single, [1.0, 0.0], 1.0, rank=1))
    still = product(single[0].seed, "w", (60, 80), 1) == 0
    assert 800 < still.sum() < 1800  # P(A B = 0) is 26 %
    assert np.array_equal(host_theta.arrays["w"].view(np.uint32)[still], bits[still])
    assert (host_theta.arrays["w"].view(np.uint32)[~still] != bits[~still]).mean() > 0.6


def test_the_largest_sums_do_not_overflow() -> None:
    """Members that all have one noise, and the largest |q|, come as near to int32's bound as products do."""
    size, rank, shape = 2048, 1, (300, 300)
    members = [Member(7, 1)] * size
    update = make_update(members, [1.0] * size, 1.0, rank=rank)
    assert max(update.q) * 256 * size * rank < 2**31 <= 2 * max(update.q) * 256 * size * rank
    host_theta = HostTheta([ParameterSpec("w", shape, True, True)], {"w": np.zeros(shape, dtype=np.float32)})
    host_theta.apply(update)
    acc = sum(update.q) * product(7, "w", shape, rank)
    assert 2**28 < np.abs(acc).max() < 2**31
    assert same_bits(host_theta.arrays["w"], (update.a_lowrank * acc).astype(np.float32) + np.float32(0.0))


def kernel_arguments(members: list[Member], q: list[int], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    keys = [np.array([plain_key(m.seed, name + suffix) for m in members], dtype=np.uint32) for suffix in ("#A", "#B")]
    return keys[0], keys[1], np.array([m.sign * weight for m, weight in zip(members, q, strict=True)], dtype=np.int32)


@pytest.mark.parametrize("shape", [(451, 37), (5, 83, 20)])
def test_any_cut_into_rows_gives_the_same_bits_and_checksums_add_up(shape: tuple[int, ...]) -> None:
    members = members_for_step(3, 1, 10, True)
    update = make_update(members, np.random.default_rng(1).standard_normal(10).tolist(), 1e-2, weight_decay=3, rank=3)
    keys_a, keys_b, q = kernel_arguments(members, list(update.q), "w")
    theta = values(shape)
    whole = expected_update("w", theta, members, list(update.q), 3, update.a_lowrank, decay=update.decay)
    d0, d1 = shape[-2:]
    for cuts in ([0, d0], [0, 1, 2, d0], [0, 17, 80, d0]):
        rows = theta.reshape(-1, d1).copy()
        total = 0
        for expert in range(rows.shape[0] // d0):
            for lo, hi in pairwise(cuts):
                first = expert * d0 + lo
                part = rows[first : expert * d0 + hi]
                total += int(
                    cpu_lowrank.update_lowrank_into(
                        part, first, expert * d1, keys_a, keys_b, q, 3, update.a_lowrank, False,
                        np.float32(update.decay), NONE,
                    )[0]
                )  # fmt: skip
        assert same_bits(rows.reshape(shape), whole)
        assert total % 2**64 == wide_checksum(whole)


def test_the_checksum_counts_elements_modulo_2_to_the_32() -> None:
    """Rows far down in a large matrix: 3000 columns, from row 1 431 655 of them, cross element 2^32."""
    rows, first, d1 = 4, 2**32 // 3000 - 1, 3000
    members = members_for_step(3, 1, 2, False)
    keys_a, keys_b, q = kernel_arguments(members, [3, -2], "w")
    theta = values((rows, d1))
    moved = theta.copy()
    total, _, _ = cpu_lowrank.update_lowrank_into(
        moved, first, 0, keys_a, keys_b, q, 1, 1e-6, False, np.float32(0.0), NONE
    )
    a = np.stack([wide_noise(plain_key(m.seed, "w#A"), first, rows) for m in members], axis=1)  # (rows, 2)
    b = np.stack([wide_noise(plain_key(m.seed, "w#B"), 0, d1) for m in members], axis=1)  # (d1, 2)
    acc = (a * [3, -2]) @ b.T
    assert same_bits(moved, np.where(acc == 0, theta, (theta + 1e-6 * acc.astype(np.float64)).astype(np.float32)))
    start, flat = first * d1, moved.reshape(-1)
    below = 2**32 - start
    assert 0 < below < flat.size
    assert int(total) == (wide_checksum(flat[:below], start) + wide_checksum(flat[below:], 0)) % 2**64


MEMORY_SCRIPT = """
import numpy as np
from estune.es.types import ParameterSpec
from estune.es.theta import HostTheta
from estune.es.update import make_update
from estune.es.population import members_for_step

def peak_kib():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

def host_theta(shape):
    return HostTheta([ParameterSpec("w", shape, True, True)], {"w": np.ones(shape, dtype=np.float32)})

members = members_for_step(3, 1, 64, True)
update = make_update(members, np.arange(64.0).tolist(), 1e-2, rank=4)
large = host_theta((4096, 4096))  # 64 MiB
host_theta((8, 8)).apply(update)  # compiles, or loads what was
before = peak_kib()
large.apply(update)
print(peak_kib() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_of_a_tensors_size_is_made() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 8 << 10  # KiB; the matrix has 64 MiB, the members' factors 8 MiB


@pytest.mark.parametrize("shape", [(700, 1000), (5, PIECE), (3, 2 * PIECE), (4, 9, 7), (2, 900, 900), (0, 3), (3, 0)])
def test_row_pieces_cover_every_row_once(shape: tuple[int, ...]) -> None:
    *experts, d0, d1 = shape
    covered = []
    for row, count, column in row_pieces(shape):
        assert count >= 1 and column == row // d0 * d1 == (row + count - 1) // d0 * d1  # rows of one matrix
        assert count * d1 <= PIECE or count <= 64
        covered += range(row, row + count)
    assert covered == (list(range(math.prod(experts) * d0)) if d1 else [])
