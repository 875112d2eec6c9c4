"""Do the paper's harder tasks run end to end on a real model? A few steps each; no gain is expected of so few.

    estune fetch smollm2-135m
    python benchmarks/paths.py                     # about 15 minutes on two quiet cores

Each task is trained by `estune train` for some steps of a small population, evaluated before and after on a few
held-out rows, and its run rebuilt from base model and journal by `estune replay`. Kept are the rewards of every step,
how many completions were cut off, and what `replay` says. It goes to `benchmarks/results/paths.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import write_result

# Prompts of at most 1500 characters, so that a step takes seconds and not minutes.
TASKS: dict[str, list[str]] = {
    "arc_1d": ["--max_completion_length", "64"],
    "arc_agi:1500": ["--max_completion_length", "128"],
    "arc_agi:python:1500": ["--max_completion_length", "160"],
    "math": ["--max_completion_length", "128"],
    "mini_sudoku": ["--max_completion_length", "64"],
    "sudoku": ["--max_completion_length", "192"],
}
STEPS, ROWS = 3, 8
COMMON = ["--noise", "lowrank", "--population_size", "6", "--batch_size", "2", "--sigma", "0.01", "--learning_rate",
          "0.005", "--max_steps", str(STEPS), "--eval_steps", str(STEPS), "--eval_rows", str(ROWS), "--seed", "0",
          "--report_to", "none", "--console", "lines", "--log_completions"]  # fmt: skip


def estune(*words: str) -> str:
    """Run a command to its end and return what it printed."""
    done = subprocess.run([sys.executable, "-m", "estune", *words], check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def one(model: str, task: str, options: list[str], run: Path) -> dict[str, Any]:
    """Train, replay, and return what was seen."""
    started = time.perf_counter()
    estune("train", "--model", model, "--task", task, *COMMON, *options, "--output_dir", str(run))
    trained = time.perf_counter() - started
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if "reward" in record]
    held_out = [record for record in records if "eval_reward" in record]
    said = estune("replay", "--run", str(run), "--output_dir", str(run.with_name(run.name + "-replayed")))
    shown = ("step", "reward", "reward_std", "completions/clipped_ratio", "completions/mean_length", "es/update_norm")
    evaluated = ("step", "eval_reward", "eval_accuracy")
    return {
        "steps": [{name: step.get(name) for name in shown} for step in steps],
        "held_out": [{name: record.get(name) for name in evaluated} for record in held_out],
        "num_evaluations": steps[-1]["num_evaluations"],
        "train_s": trained,
        "replay": said.strip().splitlines()[-1].replace(f"{run.parent}/", ""),
    }


def main() -> None:
    """Try every task and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for task in options.tasks:
            found[task] = one(options.model, task, TASKS[task], Path(name) / task.replace(":", "-"))
            print(f"{task:22} {found[task]['train_s']:6.0f} s  {found[task]['steps'][-1]}", flush=True)
            print(f"{'':22} {found[task]['replay']}", flush=True)
            path = write_result("paths", {"model": Path(options.model).name, "tasks": found})
    print(path)


if __name__ == "__main__":
    main()
