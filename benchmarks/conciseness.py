"""Conciseness: a real language model learns to answer briefly, from two training prompts, and still knows what it knew.

    estune fetch smollm2-135m
    python benchmarks/conciseness.py          # three seeds, about 15 minutes on 2 cores

Each seed is `estune train --config configs/conciseness_smollm2.yaml`, as a user types it. The distance is the task's
reward: characters between a completion's length and that of the shortest right answer, the mean over the eight test
prompts, decoded greedily; correctness is the task's accuracy on its 200 questions of the split ``knowledge``. Seconds
are wall time of the whole training process: imports, loading, training, held-out evaluations, saving.

`--validation` is for choosing settings: it measures on the splits ``validation`` and ``knowledge_validation``, which
share no question with the above, and records nothing.

Targets: the distance at least halves on average, no seed's correctness falls more than five points below the base, no
seed takes more than six minutes. Configuration, metrics, curves and completions of every seed go to
`benchmarks/results/conciseness/`, the summary to `benchmarks/results/conciseness.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
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
LARGEST_SHARE_LEFT, MOST_POINTS_LOST, MOST_SECONDS = 0.5, 5.0, 360.0
KEPT = ("es_config.json", "metrics.jsonl", "README.md")  # of a run, beside plots and evaluated rows


def evaluate(model: str, split: str, rows: Path, tokens: int) -> dict[str, Any]:
    """Return `estune evaluate --json` of a model on a split of the task; its rows go to a file."""
    command = [*ESTUNE, "evaluate", "--model", model, "--task", "conciseness", "--split", split, "--json", "--rows",
               str(rows), "--max_completion_length", str(tokens)]  # fmt: skip
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def measure(model: str, directory: Path, tokens: int, splits: tuple[str, str]) -> dict[str, Any]:
    """Return a model's distance on the prompts of one split and its correctness on the questions of the other."""
    directory.mkdir(parents=True, exist_ok=True)
    test, knowledge = (evaluate(model, split, directory / f"{split}.jsonl", tokens) for split in splits)
    return {
        "distance": -test["reward"], "test_accuracy": test["accuracy"], "correct": knowledge["accuracy"],
        "correct_ci95": knowledge["accuracy_ci95"], "knowledge_distance": -knowledge["reward"],
        "clipped": test["clipped_ratio"],
    }  # fmt: skip


def score_again(directory: Path) -> list[float]:
    """Score the kept answers to the questions with the task as it is now, and keep that; return them, (200,)."""
    path = directory / "knowledge.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    answers = [row["answers"] for row in conciseness.load("knowledge")]
    for row in rows:
        row["accuracy"] = conciseness.accuracy([row["completions"][0]], answers=[answers[row["row_id"]]])
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return [row["accuracy"][0] for row in rows]


def in_first_sentence(directory: Path) -> float:
    """Return the share of the questions that are answered rightly in the completion's first sentence."""
    rows = [json.loads(line) for line in (directory / "knowledge.jsonl").read_text(encoding="utf-8").splitlines()]
    answers = [row["answers"] for row in conciseness.load("knowledge")]
    first = [re.split(r"(?<=[.!?])\s|\n", row["completions"][0].strip(), maxsplit=1)[0] for row in rows]
    right = conciseness.accuracy(first, answers=[answers[row["row_id"]] for row in rows])
    return math.fsum(right) / len(right)


def compare(base: list[float], tuned: list[float]) -> dict[str, Any]:
    """Return how many right answers went and came, and the change in points with its paired 95 % interval."""
    change = np.array(tuned) - np.array(base)
    middle, error = 100 * change.mean(), 100 * change.std(ddof=1) / math.sqrt(len(change))
    return {"went": int((change < 0).sum()), "came": int((change > 0).sum()), "points": float(middle),
            "points_ci95": [float(middle - 1.96 * error), float(middle + 1.96 * error)]}  # fmt: skip


