"""Rewards to fitness to utilities, on cases worked out by hand and properties that must hold for any rewards."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estune.es.fitness import (
    SHAPINGS,
    centered,
    centered_rank,
    fill_failures,
    is_tie,
    mean,
    population_fitness,
    shape_fitness,
    share_of_tied_prompts,
    weigh,
    z_score,
)

NAN = math.nan
values_of = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=40)


def rows_of(*members: list[float]) -> np.ndarray:
    """Weighed rewards (N, B, 1) from one list of B rewards per member."""
    return np.array(members, dtype=np.float64)[:, :, None]


def one_function(*members: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Rewards and failures (N, B, 1, 1); inf stands for a failure."""
    rewards = np.array(members, dtype=np.float64)[:, :, None, None]
    return np.where(np.isinf(rewards), NAN, rewards), np.isinf(rewards)


# Failures


def test_a_failure_gets_the_lowest_reward_of_its_row_and_function() -> None:
    rewards, failed = one_function([1.0, 5.0], [math.inf, 2.0], [0.25, math.inf])
    filled = fill_failures(rewards, failed)
    assert filled[:, :, 0, 0].tolist() == [[1.0, 5.0], [0.25, 2.0], [0.25, 2.0]]


def test_lowest_is_taken_over_members_and_completions_but_not_over_functions_or_rows() -> None:
    rewards = np.arange(16, dtype=np.float64).reshape(2, 2, 2, 2)  # (N, B, G, F)
    failed = np.zeros(rewards.shape, dtype=bool)
    failed[0, 1, 0, 1] = failed[1, 1, 1, 1] = True
    filled = fill_failures(rewards, failed)
    expected = rewards.copy()
    expected[0, 1, 0, 1] = expected[1, 1, 1, 1] = 7.0  # the lowest of {7, 13}, function 1 of row 1
    assert np.array_equal(filled, expected)
    assert rewards[0, 1, 0, 1] == 5.0  # the input is left alone


def test_a_row_where_a_function_gave_nobody_a_reward_is_dropped_for_all() -> None:
    rewards = np.ones((3, 2, 1, 2))
    failed = np.zeros(rewards.shape, dtype=bool)
    failed[:, 1, :, 0] = True
    filled = fill_failures(rewards, failed)
    assert np.isnan(filled[:, 1]).all() and (filled[:, 0] == 1).all()
    fitness, utilities = shape_fitness(weigh(filled, [1.0, 1.0]), "z_score")
    assert fitness.tolist() == [2.0, 2.0, 2.0] and utilities == [0.0, 0.0, 0.0]


def test_failed_with_nothing_but_not_applicable_beside_it_is_dropped() -> None:
    rewards, failed = one_function([math.inf, 1.0], [NAN, 3.0])
    filled = fill_failures(rewards, failed)
    assert np.isnan(filled[:, 0]).all()
    assert population_fitness(weigh(filled, [1.0])).tolist() == [1.0, 3.0]


def test_not_applicable_is_not_a_failure() -> None:
    rewards, failed = one_function([NAN, 1.0], [3.0, 2.0])
    assert np.array_equal(fill_failures(rewards, failed), rewards, equal_nan=True)


def test_failing_a_penalty_gets_its_worst_value() -> None:
    """With a negative weight the highest reward is the worst: the lowest would pay."""
    rewards, failed = one_function([10.0], [math.inf], [2.0])
    worst = weigh(fill_failures(rewards, failed, [-1.0]), [-1.0])[:, 0, 0]
    assert worst.tolist() == [-10.0, -10.0, -2.0]


