"""The configuration of a comparison: one YAML file, checked in full before anything runs.

    output_dir: runs/compare            directory of the runs, the results and the report
    task: countdown                     its train split is trained on, validation decides tuning, test is reported
    models: {llama: benchmarks/bases/llama}
    seeds: [0, 1, 2, 3, 4]
    budget: {evaluations: 24000, time_s: 60}   of a run: completions scored in training; seconds of training
    tuning: {evaluations: 6000, time_s: 30, rows: 200}   of a trial; validation rows that decide between trials
    settings: {max_completion_length: 72}      options of every run, named as in `estune train`
    methods:
      es: {method: es, settings: {sigma: 0.02}, trials: [{learning_rate: 0.01}, {learning_rate: 0.02}]}
      grpo: {method: grpo, trials: [{learning_rate: 1.0e-5}, {learning_rate: 1.0e-4}]}

Every method has the same number of trials. These rows are always in the report without being named: the base, the base
with its skill forced by ``skill_prefix``, the best constant answer if the task can have one, and random search.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from estune.compare.hacking import task_bounds
from estune.config import METHODS, canonical
from estune.config.hints import unknown_in
from estune.errors import UserError, nearest

RANDOM_SEARCH = "random_search"
RANDOM_VOTE = "random_vote"  # the same search, measured by a vote of its best members
# For each annotation of a field: the classes that YAML may give, and their name in a message.
YAML_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "str": ((str,), "text"),
    "tuple": ((list,), "a list"),
    "dict": ((dict,), "a mapping"),
}
# Options of `estune train` that the comparison itself sets for every run.
SET_BY_COMPARISON = frozenset(
    "model task seed output_dir run_name resume overwrite dry_run max_time_s eval_steps eval_rows eval_greedy "
    "save_steps save_total_limit report_to console logging_steps log_completions push_to_hub hub_model_id "
    "hub_private_repo method load_best_model_at_end metric_for_best_model greater_is_better early_stopping_patience "
    "early_stopping_threshold".split()
)

# Options that must be equal for every method; they can stand only in the common settings.
SHARED = frozenset(
    "dataset_name dataset_config dataset_train_split dataset_test_split column_mapping reward_funcs reward_wrappers "
    "reward_weights reward_timeout_s reward_isolation apply_chat_template chat_template_kwargs system_prompt "
    "response_prefix stop_strings max_completion_length dtype device revision trust_remote_code "
    "allow_unsandboxed_code num_threads prompts_per_batch reward_workers trainable_parameters".split()
)

# Options that can differ between models. They act in training alone, so all models are measured alike. A base with two
# names, such as llama and llama-noisy, is compared under two rewards.
MODEL_OPTIONS = frozenset(("reward_wrappers",))

# Options that a retained task may have. The other options belong to the model or to the comparison, or do not change
# a greedy answer.
RETENTION_OPTIONS = frozenset(
    "apply_chat_template chat_template_kwargs system_prompt response_prefix stop_strings max_completion_length".split()
)


@dataclass(frozen=True)
class Budget:
    """The limits of every run: completions scored in training, and seconds of training. 0 leaves a budget out."""

    evaluations: int = 24000
    time_s: float = 60.0


@dataclass(frozen=True)
class Tuning:
    """The limits of a trial, the rows of the validation split that decide, and the run seed of all trials.

    With ``time_s`` a trial continues to that time, and each budget uses the trial that was best at that budget. Without
    it, the trial that was best after ``evaluations`` is used for both budgets. If only time is compared and ``time_s``
    is given, trials have no limit of evaluations. ``evaluations`` is by default a quarter of the budget's. ``split``
    names the validation split of a data set (`dataset_name`); a task has its own.
    """

    evaluations: int = 6000
    time_s: float = 0.0
    rows: int = 200
    seed: int = 1000
    split: str = "validation"


@dataclass(frozen=True)
class Measuring:
    """How a model is measured on held-out rows."""

    rows: int = 1000  # of the test split; 0: all
    samples: int = 16  # of each sampled row, for pass@k
    sample_rows: int = 0  # number of first test rows that are sampled; 0: all
    temperature: float = 1.0  # of those samples
    kl_rows: int = 200  # number of first test rows; one sample of each estimates the KL to the base; 0: all
    discovery_rows: int = 0  # number of first test rows that are searched for rows the base never solves; 0: all
    discovery_samples: int = 256  # of the base, for each of those rows; rows without a right sample are never solved
    curve_rows: int = 100  # of the validation split, evaluated during a run
    curve_points: int = 8  # number of those evaluations within the budget of evaluations (of time if only time counts)
    reward_bounds: tuple[float, ...] = ()  # lowest and highest reward; needed if the reward is not the task's own


@dataclass(frozen=True)
class Entry:
    """A method and its settings: a row of the tables."""

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    trials: tuple[dict[str, Any], ...] = ({},)


@dataclass(frozen=True)
class Retained:
    """A task whose accuracy is measured but not trained: another task, or the trained task under another prompt."""

    task: str
    settings: dict[str, Any] = field(default_factory=dict)
    rows: int = 200
    split: str = "test"  # of the task; not its train split


@dataclass(frozen=True)
class Comparison:
    """A whole comparison."""

    output_dir: str
    task: str
    models: dict[str, str]
    methods: dict[str, Entry]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    budget: Budget = field(default_factory=Budget)
    tuning: Tuning = field(default_factory=Tuning)
    measuring: Measuring = field(default_factory=Measuring)
    settings: dict[str, Any] = field(default_factory=dict)
    model_settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # of some models: `MODEL_OPTIONS`
    retention: dict[str, Retained] = field(default_factory=dict)
    skill_prefix: str = ""
    established_points: float = 10.0  # points of accuracy that a baseline must gain on at least one base to count
    workers: int = 1  # runs at a time; their times are measured, so each needs a core of its own
    notes: str = ""  # shown in the report

    @property
    def directory(self) -> Path:
        """The directory that holds everything the comparison writes."""
        return Path(self.output_dir)


def read_comparison(path: Path, output_dir: Path | None = None) -> Comparison:
    """Read a comparison's YAML file.

    Raises:
        UserError: the file cannot be read, has an unknown name, or describes a comparison that is not fair.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must be a mapping of names to values")
    if output_dir is not None:
        values["output_dir"] = str(output_dir)
    return from_mapping(values)


