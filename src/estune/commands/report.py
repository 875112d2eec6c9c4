"""`estune report`: the page and the PNG curves of finished or running runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from estune.console import say
from estune.monitor.monitors import REPORT_FILE
from estune.monitor.report.page import write_page
from estune.monitor.report.plots import plot_run, plot_runs


def report_command(runs: Sequence[Path], output_dir: Path | None) -> int:
    """Write `report.html` and the curves, and print where they are.

    Raises:
        UserError: a directory holds no run.
    """
    place = output_dir or (runs[0] if len(runs) == 1 else Path("report"))
    place.mkdir(parents=True, exist_ok=True)
    write_page(runs, place / REPORT_FILE)
    curves = plot_run(runs[0], place) if len(runs) == 1 else plot_runs(runs, place)
    say(f"estune: {place / REPORT_FILE} and {curves}")
    return 0