@settings(max_examples=60)
@given(st.data())
def test_failing_never_pays(data: st.DataObject) -> None:
    """On every row, a failed completion has no higher reward than any other completion."""
    n, b, g, f = (data.draw(st.integers(1, top)) for top in (5, 3, 2, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    rewards = rng.choice([-1.0, 0.0, 0.1, 0.5, 1.0, 7.0], (n, b, g, f))
    failed = rng.random((n, b, g, f)) < data.draw(st.sampled_from([0.1, 0.5, 0.9]))
    weights = rng.choice([-2.0, -1.0, 0.5, 1.0], f).tolist()
    filled = fill_failures(np.where(failed, NAN, rewards), failed, weights)
    for row in range(b):
        if np.isnan(filled[:, row]).any():
            assert np.isnan(filled[:, row]).all()
            assert any(failed[:, row, :, k].all() for k in range(f))
            continue
        for k, weight in enumerate(weights):
            honest = weight * filled[:, row, :, k][~failed[:, row, :, k]]
            guilty = weight * filled[:, row, :, k][failed[:, row, :, k]]
            assert not guilty.size or guilty.max() <= honest.min()
    if f == 1 and b == 1 and g == 1 and not np.isnan(filled).any():
        for shaping in SHAPINGS:
            _, utilities = shape_fitness(weigh(filled, weights), shaping)
            lucky = [u for u, bad in zip(utilities, failed.reshape(-1), strict=True) if bad]
            assert all(u <= min(utilities) for u in lucky)


# Weights


def test_weights_sum_as_in_trl() -> None:
    rewards = np.array([[1.0, 0.5, 2.0], [0.0, 1.0, -1.0]])
    assert weigh(rewards, [1.0, 0.1, -2.0]).tolist() == [1.0 + 0.5 * 0.1 - 4.0, 0.1 + 2.0]


def test_none_is_left_out_and_the_other_weights_grow() -> None:
    rewards = np.array([[1.0, NAN], [NAN, 1.0], [NAN, NAN], [1.0, 1.0]])
    assert weigh(rewards, [3.0, 1.0]).tolist()[:2] == [4.0, 4.0]
    assert np.isnan(weigh(rewards, [3.0, 1.0])[2])
    assert weigh(rewards, [3.0, 1.0])[3] == 4.0
    assert weigh(np.array([NAN, 5.0]), [1.0, -2.0]) == 5.0 * -2.0 * 3.0 / 2.0  # the total of |weights| is kept: 3
    assert math.isnan(weigh(np.array([NAN, 5.0]), [1.0, 0.0]))  # what is left has no weight
    assert weigh(np.array([1.0, 5.0]), [1.0, 0.0]) == 1.0


def test_means_leave_nan_out_and_are_exactly_rounded() -> None:
    assert mean(np.array([NAN, 1.0, 2.0])) == 1.5
    assert math.isnan(mean(np.array([NAN, NAN])))
    assert mean(np.full(30, 0.1)) == 0.1  # np.mean gives 0.09999999999999999 or so
    assert mean(np.array([1e16, 1.0, -1e16])) == 1 / 3
    assert mean(np.array([1e308, 1e308, 1e308])) == 1e308  # no overflow on the way


@settings(max_examples=60)
@given(st.lists(st.floats(-1e200, 1e200), min_size=1, max_size=30))
def test_mean_equals_exact_arithmetic(numbers: list[float]) -> None:
    total = float(sum(map(Fraction, numbers)))  # rounded once, as fsum
    assert mean(np.array(numbers)) == pytest.approx(total / len(numbers), rel=1e-15, abs=1e-290)


def test_fitness_is_over_prompts_and_completions() -> None:
    rows = np.array([[[1.0, 0.0], [NAN, 1.0]], [[NAN, NAN], [NAN, NAN]]])  # (N, B, G)
    fitness = population_fitness(rows)
    assert fitness[0] == pytest.approx(2 / 3) and math.isnan(fitness[1])


# Shaping


@pytest.mark.parametrize("shaping", list(SHAPINGS))
def test_thirty_times_a_tenth_moves_nothing(shaping: str) -> None:
    assert np.full(30, 0.1).std() > 0  # 2.8e-17 where the mean is rounded: enough for a naive z-score
    rows = rows_of(*[[0.1]] * 30)
    assert shape_fitness(rows, shaping)[1] == [0.0] * 30
    sums = [math.fsum([0.1] * 3), 0.1 + 0.1 + 0.1, 0.3] * 10  # apart by rounding alone
    assert len(set(sums)) > 1
    assert shape_fitness(rows_of(*[[x] for x in sums]), shaping)[1] == [0.0] * 30


@pytest.mark.parametrize(
    ("low", "high", "tied"),
    [
        (0.0, 1e-9, True), (0.0, 1.1e-9, False), (1e6, 1e6 + 9e-4, True), (1e6, 1e6 + 2e-3, False),
        (-1e6, -1e6 + 9e-4, True), (5.0, 5.0, True), (1e-12, -1e-12, True),
    ],
)  # fmt: skip
def test_the_tie_threshold(low: float, high: float, tied: bool) -> None:
    assert is_tie([low, high]) is tied
    assert (z_score([low, high]) == [0.0, 0.0]) is tied


def test_z_score_by_hand() -> None:
    assert z_score([1.0, 2.0, 3.0]) == pytest.approx([-math.sqrt(1.5), 0.0, math.sqrt(1.5)])  # population deviation
    assert z_score([0.0, 0.0, 0.0, 1.0]) == pytest.approx([-1 / math.sqrt(3)] * 3 + [math.sqrt(3)])
    assert z_score([1e200, -1e200]) == [1.0, -1.0]  # squares of a huge reward must not overflow
    assert z_score([1e308, 1e308, 0.0]) == pytest.approx([math.sqrt(0.5), math.sqrt(0.5), -math.sqrt(2)])


@settings(max_examples=60)
@given(values_of)
def test_z_score_has_mean_zero_and_deviation_one(numbers: list[float]) -> None:
    scores = z_score(numbers)
    if is_tie(numbers):
        assert scores == [0.0] * len(numbers)
        return
    bound = 1e-15 * max(map(abs, numbers)) / (max(numbers) - min(numbers)) * len(numbers) + 1e-12
    assert abs(math.fsum(scores) / len(scores)) < bound
    assert math.fsum(s * s for s in scores) / len(scores) == pytest.approx(1.0, abs=max(bound, 1e-9))
    assert all(
        (a < b) <= (sa <= sb)
        for a, sa in zip(numbers, scores, strict=True)
        for b, sb in zip(numbers, scores, strict=True)
    )


@settings(max_examples=60)
@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=30), st.integers(-50, 50), st.integers(-8, 8))
def test_shapings_do_not_see_shift_or_scale(numbers: list[int], shift: int, power: int) -> None:
    """Integers shifted and scaled by a power of two, so that the arithmetic is exact and the comparison strict."""
    plain = [float(x) for x in numbers]
    moved = [(x + shift) * 2.0**power for x in plain]
    assert z_score(moved) == pytest.approx(z_score(plain), abs=1e-9)
    assert centered_rank(moved) == centered_rank(plain)
    assert centered(moved) == pytest.approx([u * 2.0**power for u in centered(plain)], rel=1e-9, abs=1e-9)


