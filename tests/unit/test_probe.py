"""The predictions, proposals and verdicts of `estune probe`, and the estimates of `estune plan`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from script_loading import loaded

from estune.cli import main
from estune.commands import plan
from estune.commands.probe import LOW_CORRELATION, STEPS, Proposal, judge, propose, report
from estune.commands.probing import Answers, Probe, Trial, fault, outlooks, probe
from estune.config import ESConfig, ResolvedConfig
from estune.errors import UserError
from estune.es.fitness import population_fitness, z_score
from estune.es.forecast import (
    LEVEL,
    LOSS_SHARE,
    Outlook,
    agreement_of,
    drop_of,
    outlook_of,
    p_values,
    split_pairs,
    student,
)
from estune.es.step_control import DRIFT_SHARE, Signal, evidence_of, moves_of, rate_factor, unit_step
from estune.es.types import Completion
from estune.tasks import get_task

# --- statistics -------------------------------------------------------------------------------------------------------


def pairs(odd: np.ndarray, even: np.ndarray | float = 0.0) -> np.ndarray:
    """Return rewards (N, B, 1) of pairs with these parts (P, B)."""
    return np.stack([even + odd, even - odd], 1).reshape(2 * len(odd), -1)[..., None]


def effects(rng: np.random.Generator, kind: str, n_pairs: int, n_prompts: int, correlation: float) -> np.ndarray:
    """Return effects (P, B) of variance 1 that correlate between prompts in expectation.

    ``cells``: what prompts do not share is independent noise. ``signs``: all prompts share it, half of them with the
    opposite sign. ``directions``: prompts have gradients in six dimensions and share one of them.
    """
    shared = math.sqrt(correlation) * rng.normal(size=(n_pairs, 1))
    own = math.sqrt(1 - correlation)
    if kind == "cells":
        return shared + own * rng.normal(size=(n_pairs, n_prompts))
    if kind == "signs":
        return shared + own * rng.choice((-1, 1), n_prompts) * rng.normal(size=(n_pairs, 1))
    return shared + own / math.sqrt(5) * rng.normal(size=(n_pairs, 5)) @ rng.normal(size=(5, n_prompts))


KINDS = ("cells", "signs", "directions")


def test_a_split_leaves_out_pairs_and_prompts_without_rewards() -> None:
    rows = np.array([[1.0, 4, 9], [3, 2, 9], [5, 5, 9], [7, 6, math.nan], [math.nan] * 3, [1, 1, 1]])[..., None]
    split = split_pairs(rows, np.array([[4.0], [math.nan], [0]]))
    assert split.odd.tolist() == [[-1, 1], [-1, -0.5]] and split.even.tolist() == [[2, 3], [6, 5.5]]
    assert split.known.tolist() == [True, True, False] and split.drop.tolist() == [[2], [-2]]
    nothing = split_pairs(np.full((4, 2, 1), math.nan), np.full((2, 1), math.nan))
    assert nothing.odd.shape == (0, 0) and math.isnan(outlook_of(nothing, 0.1, False).drop)


def test_completions_of_a_prompt_count_together() -> None:
    rows = np.random.default_rng(0).normal(size=(6, 4, 2))
    theta = np.zeros((4, 2))
    assert outlook_of(split_pairs(rows, theta), 0.1, True) == outlook_of(
        split_pairs(rows.mean(2, keepdims=True), theta[:, :1]), 0.1, True
    )


def test_the_correlation_is_that_of_the_analysis_of_variance() -> None:
    rng = np.random.default_rng(1)
    odd, even = effects(rng, "cells", 15, 8, 0.3), effects(rng, "cells", 15, 8, 0.5)
    evidence = evidence_of(pairs(odd, even), True)
    found = agreement_of(odd)
    shared = (evidence.members - evidence.residual) / 8
    assert found.correlation == pytest.approx(shared / (shared + evidence.residual))
    assert found.reliability(8) == pytest.approx(evidence.reliability)
    assert found.low < found.correlation < found.high
    outlook = outlook_of(split_pairs(pairs(odd, even), np.zeros((8, 1))), 0.1, True)
    assert (outlook.odd.shared, outlook.odd.noise) == pytest.approx((shared, evidence.residual))
    assert outlook.even_reliability == pytest.approx(evidence.even)
    assert found.reliability(found.prompts_needed) == pytest.approx(0.5)


def test_student_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for degrees in (2, 3, 5, 7, 14, 100):
        assert student(0.975, degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=0.005)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("true", "n_pairs", "n_prompts"), [(0.0, 15, 8), (0.1, 15, 32), (0.4, 15, 16), (0.2, 4, 6)])
def test_the_interval_holds_the_true_correlation(kind: str, true: float, n_pairs: int, n_prompts: int) -> None:
    rng, held, below, centers = np.random.default_rng(2), 0, 0, []
    for _ in range(200):
        found = agreement_of(effects(rng, kind, n_pairs, n_prompts, true))
        held += found.low <= true <= found.high
        below += found.upper < true
        centers.append(found.correlation)
    assert held >= 180 and below <= 24
    assert np.mean(centers) == pytest.approx(true, abs=0.04 if n_pairs > 4 else 0.06)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_prompts", [8, 20])
def test_prompts_without_a_shared_direction_are_seldom_taken_for_a_signal(kind: str, n_prompts: int) -> None:
    """The level holds for four sigmas together, whether they have equal or unequal effects."""
    rng, alarms = np.random.default_rng(3), 0
    for trial in range(200):
        base = effects(rng, kind, 15, n_prompts, 0.0)
        mix = [base + (trial % 2) * s * effects(rng, kind, 15, n_prompts, 0.0) for s in range(4)]
        alarms += min(p_values(mix)) <= LEVEL
    assert alarms <= 200 * LEVEL + 3 * math.sqrt(200 * LEVEL)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_direction_is_found(kind: str) -> None:
    rng = np.random.default_rng(4)
    found = [min(p_values([effects(rng, kind, 15, 16, 0.4) for _ in range(4)])) for _ in range(40)]
    assert np.mean(np.array(found) <= LEVEL) > 0.8


def test_p_values_of_tables_without_effects() -> None:
    zero, one = np.zeros((5, 8)), np.ones((5, 8))
    assert p_values([zero, zero]) == [1.0, 1.0]
    assert p_values([zero, one]) == [1.0, 1 / 128]  # of all patterns of signs, only the observed one agrees as much
    assert p_values([np.ones((5, 8)) * 1e140])[0] == 1 / 128
    assert p_values([np.zeros((5, 0))]) == [1.0] and p_values([np.ones((3, 1))]) == [1.0]


def test_the_error_of_a_drop_counts_pairs_and_prompts() -> None:
    rng = np.random.default_rng(5)
    drops, errors = [], []
    for _ in range(400):
        table = rng.normal(size=(10, 1)) + rng.normal(size=(1, 8)) + 2 * rng.normal(size=(10, 8))
        drop, error = drop_of(table)
        drops.append(drop)
        errors.append(error**2)
    assert np.mean(errors) == pytest.approx(np.var(drops), rel=0.2)
    assert np.isnan(drop_of(np.zeros((0, 3)))).all() and math.isnan(drop_of(np.ones((1, 3)))[1])


# --- gain and drift ---------------------------------------------------------------------------------------------------


def test_gain_and_rate_are_those_of_step_control() -> None:
    rng, sigma, drop = np.random.default_rng(6), 0.02, 0.3
    rows = pairs(effects(rng, "cells", 15, 8, 0.4), effects(rng, "cells", 15, 8, 0.2))
    fitness = population_fitness(rows)
    utilities = z_score(fitness.tolist())
    theta = np.full((8, 1), fitness.mean() + drop)
    outlook = outlook_of(split_pairs(rows, theta), sigma, True)
    evidence = evidence_of(rows, True, drop)
    moves = moves_of(fitness.tolist(), utilities, True)
    assert outlook.gain(8) == pytest.approx(evidence.reliability / sigma * sum(c * e for c, e in moves))
    assert outlook.randomness(30, 8) == pytest.approx(sum(c**2 for c, _ in moves))
    step = unit_step(fitness.tolist(), utilities, antithetic=True, sigma=sigma)
    factor = rate_factor("drift", dataclasses.replace(Signal().after(evidence), change_weight=1.0), step, 1.0)
    assert outlook.allowed_rate(30, 8) == pytest.approx(factor / DRIFT_SHARE * LOSS_SHARE)
    one_sided = dataclasses.replace(outlook, antithetic=False)
    assert one_sided.randomness(30, 8) == pytest.approx(sum((u / 30) ** 2 for u in utilities))
    better = dataclasses.replace(outlook, drop=-0.1)
    assert better.allowed_rate(30, 8) == math.inf and better.members_needed(1.0, 8) == 0


class Landscape:
    """Prompts whose reward is ``g_b x - curvature |x|^2 / 2`` with gradients g_b around a shared one."""

    def __init__(self, correlation: float, curvature: float, d: int = 60) -> None:
        self.rng, self.d, self.curvature = np.random.default_rng(7), d, curvature
        self.shared = np.zeros(d)
        self.shared[0], self.own = math.sqrt(correlation), math.sqrt((1 - correlation) / d)

    def gradients(self, n_prompts: int) -> np.ndarray:
        """Return gradients (B, d) of new prompts; a prompt's effect has the variance sigma^2."""
        return self.shared + self.own * self.rng.normal(size=(n_prompts, self.d))

    def rewards(self, x: np.ndarray, gradients: np.ndarray) -> np.ndarray:
        """Return the rewards (N, B) of members (N, d)."""
        return x @ gradients.T - self.curvature / 2 * (x**2).sum(1, keepdims=True)

    def members(self, sigma: float, n: int, antithetic: bool) -> np.ndarray:
        """Return the perturbations (N, d) of a population."""
        noise = self.rng.normal(size=(n // 2 if antithetic else n, self.d))
        return sigma * (np.stack([noise, -noise], 1).reshape(n, self.d) if antithetic else noise)

    def outlook(self, sigma: float, n: int, n_prompts: int, antithetic: bool) -> Outlook:
        """Return the outlook of one population."""
        rows = self.rewards(self.members(sigma, n, True), self.gradients(n_prompts))[..., None]
        return outlook_of(split_pairs(rows, np.zeros((n_prompts, 1))), sigma, antithetic)

    def step(self, sigma: float, rate: float, n: int, n_prompts: int, antithetic: bool) -> tuple[float, float]:
        """Return what one step from 0 gains by the shared gradient, and what it loses by the curvature."""
        members = self.members(sigma, n, antithetic)
        fitness = self.rewards(members, self.gradients(n_prompts)).mean(1)
        update = rate / n * np.array(z_score(fitness.tolist())) @ members / sigma
        return float(self.shared @ update), float(self.curvature / 2 * (update @ update))


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize(("correlation", "curvature"), [(0.4, 0.5), (0.1, 0.5)])
def test_steps_gain_and_lose_what_is_predicted(correlation: float, curvature: float, antithetic: bool) -> None:
    """Also with other N and B than those of the population that predicts."""
    sigma, rate, land = 0.1, 0.02, Landscape(correlation, curvature, d=500)
    found = [land.outlook(sigma, 200, 40, antithetic) for _ in range(50)]
    for n, n_prompts in ((30, 8), (60, 24)):
        steps = [land.step(sigma, rate, n, n_prompts, antithetic) for _ in range(800)]
        gain, loss = np.mean(steps, axis=0)
        assert np.mean([o.gain(n_prompts) for o in found]) * rate == pytest.approx(gain, rel=0.15)
        # the loss along the gain's own direction is no drift; it is small in many dimensions
        assert np.mean([o.drift(n, n_prompts) for o in found]) * rate**2 == pytest.approx(loss, rel=0.3)
        assert found[0].net(rate, n, n_prompts, 10) == pytest.approx(10 * found[0].net(rate, n, n_prompts))


def test_the_members_needed_lose_the_share_and_the_prompts_needed_rank_half_reliably() -> None:
    sigma, land = 0.1, Landscape(0.1, 2.0, d=200)
    outlook = land.outlook(sigma, 4000, 400, False)
    prompts = round(outlook.agreement.prompts_needed)
    assert prompts == pytest.approx(9, abs=2)  # (1 - 0.1) / 0.1
    again = [evidence_of(land.rewards(land.members(sigma, 400, True), land.gradients(prompts))[..., None], True)
             for _ in range(50)]  # fmt: skip
    assert np.mean([evidence.reliability for evidence in again]) == pytest.approx(0.5, abs=0.07)
    for rate in (0.002, 0.004):
        n = round(outlook.members_needed(rate, prompts))
        assert n == pytest.approx(2 * round(outlook.members_needed(rate / 2, prompts)), abs=2)
        steps = [land.step(sigma, rate, n, prompts, False) for _ in range(300)]
        gain, loss = np.mean(steps, axis=0)
        assert loss / gain == pytest.approx(LOSS_SHARE, rel=0.35)


def test_fewer_prompts_cost_more_steps_and_not_more_evaluations() -> None:
    """With the allowed rate, gain per evaluation is the same for every N; B costs half of it at most."""
    outlook = Landscape(0.1, 0.2).outlook(0.1, 2000, 200, False)

    def gain(n: int, n_prompts: float) -> float:
        return outlook.net(outlook.allowed_rate(n, n_prompts), n, n_prompts) / (n * n_prompts)

    half = outlook.agreement.prompts_needed
    assert gain(30, 8) == pytest.approx(gain(120, 8))
    assert 0.45 < gain(30, half) / gain(30, 1) < 0.65
    assert gain(30, 100 * half) / gain(30, half) < 0.05


def test_the_walk_is_the_norm_of_random_updates() -> None:
    land, sigma, rate = Landscape(0.0, 0.0), 0.1, 0.05
    outlook = land.outlook(sigma, 60, 20, False)
    position = np.zeros((100, land.d))
    for row in position:
        for _ in range(20):
            members = land.members(1.0, 30, False)
            row += rate / 30 * np.array(z_score(land.rng.normal(size=30).tolist())) @ members
    length = math.sqrt(float((position**2).sum(1).mean()))
    assert outlook.walk(rate, 30, 20, 20) * sigma * math.sqrt(land.d) == pytest.approx(length, rel=0.05)


# --- proposals and verdicts -------------------------------------------------------------------------------------------

THETA = Answers([10.0], 1.0, 0.0, {"empty": 0.0, "clipped": 0.1, "non_finite": 0.0}, 0)


def found_of(
    tables: dict[float, np.ndarray], drop: float = 0.01, changed: float = 0.5, clipped: float = 0.1, n_rows: int = 200,
    **options: Any,
) -> Probe:  # fmt: skip
    """Return a probe whose pairs have these effects (P, B) around the fitness 10 - drop."""
    splits = {s: split_pairs(10 - drop + pairs(odd), np.full((odd.shape[1], 1), 10.0)) for s, odd in tables.items()}
    broken = {"empty": 0.0, "clipped": clipped, "non_finite": 0.0}
    trials = {}
    for sigma, outlook in outlooks(splits, False).items():
        fitness = population_fitness(10 - drop + pairs(tables[sigma])).tolist()
        trials[sigma] = Trial(Answers(fitness, 0.0, changed, broken, 0), outlook)
    first = next(iter(tables.values()))
    args = resolved(population_size=2 * len(first), batch_size=first.shape[1], **options)
    return Probe(args, None, n_rows, 1000, THETA, trials, 12.0)


def judged(found: Probe) -> tuple[Proposal, str, str]:
    """Return proposal, verdict and text; the text is 120 columns wide at most."""
    proposal = propose(found)
    verdict = judge(found, proposal)
    text = report(found, proposal, verdict)
    assert max(map(len, text.splitlines())) <= 120 and "verdict: " + verdict.answer in text
    return proposal, verdict.answer, f"{verdict.reason} {verdict.advice}"


def test_agreement_is_a_yes_with_its_price() -> None:
    rng = np.random.default_rng(8)
    shared = effects(rng, "cells", 15, 16, 0.4)
    found = found_of({1e-3: 0.01 * effects(rng, "cells", 15, 16, 0.0), 1e-2: 0.1 * shared})
    proposal, answer, told = judged(found)
    assert answer == "yes" and proposal.sigma == 1e-2 and proposal.reason == "the largest gain"
    assert proposal.population_size is not None and proposal.batch_size is not None
    assert proposal.completions == STEPS * proposal.population_size * proposal.batch_size
    assert f"{proposal.completions:,} completions" in told and "among 2 sigmas" in told
    assert proposal.gain is not None and 0 < proposal.gain <= 2.0  # 12 is the highest reward that was seen
    outlook = found.trials[1e-2].outlook
    assert proposal.batch_size == max(4, math.ceil(outlook.agreement.prompts_needed))
    allowed = outlook.allowed_rate(proposal.population_size, proposal.batch_size)
    assert proposal.learning_rate == min(1e-2, allowed)


def test_a_configured_rate_is_kept_unless_drift_forbids_it() -> None:
    odd = 0.1 * effects(np.random.default_rng(8), "cells", 15, 16, 0.4)
    small = propose(dataclasses.replace(found_of({1e-2: odd}), learning_rate=1e-4))
    assert small.learning_rate == 1e-4 and small.population_size == 16
    large = dataclasses.replace(found_of({1e-2: odd}), learning_rate=1.0, highest=1000.0)
    assert propose(large).learning_rate < 1.0 and propose(large).population_size == 30
    outlook = large.trials[1e-2].outlook
    assert large.rate(1e-2) == 1.0
    assert large.gain(1e-2, 1) == pytest.approx(outlook.gain(16) - outlook.drift(30, 16))


def test_many_prompts_without_agreement_are_unlikely() -> None:
    rng = np.random.default_rng(9)
    found = found_of({s: effects(rng, "cells", 30, 64, 0.0) for s in (1e-3, 1e-2)})
    _, answer, told = judged(found)
    assert answer == "unlikely" and "says nothing about others" in told
    assert max(trial.outlook.agreement.upper for trial in found.trials.values()) < LOW_CORRELATION


def test_few_prompts_cannot_tell_and_name_the_number_that_can() -> None:
    rng = np.random.default_rng(11)
    found = found_of({1e-2: effects(rng, "cells", 15, 8, 0.0)})
    _, answer, told = judged(found)
    assert answer == "cannot tell"
    needed = int(told.rpartition("--batch_size ")[2].rstrip("."))
    assert 16 < needed < 100
    answers = [judged(found_of({1e-2: effects(rng, "cells", 15, needed, 0.0)}))[1] for _ in range(20)]
    assert answers.count("unlikely") > 10 and answers.count("yes") <= 3
    _, _, told = judged(dataclasses.replace(found, n_rows=10))
    assert "more than the 10 rows" in told and "--population_size" in told
    _, answer, told = judged(found_of({1e-2: np.ones((15, 1))}))
    assert answer == "cannot tell" and "two or more prompts" in told and "--batch_size 8" in told


@pytest.mark.parametrize(
    ("changed", "clipped", "drop", "advice"),
    [(0.0, 0.1, 0.0, "try --sigmas above 0.01"), (0.5, 0.1, 0.0, "finer reward"),
     (1.0, 1.0, 3.0, "try --sigmas below 0.001")],
)  # fmt: skip
def test_equal_rewards_propose_nothing_and_say_what_to_try(
    changed: float, clipped: float, drop: float, advice: str
) -> None:
    found = found_of({s: np.zeros((15, 8)) for s in (1e-3, 1e-2)}, drop, changed, clipped)
    proposal, answer, told = judged(found)
    assert answer == "unlikely"
    assert proposal.sigma is None and proposal.learning_rate is None
    assert advice in told


def test_harm_is_paid_by_the_rate_and_named() -> None:
    """Members that are worse or broken more often are proposed with a warning if they agree, else not at all."""
    rng = np.random.default_rng(11)
    odd = 0.1 * effects(rng, "cells", 15, 16, 0.5)
    for found in (found_of({1e-2: odd}, drop=0.2), found_of({1e-2: odd}, clipped=0.16)):
        proposal, answer, _ = judged(found)
        assert answer == "yes" and "watch the first steps" in proposal.reason
    rates = [propose(found_of({1e-2: odd}, drop=drop)).learning_rate or 0.0 for drop in (0.2, 2.0)]
    assert rates[1] == pytest.approx(rates[0] / 10)
    proposal, answer, told = judged(found_of({1e-2: odd}, drop=100.0))
    assert answer == "cannot tell" and "leaves a gain of" in told and "--sigmas below 0.01" in told
    proposal, answer, _ = judged(found_of({1e-2: effects(rng, "cells", 15, 16, 0.0)}, drop=100.0))
    assert answer != "yes" and proposal.sigma is None


def test_a_small_gain_has_its_own_reason() -> None:
    found = found_of({1e-2: 0.1 * effects(np.random.default_rng(8), "cells", 15, 16, 0.4)})
    for changes, reason in (
        ({"learning_rate": 1e-6}, "the learning rate 1e-06 promises a gain of"),
        ({"highest": 10.001}, "theta is so near the highest reward seen"),
    ):
        _, answer, told = judged(dataclasses.replace(found, **changes))
        assert answer == "cannot tell" and reason in told and "--sigmas" not in told


def test_members_that_are_better_than_theta_add_no_gain() -> None:
    outlook = (
        found_of({1e-2: 0.1 * effects(np.random.default_rng(8), "cells", 15, 16, 0.4)}, drop=-1.0).trials[1e-2].outlook
    )
    assert outlook.drop < 0 and outlook.drift(30, 16) == 0.0
    assert outlook.net(1e-2, 30, 16, 10) == pytest.approx(10 * 1e-2 * outlook.gain(16))


# --- the command ------------------------------------------------------------------------------------------------------

REWARDS = """
def patchy(prompts, completions, wanted, **_):
    return [None if p == "x[0]" else -abs(float(c) - w) for p, c, w in zip(prompts, completions, wanted)]

def fails(prompts, completions, wanted, **_):
    if any(p == "x[1]" and float(c) > 0 for p, c in zip(prompts, completions)):
        raise ValueError("no")
    return [-abs(float(c) - w) for c, w in zip(completions, wanted)]

def nothing(completions, **_):
    return [None] * len(completions)

def constant(completions, **_):
    return [1.0] * len(completions)
"""
TOY = "probe --engine toy --task quadratic --reward_isolation inline".split()


def result_of(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main([*TOY, *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_command_reports_every_number(capsys: pytest.CaptureFixture[str]) -> None:
    found = result_of(["--sigmas", "0.1", "0.01", "--batch_size", "46", "--population_size", "9"], capsys)
    assert (found["members"], found["rows"], found["parameters"]) == (10, 46, 46)
    assert [point["sigma"] for point in found["sigmas"]] == [0.01, 0.1]
    for point in found["sigmas"]:
        known = {name for name, value in point.items() if value is None}
        assert known <= {"prompts_needed", "members_needed"}, known
        assert point["reliability_ci95"][0] <= point["reliability"] <= point["reliability_ci95"][1]
        assert point["drop"] == pytest.approx(point["sigma"] ** 2, rel=0.5)  # -(x - w)^2 loses sigma^2 by noise
        assert point["drop_is_significant"]
    assert found["verdict"]["answer"] in ("unlikely", "cannot tell", "yes")
    assert set(found["proposal"]) == {field.name for field in dataclasses.fields(Proposal)}


def test_noise_and_rewards_of_every_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rewards.py").write_text(REWARDS)
    few = ["--sigmas", "0.1", "--batch_size", "46", "--population_size", "6"]
    for noise in ("full", "lowrank"):
        for name in ("patchy", "fails"):
            found = result_of([*few, "--noise", noise, "--reward_funcs", f"{tmp_path}/rewards.py:{name}"], capsys)
            [point] = found["sigmas"]
            assert point["prompts"] == (45 if name == "patchy" else 46) and 0 < point["p_value"] <= 1
            assert (point["reward_failures"] > 0) == (name == "fails")
    for name, answer, told in (
        ("nothing", "cannot tell", "applied to any answer"),
        ("constant", "unlikely", "changed"),
    ):
        found = result_of([*few, "--reward_funcs", f"{tmp_path}/rewards.py:{name}"], capsys)
        assert found["verdict"]["answer"] == answer and told in " ".join(found["verdict"].values())
        assert found["proposal"]["sigma"] is None
        assert main([*TOY, *few, "--reward_funcs", f"{tmp_path}/rewards.py:{name}"]) == 0
        assert f"verdict: {answer}" in capsys.readouterr().out


def test_the_reward_without_a_shared_direction_likes_both_lengths_alike() -> None:
    prompts = [row["prompt"] for row in get_task("countdown").load("validation")]
    with loaded("benchmarks/probe.py") as benchmark:
        short, long = (benchmark.liked_length(prompts, ["x" * n] * len(prompts)) for n in (20, 300))
    assert set(short) == {0.2, 0.8} and set(long) == {0.0, 1.0}
    assert all((a == 0.2) == (b == 1.0) for a, b in zip(short, long, strict=True))
    assert 80 <= long.count(1.0) <= 120


def test_members_of_the_call_win_over_the_configuration() -> None:
    args = ESConfig(engine="toy", task="quadratic", batch_size=4, reward_isolation="inline", learning_rate=0.5)
    found = probe(args, [0.1], members=4)
    assert found.n_members == 4 and found.rate(0.1) == 0.5 and found.n_rows == 46
    assert np.isfinite(found.trials[0.1].outlook.p_value)
    alone = probe(args, [0.1], members=2)
    assert alone.trials[0.1].outlook.agreement.high == 1.0
    judged(alone)


def test_prompts_about_different_coordinates_share_no_direction() -> None:
    """The toy engine's rows ask for one coordinate each: rewards of real members, without a signal for other rows."""
    found = []
    for seed in range(100):
        args = ESConfig(
            engine="toy", task="quadratic", batch_size=8, reward_isolation="inline", seed=seed, num_threads=1
        )
        found.append(probe(args, [0.1]).trials[0.1].outlook)
    assert sum(outlook.p_value <= LEVEL for outlook in found) <= 11
    assert abs(np.mean([outlook.agreement.correlation for outlook in found])) < 0.015
    assert np.mean([outlook.drop / outlook.drop_error for outlook in found]) > 2


def test_several_completions_of_a_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("probe --model tiny --task countdown --batch_size 2 --population_size 4 --sigmas 0.02 --noise lowrank "
             "--num_generations 2 --temperature 1 --max_completion_length 8 --num_threads 1 --reward_isolation inline "
             "--json")  # fmt: skip
    assert main(words.split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["members"] == 4 and found["sigmas"][0]["prompts"] == 2


# --- faults of completions, and plans ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "text", "expected"),
    [
        (Completion((1, 2), True), "yes", None), (Completion((1, 2), False), "yes", "clipped"),
        (Completion((2,), True), " \n", "empty"), (Completion((1,), True, finite=False), "yes", "non_finite"),
    ],
)  # fmt: skip
def test_faults_exclude_each_other(completion: Completion, text: str, expected: str | None) -> None:
    assert fault(completion, text) == expected


MEASURED = plan.Calibration(
    load_s=5.0, group_s=2.0, groups=9, score_wait_s=0.5, update_s=1.5, row_s=0.1, mean_length=10.0, longest_share=0.0,
    n_held_out=20, engine_bytes=1 << 30,
)  # fmt: skip


def resolved(**options: object) -> ResolvedConfig:
    given = {"batch_size": 8, "prompts_per_batch": 8, "num_threads": 1, "members_per_batch": 1, "reward_workers": 1,
             "step_control": "none"}  # fmt: skip
    return ResolvedConfig(**given | options)  # type: ignore[arg-type]


def test_an_estimate_is_a_sum() -> None:
    args = resolved(population_size=10, noise="lowrank", members_per_batch=4, max_steps=100, max_completion_length=40,
                    eval_steps=50)  # fmt: skip
    found = plan.estimate(args, MEASURED)
    assert found["step_s"] == 3 * 2.0 + 0.5 + 1.5  # 10 members in 3 groups
    assert found["evaluation_s"] == pytest.approx(3 * (20 + 8) * 0.1)  # before step 1, after 50 and 100
    assert found["run_s"] == pytest.approx(5 + 2 * 2 + 100 * 8 + 8.4)
    assert found["longest_run_s"] == pytest.approx(found["run_s"] + 3 * (100 * 6 + 8.4))
    assert plan.estimate(resolved(eval_steps=0), MEASURED)["evaluation_s"] == 0


def test_what_would_halve_a_run_is_its_largest_part() -> None:
    args = resolved(population_size=10)
    found = plan.halving(args, MEASURED, plan.estimate(args, MEASURED))
    assert found[0].startswith("num_workers 2") and "noise lowrank" in found[1] and "population_size 5" in found[2]
    slow = dataclasses.replace(MEASURED, update_s=100.0)
    assert "update" in plan.halving(args, slow, plan.estimate(args, slow))[0]
    unpaid = dataclasses.replace(MEASURED, score_wait_s=30.0, longest_share=0.9)
    assert any("reward_workers" in line for line in plan.halving(args, unpaid, plan.estimate(args, unpaid)))


def test_a_plan_answers_scores_and_moves_theta(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "CALIBRATION_S", 0.2)
    args = ESConfig(engine="toy", task="quadratic", population_size=6, batch_size=4, eval_steps=2)
    before, measured, engine = plan.plan(args)
    assert before.group_size == 1 and measured.groups >= 1 and measured.group_s > 0 and measured.row_s > 0
    assert engine.checksum() != type(engine)().checksum()
    assert 1 <= measured.mean_length <= args.max_completion_length


def test_a_price_that_is_no_amount_is_refused() -> None:
    for price in (-1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="price must be a number from 0"):
            plan.plan_command(ESConfig(engine="toy", task="quadratic"), price, False)
