"""The GPU path: kernels compiled for sm_80 and sm_90, run under the interpreter and on a GPU, streamed in any order.

The compiled kernels are read, not run: every place where bits rest on the compiler is looked up in the PTX that LLVM
wrote and in the machine code that ptxas made of it.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("triton was imported as an interpreter", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from estune.es.types import ParameterSpec
from estune.gpu import launch
from estune.gpu import theta as gpu_theta
from estune.gpu.staging import SLOTS, Staging
from estune.gpu.theta import parts

KERNELS = ("perturb", "update", "checksum", "perturb_lowrank", "update_lowrank")
TARGETS = (pytest.param(80, marks=pytest.mark.e2e), 90)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32", torch.uint32: "*u32",
}  # fmt: skip


@pytest.mark.parametrize(
    ("interpreted", "tier"), [(True, "not e2e"), pytest.param(True, "e2e", marks=pytest.mark.e2e), (False, "")]
)
def test_bits(interpreted: bool, tier: str) -> None:
    """Runs `kernels_on_device.py` in a child, where triton is imported as an interpreter, or on the GPU."""
    if not interpreted and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    file = Path(__file__).with_name("kernels_on_device.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", tier, str(file)],
        env={**os.environ, "TRITON_INTERPRET": str(int(interpreted))}, cwd=file.parents[2],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    assert re.search(r"^\d+ passed", done.stdout, re.MULTILINE) or "[100%]" in done.stdout


class Launches:
    """Stands for a kernel and keeps what it is launched with, so that what is compiled here is what is launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(extent >= 1 for extent in grid)
        return lambda *args, **options: self.calls.append((args, options))


def compiled(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], capability: int) -> Any:
    """Compile one launch as Triton's launcher would: annotated types, alignment and multiples of 16 known."""
    options = dict(options)
    constants = {p.name: options.pop(p.name) for p in kernel.params if p.is_constexpr}
    signature, known = {}, {}
    values = iter(args)
    for param in kernel.params:
        if param.is_constexpr:
            signature[param.name] = "constexpr"
            continue
        value = next(values)
        if type(value) is int and value == 1 and not param.annotation_type and not param.do_not_specialize:
            signature[param.name], constants[param.name] = "constexpr", 1  # the launcher makes it a constant
            continue
        if isinstance(value, torch.Tensor):
            signature[param.name] = POINTERS[value.dtype]
            aligned = not param.do_not_specialize_on_alignment
        else:
            assert param.annotation_type or isinstance(value, int), param.name  # a float has its type spelled out
            signature[param.name] = param.annotation_type or ("i32" if abs(value) < 1 << 31 else "i64")
            aligned = isinstance(value, int) and value % 16 == 0 and not param.do_not_specialize
        if aligned:
            known[(param.num,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, known)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile into a directory of the test's own, under the options that the launcher sets and no others."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("TRITON_", "NVPTX_", "PTXAS_", "DISABLE_PTXAS"))]:
            patch.delenv(name)
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, Launches]:
    found = {}
    for name in KERNELS:
        found[name] = Launches(getattr(launch.kernels, f"{name}_kernel"))
        monkeypatch.setattr(launch.kernels, f"{name}_kernel", found[name])
    return found


def opcodes(ptx: str) -> Counter[str]:
    """Count a kernel's instructions, predicates and operands left out."""
    return Counter(re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][\w.:]*)\s", ptx, re.MULTILINE))


def is_float(opcode: str) -> bool:
    return re.search(r"\.(?:bf16|f16|f32|f64)", opcode) is not None


def machine_code(kernel: Any, tmp_path: Path) -> str:
    """Disassemble what ptxas made, with the tool that Triton ships."""
    file = tmp_path / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.nvdisasm.path
    return subprocess.run([tool, "-c", str(file)], check=True, stdout=subprocess.PIPE, text=True).stdout


