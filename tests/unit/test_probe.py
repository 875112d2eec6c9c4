"""The proposals of `estune probe`, and the estimates of `estune plan`."""

from __future__ import annotations

import dataclasses
import math

import pytest

from estune.commands import plan
from estune.commands.probe import Answers, fault, propose, table
from estune.config import ESConfig, ResolvedConfig
from estune.errors import UserError
from estune.es.types import Completion

THETA = Answers([10.0], 1.0, 0.0, {"empty": 0.0, "clipped": 0.1, "non_finite": 0.0}, 0)


def members(center: float, spread: float, changed: float = 0.5, clipped: float = 0.1) -> Answers:
    fitness = [center - spread, center + spread] * 4
    return Answers(fitness, 0.0, changed, {"empty": 0.0, "clipped": clipped, "non_finite": 0.0}, 0)


def test_the_largest_spread_without_harm() -> None:
    found = {1e-3: members(10, 0.1), 1e-2: members(9.5, 1.0), 1e-1: members(2.0, 5.0)}
    proposal = propose(THETA, found)
    assert (proposal["sigma"], proposal["learning_rate"], proposal["population_size"]) == (1e-2, 5e-3, 30)


def test_equal_spreads_are_named() -> None:
    proposal = propose(THETA, {1e-3: members(10, 1.0), 1e-2: members(10, 1.0)})
    assert proposal["sigma"] == 1e-3
    assert proposal["reason"] == "the smallest of 2 sigmas at which members differ equally, without harm"


def test_broken_completions_are_harm() -> None:
    found = {1e-3: members(10, 0.1), 1e-2: members(10, 1.0, clipped=0.16)}
    assert propose(THETA, found)["sigma"] == 1e-3


def test_a_silent_sigma_is_not_proposed() -> None:
    found = {1e-4: members(10, 3.0, changed=0.05), 1e-3: members(10, 0.5)}
    assert propose(THETA, found)["sigma"] == 1e-3


def test_where_all_that_is_felt_harms_the_smallest_of_it() -> None:
    found = {1e-4: members(10, 0.0, changed=0.0), 1e-3: members(5, 0.5), 1e-2: members(0, 0.5)}
    proposal = propose(THETA, found)
    assert proposal["sigma"] == 1e-3
    assert "harms" in proposal["reason"]


def test_where_nothing_is_felt_the_largest_that_is_harmless() -> None:
    found = {1e-4: members(10, 0.0, changed=0.0), 1e-3: members(10, 0.0, changed=0.0)}
    proposal = propose(THETA, found)
    assert proposal["sigma"] == 1e-3
    assert "no sigma made members differ" in proposal["reason"]
    assert proposal["population_size"] == 60  # most members have one fitness


def test_no_fitness_at_all() -> None:
    nothing = Answers([math.nan] * 8, 1.0, 1.0, {"empty": 1.0, "clipped": 0.0, "non_finite": 0.0}, 8)
    proposal = propose(THETA, {1e-3: nothing})
    assert proposal["sigma"] == 1e-3
    assert "n/a" in table(THETA, {1e-3: nothing}, proposal) or "nan" in table(THETA, {1e-3: nothing}, proposal)


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
    given = {"batch_size": 8, "prompts_per_batch": 8, "num_threads": 1, "members_per_batch": 1, "reward_workers": 1}
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
