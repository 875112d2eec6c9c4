"""Times the noise kernels on the parameters of a 135 M language model against the paper's loop of ``torch.randn``.

    python benchmarks/kernels.py                # about 2 minutes, needs 2 GiB of memory and no download

The arrays have SmolLM2-135M's shapes and random values. All variants run in one process, in turns, on all cores. Every
repetition is in `benchmarks/results/kernels.json`; ratios are those of medians. On x86 a second process repeats the
measurement with code of numba and torch for AVX2 only (``"avx2"`` in the result).

For each member the paper's loop adds sigma times the noise to the weights, draws the same noise again to subtract it,
and once more for the member's share of the update. estune writes the member's weights from theta (`HostTheta.perturb`)
and takes a 30th of an update of 30 members. The roof of `HostTheta.perturb` is the slower of its two necessary parts: a
float32 copy of the weights (the faster of numba on the same threads and torch), and drawing the noise without writing
it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numba import njit
from record import write_result

from estune.environment import cores
from estune.es.noise import perturbation_scale
from estune.es.noise.cpu import TILE
from estune.es.noise.lanes import LANES, sum_lanes
from estune.es.theta import PIECE, HostTheta
from estune.es.types import Member, Noise, ParameterSpec, Perturbation
from estune.es.update import make_update

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE = 49152, 576, 30, 9, 3, 1536  # SmolLM2-135M, output head tied
# numba's names for the features of a Haswell processor, without AVX-512
AVX2 = "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+popcnt,+sse,+sse2,+sse3,+sse4.1,+sse4.2,+ssse3"
MEMBERS = 30
SIGMA = 1e-3
# ratio -> its limit
TARGETS = {
    "loop_speedup": (">=", 10.0),  # perturb, restore and update of the paper's loop / estune's perturb and update
    "update_speedup": (">=", 20.0),  # the paper's update / estune's, per member
    "perturb_of_roof": (">=", 0.7),  # seconds of the roof / seconds of perturb
    "member_s": ("<=", 0.15),  # seconds of perturb and update of a member
}


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the stored names and shapes of the model's parameters."""
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    key_value = HIDDEN // HEADS * KV_HEADS
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q", HIDDEN), ("k", key_value), ("v", key_value), ("o", HIDDEN)):
            yield f"{prefix}self_attn.{name}_proj.weight", (rows, HIDDEN)
        yield f"{prefix}mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{prefix}mlp.up_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{prefix}mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)
        yield f"{prefix}input_layernorm.weight", (HIDDEN,)
        yield f"{prefix}post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)


@njit(nogil=True, boundscheck=False)
def copy_into(out, theta):  # type: ignore[no-untyped-def]
    """Copy a float32 piece."""
    for j in range(out.size):
        out[j] = theta[j]


@njit(nogil=True, boundscheck=False)
def draw_noise(count, start, table):  # type: ignore[no-untyped-def]
    """Draw ``count`` noise integers with the hash of the kernels into a tile that stays in the first-level cache."""
    acc = np.empty(TILE, dtype=np.int32)
    total = np.int64(0)
    for lo in range(0, count, TILE):
        for j in range(0, TILE, LANES):
            sum_lanes(acc, j, np.uint32(start + lo + j), table, False)
        total += acc[0]
    return total


def add_noise(weights: list[torch.Tensor], seed: int, factor: float) -> None:
    """Add ``factor`` times a member's noise to the weights as the paper does, with one generator for each parameter."""
    generator = torch.Generator()
    for index, weight in enumerate(weights):
        generator.manual_seed(seed + index)
        weight.add_(torch.randn(weight.shape, generator=generator), alpha=factor)


class Weights:
    """Theta with SmolLM2's shapes, a member's weights beside it, and the calls to time."""

    def __init__(self, num_threads: int) -> None:
        generator = np.random.default_rng(0)
        self.arrays = {name: 0.02 * generator.standard_normal(shape, dtype=np.float32) for name, shape in shapes()}
        specs = [ParameterSpec(name, shape, True) for name, shape in shapes()]
        self.theta = HostTheta(specs, self.arrays, num_threads=num_threads)
        self.live = {name: array.copy() for name, array in self.arrays.items()}  # a member's weights
        self.tensors = [torch.from_numpy(array) for array in self.live.values()]
        self.sources = [torch.from_numpy(array) for array in self.arrays.values()]
        self.members = [Member(1000 + m, 1) for m in range(MEMBERS)]
        self.update = make_update(self.members, generator.standard_normal(MEMBERS).tolist(), SIGMA / 2)
        self.table = np.array([[12345, 678, 1]], dtype=np.uint32)  # one member's key, and a factor of 1
        self.cuts = [
            (name, lo, lo + PIECE) for name, array in self.arrays.items() for lo in range(0, array.size, PIECE)
        ]
        self.flat = {name: (self.live[name].reshape(-1), array.reshape(-1)) for name, array in self.arrays.items()}

    def copy(self, cut: tuple[str, int, int]) -> None:
        """Copy a piece of theta with numba."""
        name, lo, hi = cut
        copy_into(self.flat[name][0][lo:hi], self.flat[name][1][lo:hi])

    def draw(self, cut: tuple[str, int, int]) -> int:
        """Draw the noise of a piece without writing it."""
        name, lo, hi = cut
        return int(draw_noise(min(hi, self.flat[name][0].size) - lo, lo, self.table))

    def perturb(self) -> None:
        """Write the first member's weights."""
        self.theta.perturb_all(Perturbation(self.members[0], Noise(perturbation_scale(SIGMA))), self.live)

    def torch_copy(self) -> None:
        """Copy theta with torch."""
        for weight, source in zip(self.tensors, self.sources, strict=True):
            weight.copy_(source)

    def work(self) -> dict[str, tuple[Callable[[], Any], int]]:
        """Return the calls to time by name, each with the number of members that it serves."""
        share = SIGMA / 2 / MEMBERS
        return {
            "randn_perturb": (lambda: add_noise(self.tensors, 1, SIGMA), 1),
            "randn_restore": (lambda: add_noise(self.tensors, 1, -SIGMA), 1),
            "randn_update": (lambda: add_noise(self.tensors, 1, share), 1),
            "perturb": (self.perturb, 1),
            "update": (lambda: self.theta.apply(self.update), MEMBERS),
            "copy_numba": (lambda: self.theta._run(self.copy, self.cuts), 1),
            "copy_torch": (self.torch_copy, 1),
            "noise": (lambda: self.theta._run(self.draw, self.cuts), 1),
        }


