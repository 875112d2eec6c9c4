"""Compares the training gain of low-rank noise and of `torch.randn` noise with that of full-rank noise.

    python benchmarks/equivalence.py               # about 25 minutes on two cores

The embedded model is trained on Countdown with the `demo` preset (25 steps of 30 members and 16 problems, so equal
evaluations). There are three variants with five seeds each: full-rank noise of version 1, low-rank noise of rank 1, and
full-rank noise drawn by `torch.randn`. All else is equal. Each model is evaluated on the same 2000 held-out test
problems. The result is the mean difference to full-rank noise, paired by seed, with its 95 % t-interval, and whether
the interval lies within plus or minus five points. All runs end near the same accuracy, that of the model when made to
think, so the models are also compared half way, after 10 steps. The result is written to
`benchmarks/results/equivalence.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from record import write_result
from scipy import stats

from estune.es.theta import HostTheta, Moved

VARIANTS = {"full": ["--noise", "full"], "lowrank": ["--noise", "lowrank"], "randn": ["--noise", "full"]}
WITHIN = 5.0  # percentage points
HALF_WAY, END = 10, 25  # steps


class RandnTheta(HostTheta):
    """Theta with float32 noise from torch's generator; everything else is as in `HostTheta`."""

    def _noise(self, seed: int, name: str) -> np.ndarray:
        import torch

        index = list(self.arrays).index(name)
        generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % (1 << 63))
        return torch.randn(self.arrays[name].shape, generator=generator).numpy()

    def perturb(self, name: str, perturbation: Any, out: np.ndarray | None = None) -> np.ndarray:
        """See `HostTheta.perturb`."""
        written = super().perturb(name, None, out)
        if perturbation is not None and self._spec[name].perturbed:
            scale = np.float32(perturbation.noise.scale * np.sqrt(8.0) * perturbation.member.sign)
            written += scale * self._noise(perturbation.member.seed, name).reshape(written.shape)
        return written

    def perturb_all(self, perturbation: Any, outs: Any) -> None:
        """See `HostTheta.perturb_all`."""
        for name, out in outs.items():
            self.perturb(name, perturbation, out)

    def apply(self, update: Any, anchor: Any = None) -> Moved:
        """See `HostTheta.apply`."""
        for spec in self.specs:
            if spec.perturbed:
                total = np.zeros(spec.shape, dtype=np.float64)
                for member, q in zip(update.members, update.q, strict=True):
                    total += (q * member.sign) * self._noise(member.seed, spec.name).astype(np.float64)
                self.arrays[spec.name] += (update.a * np.sqrt(8.0) * total).astype(np.float32)
        self.version += 1
        return Moved(tuple(self.specs), self.sums())


def child(variant: str, options: list[str]) -> int:
    """Run `estune train` in this process with the variant's noise; return the exit status."""
    from estune import cli
    from estune.engines.hf import loading

    if variant == "randn":
        loading.HostTheta = RandnTheta  # type: ignore[misc]
    return cli.main(options)


def run_one(variant: str, seed: int, directory: Path) -> dict[str, Any]:
    """Train one model; evaluate it on the test problems half way and at the end."""
    output = directory / f"{variant}-{seed}"
    train = [
        "train",
        "--config",
        "demo",
        "--seed",
        str(seed),
        "--output_dir",
        str(output),
        "--step_control",
        "none",
        "--eval_steps",
        "0",
        "--report_to",
        "none",
        "--save_steps",
        str(HALF_WAY),
        *VARIANTS[variant],
    ]
    started = time.perf_counter()
    subprocess.run([sys.executable, __file__, "--child", variant, *train], check=True, stdout=subprocess.DEVNULL)
    result: dict[str, Any] = {"variant": variant, "seed": seed, "train_s": time.perf_counter() - started}
    for steps, model in ((HALF_WAY, output / f"checkpoint-{HALF_WAY}"), (END, output)):
        evaluate = [sys.executable, "-m", "estune", "evaluate", "--model", str(model), "--json"]
        summary = json.loads(subprocess.run(evaluate, check=True, capture_output=True, text=True).stdout)
        result[f"accuracy_{steps}"], result["n"] = summary["accuracy"], summary["n"]
    print(
        f"{variant:8} seed {seed}: {result[f'accuracy_{HALF_WAY}']:.2%} after {HALF_WAY} steps, "
        f"{result[f'accuracy_{END}']:.2%} after {END}, {result['train_s']:.0f} s",
        flush=True,
    )
    return result


def difference(runs: list[dict[str, Any]], variant: str, steps: int) -> dict[str, Any]:
    """Return the mean of (variant - full) over seeds in points, with its 95 % interval (paired, Student's t)."""
    accuracy = {(run["variant"], run["seed"]): 100 * run[f"accuracy_{steps}"] for run in runs}
    seeds = sorted({run["seed"] for run in runs})
    values = [accuracy[variant, seed] - accuracy["full", seed] for seed in seeds]
    mean = statistics.mean(values)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    low, high = mean - half, mean + half
    return {"points": mean, "interval95": [low, high], "equivalent": low >= -WITHIN and high <= WITHIN}


def main() -> int:
    """Run all variants and seeds, print and write the result."""
    if len(sys.argv) > 1 and sys.argv[1] == "--child":
        return child(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, with one thread each")
    options = parser.parse_args()
    jobs = [(variant, seed) for seed in range(options.seeds) for variant in VARIANTS]
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(options.jobs) as pool:
        runs = list(pool.map(lambda job: run_one(*job, Path(directory)), jobs))
    result: dict[str, Any] = {"runs": runs, "within_points": WITHIN}
    for variant in ("lowrank", "randn"):
        result[variant] = {}
        for steps in (HALF_WAY, END):
            result[variant][str(steps)] = change = difference(runs, variant, steps)
            low, high = change["interval95"]
            verdict = "within" if change["equivalent"] else "not shown to be within"
            print(
                f"{variant} - full after {steps} steps: {change['points']:+.2f} points, 95 % interval {low:+.2f} to "
                f"{high:+.2f}: {verdict} {WITHIN:g} points"
            )
    write_result("equivalence", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
