"""From a comparison to the runs that it is made of: their configurations, steps and places.

DIR/tuning/MODEL/METHOD/trial-I        a trial on the validation split, by a seed of its own
DIR/runs/MODEL/METHOD/seed-S           a run; it is stopped at the budget that it reaches first, measured, and goes
                                       on to the other one
DIR/.../seed-S-evaluations, ...-time   a run for each budget, where a method cannot go on, or was tuned differently
DIR/results/...json                    what was measured, one file each; what is there is not done again
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from estune.compare.config import RANDOM_SEARCH, Comparison, Entry
from estune.config import ESConfig
from estune.errors import UserError
from estune.tasks import get_task
from estune.train import setup

EVALUATIONS, TIME = "evaluations", "time"
BUDGETS = (EVALUATIONS, TIME)
LIMITS = {EVALUATIONS: "evaluations", TIME: "time_s"}  # of `Budget` and `Tuning`; 0 leaves one out
CHOSEN = {EVALUATIONS: "chosen", TIME: "chosen_time"}  # in tuning.json; one that stands alone serves both
ENDLESS = 1_000_000_000  # steps of a run that its time will end
MANY = 1_000_000  # samples of each prompt, where its time ends the drawing


@dataclass(frozen=True)
class Cell:
    """A method on a model with a seed."""

    model: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """The cell's place below runs/ and results/."""
        return f"{self.model}/{self.method}/seed-{self.seed}"


