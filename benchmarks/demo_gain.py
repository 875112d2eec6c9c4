"""Measures the demo's gain: held-out accuracy before and after training with the demo preset, for several seeds.

    python benchmarks/demo_gain.py whole            # about 15 minutes on 2 cores
    python benchmarks/demo_gain.py time             # about 15 minutes too

`whole`: each seed runs `estune train --config demo --seed S`, timed as a process from start to end. The base, the base
with thinking forced by a prefix, and the tuned models are evaluated on all 2000 test problems. The result is written to
`benchmarks/results/demo_gain.json`, and the curves of the first seed to `docs/images/demo_curves.png`.

`time`: the gain in 90 seconds, with full-rank and low-rank members and a constant rate. For each kind of noise and
seed, `estune train --config demo --step_control none` runs with more steps than fit into the limit. SIGINT stops it 90
seconds after the start of the process, so imports, loading and held-out evaluations are included. It then saves a
checkpoint, which is evaluated on all 2000 test problems. The result is written to `benchmarks/results/demo_time.json`,
and the curves (accuracy on the 200 validation rows against seconds of steps) to `docs/images/demo_time.png`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
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
# limits: mean gain and smallest gain in percentage points, seconds of a run
LEAST_MEAN_POINTS, LEAST_EACH_POINTS, MOST_SECONDS = 15.0, 8.0, 240.0
LIMIT_S = 90.0  # seconds from the start of the process
STEPS = 400  # more than fit into the limit; the preset's schedules are constant, so the number changes nothing else
NOISES = ("full", "lowrank")
LENGTH = 48  # tokens of a completion, as in the preset


def evaluate(model: str, length: int, *flags: str) -> dict[str, Any]:
    """Return the JSON of `estune evaluate` for a model on the whole test split."""
    command = [*ESTUNE, "evaluate", "--model", model, "--task", "countdown", "--split", "test", "--json",
               "--max_completion_length", str(length), *flags]  # fmt: skip
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output)
    del result["model"]  # a temporary path, except for the base
    return result


# --- the whole demo ---------------------------------------------------------------------------------------------------


def whole(seeds: list[int]) -> int:
    """Run the seeds, print and write the result; return 1 if the demo misses a limit, else 0."""
    runs: list[dict[str, Any]] = []
    metrics: list[dict[str, Any]] = []  # of the first run: the values in the picture
    with tempfile.TemporaryDirectory() as directory:
        length = 0
        for seed in seeds:
            run = Path(directory) / f"seed-{seed}"
            command = [*ESTUNE, "train", "--config", "demo", "--seed", str(seed), "--output_dir", str(run)]
            started = time.monotonic()
            subprocess.run(command, check=True)
            seconds = time.monotonic() - started
            config = json.loads((run / "es_config.json").read_text(encoding="utf-8"))
            length = config["max_completion_length"]
            runs.append({"seed": seed, "seconds": seconds, "tuned": evaluate(str(run), length)})
            if seed == seeds[0]:
                images = ROOT / "docs" / "images"
                images.mkdir(parents=True, exist_ok=True)
                shutil.copy(run / "plots" / "curves.png", images / "demo_curves.png")
                metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
        base = evaluate("tiny", length)
        forced = evaluate("tiny", length, "--response_prefix", "<think>")
    print(f"base {base['accuracy']:.1%}, base made to think {forced['accuracy']:.1%} (test, {base['n']} problems)")
    for run_result in runs:
        tuned = run_result["tuned"]
        run_result["gain_points"] = 100 * (tuned["accuracy"] - base["accuracy"])
        print(f"seed {run_result['seed']}: {tuned['accuracy']:.1%}, {run_result['gain_points']:+.1f} points, "
              f"{run_result['seconds']:.0f} s")  # fmt: skip
    gains = [run_result["gain_points"] for run_result in runs]
    mean = math.fsum(gains) / len(gains)
    slowest = max(run_result["seconds"] for run_result in runs)
    print(f"mean gain {mean:+.1f} points, least {min(gains):+.1f}, slowest {slowest:.0f} s")
    write_result("demo_gain", {"base": base, "base_forced": forced, "runs": runs, "mean_gain_points": mean,
                               "least_gain_points": min(gains), "slowest_seconds": slowest,
                               "metrics": metrics})  # fmt: skip
    return int(mean < LEAST_MEAN_POINTS or min(gains) < LEAST_EACH_POINTS or slowest > MOST_SECONDS)


# --- 90 seconds -------------------------------------------------------------------------------------------------------


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
               "--step_control", "none", "--max_steps", str(STEPS), "--report_to", "none"]  # fmt: skip
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
            "tuned": evaluate(str(checkpoint), LENGTH)}  # fmt: skip


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


def in_time(seeds: list[int]) -> int:
    """Run all seeds with both kinds of noise, print and write the result."""
    runs: list[dict[str, Any]] = []
    base = evaluate("tiny", LENGTH)
    print(f"base {base['accuracy']:.2%} (test, {base['n']} problems)", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        for seed in seeds:
            for noise in NOISES:
                run = one_run(noise, seed, Path(directory) / f"{noise}-{seed}")
                run["gain_points"] = 100 * (run["tuned"]["accuracy"] - base["accuracy"])
                runs.append(run)
                print(f"{noise:8} seed {seed}: {run['steps']} steps in {run['seconds']:.0f} s, "
                      f"{run['tuned']['accuracy']:.2%}, {run['gain_points']:+.1f} points", flush=True)  # fmt: skip
    means = {n: math.fsum(r["gain_points"] for r in runs if r["noise"] == n) / len(seeds) for n in NOISES}
    print("mean gain " + ", ".join(f"{noise} {mean:+.1f} points" for noise, mean in means.items()))
    draw(runs, ROOT / "docs" / "images" / "demo_time.png")
    write_result("demo_time", {"limit_s": LIMIT_S, "base": base, "runs": runs, "mean_gain_points": means})
    return 0


# --- the program ------------------------------------------------------------------------------------------------------


def main() -> int:
    """Measure, print and write one of the results; return 1 if the demo misses a limit, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("whole", "time"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    return whole(options.seeds) if options.what == "whole" else in_time(options.seeds)


if __name__ == "__main__":
    sys.exit(main())
