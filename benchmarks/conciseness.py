"""Conciseness: a real language model learns to answer shortly, from two training prompts, on a CPU.

    python scripts/fetch_smollm2.py models/smollm2
    python benchmarks/conciseness.py --model models/smollm2          # three seeds, about 10 minutes on 2 cores

Each seed is one `estune train` with low-rank members and the paper's N = 30. The distance is that of the reward
(`benchmarks/data/conciseness/reward.py`): characters between a completion's length and that of the shortest correct
answer, here the mean over the eight held-out prompts, decoded greedily. Seconds are wall time of the whole process:
imports, loading, training, the held-out evaluations in between, and saving. The result goes to
`benchmarks/results/conciseness.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import write_result

DATA = Path(__file__).resolve().parent / "data" / "conciseness"
LARGEST_SHARE_LEFT, MOST_SECONDS = 0.5, 360.0  # of the distance, mean over seeds; of the slowest seed


def train_flags(options: argparse.Namespace) -> list[str]:
    """Return the flags of `estune train` that all seeds share."""
    values = {
        "model": options.model, "dataset_name": DATA, "reward_funcs": f"{DATA / 'reward.py'}:conciseness",
        "noise": options.noise, "population_size": options.population_size, "sigma": options.sigma,
        "learning_rate": options.learning_rate, "batch_size": 2, "max_completion_length": options.tokens,
        "max_steps": options.max_steps, "eval_steps": options.eval_steps, "report_to": "none",
    }  # fmt: skip
    values |= {"rank": options.rank} if options.noise == "lowrank" else {}
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def distance(rows: list[dict[str, Any]]) -> float:
    """Return the mean distance in characters of an evaluation's rows."""
    return -math.fsum(row["rewards"][0] for row in rows) / len(rows)


def run_seed(seed: int, flags: list[str], directory: Path) -> dict[str, Any]:
    """Train with one seed; return its curve, times, and completions before and after."""
    run = directory / f"seed-{seed}"
    command = [sys.executable, "-m", "estune", "train", *flags, "--seed", str(seed), "--output_dir", str(run)]
    started, clock = time.monotonic(), time.time()
    subprocess.run(command, check=True)
    seconds = time.monotonic() - started
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = {record["step"]: record for record in metrics if "step_time" in record}
    curve = []
    for path in sorted((run / "eval").glob("step_*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        step = int(path.stem.removeprefix("step_"))
        curve.append({
            "step": step,
            "seconds": path.stat().st_mtime - clock,  # since the process began; the file appears when it is whole
            "distance": distance(rows),
            "train_distance": -steps[step]["reward"] if step in steps else None,  # mean over the population
            "completions": [row["completions"][0] for row in rows],
        })  # fmt: skip
    first, last = curve[0], curve[-1]
    half = next((point for point in curve if point["distance"] <= first["distance"] / 2), None)
    prompts = [json.loads(line) for line in (DATA / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    completions = [
        {"prompt": row["prompt"][-1]["content"], "shortest_answer": row["answer"], "before": before, "after": after}
        for row, before, after in zip(prompts, first["completions"], last["completions"], strict=True)
    ]
    config = json.loads((run / "es_config.json").read_text(encoding="utf-8"))
    tokens_per_s = [record["es/tokens_per_s"] for record in steps.values()]
    return {
        "seed": seed,
        "members_per_batch": config["members_per_batch"],
        "num_threads": config["num_threads"],
        "seconds": seconds,
        "step_seconds": sum(record["step_time"] for record in steps.values()),
        "median_tokens_per_s": sorted(tokens_per_s)[len(tokens_per_s) // 2],
        "before": first["distance"],
        "after": last["distance"],
        "share_left": last["distance"] / first["distance"],
        "seconds_to_half": half["seconds"] if half else None,
        "steps_to_half": half["step"] if half else None,
        "empty_after": sum(not text.strip() for text in last["completions"]),
        "curve": [{name: value for name, value in point.items() if name != "completions"} for point in curve],
        "completions": completions,
    }


def main() -> int:
    """Run the seeds, print what came out, record it; exit status 1 where it falls short of the target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of SmolLM2-135M-Instruct")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max_steps", type=int, default=12)
    parser.add_argument("--eval_steps", type=int, default=2)
    parser.add_argument("--population_size", type=int, default=30)
    parser.add_argument("--sigma", type=float, default=0.01)
    parser.add_argument("--learning_rate", type=float, default=0.01)
    parser.add_argument("--noise", choices=("lowrank", "full"), default="lowrank")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=40, help="at most, per completion")
    parser.add_argument("--no_record", action="store_true", help="print only: for trials with other settings")
    options = parser.parse_args()
    flags = train_flags(options)
    with tempfile.TemporaryDirectory() as directory:
        runs = [run_seed(seed, flags, Path(directory)) for seed in options.seeds]
    for result in runs:
        to_half = "never" if result["seconds_to_half"] is None else f"{result['seconds_to_half']:.0f} s"
        print(f"seed {result['seed']}: held-out distance {result['before']:.1f} -> {result['after']:.1f} characters "
              f"in {result['seconds']:.0f} s, halved after {to_half}")  # fmt: skip
        for row in result["completions"]:
            print(f"  {row['prompt']}\n    before: {row['before']!r}\n    after:  {row['after']!r}")
    before, after = (math.fsum(result[name] for result in runs) / len(runs) for name in ("before", "after"))
    slowest = max(result["seconds"] for result in runs)
    print(f"mean held-out distance {before:.1f} -> {after:.1f} characters, slowest seed {slowest:.0f} s")
    settings = {name: value for name, value in vars(options).items() if name not in ("model", "no_record", "seeds")}
    if not options.no_record:
        write_result("conciseness", {
            "model": Path(options.model).name, "settings": settings | {"batch_size": 2}, "mean_before": before,
            "mean_after": after, "share_left": after / before, "slowest_seconds": slowest, "runs": runs,
        })  # fmt: skip
    return int(after > LARGEST_SHARE_LEFT * before or slowest > MOST_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
