"""Monitors of a run: lines on a terminal, `metrics.jsonl`, PNG curves and the HTML page.

A monitor that cannot start is an error. A monitor that fails later causes one warning and never ends the run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from estune.console import finite_or_none, say, warn
from estune.errors import UserError
from estune.files import writing
from estune.run.records import METRICS_FILE

REPORT_FILE = "report.html"


class Monitor(Protocol):
    """Receives the metric records of training steps and of evaluations (names that begin with ``eval_``)."""

    def log(self, record: dict[str, Any]) -> None:
        """Receive one record; ``record["step"]`` is the number of steps done."""

    def close(self, failed: bool = False) -> None:
        """Finish; ``failed`` is True if an error ended the run."""


PROGRESS_S = 60.0  # seconds between lines within a step


class JsonlMonitor:
    """Appends every record to `metrics.jsonl`. This file is part of the run, so an error here ends the run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def log(self, record: dict[str, Any]) -> None:
        """Append one record as a line."""
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({name: finite_or_none(value) for name, value in record.items()}) + "\n")

    def close(self, failed: bool = False) -> None:
        """Nothing is held open."""


class ConsoleMonitor:
    """Prints one line of plain text a step, on a terminal, into a log file or over a pipe."""

    def __init__(self, max_steps: int, first_step: int) -> None:
        self.max_steps = max_steps
        self._times: list[float] = []
        self._width = len(str(max_steps))

    def log(self, record: dict[str, Any]) -> None:
        """Print one line."""
        step = f"step {record['step']:>{self._width}}/{self.max_steps}"
        if "eval_reward" in record:
            accuracy = record.get("eval_accuracy")
            low, high = record.get("eval_accuracy_ci95", (0.0, 0.0))
            right = "" if accuracy is None else f"  accuracy {accuracy:6.1%} [{low:.1%}, {high:.1%}]"
            reward = record["eval_reward"]
            text = f"{step}  held-out ({record['eval_rows']} rows){right}" + (
                f"  reward {reward:.3f}" if reward is not None else "  reward: all failed"
            )
            say(text)
            return
        self._times = [*self._times[-9:], record["step_time"]]
        left = (self.max_steps - record["step"]) * sum(self._times) / len(self._times)
        failed = failures(record)
        failed_rewards = f"  failed {failed[0]}{failed[1]}" if failed else ""
        if "es/update_ratio" in record:
            spread = f"{_number(record['es/fitness_std'])}  best {_number(record['es/fitness_best'])}"
            moved = f"moved {record['es/update_ratio']:.1e}"
        else:  # a method without a population
            spread, moved = _number(record.get("reward_std")), f"loss {_number(record.get('loss'))}"
        say(
            f"{step}  reward {_number(record.get('reward'))} ± {spread}"
            f"  length {record.get('completions/mean_length', 0):.0f}"
            f"  {moved}  {record['step_time']:.1f} s{failed_rewards}  left {duration(left)}"
        )

    def close(self, failed: bool = False) -> None:
        """Nothing is held open."""


class HasSteps(Protocol):
    """An open run."""

    @property
    def steps_done(self) -> int:
        """The number of finished steps."""


class MemberLines:
    """Prints how many members of a long step have answered, at most one line a minute.

    Args:
        max_steps: of the run.
        population_size: members of a step.
        run: counts the finished steps.
        clock: returns seconds.
    """

    def __init__(
        self,
        max_steps: int,
        population_size: int,
        run: HasSteps,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._of, self._population_size, self._run, self._clock = max_steps, population_size, run, clock
        self._step = run.steps_done
        self._last_call = self._since = clock()  # seconds; since the step's start or its last line

    def tick(self) -> None:
        """Do nothing; a panel redraws itself."""

    def members_done(self, done: int) -> None:
        """Print a line if the step's start or its last line is `PROGRESS_S` ago."""
        step, now = self._run.steps_done, self._clock()
        if step != self._step:
            self._step, self._since = step, self._last_call
        self._last_call = now
        if now - self._since >= PROGRESS_S and done < self._population_size:
            self._since = now
            say(f"step {step + 1}/{self._of}  {done}/{self._population_size} members")


class PlotMonitor:
    """Redraws the run's curves after each evaluation and at the end."""

    def __init__(self, run_dir: Path) -> None:
        try:
            from estune.monitor.report.plots import plot_run
        except ImportError as error:
            raise UserError(f"report_to plot needs matplotlib ({error})") from None
        self._draw: Callable[[Path], object] = plot_run
        self.run_dir = run_dir

    def log(self, record: dict[str, Any]) -> None:
        """Redraw after an evaluation."""
        if "eval_reward" in record:
            self._draw(self.run_dir)

    def close(self, failed: bool = False) -> None:
        """Draw the final curves."""
        if (self.run_dir / METRICS_FILE).exists():
            self._draw(self.run_dir)


class ReportMonitor:
    """Writes the run's page, `report.html`, after each evaluation and at the end."""

    def __init__(self, run_dir: Path) -> None:
        from estune.monitor.report.page import write_page

        self._write: Callable[[list[Path], Path], object] = write_page
        self.run_dir = run_dir

    def log(self, record: dict[str, Any]) -> None:
        """Write the page after an evaluation."""
        if "eval_reward" in record:
            self.close()

    def close(self, failed: bool = False) -> None:
        """Write the final page."""
        if (self.run_dir / METRICS_FILE).exists():
            self._write([self.run_dir], self.run_dir / REPORT_FILE)


class Monitors:
    """All monitors of a run: an error of a required monitor propagates, a broken optional monitor is switched off."""

    def __init__(self, required: Iterable[Monitor], optional: Iterable[Monitor]) -> None:
        self.required = list(required)
        self.optional = list(optional)

    def log(self, record: dict[str, Any]) -> None:
        """Pass a record to every monitor."""
        for monitor in self.required:
            monitor.log(record)
        for monitor in list(self.optional):
            self._guard(monitor, lambda monitor=monitor: monitor.log(record))  # type: ignore[misc]

    def close(self, failed: bool = False) -> None:
        """Close every monitor."""
        for monitor in self.required:
            monitor.close(failed)
        for monitor in list(self.optional):
            self._guard(monitor, lambda monitor=monitor: monitor.close(failed))  # type: ignore[misc]

    def _guard(self, monitor: Monitor, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a broken monitor must never end a run
            self.optional.remove(monitor)
            name = getattr(monitor, "name", type(monitor).__name__)
            warn(f"{name} failed and is off for the rest of the run: {error}")


def failures(record: dict[str, Any]) -> tuple[int, str] | None:
    """Return the number of failed rewards of a step and the functions: ``(3, " (accuracy 2, format 1)")``.

    The text is empty if there is only one reward function. The result is None if no reward failed.
    """
    total = record.get("es/reward_errors", record.get("reward_errors"))
    if not total:
        return None
    names = {
        name: name.removeprefix("rewards/").removesuffix("/errors")
        for name in record
        if name.startswith("rewards/") and name.endswith("/errors")
    }
    counts = [f"{function} {record[name]:.0f}" for name, function in names.items() if record[name]]
    return round(total), f" ({', '.join(counts)})" if len(names) > 1 else ""


def duration(seconds: float) -> str:
    """Return 75 as ``1:15`` and 3700 as ``1:01:40``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _number(value: float | None) -> str:
    return "   n/a" if value is None else f"{value:6.3f}"
