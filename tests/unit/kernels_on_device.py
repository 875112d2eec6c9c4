"""The GPU kernels and the device's host_theta: on a GPU where there is one, or under Triton's interpreter on the CPU.

`test_triton` runs this file in a child. ``TRITON_INTERPRET=1`` must be set before triton is imported, so nothing here
is collected in the suite's own process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_noise import plain_key, same_bits, wide_checksum, wide_noise

from estune.engines.lowrank.members import Members, SharedForward
from estune.es.noise import cpu_lowrank, lowrank_ints, lowrank_scale, noise_key, perturbation_scale
from estune.es.population import members_for_step
from estune.es.theta import HostTheta
from estune.es.types import Member, Noise, ParameterSpec, Perturbation
from estune.es.update import Update, make_update
from estune.gpu import check
from estune.gpu import launch as gpu
from estune.gpu import theta as gpu_theta
from estune.gpu.check import theta_values
from estune.gpu.theta import DeviceTheta

CPU = torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
DEVICE = CPU if INTERPRETED else torch.device("cuda", torch.cuda.current_device())
DISTRIBUTIONS = ("normal", "rademacher")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # float16's infinity is meant


def nearest_bfloat16(values: np.ndarray) -> np.ndarray:
    """bfloat16 bits of finite float32, by comparing the two neighbours' distances in float64."""
    bits = values.view(np.uint32)
    low = bits & np.uint32(0xFFFF0000)
    high = low + np.uint32(0x10000)
    wide = [x.view(np.float32).astype(np.float64) for x in (low, high)]
    wide = [np.where(np.isinf(x), np.copysign(2.0**128, x), x) for x in wide]  # where the next exponent would be
    below, above = (abs(x - values) for x in wide)
    up = (above < below) | ((above == below) & ((low >> np.uint32(16)) & np.uint32(1) == 1))
    return (np.where(up, high, low) >> np.uint32(16)).astype(np.uint16)


def bits_of(out: torch.Tensor) -> np.ndarray:
    return out.cpu().view(torch.int16 if out.itemsize == 2 else torch.int32).numpy()


def on_device(values: np.ndarray) -> torch.Tensor:
    """A copy on the device, also where that is the CPU."""
    return torch.from_numpy(values.copy()).to(DEVICE)


def cast(values: np.ndarray, dtype: str) -> np.ndarray:
    """The bits of float32 values in ``dtype``, cast once to nearest even."""
    with np.errstate(over="ignore"):
        return {
            "float32": lambda: values.view(np.int32),
            "bfloat16": lambda: nearest_bfloat16(values).view(np.int16),
            "float16": lambda: values.astype(np.float16).view(np.int16),
        }[dtype]()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("start", "count"), [(0, 1), (0, 1024), (1, 1025), (2**31 - 5, 500), (2**32 - 3089, 3089), (2**32 - 1, 1)]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_member(start: int, count: int, dtype: str, distribution: str, sign: int) -> None:
    seed, name = 2**63 + 5, "model.layers.0.weight"
    theta, scale = theta_values(count), perturbation_scale(1e-3, distribution)
    noise = sign * wide_noise(plain_key(seed, name), start, count, distribution).astype(np.int64)
    expected = theta + np.float32(scale) * noise.astype(np.float32)  # an integer 0 has no sign
    out = torch.empty(count, dtype=DTYPES[dtype], device=DEVICE)
    rademacher = distribution == "rademacher"
    gpu.perturb_into(out, on_device(theta), start, noise_key(seed, name), sign * scale, rademacher)
    assert np.array_equal(bits_of(out), cast(expected, dtype))