def count(found: dict[str, Any], kept: Path) -> None:
    """Fill in what follows from the kept answers: correctness, changes against the base."""
    of_base = score_again(kept / "base")
    for entry, name in [(found["base"], "base"), *((run, f"seed-{run['seed']}") for run in found["runs"])]:
        own = of_base if name == "base" else score_again(kept / name)
        entry["correct"] = math.fsum(own) / len(own)
        entry["correct_ci95"] = list(interval(own))
        entry["correct_in_first_sentence"] = in_first_sentence(kept / name)
        if name != "base":
            entry["against_base"] = compare(of_base, own)
    found["targets"]["most_points_lost"]["value"] = max(-run["against_base"]["points"] for run in found["runs"])


def run_seed(seed: int, options: argparse.Namespace, place: Path, kept: Path) -> dict[str, Any]:
    """Train with one seed, evaluate what came out, keep what shows it."""
    run = place / f"seed-{seed}"
    command = [*ESTUNE, "train", "--config", str(options.config), "--model", options.model, "--seed", str(seed),
               "--output_dir", str(run)]  # fmt: skip
    started = time.monotonic()
    subprocess.run(command, check=True)
    seconds = time.monotonic() - started
    target = kept / run.name
    tuned = measure(str(run), target, options.tokens, options.splits)
    for name in KEPT:
        shutil.copy(run / name, target / name)
    shutil.copytree(run / "plots", target / "plots", dirs_exist_ok=True)
    shutil.copytree(run / "eval", target / "eval", dirs_exist_ok=True)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "seed": seed, "seconds": seconds, **tuned,
        "curve": [{"step": r["step"], "distance": -r["eval_reward"]} for r in metrics if "eval_reward" in r],
        "steps_s": math.fsum(r["step_time"] for r in metrics if "step_time" in r),
    }  # fmt: skip


def main() -> int:
    """Run the seeds, print what came out, record it; exit status 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m", help="directory of SmolLM2-135M-Instruct")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=40, help="at most, per completion of the evaluations")
    parser.add_argument("--config", type=Path, default=CONFIG, help="another run's options")
    parser.add_argument("--validation", action="store_true", help="measure on the validation splits; print only")
    parser.add_argument("--no_record", action="store_true", help="print only")
    parser.add_argument("--recount", action="store_true", help="score the kept answers of the recorded runs again")
    options = parser.parse_args()
    if options.recount:
        path = RESULTS / "conciseness.json"
        found = json.loads(path.read_text(encoding="utf-8"))
        count(found, RESULTS / "conciseness")
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(json.dumps([run["against_base"] for run in found["runs"]], indent=1))
        return 0
    options.no_record |= options.validation
    options.splits = ("validation", "knowledge_validation") if options.validation else ("test", "knowledge")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        kept = place / "kept" if options.no_record else RESULTS / "conciseness"
        shutil.rmtree(kept, ignore_errors=True)  # nothing of earlier runs stays among these
        base = measure(options.model, kept / "base", options.tokens, options.splits)
        runs = [run_seed(seed, options, place, kept) for seed in options.seeds]
        paths = [str(place / f"seed-{seed}") for seed in options.seeds]
        report = [*ESTUNE, "report", *paths, "--output_dir", str(kept)]
        subprocess.run(report, check=True)
        for file in [kept / "report.html", *kept.glob("*/es_config.json")]:  # where the runs lay says nothing
            file.write_text(file.read_text(encoding="utf-8").replace(f"{place}/", ""), encoding="utf-8")
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
    for what, (value, limit) in targets.items():
        print(f"{what} {value:.3g} (at most {limit:g}){'' if value <= limit else ': MISSED'}")
    if not options.no_record:
        summary = {what: {"value": value, "limit": limit} for what, (value, limit) in targets.items()}
        what = {"config": options.config.name, "tokens": options.tokens}
        found = {**what, "targets": summary, "base": base, "runs": runs}
        count(found, RESULTS / "conciseness")
        write_result("conciseness", found)
    return int(any(value > limit for value, limit in targets.values()))


if __name__ == "__main__":
    sys.exit(main())
