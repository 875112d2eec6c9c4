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
import random
import shlex
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "fuzz"), str(ROOT / "tests" / "helpers")]
CHUNK = 25  # cases for one process
MODULES = {"A": "fuzz_rows", "B": "fuzz_models", "C": "fuzz_kills", "D": "fuzz_streams"}  # of tests/fuzz
DOMAINS: dict[str, ModuleType] = {name: import_module(module) for name, module in MODULES.items()}
Forks: Any = import_module("fuzz_forks").Forks
Case = dict[str, Any]  # JSON, so that one line prints a case and repeats it
MEMORY = Path("/dev/shm")  # fsync costs nothing there


@dataclass
class Results:
    """The outcomes and failures of cases of a domain."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[Case, str]] = field(default_factory=list)
    seconds: float = 0.0


def settings(n_cases: int, derandomize: bool = False) -> Callable[[Any], Any]:
    """Return the settings for drawing ``n_cases`` cases, without time limit, database and shrinking."""
    return hypothesis.settings(
        max_examples=n_cases,
        derandomize=derandomize,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def draw(strategy: Any, n_cases: int, seed: int) -> list[Case]:
    """Return cases of a strategy as JSON values; a pure function of its arguments.

    Hypothesis varies earlier examples, so successive cases are similar. More cases are drawn than needed, and a random
    part of them is returned.
    """
    drawn: dict[str, None] = {}

    @hypothesis.seed(seed)
    @settings(4 * n_cases + 20)
    @hypothesis.given(strategy)
    def keep(case: Case) -> None:
        drawn[json.dumps(case, sort_keys=True)] = None

    keep()
    chosen = random.Random(seed).sample(list(drawn), min(n_cases, len(drawn)))
    return [json.loads(case) for case in chosen]


def run_case(domain: ModuleType, case: Case, forks: Any) -> tuple[str, str | None]:
    """Run one case in its own directory; return its outcome, and the fault or None."""
    with tempfile.TemporaryDirectory(prefix="estune-fuzz-", dir=MEMORY if MEMORY.is_dir() else None) as place:
        try:
            return domain.check(case, Path(place), forks), None
        except AssertionError as fault:
            return "FAULT", str(fault)
        except Exception:  # an error of the harness, or an unreadable file: reported with the case
            return "FAULT", traceback.format_exc()


def run_cases(name: str, cases: list[Case]) -> Results:
    """Run cases of a domain one after the other, with one server."""
    results = Results()
    started = time.monotonic()
    with Forks() as forks:
        for case, (outcome, fault) in _each(DOMAINS[name], cases, forks):
            results.outcomes[outcome] += 1
            if fault is not None:
                results.failures.append((case, fault))
    results.seconds = time.monotonic() - started
    return results


def _each(domain: ModuleType, cases: list[Case], forks: Any) -> Iterator[tuple[Case, tuple[str, str | None]]]:
    for case in cases:
        yield case, run_case(domain, case, forks)


def work(name: str, cases: list[Case]) -> tuple[str, Results]:
    """Run cases of a domain in this worker process; return the domain and the results."""
    return name, run_cases(name, cases)


def chunks(names: list[str], n_cases: int, seed: int) -> list[tuple[str, list[Case]]]:
    """Return the cases of all domains as (domain, at most `CHUNK` cases), domain after domain."""
    parts = []
    for index, name in enumerate(names):
        share = n_cases // len(names) + (index < n_cases % len(names))
        cases = draw(DOMAINS[name].cases, share, seed)
        parts += [(name, cases[start : start + CHUNK]) for start in range(0, len(cases), CHUNK)]
    return parts


def show(name: str, case: Case, fault: str) -> None:
    """Print a failing case and the command that repeats it."""
    print(
        f"\nFAULT in domain {name}: {fault}\n  python scripts/fuzz.py --domain {name} --case "
        f"{shlex.quote(json.dumps(case))}",
        flush=True,
    )


def main() -> int:
    """Draw the cases, run them on all cores, and count the outcomes; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="number of cases, all domains together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--domain", nargs="+", choices=DOMAINS, default=list(DOMAINS))
    parser.add_argument("--case", help="one case as JSON; --domain names its domain")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    if options.case:
        parts = [(options.domain[0], [json.loads(options.case)])]
    else:
        parts = chunks(options.domain, options.cases, options.seed)
    started = time.monotonic()
    counts: dict[str, Counter[str]] = {name: Counter() for name in options.domain}
    seconds = dict.fromkeys(options.domain, 0.0)
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
