"""The runs of a comparison: their configurations, steps and directories.

DIR/tuning/MODEL/METHOD/trial-I        a trial, evaluated on the validation split; trials have a seed of their own
DIR/runs/MODEL/METHOD/seed-S           a run; it stops at the budget it reaches first, a snapshot is measured, and the
                                       run continues to the other budget
DIR/.../seed-S-evaluations, ...-time   one run for each budget, if the method cannot resume or was tuned for each budget
DIR/results/...json                    one file for each measurement; a measurement that has a file is not repeated
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from estune.compare.config import RANDOM_SEARCH, RANDOM_VOTE, Comparison, Entry
from estune.compare.results import Result, Tuned
from estune.config import OF_WORKERS, SEARCHES, ESConfig, SizedConfig
from estune.errors import UserError
from estune.tasks import get_task
from estune.train import setup

EVALUATIONS, TIME = "evaluations", "time"
BUDGETS = (EVALUATIONS, TIME)
LIMITS = {EVALUATIONS: "evaluations", TIME: "time_s"}  # fields of `Budget` and `Tuning`; 0 leaves a budget out
CHOSEN = {EVALUATIONS: "chosen", TIME: "chosen_time"}  # fields of tuning.json; a single one is used for both budgets
ENDLESS_STEPS = 1_000_000_000  # steps; max_steps of a run that its time limit ends
ENDLESS_SAMPLES = 1_000_000  # samples of each prompt, if a time limit ends the sampling


@dataclass(frozen=True)
class Cell:
    """A method on a model with a seed."""

    model: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """The cell's path below runs/ and results/."""
        return f"{self.model}/{self.method}/seed-{self.seed}"


def entries(comparison: Comparison) -> dict[str, Entry]:
    """Return every method that is run. Random search is added if it is missing, with the settings
    of the first ES entry."""
    methods = dict(comparison.methods)
    if all(entry.method != RANDOM_SEARCH for entry in methods.values()):
        es = next((entry for entry in methods.values() if entry.method == "es"), None) or _default_es_entry(comparison)
        copied = (
            "population_size",
            "sigma",
            "antithetic",
            "noise",
            "rank",
            "noise_distribution",
            "batch_size",
            "num_generations",
            "temperature",
        )
        trials = [{k: v for k, v in {**es.settings, **trial}.items() if k in copied} for trial in es.trials]
        methods[RANDOM_SEARCH] = Entry(RANDOM_SEARCH, {}, _make_distinct(trials))
    return methods


