"""Runs a few steps of the paper's harder tasks end to end on a real model. So few steps give no gain.

    estune fetch smollm2-135m
    python benchmarks/paths.py                     # about 15 minutes on two quiet cores

Each task is trained for some steps with a small population and evaluated before and after on a few held-out rows. Then
`estune replay` rebuilds the run from base model and journal. A model of this size is seldom right on these tasks, and
theta does not move if all members score 0. So a second reward for short answers is added with a small weight. The
result holds both rewards of every step, the update's norm, the share of clipped completions, and the output of
`replay`. It is written to `benchmarks/results/paths.json`.
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

from estune import ESConfig, ESTrainer
from estune.tasks import get_task
from estune.tasks.answers import completion_text

# task -> tokens of a completion, at most; prompts have at most 1500 characters, so that a step takes seconds
TASKS: dict[str, int] = {
    "arc_1d": 64,
    "arc_agi:1500": 128,
    "arc_agi:python:1500": 160,
    "math": 128,
    "mini_sudoku": 64,
    "sudoku": 192,
}
STEPS, ROWS = 3, 8
SHOWN = ("completions/clipped_ratio", "completions/mean_length", "es/update_norm")
BREVITY_WEIGHT = 0.001  # of the reward for short answers; the task's reward has weight 1
COMMON: dict[str, Any] = {
    "noise": "lowrank", "population_size": 6, "batch_size": 2, "sigma": 0.01, "learning_rate": 0.005, "seed": 0,
    "max_steps": STEPS, "eval_steps": STEPS, "eval_rows": ROWS, "report_to": ["none"], "console": "lines",
    "log_completions": True, "reward_weights": [1.0, BREVITY_WEIGHT],
}  # fmt: skip


def shorter(completions: list[Any], **_: Any) -> list[float]:
    """Return a reward for short answers: 1 for an empty answer, 0.5 for 100 characters."""
    return [100 / (100 + len(completion_text(completion))) for completion in completions]


def estune(*words: str) -> str:
    """Run an estune command and return its output.

    Raises:
        subprocess.CalledProcessError: the command failed.
    """
    done = subprocess.run([sys.executable, "-m", "estune", *words], check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def run_task(model: str, task: str, length: int, run: Path) -> dict[str, Any]:
    """Train on one task and replay the run; return its record."""
    started = time.perf_counter()
    args = ESConfig(model=model, task=task, max_completion_length=length, output_dir=str(run), **COMMON)
    trainer = ESTrainer(reward_funcs=[get_task(task).reward, f"{Path(__file__).resolve()}:shorter"], args=args)
    trainer.train()
    trained = time.perf_counter() - started
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if "reward" in record]
    held_out = [record for record in records if "eval_reward" in record]
    output = estune("replay", "--run", str(run), "--output_dir", str(run.with_name(run.name + "-replayed")))
    of_task, of_length = (f"rewards/{name}/mean" for name in trainer.request.rewards.names)
    return {
        "steps": [
            {
                "step": step["step"],
                "reward": step[of_task],
                "shorter": step[of_length],
                **{name: step.get(name) for name in SHOWN},
            }
            for step in steps
        ],
        "held_out": [{name: record.get(name) for name in ("step", "eval_accuracy")} for record in held_out],
        "num_evaluations": steps[-1]["num_evaluations"],
        "train_s": trained,
        "replay": output.strip().splitlines()[-1].replace(f"{run.parent}/", ""),
    }


def main() -> None:
    """Run every task and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for task in options.tasks:
            results[task] = run_task(options.model, task, TASKS[task], Path(name) / task.replace(":", "-"))
            print(f"{task:22} {results[task]['train_s']:6.0f} s  {results[task]['steps'][-1]}", flush=True)
            print(f"{'':22} {results[task]['replay']}", flush=True)
            path = write_result("paths", {"model": Path(options.model).name, "tasks": results})
    print(path)


if __name__ == "__main__":
    main()
