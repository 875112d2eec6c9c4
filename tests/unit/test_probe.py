"""The proposals of `estune probe`."""

from __future__ import annotations

import math

import pytest

from estune.commands.probe import Answers, fault, propose, table
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