def from_mapping(values: dict[str, Any]) -> Comparison:
    """Return a comparison made from names and values; see `read_comparison` for the errors."""
    values = {"output_dir": "runs/compare", **values}
    _refuse_unknown_names(values, Comparison, "the comparison")
    missing = [name for name in ("task", "models", "methods") if not values.get(name)]
    if missing:
        raise UserError(f"a comparison needs {', '.join(missing)}")
    models = values["models"]
    if isinstance(models, list):
        values["models"] = models = {Path(str(model)).name: model for model in models}
    _check_types(values, Comparison, "the comparison")
    if any(type(seed) is not int for seed in values.get("seeds", ())):
        raise UserError(f"seeds must be whole numbers, not {values['seeds']}")
    for name, model in models.items():
        if not isinstance(model, str):
            raise UserError(f"model {name} must be a directory or an id, not {model!r}")
    tuning = values.get("tuning", {})
    has_evaluations = isinstance(tuning, dict) and "evaluations" in tuning
    for name, part in (("budget", Budget), ("tuning", Tuning), ("measuring", Measuring)):
        values[name] = _build(part, values.get(name, {}), name)
    if not has_evaluations:
        budget, limit = values["budget"], values["tuning"].time_s
        default = budget.evaluations // 4 or (0 if limit else Tuning.evaluations)
        values["tuning"] = dataclasses.replace(values["tuning"], evaluations=default)
    values["seeds"] = tuple(values.get("seeds", (0, 1, 2, 3, 4)))
    values["settings"] = _settings(values.get("settings", {}), "settings")
    values["methods"] = {name: _entry(name, given) for name, given in values["methods"].items()}
    values["model_settings"] = {
        name: _model_settings(name, given, models) for name, given in (values.get("model_settings") or {}).items()
    }
    values["retention"] = {name: _retained(name, given) for name, given in (values.get("retention") or {}).items()}
    comparison = Comparison(**values)
    _validate(comparison)
    return comparison


