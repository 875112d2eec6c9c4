"""The update's scalars: integer utilities, the exact scale `a`, schedules. Checked with integers and fractions."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from estune.config import ESConfig
from estune.es.noise.reference import noise_deviation
from estune.es.population import members_for_step
from estune.es.types import Member
from estune.es.update import SCHEDULES, SIGMA_SCHEDULES, integer_utilities, make_update, scheduled
from estune.train.step import follows_time, schedule_factors

INT32_BOUND = 2**31


def scaled(utilities: list[float], exponent: int) -> list[int]:
    """rint(u * 2^exponent), half to even, in exact arithmetic."""
    return [round(Fraction(u) * Fraction(2) ** exponent) for u in utilities]


def fits(utilities: list[float], exponent: int, largest_noise: int = 16) -> bool:
    top = max(abs(q) for q in scaled(utilities, exponent))
    return top <= 32767 and top * largest_noise * len(utilities) < INT32_BOUND


def significant_bits(value: float) -> int:
    numerator = abs(Fraction(value).numerator)
    return (numerator // (numerator & -numerator)).bit_length() if numerator else 0


finite = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=150)
@given(st.lists(finite, min_size=2, max_size=40).filter(any))
@example([5e-324, -5e-324])
@example([1.7976931348623157e308, -1e308])
@example([32767.5, -32767.5])
@example([32767.4999, 0.0])
@example([0.5, 1.5, 2.5, -0.5, -1.5, 16384.0])
def test_integer_utilities_take_the_largest_exponent_that_fits(utilities: list[float]) -> None:
    q, e = integer_utilities(utilities)
    assert q == scaled(utilities, e)
    assert fits(utilities, e)
    assert not any(fits(utilities, e + more) for more in range(1, 8))
    assert max(abs(x) for x in q) >= 16384  # for these N the precision is 14 to 15 bits


@pytest.mark.parametrize("size", [2, 30, 4096, 4097, 8192, 100_000, 1_000_000])
def test_int32_never_overflows_and_the_exponent_is_the_largest(size: int) -> None:
    rng = np.random.default_rng(size)
    for values in (rng.standard_normal(size), np.array([1.0, -1.0] + [0.0] * (size - 2)), np.full(size, 3.3)):
        utilities = values.tolist()
        q, e = integer_utilities(utilities)
        top = max(abs(x) for x in q)
        assert sum(abs(x) for x in q) * 16 <= top * 16 * size < INT32_BOUND
        assert 0 < top <= 32767
        largest = max(utilities, key=abs)
        tops = [abs(scaled([largest], e + more)[0]) for more in range(4)]  # at the exponent, and at larger ones
        assert tops[0] == top
        assert all(larger > 32767 or larger * 16 * size >= INT32_BOUND for larger in tops[1:])


@pytest.mark.parametrize("rank", [1, 2, 16, 64])
@pytest.mark.parametrize("size", [2, 30, 64, 512, 8192])
def test_with_low_rank_noise_the_bound_is_that_of_products(size: int, rank: int) -> None:
    """|A B^T| <= 256 * rank, so max|q| * 256 * N * rank < 2^31, at the largest exponent for which that holds."""
    for utilities in (np.random.default_rng(size).standard_normal(size).tolist(), [3.3] * size):
        q, e = integer_utilities(utilities, rank)
        assert q == scaled(utilities, e) and any(q)
        assert sum(abs(x) for x in q) * 256 * rank <= max(abs(x) for x in q) * 256 * rank * size < INT32_BOUND
        assert fits(utilities, e, 256 * rank) and not any(fits(utilities, e + more, 256 * rank) for more in (1, 2, 3))
    assert integer_utilities([0.0] * size, rank) == ([0] * size, 0)


def test_the_largest_low_rank_population_still_tells_members_apart() -> None:
    """N * rank is just below the 2^23 that the configuration allows."""
    q, _ = integer_utilities([1.0, -1.0] + [0.0] * ((1 << 16) - 3), 128)
    assert max(q) == 1 and min(q) == -1


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("rank", [1, 2, 5, 16])
@pytest.mark.parametrize("learning_rate", [1e-12, 5e-4, 1e3])
def test_the_low_rank_scale_is_right_and_its_products_are_exact(
    learning_rate: float, rank: int, distribution: str
) -> None:
    utilities = np.random.default_rng(1).standard_normal(30).tolist()
    members = members_for_step(0, 0, 30, False)
    update = make_update(members, utilities, learning_rate, distribution=distribution, rank=rank)
    assert update.rank == rank and significant_bits(update.a_lowrank) <= 22 and significant_bits(update.a) <= 22
    per_unit = Fraction(learning_rate) / (30 * Fraction(2) ** update.e)
    variance = 8 if distribution == "normal" else 1  # of one integer; of A B^T it is variance^2 * rank
    for a, squared in ((update.a, Fraction(variance)), (update.a_lowrank, Fraction(variance**2 * rank))):
        assert abs(Fraction(a) ** 2 * squared / per_unit**2 - 1) < Fraction(1, 2**21)
    for acc in (1, -1, 3, 2**31 - 1, -(2**31 - 1), 0x55555555):
        assert Fraction(update.a_lowrank * float(acc)) == Fraction(update.a_lowrank) * acc


def test_without_a_rank_an_update_is_what_it_always_was() -> None:
    members = members_for_step(0, 0, 30, False)
    utilities = np.random.default_rng(1).standard_normal(30).tolist()
    update = make_update(members, utilities, 5e-4)
    assert (update.rank, update.a_lowrank) == (0, 0.0)
    assert (list(update.q), update.e) == integer_utilities(utilities) == integer_utilities(utilities, 0)
    lowrank = make_update(members, utilities, 5e-4, rank=16)
    assert max(map(abs, lowrank.q)) < max(map(abs, update.q)) and lowrank.e < update.e


def test_half_goes_to_even() -> None:
    """With 16384 the exponent is 0, so halves stay halves."""
    q, e = integer_utilities([16384.0, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5])
    assert (q, e) == ([16384, 0, 2, 2, 4, 0, -2, -2], 0)


def test_a_largest_utility_that_rounds_up_to_32768_lowers_the_exponent() -> None:
    assert integer_utilities([32767.5, 1.0]) == ([16384, 0], -1)  # rint(32767.5) = 32768 does not fit; 0.5 -> 0
    assert integer_utilities([32767.25, 1.0]) == ([32767, 1], 0)


def test_ties_and_bad_utilities() -> None:
    assert integer_utilities([0.0] * 30) == ([0] * 30, 0)
    assert integer_utilities([-0.0, 0.0]) == ([0, 0], 0)
    for bad in (math.inf, -math.inf):
        with pytest.raises(ValueError, match="finite"):
            integer_utilities([1.0, bad])
    with pytest.raises(ValueError, match=r"finite|NaN"):
        integer_utilities([math.nan, math.nan])
    with pytest.raises(ValueError, match=r"finite|NaN"):
        integer_utilities([1.0, math.nan])


def test_integer_utilities_do_not_depend_on_order_or_sign() -> None:
    utilities = np.random.default_rng(0).standard_normal(31).tolist()
    q, e = integer_utilities(utilities)
    assert integer_utilities(utilities[::-1]) == (q[::-1], e)
    assert integer_utilities([-u for u in utilities]) == ([-x for x in q], e)
    assert integer_utilities([u * 2.0**-40 for u in utilities]) == (q, e + 40)


LEARNING_RATES = [1e-30, 1e-12, 5e-4, 7.5e-4, 0.05, 1.0, 1e3]


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("learning_rate", LEARNING_RATES)
@pytest.mark.parametrize("magnitude", [1e-12, 1e-3, 1.7, 1e6, 1e12])
@pytest.mark.parametrize("size", [2, 30, 5000])
def test_scale_a_is_right_and_its_products_are_exact(
    size: int, magnitude: float, learning_rate: float, distribution: str
) -> None:
    """a has 22 bits and |acc| < 2^31, so a * acc is exact in float64 and a fused multiply-add cannot change a bit."""
    check_update(size, magnitude, learning_rate, distribution)


@pytest.mark.e2e
def test_scale_a_of_a_million_members() -> None:
    check_update(1_000_000, 1.0, 5e-4, "normal")


def check_update(size: int, magnitude: float, learning_rate: float, distribution: str) -> None:
    rng = np.random.default_rng(1)
    some = min(size, 30)
    utilities = (rng.standard_normal(some) * magnitude).tolist() + [0.0] * (size - some)
    members = [Member(index, 1) for index in range(size)]
    update = make_update(members, utilities, learning_rate, distribution=distribution)
    assert update.q[:some] == tuple(scaled(utilities[:some], update.e)) and not any(update.q[some:])
    assert significant_bits(update.a) <= 22
    deviation = Fraction(8 if distribution == "normal" else 1)
    wanted_squared = (Fraction(learning_rate) / (len(members) * Fraction(2) ** update.e)) ** 2 / deviation
    assert abs(Fraction(update.a) ** 2 / wanted_squared - 1) < Fraction(1, 2**21)  # relative error of a below 2^-22
    top = max(abs(x) for x in update.q) * 16 * len(members)
    for acc in (1, -1, 3, 2**31 - 1, -(2**31 - 1), 0x55555555, top, -top, *rng.integers(-top, top, 10).tolist()):
        product = update.a * float(acc)
        assert Fraction(product) == Fraction(update.a) * acc
        for theta in (0.7312345, -1e-6, 1e30):
            theta32 = float(np.float32(theta))
            fused = float(Fraction(theta32) + Fraction(update.a) * acc)
            assert theta32 + product == fused


@pytest.mark.parametrize("utility", [5e-324, 1e-320, 1e-300, 1e-200, 1e200, 1e300])
def test_absurd_utilities_give_a_finite_scale(utility: float) -> None:
    """`none` shaping hands on whatever scale the reward has; 2^e alone would not fit a float64 here."""
    members = [Member(1, 1), Member(2, 1)]
    update = make_update(members, [utility, -utility], 5e-4)
    assert update.q[0] == -update.q[1] > 0
    assert math.isfinite(update.a)
    wanted = Fraction(5e-4) / (2 * Fraction(math.sqrt(8)) * Fraction(2) ** update.e)
    assert update.a == pytest.approx(float(wanted), rel=2**-21, abs=5e-324)


def test_the_update_is_the_papers_rule_to_15_bits() -> None:
    utilities = np.random.default_rng(3).standard_normal(30)
    update = make_update(members_for_step(0, 0, 30, False), utilities.tolist(), 5e-4)
    implied = np.array(update.q) * update.a * 30 * noise_deviation() / 5e-4
    assert np.abs(implied - utilities).max() <= np.abs(utilities).max() * 2.0**-15 + 2.0**-20


def test_decay_is_a_float32_number_and_ties_are_zero_updates() -> None:
    members = members_for_step(0, 0, 4, True)
    update = make_update(members, [1.0, -1.0, 0.5, -0.5], 5e-4, weight_decay=10.0, anchored=True)
    assert update.decay == float(np.float32(5e-4 * 10.0)) and update.anchored and not update.is_zero
    assert update.members == tuple(members) and update.distribution == "normal"
    tie = make_update(members, [0.0] * 4, 5e-4, weight_decay=10.0)
    assert tie.is_zero and tie.q == (0, 0, 0, 0)
    assert make_update(members, [1.0, 0.0, 0.0, 0.0], 5e-4).decay == 0.0


def test_schedules() -> None:
    assert [scheduled("constant", step, 4) for step in range(5)] == [1.0] * 5
    assert [scheduled("linear", step, 4) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [scheduled("linear", step, 6, 2) for step in range(7)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert [scheduled("constant_with_warmup", step, 9, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cosine = [scheduled("cosine", step, 4) for step in range(5)]
    assert cosine == pytest.approx([1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0.0], abs=1e-15)
    with pytest.raises(ValueError, match="unknown schedule"):
        scheduled("cosinus", 3, 10)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 3, 20])
def test_schedules_are_positive_on_every_step_and_bounded(schedule: str, warmup: int) -> None:
    factors = [scheduled(schedule, step, 10, warmup) for step in range(10)]
    assert all(0 < factor <= 1 for factor in factors)
    assert all(scheduled(schedule, step, 10, warmup) >= 0 for step in range(10, 40))
    assert set(SIGMA_SCHEDULES) <= set(SCHEDULES)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_schedules_over_time(schedule: str, warmup: int) -> None:
    """A run of 20 steps at most that time ends after 10 of them has the schedule of a run of 10 steps."""
    options: dict[str, Any] = {"lr_scheduler_type": schedule, "sigma_scheduler_type": "linear", "warmup_steps": warmup}
    timed = ESConfig(max_steps=20, max_time_s=100.0, **options)
    for index in range(10):
        found = schedule_factors(timed, index, 10.0 * index)
        assert found.sigma == pytest.approx(scheduled("linear", index, 10), abs=1e-12)
        if 2 * index >= warmup:
            expected = scheduled(schedule, index, 10, warmup // 2)
        else:
            expected = min(1.0, (2 * index + 1) / warmup)
        assert found.learning_rate == pytest.approx(expected, abs=1e-12)
        assert 0 < found.learning_rate <= 1 and 0 < found.sigma <= 1
    # where steps run faster, the bits are those of a run without a limit of time
    steps = ESConfig(max_steps=20, **options)
    for index in range(20):
        assert schedule_factors(timed, index, 4.0 * index) == schedule_factors(steps, index)


def test_constant_schedules_do_not_follow_time() -> None:
    args = ESConfig(max_steps=20, max_time_s=100.0, warmup_steps=4)
    assert not follows_time(args)
    assert [schedule_factors(args, index, 99.0).learning_rate for index in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
