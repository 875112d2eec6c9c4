"""Conciseness: a real language model learns brief answers from two training prompts and keeps its knowledge.

    estune fetch smollm2-135m
    python benchmarks/conciseness.py          # three seeds, about 15 minutes on 2 cores

Each seed runs `estune train --config configs/conciseness_smollm2.yaml` as a command. The distance is the task's reward
with the opposite sign: the difference in characters between the length of a greedy completion and that of the shortest
right answer, the mean over the eight test prompts. Correctness is the task's accuracy on the 200 questions of the split
``knowledge``. Seconds are wall time of the whole training process: imports, loading, training, held-out evaluations,
saving.

`--validation` is for the choice of settings. It measures on the splits ``validation`` and ``knowledge_validation``,
which share no question with the test, and writes no file.

The targets: the mean distance falls by half or more, no seed's correctness falls by more than five points, and no seed
takes more than six minutes. The result, with configuration, metrics and completions of all seeds, is written to
`benchmarks/results/conciseness.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from record import RESULTS, write_result

from estune.tasks import conciseness
from estune.train.evaluation import interval

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "conciseness_smollm2.yaml"
ESTUNE = [sys.executable, "-m", "estune"]
# limits: share of the base's distance, percentage points of correctness, seconds
LARGEST_SHARE_LEFT, MOST_POINTS_LOST, MOST_SECONDS = 0.5, 5.0, 360.0
NOT_SHARED = ("model", "output_dir", "run_name", "seed")  # options that differ between seeds or machines
Rows = list[dict[str, Any]]


def evaluate(model: str, split: str, rows: Path, tokens: int) -> dict[str, Any]:
    """Return the JSON of `estune evaluate` for a model and a split; write the evaluated rows to the file ``rows``."""
    command = [*ESTUNE, "evaluate", "--model", model, "--task", "conciseness", "--split", split, "--json", "--rows",
               str(rows), "--max_completion_length", str(tokens)]  # fmt: skip
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return result


def read_lines(file: Path) -> Rows:
    """Return the objects in a file of JSON lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def answers_in(file: Path, **origin: Any) -> Rows:
    """Return the recorded fields of evaluated rows, with those of ``origin``. The prompts are in the task."""
    return [
        {**origin, "row_id": row["row_id"], "completion": row["completions"][0], "reward": row["rewards"][0],
         "accuracy": row["accuracy"][0], "length": row["lengths"][0], "finished": row["finished"][0]}
        for row in read_lines(file)
    ]  # fmt: skip


def measure(model: str, of: str, tokens: int, splits: tuple[str, str]) -> tuple[dict[str, Any], Rows]:
    """Return a model's distance on the first split, its correctness on the second, and its answers.

    ``of`` is the model's name in the recorded answers.
    """
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name) / f"{split}.jsonl" for split in splits]
        test, knowledge = (evaluate(model, split, file, tokens) for split, file in zip(splits, files, strict=True))
        answers = [
            row for split, file in zip(splits, files, strict=True) for row in answers_in(file, of=of, split=split)
        ]
    return {
        "distance": -test["reward"], "test_accuracy": test["accuracy"], "correct": knowledge["accuracy"],
        "correct_ci95": knowledge["accuracy_ci95"], "knowledge_distance": -knowledge["reward"],
        "clipped": test["clipped_ratio"],
    }, answers  # fmt: skip


def knowledge_of(answers: Rows, of: str) -> Rows:
    """Return the answers of the model ``of`` to the 200 questions."""
    return [row for row in answers if row["of"] == of and row["split"] == "knowledge"]


def score_again(rows: Rows) -> list[float]:
    """Score answers to the questions with the present task, set their ``accuracy``, and return the scores, (200,)."""
    answers = [row["answers"] for row in conciseness.load("knowledge")]
    for row in rows:
        row["accuracy"] = conciseness.accuracy([row["completion"]], answers=[answers[row["row_id"]]])[0]
    return [row["accuracy"] for row in rows]


def in_first_sentence(rows: Rows) -> float:
    """Return the share of questions with the right answer in the completion's first sentence."""
    answers = [row["answers"] for row in conciseness.load("knowledge")]
    first = [re.split(r"(?<=[.!?])\s|\n", row["completion"].strip(), maxsplit=1)[0] for row in rows]
    right = conciseness.accuracy(first, answers=[answers[row["row_id"]] for row in rows])
    return math.fsum(right) / len(right)


def compare(base: list[float], tuned: list[float]) -> dict[str, Any]:
    """Return how many right answers were lost and gained, and the change in points with a paired 95 % interval."""
    change = np.array(tuned) - np.array(base)
    middle, error = 100 * change.mean(), 100 * change.std(ddof=1) / math.sqrt(len(change))
    return {"went": int((change < 0).sum()), "came": int((change > 0).sum()), "points": float(middle),
            "points_ci95": [float(middle - 1.96 * error), float(middle + 1.96 * error)]}  # fmt: skip


