"""The statistics of comparisons against brute force, published values and simulations of the same kind of data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from estune.compare import changes
from estune.compare.changes import parameter_changes, walk_ratio
from estune.compare.statistics import (
    ALPHA,
    Signs,
    Transitions,
    binomial_p,
    half_width,
    holm,
    mean_difference,
    over_seeds,
    paired_difference,
    quantile,
    signs,
    tango,
    transitions,
    two_level,
)
from estune.train.evaluation import interval


def test_quantiles_are_those_of_the_tables() -> None:
    """Fisher's table for two and ten degrees of freedom; with many degrees the normal distribution's."""
    assert quantile(0.05, 2) == pytest.approx(4.303, abs=5e-4)
    assert quantile(0.01, 10) == pytest.approx(3.169, abs=5e-4)
    assert quantile(0.05, math.inf) == pytest.approx(1.959963984540054)


def test_over_seeds_is_the_t_interval() -> None:
    values = [0.52, 0.55, 0.49, 0.6]
    found = over_seeds(values)
    half = stats.t.isf(0.025, 3) * np.std(values, ddof=1) / 2
    assert found.interval == pytest.approx((np.mean(values) - half, np.mean(values) + half))
    assert found.standard_deviation == pytest.approx(np.std(values, ddof=1)) and found.range == pytest.approx(0.11)
    alone = over_seeds([0.5])
    assert (alone.mean, alone.interval, alone.standard_deviation, alone.range) == (0.5, None, None, 0.0)
    with pytest.raises(ValueError, match="no seeds"):
        over_seeds([])


def test_half_width_is_students_or_the_normal_one_at_its_ends() -> None:
    assert half_width([(4.0, 2)], (0.0, 99), ALPHA) == pytest.approx(2 * stats.t.isf(0.025, 2))
    assert half_width([], (4.0, 99), ALPHA) == pytest.approx(2 * stats.t.isf(0.025, 99))
    assert half_width([(2.0, 2), (2.0, 2)], (0.0, 99), ALPHA) == pytest.approx(2 * stats.t.isf(0.025, 4))
    assert half_width([(1e-9, 2)], (4.0, 1e9), ALPHA) == pytest.approx(2 * 1.959964)  # type: ignore[arg-type]
    assert half_width([], (0.0, 9), ALPHA) == 0.0


def test_half_width_covers_a_few_degrees_beside_many() -> None:
    """The mean is N(0, 1); a share of that variance is estimated with two degrees of freedom, the rest is known."""
    chances = (np.arange(2000) + 0.5) / 2000
    for share in (0.05, 0.3, 0.6, 0.9, 0.95):
        parts = share * stats.chi2.ppf(chances, 2) / 2
        halves = [half_width([(part, 2)], (1 - share, 10**9), ALPHA) for part in parts]
        assert 0.94 < np.mean(2 * stats.norm.cdf(halves) - 1) < 0.958, share


def answers(
    rng: np.random.Generator, seeds: int, problems: np.ndarray, ability: float, spread: float, own: float
) -> np.ndarray:
    """Return (seeds, P) of 0 and 1: every seed of a method has its own ability, and its own luck with every problem."""
    logits = ability + rng.normal(0, spread, (seeds, 1)) + problems + rng.normal(0, own, (seeds, problems.size))
    return (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.float64)


def expected(ability: float, *spreads: float) -> float:
    """Return the expected mean of `answers` over seeds and problems."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    logits = ability + math.hypot(*spreads) * nodes
    return float(weights @ (1 / (1 + np.exp(-logits))) / weights.sum())


pytestmark = pytest.mark.miniature
RUNS = 800  # the Monte-Carlo error of a coverage is 0.8 points


def test_transitions_by_hand() -> None:
    before = [True, True, False, False, False, False, False, True]
    after = [True, False, True, True, True, False, True, True]
    assert transitions(before, after) == Transitions(2, 1, 4, 1, 2 * (1 + 5) / 2**5)
    assert transitions([True], [True]) == Transitions(1, 0, 0, 0, 1.0)
    with pytest.raises(ValueError, match="shorter"):
        transitions([True], [])


