"""Measures the demo's gain: held-out accuracy before and after training with the demo preset, for several seeds.

    python benchmarks/demo_gain.py                  # about 15 minutes on 2 cores

Each seed runs `estune train --config demo --seed S`, timed as a process from start to end. The base, the base with
thinking forced by a prefix, and the tuned models are evaluated on all 2000 test problems. The result is written to
`benchmarks/results/demo_gain.json`, and the curves of the first seed to `docs/images/demo_curves.png`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
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


def evaluate(model: str, length: int, *flags: str) -> dict[str, Any]:
    """Return the JSON of `estune evaluate` for a model on the whole test split."""
    command = [*ESTUNE, "evaluate", "--model", model, "--task", "countdown", "--split", "test", "--json",
               "--max_completion_length", str(length), *flags]  # fmt: skip
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output)
    del result["model"]  # a temporary path, except for the base
    return result


def main() -> int:
    """Run the seeds, print and write the result; return 1 if the demo misses a limit, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    metrics: list[dict[str, Any]] = []  # of the first run: the values in the picture
    with tempfile.TemporaryDirectory() as directory:
        length = 0
        for seed in options.seeds:
            run = Path(directory) / f"seed-{seed}"
            command = [*ESTUNE, "train", "--config", "demo", "--seed", str(seed), "--output_dir", str(run)]
            started = time.monotonic()
            subprocess.run(command, check=True)
            seconds = time.monotonic() - started
            config = json.loads((run / "es_config.json").read_text(encoding="utf-8"))
            length = config["max_completion_length"]
            runs.append({"seed": seed, "seconds": seconds, "tuned": evaluate(str(run), length)})
            if seed == options.seeds[0]:
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


if __name__ == "__main__":
    sys.exit(main())
