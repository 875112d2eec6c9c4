"""Simulates step time and efficiency for 1 to 1024 workers; the result is a model, not a measurement.

    python benchmarks/scaling_model.py          # a few seconds

What is measured elsewhere: the update's time per parameter and member on an H100 (`results/gpu.json`) and the time of a
call to a Ray worker on one machine. What is assumed stands in `ASSUMED`, and is written into the result: tokens a
second of a worker, the spread of job times, how often workers fail, how long a new one loads. The pool's rules are
simulated: the longest wait is avoided by repeating a slow job on an idle worker, a lost job goes to another worker, and
the update waits for all. The result is written to `benchmarks/results/scaling_model.json`.
"""

from __future__ import annotations

import heapq
import json
import math
import random
import statistics
from typing import Any

from record import RESULTS, write_result

SIZES = {"1.5 B": 1.5e9, "7 B": 7e9, "32 B": 32e9, "72 B": 72e9}
WORKERS = (1, 4, 16, 64, 256, 1024)
STEPS = 40  # simulated steps of each case
ASSUMED = {
    "tokens_per_s_times_billions": 10_000.0,  # of a worker: 10,000 tokens/s at 1 B parameters, inversely in proportion
    "prompts": 200, "tokens": 300,  # of a member
    "job_sigma": 0.15,  # standard deviation of the logarithm of a job's time
    "straggler_share": 0.01, "straggler_factor": 4.0,  # jobs that take so many times as long
    "hours_between_failures": 500.0,  # of one worker
    "load_bytes_per_s": 1e9,  # of a new worker
    "patience": 2.0,  # `estune.engines.ray.engine.PATIENCE`
    "call_s": 0.0008,  # measured on one machine; a network adds to it
    "driver_s_per_job": 0.0005,  # packing, unpacking and scoring in the process that trains
}  # fmt: skip


def update_s(parameters: float, members: int) -> float:
    """Return the seconds of an update on a GPU, in proportion to the measured one of 30 members."""
    measured = json.loads((RESULTS / "gpu.json").read_text(encoding="utf-8"))
    per_element_and_member = measured["update"]["update"]["median_ms"] / 1e3 / measured["elements"] / 30
    return float(per_element_and_member * parameters * members)


def answers_s(workers: int, members: int, mean_s: float, load_s: float, rng: random.Random) -> float:
    """Return the seconds until all members of a step have answered."""
    a = ASSUMED

    def duration() -> float:
        slow = a["straggler_factor"] if rng.random() < a["straggler_share"] else 1.0
        return mean_s * slow * math.exp(rng.gauss(0.0, a["job_sigma"]) - a["job_sigma"] ** 2 / 2) + a["call_s"]

    free = [0.0] * workers  # when each worker is free
    heapq.heapify(free)
    ends = []
    handed_out = 0.0
    for _ in range(members):
        handed_out += a["driver_s_per_job"]
        start = max(heapq.heappop(free), handed_out)
        took = duration()
        fails = rng.random() < took / 3600 / a["hours_between_failures"]
        if fails:  # the worker loads again, and the job starts again on the next free worker
            heapq.heappush(free, start + took / 2 + load_s)
            start = max(heapq.heappop(free), start + took / 2)
            took = duration()
        ends.append((start + took, start))
        heapq.heappush(free, start + took)
    idle_from = sorted(free)[0] if workers > 1 else math.inf
    again = []
    for end, start in ends:  # an idle worker repeats a job that takes longer than `patience` times the mean
        noticed = max(idle_from, start + a["patience"] * mean_s)
        again.append(min(end, noticed + duration()) if noticed < end else end)
    return max(again)


def case(parameters: float, workers: int, members: int) -> dict[str, float]:
    """Return the median step time, and the share of it that a worker spends on answers that were needed."""
    a, rng = ASSUMED, random.Random(0)
    mean_s = a["prompts"] * a["tokens"] / (a["tokens_per_s_times_billions"] / (parameters / 1e9))
    load_s = 2 * parameters / a["load_bytes_per_s"]
    times = [answers_s(workers, members, mean_s, load_s, rng) for _ in range(STEPS)]
    step_s = statistics.median(times) + update_s(parameters, members)
    return {"step_s": step_s, "efficiency": members * mean_s / workers / step_s}


def main() -> None:
    """Simulate all cases, print them, and write the result."""
    cases: dict[str, Any] = {}
    for name, parameters in SIZES.items():
        for title, of_workers in (("N 30", lambda _: 30), ("N 4 a worker", lambda workers: 4 * workers)):
            rows = {str(workers): case(parameters, workers, of_workers(workers)) for workers in WORKERS}
            cases[f"{name}, {title}"] = rows
            print(f"{name:6} {title:13}", *(f"{row['efficiency']:6.0%}" for row in rows.values()))
    write_result("scaling_model", {"assumed": ASSUMED, "workers": list(WORKERS), "cases": cases})


if __name__ == "__main__":
    main()