def test_centered_rank_shares_mid_ranks() -> None:
    assert centered_rank([3.0, 1.0, 2.0]) == [0.5, -0.5, 0.0]
    assert centered_rank([1.0, 1.0, 2.0, 0.0]) == pytest.approx([0.0, 0.0, 0.5, -0.5])
    assert centered_rank([5.0, 5.0, 5.0, 7.0]) == pytest.approx([1 / 3 - 0.5] * 3 + [0.5])


@settings(max_examples=60)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=20))
def test_centered_rank_equals_the_mean_over_all_orders_of_the_ties(numbers: list[int]) -> None:
    n = len(numbers)
    order = sorted(range(n), key=lambda i: numbers[i])
    places = {x: [place for place, i in enumerate(order) if numbers[i] == x] for x in numbers}
    expected = [sum(places[x]) / len(places[x]) / (n - 1) - 0.5 for x in numbers]
    if max(numbers) == min(numbers):
        expected = [0.0] * n
    ranks = centered_rank([float(x) for x in numbers])
    assert ranks == pytest.approx(expected)
    assert abs(math.fsum(ranks)) < 1e-12


def test_per_prompt_z_by_hand() -> None:
    rows = rows_of([0.0, 5.0, 1.0], [10.0, 5.0, 0.0], [5.0, 5.0, 0.5])
    fitness, utilities = shape_fitness(rows, "per_prompt_z")
    assert fitness.tolist() == [2.0, 5.0, 3.5]
    # z of (0, 10, 5) is (-1, 1, 0) * sqrt(1.5) and of (1, 0, 0.5) its negative: the scores cancel, a tie
    assert utilities == [0.0, 0.0, 0.0]
    rows = rows_of([0.0, 5.0], [10.0, 5.0], [5.0, 5.0])
    assert shape_fitness(rows, "per_prompt_z")[1] == pytest.approx([-math.sqrt(1.5), math.sqrt(1.5), 0.0])


