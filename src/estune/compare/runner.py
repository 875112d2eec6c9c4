"""Carries a comparison out: bases measured, methods tuned, runs made and measured; what is there is not done again.

Everything that a table needs is in `results/`, one JSON file per measurement, each naming the run that made it. Stop or
kill it at any time and call it again: a run that was going on is resumed from its last step or checkpoint. A run that
failed by itself is a row of the report and not tried again, unless its result is deleted; a model that is still there
is measured then, and not trained again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from estune.compare import measure, worker
from estune.compare.config import Comparison, from_mapping
from estune.compare.cost import Cost
from estune.compare.plan import (
    BUDGETS,
    Cell,
    cells,
    configuration,
    entries,
    evaluations_per_step,
    goes_on,
    result_file,
    rows_of,
    run_directory,
    with_budget,
    with_time,
)
from estune.config import ESConfig
from estune.environment import code_digest, environment, machine
from estune.errors import UserError
from estune.files import try_lock, write_json
from estune.monitors import say
from estune.records import read_metrics
from estune.tasks import get_task

ATTEMPTS = 3  # of a process that was killed, by the system or by a crash in somebody's library
GRACE_S = 1.0  # between a process that was cut off and another one in its place
FACTS_FILE = "comparison_facts.json"  # with a model that is kept: how it was made


class Stopped(Exception):
    """The comparison is being stopped: what was cut off is not written down, and goes on with the next start."""


class Runner:
    """A comparison that is being carried out."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.directory = comparison.directory
        self.train_rows = len(rows_of(comparison, "train"))
        self.context = worker.context()
        self.code = code_digest()
        self.cost = Cost()
        self.stopping = threading.Event()

    def check(self) -> None:
        """Try every configuration before anything runs.

        Raises:
            UserError: one cannot work.
        """
        for kept in self.comparison.retention.values():
            get_task(kept.task)
            measure.evaluation_config(self.comparison, "tiny", **{**kept.settings, "task": kept.task})
        for split in ("validation", "test"):
            rows_of(self.comparison, split)
        for model in self.comparison.models:
            for method, entry in entries(self.comparison).items():
                for trial in entry.trials:
                    args = configuration(self.comparison, model, method, trial, 0)
                    for evaluations in (self.comparison.tuning.evaluations, self.comparison.budget.evaluations):
                        with_budget(args, evaluations, self.train_rows)
                    if args.method != "es":
                        from estune.baselines.trainer import check_method

                        check_method(args)

    def run(self) -> None:
        """Do everything that is not there yet."""
        self.check()
        self.directory.mkdir(parents=True, exist_ok=True)
        if try_lock(self.directory) is None:
            raise UserError(f"another process runs the comparison in {self.directory}")
        self._keep_plan()
        started = time.perf_counter()
        self.cost.open(self.directory / "results" / "cost.json", {"code": self.code, "machine": machine()})
        self._each(self._base, list(self.comparison.models))
        todo = [
            (model, method, index)
            for model in self.comparison.models
            for method, entry in entries(self.comparison).items()
            for index in range(len(entry.trials))
        ]
        self._each(lambda trial: self._try(*trial), todo)
        for model in self.comparison.models:
            for method in entries(self.comparison):
                self._choose(model, method)
        self._each(self._run, list(cells(self.comparison)))
        say(f"estune: compared in {time.perf_counter() - started:.0f} s; results in {self.directory}")

    def _each(self, function: Callable[[Any], None], items: Iterable[Any]) -> None:
        """Call a function for each item, some at a time; the first error, or Ctrl-C, ends it.

        What runs meanwhile comes to its end, or was interrupted as well and saves what it has.
        """
        with ThreadPoolExecutor(self.comparison.workers) as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                self.stopping.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    # --- bases --------------------------------------------------------------------------------------------------------

    def base_file(self, model: str) -> Path:
        """Return where a base's measurement is kept."""
        return self.directory / "results" / model / "base.json"

    def _base(self, model: str) -> None:
        path, file = self.comparison.models[model], self.base_file(model)
        wanted = json.loads(file.read_text(encoding="utf-8"))["fingerprint"] if file.exists() else None
        if wanted is None:
            say(f"estune: {model}: measuring the base")
            outcome = self._call(measure.measure_base, (self.comparison, path, file), f"logs/{model}-base.log")
        else:
            outcome = self._call(measure.check_base, (self.comparison, path, wanted), f"logs/{model}-base.log")
        if outcome.failed:
            raise UserError(f"the base {model} cannot be measured: {outcome.error}")

    # --- tuning -------------------------------------------------------------------------------------------------------

    def _try(self, model: str, method: str, index: int) -> None:
        """Run a trial with the tuning's seed and budget, and evaluate it on validation rows."""
        comparison, tuning, entry = self.comparison, self.comparison.tuning, entries(self.comparison)[method]
        trial = entry.trials[index]
        file = self.directory / "results" / model / method / f"trial-{index}.json"
        if file.exists():
            return
        say(f"estune: {model}: {method}, trial {index + 1} of {len(entry.trials)}: {_told(trial)}")
        args = configuration(comparison, model, method, trial, tuning.seed)
        args = with_budget(args, tuning.evaluations, self.train_rows)
        directory = self.directory / "tuning" / model / method / f"trial-{index}"
        outcome = self._train(dataclasses.replace(args, output_dir=str(directory), report_to=["none"]))
        file.parent.mkdir(parents=True, exist_ok=True)
        facts = {"trial": trial, "code": self.code, **self._place(directory), **self._facts(directory)}
        if not outcome.failed:
            log = f"logs/{model}-{method}-trial-{index}.log"
            outcome = self._call(measure.measure_trial, (comparison, str(directory), file, facts), log)
        if outcome.failed:
            write_json(file, {**facts, "status": "failed", "error": outcome.error})
        _drop_trainer(directory)

    def _choose(self, model: str, method: str) -> None:
        """Choose a method's best trial on the validation split, once, and keep what the tuning cost.

        Raises:
            UserError: trials that were done again choose another, and there are results of the first.
        """
        folder = self.directory / "results" / model / method
        files = [folder / f"trial-{index}.json" for index in range(len(entries(self.comparison)[method].trials))]
        tried = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        done = [result for result in tried if result["status"] == "done"]
        best = max(done, key=lambda result: (result["accuracy"], result["reward"] or 0.0), default=tried[0])
        file = folder / "tuning.json"
        if file.exists() and any(folder.glob("seed-*.json")):
            then = json.loads(file.read_text(encoding="utf-8"))["chosen"]
            if then != best["trial"]:
                raise UserError(f"{folder} holds results of {_told(then)}, and its trials now choose "
                                f"{_told(best['trial'])}: delete the results, seed-*.json, and their runs")  # fmt: skip
        cost = {name: sum(result.get(name, 0) for result in tried) for name in ("evaluations", "train_time_s")}
        write_json(file, {"chosen": best["trial"], "rows": self.comparison.tuning.rows, "cost": cost})

    # --- runs ---------------------------------------------------------------------------------------------------------

    def _run(self, cell: Cell) -> None:
        """Bring a cell to both budgets, the one that it reaches first at first, and measure it at each."""
        files = {budget: result_file(self.comparison, cell, budget) for budget in BUDGETS}
        for budget, file in files.items():
            if not file.exists():
                self._measure_kept(cell, budget, file)
        left = [budget for budget in BUDGETS if not files[budget].exists()]
        if not left:
            return
        tuned = json.loads((files["time"].parent / "tuning.json").read_text(encoding="utf-8"))
        args = configuration(self.comparison, cell.model, cell.method, tuned["chosen"], cell.seed)
        measuring, limit = self.comparison.measuring, self.comparison.budget.time_s
        args = with_budget(args, self.comparison.budget.evaluations, self.train_rows, measuring.curve_points)
        directory = run_directory(self.comparison, cell)
        sampled = args.method == "es" and args.temperature > 0  # curves are of greedy answers, whatever trains
        args = dataclasses.replace(args, output_dir=str(directory), eval_rows=measuring.curve_rows, eval_greedy=sampled)
        say(f"estune: {cell.name}: {_told(tuned['chosen'])}")
        if not goes_on(args):
            for budget in left:
                own = with_time(args, limit) if budget == "time" else args
                self._bring(
                    cell, dataclasses.replace(own, output_dir=f"{directory}-{budget}"), [budget], args.max_steps
                )
            return
        if self._is_past(directory, left, args.max_steps):
            shutil.rmtree(directory)
        if len(left) == len(BUDGETS):
            if not self._bring(cell, dataclasses.replace(args, max_time_s=limit), left, args.max_steps):
                return
            left = [budget for budget in BUDGETS if not files[budget].exists()]
        for budget in left:
            self._bring(cell, with_time(args, limit) if budget == "time" else args, [budget], args.max_steps)
        _drop_trainer(directory)

    def _is_past(self, directory: Path, left: Sequence[str], steps: int) -> bool:
        """Say whether a run is beyond a budget that is to be measured: its model of then is gone."""
        times = [record["train_time_s"] for record in read_metrics(directory) if "eval_reward" not in record]
        over = {
            "evaluations": self._facts(directory)["steps"] > steps,
            "time": any(seconds >= self.comparison.budget.time_s for seconds in times[:-1]),
        }
        return any(over[budget] for budget in left)

    def _bring(self, cell: Cell, args: ESConfig, budgets: Sequence[str], steps: int) -> bool:
        """Run to the end of a configuration, and measure the model for those of ``budgets`` that are reached.

        A budget of evaluations is ``steps`` steps. Returns whether the training itself came to its end.
        """
        directory = Path(str(args.output_dir))
        outcome = self._train(args)
        facts = self._facts(directory)
        known = {**facts, **self._origin(cell, directory)}
        if not outcome.failed:
            reached = {"evaluations": facts["steps"] >= steps, "time": facts["train_time_s"] >= args.max_time_s > 0}
            for budget in [budget for budget in budgets if reached[budget]]:
                self._keep(directory, cell, budget, known)
                self._measure_kept(cell, budget, result_file(self.comparison, cell, budget))
            if any(reached[budget] for budget in budgets):
                return True
            outcome = worker.Outcome(1, f"the run ended after {facts['steps']} steps, before any of its budgets")
        for budget in budgets:
            self._fail(result_file(self.comparison, cell, budget), known, outcome)
        return False

    def _keep(self, directory: Path, cell: Cell, budget: str, known: dict[str, Any]) -> None:
        """Keep the model that is to be measured, and what is known of it: the run may go on and replace it."""
        place = self._kept(cell, budget)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        for file in directory.iterdir():
            if file.is_file() and file.suffix in (".safetensors", ".json"):
                os.link(file, place / file.name)  # a later model is renamed over the name, not written into the file
        write_json(
            place / FACTS_FILE, {**known, "measured": str(place.relative_to(self.directory))}
        )  # last: all is there

    def _kept(self, cell: Cell, budget: str) -> Path:
        return self.directory / "models" / cell.model / cell.method / f"seed-{cell.seed}-{budget}"

    def _measure_kept(self, cell: Cell, budget: str, file: Path) -> None:
        """Measure the model that was kept for a budget, if one was."""
        facts = self._kept(cell, budget) / FACTS_FILE
        if not facts.exists():
            return
        known = json.loads(facts.read_text(encoding="utf-8"))
        for other in (result_file(self.comparison, cell, each) for each in BUDGETS if each != budget):
            twin = json.loads(other.read_text(encoding="utf-8")) if other.exists() else {"status": "none"}
            if twin["status"] == "done" and all(twin[name] == known[name] for name in ("run", "steps")):
                write_json(file, {**twin, "measured": known["measured"]})  # one model meets both budgets
                return
        log = f"logs/{cell.name.replace('/', '-')}.log"
        arguments = (self.comparison, str(facts.parent), self.base_file(cell.model), [file], known)
        outcome = self._call(measure.measure_run, arguments, log)
        if outcome.failed:
            self._fail(file, known, outcome)

    def _fail(self, file: Path, known: dict[str, Any], outcome: worker.Outcome) -> None:
        """Write a run that failed down as a row."""
        say(f"estune: {file.parent.parent.name}/{file.parent.name}/{file.stem}: failed: {outcome.error}")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {**known, "status": "failed", "error": outcome.error})

    def _train(self, args: ESConfig) -> worker.Outcome:
        """Run or resume a training run to its end."""
        directory = Path(str(args.output_dir))
        values = {spec.name: getattr(args, spec.name) for spec in dataclasses.fields(args)}

        def once() -> worker.Outcome:
            given = {**values, "resume": directory.exists(), "console": "lines"}
            return worker.call(worker.train, (given,), directory.with_name(f"{directory.name}.log"), self.context)

        return self._to_its_end(once, str(directory))

    def _call(self, function: Callable[..., None], arguments: tuple[Any, ...], log: str) -> worker.Outcome:
        """Call a function in a process of its own, to its end."""
        return self._to_its_end(lambda: worker.call(function, arguments, self.directory / log, self.context), log)

    def _to_its_end(self, once: Callable[[], worker.Outcome], name: str) -> worker.Outcome:
        """Start a process, and again where it was killed or asked to stop by somebody else.

        Raises:
            Stopped: the comparison is being stopped.
        """
        for attempt in range(ATTEMPTS):
            if self.stopping.is_set():
                raise Stopped
            outcome = once()
            self.cost.add(outcome.cpu_s)
            if not outcome.cut:
                break
            self.stopping.wait(GRACE_S)  # Ctrl-C reaches the process and, a little later, this one
            if self.stopping.is_set():
                raise Stopped
            if attempt + 1 < ATTEMPTS:
                say(f"estune: {name}: {outcome.error}; it goes on from where it was")
        return outcome

    def _place(self, directory: Path) -> dict[str, Any]:
        return {"run": str(directory.relative_to(self.directory))}

    def _origin(self, cell: Cell, directory: Path) -> dict[str, Any]:
        config = directory / "es_config.json"
        settings = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
        left_out = ("model", "output_dir", "run_name", "max_steps", "max_time_s")
        return {
            "model": cell.model,
            "method": cell.method,
            "seed": cell.seed,
            "code": self.code,
            **self._place(directory),
            "settings": {name: value for name, value in settings.items() if name not in left_out},
        }

    def _facts(self, directory: Path) -> dict[str, Any]:
        """Return what a run has used so far, and the curve of its held-out evaluations."""
        records = read_metrics(directory) if directory.exists() else []
        curve: list[list[float | None]] = []
        last = {"evaluations": 0, "train_time_s": 0.0}
        for record in records:
            if "eval_reward" in record:
                curve.append([last["evaluations"], last["train_time_s"], record.get("eval_accuracy")])
            else:
                last = {"evaluations": record["num_evaluations"], "train_time_s": record["train_time_s"] or 0.0}
        return {**last, "steps": max((record["step"] for record in records), default=0), "curve": curve}

    def _keep_plan(self) -> None:
        """Write what is compared and where; another comparison's results are not mixed in.

        Raises:
            UserError: the directory holds another comparison, or results of what is not in this one.
        """
        file = self.directory / "comparison.json"
        whole = dataclasses.replace(self.comparison, methods=entries(self.comparison))
        plan = json.loads(json.dumps(dataclasses.asdict(whole)))
        found = environment()
        growing = ("seeds", "output_dir", "notes", "methods", "models", "established_points", "workers")
        if file.exists():
            kept = json.loads(file.read_text(encoding="utf-8"))
            then = json.loads(json.dumps(dataclasses.asdict(from_mapping(kept["comparison"]))))  # options added since
            for name in plan:
                if name not in growing and plan[name] != then[name]:
                    raise UserError(f"{self.directory} holds a comparison with {name} {then[name]!r}, not "
                                    f"{plan[name]!r}: give another output_dir")  # fmt: skip
            for kind in ("methods", "models"):
                for name, entry in then[kind].items():
                    if name not in plan[kind]:
                        raise UserError(f"{self.directory} holds results of {name}, which is not compared any more: "
                                        "give another output_dir, so that nothing is left out")  # fmt: skip
                    if plan[kind][name] != entry:
                        raise UserError(f"{self.directory} holds results of another {name}: give it another name")
            if gone := set(then["seeds"]) - set(plan["seeds"]):
                raise UserError(f"{self.directory} holds results of seed {min(gone)}, which is not compared any more: "
                                "give another output_dir, so that nothing is left out")  # fmt: skip
            found = kept["environment"]  # each sitting's machine is kept with its cost
        per_step = {
            f"{model}/{method}": evaluations_per_step(configuration(self.comparison, model, method, entry.trials[0], 0))
            for model in self.comparison.models
            for method, entry in entries(self.comparison).items()
        }
        write_json(file, {"comparison": plan, "evaluations_per_step": per_step, "environment": found})


def _told(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "defaults"


def _drop_trainer(directory: Path) -> None:
    """Delete what only a resume would need: optimizer and a second copy of the weights."""
    shutil.rmtree(directory / "trainer", ignore_errors=True)