def test_signs_by_hand() -> None:
    assert signs([0.5, 0.25, 1e-9, -0.0, 0.0, -1.0]) == Signs(3, 1, 2, 2 * (1 + 4) / 2**4)
    assert signs([]) == Signs(0, 0, 0, 1.0)


def test_binomial_p_is_that_of_scipy() -> None:
    for a in range(12):
        for b in range(12):
            wanted = stats.binomtest(a, a + b).pvalue if a + b else 1.0
            assert binomial_p(a, b) == binomial_p(b, a) == pytest.approx(wanted)
    assert 0 < binomial_p(3000, 2000) == pytest.approx(stats.binomtest(3000, 5000).pvalue, rel=1e-9, abs=0)
    assert binomial_p(5000, 0) == 0.0  # below the smallest float64


def test_mean_difference_is_near_the_paired_t_interval() -> None:
    differences = np.random.default_rng(3).normal(0.2, 1, 300)
    found = mean_difference(differences.tolist())
    wanted = stats.ttest_1samp(differences, 0).confidence_interval()
    assert found["difference"] == pytest.approx(differences.mean())
    assert found["difference_ci95"] == pytest.approx([wanted.low, wanted.high], abs=0.02)
    assert mean_difference([0.25] * 4) == {"difference": 0.25, "difference_ci95": [0.25, 0.25]}
    assert mean_difference([0.25]) == {"difference": 0.25, "difference_ci95": None}


@pytest.mark.parametrize(("seeds", "problems"), [(3, 200), (5, 200), (3, 1000), (5, 1000)])
@pytest.mark.parametrize("spread", [0.0, 0.15, 0.8])
def test_two_level_covers(seeds: int, problems: int, spread: float) -> None:
    rng = np.random.default_rng([seeds, problems, int(100 * spread)])
    truth, hits = expected(-0.5, spread, 1.5, 0.5), 0
    for _ in range(RUNS):
        found = two_level(answers(rng, seeds, rng.normal(0, 1.5, problems), -0.5, spread, 0.5))
        hits += found.low <= truth <= found.high
    assert 0.925 <= hits / RUNS <= 0.975


