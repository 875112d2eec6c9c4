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
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from estune.compare import measure
from estune.compare.config import Comparison, from_mapping
from estune.compare.job import Job
from estune.compare.plan import (
    CHOSEN,
    Cell,
    budgets_of,
    can_resume,
    cells,
    chosen_for,
    configuration,
    entries,
    evaluated_every,
    result_file,
    rows_of,
    run_directory,
    trial_file,
    tuned_budgets,
    with_budget,
)
from estune.compare.processes import Processes
from estune.console import say
from estune.environment import code_digest, environment, machine, versions
from estune.errors import UserError
from estune.files import try_lock, write_json
from estune.rewards.loading import load_reward, source_digest
from estune.rewards.sources import source_parts
from estune.tasks import get_task
from estune.train import setup

SPLITS = ("train", "validation", "test")
COSTS = ("evaluations", "train_time_s")


class Runner:
    """A comparison that is being carried out."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.directory = comparison.directory
        self.task = get_task(comparison.task, bool(comparison.settings.get("allow_unsandboxed_code")))
        self.train_rows = len(rows_of(comparison, "train"))
        self.code = code_digest()
        self.processes = Processes(self.directory)

    def check(self) -> None:
        """Try every configuration before anything runs.

        Raises:
            UserError: one cannot work.
        """
        for kept in self.comparison.retention.values():
            args = measure.retained_config(self.comparison, "tiny", kept)
            setup.task_of(args)  # its sandbox works
            splits = get_task(kept.task, args.allow_unsandboxed_code).splits
            if kept.split not in splits or kept.split == "train":
                raise UserError(
                    f"retention cannot be measured on split {kept.split!r} of {kept.task}; it has "
                    f"{', '.join(split for split in splits if split != 'train')}"
                )
        setup.task_of(measure.evaluation_config(self.comparison, "tiny"))
        wanted = {"validation": self.comparison.tuning.rows, "test": self.comparison.measuring.rows}
        for split, rows in wanted.items():
            if (found := len(rows_of(self.comparison, split))) < rows:
                say(f"estune: warning: {self.comparison.task} has {found} rows in its {split} split, not {rows}")
        for model in self.comparison.models.values():
            setup.check_model(model, self.comparison.settings.get("revision"))
        for model in self.comparison.models:
            for method, entry in entries(self.comparison).items():
                for trial in entry.trials:
                    args = configuration(self.comparison, model, method, trial, 0)
                    for limits in (self.comparison.tuning, self.comparison.budget):
                        if limits.evaluations:
                            with_budget(args, limits.evaluations, self.train_rows)
                    if args.method != "es":
                        from estune.baselines.trainer import check_method

                        check_method(args)

    def run(self) -> None:
        """Do everything that is not there yet."""
        self.check()
        self.directory.mkdir(parents=True, exist_ok=True)
        lock = try_lock(self.directory)
        if lock is None:
            raise UserError(f"another process runs the comparison in {self.directory}")
        try:
            self._carry_out()
        finally:
            os.close(lock)

    def _carry_out(self) -> None:
        self.keep_plan()
        started = time.perf_counter()
        self.processes.cost.open(
            self.directory / "results" / "cost.json",
            {"code": self.code, "machine": machine(), "packages": versions("trl")},
        )
        self._each(self._base, list(self.comparison.models))
        todo = [
            (model, method, index)
            for model in self.comparison.models
            for method, entry in entries(self.comparison).items()
            for index in range(len(entry.trials))
        ]
        self._each(lambda trial: self._bring(self._trial(*trial)), todo)
        for model in self.comparison.models:
            for method in entries(self.comparison):
                self._choose(model, method)
        self._each(lambda cell: self._bring(self._runs(cell)), list(cells(self.comparison)))
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
                self.processes.stopping.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _bring(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            job.run(self.processes)

    # --- bases --------------------------------------------------------------------------------------------------------

    def base_file(self, model: str) -> Path:
        """Return where a base's measurement is kept."""
        return self.directory / "results" / model / "base.json"

    def _base(self, model: str) -> None:
        path, file = self.comparison.models[model], self.base_file(model)
        wanted = json.loads(file.read_text(encoding="utf-8"))["fingerprint"] if file.exists() else None
        if wanted is None:
            say(f"estune: {model}: measuring the base")
            outcome = self.processes.call(measure.measure_base, (self.comparison, path, file), f"logs/{model}-base.log")
        else:
            outcome = self.processes.call(measure.check_base, (self.comparison, path, wanted), f"logs/{model}-base.log")
        if outcome.failed:
            raise UserError(f"the base {model} cannot be measured: {outcome.error}")
        constant = file.with_name("constant.json")
        if not constant.exists() and self.task.right_answer is not None:
            given = (self.comparison, path, constant)
            outcome = self.processes.call(measure.measure_constant, given, f"logs/{model}-constant.log")
            if outcome.failed:
                raise UserError(f"the best constant answer cannot be scored: {outcome.error}")

    # --- tuning -------------------------------------------------------------------------------------------------------

    def _trial(self, model: str, method: str, index: int) -> list[Job]:
        """Return a trial with the tuning's seed and budgets, evaluated on validation rows; more than one run of it
        where one cannot go on from budget to budget.
        """
        comparison, tuning, entry = self.comparison, self.comparison.tuning, entries(self.comparison)[method]
        trial = entry.trials[index]
        args = configuration(comparison, model, method, trial, tuning.seed)
        if tuning.evaluations:
            args = with_budget(args, tuning.evaluations, self.train_rows)
        args = dataclasses.replace(args, eval_steps=0)
        directory = self.directory / "tuning" / model / method / f"trial-{index}"
        files = {budget: trial_file(comparison, model, method, index, budget) for budget in tuned_budgets(comparison)}
        job = Job(
            f"{model}/{method}/trial-{index}",
            self.directory,
            dataclasses.replace(args, output_dir=str(directory), report_to=["none"]),
            tuning.time_s,
            files,
            directory.with_name(f"{directory.name}-model"),
            {"trial": trial},
            partial(measure.measure_trial, comparison),
            self.code,
            keeps_models=False,
            settings=f"{_told(trial)}; {index + 1} of {len(entry.trials)} trials",
        )
        return [job] if can_resume(args) or len(files) == 1 else [_of(job, budget) for budget in files]

    def _choose(self, model: str, method: str) -> None:
        """Choose a method's best trial on the validation split, once for each budget, and keep what the tuning cost.

        What was done again, because its result was deleted, is not counted twice.

        Raises:
            UserError: trials that were done again choose another, and there are results of the first.
        """
        comparison, folder = self.comparison, self.directory / "results" / model / method
        file, chosen = folder / "tuning.json", {}
        used: dict[str, dict[str, float]] = {}
        then = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        for budget in tuned_budgets(comparison):
            tried = [
                json.loads(trial_file(comparison, model, method, index, budget).read_text(encoding="utf-8"))
                for index in range(len(entries(comparison)[method].trials))
            ]
            for result in tried:  # a run that went on to the other budget paid for both at once
                before = used.get(result["run"], {})
                used[result["run"]] = {name: max(result.get(name, 0), before.get(name, 0)) for name in COSTS}
            done = [result for result in tried if result["status"] == "done"]
            best = max(done, key=lambda result: (result["accuracy"], result["reward"] or 0.0), default=tried[0])
            name = CHOSEN[budget]
            chosen[name] = best["trial"]
            runs = self.directory / "runs" / model / method
            begun = [path for place in (folder, runs) for path in place.glob("seed-*")]
            if name in then and then[name] != best["trial"] and begun:
                raise UserError(
                    f"{begun[0]} is of {_told(then[name])}, and the trials now choose "
                    f"{_told(best['trial'])}: delete seed-* in {folder} and {runs}"
                )
        cost = {name: sum(run[name] for run in used.values()) for name in COSTS}
        rows = len(rows_of(comparison, "validation")[: comparison.tuning.rows or None])
        write_json(file, {**chosen, "rows": rows, "cost": cost})

    # --- runs ---------------------------------------------------------------------------------------------------------

    def _runs(self, cell: Cell) -> list[Job]:
        """Return a cell's run to both budgets; one for each where it cannot go on, or was tuned for each."""
        comparison, measuring = self.comparison, self.comparison.measuring
        tuned = json.loads((self.directory / "results" / cell.model / cell.method / "tuning.json").read_text("utf-8"))
        jobs = {}
        budgets = budgets_of(comparison)
        for budget in budgets:
            chosen = chosen_for(tuned, budget)
            args = configuration(comparison, cell.model, cell.method, chosen, cell.seed)
            if comparison.budget.evaluations:
                args = with_budget(args, comparison.budget.evaluations, self.train_rows, measuring.curve_points)
            else:
                trial = self._tried(cell, chosen)
                args = evaluated_every(args, trial, comparison.budget.time_s, measuring.curve_points)
            sampled = args.method == "es" and args.temperature > 0  # curves are of greedy answers, whatever trains
            args = dataclasses.replace(
                args,
                output_dir=str(run_directory(comparison, cell)),
                eval_rows=measuring.curve_rows if args.eval_steps else 0,
                eval_greedy=bool(args.eval_steps) and sampled,
            )
            jobs[budget] = Job(
                cell.name,
                self.directory,
                args,
                comparison.budget.time_s,
                {each: result_file(comparison, cell, each) for each in budgets},
                self.directory / "models" / cell.name,
                {"model": cell.model, "method": cell.method, "seed": cell.seed},
                partial(measure.measure_run, comparison, self.base_file(cell.model)),
                self.code,
                settings=_told(chosen),
            )
        whole = next(iter(jobs.values()))
        if len(jobs) == 1 or (can_resume(whole.args) and all(whole.args == job.args for job in jobs.values())):
            return [whole]
        return [_of(job, budget) for budget, job in jobs.items()]

    def _tried(self, cell: Cell, chosen: dict[str, Any]) -> dict[str, Any]:
        """Return what a cell's trial with these settings gave, at the last budget that trials had."""
        trials, last = entries(self.comparison)[cell.method].trials, tuned_budgets(self.comparison)[-1]
        file = trial_file(self.comparison, cell.model, cell.method, trials.index(chosen), last)
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found

    def keep_plan(self, write: bool = True) -> None:
        """Write what is compared and where; another comparison's results are not mixed in. Or only see whether it is.

        Raises:
            UserError: the directory holds another comparison, or results of what is not in this one.
        """
        file = self.directory / "comparison.json"
        whole = dataclasses.replace(self.comparison, methods=entries(self.comparison))
        plan = json.loads(json.dumps(dataclasses.asdict(whole)))
        found = environment() | {"versions": versions("trl", "reasoning-gym")}
        ground = self._ground()
        growing = ("seeds", "output_dir", "notes", "methods", "models", "workers")
        if file.exists():
            kept = json.loads(file.read_text(encoding="utf-8"))
            try:
                before = from_mapping(kept["comparison"])  # with the defaults of options that came since
            except UserError as error:
                raise UserError(f"{file} is of another estune: {error}") from None
            then = json.loads(json.dumps(dataclasses.asdict(before)))
            for name in plan:
                if name not in growing and plan[name] != then[name]:
                    raise UserError(
                        f"{self.directory} holds a comparison with {name} {then[name]!r}, not "
                        f"{plan[name]!r}: give another output_dir"
                    )
            for kind in ("methods", "models"):
                for name, entry in then[kind].items():
                    if plan[kind].get(name) != entry and not self._has_begun(kind, name):
                        continue
                    if name not in plan[kind]:
                        raise UserError(
                            f"{self.directory} holds results of {name}, which is not compared any more: "
                            "give another output_dir, so that nothing is left out"
                        )
                    if plan[kind][name] != entry:
                        raise UserError(f"{self.directory} holds results of another {name}: give it another name")
            if gone := set(then["seeds"]) - set(plan["seeds"]):
                raise UserError(
                    f"{self.directory} holds results of seed {min(gone)}, which is not compared any more: "
                    "give another output_dir, so that nothing is left out"
                )
            for name, value in ground.items():
                if kept.get(name, value) != value:
                    raise UserError(
                        f"the {name} of {self.directory} were others when it was begun: give another output_dir"
                    )
            found = kept["environment"]  # each sitting's machine and packages are kept with its cost
        if write:
            write_json(file, {"comparison": plan, "environment": found, **ground})

    def _has_begun(self, kind: str, name: str) -> bool:
        """Say whether anything is there of a method or a model."""
        below = name if kind == "models" else f"*/{name}"
        return any(any((self.directory / place).glob(below)) for place in ("results", "tuning", "runs"))

    def _ground(self) -> dict[str, Any]:
        """Return hashes of what a comparison stands on beside its options: rows of every split, files of rewards."""
        comparison = self.comparison
        given = [comparison.settings, *(entry.settings for entry in entries(comparison).values())]
        named = {spec for settings in given for spec in settings.get("reward_funcs") or []}
        return {
            "rows": {split: setup.rows_fingerprint(rows_of(comparison, split)) for split in SPLITS},
            "rewards": {spec: source_digest(spec) for spec in sorted(named)},
            "reward sources": {spec: source_parts(load_reward(spec)) for spec in sorted(named)},
        }


def _told(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "defaults"


def _of(job: Job, budget: str) -> Job:
    """Return a job's own run for one of its budgets."""
    args = dataclasses.replace(job.args, output_dir=f"{job.directory}-{budget}")
    return dataclasses.replace(job, args=args, files={budget: job.files[budget]})
