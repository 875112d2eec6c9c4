"""Measures members and updates on a GPU, compared with a memory copy and with `torch.randn`.

    python benchmarks/gpu.py                       # needs an NVIDIA GPU, triton, and 6 GiB of GPU memory

First every kernel is compared with its CPU kernel, bit for bit, and so are a large member and a large update. Then each
line is the median of several runs, in turns with the lines beside it, as elements of theta per second and as a ratio.
The result is written to `benchmarks/results/gpu.json`. Exit status 1: a bit differs; 2: there is no GPU to measure.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from estune.es.noise import cpu, factor_names, noise_key, perturbation_scale
from estune.es.population import members_for_step
from estune.es.theta import HostTheta
from estune.es.types import Member, Noise, ParameterSpec, Perturbation
from estune.es.update import Update, make_update

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIGMA, LEARNING_RATE = 1e-3, 5e-4
COLUMNS = 4096  # of theta as a matrix, for low-rank noise


def measure(work: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Run all functions in turns, ``repeats`` times after one warm-up; return milliseconds on the device by name."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name, run in work.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            if repeat:
                times[name].append(begin.elapsed_time(end))
    return times


def report(title: str, times: Mapping[str, list[float]], elements: int) -> dict[str, Any]:
    """Print a comparison, with ratios to its first line; return medians and all times in milliseconds."""
    print(title)
    medians = {name: statistics.median(values) for name, values in times.items()}
    first = next(iter(medians.values()))
    for name, value in medians.items():
        print(f"  {name:44s} {value:9.3f} ms  {elements / value / 1e6:8.2f} G elements/s  {value / first:6.2f}")
    return {name: {"median_ms": medians[name], "runs_ms": values} for name, values in times.items()}


@dataclass(frozen=True)
class Problem:
    """A random theta of n elements in host and device memory, N members, and their update."""

    device: torch.device
    host: np.ndarray  # (n,)
    theta: torch.Tensor  # (n,), on the device
    members: list[Member]
    update: Update
    scale: float  # of the noise

    @classmethod
    def make(cls, device: torch.device, n: int, n_members: int) -> Problem:
        """Return a problem of ``n`` elements and ``n_members`` members."""
        host = np.random.default_rng(0).standard_normal(n, dtype=np.float32) * np.float32(0.02)
        members = members_for_step(0, 0, n_members, antithetic=False)
        update = make_update(members, np.linspace(-1.7, 1.7, n_members).tolist(), LEARNING_RATE)
        theta = torch.from_numpy(host).to(device)
        return cls(device, host, theta, members, update, perturbation_scale(SIGMA))

    @property
    def keys(self) -> np.ndarray:
        """The noise keys of all members, uint32 (N, 2)."""
        return np.array([noise_key(member.seed, "w") for member in self.members], dtype=np.uint32)

    @property
    def q(self) -> np.ndarray:
        """The integer utilities, int32 (N,)."""
        return np.array(self.update.q, dtype=np.int32)


def differences(problem: Problem) -> list[str]:
    """Return what a large member and a large update compute differently on the device and on the CPU."""
    from estune.gpu import launch

    host, theta, update, n = problem.host, problem.theta, problem.update, problem.host.size
    keys, q, wrong = problem.keys, problem.q, []
    k0, k1 = keys[0]
    expected, out = np.empty_like(host), torch.empty_like(theta)

    def equal() -> bool:
        return torch.equal(out.cpu().view(torch.int32), torch.from_numpy(expected).view(torch.int32))

    cpu.perturb_into(expected, host, 0, k0, k1, np.float32(problem.scale), False)
    launch.perturb_into(out, theta, 0, (int(k0), int(k1)), problem.scale, False)
    if not equal():
        wrong.append(f"a member of {n} elements")
    np.copyto(expected, host)
    total, _, _ = cpu.update_into(expected, 0, keys, q, update.a, False, np.float32(0), np.empty(0, np.float32))
    out.copy_(theta)
    device_keys, device_q = launch.words(keys, problem.device), torch.from_numpy(q).to(problem.device)
    sums = launch.update_into(out, 0, device_keys, device_q, update.a, False, 0.0, None)
    if int(sums.checksum) % 2**64 != int(total) or not equal():
        wrong.append(f"an update of {n} elements")
    return wrong


def factor_keys(problem: Problem) -> np.ndarray:
    """Return the noise keys of all members' low-rank factors, uint32 (N, 4)."""
    keys = [[noise_key(member.seed, name) for name in factor_names("w")] for member in problem.members]
    return np.array(keys, dtype=np.uint32).reshape(len(keys), 4)