def entries(comparison: Comparison) -> dict[str, Entry]:
    """Return every method that is run, random search among them: by the settings of the first ES entry, if any."""
    found = dict(comparison.methods)
    if all(entry.method != RANDOM_SEARCH for entry in found.values()):
        es = next((entry for entry in found.values() if entry.method == "es"), None) or _in_the_place_of_es(comparison)
        kept = (
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
        taken = [{k: v for k, v in {**es.settings, **trial}.items() if k in kept} for trial in es.trials]
        found[RANDOM_SEARCH] = Entry(RANDOM_SEARCH, {}, _distinct(taken))
    return found


def _in_the_place_of_es(comparison: Comparison) -> Entry:
    """Return what random search goes by where no ES is compared: the least budget pays for four steps or more."""
    trials, prompts = next(iter(comparison.methods.values())).trials, 4
    least = min(filter(None, (comparison.tuning.evaluations, comparison.budget.evaluations)), default=math.inf)
    members = max(2, int(min(ESConfig.population_size, least // (4 * prompts))))
    return Entry("es", {"population_size": members, "batch_size": prompts}, ({},) * len(trials))


def _distinct(trials: list[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Return as many trials without equals: of those that only ES told apart, one gets twice or half the sigma."""
    equals = [trial for i, trial in enumerate(trials) if trial in trials[:i]]
    found = [trial for i, trial in enumerate(trials) if trial not in trials[:i]]
    for trial in equals:
        sigmas = (float(trial.get("sigma", ESConfig.sigma)) * 2.0**power for power in (1, -1, 2, -2, 3, -3, 4, -4))
        others = ({**trial, "sigma": sigma} for sigma in sigmas)
        found.append(next(other for other in others if other not in found))
    return tuple(found)


def cells(comparison: Comparison) -> Iterator[Cell]:
    """Yield all cells, seeds outermost: whatever the machine does meanwhile, it does to all methods alike.

    Within a seed their order is shuffled, so that a method does not always run beside the same other one.
    """
    for seed in comparison.seeds:
        own = [Cell(model, method, seed) for model in comparison.models for method in entries(comparison)]
        random.Random(seed).shuffle(own)
        yield from own


def rows_of(comparison: Comparison, split: str) -> list[dict[str, Any]]:
    """Return the rows of ``train``, ``validation`` or ``test``: the task's own, or those of the data set given.

    Raises:
        UserError: the data set has no such split, or its rows lack what the task needs.
    """
    task = get_task(comparison.task, bool(comparison.settings.get("allow_unsandboxed_code")))
    names = ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split")
    given = {name: comparison.settings[name] for name in names if name in comparison.settings}
    if "dataset_name" not in given:
        return task.load(split)
    if split == "validation":
        given["dataset_test_split"] = comparison.tuning.split
    args = ESConfig.from_mapping({**given, "task": comparison.task})
    rewards = setup.resolve_rewards(args, None, task)
    return setup.resolve_rows(args, None, task, "train" if split == "train" else "test", rewards)


def configuration(comparison: Comparison, model: str, method: str, chosen: dict[str, Any], seed: int) -> ESConfig:
    """Return a run's configuration, without the limits that the comparison sets.

    Raises:
        UserError: the options cannot work together; the message names the method.
    """
    entry = entries(comparison)[method]
    values = {**comparison.settings, **entry.settings, **chosen}
    values |= {"model": comparison.models[model], "task": comparison.task, "seed": seed, "method": entry.method}
    try:
        args = ESConfig.from_mapping(values, f"method {method}")
    except UserError as error:
        raise UserError(f"method {method}: {error}") from None
    if "dataset_name" in comparison.settings:  # what is evaluated while a run goes on is not what is reported
        args = dataclasses.replace(args, dataset_test_split=comparison.tuning.split)
    if args.lr_scheduler_type in ("linear", "cosine") or args.sigma_scheduler_type != "constant":
        raise UserError(f"method {method}: a run goes on from one budget to the other, so schedules must be constant")
    found = setup.resolve_config(args, len(rows_of(comparison, "train")))
    # What goes by the machine stays open: a run that goes on with other cores keeps what it began with.
    return dataclasses.replace(found, **{name: getattr(args, name) for name in ("num_threads", "reward_workers")})


def with_budget(args: ESConfig, evaluations: int, n_rows: int, points: int = 0) -> ESConfig:
    """Return a configuration with as many steps as a budget of evaluations pays for, and ``points`` held-out ones.

    `sft_rejection` spends it on samples before its first step; its steps are its own setting. ES evaluates theta beside
    its members wherever it evaluates held-out rows, and pays for that. A method that learns from the same samples
    several times takes all of its steps on them.

    Raises:
        UserError: a single step costs more.
    """
    if args.method == "sft_rejection":
        kwargs = {**args.method_kwargs, "max_samples": evaluations}
        args = dataclasses.replace(args, num_generations=-(-evaluations // n_rows), method_kwargs=kwargs)
        return dataclasses.replace(args, eval_steps=max(1, args.max_steps // points) if points else 0)
    again = int(args.method_kwargs.get("num_iterations", 1))
    each, steps = evaluations_per_step(args), int(evaluations // (evaluations_per_step(args) * again)) * again
    while steps > 0:
        every = max(1, steps // points) if points else 0
        of_theta = steps // every * int(args.batch_size) * args.num_generations if every and args.method == "es" else 0
        if steps * each + of_theta <= evaluations:
            return dataclasses.replace(args, max_steps=steps, eval_steps=every)
        steps -= again
    raise UserError(
        f"a budget of {evaluations} evaluations does not pay for one step of method {args.method}, which "
        f"scores {each * again:g} completions"
    )


def with_time(args: ESConfig, limit: float) -> ESConfig:
    """Return a configuration that ends with its time, in seconds, and with nothing else."""
    if args.method == "sft_rejection":
        kwargs = {name: value for name, value in args.method_kwargs.items() if name != "max_samples"}
        args = dataclasses.replace(args, num_generations=MANY, method_kwargs=kwargs)
    return dataclasses.replace(args, max_steps=ENDLESS, max_time_s=limit)


def evaluations_per_step(args: ESConfig) -> float:
    """Return the completions that a step of a resolved configuration has scored."""
    each = int(args.batch_size) * args.num_generations
    if args.method == RANDOM_SEARCH:
        from estune.baselines import random_search

        return random_search.evaluations_per_step(args)
    if args.method == "es":
        return each * args.population_size
    return each / int(args.method_kwargs.get("num_iterations", 1))


def can_resume(args: ESConfig) -> bool:
    """Say whether a run goes on from one budget to the other; else each has a run of its own.

    PPO cannot be resumed, and rejection sampling decides with its budget how much it draws before it learns.
    """
    from estune.baselines.trainer import RESTARTED

    return args.method not in (*RESTARTED, "sft_rejection")


def run_directory(comparison: Comparison, cell: Cell) -> Path:
    """Return where a cell's run lies."""
    return comparison.directory / "runs" / cell.name


def budgets_of(comparison: Comparison) -> tuple[str, ...]:
    """Return the budgets that are compared."""
    return tuple(budget for budget in BUDGETS if getattr(comparison.budget, LIMITS[budget]))


def tuned_budgets(comparison: Comparison) -> tuple[str, ...]:
    """Return the budgets for which a method is tuned; where it is for one alone, that serves both."""
    return tuple(budget for budget in BUDGETS if getattr(comparison.tuning, LIMITS[budget]))


def chosen_for(tuned: dict[str, Any], budget: str) -> dict[str, Any]:
    """Return the trial that a budget's runs get, from what is in `tuning.json`."""
    found: dict[str, Any] = next(tuned[CHOSEN[own]] for own in (budget, *BUDGETS) if CHOSEN[own] in tuned)
    return found


def evaluated_every(args: ESConfig, trial: dict[str, Any], limit: float, points: int) -> ESConfig:
    """Return a configuration that evaluates about ``points`` times within a time, at the pace of a trial's run.

    Where the trial made no step its pace is not known: then not at all. `sft_rejection` learns in the half of its time
    in which it does not draw.
    """
    pace = trial["steps"] / trial["train_time_s"] if trial.get("train_time_s") else 0.0  # steps per second
    return dataclasses.replace(args, eval_steps=max(1, int(pace * limit / points)) if pace and points else 0)


def trial_file(comparison: Comparison, model: str, method: str, index: int, budget: str) -> Path:
    """Return where a trial's accuracy at a budget is kept."""
    name = f"trial-{index}{'-time' if budget == TIME else ''}.json"
    return comparison.directory / "results" / model / method / name


def result_file(comparison: Comparison, cell: Cell, budget: str) -> Path:
    """Return where a cell's measurement at a budget is kept."""
    return comparison.directory / "results" / cell.model / cell.method / f"seed-{cell.seed}-{budget}.json"