def test_the_cast_to_bfloat16_is_to_nearest_even_for_every_upper_half() -> None:
    """Scale 0 leaves the cast alone: all upper halves of finite float32, each with lower halves around the tie."""
    upper = np.arange(1 << 16, dtype=np.uint32)
    upper = upper[(upper & 0x7F80) != 0x7F80]
    for lower in (0x0000, 0x7FFF, 0x8000, 0x8001):
        theta = ((upper << np.uint32(16)) | np.uint32(lower)).view(np.float32)
        theta = np.where(theta == 0, np.float32(0), theta)  # -0.0 + 0.0 = 0.0
        out = torch.empty(theta.size, dtype=torch.bfloat16, device=DEVICE)
        gpu.perturb_into(out, on_device(theta), 0, (1, 2), 0.0, False)
        assert np.array_equal(bits_of(out), nearest_bfloat16(theta).view(np.int16))
        assert np.array_equal(bits_of(out), bits_of(torch.from_numpy(theta).to(torch.bfloat16)))


def test_members_and_updates_equal_the_cpu_kernels() -> None:
    """Includes decay to 0 and to an anchor, the end of a key block, checksums, norms and low-rank stacks."""
    assert check.check(DEVICE) == []


@pytest.mark.e2e
def test_the_check_notices_a_wrong_bit_of_any_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Distributions, dtypes of weights and ways of decay are compiled apart; each could be the one that is wrong."""

    def spoiled(right: Callable[..., object]) -> Callable[..., object]:
        def launch(out: torch.Tensor, *rest: object) -> object:
            sums = right(out, *rest)
            out.view(torch.uint8)[-1] ^= 0x80  # the last element's sign
            return sums

        return launch

    for name in ("perturb_into", "update_into", "perturb_lowrank_into", "update_lowrank_into"):
        monkeypatch.setattr(gpu, name, spoiled(getattr(gpu, name)))
    monkeypatch.setattr(gpu, "checksum_of", lambda theta, start: torch.tensor(0, device=DEVICE))
    dtypes = [f"member in {dtype}" for dtype in DTYPES.values()]
    decays = ["update without decay", "update with decay to 0", "update with decay to an anchor"]
    compared = [
        *(f"a {what}" for what in dtypes),
        *(f"an {what}" for what in decays),
        *(f"a low-rank {what}" for what in dtypes + decays),
    ]
    expected = [f"{what} ({distribution})" for distribution in DISTRIBUTIONS for what in compared]
    assert check.check(DEVICE) == ["a checksum", *expected]


@pytest.mark.parametrize("antithetic", [False, True])
def test_an_update_of_thirty_members_by_its_definition(antithetic: bool) -> None:
    name, start, count = "w", 2**32 - 1100, 1100
    members = members_for_step(7, 3, 30, antithetic)
    utilities = np.random.default_rng(1).standard_normal(30)
    update = make_update(members, utilities.tolist(), 5e-4)
    acc = np.zeros(count, dtype=np.int64)
    for member, q in zip(members, update.q, strict=True):
        acc += q * member.sign * wide_noise(plain_key(member.seed, name), start, count)
    theta = theta_values(count)
    expected = np.where(acc == 0, theta, (theta + update.a * acc.astype(np.float64)).astype(np.float32))
    moved = on_device(theta)
    keys = gpu.words(np.array([noise_key(m.seed, name) for m in members], dtype=np.uint32), DEVICE)
    q = torch.tensor([m.sign * q for m, q in zip(members, update.q, strict=True)], dtype=torch.int32, device=DEVICE)
    sums = gpu.update_into(moved, start, keys, q, update.a, False, 0.0, None)
    assert same_bits(moved.cpu().numpy(), expected)
    assert int(sums.checksum) % 2**64 == wide_checksum(expected, start)
    change = expected.astype(np.float64) - theta
    assert float(sums.change_squares) == pytest.approx(float(change @ change), rel=1e-12)


def test_a_scale_far_below_float32_reaches_the_kernel_as_float64() -> None:
    theta, keys = theta_values(40), gpu.words(np.array([noise_key(0, "w")], dtype=np.uint32), DEVICE)
    moved = on_device(theta)
    gpu.update_into(
        moved, 0, keys, torch.tensor([32767], dtype=torch.int32, device=DEVICE), 2.0**-150, False, 0.0, None
    )
    acc = 32767 * wide_noise(plain_key(0, "w"), 0, 40).astype(np.float64)
    expected = np.where(acc == 0, theta, (theta + 2.0**-150 * acc).astype(np.float32))
    assert same_bits(moved.cpu().numpy(), expected) and not same_bits(expected, theta)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("shape", [(5, 3), (33, 65), (3, 7, 70)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_low_rank_member(shape: tuple[int, ...], rank: int, distribution: str, dtype: str) -> None:
    seed, name = 11, "experts.w"
    theta = theta_values(int(np.prod(shape)))
    scale = lowrank_scale(1e-3, rank, distribution)
    noise = -lowrank_ints(seed, name, shape, rank, distribution).reshape(-1)
    expected = (theta.astype(np.float64) + scale * noise.astype(np.float64)).astype(np.float32)
    out = torch.empty(theta.size, dtype=DTYPES[dtype], device=DEVICE)
    d0, d1 = shape[-2:]
    rows = gpu.Rows(d0, d1, 0, theta.size // (d0 * d1), 0, d0)
    words = [word for factor in ("#A", "#B") for word in noise_key(seed, name + factor)]
    rademacher = distribution == "rademacher"
    gpu.perturb_lowrank_into(out, on_device(theta), rows, rank, words, -1, scale, rademacher)
    assert np.array_equal(bits_of(out), cast(expected, dtype))


def test_rows_of_a_matrix_past_two_to_the_32_elements() -> None:
    d1, row0, n_rows, rank = 3, 1_999_999_990, 7, 2
    rows = gpu.Rows(2_000_000_000, d1, 0, 1, row0, n_rows)
    assert rows.start > 2**32
    theta = theta_values(rows.count)
    keys = np.array([noise_key(5, "w#A"), noise_key(5, "w#B")], dtype=np.uint32)
    expected = theta.copy()
    wanted = cpu_lowrank.update_lowrank_into(
        expected.reshape(n_rows, d1), row0, 0, keys[:1], keys[1:], np.array([-321], dtype=np.int32), rank, 2.0**-30,
        False, np.float32(0), np.empty(0, np.float32),
    )  # fmt: skip
    moved = on_device(theta)
    q = torch.tensor([-321], dtype=torch.int32, device=DEVICE)
    sums = gpu.update_lowrank_into(moved, rows, rank, gpu.words(keys, DEVICE), q, 2.0**-30, False, 0.0, None)
    assert same_bits(moved.cpu().numpy(), expected) and int(sums.checksum) % 2**64 == int(wanted[0])


SPECS = [
    ParameterSpec("scalar", (), True),
    ParameterSpec("one", (1,), True),
    ParameterSpec("norm.weight", (513,), True),
    ParameterSpec("conv.weight", (3, 5, 30), True),
    ParameterSpec("empty", (0, 4), True),
    ParameterSpec("frozen", (30, 11), False),
    ParameterSpec("matrix", (12, 67), True, lowrank=True),
    ParameterSpec("experts", (3, 9, 33), True, lowrank=True),
    ParameterSpec("no_rows", (0, 5), True, lowrank=True),
]


def make_host_theta() -> HostTheta:
    return HostTheta(SPECS, {s.name: theta_values(int(np.prod(s.shape))).reshape(s.shape) for s in SPECS})


def updates() -> list[Update]:
    """Updates without decay, towards 0 and towards theta_0, of both distributions; one where all members tied."""
    rng = np.random.default_rng(2)
    result = []
    for step, (decay, anchored, distribution, rank) in enumerate(
        [(0.0, False, "normal", 2), (0.3, False, "rademacher", 1), (0.3, True, "normal", 4), (0.1, False, "normal", 1)]
    ):
        members = members_for_step(9, step, 4, antithetic=step % 2 == 1)
        utilities = [0.0] * 4 if step == 3 else rng.standard_normal(4).tolist()
        result.append(
            make_update(members, utilities, 0.02, weight_decay=decay, anchored=anchored, distribution=distribution,
                        rank=rank)
        )  # fmt: skip
    return result


def members() -> list[Perturbation | None]:
    return [
        None,
        Perturbation(Member(3, 1), Noise(perturbation_scale(1e-2), "normal", 4, lowrank_scale(1e-2, 4))),
        Perturbation(Member(2**64 - 1, -1), Noise(1e-2, "rademacher", 1, 2.0**-7)),
    ]


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.e2e), 512])  # 0: theta lives on the device
def test_theta_on_a_device_equals_theta_on_the_host(stage: int) -> None:
    """Members, updates, checksums and saves, whether theta is resident or streamed, in parts or whole."""
    host = make_host_theta()
    device = DeviceTheta(make_host_theta(), DEVICE, resident=not stage, stage=stage or 1 << 10)
    base = {name: array.copy() for name, array in host.arrays.items()}

    def anchor(name: str, start: int, count: int) -> np.ndarray:
        values = base[name].reshape(-1)[start : start + count]
        values.flags.writeable = False  # as a memory map's
        return values

    assert device.checksum() == host.checksum() and device.num_parameters == host.num_parameters
    for update in updates():
        for j, perturbation in enumerate(members() if device.version in (0, 2) else ()):
            for i, spec in enumerate(SPECS):
                dtype = list(DTYPES)[(i + j + device.version) % 3]
                out = torch.full(spec.shape, float("nan"), dtype=DTYPES[dtype], device=DEVICE)
                device.perturb_into(spec.name, perturbation, out)
                wanted = host.perturb(spec.name, perturbation).reshape(-1)
                assert np.array_equal(bits_of(out.view(-1)), cast(wanted, dtype)), (spec.name, dtype)
        wanted_move, move = host.apply(update, anchor), device.apply(update, anchor)
        assert move.checksum == wanted_move.checksum
        assert move.norm == pytest.approx(wanted_move.norm, rel=1e-12)
        assert move.ratio == pytest.approx(wanted_move.ratio, rel=1e-12)
        assert device.version == host.version
        assert all(same_bits(device.head(s.name, 5), host.arrays[s.name].reshape(-1)[:5]) for s in SPECS)
        assert device.fingerprint() == host.fingerprint()
    assert device.checksum() == host.checksum()
    perturbation = members()[1]
    assert all(same_bits(device.perturb(s.name, perturbation), host.perturb(s.name, perturbation)) for s in SPECS)
    device.load(lambda name, flat: np.copyto(flat, base[name].reshape(-1)))
    assert device.checksum() == make_host_theta().checksum() != host.checksum()


@pytest.mark.parametrize("resident", [True, False])
def test_members_written_on_the_host_after_an_update(resident: bool) -> None:
    """The host's copy is behind then, where theta lives on the device."""
    host, device = make_host_theta(), DeviceTheta(make_host_theta(), DEVICE, resident=resident)
    for update, perturbation in zip(updates(), members()[:2], strict=False):
        host.apply(update)
        device.apply(update)
        expected, found = ({s.name: np.empty(s.shape, dtype=np.float32) for s in SPECS} for _ in range(2))
        host.perturb_all(perturbation, expected)
        device.perturb_all(perturbation, found)
        assert all(same_bits(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("resident", [True, False])
def test_theta_assigned_from_tensors_of_the_device(resident: bool) -> None:
    """As a gradient method's weights are, between its steps."""
    host, device = make_host_theta(), DeviceTheta(make_host_theta(), DEVICE, resident=resident)
    arrays = {name: np.asarray(array * 2 + 1) for name, array in make_host_theta().arrays.items()}
    given = {name: torch.from_numpy(array).to(DEVICE) for name, array in arrays.items()}
    for host_theta in (host, device):
        before = host_theta.version
        host_theta.assign(given.__getitem__)
        assert host_theta.version == before + 1
    assert all(same_bits(host.arrays[name], array) for name, array in arrays.items())
    perturbation = members()[1]
    for spec in SPECS:
        out = torch.empty(spec.shape, device=DEVICE)
        device.perturb_into(spec.name, perturbation, out)
        assert same_bits(out.cpu().numpy(), host.perturb(spec.name, perturbation))
    assert device.checksum() == host.checksum()
    assert device.fingerprint() == host.fingerprint()


def test_memory_of_its_own_is_what_theta_on_a_device_reads_afterwards() -> None:
    host, given = make_host_theta(), make_host_theta()
    shared = dict(given.arrays)
    device = DeviceTheta(given, DEVICE, resident=True)
    device.unshare()
    for host_theta in (host, device):
        host_theta.apply(updates()[0])
    assert device.fingerprint() == host.fingerprint()
    assert all(same_bits(shared[name], array) for name, array in make_host_theta().arrays.items())


def test_one_parameter_alone_is_downloaded_for_a_member() -> None:
    """The arrays given to theta are the host's copy: they show what was downloaded."""
    host, given = make_host_theta(), make_host_theta()
    device = DeviceTheta(given, DEVICE, resident=True)
    for host_theta in (host, device):
        host_theta.apply(updates()[0])
    perturbation = members()[1]
    for out in (None, np.empty(513, dtype=np.float32)):
        found = device.perturb("norm.weight", perturbation, out)
        assert same_bits(found, host.perturb("norm.weight", perturbation))
    check_downloaded(given, host, {"norm.weight"})
    device.perturb_all(perturbation, {"one": np.empty(1, dtype=np.float32)})
    check_downloaded(given, host, {"norm.weight", "one"})


def test_members_that_share_a_forward_pass_download_vectors_alone() -> None:
    host, given = make_host_theta(), make_host_theta()
    device = DeviceTheta(given, DEVICE, resident=True)
    for host_theta in (host, device):
        host_theta.apply(updates()[0])
    model = torch.nn.ParameterDict(
        {"matrix": torch.zeros(12, 67, device=DEVICE), "vector": torch.zeros(513, device=DEVICE)}
    )
    shared = SharedForward(model, [], device)
    shared.parameters = {"matrix": model["matrix"], "norm.weight": model["vector"]}
    perturbations = [Perturbation(Member(seed, -1), Noise(0.25, "normal", 4, 0.5)) for seed in (3, 4)]
    vectors = Members(shared, perturbations).stand_ins["norm.weight"].values
    assert all(
        same_bits(vector.cpu().numpy(), host.perturb("norm.weight", perturbation))
        for vector, perturbation in zip(vectors, perturbations, strict=True)
    )
    check_downloaded(given, host, {"norm.weight"})


def check_downloaded(copy: HostTheta, current: HostTheta, names: set[str]) -> None:
    """Of the parameters that an update moved, ``names`` are current in a copy and the others are as they began."""
    began = make_host_theta().arrays
    moved = {name for name, array in current.arrays.items() if not same_bits(array, began[name])}
    assert names < moved
    for name in moved:
        assert same_bits(copy.arrays[name], (current.arrays if name in names else began)[name]), name


@pytest.mark.parametrize("resident", [True, False])
def test_what_theta_on_a_device_refuses(resident: bool) -> None:
    device = DeviceTheta(make_host_theta(), DEVICE, resident=resident)
    full = Perturbation(Member(1, 1), Noise(1e-3))
    with pytest.raises(ValueError, match="rank of at least 1"):
        device.perturb_into("one", full, torch.empty(1, device=DEVICE))
    with pytest.raises(ValueError, match="of 513 elements"):
        device.perturb_into("norm.weight", None, torch.empty(512, device=DEVICE))
    with pytest.raises(ValueError, match="float16, not"):
        device.perturb_into("one", None, torch.empty(1, dtype=torch.float64, device=DEVICE))
    with pytest.raises(ValueError, match="theta_0"):
        device.apply(updates()[2])


def test_blocks_past_two_to_the_32_have_separate_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_theta, "BLOCK_SIZE", 400)
    device = DeviceTheta(make_host_theta(), DEVICE, resident=True)
    out = torch.empty(513, device=DEVICE)
    device.perturb_into("norm.weight", Perturbation(Member(3, 1), Noise(0.25, rank=1)), out)
    theta = device.arrays["norm.weight"]
    noise = [wide_noise(plain_key(3, "norm.weight"), 0, 400), wide_noise(plain_key(3, "norm.weight#1"), 0, 113)]
    assert same_bits(out.cpu().numpy(), theta + np.float32(0.25) * np.concatenate(noise).astype(np.float32))


def test_on_a_cpu_theta_stays_where_it_is(tmp_path: Path) -> None:
    host_theta = make_host_theta()
    assert gpu_theta.on_device(host_theta, CPU, pytest.fail) is host_theta


@pytest.mark.skipif(INTERPRETED, reason="streams and pinned memory are a GPU's")
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_theta_streamed_from_pinned_memory(decay: float) -> None:
    """Parameters of many staging buffers: copies up, work and copies down overlap, also from one update to the next."""
    shapes = {"full": ((5 << 20) + 17,), "experts": (3, 700, 1100), "tall": (4096, 600)}
    specs = [ParameterSpec(name, shape, True, lowrank=len(shape) > 1) for name, shape in shapes.items()]
    rng = np.random.default_rng(5)
    values = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    host = HostTheta(specs, {name: array.copy() for name, array in values.items()})
    device = DeviceTheta(
        HostTheta(specs, {name: array.copy() for name, array in values.items()}), DEVICE, resident=False, stage=1 << 16
    )

    def anchor(name: str, start: int, count: int) -> np.ndarray:
        return values[name].reshape(-1)[start : start + count]

    perturbation = Perturbation(Member(3, -1), Noise(perturbation_scale(1e-2), "normal", 2, lowrank_scale(1e-2, 2)))
    for step in range(4):
        several = members_for_step(1, step, 6, antithetic=False)
        update = make_update(
            several, rng.standard_normal(6).tolist(), 0.02, weight_decay=decay, anchored=step % 2 == 1, rank=2
        )
        assert device.apply(update, anchor).checksum == host.apply(update, anchor).checksum
        for spec in specs:
            out = torch.empty(spec.shape, dtype=torch.bfloat16, device=DEVICE)
            device.perturb_into(spec.name, perturbation, out)
            assert np.array_equal(
                bits_of(out.view(-1)), cast(host.perturb(spec.name, perturbation).reshape(-1), "bfloat16")
            )
    assert device.checksum() == host.checksum()
    assert all(same_bits(device.arrays[name], host.arrays[name]) for name in shapes)


@pytest.mark.skipif(INTERPRETED, reason="10 GiB: a GPU's")
def test_elements_past_two_to_the_31() -> None:
    """Offsets and counts need 64 bits; the first and last elements and those around the limit are compared."""
    count = 2**31 + 3 * gpu.BLOCK + 5
    if torch.cuda.mem_get_info(DEVICE)[0] < 14 * count:
        pytest.skip("too little memory")
    theta = torch.zeros(count, device=DEVICE)
    out = torch.empty(count, dtype=torch.bfloat16, device=DEVICE)
    key, scale = noise_key(3, "w"), perturbation_scale(1e-3)
    gpu.perturb_into(out, theta, 0, key, scale, False)
    keys = gpu.words(np.array([key], dtype=np.uint32), DEVICE)
    update = make_update([Member(3, 1)], [1.0], 0.5)
    q = torch.tensor(update.q, dtype=torch.int32, device=DEVICE)
    gpu.update_into(theta, 0, keys, q, update.a, False, 0.0, None)
    for start in (0, 2**31 - 2048, count - 2048):
        noise = wide_noise(plain_key(3, "w"), start, 2048)
        member = np.float32(scale) * noise.astype(np.float32)
        assert np.array_equal(bits_of(out[start : start + 2048]), cast(member + np.float32(0), "bfloat16"))
        moved = (update.a * (update.q[0] * noise.astype(np.float64))).astype(np.float32)
        assert np.array_equal(theta[start : start + 2048].cpu().numpy(), moved)