def check_floats(kernel: Any, allowed: set[str], tmp_path: Path) -> Counter[str]:
    """No float instruction but the ``allowed`` ones, each rounding to nearest even; no contraction by ptxas either."""
    found = opcodes(kernel.asm["ptx"])
    floats = {opcode for opcode in found if is_float(opcode)}
    assert floats <= allowed, floats - allowed
    assert not any(re.match(r"(fma|mad)\b.*\.(bf16|f16|f32|f64)|.*\.(ftz|approx|rz|rm|rp)\b", op) for op in found)
    assert "call" not in found
    code = machine_code(kernel, tmp_path)
    assert not re.search(r"\b[FDH]FMA\b|\.FTZ\b|\b(?:FADD|FMUL|DADD|DMUL|F2F\S*|F2FP\S*)\.(?:RZ|RM|RP)\b", code)
    return found


SELECTS = {"selp.f32", "selp.f64"}
SQUARES = {"cvt.f64.f32", "sub.rn.f64", "mul.rn.f64", "add.rn.f64"}
CASTS = {
    "float32": set(),
    "bfloat16": {"cvt.rn.bf16x2.f32", "cvt.rn.bf16.f32"},
    "float16": {"cvt.rn.f16x2.f32", "cvt.rn.f16.f32"},
}
COUNT = 4096
PER_THREAD = launch.BLOCK // (32 * launch.OPTIONS["num_warps"])
PER_THREAD_TILE = launch.TILE[0] * launch.TILE[1] // (32 * launch.OPTIONS["num_warps"])
KEYS = torch.zeros(6, dtype=torch.uint32)
Q = torch.zeros(3, dtype=torch.int32)


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("rademacher", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_perturb_compiled(dtype: str, rademacher: bool, capability: int, launches: Any, tmp_path: Path) -> None:
    launch.perturb_into(
        torch.empty(COUNT, dtype=DTYPES[dtype]), torch.zeros(COUNT), 5, (1, 2**32 - 1), -1e-3, rademacher
    )
    (call,) = launches["perturb"].calls
    kernel = compiled(launches["perturb"].kernel, *call, capability)
    found = check_floats(kernel, {"cvt.rn.f32.s32", "mul.rn.f32", "add.rn.f32", *CASTS[dtype]}, tmp_path)
    assert found["mul.rn.f32"] == found["cvt.rn.f32.s32"] == PER_THREAD
    assert found["add.rn.f32"] == 2 * PER_THREAD  # + 0.0 is still there
    casts = sum(found[op] * (2 if "x2" in op else 1) for op in CASTS[dtype])
    assert casts == (0 if dtype == "float32" else PER_THREAD)
    assert found["popc.b32"] == (0 if rademacher else PER_THREAD)  # LLVM knows the bit count when it sees it


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize(("decay", "anchored"), [(0.0, False), (0.5, False), (0.5, True)])
@pytest.mark.parametrize("rademacher", [False, True])
def test_update_compiled(
    rademacher: bool, decay: float, anchored: bool, capability: int, launches: Any, tmp_path: Path
) -> None:
    theta = torch.zeros(COUNT)
    launch.update_into(theta, 5, KEYS.view(3, 2), Q, 1e-9, rademacher, decay, theta if anchored else None)
    (call,) = launches["update"].calls
    kernel = compiled(launches["update"].kernel, *call, capability)
    check_update(kernel, decay, anchored, PER_THREAD, tmp_path)


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize(("decay", "anchored"), [(0.0, False), (0.5, False), (0.5, True)])
def test_update_lowrank_compiled(decay: float, anchored: bool, capability: int, launches: Any, tmp_path: Path) -> None:
    theta, rows = torch.zeros(64 * 128), launch.Rows(64, 128, 0, 1, 0, 64)
    keys = torch.zeros(12, dtype=torch.uint32)
    launch.update_lowrank_into(theta, rows, 2, keys, Q, 1e-9, False, decay, theta if anchored else None)
    (call,) = launches["update_lowrank"].calls
    kernel = compiled(launches["update_lowrank"].kernel, *call, capability)
    check_update(kernel, decay, anchored, PER_THREAD_TILE, tmp_path)


def check_update(kernel: Any, decay: float, anchored: bool, per_thread: int, tmp_path: Path) -> None:
    """theta: product and sum in float64, one rounding; decay: every operation an instruction of its own."""
    decays = {"mul.rn.f32", "sub.rn.f32"} if decay else set()
    found = check_floats(kernel, {"cvt.rn.f64.s32", "cvt.rn.f32.f64", *SQUARES, *SELECTS, *decays}, tmp_path)
    assert found["cvt.rn.f64.s32"] == found["cvt.rn.f32.f64"] == per_thread
    assert found["mul.rn.f64"] == 3 * per_thread  # a * acc, and two squares
    assert found["add.rn.f64"] >= per_thread
    assert found["selp.f32"] >= per_thread  # where acc is 0 theta keeps its bits
    assert found["mul.rn.f32"] == (per_thread if decay else 0)
    assert found["sub.rn.f32"] == (per_thread * (2 if anchored else 1) if decay else 0)


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_perturb_lowrank_compiled(dtype: str, capability: int, launches: Any, tmp_path: Path) -> None:
    theta, rows = torch.zeros(64 * 128), launch.Rows(64, 128, 0, 1, 0, 64)
    launch.perturb_lowrank_into(theta.to(DTYPES[dtype]), theta, rows, 2, (1, 2, 3, 4), -1, 1e-3, False)
    (call,) = launches["perturb_lowrank"].calls
    kernel = compiled(launches["perturb_lowrank"].kernel, *call, capability)
    product = {"cvt.f64.f32", "cvt.rn.f64.s32", "mul.rn.f64", "add.rn.f64", "cvt.rn.f32.f64"}
    found = check_floats(kernel, product | CASTS[dtype], tmp_path)
    assert {op: found[op] for op in product} == dict.fromkeys(product, PER_THREAD_TILE)


@pytest.mark.parametrize("capability", TARGETS)
def test_checksum_compiled(capability: int, launches: Any, tmp_path: Path) -> None:
    launch.checksum_of(torch.zeros(COUNT), 5)
    (call,) = launches["checksum"].calls
    check_floats(compiled(launches["checksum"].kernel, *call, capability), set(), tmp_path)


def test_indices_past_two_to_the_31_compile(launches: Any) -> None:
    """Counts and offsets that need 64 bits; memory of that size is only named, not touched."""
    theta = torch.empty(2**31 + 16, dtype=torch.float32, device="meta")
    theta_like = torch.empty(0)
    launch.perturb_into(theta, theta, 0, (1, 2), 1e-3, False)
    ((args, options),) = launches["perturb"].calls
    kernel = compiled(launches["perturb"].kernel, (theta_like, theta_like, *args[2:]), options, 90)
    assert "count: i64" in kernel.asm["ttir"] or "%count: i64" in kernel.asm["ttir"]


def test_extents_of_one_compile(launches: Any) -> None:
    """Triton turns a 1 into a constant, which lacks some of a tensor's methods."""
    one, rows, keys = torch.zeros(1), launch.Rows(1, 1, 0, 1, 0, 1), torch.zeros(4, dtype=torch.uint32)
    launch.perturb_into(one, one, 0, (1, 2), 1e-3, False)
    launch.update_into(one, 0, keys[:2], Q[:1], 1e-9, False, 0.0, None)
    launch.checksum_of(one, 0)
    launch.perturb_lowrank_into(one, one, rows, 1, (1, 2, 3, 4), 1, 1e-3, False)
    launch.update_lowrank_into(one, rows, 1, keys, Q[:1], 1e-9, False, 0.5, one)
    for recorded in launches.values():
        compiled(recorded.kernel, *recorded.calls[0], 90)


def test_a_contraction_would_be_seen(launches: Any, tmp_path: Path) -> None:
    """The same kernel, compiled with contraction, fails the check: it looks where it should."""
    theta = torch.zeros(COUNT)
    launch.update_into(theta, 5, KEYS.view(3, 2), Q, 1e-9, False, 0.5, theta)
    ((args, options),) = launches["update"].calls
    fused = compiled(launches["update"].kernel, args, {**options, "enable_fp_fusion": True}, 90)
    with pytest.raises(AssertionError):
        check_update(fused, 0.5, True, PER_THREAD, tmp_path)
    assert re.search(r"\bFFMA\b", machine_code(fused, tmp_path))


class SimulatedLane:
    """A CUDA stream in miniature: work waits in a queue until a scheduler that owes it nothing runs it."""

    def __init__(self, lanes: list[SimulatedLane]) -> None:
        self.queue: list[tuple[Callable[[], object], list[bool] | None, list[bool]]] = []
        self.lanes = lanes
        lanes.append(self)

    def run(self, work: Callable[[], object], after: list[bool] | None = None) -> list[bool]:
        done = [False]
        self.queue.append((work, after, done))
        return done

    def wait(self) -> None:
        while self.queue:
            step(self.lanes, random)


def step(lanes: list[SimulatedLane], chooser: Any) -> None:
    """Run the head of one lane, of those that are free to go on."""
    ready = [lane for lane in lanes if lane.queue and (lane.queue[0][1] is None or lane.queue[0][1][0])]
    work, _, done = chooser.choice(ready).queue.pop(0)
    work()
    done[0] = True


@pytest.mark.parametrize("seed", range(30))
def test_staging_is_right_whatever_order_the_streams_run_in(seed: int) -> None:
    """Sums and updates of many parts through the ring, its copies and its work delayed at random."""
    random.seed(seed)
    lanes: list[SimulatedLane] = []
    staging = Staging(torch.device("cpu"), 4, [SimulatedLane(lanes) for _ in range(3)])
    host = torch.arange(40.0)
    seen: list[float] = []
    for round_ in range(3):
        for start in range(0, 40, 4):
            part = host[start : start + 4 - (start == 36)]
            if round_ == 1:
                staging.run(part, lambda stage: stage.mul_(2), write_back=True)
            else:
                staging.run(part, lambda stage: seen.append(float(stage.sum())), write_back=False)
            for _ in range(random.randrange(4)):
                if any(lane.queue for lane in lanes):
                    step(lanes, random)
        if round_ == 1:
            staging.wait()
            assert host.tolist() == [2.0 * i if i != 39 else 39.0 for i in range(40)]
    for lane in lanes:
        lane.wait()
    sums = [float(sum(range(start, start + 4 - (start == 36)))) for start in range(0, 40, 4)]
    assert seen == sums + [2 * value for value in sums]


def test_staging_without_its_events_would_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulation finds a race where there is one."""
    monkeypatch.setattr(SimulatedLane, "run", lambda self, work, after=None: self.queue.append((work, None, [False])))
    failures = 0
    for seed in range(30):
        try:
            test_staging_is_right_whatever_order_the_streams_run_in(seed)
        except AssertionError:
            failures += 1
    assert failures > 20


@pytest.mark.parametrize("most", [None, 4, 64, 1 << 10])
@pytest.mark.parametrize(
    ("shape", "lowrank"),
    [((), False), ((0, 3), False), ((100,), False), ((7, 9), True), ((3, 5, 6), True), ((40, 3, 2), True),
     ((0, 4), True), ((4, 0), True), ((0, 4, 4), True)],
)  # fmt: skip
def test_parts_cover_a_parameter_once(shape: tuple[int, ...], lowrank: bool, most: int | None) -> None:
    spec = ParameterSpec("w", shape, True, lowrank)
    covered = np.zeros(int(np.prod(shape)), dtype=np.int64)
    for part in parts(spec, most):
        covered[part.span] += 1
        assert part.count > 0 and (most is None or part.count <= max(most, shape[-1] if lowrank else 0))
        if part.rows is not None:
            assert (part.rows.matrices == 1) or (part.rows.row0 == 0 and part.rows.rows == shape[-2])
    assert (covered == 1).all()
    assert SLOTS >= 2


def test_parts_do_not_cross_a_key_block() -> None:
    spec = ParameterSpec("w", (2**32 + 5,), True)
    assert [(p.start, p.count, p.key_name) for p in parts(spec)] == [(0, 2**32, "w"), (2**32, 5, "w#1")]
    staged = list(parts(spec, gpu_theta.STAGE))
    assert len(staged) == 257 and staged[255].key_name == "w" and staged[256].key_name == "w#1"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_without_a_gpu_says_so() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "no GPU" in done.stderr