def _default_es_entry(comparison: Comparison) -> Entry:
    """Return the entry that random search copies if no ES is compared; the smallest budget pays for four steps."""
    trials, prompts = next(iter(comparison.methods.values())).trials, 4
    least = min(filter(None, (comparison.tuning.evaluations, comparison.budget.evaluations)), default=math.inf)
    members = max(2, int(min(ESConfig.population_size, least // (4 * prompts))))
    return Entry("es", {"population_size": members, "batch_size": prompts}, ({},) * len(trials))


def _make_distinct(trials: list[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Return the trials without duplicates; each duplicate gets another sigma, a power of two times its own.

    Trials are duplicates if they differ only in options that random search does not have.
    """
    duplicates = [trial for i, trial in enumerate(trials) if trial in trials[:i]]
    distinct = [trial for i, trial in enumerate(trials) if trial not in trials[:i]]
    for trial in duplicates:
        sigmas = (float(trial.get("sigma", ESConfig.sigma)) * 2.0**power for power in (1, -1, 2, -2, 3, -3, 4, -4))
        candidates = ({**trial, "sigma": sigma} for sigma in sigmas)
        distinct.append(next(candidate for candidate in candidates if candidate not in distinct))
    return tuple(distinct)


def cells(comparison: Comparison) -> Iterator[Cell]:
    """Yield all cells. The seed is the outermost loop, so that a change of the machine's load meets all methods alike.

    Within a seed the order is shuffled, so that a method does not always run beside the same other method.
    """
    for seed in comparison.seeds:
        of_seed = [Cell(model, method, seed) for model in comparison.models for method in entries(comparison)]
        random.Random(seed).shuffle(of_seed)
        yield from of_seed


def rows_of(comparison: Comparison, split: str) -> list[dict[str, Any]]:
    """Return the rows of ``train``, ``validation`` or ``test``: the task's own, or those of the data set in settings.

    Raises:
        UserError: the data set has no such split, or its rows lack what the task needs.
    """
    task = get_task(comparison.task, bool(comparison.settings.get("allow_unsandboxed_code")))
    names = ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "column_mapping")
    dataset = {name: comparison.settings[name] for name in names if name in comparison.settings}
    if "dataset_name" not in dataset:
        return task.load(split)
    if split == "validation":
        dataset["dataset_test_split"] = comparison.tuning.split
    args = ESConfig.from_mapping({**dataset, "task": comparison.task})
    rewards = setup.resolve_rewards(args, None, task)
    return setup.resolve_rows(args, None, task, "train" if split == "train" else "test", rewards)


def configuration(comparison: Comparison, model: str, method: str, trial: dict[str, Any], seed: int) -> SizedConfig:
    """Return a run's configuration with the settings of a trial, without the budget's limits.

    Raises:
        UserError: the options cannot work together; the message names the method.
    """
    entry = entries(comparison)[method]
    common = comparison.settings
    if entry.method != "es":  # the other methods train in their own process; workers still measure their models
        common = {name: value for name, value in common.items() if name not in OF_WORKERS}
    values = {**common, **comparison.model_settings.get(model, {}), **entry.settings, **trial}
    values |= {"model": comparison.models[model], "task": comparison.task, "seed": seed, "method": entry.method}
    try:
        args = ESConfig.from_mapping(values, f"method {method}")
    except UserError as error:
        raise UserError(f"method {method}: {error}") from None
    if "dataset_name" in comparison.settings:  # curves are measured on validation rows; the report is of test rows
        args = dataclasses.replace(args, dataset_test_split=comparison.tuning.split)
    if args.has_falling_schedule:
        raise UserError(f"method {method}: a run continues from one budget to the other, so schedules must be constant")
    resolved = setup.resolve_config(args, len(rows_of(comparison, "train")))
    # Options that depend on the machine stay `auto`, so that a run can be resumed on another machine.
    return dataclasses.replace(resolved, **{name: getattr(args, name) for name in ("num_threads", "reward_workers")})


def with_budget(args: SizedConfig, evaluations: int, n_rows: int, points: int = 0) -> SizedConfig:
    """Return a configuration with as many steps as a budget of evaluations pays for.

    `sft_rejection` spends the budget on samples before its first step, and its number of steps is a setting. At every
    held-out evaluation ES also scores theta's completions of the step's prompts, which counts. A method that learns
    from the same samples several times (`num_iterations`) takes all of those steps.

    Args:
        args: a resolved configuration.
        evaluations: the budget, in scored completions.
        n_rows: rows of the train split.
        points: held-out evaluations within the budget; 0: none. `random_vote` makes none: they are of a single model.

    Raises:
        UserError: a single step costs more than the budget.
    """
    points = 0 if args.method == RANDOM_VOTE else points
    if args.method == "sft_rejection":
        kwargs = {**args.method_kwargs, "max_samples": evaluations}
        args = dataclasses.replace(args, num_generations=-(-evaluations // n_rows), method_kwargs=kwargs)
        return dataclasses.replace(args, eval_steps=max(1, args.max_steps // points) if points else 0)
    iterations = int(args.method_kwargs.get("num_iterations", 1))
    per_step = evaluations_per_step(args)
    steps = int(evaluations // (per_step * iterations)) * iterations
    while steps > 0:
        every = max(1, steps // points) if points else 0
        scores_theta = every and args.method == "es" and args.step_control != "drift"  # which counts it in per_step
        of_theta = steps // every * args.batch_size * args.num_generations if scores_theta else 0
        if steps * per_step + of_theta <= evaluations:
            return dataclasses.replace(args, max_steps=steps, eval_steps=every)
        steps -= iterations
    raise UserError(
        f"a budget of {evaluations} evaluations does not pay for one step of method {args.method}, which "
        f"scores {per_step * iterations:g} completions"
    )


def with_time(args: SizedConfig, limit: float) -> SizedConfig:
    """Return a configuration whose only limit is a time, in seconds."""
    if args.method == "sft_rejection":
        kwargs = {name: value for name, value in args.method_kwargs.items() if name != "max_samples"}
        args = dataclasses.replace(args, num_generations=ENDLESS_SAMPLES, method_kwargs=kwargs)
    return dataclasses.replace(args, max_steps=ENDLESS_STEPS, max_time_s=limit)


def evaluations_per_step(args: SizedConfig) -> float:
    """Return how many completions one step of a resolved configuration scores."""
    of_member = args.batch_size * args.num_generations
    if args.method in SEARCHES:
        from estune.baselines import random_search

        return random_search.evaluations_per_step(args)
    if args.method == "es":
        return of_member * (args.population_size + (args.step_control == "drift"))
    return of_member / int(args.method_kwargs.get("num_iterations", 1))


def can_resume(args: ESConfig) -> bool:
    """Return whether one run can be measured at a budget and then continue to the other.

    PPO cannot be resumed. The budget of rejection sampling decides how many samples it draws before it learns.
    """
    from estune.baselines.trainer import RESTARTED

    return args.method not in (*RESTARTED, "sft_rejection")


def run_directory(comparison: Comparison, cell: Cell) -> Path:
    """Return the directory of a cell's run."""
    return comparison.directory / "runs" / cell.name


def budgets_of(comparison: Comparison) -> tuple[str, ...]:
    """Return the budgets that are compared."""
    return tuple(budget for budget in BUDGETS if getattr(comparison.budget, LIMITS[budget]))


def tuned_budgets(comparison: Comparison) -> tuple[str, ...]:
    """Return the budgets for which methods are tuned; a single one is used for both."""
    return tuple(budget for budget in BUDGETS if getattr(comparison.tuning, LIMITS[budget]))


def chosen_for(tuned: Tuned, budget: str) -> dict[str, Any]:
    """Return the chosen settings for a budget's runs, from the content of `tuning.json`."""
    chosen = {EVALUATIONS: tuned.get("chosen"), TIME: tuned.get("chosen_time")}
    return next(settings for each in (budget, *BUDGETS) if (settings := chosen[each]) is not None)


def with_curve(args: SizedConfig, trial: Result, limit: float, points: int) -> SizedConfig:
    """Return a configuration that evaluates about ``points`` times within a time limit, at the pace of a trial's run.

    If the trial made no step, its pace is unknown and the run does not evaluate.

    Args:
        args: a resolved configuration.
        trial: the trial's result.
        limit: seconds of training.
        points: held-out evaluations; 0: none. `random_vote` makes none: they are of a single model.
    """
    points = 0 if args.method == RANDOM_VOTE else points
    pace = trial["steps"] / trial["train_time_s"] if trial.get("train_time_s") else 0.0  # steps per second
    return dataclasses.replace(args, eval_steps=max(1, int(pace * limit / points)) if pace and points else 0)


def trial_file(comparison: Comparison, model: str, method: str, index: int, budget: str) -> Path:
    """Return the file of a trial's result at a budget."""
    name = f"trial-{index}{'-time' if budget == TIME else ''}.json"
    return comparison.directory / "results" / model / method / name


def result_file(comparison: Comparison, cell: Cell, budget: str) -> Path:
    """Return the file of a cell's result at a budget."""
    return comparison.directory / "results" / cell.model / cell.method / f"seed-{cell.seed}-{budget}.json"
