"""One training run of a comparison, brought to its budgets and measured at each.

The budget that it reaches first comes first. There its model is kept, and measured as that of then: the run goes on to
the other one. What was measured is in a file of its own; what is there is not done again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from estune.compare import worker
from estune.compare.plan import EVALUATIONS, TIME, with_time
from estune.compare.processes import Processes
from estune.config import ESConfig
from estune.console import say
from estune.files import write_json
from estune.run.directory import OF_RUN
from estune.run.records import read_metrics
from estune.run.saved_config import CONFIG_FILE, METHOD_FILE

DONE, FAILED = "done", "failed"
UNMEASURED = "unmeasured"  # the run came to its end, and measuring its model failed: that is no fault of the method
FACTS_FILE = "comparison_facts.json"  # with a model that is kept: how it was made


@dataclass(frozen=True)
class Job:
    """A run and what is to be measured of it.

    ``measure(model, file, facts)`` measures the model in a directory and writes ``file``, with what is known of it and
    ``status`` `done`; it is called in another process.
    """

    name: str
    root: Path  # the comparison's directory
    args: ESConfig  # with the run's directory, and as many steps as its budget of evaluations pays for
    time_s: float  # of training: its budget of time, where ``files`` has one
    files: dict[str, Path]  # of each budget that it is brought to: what was measured
    models: Path  # beside this path, the budget's name behind it: a model that is to be measured
    facts: dict[str, Any]  # to be written down with every measurement
    measure: Callable[[str, Path, dict[str, Any]], None]
    code: str = ""  # digest of the package that runs it
    keeps_models: bool = True  # also after they were measured
    settings: str = ""  # in words, for who watches

    @property
    def directory(self) -> Path:
        """The run's directory."""
        return Path(str(self.args.output_dir))

    def run(self, processes: Processes) -> None:
        """Do what is not there yet.

        Raises:
            Stopped: the comparison is being stopped.
            UserError: something keeps it from going on that is none of the run's doing.
        """
        processes.wait_for(self.directory)
        for budget, file in self.files.items():
            if not file.exists():
                self._measure_kept(processes, budget)
            elif not self.keeps_models and _status(file) != UNMEASURED:  # killed between the two
                shutil.rmtree(self._kept(budget), ignore_errors=True)
        if not (left := self._left()):
            return
        only = f" ({left[0]})" if len(self.files) == 1 else ""
        say(f"estune: {self.name}{only}: {self.settings}")
        if self._is_past(left):
            shutil.rmtree(self.directory)
        if len(left) > 1 and self._go(processes, dataclasses.replace(self.args, max_time_s=self.time_s), left):
            left = self._left()
        for budget in left:
            if not self.files[budget].exists():
                args = with_time(self.args, self.time_s) if budget == TIME else self.args
                self._go(processes, args, [budget])
        for state in (self.directory / "trainer").glob("checkpoint-*"):  # optimizer and weights, for a resume
            shutil.rmtree(state)

    def _left(self) -> list[str]:
        return [budget for budget, file in self.files.items() if not file.exists()]

    def _is_past(self, left: Sequence[str]) -> bool:
        """Say whether the run is beyond a budget that is to be measured: its model of then is gone."""
        steps = [record for record in read_metrics(self.directory) if "eval_reward" not in record]
        times = [record.get("train_time_s") or 0.0 for record in steps]
        over = {
            EVALUATIONS: used_so_far(self.directory)["steps"] > self.args.max_steps,
            TIME: any(seconds >= self.time_s for seconds in times[:-1]),
        }
        return any(over[budget] for budget in left)

    def _go(self, processes: Processes, args: ESConfig, budgets: Sequence[str]) -> bool:
        """Run to the end of a configuration, and measure the model for those of ``budgets`` that are reached.

        Returns whether one was; else all of them are written down as failed.
        """
        trained_by = self._trained_by()
        outcome = processes.train(args)
        progress = used_so_far(self.directory)
        known = {
            **progress,
            **self.facts,
            "trained_by": trained_by,
            "run": self._place(self.directory),
            "settings": self._options(),
        }
        if not outcome.failed:
            met = {
                EVALUATIONS: progress["steps"] >= self.args.max_steps,
                TIME: progress["train_time_s"] >= args.max_time_s > 0,
            }
            reached = [budget for budget in budgets if met[budget]]
            for budget in reached:
                self._keep(budget, known)
                self._measure_kept(processes, budget)
            if reached:
                return True
            outcome = worker.Outcome(1, f"the run ended after {progress['steps']} steps, before any of its budgets")
        for budget in budgets:
            self._fail(budget, known, outcome)
        return False

    def _trained_by(self) -> list[str]:
        """Return the versions of the code that carried the run on, this one the last, and keep them beside it."""
        file = self.directory.with_name(f"{self.directory.name}.code.json")
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() and self.directory.exists() else []
        found = [*(code for code in before if code != self.code), self.code]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, found)
        return found

    def _kept(self, budget: str) -> Path:
        return self.models.with_name(f"{self.models.name}-{budget}")

    def _keep(self, budget: str, known: dict[str, Any]) -> None:
        """Keep the model that is to be measured, and what is known of it: the run may go on and replace it.

        Everything that is the model's, its tokenizer's, chat template's and code's files among it, and how it decodes.
        """
        place = self._kept(budget)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        for path in self.directory.iterdir():
            if path.name in (CONFIG_FILE, METHOD_FILE) or not any(fnmatch(path.name, pattern) for pattern in OF_RUN):
                if path.is_dir():
                    shutil.copytree(path, place / path.name, copy_function=os.link)
                else:
                    os.link(path, place / path.name)  # a later one is renamed over the name, not written into the file
        facts = {**known, "measured": self._place(place)} if self.keeps_models else known
        write_json(place / FACTS_FILE, facts)  # last: all is there

    def _measure_kept(self, processes: Processes, budget: str) -> None:
        """Measure the model that was kept for a budget, if one was."""
        place, file = self._kept(budget), self.files[budget]
        if not (place / FACTS_FILE).exists():
            return
        known = json.loads((place / FACTS_FILE).read_text(encoding="utf-8"))
        file.parent.mkdir(parents=True, exist_ok=True)
        twin = self._twin(budget, known)
        if twin is not None:
            write_json(file, twin | ({"measured": known["measured"]} if self.keeps_models else {}))
        else:
            log = f"logs/{self.name.replace('/', '-')}.log"
            outcome = processes.call(self.measure, (str(place), file, known), log)
            if outcome.failed:
                self._fail(budget, known, outcome, UNMEASURED)
                return  # the model stays: with the result deleted it is measured again
        if not self.keeps_models:
            shutil.rmtree(place)

    def _twin(self, budget: str, known: dict[str, Any]) -> dict[str, Any] | None:
        """Return what was measured for the other budget, if it was this very model: one step may meet both."""
        for other, file in self.files.items():
            if other != budget and file.exists():
                found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
                if found["status"] == DONE and all(found[name] == known[name] for name in ("run", "steps")):
                    return found
        return None

    def _fail(self, budget: str, known: dict[str, Any], outcome: worker.Outcome, status: str = FAILED) -> None:
        """Write a run that failed, or could not be measured, down as a row."""
        say(f"estune: {self.name}, {budget}: {status}: {outcome.error}")
        file = self.files[budget]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {**known, "status": status, "error": outcome.error})

    def _place(self, path: Path) -> str:
        return str(path.relative_to(self.root))

    def _options(self) -> dict[str, Any]:
        """Return the run's resolved options, those apart that say how long and where."""
        config = self.directory / CONFIG_FILE
        options = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
        left_out = ("model", "output_dir", "run_name", "max_steps", "max_time_s")
        return {name: value for name, value in options.items() if name not in left_out}


def _status(file: Path) -> str:
    return str(json.loads(file.read_text(encoding="utf-8"))["status"])


def used_so_far(directory: Path) -> dict[str, Any]:
    """Return what a run has used so far, and the curve of its held-out evaluations."""
    records = read_metrics(directory) if directory.exists() else []
    curve: list[list[float | None]] = []
    last = {"evaluations": 0, "train_time_s": 0.0}
    method = directory / METHOD_FILE
    if method.exists() and all("eval_reward" in record for record in records):
        # of rejection sampling that found nothing to learn from
        told = json.loads(method.read_text(encoding="utf-8"))
        if "drawing_s" in told:
            last = {"evaluations": told["samples_drawn"], "train_time_s": told["drawing_s"]}
    for record in records:
        if "eval_reward" in record:
            curve.append([last["evaluations"], last["train_time_s"], record.get("eval_accuracy")])
        else:
            last = {"evaluations": record["num_evaluations"], "train_time_s": record.get("train_time_s") or 0.0}
    return {**last, "steps": max((record["step"] for record in records), default=0), "curve": curve}
