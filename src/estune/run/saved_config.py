"""The configuration of a run on disk, `es_config.json`: read it, repair it, and inherit options from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from estune.config import FIELDS, LATER_OPTIONS, RESUMABLE, ESConfig, coerce, default_of, with_absent_options
from estune.console import warn
from estune.errors import ExternalError, UserError
from estune.files import read_json_object
from estune.run.journal import JOURNAL_FILE, Base, Header, Journal
from estune.run.origin import located, may_lead_to_the_same, refuse_foreign_engine
from estune.run.resume import StoredFacts, has_sources

CONFIG_FILE = "es_config.json"
METHOD_FILE = "method.json"  # of a baseline's run, which has no journal
ALWAYS = ("model", "method")  # options that every version writes


class Voter(TypedDict):
    """A member that votes: base + seed and scale give its weights."""

    step: int  # that drew it
    member: int  # its index in the step
    seed: str  # 16 hexadecimal digits
    sign: int
    scale: float
    lowrank_scale: float


class Vote(TypedDict):
    """The members of a random search that vote, best first, and what identifies them."""

    fingerprint: str  # 32 hexadecimal digits, of the base's fingerprint and everything below
    distribution: str
    rank: int  # 0: full noise
    members: list[Voter]


class Trainer(TypedDict):
    """The trainer of a baseline, with all its resolved arguments."""

    method: str
    trainer: str  # name of the class or function
    trl: NotRequired[str]  # TRL's version
    estune: NotRequired[dict[str, Any]]  # arguments that estune itself uses
    arguments: dict[str, Any]
    samples_drawn: NotRequired[int]  # by rejection sampling
    samples_kept: NotRequired[int]
    drawing_s: NotRequired[float]  # seconds
    vote: NotRequired[Vote]  # of a finished run of random_vote


class BaselineFacts(StoredFacts):
    """The facts of a baseline's run, which a resume cannot change."""

    base: Base


class Method(Trainer, BaselineFacts):
    """The content of `method.json`."""


# Options that `estune evaluate` inherits from the run of its model: those that decide completions and their scores.
_INHERITED = (
    "apply_chat_template chat_template_kwargs system_prompt response_prefix stop_strings max_completion_length "
)
_INHERITED += "prompts_per_batch num_threads engine"
_SAMPLING = "temperature top_p top_k num_generations seed"


def run_of(model: str) -> Path | None:
    """Return the run directory that a model or a checkpoint belongs to; None if it belongs to no run."""
    return next((path for path in (Path(model), Path(model).parent) if (path / CONFIG_FILE).is_file()), None)


def inherited_settings(directory: Path, given: Collection[str]) -> dict[str, Any]:
    """Return the options that an evaluation inherits from the run of its model, without the options in ``given``.

    Task, data and rewards are inherited together: the run's rewards score other rows too, but another task has its own
    rewards.

    Raises:
        UserError: the run's engine is outside estune, and ``engine`` is not given.
    """
    stored = located(read_config(directory), directory)
    if "engine" not in given:
        refuse_foreign_engine(str(stored.get("engine", "")), directory)
    names = _INHERITED.split()
    es = stored.get("method", "es") == "es"  # other methods sample in training, and are evaluated greedily
    if es and not set(_SAMPLING.split()) & set(given):
        names += _SAMPLING.split()
    if not {"task", "dataset_name", "reward_funcs"} & set(given):
        names.append("task")
    if not {"task", "reward_funcs"} & set(given):
        names += ["reward_funcs", "reward_weights"]
    if not {"task", "dataset_name"} & set(given):
        names += ["dataset_name", "dataset_config", "dataset_test_split"]
    if "task" not in given:  # other rows have the run's columns, which its rewards read
        names.append("column_mapping")
    values = {name: stored[name] for name in names if name in stored and name not in given}
    if values.get("reward_funcs") is None and not values.get("task"):
        values.pop("reward_weights", None)  # of rewards from Python
    return values


def stored_config(args: ESConfig) -> ESConfig:
    """Return the configuration for `es_config.json`, without the options resume, overwrite and dry_run."""
    return dataclasses.replace(args, resume=False, overwrite=False, dry_run=False)


