"""Members and updates on a GPU, beside a copy and beside `torch.randn`.

    python benchmarks/launch.py                    # needs an NVIDIA GPU, triton, and 6 GiB of its memory

First every kernel is compared with the CPU's, to the bit, and one large member and update too. Then each line is the
median of several runs, the compared ones in turns, as elements (of theta) per second and as a ratio. The result goes
to `benchmarks/results/launch.json`. Exit status 1: a bit differs; 2: there is no GPU to measure.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def measure(work: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Run each work in turns, ``repeats`` times after one to warm up; return milliseconds on the device."""
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
    """Print a comparison, its first line the one that ratios refer to; return it as plain values."""
    print(title)
    medians = {name: statistics.median(values) for name, values in times.items()}
    first = next(iter(medians.values()))
    for name, value in medians.items():
        print(f"  {name:44s} {value:9.3f} ms  {elements / value / 1e6:8.2f} G elements/s  {value / first:6.2f}")
    return {name: {"median_ms": medians[name], "runs_ms": values} for name, values in times.items()}


def main() -> int:
    """Check, measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 28, help="of theta; a multiple of 4096")
    parser.add_argument("--members", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    if not torch.cuda.is_available() or find_spec("triton") is None:
        print("benchmarks/launch.py: no GPU with triton is there to measure", file=sys.stderr)
        return 2

    from record import write_result

    from estune.es.noise import cpu, factor_names, noise_key, perturbation_scale
    from estune.es.population import members_for_step
    from estune.es.theta import HostTheta
    from estune.es.types import Noise, ParameterSpec, Perturbation
    from estune.es.update import make_update
    from estune.gpu import check, launch
    from estune.gpu.theta import DeviceTheta

    device = torch.device("cuda", torch.cuda.current_device())
    wrong = check.check(device, ("normal", "rademacher"))
    n, n_members, scale = options.elements, options.members, perturbation_scale(1e-3)
    host = np.random.default_rng(0).standard_normal(n, dtype=np.float32) * np.float32(0.02)
    theta = torch.from_numpy(host).to(device)
    members = members_for_step(0, 0, n_members, antithetic=False)
    update = make_update(members, np.linspace(-1.7, 1.7, n_members).tolist(), 5e-4)
    keys = np.array([noise_key(member.seed, "w") for member in members], dtype=np.uint32)
    q = np.array(update.q, dtype=np.int32)
    k0, k1 = noise_key(members[0].seed, "w")

    expected, out = np.empty_like(host), torch.empty_like(theta)
    cpu.perturb_into(expected, host, 0, np.uint32(k0), np.uint32(k1), np.float32(scale), False)
    launch.perturb_into(out, theta, 0, (k0, k1), scale, False)
    if not torch.equal(out.cpu().view(torch.int32), torch.from_numpy(expected).view(torch.int32)):
        wrong.append(f"a member of {n} elements")
    np.copyto(expected, host)
    total, _, _ = cpu.update_into(expected, 0, keys, q, update.a, False, np.float32(0), np.empty(0, np.float32))
    device_keys, device_q = launch.words(keys, device), torch.from_numpy(q).to(device)
    out.copy_(theta)
    sums = launch.update_into(out, 0, device_keys, device_q, update.a, False, 0.0, None)
    if int(sums.checksum) % 2**64 != int(total) or not torch.equal(
        out.cpu().view(torch.int32), torch.from_numpy(expected).view(torch.int32)
    ):
        wrong.append(f"an update of {n} elements")
    print(f"{torch.cuda.get_device_name(device)}: {wrong or 'all bits equal the CPU kernels'}")
    del expected, out
    results: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(device),
        "elements": n,
        "members": n_members,
        "differs": wrong,
    }

    d1 = 4096
    rows = launch.Rows(n // d1, d1, 0, 1, 0, n // d1)
    factors = np.array([[noise_key(m.seed, name) for name in factor_names("w")] for m in members], dtype=np.uint32)
    pair = [int(word) for word in factors[0].reshape(-1)]
    for dtype in DTYPES:
        target = torch.empty(n, dtype=dtype, device=device)

        def randn(target: torch.Tensor = target) -> None:
            target.copy_(torch.randn(n, device=device).mul_(1e-3).add_(theta))

        def perturb(target: torch.Tensor = target) -> None:
            launch.perturb_into(target, theta, 0, (k0, k1), scale, False)

        def lowrank(target: torch.Tensor = target) -> None:
            launch.perturb_lowrank_into(target, theta, rows, 1, pair, 1, 1e-4, False)

        work = {
            "copy": lambda target=target: target.copy_(theta),
            "torch.randn, add, cast": randn,
            "member": perturb,
            "low-rank member, rank 1": lowrank,
        }
        name = str(dtype).removeprefix("torch.")
        results[f"perturb_{name}"] = report(f"one member, {name}", measure(work, options.repeats), n)
        del target

    moved, noise = theta.clone(), torch.empty_like(theta)

    def randn_update() -> None:
        for weight in update.q:
            moved.add_(noise.normal_(), alpha=1e-9 * weight)

    flat_factors = launch.words(factors.reshape(n_members, 4), device)
    work = {
        "copy": lambda: moved.copy_(theta),
        "torch.randn, add per member": randn_update,
        "update": lambda: launch.update_into(moved, 0, device_keys, device_q, update.a, False, 0.0, None),
        "low-rank update, rank 1": lambda: launch.update_lowrank_into(
            moved, rows, 1, flat_factors, device_q, update.a, False, 0.0, None
        ),
    }
    results["update"] = report(f"update of {n_members} members", measure(work, max(3, options.repeats // 3)), n)

    spec = ParameterSpec("w", (n,), True)
    perturbation = Perturbation(members[0], Noise(scale))
    member = torch.empty(n, dtype=torch.bfloat16, device=device)
    pinned = torch.from_numpy(host).pin_memory()
    work = {"copy up from pinned memory": lambda: theta.copy_(pinned, non_blocking=True)}
    for kind, resident in (("resident", True), ("streamed", False)):
        master = DeviceTheta(HostTheta([spec], {"w": host.copy()}), device, resident=resident)
        work[f"{kind} master, member"] = lambda master=master: master.perturb_into("w", perturbation, member)
        work[f"{kind} master, update"] = lambda master=master: master.apply(update)
    results["master"] = report("master on the device and on the host", measure(work, max(3, options.repeats // 3)), n)
    print(f"written: {write_result('gpu', results)}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