def count(result: dict[str, Any], answers: Rows) -> None:
    """Set the fields of a result that follow from the recorded answers: correctness and its change."""
    of_base = score_again(knowledge_of(answers, "base"))
    for entry, name in [(result["base"], "base"), *((run, f"seed-{run['seed']}") for run in result["runs"])]:
        rows = knowledge_of(answers, name)
        scores = score_again(rows)
        entry["correct"] = math.fsum(scores) / len(scores)
        entry["correct_ci95"] = list(interval(scores))
        entry["correct_in_first_sentence"] = in_first_sentence(rows)
        if name != "base":
            entry["against_base"] = compare(of_base, scores)
    points = [run["against_base"]["points"] for run in result["runs"]]
    result["targets"]["most_points_lost"]["value"] = -min(points)


def run_seed(seed: int, options: argparse.Namespace, directory: Path) -> tuple[dict[str, Any], Rows, Rows]:
    """Train with one seed and evaluate the model; return the result, the answers and the run's metrics."""
    run = directory / f"seed-{seed}"
    command = [*ESTUNE, "train", "--config", str(options.config), "--model", options.model, "--seed", str(seed),
               "--output_dir", str(run)]  # fmt: skip
    started = time.monotonic()
    subprocess.run(command, check=True)
    seconds = time.monotonic() - started
    tuned, answers = measure(str(run), run.name, options.tokens, options.splits)
    for file in sorted((run / "eval").glob("step_*.jsonl")):
        answers += answers_in(file, of=run.name, split="eval", step=int(file.stem.removeprefix("step_")))
    metrics = read_lines(run / "metrics.jsonl")
    settings = json.loads((run / "es_config.json").read_text(encoding="utf-8"))
    result = {
        "seed": seed, "seconds": seconds, **tuned,
        "curve": [{"step": r["step"], "distance": -r["eval_reward"]} for r in metrics if "eval_reward" in r],
        "steps_s": math.fsum(r["step_time"] for r in metrics if "step_time" in r),
        "fingerprint": json.loads((run / "es_state.json").read_text(encoding="utf-8"))["fingerprint"],
        "settings": {name: value for name, value in settings.items() if name not in NOT_SHARED},
    }  # fmt: skip
    return result, answers, [{"seed": seed, **record} for record in metrics]


def main() -> int:
    """Run the seeds, print and write the result; return 1 if a target is missed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m", help="directory of SmolLM2-135M-Instruct")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=40, help="most tokens of a completion in evaluations")
    parser.add_argument("--config", type=Path, default=CONFIG, help="options of the training run")
    parser.add_argument("--validation", action="store_true", help="measure on the validation splits; print only")
    parser.add_argument("--no_record", action="store_true", help="print only")
    parser.add_argument("--recount", action="store_true", help="score the recorded answers again")
    options = parser.parse_args()
    if options.recount:
        result = json.loads((RESULTS / "conciseness.json").read_text(encoding="utf-8"))
        listed = {name: result.pop(name) for name in ("answers", "metrics")}
        count(result, listed["answers"])
        write_result("conciseness", result, stamped=False, listed=listed)
        print(json.dumps([run["against_base"] for run in result["runs"]], indent=1))
        return 0
    options.no_record |= options.validation
    options.splits = ("validation", "knowledge_validation") if options.validation else ("test", "knowledge")
    base, answers = measure(options.model, "base", options.tokens, options.splits)
    runs, metrics = [], []
    with tempfile.TemporaryDirectory() as name:
        for seed in options.seeds:
            run, seed_answers, seed_metrics = run_seed(seed, options, Path(name))
            runs.append(run)
            answers += seed_answers
            metrics += seed_metrics
    print(f"base: distance {base['distance']:.1f} characters, {base['correct']:.1%} of the questions right")
    for run in runs:
        print(f"seed {run['seed']}: distance {run['distance']:.1f}, {run['correct']:.1%} right, {run['seconds']:.0f} s")
    after = math.fsum(run["distance"] for run in runs) / len(runs)
    lost = max(100 * (base["correct"] - run["correct"]) for run in runs)
    slowest = max(run["seconds"] for run in runs)
    targets = {
        "share_left": (after / base["distance"], LARGEST_SHARE_LEFT), "most_points_lost": (lost, MOST_POINTS_LOST),
        "slowest_seconds": (slowest, MOST_SECONDS),
    }  # fmt: skip
    for name, (value, limit) in targets.items():
        print(f"{name} {value:.3g} (at most {limit:g}){'' if value <= limit else ': MISSED'}")
    if not options.no_record:
        summary = {name: {"value": value, "limit": limit} for name, (value, limit) in targets.items()}
        settings = [run.pop("settings") for run in runs]
        setup = {"config": options.config.name, "tokens": options.tokens, "settings": settings[0]}
        result = {**setup, "targets": summary, "base": base, "runs": runs}
        count(result, answers)
        write_result("conciseness", result, listed={"answers": answers, "metrics": metrics})
    return int(any(value > limit for value, limit in targets.values()))


if __name__ == "__main__":
    sys.exit(main())
