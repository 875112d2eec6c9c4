"""Theta in host memory: members and updates of whole models, against an independent noise and exact sums."""

from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction
from hashlib import blake2b

import numpy as np
import pytest
import torch
from plain_noise import nearest_float32, plain_key, plain_noise, same_bits, wide_checksum, wide_noise

import estune.es.noise.reference
import estune.es.theta
from estune.es.noise import perturbation_scale
from estune.es.population import members_for_step
from estune.es.theta import PIECE, HostTheta, fingerprint, pieces
from estune.es.types import Member, Noise, ParameterSpec, Perturbation
from estune.es.update import Update, make_update

SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (),
    "one": (1,),
    "w31": (31,),
    "norm.weight": (513,),
    "conv.weight": (3, 5, 7),
    "empty": (0, 4),
    "experts.gate_up_proj": (2, 33, 65),
    "exact_piece": (PIECE,),
    "piece_and_one": (PIECE + 1,),
    "matrix": (640, 1000),  # 2 pieces and a rest
    "frozen.weight": (70, 11),
    "frozen_large": (PIECE + 5,),
}
FROZEN = {"frozen.weight", "frozen_large"}
MEMBERS = members_for_step(0, 3, 6, antithetic=True)


def values(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    theta = np.asarray(rng.standard_normal(shape) * 0.02, dtype=np.float32).reshape(shape)
    flat = theta.reshape(-1)
    flat[::17] = -0.0
    flat[5::19] = 0.0
    flat[7::101] = 1e-40  # subnormal
    return theta


def make_theta(num_threads: int = 1, shapes: dict[str, tuple[int, ...]] = SHAPES) -> HostTheta:
    specs = [ParameterSpec(name, shape, name not in FROZEN) for name, shape in shapes.items()]
    return HostTheta(specs, {name: values(shape) for name, shape in shapes.items()}, {}, num_threads)


def member_noise(member: Member, name: str, size: int, distribution: str = "normal") -> np.ndarray:
    """Sign times noise, int64 (size,), from the independent implementation."""
    return member.sign * wide_noise(plain_key(member.seed, name), 0, size, distribution)


def expected_update(name: str, theta: np.ndarray, update: Update, anchor: np.ndarray | None = None) -> np.ndarray:
    """The update by its definition: one float32 rounding per decay operation, then one exact sum."""
    flat = theta.reshape(-1)
    acc = np.zeros(flat.size, dtype=np.int64)
    for member, q in zip(update.members, update.q, strict=True):
        acc += q * member_noise(member, name, flat.size, update.distribution)
    if update.decay:
        pull = np.float32(update.decay) * (flat if anchor is None else flat - anchor.reshape(-1))
        flat = flat - pull
    moved = (flat.astype(np.float64) + update.a * acc.astype(np.float64)).astype(np.float32)
    return np.where(acc == 0, flat, moved).reshape(theta.shape)


def expected_checksum(specs: list[ParameterSpec], arrays: dict[str, np.ndarray]) -> str:
    digest = blake2b(digest_size=16)
    for spec in sorted(specs, key=lambda s: s.name):
        name = spec.name.encode()
        for number in (len(name), len(spec.shape)):
            digest.update(number.to_bytes(8, "little"))
        digest.update(name)
        for extent in spec.shape:
            digest.update(extent.to_bytes(8, "little"))
        digest.update(wide_checksum(arrays[spec.name]).to_bytes(8, "little"))
    return digest.hexdigest()


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("member", MEMBERS[:2])
def test_perturb_equals_the_definition(member: Member, num_threads: int, distribution: str) -> None:
    host_theta = make_theta(num_threads)
    before = {name: array.copy() for name, array in host_theta.arrays.items()}
    scale = perturbation_scale(1e-3, distribution)
    for name, shape in SHAPES.items():
        weights = host_theta.perturb(name, Perturbation(member, Noise(scale, distribution)))
        assert weights.shape == shape and weights.dtype == np.float32
        noise = 0 if name in FROZEN else member_noise(member, name, before[name].size, distribution)
        expected = before[name].reshape(-1)
        if name not in FROZEN:
            expected = expected + np.float32(scale) * np.asarray(noise, dtype=np.float32)
        assert same_bits(weights, expected.reshape(shape))
        assert not np.shares_memory(weights, host_theta.arrays[name])
        out = np.full(shape, np.nan, dtype=np.float32)
        assert host_theta.perturb(name, Perturbation(member, Noise(scale, distribution)), out=out) is out
        assert same_bits(out, weights)
    assert all(same_bits(host_theta.arrays[name], before[name]) for name in SHAPES)
    assert host_theta.version == 0


def test_perturb_is_one_rounding_of_the_exact_sum() -> None:
    host_theta = make_theta()
    scale = perturbation_scale(7e-4)
    weights = host_theta.perturb("conv.weight", Perturbation(MEMBERS[1], Noise(scale))).reshape(-1)
    theta = host_theta.arrays["conv.weight"].reshape(-1)
    for i in range(theta.size):
        noise = MEMBERS[1].sign * plain_noise(MEMBERS[1].seed, "conv.weight", i)
        assert weights[i] == nearest_float32(Fraction(float(theta[i])) + Fraction(scale) * noise)


def test_minus_zero_under_zero_noise_is_the_same_for_both_signs() -> None:
    """theta + s * (sign * 0) is -0.0 + 0.0 = 0.0 whatever the sign: the noise is an integer, it has no -0."""
    host_theta = HostTheta([ParameterSpec("w", (200,), True)], {"w": np.full(200, -0.0, dtype=np.float32)})
    seed = MEMBERS[0].seed
    still = np.array([plain_noise(seed, "w", i) == 0 for i in range(200)])
    assert still.any()
    for sign in (1, -1):
        weights = host_theta.perturb("w", Perturbation(Member(seed, sign), Noise(perturbation_scale(1e-3))))
        assert not np.signbit(weights[still]).any()


def test_perturb_without_member_copies_theta_and_checks_its_output() -> None:
    host_theta = make_theta()
    copy = host_theta.perturb("matrix", None)
    assert same_bits(copy, host_theta.arrays["matrix"]) and not np.shares_memory(copy, host_theta.arrays["matrix"])
    for bad in (np.empty(3, np.float32), np.empty((640, 1000), np.float64), np.empty((1000, 640), np.float32).T):
        with pytest.raises(ValueError, match="must be C-contiguous float32"):
            host_theta.perturb("matrix", None, out=bad)


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_update_equals_the_definition(num_threads: int, distribution: str) -> None:
    host_theta = make_theta(num_threads)
    before = {name: array.copy() for name, array in host_theta.arrays.items()}
    update = make_update(MEMBERS, [1.3, -0.2, 0.0, 0.7, -2.1, 0.3], 5e-4, distribution=distribution)
    moved = host_theta.apply(update)
    after = {name: before[name] if name in FROZEN else expected_update(name, before[name], update) for name in SHAPES}
    for name in SHAPES:
        assert same_bits(host_theta.arrays[name], after[name]), name
        assert np.isfinite(host_theta.arrays[name]).all()
    assert host_theta.version == 1
    assert moved.checksum == host_theta.checksum() == expected_checksum(host_theta.specs, after)
    trained = [name for name in SHAPES if name not in FROZEN]
    change = math.sqrt(sum(float(((after[n].astype("f8") - before[n]) ** 2).sum()) for n in trained))
    size = math.sqrt(sum(float((after[n].astype("f8") ** 2).sum()) for n in trained))
    assert moved.norm == pytest.approx(change, rel=1e-9) and moved.ratio == pytest.approx(change / size, rel=1e-9)


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_decay_rounds_each_operation_and_comes_before_the_es_term(num_threads: int, anchored: bool) -> None:
    shapes = {name: SHAPES[name] for name in ("w31", "piece_and_one", "matrix", "frozen.weight")}
    host_theta = make_theta(num_threads, shapes)
    before = {name: array.copy() for name, array in host_theta.arrays.items()}
    base = {name: values(shape, seed=9) for name, shape in shapes.items()}
    update = make_update(MEMBERS, [1.0, 0.5, -1.5, 0.1, 0.2, -0.3], 5e-3, weight_decay=10.0, anchored=anchored)
    asked: list[tuple[str, int, int]] = []

    def anchor(name: str, start: int, count: int) -> np.ndarray:
        asked.append((name, start, count))
        return base[name].reshape(-1)[start : start + count]

    moved = host_theta.apply(update, anchor if anchored else None)
    after = {n: expected_update(n, before[n], update, base[n] if anchored else None) for n in shapes}
    after["frozen.weight"] = before["frozen.weight"]
    assert all(same_bits(host_theta.arrays[name], after[name]) for name in shapes)
    assert moved.checksum == expected_checksum(host_theta.specs, after)
    assert max((count for _, _, count in asked), default=0) <= PIECE  # never a resident copy
    assert {name for name, _, _ in asked} == ({"w31", "piece_and_one", "matrix"} if anchored else set())


def test_decay_by_exact_arithmetic() -> None:
    """The three roundings and the sum, element by element, in fractions."""
    host_theta = make_theta(1, {"conv.weight": (3, 5, 7)})
    theta = [Fraction(float(x)) for x in host_theta.arrays["conv.weight"].reshape(-1)]
    base = values((3, 5, 7), seed=4)
    update = make_update(MEMBERS, [1.0, 0.5, -1.5, 0.1, 0.2, -0.3], 5e-3, weight_decay=3.0, anchored=True)
    host_theta.apply(update, lambda name, start, count: base.reshape(-1)[start : start + count])
    decay = Fraction(update.decay)
    for i, (own, anchor) in enumerate(zip(theta, base.reshape(-1), strict=True)):
        difference = Fraction(float(nearest_float32(own - Fraction(float(anchor)))))
        pull = Fraction(float(nearest_float32(decay * difference)))
        value = nearest_float32(own - pull)
        acc = sum(q * m.sign * plain_noise(m.seed, "conv.weight", i) for m, q in zip(MEMBERS, update.q, strict=True))
        if acc:
            value = np.float32(float(Fraction(float(value)) + Fraction(update.a) * acc))
        assert host_theta.arrays["conv.weight"].reshape(-1)[i] == value


def test_an_anchored_update_needs_theta_0() -> None:
    update = make_update(MEMBERS, [1.0, -1.0, 0.0, 0.0, 0.0, 0.0], 5e-4, weight_decay=1.0, anchored=True)
    host_theta = make_theta()
    before = host_theta.fingerprint()
    with pytest.raises(ValueError, match="theta_0"):
        host_theta.apply(update)
    assert host_theta.fingerprint() == before


def test_a_tie_moves_nothing_not_even_by_decay() -> None:
    host_theta = make_theta(2)
    before = {name: array.copy() for name, array in host_theta.arrays.items()}
    checksum = host_theta.checksum()
    moved = host_theta.apply(make_update(MEMBERS, [0.0] * 6, 5e-4, weight_decay=10.0))
    assert (moved.checksum, moved.norm, moved.ratio) == (checksum, 0.0, 0.0)
    assert all(same_bits(host_theta.arrays[name], before[name]) for name in SHAPES)


def test_where_acc_is_zero_theta_keeps_its_bits() -> None:
    """Also -0.0 and NaN payloads: equal utilities of a mirrored pair cancel everywhere."""
    bits = np.array([0x80000000, 0x00000000, 0x00000001, 0x7F7FFFFF, 0x80000001] * 1000, dtype=np.uint32)
    specs = [ParameterSpec("w", (5000,), True)]
    pair = members_for_step(0, 0, 2, antithetic=True)
    host_theta = HostTheta(specs, {"w": bits.view(np.float32).copy()})
    host_theta.apply(make_update(pair, [1.0, 1.0], 1.0))
    assert np.array_equal(host_theta.arrays["w"].view(np.uint32), bits)
    single = members_for_step(0, 0, 2, antithetic=False)
    host_theta.apply(make_update(single, [1.0, 0.0], 1e-3))
    still = np.array([plain_noise(single[0].seed, "w", i) == 0 for i in range(5000)])
    assert 500 < still.sum() < 900  # P(n = 0) is 14 %
    assert np.array_equal(host_theta.arrays["w"].view(np.uint32)[still], bits[still])
    assert np.count_nonzero(host_theta.arrays["w"].view(np.uint32)[~still] != bits[~still]) > 3000


@pytest.mark.parametrize("num_threads", [1, 2])
def test_an_update_that_is_refused_moves_nothing(monkeypatch: pytest.MonkeyPatch, num_threads: int) -> None:
    """Not even parameters that come before the one with too large a factor."""
    specs = [ParameterSpec("a", (4, 4), True, lowrank=True), ParameterSpec("b", (64, 4), True, lowrank=True)]
    arrays = {spec.name: np.ones(spec.shape, dtype=np.float32) for spec in specs}
    host_theta = HostTheta(specs, arrays, num_threads=num_threads)
    monkeypatch.setattr(estune.es.noise.reference, "BLOCK_SIZE", 128)
    update = make_update(members_for_step(0, 0, 4, False), [1.0, -1.0, 0.5, -0.5], 0.1, rank=2)
    with pytest.raises(ValueError, match=r"shape \(64, 4\) at rank 2"):
        host_theta.apply(update)
    assert all((array == 1).all() for array in host_theta.arrays.values())
    assert host_theta.version == 0


def test_members_of_zero_utility_are_skipped_without_a_trace() -> None:
    one, other = make_theta(), make_theta()
    one.apply(make_update(MEMBERS, [1.0, 0.0, -0.5, 0.0, 0.0, 0.25], 5e-4))
    update = make_update(MEMBERS, [1.0, 0.0, -0.5, 0.0, 0.0, 0.25], 5e-4)
    kept = [0, 2, 5]
    other.apply(Update(tuple(MEMBERS[i] for i in kept), tuple(update.q[i] for i in kept), update.e, update.a))
    assert one.fingerprint() == other.fingerprint()


def test_the_largest_sums_do_not_overflow() -> None:
    """4096 members of the largest |q|, all with one noise, come near to int32's bound: |n| reaches 12 here."""
    size, count = 4096, 100_000
    members = [Member(7, 1)] * size
    update = make_update(members, [1.0] * size, 1.0)
    assert max(update.q) * 16 * size < 2**31 <= 2 * max(update.q) * 16 * size
    host_theta = HostTheta([ParameterSpec("w", (count,), True)], {"w": np.zeros(count, dtype=np.float32)})
    host_theta.apply(update)
    acc = sum(update.q) * wide_noise(plain_key(7, "w"), 0, count)  # int64
    assert 0.7 * 2**30 < np.abs(acc).max() < 2**31
    assert same_bits(host_theta.arrays["w"], (update.a * acc.astype(np.float64)).astype(np.float32))


@pytest.mark.parametrize("size", [1, PIECE - 1, PIECE, PIECE + 1, 2**32 - 1, 2**32, 2**32 + 3, 2 * 2**32 + PIECE + 1])
def test_pieces_cover_a_tensor_once_and_respect_blocks(size: int) -> None:
    end = 0
    for start, count, block in pieces(size):
        assert start == end and 1 <= count <= PIECE
        assert start // 2**32 == (start + count - 1) // 2**32 == block
        end += count
    assert end == size
    assert list(pieces(0)) == []


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_tensor_of_several_key_blocks(monkeypatch: pytest.MonkeyPatch, num_threads: int) -> None:
    """With blocks of 10007 elements instead of 2^32, so that a small tensor has four of them."""
    block, size = 10_007, 35_000
    for module in (estune.es.theta, estune.es.noise.reference):
        monkeypatch.setattr(module, "BLOCK_SIZE", block)
    monkeypatch.setattr(estune.es.theta, "PIECE", 3000)
    theta = values((size,))
    host_theta = HostTheta([ParameterSpec("w", (size,), True)], {"w": theta.copy()}, {}, num_threads)

    def noise(member: Member) -> np.ndarray:
        names = ["w", "w#1", "w#2", "w#3"]
        whole = [wide_noise(plain_key(member.seed, name), 0, block) for name in names]
        return member.sign * np.concatenate(whole)[:size]

    scale = perturbation_scale(1e-2)
    weights = host_theta.perturb("w", Perturbation(MEMBERS[1], Noise(scale)))
    assert same_bits(weights, theta + np.float32(scale) * noise(MEMBERS[1]).astype(np.float32))
    update = make_update(MEMBERS, [1.3, -0.2, 0.0, 0.7, -2.1, 0.3], 5e-4)
    moved = host_theta.apply(update)
    acc = sum(q * noise(member) for member, q in zip(MEMBERS, update.q, strict=True))
    expected = np.where(acc == 0, theta, (theta.astype("f8") + update.a * acc.astype("f8")).astype(np.float32))
    assert same_bits(host_theta.arrays["w"], expected)
    total = sum(wide_checksum(expected[lo : lo + block]) for lo in range(0, size, block)) % 2**64
    parts = b"".join(x.to_bytes(8, "little") for x in (1, 1)) + b"w" + size.to_bytes(8, "little")
    assert moved.checksum == blake2b(parts + total.to_bytes(8, "little"), digest_size=16).hexdigest()


def test_theta_refuses_arrays_it_could_not_write_in_place() -> None:
    spec = [ParameterSpec("w", (4, 6), True)]
    good = np.zeros((4, 6), dtype=np.float32)
    for bad in (good.astype(np.float64), np.zeros((6, 4), np.float32).T, np.zeros(24, np.float32)):
        with pytest.raises(ValueError, match="not C-contiguous float32"):
            HostTheta(spec, {"w": bad})
    assert HostTheta(spec, {"w": good}).num_parameters == 24


def test_load_writes_in_place() -> None:
    host_theta = make_theta()
    array = host_theta.arrays["matrix"]
    other = {name: values(shape, seed=5) for name, shape in SHAPES.items()}
    host_theta.load(lambda name, flat: np.copyto(flat, other[name].reshape(-1)))
    assert host_theta.arrays["matrix"] is array and host_theta.version == 1
    assert all(same_bits(host_theta.arrays[name], other[name]) for name in SHAPES)
    assert not np.shares_memory(array, other["matrix"])


def test_unshare_gives_theta_separate_memory() -> None:
    """An engine may hand over its model's own arrays, and later want to write members into them."""
    host_theta = make_theta()
    others = dict(host_theta.arrays)
    before = host_theta.fingerprint()
    host_theta.unshare()
    assert host_theta.fingerprint() == before
    for name, array in others.items():
        assert not np.shares_memory(host_theta.arrays[name], array) and host_theta.arrays[name].flags.c_contiguous
        array[...] = 7.0
    assert host_theta.fingerprint() == before == make_theta().fingerprint()
    update = make_update(MEMBERS, [1.0, 0.5, -1.5, 0.1, 0.2, -0.3], 5e-3)
    other = make_theta()
    assert host_theta.apply(update) == other.apply(update)  # what is updated is what is saved
    assert host_theta.fingerprint() == other.fingerprint() != before
    assert all((array == 7.0).all() for array in others.values())


def test_fingerprint_and_checksum_see_names_shapes_and_single_bits() -> None:
    array = values((6, 4))

    def marks(name: str, shape: tuple[int, ...], data: np.ndarray) -> tuple[str, str]:
        host_theta = HostTheta([ParameterSpec(name, shape, True)], {name: data.reshape(shape).copy()})
        return host_theta.fingerprint(), host_theta.checksum()

    plain = marks("w", (6, 4), array)
    assert marks("w", (6, 4), array) == plain
    flipped = array.copy()
    flipped.view(np.uint32)[3, 2] ^= 1
    negative_zero = array.copy()
    assert negative_zero.reshape(-1)[0] == 0.0 and np.signbit(negative_zero.reshape(-1)[0])
    negative_zero.reshape(-1)[0] = 0.0
    swapped = array.copy().reshape(-1)
    swapped[[1, 2]] = swapped[[2, 1]]
    others = [
        marks("v", (6, 4), array), marks("w", (4, 6), array), marks("w", (24,), array), marks("w", (1, 24), array),
        marks("w", (6, 4), flipped), marks("w", (6, 4), negative_zero), marks("w", (6, 4), swapped),
    ]  # fmt: skip
    for position in (0, 1):
        assert len({plain[position], *(other[position] for other in others)}) == len(others) + 1


def test_fingerprint_is_blake2b_over_raw_bytes_in_name_order() -> None:
    shapes = {"b": (2, 3), "a": (), "a.b": (0,), "B": (4,)}
    specs = [ParameterSpec(name, shape, True) for name, shape in shapes.items()]
    arrays = {name: values(shape) for name, shape in shapes.items()}
    digest = blake2b(digest_size=16)
    for name in ("B", "a", "a.b", "b"):
        numbers = [len(name), len(shapes[name])]
        digest.update(b"".join(x.to_bytes(8, "little") for x in numbers) + name.encode())
        digest.update(b"".join(x.to_bytes(8, "little") for x in shapes[name]) + arrays[name].tobytes())
    assert fingerprint(specs, arrays) == fingerprint(specs[::-1], arrays) == digest.hexdigest()
    assert HostTheta(specs, arrays).fingerprint() == digest.hexdigest()


def test_the_core_needs_no_torch() -> None:
    """A replay, the toy engine and the journal run where torch is not installed; `assign` alone is for its tensors."""
    core = "estune.es.theta, estune.engines.toy, estune.run.checkpoint, estune.run.directory"
    blocked = f"import sys; sys.modules['torch'] = None; import {core}"
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_theta_that_was_written_half_is_another_version() -> None:
    """What holds weights of the version before must not take them for current."""
    specs = [ParameterSpec(name, (3,), True) for name in ("a", "b")]
    host_theta = HostTheta(specs, {spec.name: np.zeros(3, dtype=np.float32) for spec in specs})
    before = host_theta.version

    def read(name: str) -> torch.Tensor:
        if name == "b":
            raise ValueError("not finite")
        return torch.ones(3, dtype=torch.bfloat16, requires_grad=True)

    with pytest.raises(ValueError, match="not finite"):
        host_theta.assign(read)
    assert host_theta.version != before and host_theta.arrays["a"].tolist() == [1.0] * 3
