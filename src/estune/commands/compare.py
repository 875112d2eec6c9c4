"""`estune compare`: run a comparison of methods, or draw its report."""

from __future__ import annotations

from pathlib import Path

from estune.compare.config import Budget, Tuning, read_comparison
from estune.compare.plan import cells, entries
from estune.compare.statistics import require_scipy
from estune.console import say
from estune.errors import UserError


def compare_command(file: Path, output_dir: Path | None, dry_run: bool, report_only: bool) -> int:
    """Run or continue a comparison, then write its report and its packed results.

    Raises:
        UserError: the options exclude each other, the file is not a comparison, or there are no results to report.
    """
    if dry_run and report_only:
        raise UserError("dry_run and report_only exclude each other")
    if report_only and file.suffix == ".json":
        return _redraw(file, output_dir or file.with_suffix(""))
    if file.suffix == ".json" and _is_packed(file):
        raise UserError(f"{file} holds the results of a comparison: add --report_only to draw its page")
    require_scipy()
    comparison = read_comparison(file, output_dir)
    if report_only:
        if not (comparison.directory / "results").is_dir():
            raise UserError(f"{comparison.directory} holds no results yet")
        return _report(comparison.directory)
    from estune.compare.runner import Runner

    runner = Runner(comparison)
    if dry_run:
        runner.check()
        runner.check_plan()
        runs, methods = len(list(cells(comparison))), entries(comparison)
        trials = sum(len(entry.trials) for entry in methods.values()) * len(comparison.models)
        budget, tuning = comparison.budget, comparison.tuning
        say(
            f"estune: {len(methods)} methods ({', '.join(methods)}) on {len(comparison.models)} models with "
            f"{len(comparison.seeds)} seeds: {runs} runs of {_limits(budget)}, after {trials} trials of "
            f"{_limits(tuning)}; nothing was run"
        )
        return 0
    try:
        runner.run()
    except KeyboardInterrupt:
        say("estune: stopped; the same command continues the comparison")
        raise
    return _report(comparison.directory)


def _report(directory: Path) -> int:
    """Write a comparison's page, and the results that the page shows as one file beside it."""
    from estune.compare.archive import ARCHIVE_FILE, pack, write_archive
    from estune.compare.report import write_report

    page = write_report(directory)
    write_archive(pack(directory), directory / ARCHIVE_FILE)
    say(f"estune: {page}")
    return 0


def _is_packed(file: Path) -> bool:
    """Return whether a file is a packed comparison, even a damaged one."""
    from estune.compare.archive import FORMAT

    return file.is_file() and FORMAT.encode() in file.read_bytes()[:1000]


def _redraw(file: Path, directory: Path) -> int:
    """Write the page of a packed comparison, and the result files that the page links to."""
    from estune.compare.archive import read_archive, unpack
    from estune.compare.report import write_report

    unpack(read_archive(file), directory)
    say(f"estune: {write_report(directory)}")
    return 0


def _limits(limits: Budget | Tuning) -> str:
    """Return the limits of a run or a trial as text, such as ``3,000 evaluations and 60 s``."""
    evaluations = f"{limits.evaluations:,} evaluations" if limits.evaluations else ""
    return " and ".join(filter(None, [evaluations, f"{limits.time_s:g} s" if limits.time_s else ""]))