def test_per_prompt_z_weighs_every_prompt_alike() -> None:
    """One prompt with rewards in the thousands decides a plain z-score, not this one."""
    rows = rows_of([1000.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0])
    assert shape_fitness(rows, "z_score")[1] == pytest.approx([1.0, -1.0])
    assert shape_fitness(rows, "per_prompt_z")[1] == pytest.approx([-1.0, 1.0])


def test_per_prompt_z_averages_completions_and_skips_missing_rows() -> None:
    rows = np.array([[[1.0, 0.0], [NAN, NAN]], [[1.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]])  # (3, 2, 2)
    first = np.array(z_score([0.5, 1.0, 0.0]))
    second = np.array([NAN, *z_score([0.0, 1.0])])
    signal = [first[0], (first[1] + second[1]) / 2, (first[2] + second[2]) / 2]
    if is_tie(signal):
        signal = [0.0, 0.0, 0.0]
    assert shape_fitness(rows, "per_prompt_z")[1] == pytest.approx(z_score(signal))


@pytest.mark.parametrize("shaping", list(SHAPINGS))
def test_a_member_without_rewards_has_utility_zero_and_does_not_disturb_the_others(shaping: str) -> None:
    with_gap = rows_of([1.0, 2.0], [NAN, NAN], [0.0, 5.0], [3.0, 3.0])
    fitness, utilities = shape_fitness(with_gap, shaping)
    _, without = shape_fitness(with_gap[[0, 2, 3]], shaping)
    assert math.isnan(fitness[1]) and utilities[1] == 0.0
    assert [utilities[0], *utilities[2:]] == without
    assert shape_fitness(rows_of([NAN], [NAN]), shaping)[1] == [0.0, 0.0]
    assert shape_fitness(rows_of([NAN], [2.0]), shaping)[1] == [0.0, 0.0]


@pytest.mark.parametrize("shaping", list(SHAPINGS))
def test_utilities_sum_to_zero_and_follow_the_fitness(shaping: str) -> None:
    rng = np.random.default_rng(4)
    rows = rng.random((30, 20, 2))
    fitness, utilities = shape_fitness(rows, shaping)
    assert fitness == pytest.approx(rows.mean(axis=(1, 2)))
    assert abs(math.fsum(utilities)) < 1e-9
    assert np.corrcoef(fitness, utilities)[0, 1] > 0.9


def test_utilities_do_not_depend_on_the_order_of_members() -> None:
    rows = np.random.default_rng(4).random((9, 5, 1))
    order = np.random.default_rng(5).permutation(9)
    for shaping in SHAPINGS:
        _, plain = shape_fitness(rows, shaping)
        _, shuffled = shape_fitness(rows[order], shaping)
        assert shuffled == [plain[i] for i in order]


def test_share_of_tied_prompts() -> None:
    assert share_of_tied_prompts(rows_of([1.0, 0.0], [1.0, 1.0])) == 0.5
    assert share_of_tied_prompts(rows_of([1.0, NAN], [1.0, NAN])) == 1.0
    assert share_of_tied_prompts(rows_of([NAN], [NAN])) == 1.0