@pytest.mark.parametrize(("seeds", "others"), [(3, 3), (5, 5), (3, 5), (1, 3)])
@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_paired_difference_covers(seeds: int, others: int, spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model alone, the base, has no spread over seeds. The p-value, slow, is tested elsewhere."""
    monkeypatch.setattr("estune.compare.statistics.p_value_of", lambda *_: 1.0)
    rng = np.random.default_rng([seeds, others, int(100 * spread)])
    own = spread if seeds > 1 else 0.0
    truth, hits = expected(0.4, own, 1.5, 0.6, 0.5) - expected(0.0, spread, 1.5, 0.6, 0.5), 0
    for _ in range(RUNS):
        problems = rng.normal(0, 1.5, 200)
        a = answers(rng, seeds, problems + rng.normal(0, 0.6, 200), 0.4, own, 0.5)
        b = answers(rng, others, problems + rng.normal(0, 0.6, 200), 0.0, spread, 0.5)
        found = paired_difference(a, b)
        hits += found.low <= truth <= found.high
    assert 0.925 <= hits / RUNS <= 0.98


def test_two_level_of_one_seed_or_of_equal_seeds_is_over_problems() -> None:
    row = [1.0] * 30 + [0.0] * 70
    for table in ([row], [row] * 3):
        found = two_level(table)
        assert (found.low, found.high) == interval(row) and found.mean == 0.3
    assert two_level([[1.0] * 50] * 3).low < 1.0  # a table of ones is not certain


@pytest.mark.parametrize("wrong", [[0.5, 0.5], [[]], [[2.0]], [[math.nan]]])
def test_what_is_no_table_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="seeds, problems"):
        two_level(wrong)


def test_paired_difference_is_narrower_than_two_apart() -> None:
    """The difficulty of problems cancels; the order of seeds and problems does not matter."""
    rng = np.random.default_rng(3)
    problems = rng.normal(0, 3, 400)
    a, b = answers(rng, 3, problems, 0.5, 0.1, 0.1), answers(rng, 4, problems, 0.0, 0.1, 0.1)
    found = paired_difference(a, b)
    apart = math.hypot(*(one.high - one.low for one in (two_level(a), two_level(b))))
    assert found.high - found.low < 0.85 * apart
    assert found.difference == pytest.approx(a.mean() - b.mean())
    shuffled = paired_difference(a[::-1, ::-1], b[[2, 0, 3, 1], ::-1])
    assert (shuffled.low, shuffled.high) == pytest.approx((found.low, found.high))
    back = paired_difference(b, a)
    assert (-back.high, -back.low, back.p_value) == pytest.approx((found.low, found.high, found.p_value))
    with pytest.raises(ValueError, match="400 problems against 399"):
        paired_difference(a, b[:, 1:])


def test_the_p_value_and_the_interval_agree() -> None:
    rng = np.random.default_rng(4)
    seen = set()
    for _ in range(40):
        problems = rng.normal(0, 1, 100)
        found = paired_difference(
            answers(rng, 3, problems, rng.choice([0.0, 0.5]), 0.1, 0.5), answers(rng, 3, problems, 0.0, 0.1, 0.5)
        )
        assert (found.p_value < 0.05) == (not found.low <= 0 <= found.high)
        seen.add(found.p_value < 0.05)
    assert seen == {True, False}


def test_paired_difference_of_graded_single_runs_is_the_paired_t_test() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.integers(0, 5, 60) / 4, rng.integers(0, 5, 60) / 4
    found, known = paired_difference([a], [b]), stats.ttest_rel(a, b)
    assert found.p_value == pytest.approx(known.pvalue, rel=1e-6) and found.test == "paired t"
    assert (found.low, found.high) == pytest.approx(tuple(known.confidence_interval()))


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (5, 0), (12, 2), (10, 10), (40, 60)])
def test_mcnemar_is_the_exact_binomial_test(gained: int, lost: int) -> None:
    a = [1.0] * gained + [0.0] * lost + [1.0] * 200
    b = [0.0] * gained + [1.0] * lost + [1.0] * 200
    found = paired_difference([a], [b])
    known = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert found.p_value == pytest.approx(known) and found.test == "mcnemar exact"
    assert found.difference == pytest.approx((gained - lost) / len(a)) and found.low < found.difference < found.high


@pytest.mark.parametrize(("gained", "lost", "n"), [(12, 2, 50), (0, 0, 50), (5, 0, 20), (3, 40, 200), (20, 0, 20)])
def test_tango_bounds_solve_the_score_equation(gained: int, lost: int, n: int) -> None:
    """The test finds the likeliest share of lost pairs on a grid; the paper has a formula."""
    for bound in tango(gained, lost, n):
        if abs(bound) < 1 - 1e-9:
            shares = np.linspace(max(0.0, -bound) + 1e-12, (1 - bound) / 2 - 1e-12, 400_001)
            same = n - gained - lost
            likelihood = gained * np.log(shares + bound) + lost * np.log(shares) + same * np.log1p(-2 * shares - bound)
            share = shares[np.argmax(likelihood)]
            score = (gained - lost - n * bound) / math.sqrt(n * (2 * share + bound * (1 - bound)))
            assert abs(score) == pytest.approx(1.959964, abs=2e-3)


def test_tango_covers() -> None:
    rng = np.random.default_rng(6)
    for gains, losses in ((0.1, 0.1), (0.2, 0.1), (0.02, 0.01)):
        draws = rng.multinomial(200, [gains, losses, 1 - gains - losses], 1500)
        bounds = {(g, x): tango(g, x, 200) for g, x, _ in map(tuple, draws.tolist())}
        hits = sum(
            low <= gains - losses <= high for low, high in (bounds[g, x] for g, x, _ in map(tuple, draws.tolist()))
        )
        assert 0.93 <= hits / 1500 <= 0.975


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([0.02]) == [0.02] and holm([]) == []


def model(rng: np.random.Generator) -> dict[str, np.ndarray]:
    shapes = {"embed.weight": (300, 40), "layers.0.mlp.weight": (200, 100), "layers.11.mlp.weight": (200, 100)}
    return {name: rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()}


def test_parameter_changes_of_a_random_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "CHUNK", 777)  # pieces that do not divide a tensor
    rng = np.random.default_rng(9)
    base = model(rng)
    tuned = {name: (value + rng.normal(0, 1e-3, value.shape)).astype(np.float32) for name, value in base.items()}
    found = parameter_changes(base, tuned)
    before = np.concatenate([value.ravel() for value in base.values()]).astype(np.float64)
    change = np.concatenate([value.ravel() for value in tuned.values()]).astype(np.float64) - before
    assert (found.parameters, found.moved) == (before.size, np.count_nonzero(change))
    assert (found.norm, found.base_norm) == pytest.approx((np.linalg.norm(change), np.linalg.norm(before)), rel=1e-12)
    assert found.ratio == pytest.approx(np.linalg.norm(change) / np.linalg.norm(before))
    scaled = change / np.sqrt(np.mean(change**2))
    assert found.kurtosis == pytest.approx(stats.kurtosis(scaled), abs=1e-6) and abs(found.kurtosis) < 0.1
    inside = np.mean((scaled >= -6) & (scaled <= 6))
    assert found.density == pytest.approx(np.histogram(scaled, found.edges, density=True)[0] * inside)
    normal = np.diff(stats.norm.cdf(found.edges)) / 0.25
    assert np.abs(np.subtract(found.density, normal)).max() < 0.02


def test_parameter_changes_that_are_no_random_walk() -> None:
    """Nine tenths of the parameters did not move, and a few moved far."""
    rng = np.random.default_rng(10)
    base = model(rng)
    tuned = {
        name: (value + rng.standard_t(3, value.shape) * (rng.random(value.shape) < 0.1) * 1e-3).astype(np.float32)
        for name, value in base.items()
    }
    found = parameter_changes(base, tuned)
    assert found.moved_share == pytest.approx(0.1, abs=0.01)
    assert found.kurtosis is not None and found.kurtosis > 20
    assert found.density is not None and 0.99 < sum(found.density) * 0.25 < 1.0  # a few lie beyond the histogram


def test_parameter_changes_of_nothing_and_of_other_models() -> None:
    base = model(np.random.default_rng(11))
    found = parameter_changes(base, base)
    assert (found.ratio, found.moved, found.density, found.kurtosis) == (0, 0, None, None)
    with pytest.raises(ValueError, match="one model alone has x"):
        parameter_changes(base, base | {"x": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="has the shape"):
        parameter_changes(base, base | {"embed.weight": np.zeros(3, np.float32)})
    zero = {"w": np.zeros(10, np.float32)}
    alike = parameter_changes(zero, {"w": np.ones(10, np.float32)})
    assert alike.ratio is None and alike.kurtosis is None and alike.moved_share == 1.0


def steps(norms: list[float | None]) -> list[dict[str, Any]]:
    """Return a run's metrics with the norms of its steps."""
    return [{"step": step, "es/update_norm": norm} for step, norm in enumerate(norms, 1)]


def test_a_random_walk_goes_as_far_as_a_random_walk_and_a_straight_one_further() -> None:
    rng = np.random.default_rng(12)
    walked = rng.normal(0, 1, (25, 40_000)) * rng.uniform(0.5, 2, (25, 1))  # steps of other lengths
    norms = np.linalg.norm(walked, axis=1).tolist()
    assert walk_ratio(float(np.linalg.norm(walked.sum(0))), steps(norms)) == pytest.approx(1.0, abs=0.03)
    assert walk_ratio(25 * 0.3, steps([0.3] * 25)) == pytest.approx(5.0)
    assert walk_ratio(0.0, steps([0.3, 0.3])) == 0.0


def test_a_random_walk_is_not_invented_where_steps_are_not_known() -> None:
    known = steps([3.0, 4.0])
    held_out = {"step": 2, "eval_reward": 0.5}
    assert walk_ratio(5.0, [*known, held_out]) == pytest.approx(1.0)
    assert walk_ratio(5.0, steps([3.0, None])) is None
    assert walk_ratio(5.0, known[1:]) is None  # the first is missing
    assert walk_ratio(5.0, [{"step": 1, "loss": 0.1}]) is None
    assert walk_ratio(5.0, []) is None and walk_ratio(0.0, steps([0.0])) is None
