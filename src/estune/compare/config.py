"""What a comparison is: one YAML file, checked in full before anything runs.

    output_dir: runs/compare            where runs, results and the report go
    task: countdown                     what is trained on (its train split), tuned on (validation), reported (test)
    models: {llama: benchmarks/bases/llama}
    seeds: [0, 1, 2, 3, 4]
    budget: {evaluations: 24000, time_s: 60}   completions scored in training; seconds of training
    tuning: {evaluations: 6000, time_s: 30, rows: 200}   of one trial; rows of the validation split that decide
    settings: {max_completion_length: 72}      options of every run, by their names in `estune train`
    methods:
      es: {method: es, settings: {sigma: 0.02}, trials: [{learning_rate: 0.01}, {learning_rate: 0.02}]}
      grpo: {method: grpo, trials: [{learning_rate: 1.0e-5}, {learning_rate: 1.0e-4}]}

Every method has the same number of trials. Rows that are always there need no mention: the base, the base with its
skill forced by ``skill_prefix``, the best constant answer where there can be one, and random search.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from estune.compare.hacking import task_bounds
from estune.config import METHODS, canonical
from estune.errors import UserError, nearest

RANDOM_SEARCH = "random_search"
# What YAML gives for a type, and how that is told.
KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "str": ((str,), "text"),
    "tuple": ((list,), "a list"),
    "dict": ((dict,), "a mapping"),
}
# Decided by the comparison itself, for every run.
DECIDED = frozenset(
    "model task seed output_dir run_name resume overwrite dry_run max_time_s eval_steps eval_rows eval_greedy "
    "save_steps save_total_limit report_to console logging_steps log_completions push_to_hub hub_model_id "
    "hub_private_repo method".split()
)

# The ground: what every method gets alike.
SHARED = frozenset(
    "dataset_name dataset_config dataset_train_split dataset_test_split reward_funcs reward_weights reward_timeout_s "
    "reward_isolation apply_chat_template chat_template_kwargs system_prompt response_prefix stop_strings "
    "max_completion_length dtype device revision trust_remote_code allow_unsandboxed_code num_threads "
    "prompts_per_batch reward_workers trainable_parameters".split()
)

# What a retained task may be asked with; the rest is the model's, the comparison's, or decides no greedy answer.
RETAINED = frozenset(
    "apply_chat_template chat_template_kwargs system_prompt response_prefix stop_strings max_completion_length".split()
)


@dataclass(frozen=True)
class Budget:
    """What every run may use: completions scored in training, and seconds of training. 0 leaves a budget out."""

    evaluations: int = 24000
    time_s: float = 60.0


@dataclass(frozen=True)
class Tuning:
    """What a trial may use, the rows of the validation split that decide, and the trials' run seed.

    With ``time_s`` trials go on to that time, and each budget gets what was best at its own; else what was best at
    ``evaluations`` serves both. Where time alone is compared and ``time_s`` given, it is all that a trial has. Where
    ``evaluations`` are not given they are a quarter of the budget's. ``split`` is the validation split of a data set
    that was given (`dataset_name`); a task has its own.
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
    sample_rows: int = 0  # the first of those rows, which are sampled; 0: all
    temperature: float = 1.0  # of those samples
    kl_rows: int = 200  # the first rows, of which one sample each gives the divergence to the base; 0: all
    discovery_rows: int = 0  # the first rows, among which is sought what the base never solves; 0: all
    discovery_samples: int = 256  # of the base: what it never solves in these is there to be discovered
    curve_rows: int = 100  # of the validation split, evaluated while a run goes on
    curve_points: int = 8  # evaluations within the budget of evaluations, or of time where that is all
    reward_bounds: tuple[float, ...] = ()  # the reward's lowest and highest value, where it is not the task's own


@dataclass(frozen=True)
class Entry:
    """A method as it is compared: a row of the tables."""

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    trials: tuple[dict[str, Any], ...] = ({},)


