"""Step control: reliability, gain and drift against plain formulas and simulations of a known fitness."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from estune import ESConfig, ESTrainer
from estune.errors import UserError
from estune.es.fitness import z_score
from estune.es.step_control import (
    DRIFT_SHARE,
    FAST,
    FIRST_CHANGES,
    FIRST_FACTOR,
    SLOW,
    TREND_DEVIATION,
    Evidence,
    Signal,
    drop_of,
    evidence_of,
    moves_of,
    rate_factor,
    unit_step,
)
from estune.es.types import GroupJob, Member, Noise, Perturbation, Sampling
from estune.train import session
from estune.train.rollouts import missing_jobs
from estune.train.setup import resolve_config


def rewards(rng: np.random.Generator, members: np.ndarray, noise: float, prompts: int) -> np.ndarray:
    """Return rewards (N, B, 1): effects of members and prompts, and noise."""
    shape = (len(members), prompts)
    return (members[:, None] + rng.normal(0, 3, prompts) + rng.normal(0, noise, shape))[..., None]


def test_mean_squares_are_those_of_a_two_way_analysis_of_variance() -> None:
    table = np.array([[1.0, 2.0, 4.0], [2.0, 2.0, 3.0], [5.0, 1.0, 9.0], [0.0, 4.0, 4.0]])
    found = evidence_of(table[..., None], False, 0.25)
    rows, columns, grand = table.mean(1), table.mean(0), table.mean()
    residual = table - rows[:, None] - columns + grand
    assert found.members == pytest.approx(3 * ((rows - grand) ** 2).sum() / 3)
    assert found.residual == pytest.approx((residual**2).sum() / (3 * 2))
    assert found.drop == 0.25 and math.isnan(found.even) and found.mean == pytest.approx(grand)
    assert found.reliability == pytest.approx(max(0, 1 - found.residual / found.members))


def test_pairs_separate_the_gradient_from_the_curvature() -> None:
    rng = np.random.default_rng(0)
    odd, even = rng.normal(0, 1, 200), rng.normal(0, 1, 200)
    effects = np.stack([even + odd, even - odd], 1).reshape(-1)  # +, -, +, -
    both = evidence_of(rewards(rng, effects, 2.0, 8), True)
    assert both.reliability == pytest.approx(1 / (1 + 4 / 2 / 8), abs=0.06)  # half differences halve the noise
    assert both.even == pytest.approx(both.reliability, abs=0.06)
    only_even = evidence_of(rewards(rng, np.repeat(even, 2), 2.0, 8), True)
    assert only_even.reliability < 0.2 < 0.7 < only_even.even


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("true", [0.0, 0.3, 0.8])
def test_the_smoothed_reliability_is_near_the_true_one(true: float, antithetic: bool) -> None:
    rng, signal, seen = np.random.default_rng(1), Signal(), []
    noise = math.sqrt(8 * (1 - true) / true) if true else 1.0  # variance of a member's mean over 8 prompts
    for _ in range(400):
        effects = rng.normal(0, 1, 15) if antithetic else rng.normal(0, 1, 30)
        members = np.stack([effects, -effects], 1).reshape(-1) if antithetic else effects
        spread = noise * math.sqrt(2) if antithetic else noise
        signal = signal.after(evidence_of(rewards(rng, members * (true > 0), spread, 8), antithetic))
        seen.append(signal.reliability)
    assert np.mean(seen[20:]) == pytest.approx(true, abs=0.08)


def test_rows_and_members_without_rewards_are_left_out() -> None:
    rng = np.random.default_rng(2)
    whole = rewards(rng, rng.normal(0, 1, 6), 1.0, 5)
    holed = np.concatenate([whole, np.full((2, 5, 1), np.nan)])
    holed = np.concatenate([holed, rng.normal(0, 1, (8, 1, 1))], axis=1)
    holed[3, 5] = np.nan
    holed[6:] = np.nan
    for antithetic in (False, True):
        assert evidence_of(holed, antithetic, 1.0) == evidence_of(whole, antithetic, 1.0)
    for nothing in (np.full((4, 3, 1), np.nan), whole[:1], whole[:, :1]):
        unknown = evidence_of(nothing, False)
        assert math.isnan(unknown.reliability) and math.isnan(unknown.residual)
        assert Signal().after(unknown) == Signal()


def test_the_drop_is_on_prompts_with_rewards_for_all() -> None:
    """Theta alone has a reward on the last prompt, and one member has none at all."""
    members = np.array([[0.0, 1.0, math.nan], [2.0, 3.0, math.nan], [math.nan] * 3])[..., None]
    assert drop_of(members, np.array([[4.0], [2.0], [100.0]])) == 3.0 - 1.5
    assert drop_of(members, np.array([[4.0], [math.nan], [100.0]])) == 4.0 - 1.0
    assert math.isnan(drop_of(members, np.full((3, 1), math.nan)))
    assert math.isnan(drop_of(np.full((2, 3, 1), math.nan), np.ones((3, 1))))


def test_completions_of_a_prompt_count_together() -> None:
    rows = np.random.default_rng(3).normal(0, 1, (6, 4, 2))
    assert evidence_of(rows, True, 0.5) == evidence_of(rows.mean(2, keepdims=True), True, 0.5)


def test_values_do_not_depend_on_the_order_of_sums_and_do_not_overflow() -> None:
    rows = np.random.default_rng(4).normal(0, 1, (8, 5, 1))
    assert evidence_of(rows[:, ::-1], True, 0.5) == evidence_of(rows, True, 0.5)
    largest = evidence_of(np.where(rows > 0, 1e300, -1e300), True)
    assert all(math.isfinite(value) for value in (largest.members, largest.residual, largest.even))
    tied = evidence_of(np.ones((4, 3, 1)), False)
    assert tied.reliability == 0.0


def factor(control: str, signal: Signal, fitness: list[float], utilities: list[float], **changes: Any) -> float:
    options = {"antithetic": False, "sigma": 0.1, **changes}
    rate = options.pop("learning_rate", 0.1)
    return rate_factor(control, signal, unit_step(fitness, utilities, **options), rate)


def test_factors() -> None:
    fitness = [0.0, 1.0, 2.0, 3.0]
    utilities = z_score(fitness)
    signal = replace(Signal().after(Evidence(2.0, 1.0, drop=0.5)), change_weight=1.0)
    assert factor("none", signal, fitness, utilities) == 1.0
    assert factor("reliability", signal, fitness, utilities) == 0.5
    assert factor("reliability", Signal(), fitness, utilities) == 1.0  # nothing is known
    # gain = 0.5 / 0.1 * std, drift = 0.5 / 0.01 / 4
    std = float(np.std(fitness))
    assert factor("drift", signal, fitness, utilities) == pytest.approx(DRIFT_SHARE * 5 * std / 12.5 / 0.1)
    assert factor("drift", signal, fitness, utilities, learning_rate=1e-4) == 1.0
    rising = replace(signal, fast=1.0, slow=0.0, change=0.1, change_weight=1.0)
    assert factor("drift", rising, fitness, utilities) == 1.0
    assert factor("reliability", rising, fitness, utilities) == 0.5
    better = replace(Signal().after(Evidence(2.0, 1.0, drop=-0.5)), change_weight=1.0)
    assert factor("drift", better, fitness, utilities) == 1.0
    chance = replace(Signal().after(Evidence(1.0, 2.0, drop=0.5)), change_weight=1.0)
    assert factor("drift", chance, fitness, utilities) == 0.0
    assert factor("drift", chance, fitness, utilities, antithetic=True) == 0.0
    for young in (replace(chance, change_weight=0.5), Signal().after(Evidence(1.0, 2.0, drop=0.5))):
        assert factor("drift", young, fitness, utilities) == FIRST_FACTOR and young.is_first


def means(values: list[float]) -> Signal:
    """Return the signal after steps with these mean fitnesses."""
    signal = Signal()
    for value in values:
        signal = signal.after(Evidence(1.0, 1.0, mean=value))
    return signal


def test_the_trend_is_the_difference_of_two_means() -> None:
    assert not means([]).rises and not means([1.0]).rises and not means([1.0] * 9).rises
    assert means([1.0] * FIRST_CHANGES).is_first and not means([1.0] * (FIRST_CHANGES + 1)).is_first
    values = [3.0, 5.0, 4.0, 7.0, 5.0, 6.0, 9.0, 8.0]
    fast = slow = values[0]
    for value in values[1:]:
        fast, slow = 0.6 * fast + 0.4 * value, 0.85 * slow + 0.15 * value
    changes = [(b - a) ** 2 / 2 for a, b in itertools.pairwise(values)]
    weights = [0.1 * 0.9**k for k in reversed(range(len(changes)))]
    signal = means(values)
    assert (signal.fast, signal.slow) == pytest.approx((fast, slow))
    variance = sum(w * c for w, c in zip(weights, changes, strict=True)) / sum(weights)
    assert signal.change / signal.change_weight == pytest.approx(variance)
    assert signal.rises == (fast - slow > 2 * 0.29 * math.sqrt(variance))
    assert signal.after(Evidence(drop=1.0)).latest == 8.0  # a step without evidence has no mean


def test_the_trend_tells_a_rise_from_chance() -> None:
    """A stationary fitness seems to rise in few steps, one that rises by a deviation in two steps in most."""
    rng = np.random.default_rng(8)
    for slope, low, high in ((0.0, 0.0, 0.06), (-0.5, 0.0, 0.001), (0.5, 0.9, 1.0)):
        signal, found = Signal(), []
        for index in range(2000):
            signal = signal.after(Evidence(1.0, 1.0, mean=slope * index + rng.normal()))
            found.append(signal.rises)
        assert low <= np.mean(found[20:]) <= high
    assert trend_deviation() == pytest.approx(TREND_DEVIATION, abs=0.005)


def trend_deviation() -> float:
    """Return the standard deviation of the difference of the two means of independent values with variance 1."""
    fast, slow = ((1 - weight) * weight ** np.arange(200) for weight in (FAST, SLOW))
    return float(np.sqrt(((fast - slow) ** 2).sum()))


@pytest.mark.parametrize("antithetic", [False, True])
def test_factors_of_the_largest_numbers_are_numbers(antithetic: bool) -> None:
    fitness = [1e300, -1e300, 1e300, math.nan]
    signal = Signal().after(Evidence(1e280, 0.0, mean=-1e140))
    signal = signal.after(evidence_of(np.full((4, 2, 1), 1e300), antithetic, 2e300))
    assert math.isfinite(signal.change)
    signal = replace(signal, change_weight=1.0, fast=signal.slow)
    assert not signal.rises
    for utilities in ([1e300, -1e300, 1e300, 0.0], [1e-300, -1e-300, 1e-300, 0.0]):
        assert 0 <= factor("drift", signal, fitness, utilities, antithetic=antithetic) <= 1


def test_the_predicted_gain_and_drift_are_those_of_a_quadratic_fitness() -> None:
    """Gain and loss of a step on f(x) = g x - c |x|^2 / 2, in the mean over populations."""
    rng, d, n, sigma, rate = np.random.default_rng(5), 400, 40, 0.05, 0.02
    gradient, curvature = rng.normal(0, 0.1, d), 1.0
    for antithetic in (False, True):
        predicted, measured = [], []
        for _ in range(300):
            noise = rng.normal(0, 1, (n // 2 if antithetic else n, d))
            eps = np.stack([noise, -noise], 1).reshape(n, d) if antithetic else noise
            fitness = sigma * eps @ gradient - curvature * sigma**2 * (eps**2).sum(1) / 2
            utilities = z_score(fitness.tolist())
            moves = moves_of(fitness.tolist(), utilities, antithetic)
            gain = math.fsum(move * effect for move, effect in moves) / sigma
            drop = curvature * sigma**2 * d / 2
            drift = drop / sigma**2 * math.fsum(move**2 for move, _ in moves)
            predicted.append((gain * rate, drift * rate**2))
            step = rate / n * np.array(utilities) @ eps
            measured.append((gradient @ step, curvature * step @ step / 2))
        gains, drifts = np.mean(predicted, 0)
        assert np.mean(measured, 0)[0] == pytest.approx(gains, rel=0.15)
        assert np.mean(measured, 0)[1] == pytest.approx(drifts, rel=0.15)


def test_what_step_control_needs() -> None:
    with pytest.raises(UserError, match="needs batch_size 2 or more"):
        resolve_config(ESConfig(step_control="drift", batch_size=1, task="countdown"), 10)
    with pytest.raises(UserError, match="two or more members, or two or more pairs"):
        ESConfig(step_control="reliability", population_size=2, antithetic=True)
    with pytest.raises(UserError, match="method grpo does not use step_control"):
        ESConfig(step_control="drift", method="grpo")


# --- runs -------------------------------------------------------------------------------------------------------------


def toy(place: Path, steps: int, **options: Any) -> list[dict[str, Any]]:
    """Train the toy engine and return the step lines of its journal, without hashes."""
    common: dict[str, Any] = dict(engine="toy", task="quadratic", population_size=8, batch_size=4, sigma=0.1)
    common |= dict(num_threads=1, report_to=["none"], reward_isolation="inline")
    args = ESConfig(**{**common, "max_steps": steps, "output_dir": str(place), **options})
    run = ESTrainer(args=args).train()
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "hash"} for line in lines if line["kind"] == "step"]


@pytest.mark.parametrize("control", ["reliability", "drift"])
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("shaping", ["z_score", "centered_rank", "per_prompt_z", "none"])
def test_a_resumed_run_takes_the_same_steps(control: str, antithetic: bool, shaping: str, tmp_path: Path) -> None:
    options = {"step_control": control, "antithetic": antithetic, "fitness_shaping": shaping}
    whole = toy(tmp_path / "whole", 5, **options)
    toy(tmp_path / "parts", 2, **options)
    assert toy(tmp_path / "parts", 5, resume=True, **options) == whole
    assert all(set(line["signal"]) == {spec.name for spec in fields(Signal)} for line in whole)


def test_the_expected_gain_is_logged_whatever_the_setting(tmp_path: Path) -> None:
    [line] = toy(tmp_path / "run", 1, antithetic=True)
    [record] = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    half = (np.array(line["fitness"][0::2]) - np.array(line["fitness"][1::2])) / 2  # (P,)
    z = z_score(line["fitness"])
    moves = (np.array(z[0::2]) - np.array(z[1::2])) / 8
    expected = record["learning_rate"] * record["es/reliability"] * float(moves @ half) / record["es/sigma"]
    assert record["es/expected_gain"] == pytest.approx(expected) and expected > 0
    drop = record["es/theta_fitness"] - record["es/fitness_mean"]
    lost = (record["learning_rate"] / record["es/sigma"]) ** 2 * drop * float(moves @ moves)
    assert record["es/expected_loss"] == pytest.approx(lost)


def test_a_run_of_the_rule_without_a_trend_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = ("members", "residual", "weight", "drop", "drop_weight")
    for control in ("drift", "reliability"):
        with monkeypatch.context() as patch:
            patch.setattr(session, "asdict", lambda signal: {name: getattr(signal, name) for name in old})
            toy(tmp_path / control, 2, step_control=control)
    toy(tmp_path / "reliability", 3, resume=True, step_control="reliability")
    with pytest.raises(UserError, match="an earlier rule of step_control drift"):
        toy(tmp_path / "drift", 3, resume=True, step_control="drift")


def test_the_rate_of_the_journal_is_that_of_the_formula(tmp_path: Path) -> None:
    plain, controlled = (toy(tmp_path / c, 1, step_control=c)[0] for c in ("none", "reliability"))
    signal = Signal(**controlled["signal"])
    factor = float.fromhex(controlled["a"]) / float.fromhex(plain["a"])
    assert "signal" not in plain and controlled["q"] == plain["q"]
    assert factor == pytest.approx(signal.reliability, rel=1e-6) and 0 < factor < 1


@pytest.mark.parametrize(("size", "batches"), [(1, [(0,), (1,), (2,), (3,), (4,), (5,)]), (2, [(0, 1), (2, 3), (4, 5)]),
                                           (3, [(0, 1, 2), (3, 4, 5)]), (9, [(0, 1, 2, 3, 4, 5)])])  # fmt: skip
def test_theta_joins_the_last_batch_of_members(size: int, batches: list[tuple[int, ...]]) -> None:
    noise = Noise(0.1)
    members = [Perturbation(Member(seed, 1), noise) for seed in range(5)]
    sampling = Sampling(seed=0, step=0, max_completion_length=4)

    def jobs(known: tuple[int, ...]) -> list[GroupJob]:
        return list(missing_jobs(known, members, "", (), sampling, size, theta_joins=True))

    assert [job.indices for job in jobs(())] == batches
    last = jobs(())[-1].perturbations[-1]
    assert last is None if size == 1 else last == Perturbation(Member(0, 0), noise)
    assert [job.indices for job in jobs((0, 1, 2, 3, 4))] == batches[-1:]
    assert jobs((0, 1, 2, 3, 4, 5)) == []


def test_theta_answers_every_step_and_counts(tmp_path: Path) -> None:
    toy(tmp_path / "run", 3, step_control="drift")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["num_evaluations"] for record in records] == [4 * 9 * step for step in (1, 2, 3)]
    for record in records:
        assert record["es/theta_fitness"] is not None and 0 <= record["es/signal"] <= 1
        assert 0 <= record["learning_rate"] <= 0.05
        assert record["es/expected_gain"] >= 0 and math.isfinite(record["es/expected_loss"])


def test_without_evidence_theta_stays(tmp_path: Path) -> None:
    """With the factor 0, nothing moves theta, weight decay neither."""
    lines = toy(tmp_path / "run", 30, step_control="reliability", weight_decay=0.5, learning_rate=1e-9)
    still = [line for line in lines if float.fromhex(line["a"]) == 0.0]
    assert still
    for line in still:
        after = lines[line["step"] + 1]["checksum"] if line["step"] < 29 else line["checksum"]
        assert line["checksum"] == after and not any(line["q"])
