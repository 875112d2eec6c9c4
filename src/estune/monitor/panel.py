"""The terminal panel of a run, redrawn in place.

The panel shows the reward over the steps, the mean of each reward function if there are several, a histogram of the
members' fitness, how reliable their ranking is and what a step should gain, the progress of the current step, speed,
time left, and completions of the best, the median and the worst member of the last step. Other output is printed above
the panel. If standard output is not a terminal, `estune.monitor.monitors.ConsoleMonitor` prints lines instead.
"""

from __future__ import annotations

import contextlib
import errno
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from estune.console import counted, is_terminal, warn
from estune.monitor.monitors import duration, failures

BLOCKS = "▁▂▃▄▅▆▇█"
REDRAW_S = 0.25  # seconds between two redraws within a step, at least
SPARK_WIDTH, SPREAD_BINS = 32, 24  # characters
MOST_CHARACTERS = 300  # characters of a completion that are shown
NOISE, ENOUGH_STEPS = 0.15, 5  # mean reliability below which, and steps after which, a ranking counts as noise


def sparkline(values: Sequence[float | None], width: int = SPARK_WIDTH) -> str:
    """Return the last ``width`` values as blocks, scaled from lowest to highest; None becomes a space."""
    shown = list(values)[-width:]
    known = [value for value in shown if value is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if value is None else BLOCKS[round((value - low) * scale)] for value in shown)


def spread(values: Sequence[float], bins: int = SPREAD_BINS) -> str:
    """Return a histogram of values as blocks, from lowest to highest value; an empty bin is a space."""
    low, high = min(values), max(values)
    if low == high:
        return BLOCKS[-1]
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / (high - low) * bins))] += 1
    most = max(counts)
    return "".join(BLOCKS[(count * len(BLOCKS) - 1) // most] if count else " " for count in counts)


def plain(text: str) -> str:
    """Return a text without control characters, which could move the terminal's cursor."""
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in text)


class _Console(Console):
    """A console that raises if the reader of stdout closed the pipe; rich would end the process."""

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError."""
        raise BrokenPipeError(errno.EPIPE, "the reader of stdout closed the pipe")


@dataclass
class Excerpt:
    """One member's completion in the last step, with the member's place ("best", ...) and fitness, and the question."""

    place: str
    fitness: float
    question: str
    completion: str


@dataclass
class PanelMonitor:
    """The panel as a monitor; ``tick`` and ``members_done`` update it within a step."""

    title: str
    max_steps: int
    population_size: int
    first_step: int = 0
    console: Console = field(default_factory=lambda: _Console())

    def __post_init__(self) -> None:
        self.rewards: list[float | None] = []
        self.held_out: list[dict[str, Any]] = []
        self.fitness: list[float] = []
        self.excerpts: list[Excerpt] = []
        self.last: dict[str, Any] = {}
        self.steps_done = self.first_step
        self.done = 0  # members of the current step that have answered
        self.tokens = 0  # tokens per completion generated in the current batch
        self._times: list[float] = []
        self._last: list[dict[str, Any]] = []  # the records of the last steps
        self._drawn_at = 0.0
        self._broken = False
        self._closed = False
        # Only terminals are redirected: a stderr that goes into a file keeps its lines.
        self._live = Live(
            console=self.console,
            auto_refresh=False,
            transient=False,
            redirect_stdout=is_terminal(sys.stdout),
            redirect_stderr=is_terminal(sys.stderr),
        )
        self._try(self._live.start)

    def log(self, record: dict[str, Any]) -> None:
        """Show the metrics of a step or of an evaluation."""
        if "eval_reward" in record:
            self.held_out.append(record)
        else:
            self.last = record
            self.steps_done = record["step"]
            self.rewards.append(record["reward"])
            self._times = [*self._times[-9:], record["step_time"]]
            self._last = [*self._last[-9:], record]
            self.done = self.tokens = 0
        self.draw()

    def members(self, fitness: Sequence[float], excerpts: Sequence[Excerpt]) -> None:
        """Store the members' fitness (N,) of a step, and completions of some of them, for the next redraw."""
        self.fitness = [value for value in fitness if value == value]
        self.excerpts = list(excerpts)

    def members_done(self, done: int) -> None:
        """Show how many members of the current step have answered."""
        self.done, self.tokens = done, 0
        self._draw_soon()

    def tick(self) -> None:
        """Count one token that every sequence of the batch has generated."""
        self.tokens += 1
        self._draw_soon()

    def close(self, failed: bool = False) -> None:
        """Stop redrawing and leave the panel on the terminal; a second call does nothing."""
        if not self._closed and not self._broken:
            self._closed = True
            self.draw()
            self._try(self._live.stop)

    def draw(self) -> None:
        """Redraw now; a terminal error switches the panel off and never ends the run."""
        if self._broken:
            return
        self._drawn_at = time.monotonic()
        self._try(lambda: self._live.update(self.render(), refresh=True))

    def _try(self, action: Callable[[], None]) -> None:
        """Call ``action``; if it raises, switch the panel off for the rest of the run."""
        try:
            action()
        except Exception as error:  # a broken monitor must never end a run
            self._broken = True
            with contextlib.suppress(Exception):
                self._live.stop()
            warn(f"the panel failed and is off for the rest of the run: {error}")

    def _draw_soon(self) -> None:
        if time.monotonic() - self._drawn_at >= REDRAW_S:
            self.draw()

    def render(self) -> RenderableType:
        """Return the panel."""
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(ratio=1)
        for name, content in self._rows():
            grid.add_row(name, content)
        subtitle = f"step {self.steps_done}/{self.max_steps}"
        return Panel(
            Group(grid), title=Text(plain(self.title)), title_align="left", subtitle=subtitle, subtitle_align="right"
        )

    def _rows(self) -> list[tuple[str, RenderableType]]:
        last = self.last
        rows: list[tuple[str, RenderableType]] = []
        if last:
            number = (
                f"{_number(last['reward'])} ± {_number(last['es/fitness_std'])}, best "
                f"{_number(last['es/fitness_best'])}"
            )
            rows.append(("reward", Text.assemble((sparkline(self.rewards), "cyan"), "  ", number)))
            if of_functions := by_function(last):
                rows.append(("by function", Text(of_functions)))
        if self.fitness:
            low, high = min(self.fitness), max(self.fitness)
            strip = Text.assemble(f"{_number(low)} ", (spread(self.fitness), "blue"), f" {_number(high)}")
            rows.append(("members' fitness", strip))
        if ranks := ranking(self._last):
            rows.append(("ranking", Text(ranks)))
        if self.held_out:
            rows.append(("held-out", self._held_out()))
        if self.steps_done < self.max_steps:
            rows.append(("this step", self._step_state()))
        if self._times:
            left = (self.max_steps - self.steps_done) * sum(self._times) / len(self._times)
            pace = f"{last['es/tokens_per_s']:.0f} tokens/s, {last['step_time']:.1f} s a step, {duration(left)} left"
            if failed := failures(last):
                pace += f", {failed[0]} rewards failed{failed[1]}"
            rows.append(("pace", Text(pace)))
        if self.excerpts:
            question = plain(" ".join(self.excerpts[0].question.split()))
            rows.append(("asked", Text(question[:MOST_CHARACTERS], style="dim")))
        for excerpt in self.excerpts:
            text = plain(" ".join(excerpt.completion.split()))[:MOST_CHARACTERS] or "(empty)"
            fitness = (f"{_number(excerpt.fitness)}  ", "bold")
            rows.append((excerpt.place, Text.assemble(fitness, text, overflow="fold")))
        return rows

    def _step_state(self) -> RenderableType:
        state = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=self.population_size, completed=self.done, width=SPARK_WIDTH)
        state.add_row(bar, f"{self.done}/{self.population_size} members", f"token {self.tokens}" if self.tokens else "")
        return state

    def _held_out(self) -> Text:
        last = self.held_out[-1]
        name = "eval_accuracy" if last.get("eval_accuracy") is not None else "eval_reward"
        line = sparkline([record.get(name) for record in self.held_out])
        if name == "eval_accuracy":
            low, high = last["eval_accuracy_ci95"]
            value = f"accuracy {last[name]:.1%} [{low:.1%}, {high:.1%}], reward {_number(last['eval_reward'])}"
        else:
            value = f"reward {_number(last[name])}"
        return Text.assemble((line, "green"), f"  {value} ({last['eval_rows']} rows, step {last['step']})")


