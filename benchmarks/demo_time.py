"""Measures the demo's gain in 90 seconds: held-out accuracy against time, with full-rank and low-rank members.

    python benchmarks/demo_time.py                  # about 15 minutes on 2 cores

For each kind of noise and seed, `estune train --config demo` runs with more steps than fit into the limit. SIGINT stops
it 90 seconds after the start of the process, so imports, loading and held-out evaluations are included. It then saves a
checkpoint, which is evaluated on all 2000 test problems. The result is written to `benchmarks/results/demo_time.json`,
and the curves (accuracy on the 200 validation rows against seconds of steps) to `docs/images/demo_time.png`.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import write_result

ROOT = Path(__file__).resolve().parents[1]
ESTUNE = [sys.executable, "-m", "estune"]
LIMIT_S = 90.0
STEPS = 400  # more than fit into the limit; the preset's schedules are constant, so the number changes nothing else
NOISES = ("full", "lowrank")


def accuracy(model: str) -> dict[str, Any]:
    """Return the JSON of `estune evaluate` for a model on the whole test split, decoded as in the demo."""
    command = [*ESTUNE, "evaluate", "--model", model, "--task", "countdown", "--split", "test", "--json",
               "--max_completion_length", "48"]  # fmt: skip
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    del result["model"]  # a temporary path
    return result


def curve(run: Path) -> list[tuple[int, float, float]]:
    """Return (step, seconds of steps so far, held-out accuracy) of every evaluation."""
    seconds, points = 0.0, []
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        seconds += record.get("step_time", 0.0)
        if "eval_accuracy" in record:
            points.append((record["step"], seconds, record["eval_accuracy"]))
    return points


def one_run(noise: str, seed: int, run: Path) -> dict[str, Any]:
    """Train until the time limit and evaluate the checkpoint saved then.

    Raises:
        RuntimeError: the training process failed.
    """
    command = [*ESTUNE, "train", "--config", "demo", "--noise", noise, "--seed", str(seed), "--output_dir", str(run),
               "--max_steps", str(STEPS), "--report_to", "none"]  # fmt: skip
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.wait()
    seconds = time.monotonic() - started
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")
    checkpoint = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    steps = int(checkpoint.name.rpartition("-")[2])
    return {"noise": noise, "seed": seed, "seconds": seconds, "steps": steps, "curve": curve(run),
            "tuned": accuracy(str(checkpoint))}  # fmt: skip


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw every run's curve, one colour for each kind of noise."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    colours = dict(zip(NOISES, ("#1b6ca8", "#d1495b"), strict=True))
    labels = {"full": "full rank", "lowrank": "rank 1"}
    for run in runs:
        _, seconds, values = zip(*run["curve"], strict=True)
        first = run["seed"] == runs[0]["seed"]
        axes.plot(seconds, [100 * value for value in values], color=colours[run["noise"]], marker=".",
                  label=labels[run["noise"]] if first else None)  # fmt: skip
    axes.set(xlabel="seconds of steps", ylabel="held-out accuracy, %", title="The demo against time")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Run all seeds with both kinds of noise, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    base = accuracy("tiny")
    print(f"base {base['accuracy']:.2%} (test, {base['n']} problems)", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        for seed in options.seeds:
            for noise in NOISES:
                run = one_run(noise, seed, Path(directory) / f"{noise}-{seed}")
                run["gain_points"] = 100 * (run["tuned"]["accuracy"] - base["accuracy"])
                runs.append(run)
                print(f"{noise:8} seed {seed}: {run['steps']} steps in {run['seconds']:.0f} s, "
                      f"{run['tuned']['accuracy']:.2%}, {run['gain_points']:+.1f} points", flush=True)  # fmt: skip
    means = {n: math.fsum(r["gain_points"] for r in runs if r["noise"] == n) / len(options.seeds) for n in NOISES}
    print("mean gain " + ", ".join(f"{noise} {mean:+.1f} points" for noise, mean in means.items()))
    draw(runs, ROOT / "docs" / "images" / "demo_time.png")
    write_result("demo_time", {"limit_s": LIMIT_S, "base": base, "runs": runs, "mean_gain_points": means})
    return 0


if __name__ == "__main__":
    sys.exit(main())
