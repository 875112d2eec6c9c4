"""Runs a comparison: measures the bases, tunes the methods, trains the runs and measures them.

`results/` has one JSON file for each measurement; the report is made of these alone. A measurement that has a file is
not repeated. The comparison can be stopped or killed at any time and started again: an unfinished run is resumed from
its last step or checkpoint. A run that failed by itself stays a failed row until its result is deleted. If its snapshot
still exists, the snapshot is then measured without training.
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
    result_file,
    rows_of,
    run_directory,
    trial_file,
    tuned_budgets,
    with_budget,
    with_curve,
)
from estune.compare.processes import Processes
from estune.compare.results import DONE, PLAN_FILE, Plan, Result, Tuned, read_json, read_result
from estune.console import say
from estune.environment import code_digest, environment, machine, versions
from estune.errors import UserError
from estune.files import try_lock, write_json
from estune.rewards.loading import source_digest
from estune.rewards.sources import source_parts
from estune.tasks import get_task
from estune.train import setup

SPLITS = ("train", "validation", "test")
COSTS = ("evaluations", "train_time_s")
# options that may change between starts
EXTENSIBLE = ("seeds", "output_dir", "notes", "methods", "models", "model_settings", "workers")


class Runner:
    """Runs one comparison."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.directory = comparison.directory
        self.task = get_task(comparison.task, bool(comparison.settings.get("allow_unsandboxed_code")))
        self.train_rows = len(rows_of(comparison, "train"))
        self.code = code_digest()
        self.processes = Processes(self.directory)

    def check(self) -> None:
        """Check every configuration before anything runs.

        Raises:
            UserError: a configuration cannot work.
        """
        for retained in self.comparison.retention.values():
            args = measure.retained_config(self.comparison, "tiny", retained)
            setup.task_of(args)  # raises if the task needs a sandbox that does not work here
            splits = get_task(retained.task, args.allow_unsandboxed_code).splits
            if retained.split not in splits or retained.split == "train":
                raise UserError(
                    f"retention cannot be measured on split {retained.split!r} of {retained.task}; it has "
                    f"{', '.join(split for split in splits if split != 'train')}"
                )
        setup.task_of(measure.evaluation_config(self.comparison, "tiny"))
        wanted = {"validation": self.comparison.tuning.rows, "test": self.comparison.measuring.rows}
        for split, rows in wanted.items():
            if (available := len(rows_of(self.comparison, split))) < rows:
                say(f"estune: warning: {self.comparison.task} has {available} rows in its {split} split, not {rows}")
        for model in self.comparison.models.values():
            setup.check_model(model, self.comparison.settings.get("revision"))
        for model in self.comparison.models:
            for method, entry in entries(self.comparison).items():
                for trial in entry.trials:
                    args = configuration(self.comparison, model, method, trial, 0)
                    limits = filter(
                        None, (part.evaluations for part in (self.comparison.tuning, self.comparison.budget))
                    )
                    planned = [with_budget(args, limit, self.train_rows) for limit in limits]
                    if args.method != "es":
                        from estune.baselines.trainer import check_method

                        for each in planned or [args]:
                            check_method(each)

    def run(self) -> None:
        """Run every part of the comparison that has no result yet.

        Raises:
            UserError: a configuration cannot work, the directory holds another comparison, another process runs the
                comparison, or something outside the runs blocks them.
        """
        self.check()
        self.directory.mkdir(parents=True, exist_ok=True)
        lock = try_lock(self.directory)
        if lock is None:
            raise UserError(f"another process runs the comparison in {self.directory}")
        try:
            self._run_stages()
        finally:
            os.close(lock)

    def _run_stages(self) -> None:
        """Measure the bases, run the trials, choose the best of each method, then run the seeds."""
        self.write_plan()
        started = time.perf_counter()
        self.processes.cost.open(
            self.directory / "results" / "cost.json",
            {"code": self.code, "machine": machine(), "packages": versions("trl")},
        )
        self._in_parallel(self._measure_base, list(self.comparison.models))
        trials = [
            (model, method, index)
            for model in self.comparison.models
            for method, entry in entries(self.comparison).items()
            for index in range(len(entry.trials))
        ]
        self._in_parallel(lambda trial: self._run_jobs(self._trial_jobs(*trial)), trials)
        for model in self.comparison.models:
            for method in entries(self.comparison):
                self._choose_trial(model, method)
        self._in_parallel(lambda cell: self._run_jobs(self._cell_jobs(cell)), list(cells(self.comparison)))
        say(f"estune: compared in {time.perf_counter() - started:.0f} s; results in {self.directory}")

    def _in_parallel(self, function: Callable[[Any], None], items: Iterable[Any]) -> None:
        """Call a function for each item, `workers` at a time, and stop at the first error or at Ctrl-C.

        The calls that are in progress then finish; Ctrl-C reaches their processes, too, and these save and stop.
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

    def _run_jobs(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            job.run(self.processes)

    # --- bases --------------------------------------------------------------------------------------------------------

    def base_file(self, model: str) -> Path:
        """Return the file of a base's measurement."""
        return self.directory / "results" / model / "base.json"

    def _measure_base(self, model: str) -> None:
        """Measure a base and its best constant answer; if the base has a result, check that it is the same base."""
        path, file = self.comparison.models[model], self.base_file(model)
        log = f"logs/{model}-base.log"
        if file.exists():
            fingerprint = read_result(file)["fingerprint"]
            outcome = self.processes.call(measure.check_base, (self.comparison, path, fingerprint), log)
        else:
            say(f"estune: {model}: measuring the base")
            outcome = self.processes.call(measure.measure_base, (self.comparison, path, file), log)
        if outcome.failed:
            raise UserError(f"the base {model} cannot be measured: {outcome.error}")
        constant = file.with_name("constant.json")
        if not constant.exists() and self.task.right_answer is not None:
            arguments = (self.comparison, path, constant)
            outcome = self.processes.call(measure.measure_constant, arguments, f"logs/{model}-constant.log")
            if outcome.failed:
                raise UserError(f"the best constant answer cannot be scored: {outcome.error}")

    # --- tuning -------------------------------------------------------------------------------------------------------

    def _trial_jobs(self, model: str, method: str, index: int) -> list[Job]:
        """Return the jobs of a trial: one, or one for each budget if the method cannot resume.

        A trial has the seed and the budgets of tuning, and is evaluated on validation rows.
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
            keeps_snapshots=False,
            settings=f"{_settings_text(trial)}; {index + 1} of {len(entry.trials)} trials",
        )
        return [job] if can_resume(args) or len(files) == 1 else [_job_for_budget(job, budget) for budget in files]

    def _choose_trial(self, model: str, method: str) -> None:
        """Write the trial of a method that is best on the validation split at each budget, and the cost of its trials.

        A trial that was repeated, because its result was deleted, counts once.

        Raises:
            UserError: another trial is best now, and seeds were run with the trial that was best before.
        """
        comparison, folder = self.comparison, self.directory / "results" / model / method
        runs = self.directory / "runs" / model / method
        file, chosen = folder / "tuning.json", {}
        costs: dict[str, dict[str, float]] = {}
        before: dict[str, Any] = read_json(file) if file.exists() else {}
        for budget in tuned_budgets(comparison):
            results = [
                read_result(trial_file(comparison, model, method, index, budget))
                for index in range(len(entries(comparison)[method].trials))
            ]
            for result in results:  # a run that continued to the other budget has the cost of both in one result
                used = {"evaluations": result.get("evaluations", 0), "train_time_s": result.get("train_time_s", 0)}
                other = costs.get(result["run"], {})
                costs[result["run"]] = {name: max(used[name], other.get(name, 0)) for name in COSTS}
            done = [result for result in results if result["status"] == DONE]
            best = max(done, key=lambda result: (result["accuracy"], result["reward"] or 0.0), default=results[0])
            name = CHOSEN[budget]
            chosen[name] = best["trial"]
            of_seeds = [path for place in (folder, runs) for path in place.glob("seed-*")]
            if name in before and before[name] != best["trial"] and of_seeds:
                raise UserError(
                    f"{of_seeds[0]} was run with {_settings_text(before[name])}, and the best trial now is "
                    f"{_settings_text(best['trial'])}: delete seed-* in {folder} and {runs}"
                )
        cost = {name: sum(run[name] for run in costs.values()) for name in COSTS}
        rows = len(rows_of(comparison, "validation")[: comparison.tuning.rows or None])
        write_json(file, {**chosen, "rows": rows, "cost": cost})

    # --- runs ---------------------------------------------------------------------------------------------------------

    def _cell_jobs(self, cell: Cell) -> list[Job]:
        """Return the jobs of a cell: one, or one for each budget if the method cannot resume or was tuned for each."""
        comparison, measuring = self.comparison, self.comparison.measuring
        tuned: Tuned = read_json(self.directory / "results" / cell.model / cell.method / "tuning.json")
        jobs = {}
        budgets = budgets_of(comparison)
        for budget in budgets:
            chosen = chosen_for(tuned, budget)
            args = configuration(comparison, cell.model, cell.method, chosen, cell.seed)
            if comparison.budget.evaluations:
                args = with_budget(args, comparison.budget.evaluations, self.train_rows, measuring.curve_points)
            else:
                trial = self._trial_result(cell, chosen)
                args = with_curve(args, trial, comparison.budget.time_s, measuring.curve_points)
            sampled = args.method == "es" and args.temperature > 0  # curves are of greedy answers for every method
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
                settings=_settings_text(chosen),
            )
        first = next(iter(jobs.values()))
        if len(jobs) == 1 or (can_resume(first.args) and all(first.args == job.args for job in jobs.values())):
            return [first]
        return [_job_for_budget(job, budget) for budget, job in jobs.items()]

    def _trial_result(self, cell: Cell, chosen: dict[str, Any]) -> Result:
        """Return the result of a cell's trial with these settings, at the last budget of tuning."""
        trials, last = entries(self.comparison)[cell.method].trials, tuned_budgets(self.comparison)[-1]
        return read_result(trial_file(self.comparison, cell.model, cell.method, trials.index(chosen), last))

    # --- the plan -----------------------------------------------------------------------------------------------------

    def check_plan(self) -> Plan:
        """Return the plan, after comparing it with the plan in the directory, if there is one.

        A directory holds the results of one comparison. Seeds, methods and models may be added to it.

        Raises:
            UserError: the directory holds another comparison, results that this one leaves out, or results of other
                rows or reward functions.
        """
        file = self.directory / PLAN_FILE
        whole = dataclasses.replace(self.comparison, methods=entries(self.comparison))
        rewards = self._reward_names()
        plan: Plan = {
            "comparison": json.loads(json.dumps(dataclasses.asdict(whole))),
            "environment": environment() | {"versions": versions("trl", "reasoning-gym")},
            "rows": {split: setup.rows_fingerprint(rows_of(self.comparison, split)) for split in SPLITS},
            "rewards": {name: source_digest(name) for name in rewards if ":" in name},
            "reward sources": {name: source_parts(setup.named_reward(name)) for name in rewards},
        }
        if file.exists():
            pinned: Plan = read_json(file)
            try:
                before = from_mapping(pinned["comparison"])  # options added to estune since then get their defaults
            except UserError as error:
                raise UserError(f"{file} is of another estune: {error}") from None
            self._refuse_other_options(plan["comparison"], json.loads(json.dumps(dataclasses.asdict(before))))
            for name in ("rows", "rewards", "reward sources"):
                if pinned.get(name, plan[name]) != plan[name]:
                    raise UserError(
                        f"the {name} of {self.directory} have changed since it was begun: give another output_dir"
                    )
            plan["environment"] = pinned["environment"]  # cost.json has the machine and packages of each sitting
        return plan

    def write_plan(self) -> None:
        """Write the plan to the directory; see `check_plan` for the errors."""
        write_json(self.directory / PLAN_FILE, self.check_plan())

    def _refuse_other_options(self, options: dict[str, Any], before: dict[str, Any]) -> None:
        """Compare the options of this comparison with those in the directory.

        Raises:
            UserError: they differ in more than added seeds, methods and models.
        """
        for name in options:
            if name not in EXTENSIBLE and options[name] != before[name]:
                raise UserError(
                    f"{self.directory} holds a comparison with {name} {before[name]!r}, not "
                    f"{options[name]!r}: give another output_dir"
                )
        for kind in ("methods", "models"):
            for name, entry in before[kind].items():
                both = [given["model_settings"].get(name) if kind == "models" else None for given in (options, before)]
                if (options[kind].get(name) == entry and both[0] == both[1]) or not self._has_files(kind, name):
                    continue
                if name not in options[kind]:
                    raise UserError(
                        f"{self.directory} holds results of {name}, which this comparison would leave out: "
                        "give another output_dir"
                    )
                raise UserError(f"{self.directory} holds results of another {name}: give it another name")
        if removed := set(before["seeds"]) - set(options["seeds"]):
            raise UserError(
                f"{self.directory} holds results of seed {min(removed)}, which this comparison would leave out: "
                "give another output_dir"
            )

    def _has_files(self, kind: str, name: str) -> bool:
        """Return whether the directory has a result, a trial or a run of a method or a model."""
        below = name if kind == "models" else f"*/{name}"
        return any(any((self.directory / place).glob(below)) for place in ("results", "tuning", "runs"))

    def _reward_names(self) -> list[str]:
        """Return the names of the user's reward functions."""
        methods = entries(self.comparison).values()
        settings = [self.comparison.settings, *(entry.settings for entry in methods)]
        return sorted({name for each in settings for name in each.get("reward_funcs") or []})


def _settings_text(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "defaults"


def _job_for_budget(job: Job, budget: str) -> Job:
    """Return the job of a separate run for one of a job's budgets."""
    args = dataclasses.replace(job.args, output_dir=f"{job.directory}-{budget}")
    return dataclasses.replace(job, args=args, files={budget: job.files[budget]})