def matrix_rows(problem: Problem) -> Any:
    """Return theta as a matrix with `COLUMNS` columns, in the form that the low-rank kernels take."""
    from estune.gpu import launch

    n_rows = problem.host.size // COLUMNS
    return launch.Rows(n_rows, COLUMNS, 0, 1, 0, n_rows)


def time_member(problem: Problem, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Time one member in a dtype: a copy of theta, `torch.randn`, full noise, low-rank noise."""
    from estune.gpu import launch

    theta, scale, n = problem.theta, problem.scale, problem.host.size
    target = torch.empty(n, dtype=dtype, device=problem.device)
    key = (int(problem.keys[0, 0]), int(problem.keys[0, 1]))
    pair = [int(word) for word in factor_keys(problem)[0]]
    rows = matrix_rows(problem)

    def randn() -> None:
        target.copy_(torch.randn(n, device=problem.device).mul_(SIGMA).add_(theta))

    work: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(theta),
        "torch.randn, add, cast": randn,
        "member": lambda: launch.perturb_into(target, theta, 0, key, scale, False),
        "low-rank member, rank 1": lambda: launch.perturb_lowrank_into(target, theta, rows, 1, pair, 1, 1e-4, False),
    }
    return report(f"one member, {str(dtype).removeprefix('torch.')}", measure(work, repeats), n)


def time_update(problem: Problem, repeats: int) -> dict[str, Any]:
    """Time the update of all members: a copy of theta, `torch.randn`, full noise, low-rank noise."""
    from estune.gpu import launch

    theta, update, device = problem.theta, problem.update, problem.device
    moved, noise = theta.clone(), torch.empty_like(theta)
    keys, q = launch.words(problem.keys, device), torch.from_numpy(problem.q).to(device)
    factors, rows = launch.words(factor_keys(problem), device), matrix_rows(problem)

    def randn() -> None:
        for weight in update.q:
            moved.add_(noise.normal_(), alpha=1e-9 * weight)

    def lowrank() -> None:
        launch.update_lowrank_into(moved, rows, 1, factors, q, update.a, False, 0.0, None)

    work: dict[str, Callable[[], object]] = {
        "copy": lambda: moved.copy_(theta),
        "torch.randn, add per member": randn,
        "update": lambda: launch.update_into(moved, 0, keys, q, update.a, False, 0.0, None),
        "low-rank update, rank 1": lowrank,
    }
    return report(f"update of {len(problem.members)} members", measure(work, repeats), problem.host.size)


def time_streaming(problem: Problem, repeats: int) -> dict[str, Any]:
    """Time a member and an update with theta on the device and with theta streamed from pinned host memory."""
    from estune.gpu.theta import DeviceTheta

    n = problem.host.size
    spec = ParameterSpec("w", (n,), True)
    perturbation = Perturbation(problem.members[0], Noise(problem.scale))
    member = torch.empty(n, dtype=torch.bfloat16, device=problem.device)
    pinned = torch.from_numpy(problem.host).pin_memory()
    work: dict[str, Callable[[], object]] = {
        "copy up from pinned memory": lambda: problem.theta.copy_(pinned, non_blocking=True)
    }
    for kind, resident in (("resident", True), ("streamed", False)):
        theta = DeviceTheta(HostTheta([spec], {"w": problem.host.copy()}), problem.device, resident=resident)
        work[f"{kind} master, member"] = partial(theta.perturb_into, "w", perturbation, member)
        work[f"{kind} master, update"] = partial(theta.apply, problem.update)
    return report("theta on the device and on the host", measure(work, repeats), n)


def main() -> int:
    """Compare the bits, measure, print and write the result; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 28, help=f"of theta; a multiple of {COLUMNS}")
    parser.add_argument("--members", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    if not torch.cuda.is_available() or find_spec("triton") is None:
        print("benchmarks/gpu.py: there is no GPU with triton to measure", file=sys.stderr)
        return 2

    from record import write_result

    from estune.gpu import check

    device = torch.device("cuda", torch.cuda.current_device())
    fewer = max(3, options.repeats // 3)  # repeats of slow measurements
    name = torch.cuda.get_device_name(device)
    problem = Problem.make(device, options.elements, options.members)
    wrong = [*check.check(device, ("normal", "rademacher")), *differences(problem)]
    print(f"{name}: {wrong or 'all bits equal the CPU kernels'}")
    results: dict[str, Any] = {"gpu": name, "elements": options.elements, "members": options.members, "differs": wrong}
    for dtype in DTYPES:
        results[f"perturb_{str(dtype).removeprefix('torch.')}"] = time_member(problem, dtype, options.repeats)
    results["update"] = time_update(problem, fewer)
    results["master"] = time_streaming(problem, fewer)
    print(f"written to {write_result('gpu', results)}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
