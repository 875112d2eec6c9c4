"""Members and seeds: check values, and no overlap between members, steps, run seeds or uses."""

from __future__ import annotations

from hashlib import blake2b
from itertools import product

import pytest

from estune.es.population import EVAL_PERSON, MEMBER_PERSON, ROW_PERSON, derive_seed, members_for_step
from estune.es.types import SAMPLE_PERSON, Member


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
