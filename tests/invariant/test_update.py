"""Invariants 1, 2 and 3: evaluations leave theta alone, noise differs, the update is the same whoever computes it."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estune.es.noise import cpu, lowrank_ints, noise_deviation, noise_ints, noise_key, perturbation_scale
from estune.es.population import members_for_step
from estune.es.theta import PIECE, HostTheta
from estune.es.types import Noise, ParameterSpec, Perturbation
from estune.es.update import Update, make_update

SHAPES = {
    "lm_head.weight": (300, 1001),  # more than one piece
    "model.layers.0.mlp.weight": (64, 48),
    "model.layers.1.mlp.weight": (64, 48),
    "model.norm.weight": (48,),
    "model.scale": (),
}
N = 12


def theta_0() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {n: np.asarray(rng.standard_normal(s) * 0.05, dtype=np.float32).reshape(s) for n, s in SHAPES.items()}


def theta_of(names: list[str], num_threads: int = 1, rank: int = 0) -> HostTheta:
    """With a rank, the matrices have low-rank noise."""
    arrays = theta_0()
    specs = [ParameterSpec(n, SHAPES[n], True, rank > 0 and len(SHAPES[n]) > 1) for n in names]
    return HostTheta(specs, {n: arrays[n] for n in names}, {}, num_threads)


def some_update(weight_decay: float = 0.0, distribution: str = "normal", rank: int = 0) -> Update:
    utilities = np.random.default_rng(1).standard_normal(N).tolist()
    members = members_for_step(5, 2, N, antithetic=True)
    return make_update(members, utilities, 5e-4, weight_decay=weight_decay, distribution=distribution, rank=rank)


def moved_bytes(update: Update, names: list[str] | None = None, num_threads: int = 1) -> dict[str, bytes]:
    host_theta = theta_of(names or list(SHAPES), num_threads, update.rank)
    host_theta.apply(update)
    return {name: array.tobytes() for name, array in host_theta.arrays.items()}


@pytest.mark.parametrize("rank", [0, 2])
def test_evaluations_leave_theta_bit_identical(rank: int) -> None:
    """Invariant 1: members are rebuilt from theta; nothing is restored by subtraction."""
    host_theta = theta_of(list(SHAPES), 2, rank)
    before, checksum = host_theta.fingerprint(), host_theta.checksum()
    for member in members_for_step(0, 0, 30, antithetic=False):
        for name in SHAPES:
            weights = host_theta.perturb(
                name, Perturbation(member, Noise(perturbation_scale(1e-1), "normal", rank, 0.0125))
            )
            assert not np.array_equal(weights, host_theta.arrays[name]) or name == "model.scale"
    assert host_theta.fingerprint() == before and host_theta.checksum() == checksum and host_theta.version == 0


def test_noise_differs_between_tensors_members_steps_and_run_seeds() -> None:
    """Invariant 2, with equal-shaped tensors (the reference code gives those the same noise)."""
    streams = {}
    for run_seed, step in ((0, 0), (0, 1), (1, 0)):
        for index, member in enumerate(members_for_step(run_seed, step, 3, antithetic=False)):
            for name in ("model.layers.0.mlp.weight", "model.layers.1.mlp.weight"):
                streams[run_seed, step, index, name] = noise_ints(member.seed, name, 0, 4096)
    for left, right in combinations(streams.values(), 2):
        assert abs(np.dot(left, right)) / (8 * math.sqrt(4096)) < 5


@pytest.mark.parametrize("rank", [0, 3])
@settings(max_examples=10)
@given(order=st.permutations(range(N)))
def test_update_is_invariant_to_the_order_of_members(rank: int, order: list[int]) -> None:
    update = some_update(rank=rank)
    members, q = tuple(update.members[i] for i in order), tuple(update.q[i] for i in order)
    assert moved_bytes(replace(update, members=members, q=q)) == moved_bytes(update)


def test_utilities_shuffled_with_their_members_give_the_same_update() -> None:
    utilities = np.random.default_rng(1).standard_normal(N).tolist()
    members = members_for_step(5, 2, N, antithetic=True)
    order = np.random.default_rng(2).permutation(N)
    one = make_update(members, utilities, 5e-4)
    other = make_update([members[i] for i in order], [utilities[i] for i in order], 5e-4)
    assert (one.e, one.a) == (other.e, other.a)
    assert moved_bytes(one) == moved_bytes(other)


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("weight_decay", [0.0, 5.0])
@pytest.mark.parametrize("rank", [0, 1, 4])
def test_update_is_invariant_to_threads_and_to_the_split_of_the_tensors(
    rank: int, weight_decay: float, distribution: str
) -> None:
    update = some_update(weight_decay, distribution, rank)
    whole = moved_bytes(update)
    for num_threads in (2, 3, 5):
        assert moved_bytes(update, num_threads=num_threads) == whole
    names = list(SHAPES)
    for split in ([names[:1], names[1:]], [names[::2], names[1::2]], [[name] for name in reversed(names)]):
        parts: dict[str, bytes] = {}
        for part in split:
            parts |= moved_bytes(update, part)
        assert parts == whole


def test_update_is_invariant_to_sharding_within_a_tensor() -> None:
    """Shards of one tensor, cut anywhere, move to the same bits, and their checksums add up."""
    update, name = some_update(), "lm_head.weight"
    host_theta = theta_of([name])
    whole = host_theta.apply(update)
    flat = theta_0()[name].reshape(-1)
    keys = np.array([noise_key(member.seed, name) for member in update.members], dtype=np.uint32)
    q = np.array([m.sign * q for m, q in zip(update.members, update.q, strict=True)], dtype=np.int32)
    cuts = [0, 1, 2047, 2049, 100_000, PIECE - 1, PIECE + 1, flat.size]
    total = 0
    for lo, hi in pairwise(cuts):
        none = np.empty(0, dtype=np.float32)
        part, _, _ = cpu.update_into(flat[lo:hi], lo, keys, q, update.a, False, np.float32(0.0), none)
        total += int(part)
    assert flat.tobytes() == host_theta.arrays[name].tobytes()
    assert total % 2**64 == int(cpu.checksum_of(host_theta.arrays[name].reshape(-1), 0))
    assert whole.checksum == host_theta.checksum()


def test_the_accumulated_sum_equals_the_sum_over_workers() -> None:
    """Each worker may sum its own members: int32 partial sums in any grouping are the whole."""
    update, name, count = some_update(), "model.norm.weight", 48
    terms = [
        np.int32(q * m.sign) * noise_ints(m.seed, name, 0, count) for m, q in zip(update.members, update.q, strict=True)
    ]
    assert all(term.dtype == np.int32 for term in terms)
    whole = sum(terms)
    for groups in (1, 2, 3, 8):
        partial = [sum(terms[worker::groups], np.zeros(count, dtype=np.int32)) for worker in range(groups)]
        assert np.array_equal(sum(reversed(partial)), whole)


def test_the_update_points_where_the_paper_says() -> None:
    """theta moves by learning_rate / N * sum_m u_m sign_m eps_m, to the precision of 15-bit utilities and float32."""
    utilities = np.random.default_rng(1).standard_normal(N)
    members = members_for_step(5, 2, N, antithetic=True)
    learning_rate = 1.0  # large beside theta's rounding
    host_theta = theta_of(["model.layers.0.mlp.weight"])
    before = host_theta.arrays["model.layers.0.mlp.weight"].astype(np.float64).reshape(-1)
    moved = host_theta.apply(make_update(members, utilities.tolist(), learning_rate))
    change = host_theta.arrays["model.layers.0.mlp.weight"].astype(np.float64).reshape(-1) - before
    eps = np.stack(
        [m.sign * noise_ints(m.seed, "model.layers.0.mlp.weight", 0, before.size) / noise_deviation() for m in members]
    )  # (N, d)
    wanted = learning_rate / N * (utilities @ eps)
    assert np.abs(change - wanted).max() < 1e-3
    assert np.linalg.norm(change - wanted) / np.linalg.norm(wanted) < 1e-4
    assert moved.norm == pytest.approx(np.linalg.norm(change), rel=1e-9)


def test_the_low_rank_update_points_where_the_paper_says() -> None:
    """The same with E = A B^T / (8 sqrt(r)) in the place of eps."""
    rank, name, utilities = 2, "model.layers.0.mlp.weight", np.random.default_rng(1).standard_normal(N)
    members = members_for_step(5, 2, N, antithetic=True)
    host_theta = theta_of([name], rank=rank)
    before = host_theta.arrays[name].astype(np.float64)
    host_theta.apply(make_update(members, utilities.tolist(), 1.0, rank=rank))
    change = host_theta.arrays[name] - before
    noise = np.stack([m.sign * lowrank_ints(m.seed, name, before.shape, rank) for m in members])  # (N, d0, d1)
    wanted = 1.0 / N * np.tensordot(utilities, noise / (8 * math.sqrt(rank)), 1)
    assert np.linalg.norm(change - wanted) / np.linalg.norm(wanted) < 1e-3  # q has 18 bits less 8 + 1 + 4
    assert np.linalg.matrix_rank(change, tol=1e-3) == N * rank / 2  # antithetic pairs share their factors


@pytest.mark.parametrize("rank", [0, 2])
def test_many_steps_in_pieces_and_in_one_process_end_in_the_same_bits(rank: int) -> None:
    """Ten steps with schedules of their own, one host_theta against two that hold half of the tensors each."""
    names = list(SHAPES)
    whole, left, right = theta_of(names, 2, rank), theta_of(names[:2], 1, rank), theta_of(names[2:], 3, rank)
    for step in range(10):
        utilities = np.random.default_rng(step).standard_normal(N).tolist()
        members = members_for_step(0, step, N, False)
        update = make_update(members, utilities, 1e-3 / (step + 1), weight_decay=0.1, rank=rank)
        for host_theta in (whole, left, right):
            host_theta.apply(update)
    assert all(whole.arrays[n].tobytes() == left.arrays[n].tobytes() for n in names[:2])
    assert all(whole.arrays[n].tobytes() == right.arrays[n].tobytes() for n in names[2:])
    assert all(np.isfinite(array).all() for array in whole.arrays.values())