def by_function(record: dict[str, Any]) -> str:
    """Return mean and standard deviation of each reward function of a step, as text; empty for a single function."""
    names = [name.split("/", 1)[1].removesuffix("/mean") for name in record if re.fullmatch(r"rewards/.*/mean", name)]
    means = [f"{name} {_number(record[f'rewards/{name}/mean'])}" for name in names]
    stds = [record.get(f"rewards/{name}/std") for name in names]
    parts = [mean if std is None else f"{mean} ± {_number(std)}" for mean, std in zip(means, stds, strict=True)]
    return plain(", ".join(parts)) if len(parts) > 1 else ""


def ranking(last: Sequence[dict[str, Any]]) -> str:
    """Return what the last steps' records say about the ranking of the members, as text; empty if they say nothing.

    Chance alone gives a reliability of about a tenth.
    """
    reliable = _known(last, "es/reliability")
    if not reliable:
        return ""
    mean = sum(reliable) / len(reliable)
    advice = ": mostly noise, raise N or the batch" if len(reliable) >= ENOUGH_STEPS and mean < NOISE else ""
    text = f"{mean:.0%} reliable in the last {counted(len(reliable), 'step')}{advice}"
    gains, losses = _known(last, "es/expected_gain"), _known(last, "es/expected_loss")
    if not gains:
        return text
    loss = sum(losses) / len(losses) if losses else 0.0
    return f"{text}; a step should gain {sum(gains) / len(gains):.2g}{f' and lose {loss:.2g}' if loss > 0 else ''}"


def _known(last: Sequence[dict[str, Any]], name: str) -> list[float]:
    """Return the values of a metric in the records that have it."""
    return [record[name] for record in last if record.get(name) is not None]


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"
