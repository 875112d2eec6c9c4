"""Draws and runs the cases of the fuzz run's domains."""

from __future__ import annotations

import json
import random
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import fuzz_kills
import fuzz_models
import fuzz_rows
import fuzz_streams
import hypothesis
from fuzz_forks import Case, Forks

DOMAINS: dict[str, ModuleType] = {"A": fuzz_rows, "B": fuzz_models, "C": fuzz_kills, "D": fuzz_streams}
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


def run_case(domain: ModuleType, case: Case, forks: Forks) -> tuple[str, str | None]:
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


def _each(domain: ModuleType, cases: list[Case], forks: Forks) -> Iterator[tuple[Case, tuple[str, str | None]]]:
    for case in cases:
        yield case, run_case(domain, case, forks)