def _entry(name: str, given: Any) -> Entry:
    entry: Entry = _build(Entry, given, f"method {name}")
    if entry.method not in METHODS:
        raise UserError(
            f"method {name} is {entry.method!r}; it can be {', '.join(METHODS)}{nearest(entry.method, METHODS)}"
        )
    trials = tuple(_settings(trial, f"a trial of {name}") for trial in entry.trials)
    return Entry(entry.method, _settings(entry.settings, f"settings of {name}"), trials)


def _model_settings(name: str, given: Any, models: dict[str, Any]) -> dict[str, Any]:
    where = f"model_settings of {name}"
    if name not in models:
        raise UserError(f"{where}: there is no such model; there are {', '.join(models)}")
    if not isinstance(given, dict):
        raise UserError(f"{where} must be a mapping of options to values")
    settings = canonical(given, where)
    for option in settings:
        if option not in MODEL_OPTIONS:
            raise UserError(f"{where} cannot hold {option}: they can hold {', '.join(sorted(MODEL_OPTIONS))}")
    return settings


def _retained(name: str, given: Any) -> Retained:
    where = f"retention {name}"
    retained: Retained = _build(Retained, given, where)
    settings = canonical(retained.settings, f"settings of {where}")
    for option in settings:
        if option not in RETENTION_OPTIONS:
            raise UserError(
                f"settings of {where} cannot hold {option}, which would have no effect: they can hold "
                f"{', '.join(sorted(RETENTION_OPTIONS))}"
            )
    return dataclasses.replace(retained, settings=settings)


def bounds_of(comparison: Comparison) -> tuple[float, float]:
    """Return the lowest and the highest value of the reward; the hacking detector normalises rewards with them.

    Raises:
        UserError: the bounds are unknown and not in the configuration, or are not two increasing numbers.
    """
    if bounds := comparison.measuring.reward_bounds:
        numbers = all(type(value) in (int, float) and math.isfinite(value) for value in bounds)
        if not numbers or len(bounds) != 2 or not bounds[0] < bounds[1]:
            raise UserError(f"reward_bounds of measuring must be [lowest, highest], not {list(bounds)}")
        return float(bounds[0]), float(bounds[1])
    custom = any(comparison.settings.get(name) for name in ("reward_funcs", "reward_weights"))
    of_task = None if custom else task_bounds(comparison.task)
    if of_task is None:
        raise UserError(
            "the bounds of this reward are unknown, and the hacking detector needs them: give "
            "measuring: {reward_bounds: [lowest, highest]}"
        )
    return of_task


