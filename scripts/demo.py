"""`make demo`: a language model improves at a task without gradients, in a few minutes on a CPU.

    .venv/bin/python scripts/demo.py [--seed 0]

Trains the embedded model with `estune train` (preset demo). Then evaluates the trained model and the base on held-out
problems, which neither the training problems nor the pretraining text contain, and lists the files written. The base
can work step by step, but seldom does. The demo shows that training elicits this skill; it does not teach it. The row
"base, made to think" is the base's accuracy if a response prefix makes it work step by step.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ESTUNE = [sys.executable, "-m", "estune"]


def evaluate(*flags: str) -> dict[str, Any]:
    """Run `estune evaluate` on the test split with the demo's limits and return its JSON."""
    command = [*ESTUNE, "evaluate", "--task", "countdown", "--split", "test", "--json", *flags]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output)
    return result


def show_a_problem(run: Path) -> None:
    """Print a held-out problem that the run learned to solve: the base's answer and the fine-tuned model's."""
    files = sorted((run / "eval").glob("step_*.jsonl"))
    before, after = (
        [json.loads(line) for line in f.read_text(encoding="utf-8").splitlines()] for f in (files[0], files[-1])
    )
    for old, new in zip(before, after, strict=True):
        if old["accuracy"] == [0.0] and new["accuracy"] == [1.0]:
            print(f"\na held-out problem: {old['prompt'].strip()}")
            print(f"  base:       {old['completions'][0].strip()}")
            print("  fine-tuned: " + new["completions"][0].strip().replace("\n", "\n              "))
            return


def command_name() -> str:
    """Return ``estune`` if the shell finds it, else the path of the command beside this interpreter."""
    if shutil.which("estune"):
        return "estune"
    return os.path.relpath(Path(sys.executable).with_name("estune"))


def main() -> None:
    """Train, evaluate, and print the accuracies and the files written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=1000, help="test problems; 0: all 2000")
    options = parser.parse_args()
    run = Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    # `estune train` chooses the preset by itself only if it is given no options at all.
    command = [*ESTUNE, "train", "--config", "demo", "--seed", str(options.seed), "--output_dir", str(run)]
    print(f"$ estune {' '.join(command[3:])}\n", flush=True)
    started = time.monotonic()
    subprocess.run(command, check=True)
    seconds = time.monotonic() - started
    length = str(json.loads((run / "es_config.json").read_text(encoding="utf-8"))["max_completion_length"])
    shared = ["--max_completion_length", length, "--limit", str(options.limit)]
    print("\nestune: evaluating on held-out test problems ...", flush=True)
    rows = {
        "base": evaluate("--model", "tiny", *shared),
        "base, made to think": evaluate("--model", "tiny", "--response_prefix", "<think>", *shared),
        "fine-tuned": evaluate("--model", str(run), *shared),
    }
    print(f"\n{'accuracy on ' + str(rows['base']['n']) + ' test problems':32} {'':8} 95 % interval")
    for name, result in rows.items():
        low, high = result["accuracy_ci95"]
        print(f"{name:32} {result['accuracy']:7.1%}  {low:.1%} to {high:.1%}")
    show_a_problem(run)
    gain = 100 * (rows["fine-tuned"]["accuracy"] - rows["base"]["accuracy"])
    print(
        f"\n{gain:+.1f} points in {seconds:.0f} s of training, by elicitation: the base can do it when made to think."
    )
    print(f"\nwritten to {run}/")
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        print(f"  {path.relative_to(run)!s:32} {path.stat().st_size:>10,} bytes")
    print(f"\nThe journal rebuilds the model bit for bit: {command_name()} replay --run {run} --output_dir rebuilt")


if __name__ == "__main__":
    main()
