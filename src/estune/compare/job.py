"""One training run of a comparison, trained to its budgets and measured at each.

The run stops at whichever budget it reaches first, a snapshot is measured there, and the run continues to the other
budget. Each measurement has a file of its own; a measurement that has a file is not repeated.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypedDict

from estune.compare import worker
from estune.compare.plan import EVALUATIONS, TIME, with_time
from estune.compare.processes import Processes
from estune.compare.results import DONE, FAILED, UNMEASURED, Result, read_json, read_result
from estune.config import SizedConfig
from estune.console import say
from estune.files import write_json
from estune.run.directory import OF_RUN
from estune.run.records import read_metrics
from estune.run.saved_config import CONFIG_FILE, METHOD_FILE

FACTS_FILE = "comparison_facts.json"  # in a snapshot's directory: the fields of its result that are known already


class Usage(TypedDict):
    """What a run has used so far, and its held-out evaluations."""

    evaluations: int
    train_time_s: float
    steps: int
    curve: list[list[float | None]]  # evaluations, seconds, validation accuracy


@dataclass(frozen=True)
class Job:
    """A run and its measurements.

    ``measure(model, file, facts)`` measures the model in a directory and writes ``file``, with ``facts`` and the status
    `DONE`; it is called in another process.
    """

    name: str
    root: Path  # the comparison's directory
    args: SizedConfig  # with the run's directory, and as many steps as its budget of evaluations pays for
    time_s: float  # seconds of training, the budget of time; unused if ``files`` has no such budget
    files: dict[str, Path]  # the result file of each budget
    snapshots: Path  # the snapshot of a budget is in the directory of this path with "-BUDGET" appended
    facts: Result  # fields that every result of this run has
    measure: Callable[[str, Path, Result], None]
    code: str = ""  # digest of the package that runs it
    keeps_snapshots: bool = True  # whether snapshots stay after they were measured
    settings: str = ""  # the run's settings as text, for the terminal

    @property
    def directory(self) -> Path:
        """The run's directory."""
        return Path(str(self.args.output_dir))

    def run(self, processes: Processes) -> None:
        """Train the run and measure it at every budget whose result file does not exist yet.

        Raises:
            Stopped: the comparison is being stopped.
            UserError: something outside the run blocks it (lock held, disk full).
        """
        processes.wait_for_orphan(self.directory)
        for budget, file in self.files.items():
            if not file.exists():
                self._measure_snapshot(processes, budget)
            elif not self.keeps_snapshots and _status(file) != UNMEASURED:  # killed after writing, before deleting
                shutil.rmtree(self._snapshot(budget), ignore_errors=True)
        if not (missing := self._missing_budgets()):
            return
        only = f" ({missing[0]})" if len(self.files) == 1 else ""
        say(f"estune: {self.name}{only}: {self.settings}")
        if self._is_past(missing):
            shutil.rmtree(self.directory)
        both = dataclasses.replace(self.args, max_time_s=self.time_s)
        if len(missing) > 1 and self._train_and_measure(processes, both, missing):
            missing = self._missing_budgets()
        for budget in missing:
            if not self.files[budget].exists():
                args = with_time(self.args, self.time_s) if budget == TIME else self.args
                self._train_and_measure(processes, args, [budget])
        for state in (self.directory / "trainer").glob("checkpoint-*"):  # optimizer and weights, for a resume
            shutil.rmtree(state)

    def _missing_budgets(self) -> list[str]:
        """Return the budgets without a result file."""
        return [budget for budget, file in self.files.items() if not file.exists()]

    def _is_past(self, budgets: Sequence[str]) -> bool:
        """Return whether the run has already passed one of these budgets, so that its model there is lost."""
        steps = [record for record in read_metrics(self.directory) if "eval_reward" not in record]
        times = [record.get("train_time_s") or 0.0 for record in steps]
        over = {
            EVALUATIONS: read_usage(self.directory)["steps"] > self.args.max_steps,
            TIME: any(seconds >= self.time_s for seconds in times[:-1]),
        }
        return any(over[budget] for budget in budgets)

    def _train_and_measure(self, processes: Processes, args: SizedConfig, budgets: Sequence[str]) -> bool:
        """Train to the limits of ``args``, and measure the model for each of ``budgets`` that is reached.

        Returns:
            Whether a budget was reached; if none was, the result of each is written as failed.
        """
        trained_by = self._trained_by()
        outcome = processes.train(args)
        usage = read_usage(self.directory)
        facts: Result = {
            **usage,
            **self.facts,
            "trained_by": trained_by,
            "run": self._below_root(self.directory),
            "settings": self._run_settings(),
        }
        if not outcome.failed:
            met = {
                EVALUATIONS: usage["steps"] >= self.args.max_steps,
                TIME: usage["train_time_s"] >= args.max_time_s > 0,
            }
            reached = [budget for budget in budgets if met[budget]]
            for budget in reached:
                self._save_snapshot(budget, facts)
                self._measure_snapshot(processes, budget)
            if reached:
                return True
            outcome = worker.Outcome(1, f"the run ended after {usage['steps']} steps, before any of its budgets")
        for budget in budgets:
            self._write_failure(budget, facts, outcome)
        return False

    def _trained_by(self) -> list[str]:
        """Return the digests of the code that trained the run, this code's last, and write them beside the run."""
        file = self.directory.with_name(f"{self.directory.name}.code.json")
        earlier: list[str] = read_json(file) if file.exists() and self.directory.exists() else []
        digests = [*(code for code in earlier if code != self.code), self.code]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, digests)
        return digests

    def _snapshot(self, budget: str) -> Path:
        return self.snapshots.with_name(f"{self.snapshots.name}-{budget}")

    def _save_snapshot(self, budget: str, facts: Result) -> None:
        """Copy the run's model, which the run replaces when it continues, and write the facts beside it.

        The snapshot has every file of the model: weights, tokenizer, chat templates, code and generation settings.
        """
        directory = self._snapshot(budget)
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        for path in self.directory.iterdir():
            if path.name in (CONFIG_FILE, METHOD_FILE) or not any(fnmatch(path.name, pattern) for pattern in OF_RUN):
                if path.is_dir():
                    shutil.copytree(path, directory / path.name, copy_function=os.link)
                else:
                    os.link(path, directory / path.name)  # safe: the run replaces its files by renaming new ones
        if self.keeps_snapshots:
            facts = {**facts, "measured": self._below_root(directory)}
        write_json(directory / FACTS_FILE, facts)  # last: a snapshot with this file is complete

    def _measure_snapshot(self, processes: Processes, budget: str) -> None:
        """Measure the snapshot of a budget, if it is complete."""
        directory, file = self._snapshot(budget), self.files[budget]
        if not (directory / FACTS_FILE).exists():
            return
        facts = read_result(directory / FACTS_FILE)
        file.parent.mkdir(parents=True, exist_ok=True)
        result = self._result_of_same_model(budget, facts)
        if result is not None:
            write_json(file, {**result, "measured": facts["measured"]} if self.keeps_snapshots else result)
        else:
            log = f"logs/{self.name.replace('/', '-')}.log"
            outcome = processes.call(self.measure, (str(directory), file, facts), log)
            if outcome.failed:
                self._write_failure(budget, facts, outcome, UNMEASURED)
                return  # the snapshot stays: if the result is deleted, it is measured again
        if not self.keeps_snapshots:
            shutil.rmtree(directory)

    def _result_of_same_model(self, budget: str, facts: Result) -> Result | None:
        """Return the other budget's result if it is of the same model: one step may reach both budgets."""
        for other, file in self.files.items():
            if other != budget and file.exists():
                result = read_result(file)
                if result["status"] == DONE and (result["run"], result["steps"]) == (facts["run"], facts["steps"]):
                    return result
        return None

    def _write_failure(self, budget: str, facts: Result, outcome: worker.Outcome, status: str = FAILED) -> None:
        """Write the result of a run that failed or could not be measured."""
        say(f"estune: {self.name}, {budget}: {status}: {outcome.error}")
        file = self.files[budget]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {**facts, "status": status, "error": outcome.error})

    def _below_root(self, path: Path) -> str:
        return str(path.relative_to(self.root))

    def _run_settings(self) -> dict[str, Any]:
        """Return the run's resolved options without its model, its directory and its limits."""
        config = self.directory / CONFIG_FILE
        options: dict[str, Any] = read_json(config) if config.exists() else {}
        left_out = ("model", "output_dir", "run_name", "max_steps", "max_time_s")
        return {name: value for name, value in options.items() if name not in left_out}


def _status(file: Path) -> str:
    return read_result(file)["status"]


def read_usage(directory: Path) -> Usage:
    """Return what a run has used so far, and its held-out evaluations, from the files in its directory."""
    records = read_metrics(directory) if directory.exists() else []
    curve: list[list[float | None]] = []
    evaluations, train_time_s = 0, 0.0
    method = directory / METHOD_FILE
    if method.exists() and all("eval_reward" in record for record in records):
        outcome = read_json(method)
        if "drawing_s" in outcome:  # rejection sampling without a step: no sample was right
            evaluations, train_time_s = outcome["samples_drawn"], outcome["drawing_s"]
    for record in records:
        if "eval_reward" in record:
            curve.append([evaluations, train_time_s, record.get("eval_accuracy")])
        else:
            evaluations, train_time_s = record["num_evaluations"], record.get("train_time_s") or 0.0
    steps = max((record["step"] for record in records), default=0)
    return {"evaluations": evaluations, "train_time_s": train_time_s, "steps": steps, "curve": curve}