def _validate(comparison: Comparison) -> None:
    counts = {name: len(entry.trials) for name, entry in comparison.methods.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise UserError(f"every method must have the same number of tuning trials, not {listed}")
    if 0 in counts.values():
        raise UserError("every method needs a trial; an empty trial uses the defaults: trials: [{}]")
    if len(set(comparison.seeds)) != len(comparison.seeds) or not comparison.seeds:
        raise UserError("seeds must be different whole numbers")
    if comparison.tuning.seed in comparison.seeds:
        raise UserError(
            "seed of tuning must not be one of seeds: a trial that was chosen for its luck would be reported"
        )
    for text in (*comparison.models, *comparison.methods):
        if not text or any(letter in text for letter in "/\\: "):
            raise UserError(f"the name {text!r} must be usable as a file name: letters, digits, - _ . +")
    if "dataset_name" not in comparison.settings:
        if comparison.tuning.split != Tuning.split:
            raise UserError("split of tuning needs dataset_name: a task has its own validation split")
        for name in ("dataset_train_split", "dataset_test_split", "column_mapping"):
            if name in comparison.settings:
                raise UserError(f"{name} needs dataset_name")
    if "dataset_name" in comparison.settings:
        splits = [
            comparison.settings.get("dataset_train_split", "train"),
            comparison.tuning.split,
            comparison.settings.get("dataset_test_split", "test"),
        ]
        if len(set(splits)) < len(splits):
            raise UserError(
                "dataset_train_split, split of tuning and dataset_test_split must be three different splits, not "
                f"{', '.join(splits)}"
            )
    for where, limits in (("budget", comparison.budget), ("tuning", comparison.tuning)):
        if limits.evaluations < 0 or not 0 <= limits.time_s < math.inf or not (limits.evaluations or limits.time_s):
            raise UserError(
                f"evaluations and time_s of {where} must be numbers from 0, and not 0 both; 0 leaves a limit out"
            )
    if comparison.tuning.time_s and not comparison.budget.time_s:
        raise UserError("time_s of tuning needs a budget of time, and time_s of budget is 0")
    if comparison.tuning.evaluations and comparison.tuning.time_s and not comparison.budget.evaluations:
        raise UserError("evaluations of tuning has no effect: evaluations of budget is 0, and tuning has time_s")
    if comparison.workers < 1:
        raise UserError("workers must be 1 or more")
    if comparison.measuring.samples < 1 or comparison.measuring.discovery_samples < comparison.measuring.samples:
        raise UserError("samples of measuring must be 1 or more, and discovery_samples no fewer than samples")
    for name, value in vars(comparison.measuring).items():
        if isinstance(value, int | float) and value < 0:
            raise UserError(f"{name} of measuring cannot be negative, not {value}")
    if comparison.settings.get("num_workers") and comparison.budget.time_s:
        raise UserError(
            "num_workers in settings gives ES more processes than the other methods: leave time out of the budget "
            "(time_s: 0)"
        )
    bounds_of(comparison)


def _settings(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise UserError(f"{where} must be a mapping of options to values")
    settings = canonical(given, where)
    for name in settings:
        if name in SET_BY_COMPARISON:
            raise UserError(f"{where} cannot hold {name}: the comparison sets it")
        if where == "settings" and name in ("engine", "worker_engine"):
            raise UserError(f"{where} cannot hold {name}: it belongs to a method es; measurements use engine hf")
        if where != "settings" and name in SHARED:
            raise UserError(f"{where} cannot hold {name}: it belongs in settings, the same for every method")
    return settings


def _build(part: type[Any], given: Any, where: str) -> Any:
    """Return an instance of the dataclass ``part``, made from the YAML mapping ``given``."""
    if not isinstance(given, dict):
        raise UserError(f"{where} must be a mapping")
    _refuse_unknown_names(given, part, where)
    _check_types(given, part, where)
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    required = [
        spec.name
        for spec in dataclasses.fields(part)
        if spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in values]:
        raise UserError(f"{where} needs {', '.join(missing)}")
    return part(**values)


def _check_types(given: dict[str, Any], part: type[Any], where: str) -> None:
    for spec in dataclasses.fields(part):
        classes, expected = YAML_TYPES.get(str(spec.type).partition("[")[0], ((dict,), "a mapping"))
        if spec.name in given and (not isinstance(value := given[spec.name], classes) or isinstance(value, bool)):
            raise UserError(f"{spec.name} of {where} must be {expected}, not {value!r}")


def _refuse_unknown_names(given: dict[str, Any], part: type[Any], where: str) -> None:
    names = {spec.name for spec in dataclasses.fields(part)}
    if wrong := {name: nearest(str(name), names) for name in given if name not in names}:
        raise unknown_in(where, "name", wrong)
