"""Kills and stops Ray workers during runs, and compares these runs with an undisturbed one, byte by byte.

    python benchmarks/chaos.py                  # 10 runs of 50 steps and one with a killed driver, about 40 minutes

Every run has 3 workers. A worker is killed every few seconds (SIGKILL), and the one that replaces it joins late. One
worker is stopped (SIGSTOP) once, and replaced after `SILENCE_S` seconds. In the last run the process that trains is
killed five times and resumed, each time with another number of workers (`COUNTS`). A run passes if its journal is the
quiet run's byte for byte, and if no process and no shared memory is left. The result is written to
`benchmarks/results/chaos.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import stamp, write_result

ESTUNE = [sys.executable, "-m", "estune"]
SILENCE_S = 15.0  # seconds after which a stopped worker is replaced
PAUSE_S = (4.0, 9.0)  # seconds between two kills
KILLS_BEFORE_STOP = 2  # workers killed before one is stopped
MOST = 10_000  # workers killed or stopped in a run, at most
COUNTS = (2, 3, 1, 0, 2, 3)  # workers of the last run at first, and after each death of the process that trains
LIMIT_S = 1800.0  # seconds after which a run has hung
OPTIONS = dict(
    model="tiny", task="countdown", noise="lowrank", population_size=12, members_per_batch=2, batch_size=32,
    max_completion_length=48, save_steps=5, report_to="none", console="lines",
)  # fmt: skip


def command(run: Path, steps: int, workers: int, *more: str) -> list[str]:
    """Return the command that trains with some workers; 0: in the process itself."""
    flags = [part for name, value in OPTIONS.items() for part in (f"--{name}", str(value))]
    flags += ["--output_dir", str(run), "--max_steps", str(steps), *more]
    flags += ["--num_workers", str(workers)]
    if workers:
        flags += ["--worker_resources", '{"CPU": 0.5}', "--worker_timeout_s", str(SILENCE_S)]
    return [*ESTUNE, "train", *flags]


def processes() -> dict[int, tuple[int, str]]:
    """Return the parent and the command of every process."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            status = (entry / "stat").read_text().rpartition(")")[2].split()
            if status[0] != "Z":
                found[int(entry.name)] = int(status[1]), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def workers_below(directory: Path) -> list[int]:
    """Return the processes of the workers of the cluster whose files lie below a directory."""
    table = processes()
    raylets = {pid for pid, (_, text) in table.items() if "raylet" in text.split(" ")[0] and str(directory) in text}
    return sorted(pid for pid, (parent, text) in table.items() if parent in raylets and text.startswith("ray::Worker"))


def steps_of(run: Path) -> int:
    """Return the number of steps in a run's journal."""
    journal = run / "journal.jsonl"
    return sum('"fitness"' in line for line in journal.read_text().splitlines()) if journal.exists() else 0


def leftovers(directory: Path) -> list[str]:
    """Return what is left of a run's cluster: processes, files, shared memory."""
    left = [text for _, text in processes().values() if str(directory) in text]
    left += [str(path) for path in directory.glob("estune-ray-*")]
    return left + [str(path) for path in Path("/dev/shm").iterdir() if "plasma" in path.name or "ray" in path.name]


def disturbed(run: Path, steps: int, temporary: Path, seed: int = 0) -> dict[str, Any]:
    """Train with 3 workers that are killed and stopped; return what happened.

    Raises:
        RuntimeError: the run failed or hung.
    """
    rng, killed, stopped = random.Random(seed), 0, 0
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with open(run.with_suffix(".log"), "wb") as log:
        process = subprocess.Popen(command(run, steps, 3), env=environment, stdout=log, stderr=subprocess.STDOUT)
        until = time.monotonic() + LIMIT_S
        while process.poll() is None:
            time.sleep(rng.uniform(*PAUSE_S))
            workers = workers_below(temporary)
            if steps_of(run) and len(workers) > 1 and killed + stopped < MOST and process.poll() is None:
                stops = killed == KILLS_BEFORE_STOP and not stopped
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rng.choice(workers), signal.SIGSTOP if stops else signal.SIGKILL)
                stopped, killed = stopped + stops, killed + (not stops)
            if time.monotonic() > until:
                process.kill()
                raise RuntimeError(f"run {run} hangs; see {log.name}")
    if process.returncode:
        raise RuntimeError(f"run {run} ended with status {process.returncode}; see {log.name}")
    lost = len(re.findall(r"is lost:", run.with_suffix(".log").read_text()))
    return {"seed": seed, "workers_killed": killed, "workers_stopped": stopped, "workers_replaced": lost}


def driver_killed(run: Path, steps: int, temporary: Path, counts: Sequence[int] = COUNTS) -> dict[str, Any]:
    """Train, kill the process that trains several times, and resume with another number of workers each time.

    Raises:
        RuntimeError: a resume failed or hung.
    """
    deaths, environment = 0, {**os.environ, "TMPDIR": str(temporary)}
    for workers in counts:
        is_last = deaths == len(counts) - 1
        wanted = (deaths + 1) * steps // len(counts)
        with open(run.with_suffix(".log"), "ab") as log:
            call = command(run, steps, workers, *(["--resume"] if deaths else []))
            process = subprocess.Popen(call, env=environment, stdout=log, stderr=subprocess.STDOUT)
            until = time.monotonic() + LIMIT_S
            while process.poll() is None and time.monotonic() < until and (is_last or steps_of(run) < wanted):
                time.sleep(0.05)
            if not is_last:
                process.kill()
                deaths += 1
            process.wait()
    if process.returncode:
        raise RuntimeError(f"run {run} ended with status {process.returncode}; see {run.with_suffix('.log')}")
    return {"driver_killed": deaths}


def judge(run: Path, quiet: Path, temporary: Path) -> dict[str, Any]:
    """Return whether a run's journal and model are those of the quiet run, and what it has left behind."""
    until = time.monotonic() + 30
    while (left := leftovers(temporary)) and time.monotonic() < until:
        time.sleep(0.2)
    names = ("journal.jsonl", "model.safetensors")
    return {
        "same_bytes": all((run / name).read_bytes() == (quiet / name).read_bytes() for name in names),
        "left_behind": left,
    }


def main() -> None:
    """Run all and write the result; exit with status 1 if a run differs or leaves something behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--keep", type=Path, help="a directory for the runs, which a second call continues")
    values = parser.parse_args()
    root = values.keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    root.mkdir(parents=True, exist_ok=True)
    quiet, temporary = root / "quiet", Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    if steps_of(quiet) != values.steps:
        subprocess.run(command(quiet, values.steps, 0), check=True, stdout=subprocess.DEVNULL)
    finished = root / "rows.jsonl"  # a kept directory continues after its last finished run
    rows = [json.loads(line) for line in finished.read_text().splitlines()] if finished.exists() else []
    for seed in range(len(rows), values.runs + 1):
        run = root / (f"run-{seed}" if seed < values.runs else "driver")
        shutil.rmtree(run, ignore_errors=True)
        if seed < values.runs:
            row = disturbed(run, values.steps, temporary, seed)
        else:
            row = driver_killed(run, values.steps, temporary)
        rows.append(row | judge(run, quiet, temporary) | {"commit": stamp()["commit"]})
        with finished.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(json.dumps(rows[-1]), flush=True)
    passed = all(row["same_bytes"] and not row["left_behind"] for row in rows)
    write_result("chaos", {"steps": values.steps, "workers": 3, "options": OPTIONS, "runs": rows, "passed": passed})
    if values.keep is None:
        shutil.rmtree(root)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