def read_config(path: Path) -> dict[str, Any]:
    """Return a run's `es_config.json`, with missing, unknown and wrong options repaired from its journal's header.

    The header decides the options that define the trajectory; a model, a dataset and rewards may have another name in
    the file. A warning names the repaired options.

    Raises:
        UserError: neither file can be read; or there is no journal, and an option is unknown or wrong, or one of
            `ALWAYS` is missing.
    """
    file = path / CONFIG_FILE
    values = read_stored(file)
    try:
        journal = Journal.open(path / JOURNAL_FILE, repair=False)
    except UserError:
        if values is None:
            raise
        journal = None  # opening the run will report the damage
    if journal is None:
        if values is None:
            if not file.exists():
                raise UserError(f"{path} holds no run to resume (no {CONFIG_FILE})")
            raise UserError(f"{file} is not a JSON object, and there is no journal with the run's options")
        return _checked(file, values)
    if values is None:
        warn(
            f"{file} is missing or damaged: the options are the journal's, and those that a resume may change have "
            "their defaults"
        )
        return with_absent_options(journal.header["config"])
    mended, wrong = _mended(values, journal.header)
    if wrong:
        warn(
            f"{file} is damaged ({', '.join(wrong)}): options in the journal have the journal's values, other damaged "
            "options have their defaults"
        )
    return mended


def read_stored(file: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None if the file is missing or damaged."""
    try:
        return read_json_object(file)
    except (OSError, ValueError):
        return None


def _checked(file: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a run without a journal, with defaults for missing options.

    A run of an older estune lacks the options that were added later.

    Raises:
        UserError: an option is unknown or wrong, or the file lacks one of `ALWAYS`.
    """
    unknown = [name for name in values if name not in FIELDS]
    lost = [name for name in ALWAYS if name not in values]
    if unknown or lost:
        what = f"has an unknown option {unknown[0]!r}" if unknown else f"lacks the option {lost[0]!r}"
        raise UserError(f"{file} is damaged: it {what}")
    try:
        ESConfig.from_mapping(values)
    except UserError as error:
        raise UserError(f"{file} is damaged: {error}") from None
    missing = {name: default_of(name, values["method"]) for name in FIELDS if name not in values}
    # An option whose default depends on the machine or on other options stays out: the resume resolves it.
    known = {name: value for name, value in missing.items() if value not in (None, "auto")}
    return {**known, **with_absent_options(values)}


def _mended(values: Mapping[str, Any], header: Header) -> tuple[dict[str, Any], list[str]]:
    """Return a run's repaired options, and the options missing, unknown or wrong in `es_config.json`."""
    truth = header["config"]
    kept = with_absent_options(truth)
    wrong = [name for name in values if name not in FIELDS]
    for name in FIELDS:
        value = values.get(name)
        if name not in values and name in LATER_OPTIONS:
            continue
        if name not in values or not _fits(name, value):
            wrong.append(name)
        elif name not in truth or value == truth[name] or may_lead_to_the_same(
            name, truth[name], value, has_sources(header)
        ):  # fmt: skip
            kept[name] = coerce(name, value)
        else:
            wrong.append(name)
    try:
        ESConfig(**kept)
    except UserError:  # options that a resume may change are out of range, or contradict each other
        free = [name for name in kept if name in RESUMABLE and kept[name] != default_of(name)]
        kept = {name: value for name, value in kept.items() if name not in free}
        wrong += free
    return kept, wrong


def _fits(name: str, value: Any) -> bool:
    """Return whether an option's value has the option's type and is one of its choices."""
    try:
        converted = coerce(name, value)
    except UserError:
        return False
    choices = FIELDS[name].metadata["choices"]
    return not choices or converted in choices


def has_sound_config(path: Path, header: Header) -> bool:
    """Return whether a run's `es_config.json` needs no repair by `read_config`."""
    values = read_stored(path / CONFIG_FILE)
    return values is not None and not _mended(values, header)[1]


def refuse_rows_from_python(args: ESConfig) -> None:
    """Refuse to resume a run whose rows came from Python, if no rows are given now.

    Raises:
        ExternalError: the message says how to continue such a run.
    """
    path = Path(args.output_dir or "")
    if args.resume and (path / CONFIG_FILE).exists():
        stored = read_config(path)
        if stored.get("task") is None and stored.get("dataset_name") is None:
            raise ExternalError(
                f"the rows of {path} were given from Python: run that script again, with "
                f"ESConfig(resume=True, output_dir={str(path)!r})"
            )
