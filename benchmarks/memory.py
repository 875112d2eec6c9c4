"""Peak memory of a full-parameter step on random models of 0.5 and 1.5 B parameters, as a multiple of their weights.

    python benchmarks/memory.py                 # about 15 minutes, needs 16 GiB of memory and 20 GB of disk
    python benchmarks/memory.py --model 0.5B    # about 5 minutes, 6 GiB, 12 GB

The peak is the process's high-water mark of resident memory minus what it held after its imports; the unit is the
model's float32 weights. Measured are processes that load, take a step of two members, update and save; for the small
model also one that resumes from the checkpoint for another step, and one that replays both steps from base model and
journal; all of it with full-rank and with low-rank noise. The result goes to `benchmarks/results/memory.json`, each
model with the commit and the machine it was measured on; ``--model`` leaves the other model's entry as it is.
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

from random_models import MODELS, save_in_child
from record import RESULTS, stamp, write_result

PROCESSES = {"0.5B": ("train", "resume", "replay"), "1.5B": ("train",)}
LIMITS = {"full": 2.3, "lowrank": 1.3}

CHILD = """
import json, sys
from pathlib import Path
import torch, transformers, numba
import estune.engines.hf.engine, estune.monitor.report.plots, estune.commands.evaluate
from estune import ESConfig, ESTrainer

def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024

imported = status("VmRSS")
what, noise, model, run = sys.argv[1:]
if what == "replay":
    estune.commands.replay.replay_command(Path(run), None, Path(run + "-replayed"), None)
else:
    args = ESConfig(model=model, task="countdown", output_dir=run, max_steps=2 if what == "resume" else 1,
                    resume=what == "resume", population_size=2, batch_size=2, max_completion_length=4,
                    fitness_shaping="none", save_steps=1, report_to=["none"], noise=noise,
                    reward_funcs=[str(Path(model).parent / "rewards.py") + ":numbers"])
    ESTrainer(args=args).train()
    steps = [json.loads(line) for line in (Path(run) / "journal.jsonl").read_text().splitlines()]
    assert all(any(step["q"]) for step in steps if step["kind"] == "step"), "members tied: theta was not updated"
print(json.dumps({"imported": imported, "peak": status("VmHWM")}))
"""

# The random model's answers are all wrong, and its tokens may not even be words of the tokenizer's; a reward of their
# numbers tells members apart, so that theta moves.
REWARD = "def numbers(completions, completion_ids, **_):\n    return [sum(ids) % 97 for ids in completion_ids]\n"


def measure(name: str, directory: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Build a random model with the embedded tokenizer; train, resume and replay it, each in a child process."""
    model = directory / "model"
    weights = 4 * save_in_child(name, model)  # in a child, so that building leaves nothing in memory here
    (directory / "rewards.py").write_text(REWARD, encoding="utf-8")
    results: dict[str, dict[str, dict[str, float]]] = {}
    for noise in LIMITS:
        results[noise] = {}
        with tempfile.TemporaryDirectory(dir=directory) as runs:
            for what in PROCESSES[name]:
                started = time.perf_counter()
                command = [sys.executable, "-c", CHILD, what, noise, str(model), str(Path(runs) / "run")]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                result: dict[str, float] = json.loads(output.splitlines()[-1])
                results[noise][what] = result | {
                    "weights": weights,
                    "ratio": (result["peak"] - result["imported"]) / weights,
                    "process_s": time.perf_counter() - started,
                }
    return results


def recorded(path: Path) -> dict[str, Any]:
    """Return the models' entries of a result file; those that are not as this script writes them are left out."""
    if not path.exists():
        return {}
    entries = json.loads(path.read_text(encoding="utf-8")).get("models", {})
    return {name: entry for name, entry in entries.items() if name in MODELS and is_entry(name, entry)}


def is_entry(name: str, entry: dict[str, Any]) -> bool:
    """Say whether a recorded entry names its commit and machine and has every process of its model."""
    shape = {noise: set(processes) for noise, processes in entry.get("noise", {}).items()}
    return {"commit", "machine"} <= set(entry) and shape == {noise: set(PROCESSES[name]) for noise in LIMITS}


def main() -> int:
    """Measure, print, record; exit status 1 where a limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", help="only this one; the others' results are kept")
    parser.add_argument("--tmp", help="directory for models and runs (20 GB)")
    parser.add_argument("--no_record", action="store_true", help="print only")
    options = parser.parse_args()
    results = {}
    entries = recorded(RESULTS / "memory.json") if options.model else {}
    for name in options.model or MODELS:
        with tempfile.TemporaryDirectory(dir=options.tmp) as directory:
            results[name] = measure(name, Path(directory))
        entries[name] = {**stamp(), "noise": results[name]}
        for noise, processes in results[name].items():
            for what, row in processes.items():
                peak, size = (row["peak"] - row["imported"]) / 2**30, row["weights"] / 2**30
                print(f"{name} {noise} {what}: weights {size:.2f} GiB, peak {peak:.2f} GiB, ratio {row['ratio']:.2f}")
    if not options.no_record:
        write_result("memory", {"limits": LIMITS, "models": entries}, stamped=False)
    return int(
        any(
            row["ratio"] > LIMITS[noise]
            for model in results.values()
            for noise, processes in model.items()
            for row in processes.values()
        )
    )


if __name__ == "__main__":
    sys.exit(main())
