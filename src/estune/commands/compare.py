"""What `estune compare` does, behind the parser."""

from __future__ import annotations

from pathlib import Path

from estune.compare.config import Budget, Tuning, read_comparison
from estune.compare.plan import cells, entries
from estune.console import say
from estune.errors import UserError


def compare_command(file: Path, output_dir: Path | None, dry_run: bool, report_only: bool) -> int:
    """Carry a comparison out, or go on with it, and write its report."""
    if dry_run and report_only:
        raise UserError("dry_run and report_only exclude each other")
    comparison = read_comparison(file, output_dir)
    from estune.compare.report import write_report

    if report_only:
        if not (comparison.directory / "results").is_dir():
            raise UserError(f"{comparison.directory} holds no results yet")
        say(f"estune: {write_report(comparison.directory)}")
        return 0
    from estune.compare.runner import Runner

    runner = Runner(comparison)
    if dry_run:
        runner.check()
        runner.keep_plan(write=False)
        runs, found = len(list(cells(comparison))), entries(comparison)
        trials = sum(len(entry.trials) for entry in found.values()) * len(comparison.models)
        budget, tuning = comparison.budget, comparison.tuning
        say(f"estune: {len(found)} methods ({', '.join(found)}) on {len(comparison.models)} models with "
            f"{len(comparison.seeds)} seeds: {runs} runs of {_told(budget)}, after {trials} trials of "
            f"{_told(tuning)}; nothing was run")  # fmt: skip
        return 0
    try:
        runner.run()
    except KeyboardInterrupt:
        say("estune: stopped; the same command goes on from there")
        raise
    say(f"estune: {write_report(comparison.directory)}")
    return 0


def _told(limits: Budget | Tuning) -> str:
    evaluations = f"{limits.evaluations:,} evaluations" if limits.evaluations else ""
    return " and ".join(filter(None, [evaluations, f"{limits.time_s:g} s" if limits.time_s else ""]))
