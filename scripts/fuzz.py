"""`make fuzz`: runs the real commands on random datasets, models, kills, damaged files and standard streams.

    .venv/bin/python scripts/fuzz.py [--cases 1000] [--seed 0] [--domain A B C D]
    .venv/bin/python scripts/fuzz.py --domain C --case '{"kills": [...], ...}'

Each case must end in success, in an error of one clear sentence, or in a resume to the same bytes. Prints the number of
cases by domain and outcome. Also prints each failing case with the command that repeats it, and exits with 1 if there
is one. The domains are modules in tests/fuzz.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "fuzz"), str(ROOT / "tests" / "helpers")]
CHUNK = 25  # cases for one process


def work(name: str, cases: list[dict[str, Any]]) -> tuple[str, Any]:
    """Run cases of a domain in this worker process; return the domain and the results."""
    return name, import_module("fuzz_run").run_cases(name, cases)


def chunks(names: list[str], n_cases: int, seed: int) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the cases of all domains as (domain, at most `CHUNK` cases), domain after domain."""
    fuzz_run = import_module("fuzz_run")
    parts = []
    for index, name in enumerate(names):
        share = n_cases // len(names) + (index < n_cases % len(names))
        cases = fuzz_run.draw(fuzz_run.DOMAINS[name].cases, share, seed)
        parts += [(name, cases[start : start + CHUNK]) for start in range(0, len(cases), CHUNK)]
    return parts


def show(name: str, case: dict[str, Any], fault: str) -> None:
    """Print a failing case and the command that repeats it."""
    print(
        f"\nFAULT in domain {name}: {fault}\n  python scripts/fuzz.py --domain {name} --case "
        f"{shlex.quote(json.dumps(case))}",
        flush=True,
    )


def main() -> int:
    """Draw the cases, run them on all cores, and count the outcomes; return the exit status."""
    domains = list(import_module("fuzz_run").DOMAINS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="number of cases, all domains together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--domain", nargs="+", choices=domains, default=domains)
    parser.add_argument("--case", help="one case as JSON; --domain names its domain")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    if options.case:
        parts = [(options.domain[0], [json.loads(options.case)])]
    else:
        parts = chunks(options.domain, options.cases, options.seed)
    started = time.monotonic()
    counts: dict[str, Counter[str]] = {name: Counter() for name in options.domain}
    seconds: Counter[str] = Counter()
    n_failures = 0
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(work, name, cases) for name, cases in parts]):
            name, results = done.result()
            counts[name] += results.outcomes
            seconds[name] += results.seconds
            n_failures += len(results.failures)
            for case, fault in results.failures:
                show(name, case, fault)
            done_cases = sum(outcomes.total() for outcomes in counts.values())
            print(f"{done_cases} cases after {time.monotonic() - started:.0f} s, {n_failures} faults", flush=True)
    for name, outcomes in counts.items():
        print(f"\ndomain {name}: {outcomes.total()} cases in {seconds[name]:.0f} s, {outcomes['FAULT']} faults")
        for outcome, count in outcomes.most_common():
            print(f"{count:6}  {outcome}")
    total = sum(outcomes.total() for outcomes in counts.values())
    print(f"\n{total} cases in {time.monotonic() - started:.0f} s, seed {options.seed}: {n_failures} faults")
    return 1 if n_failures else 0


if __name__ == "__main__":
    sys.exit(main())
