"""Carries a comparison out: bases measured, methods tuned, runs made and measured; what is there is not done again.

Everything that a table needs is in `results/`, one JSON file per measurement, each naming the run that made it. Kill
it at any time and call it again: a run that was going on is resumed from its last step or checkpoint; a failed one is
a row of the report and not tried again, unless its result is deleted.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from estune.compare import measure, worker
from estune.compare.config import Comparison
from estune.compare.cost import Cost
from estune.compare.plan import (
    BUDGETS,
    ENDLESS,
    Cell,
    cells,
    configuration,
    entries,
    evaluations_per_step,
    goes_on,
    result_file,
    run_directory,
    with_budget,
)
from estune.config import ESConfig
from estune.environment import code_digest, environment
from estune.errors import UserError
from estune.files import try_lock, write_json
from estune.monitors import say
from estune.records import read_metrics
from estune.tasks import get_task

ATTEMPTS = 3  # of a run whose process was killed, by the system or by a crash in somebody's library


class Runner:
    """A comparison that is being carried out."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.directory = comparison.directory
        self.train_rows = len(get_task(comparison.task).load("train"))
        self.context = worker.context()
        self.code = code_digest()
        self.cost = Cost()

    def check(self) -> None:
        """Try every configuration before anything runs.

        Raises:
            UserError: one cannot work.
        """
        for kept in self.comparison.retention.values():
            get_task(kept.task)
            measure.evaluation_config(self.comparison, "tiny", **{**kept.settings, "task": kept.task})
        for model in self.comparison.models:
            for method, entry in entries(self.comparison).items():
                for trial in entry.trials:
                    args = configuration(self.comparison, model, method, trial, 0)
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
        self.cost.open(self.directory / "results" / "cost.json", self.code)
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
        """Call a function for each item, some at a time; the first error ends it."""
        with ThreadPoolExecutor(self.comparison.workers) as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                for future in futures:
                    future.result()
            except BaseException:
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
        """Choose a method's best trial on the validation split, and keep what the tuning cost."""
        folder = self.directory / "results" / model / method
        files = [folder / f"trial-{index}.json" for index in range(len(entries(self.comparison)[method].trials))]
        tried = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        done = [result for result in tried if result["status"] == "done"]
        best = max(done, key=lambda result: (result["accuracy"], result["reward"] or 0.0), default=tried[0])
        cost = {name: sum(result.get(name, 0) for result in tried) for name in ("evaluations", "train_time_s")}
        write_json(folder / "tuning.json", {"chosen": best["trial"], "rows": self.comparison.tuning.rows, "cost": cost})

    # --- runs ---------------------------------------------------------------------------------------------------------

    def _run(self, cell: Cell) -> None:
        """Bring a cell to both budgets, the one that it reaches first at first, and measure it at each."""
        files = {budget: result_file(self.comparison, cell, budget) for budget in BUDGETS}
        left = [budget for budget in BUDGETS if not files[budget].exists()]
        if not left:
            return
        tuned = json.loads((files["time"].parent / "tuning.json").read_text(encoding="utf-8"))
        args = configuration(self.comparison, cell.model, cell.method, tuned["chosen"], cell.seed)
        measuring, limit = self.comparison.measuring, self.comparison.budget.time_s
        args = with_budget(args, self.comparison.budget.evaluations, self.train_rows, measuring.curve_points)
        directory = str(run_directory(self.comparison, cell))
        sampled = args.method == "es" and args.temperature > 0  # curves are of greedy answers, whatever trains
        args = dataclasses.replace(args, output_dir=directory, eval_rows=measuring.curve_rows, eval_greedy=sampled)
        say(f"estune: {cell.name}: {_told(tuned['chosen'])}")
        if not goes_on(args):
            for budget in left:
                own = dataclasses.replace(args, output_dir=f"{args.output_dir}-{budget}")
                if budget == "time":
                    own = dataclasses.replace(own, max_steps=ENDLESS, max_time_s=limit)
                self._bring(cell, own, [budget])
            return
        steps_done = self._facts(Path(directory))["steps"]
        if "evaluations" in left and steps_done > args.max_steps:  # its result was taken away, and the run is past it
            shutil.rmtree(directory)
        if len(left) == len(BUDGETS):
            facts = self._bring(cell, dataclasses.replace(args, max_time_s=limit), left, steps=args.max_steps)
            if facts is None:
                return
            left = [budget for budget in BUDGETS if not files[budget].exists()]
        for budget in left:
            own = dataclasses.replace(args, max_steps=ENDLESS, max_time_s=limit) if budget == "time" else args
            self._bring(cell, own, [budget])
        _drop_trainer(Path(directory))

    def _bring(self, cell: Cell, args: ESConfig, budgets: list[str], steps: int = 0) -> dict[str, Any] | None:
        """Run to the end of a configuration, measure, and keep that for the budgets that are reached.

        With ``steps`` the run may have ended by either budget; otherwise all of ``budgets`` are reached. Returns what
        the run has used; None where it failed.
        """
        directory = Path(str(args.output_dir))
        outcome = self._train(args)
        facts = self._facts(directory)
        if steps:
            reached = {"evaluations": facts["steps"] >= steps, "time": facts["train_time_s"] >= args.max_time_s}
            if args.method == "sft_rejection" and reached["evaluations"]:
                reached["time"] = True  # it is done with what it drew, however much time is left
            budgets = [budget for budget in budgets if reached[budget]] if not outcome.failed else budgets
        files = [result_file(self.comparison, cell, budget) for budget in budgets]
        known = {**facts, **self._origin(cell, directory)}
        if not outcome.failed and files:
            known["measured"] = self._keep(directory, cell, budgets[0])
            log = f"logs/{cell.name.replace('/', '-')}.log"
            arguments = (self.comparison, str(directory), self.base_file(cell.model), files, known)
            outcome = self._call(measure.measure_run, arguments, log)
        if outcome.failed:
            say(f"estune: {cell.name}: failed: {outcome.error}")
            for file in files:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, {**known, "status": "failed", "error": outcome.error})
            return None
        return facts

    def _keep(self, directory: Path, cell: Cell, budget: str) -> str:
        """Keep the model that is measured, which the run may replace by a later one; return where."""
        place = self.directory / "models" / cell.model / cell.method / f"seed-{cell.seed}-{budget}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        for file in directory.iterdir():
            if file.is_file() and file.suffix in (".safetensors", ".json"):
                os.link(file, place / file.name)  # a later model is renamed over the name, not written into the file
        return str(place.relative_to(self.directory))

    def _train(self, args: ESConfig) -> worker.Outcome:
        directory = Path(str(args.output_dir))
        values = {spec.name: getattr(args, spec.name) for spec in dataclasses.fields(args)}
        log = directory.with_name(f"{directory.name}.log")
        for _ in range(ATTEMPTS):
            values |= {"resume": directory.exists(), "console": "lines"}
            outcome = worker.call(worker.train, (values,), log, self.context)
            self.cost.add(outcome.cpu_s)
            if outcome.code >= 0:  # it ended by itself
                break
            say(f"estune: {directory}: {outcome.error}; it goes on from where it was")
        return outcome

    def _call(self, function: Callable[..., None], arguments: tuple[Any, ...], log: str) -> worker.Outcome:
        outcome = worker.call(function, arguments, self.directory / log, self.context)
        self.cost.add(outcome.cpu_s)
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
            UserError: the directory holds another comparison.
        """
        file = self.directory / "comparison.json"
        plan = json.loads(json.dumps(dataclasses.asdict(self.comparison)))
        growing = ("seeds", "output_dir", "notes", "methods", "models", "established_points", "workers")
        if file.exists():
            then = json.loads(file.read_text(encoding="utf-8"))["comparison"]
            for name in plan:
                if name not in growing and plan[name] != then[name]:
                    raise UserError(f"{self.directory} holds a comparison with {name} {then[name]!r}, not "
                                    f"{plan[name]!r}: give another output_dir")  # fmt: skip
            for kind in ("methods", "models"):
                for name, entry in plan[kind].items():
                    if name in then[kind] and then[kind][name] != entry:
                        raise UserError(f"{self.directory} holds results of another {name}: give it another name")
        per_step = {
            f"{model}/{method}": evaluations_per_step(configuration(self.comparison, model, method, entry.trials[0], 0))
            for model in self.comparison.models
            for method, entry in entries(self.comparison).items()
        }
        write_json(file, {"comparison": plan, "evaluations_per_step": per_step, "environment": environment()})


def _told(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "defaults"


def _drop_trainer(directory: Path) -> None:
    """Delete what only a resume would need: optimizer and a second copy of the weights."""
    shutil.rmtree(directory / "trainer", ignore_errors=True)
