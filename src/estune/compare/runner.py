"""Carries a comparison out: bases measured, methods tuned, runs made and measured; what is there is not done again.

Everything that a table needs is in `results/`, one JSON file per measurement, each naming the run that made it. Kill
it at any time and call it again: a run that was going on is resumed from its last step or checkpoint, a failed one is
a row of the report and not tried again, unless its result is deleted.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

from estune import inputs
from estune.compare import measure, worker
from estune.compare.config import Comparison
from estune.compare.plan import (
    BUDGETS,
    ENDLESS,
    Cell,
    cells,
    configuration,
    entries,
    evaluations_per_step,
    result_file,
    run_directory,
    with_budget,
)
from estune.config import ESConfig
from estune.environment import environment
from estune.errors import UserError
from estune.files import try_lock, write_json
from estune.monitors import say
from estune.records import read_metrics
from estune.tasks import get_task


class Runner:
    """A comparison that is being carried out."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.directory = comparison.directory
        self.train_rows = len(get_task(comparison.task).load("train"))
        self.context = worker.context()
        self._bases: dict[str, measure.Base] = {}

    def check(self) -> None:
        """Try every configuration before anything runs.

        Raises:
            UserError: one cannot work, or the directory holds another comparison.
        """
        for model in self.comparison.models:
            for method, entry in entries(self.comparison).items():
                for trial in entry.trials:
                    args = configuration(self.comparison, model, method, trial, 0)
                    if args.method not in ("es", "random_search"):
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
        for model in self.comparison.models:
            self._measure_base(model)
        for model in self.comparison.models:
            for method in entries(self.comparison):
                self._tune(model, method)
        for cell in cells(self.comparison):
            self._run(cell)
        say(f"estune: compared in {time.perf_counter() - started:.0f} s; results in {self.directory}")

    # --- bases --------------------------------------------------------------------------------------------------------

    def base(self, model: str) -> measure.Base:
        """Return a base's engine and greedy rows, made once."""
        if model not in self._bases:
            self._bases.clear()  # one at a time: they may be large
            args = measure.evaluation_config(self.comparison, self.comparison.models[model])
            engine = inputs.load_engine(args)
            greedy, _ = measure.answer(args, engine, measure.test_rows(self.comparison))
            self._bases[model] = measure.Base(engine, greedy.rows)
        return self._bases[model]

    def _measure_base(self, model: str) -> None:
        comparison, path = self.comparison, self.comparison.models[model]
        file = self.directory / "results" / model / "base.json"
        if not file.exists():
            say(f"estune: {model}: measuring the base")
            result = measure.measure(comparison, path, None)
            args = measure.evaluation_config(comparison, path)
            engine = inputs.load_engine(args)
            rows = measure.test_rows(comparison)
            result["never_solved"] = measure.never_solved(comparison, args, engine, rows, result["right_of"])
            result |= {"model": path, "fingerprint": engine.master.fingerprint()}
            _write(file, result)
        else:
            self._same_base(model, file)
        file = self.directory / "results" / model / "base-prefix.json"
        if comparison.skill_prefix and not file.exists():
            args = measure.evaluation_config(comparison, path, response_prefix=comparison.skill_prefix)
            greedy, _ = measure.answer(args, inputs.load_engine(args), measure.test_rows(comparison))
            _write(file, {**measure.of_greedy(greedy), "response_prefix": comparison.skill_prefix})

    def _same_base(self, model: str, file: Path) -> None:
        wanted = json.loads(file.read_text(encoding="utf-8"))["fingerprint"]
        found = self.base(model).engine.master.fingerprint()
        if found != wanted:
            raise UserError(f"model {self.comparison.models[model]} has fingerprint {found}, and the results in "
                            f"{self.directory} are of {wanted}")  # fmt: skip

    # --- tuning -------------------------------------------------------------------------------------------------------

    def _tune(self, model: str, method: str) -> None:
        """Run every trial of a method and choose the best one on the validation split."""
        comparison, entry = self.comparison, entries(self.comparison)[method]
        file = self.directory / "results" / model / method / "tuning.json"
        if file.exists():
            return
        tried: list[dict[str, Any]] = []
        for index, trial in enumerate(entry.trials):
            own = file.parent / f"trial-{index}.json"
            if not own.exists():
                say(f"estune: {model}: {method}, trial {index + 1} of {len(entry.trials)}: {_told(trial)}")
                _write(own, self._try(model, method, index, trial))
            tried.append(json.loads(own.read_text(encoding="utf-8")))
        done = [result for result in tried if result["status"] == "done"]
        best = max(done, key=lambda result: (result["accuracy"], result["reward"] or 0.0), default=tried[0])
        cost = {name: sum(result.get(name, 0) for result in tried) for name in ("evaluations", "train_time_s")}
        chosen = {"chosen": best["trial"], "rows": comparison.tuning.rows, "trials": tried, "cost": cost}
        _write(file, chosen)

    def _try(self, model: str, method: str, index: int, trial: dict[str, Any]) -> dict[str, Any]:
        comparison, tuning = self.comparison, self.comparison.tuning
        args = configuration(comparison, model, method, trial, tuning.seed)
        args = with_budget(args, tuning.evaluations, self.train_rows)
        directory = self.directory / "tuning" / model / method / f"trial-{index}"
        outcome = self._train(dataclasses.replace(args, output_dir=str(directory), report_to=["none"]))
        result = {"trial": trial, "run": str(directory.relative_to(self.directory)), **self._facts(directory)}
        if outcome.failed:
            return {**result, "status": "failed", "error": outcome.error}
        rows = get_task(comparison.task).load("validation")[: tuning.rows or None]
        config = measure.evaluation_config(comparison, str(directory))
        greedy, _ = measure.answer(config, inputs.load_engine(config), rows)
        summary = greedy.summary()
        _drop_trainer(directory)
        return {**result, "status": "done", "accuracy": summary["accuracy"], "reward": summary["reward"],
                "accuracy_ci95": summary["accuracy_ci95"]}  # fmt: skip

    # --- runs ---------------------------------------------------------------------------------------------------------

    def _run(self, cell: Cell) -> None:
        """Bring a cell to both budgets, the one that it reaches first at first, and measure it at each."""
        files = {budget: result_file(self.comparison, cell, budget) for budget in BUDGETS}
        if all(file.exists() for file in files.values()):
            return
        tuned = json.loads((files["time"].parent / "tuning.json").read_text(encoding="utf-8"))
        args = configuration(self.comparison, cell.model, cell.method, tuned["chosen"], cell.seed)
        args = with_budget(args, self.comparison.budget.evaluations, self.train_rows)
        steps, limit, directory = args.max_steps, self.comparison.budget.time_s, run_directory(self.comparison, cell)
        points = self.comparison.measuring.curve_points
        args = dataclasses.replace(args, output_dir=str(directory), eval_steps=max(1, steps // points),
                                   eval_rows=self.comparison.measuring.curve_rows)  # fmt: skip
        say(f"estune: {cell.name}: {_told(tuned['chosen'])}")
        first = dataclasses.replace(args, max_time_s=limit)
        outcome = self._train(first)
        if outcome.failed:
            for budget in BUDGETS:
                self._failed(cell, budget, outcome.error)
            return
        facts = self._facts(directory)
        whole = facts["steps"] >= steps
        reached = [budget for budget, is_reached in zip(BUDGETS, (whole, facts["train_time_s"] >= limit), strict=True)
                   if is_reached]  # fmt: skip
        if args.method == "sft_rejection" and whole:
            reached = list(BUDGETS)  # it is done with what it drew, however much time is left
        result = self._measure(cell, directory)
        for budget in reached:
            _write(files[budget], result)
        if len(reached) < len(BUDGETS):
            rest = dataclasses.replace(args, max_steps=ENDLESS, max_time_s=limit) if whole else args
            outcome = self._train(rest)
            left = "time" if whole else "evaluations"
            if outcome.failed:
                self._failed(cell, left, outcome.error)
            else:
                _write(files[left], self._measure(cell, directory))
        _drop_trainer(directory)

    def _train(self, args: ESConfig) -> worker.Outcome:
        directory = Path(str(args.output_dir))
        values = {spec.name: getattr(args, spec.name) for spec in dataclasses.fields(args)}
        values |= {"resume": directory.exists(), "console": "lines"}
        return worker.train(values, directory.with_suffix(".log"), self.context)

    def _failed(self, cell: Cell, budget: str, error: str) -> None:
        say(f"estune: {cell.name}: failed: {error}")
        directory = run_directory(self.comparison, cell)
        result = {"status": "failed", "error": error, **self._facts(directory), **self._origin(cell, directory)}
        _write(result_file(self.comparison, cell, budget), result)

    def _measure(self, cell: Cell, directory: Path) -> dict[str, Any]:
        result = measure.measure(self.comparison, str(directory), self.base(cell.model))
        state = json.loads((directory / "es_state.json").read_text(encoding="utf-8"))
        return {"status": "done", **result, **self._facts(directory), **self._origin(cell, directory),
                "fingerprint": state["fingerprint"]}  # fmt: skip

    def _origin(self, cell: Cell, directory: Path) -> dict[str, Any]:
        config = directory / "es_config.json"
        settings = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
        left_out = ("model", "output_dir", "run_name", "max_steps", "max_time_s")
        return {
            "model": cell.model,
            "method": cell.method,
            "seed": cell.seed,
            "run": str(directory.relative_to(self.directory)),
            "settings": {name: value for name, value in settings.items() if name not in left_out},
        }

    def _facts(self, directory: Path) -> dict[str, Any]:
        """Return what a run has used so far, and the curve of its held-out evaluations."""
        records = read_metrics(directory) if directory.exists() else []
        curve, last = [], {"evaluations": 0, "train_time_s": 0.0}
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
        growing = ("seeds", "output_dir", "notes", "methods", "models", "established_points")
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


def _write(file: Path, result: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, result)


def _told(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "defaults"


def _drop_trainer(directory: Path) -> None:
    """Delete what only a resume would need: optimizer and a second copy of the weights."""
    shutil.rmtree(directory / "trainer", ignore_errors=True)