def measure(repetitions: int = 7, num_threads: int | None = None) -> dict[str, Any]:
    """Time all calls ``repetitions`` times in turns, after one warm-up.

    Returns:
        Seconds per member by name, of the clock and of the processors (which depend less on the load of other
        programs), and from the clock's medians the fields of `ratios`.
    """
    num_threads = num_threads or cores()
    torch.set_num_threads(num_threads)
    weights = Weights(num_threads)
    work, size = weights.work(), weights.theta.num_parameters
    seconds: dict[str, list[float]] = {name: [] for name in work}
    processor_seconds: dict[str, list[float]] = {name: [] for name in work}
    for repetition in range(repetitions + 1):
        for name, (function, count) in work.items():
            start, processor_start = time.perf_counter(), time.process_time()
            function()
            if repetition:
                seconds[name].append((time.perf_counter() - start) / count)
                processor_seconds[name].append((time.process_time() - processor_start) / count)
    return {
        "num_threads": num_threads,
        "parameters": size,
        "seconds_per_member": seconds,
        "processor_seconds_per_member": processor_seconds,
        **ratios(seconds, size),
    }


def ratios(seconds: dict[str, list[float]], size: int) -> dict[str, Any]:
    """Return medians in seconds, rates in G parameters/s and GB/s, and the ratios of `TARGETS`.

    Args:
        seconds: per member, all repetitions by name.
        size: number of parameters.
    """
    median = {name: statistics.median(values) for name, values in seconds.items()}
    copy = min(median["copy_numba"], median["copy_torch"])
    member = median["perturb"] + median["update"]
    moved = {"perturb": 8, "copy_numba": 8, "copy_torch": 8}  # bytes read and written for each parameter
    return {
        "median_s": median,
        "giga_parameters_per_s": {name: size / value / 1e9 for name, value in median.items()},
        "gigabytes_per_s": {name: size * count / median[name] / 1e9 for name, count in moved.items()},
        "ratios": {
            "loop_speedup": sum(median[f"randn_{part}"] for part in ("perturb", "restore", "update")) / member,
            "update_speedup": median["randn_update"] / median["update"],
            "perturb_of_roof": max(copy, median["noise"]) / median["perturb"],
            "member_s": member,
        },
    }


def measure_avx2(repetitions: int) -> dict[str, Any]:
    """Measure in a child process with kernels compiled for AVX2 without AVX-512; this needs an x86 processor."""
    with tempfile.TemporaryDirectory() as cache:
        target = {
            "NUMBA_CPU_NAME": "haswell",
            "ATEN_CPU_CAPABILITY": "avx2",
            "NUMBA_CPU_FEATURES": AVX2,
            "NUMBA_CACHE_DIR": cache,
        }
        command = [sys.executable, __file__, "--json", "--repetitions", str(repetitions)]
        output = subprocess.run(command, env=os.environ | target, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def show(title: str, result: dict[str, Any]) -> bool:
    """Print one measurement as a table; return whether it meets all targets."""
    print(f"{title}: {result['parameters'] / 1e6:.1f} M parameters, {result['num_threads']} threads")
    for name, values in result["seconds_per_member"].items():
        rate, bandwidth = result["giga_parameters_per_s"][name], result["gigabytes_per_s"].get(name)
        processor = statistics.median(result["processor_seconds_per_member"][name])
        print(
            f"  {name:14s} {result['median_s'][name]:8.4f} s ({processor:.4f} s of processors)  {rate:6.2f} G/s"
            + (f"  {bandwidth:5.1f} GB/s" if bandwidth else "           ")
            + "   runs "
            + " ".join(f"{value:.4f}" for value in values)
        )
    met = True
    for name, (sense, limit) in TARGETS.items():
        value = result["ratios"][name]
        good = value >= limit if sense == ">=" else value <= limit
        met &= good
        print(f"  {name:16s} {value:8.3f}  target {sense} {limit:g}{'' if good else '  MISSED'}")
    return met


def main() -> int:
    """Measure, print and write the result; return 1 if a target is missed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="measure in this process only, print JSON, write no file")
    options = parser.parse_args()
    result = measure(options.repetitions)
    if options.json:
        print(json.dumps(result))
        return 0
    met = show("this processor", result)
    if "x86" in os.uname().machine:
        result["avx2"] = measure_avx2(options.repetitions)
        met &= show("AVX2 code on it", result["avx2"])
    path = write_result("kernels", {"targets": TARGETS, **result})
    print(f"written to {path}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