@dataclass(frozen=True)
class Retained:
    """A task that is not trained on, or the trained one under another prompt, with the options it is asked with."""

    task: str
    settings: dict[str, Any] = field(default_factory=dict)
    rows: int = 200
    split: str = "test"  # of the task; any but the one it is trained on


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
    retention: dict[str, Retained] = field(default_factory=dict)
    skill_prefix: str = ""
    established_points: float = 10.0  # gain in points of accuracy on some base from which a baseline counts
    workers: int = 1  # runs at a time; their times are measured side by side, so leave each a core
    notes: str = ""  # shown in the report

    @property
    def directory(self) -> Path:
        """Where everything goes."""
        return Path(self.output_dir)


def read_comparison(path: Path, output_dir: Path | None = None) -> Comparison:
    """Read a comparison's YAML file.

    Raises:
        UserError: it cannot be read, has an unknown name, or cannot be a fair comparison.
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
    """Build a comparison from names and values; see `read_comparison`."""
    values = {"output_dir": "runs/compare", **values}
    _known(values, Comparison, "the comparison")
    missing = [name for name in ("task", "models", "methods") if not values.get(name)]
    if missing:
        raise UserError(f"a comparison needs {', '.join(missing)}")
    models = values["models"]
    if isinstance(models, list):
        values["models"] = models = {Path(str(model)).name: model for model in models}
    _typed(values, Comparison, "the comparison")
    if any(type(seed) is not int for seed in values.get("seeds", ())):
        raise UserError(f"seeds must be whole numbers, not {values['seeds']}")
    for name, model in models.items():
        if not isinstance(model, str):
            raise UserError(f"model {name} must be a directory or an id, not {model!r}")
    tuning = values.get("tuning", {})
    given_evaluations = isinstance(tuning, dict) and "evaluations" in tuning
    for name, kind in (("budget", Budget), ("tuning", Tuning), ("measuring", Measuring)):
        values[name] = _part(kind, values.get(name, {}), name)
    if not given_evaluations:
        budget, limit = values["budget"], values["tuning"].time_s
        default = budget.evaluations // 4 or (0 if limit else Tuning.evaluations)
        values["tuning"] = dataclasses.replace(values["tuning"], evaluations=default)
    values["seeds"] = tuple(values.get("seeds", (0, 1, 2, 3, 4)))
    values["settings"] = _settings(values.get("settings", {}), "settings")
    entries = {name: _entry(name, given) for name, given in values["methods"].items()}
    values["methods"] = entries
    values["retention"] = {name: _retained(name, given) for name, given in (values.get("retention") or {}).items()}
    comparison = Comparison(**values)
    _validate(comparison)
    return comparison


def _entry(name: str, given: Any) -> Entry:
    entry: Entry = _part(Entry, given, f"method {name}")
    if entry.method not in METHODS:
        raise UserError(
            f"method {name} is {entry.method!r}; it can be {', '.join(METHODS)}{nearest(entry.method, METHODS)}"
        )
    trials = tuple(_settings(trial, f"a trial of {name}") for trial in entry.trials)
    return Entry(entry.method, _settings(entry.settings, f"settings of {name}"), trials)


def _retained(name: str, given: Any) -> Retained:
    where = f"retention {name}"
    kept: Retained = _part(Retained, given, where)
    named = canonical(kept.settings, f"settings of {where}")
    for option in named:
        if option not in RETAINED:
            raise UserError(
                f"settings of {where} cannot hold {option}, which it would not heed: they can hold "
                f"{', '.join(sorted(RETAINED))}"
            )
    return dataclasses.replace(kept, settings=named)


def bounds_of(comparison: Comparison) -> tuple[float, float]:
    """Return the lowest and the highest value of the reward, by which the hacking detector normalises it.

    Raises:
        UserError: they are not known and were not given, or are no bounds.
    """
    if given := comparison.measuring.reward_bounds:
        numbers = all(type(value) in (int, float) and math.isfinite(value) for value in given)
        if not numbers or len(given) != 2 or not given[0] < given[1]:
            raise UserError(f"reward_bounds of measuring must be [lowest, highest], not {list(given)}")
        return float(given[0]), float(given[1])
    own = any(comparison.settings.get(name) for name in ("reward_funcs", "reward_weights"))
    known = None if own else task_bounds(comparison.task)
    if known is None:
        raise UserError(
            "the bounds of this reward are not known, and hacking is judged by its share of them: give "
            "measuring: {reward_bounds: [lowest, highest]}"
        )
    return known


def _validate(comparison: Comparison) -> None:
    counts = {name: len(entry.trials) for name, entry in comparison.methods.items()}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise UserError(f"every method must have the same number of tuning trials, not {told}")
    if 0 in counts.values():
        raise UserError("every method needs a trial; one with nothing in it takes the defaults: trials: [{}]")
    if len(set(comparison.seeds)) != len(comparison.seeds) or not comparison.seeds:
        raise UserError("seeds must be different whole numbers")
    if comparison.tuning.seed in comparison.seeds:
        raise UserError("tuning needs a seed of its own: a run that was chosen for its luck would be reported")
    for text in (*comparison.models, *comparison.methods):
        if not text or any(letter in text for letter in "/\\: "):
            raise UserError(f"the name {text!r} must be usable as a file name: letters, digits, - _ . +")
    if "dataset_name" not in comparison.settings and comparison.tuning.split != Tuning.split:
        raise UserError("split of tuning is for data given as dataset_name: a task has its own")
    if "dataset_name" in comparison.settings:
        splits = [
            comparison.settings.get("dataset_train_split", "train"),
            comparison.tuning.split,
            comparison.settings.get("dataset_test_split", "test"),
        ]
        if len(set(splits)) < len(splits):
            raise UserError(
                f"dataset_train_split, split of tuning and dataset_test_split must be three, not {', '.join(splits)}"
            )
    for where, limits in (("budget", comparison.budget), ("tuning", comparison.tuning)):
        if limits.evaluations < 0 or not 0 <= limits.time_s < math.inf or not (limits.evaluations or limits.time_s):
            raise UserError(
                f"evaluations and time_s of {where} must be numbers from 0, of which 0 leaves one out, and not 0 both"
            )
    if comparison.tuning.time_s and not comparison.budget.time_s:
        raise UserError("time_s of tuning is for a budget of time, and time_s of budget is 0")
    if comparison.tuning.evaluations and comparison.tuning.time_s and not comparison.budget.evaluations:
        raise UserError("evaluations of tuning have no effect beside its time_s, since evaluations of budget are 0")
    if comparison.workers < 1:
        raise UserError("workers must be 1 or more")
    if comparison.measuring.samples < 1 or comparison.measuring.discovery_samples < comparison.measuring.samples:
        raise UserError("measuring needs samples of 1 or more, and no fewer discovery_samples")
    for name, value in vars(comparison.measuring).items():
        if isinstance(value, int | float) and value < 0:
            raise UserError(f"{name} of measuring cannot be negative, not {value}")
    bounds_of(comparison)


def _settings(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise UserError(f"{where} must be a mapping of options to values")
    named = canonical(given, where)
    for name in named:
        if name in DECIDED:
            raise UserError(f"{where} cannot hold {name}: the comparison decides it")
        if where != "settings" and name in SHARED:
            raise UserError(f"{where} cannot hold {name}: it belongs into settings, the same for every method")
    return named


def _part(kind: type[Any], given: Any, where: str) -> Any:
    if not isinstance(given, dict):
        raise UserError(f"{where} must be a mapping")
    _known(given, kind, where)
    _typed(given, kind, where)
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    needed = [
        spec.name
        for spec in dataclasses.fields(kind)
        if spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in needed if name not in values]:
        raise UserError(f"{where} needs {', '.join(missing)}")
    return kind(**values)


def _typed(given: dict[str, Any], kind: type[Any], where: str) -> None:
    for spec in dataclasses.fields(kind):
        classes, wanted = KINDS.get(str(spec.type).partition("[")[0], ((dict,), "a mapping"))
        if spec.name in given and (not isinstance(value := given[spec.name], classes) or isinstance(value, bool)):
            raise UserError(f"{spec.name} of {where} must be {wanted}, not {value!r}")


def _known(given: dict[str, Any], kind: type[Any], where: str) -> None:
    names = {spec.name for spec in dataclasses.fields(kind)}
    for name in given:
        if name not in names:
            raise UserError(f"{where} has an unknown name {name!r}{nearest(str(name), names)}")
