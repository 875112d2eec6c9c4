"""Compares what `estune plan` says with what the run then takes, on this machine.

    python benchmarks/plan.py                   # about 10 minutes; the vLLM case needs that engine's environment

Plan and run follow each other, so that both meet the same load. The run's time is that of its process. The result is
written to `benchmarks/results/plan.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from record import RESULTS, write_result

ESTUNE = [sys.executable, "-m", "estune"]
COMMON = ("--model", "tiny", "--task", "countdown", "--max_completion_length", "48", "--sigma", "0.01",
          "--eval_steps", "10", "--eval_rows", "100")  # fmt: skip
STEADY = ("--learning_rate", "0.0001")  # theta hardly moves, so completions keep their length
CASES: dict[str, tuple[str, ...]] = {
    "hf, full rank": (*STEADY, "--max_steps", "20"),
    "hf, low rank": (*STEADY, "--max_steps", "40", "--noise", "lowrank"),
    "hf, low rank, completions that become longer": ("--max_steps", "40", "--noise", "lowrank"),
    "hf, low rank, 2 workers": (*STEADY, "--max_steps", "40", "--noise", "lowrank", "--members_per_batch", "5",
                                "--num_workers", "2", "--worker_resources", '{"CPU": 1}', "--num_threads", "1"),
    "vllm, low rank": (*STEADY, "--engine", "vllm", "--max_steps", "40", "--noise", "lowrank"),
}  # fmt: skip


def measure(options: tuple[str, ...], directory: Path) -> dict[str, Any]:
    """Return the planned and the actual seconds of a run."""
    answer = subprocess.run([*ESTUNE, "plan", *COMMON, *options, "--json"], check=True, stdout=subprocess.PIPE)
    planned = json.loads(answer.stdout)
    started = time.monotonic()
    train = [*ESTUNE, "train", *COMMON, *options, "--output_dir", str(directory / "run"), "--report_to", "none"]
    subprocess.run(train, check=True, stdout=subprocess.DEVNULL)
    actual_s = time.monotonic() - started
    return {"planned_s": planned["run_s"], "actual_s": actual_s, "ratio": planned["run_s"] / actual_s, "plan": planned}


def main() -> None:
    """Measure the cases that this environment can run, and write them beside the ones already recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    file = RESULTS / "plan.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["cases"] if file.exists() else {}
    for name in parser.parse_args().cases:
        if name.startswith("vllm") and find_spec("vllm") is None:
            continue
        with tempfile.TemporaryDirectory() as directory:
            found[name] = measure(CASES[name], Path(directory))
        print(f"{name}: planned {found[name]['planned_s']:.0f} s, took {found[name]['actual_s']:.0f} s", flush=True)
    write_result("plan", {"cases": found})


if __name__ == "__main__":
    main()
