"""What a resume may change: the table `RULES`, and the comparison that follows it.

A run is compared by content, never by name: weights by fingerprint, rows by their values, rewards by their source. So a
model, a dataset or a reward may have another name or path when the run is resumed (`estune.run.origin`).

A run of an older estune, which recorded fewer facts, is compared by the facts that it recorded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, TypeVar

from estune.config import FIELDS, RESUMABLE, ESConfig, with_absent_options
from estune.console import warn
from estune.errors import ExternalError
from estune.files import is_count
from estune.run.origin import IN_ROWS, LOCATED, DataIdentity, may_lead_to_the_same, read_origin

Config = TypeVar("Config", bound=ESConfig)


@dataclass(frozen=True)
class Rule:
    """The outcome of a resume if one fact of the run has changed."""

    name: str
    what: str  # the fact in words, for messages and the docs
    compared: str  # how the fact is compared, for the docs
    outcome: Literal["refused", "warned"]


RULES = {
    rule.name: rule
    for rule in (
        Rule("base", "the base model's weights", "a fingerprint over the float32 values", "refused"),
        Rule("parameters", "which parameters are perturbed, and with which noise", "name by name", "refused"),
        Rule("config", "the model's configuration", "`config.json`, without versions and paths", "refused"),
        Rule("code", "the Python code that comes with the model", "the text of the files", "refused"),
        Rule("tokenizer", "the tokenizer", "its vocabulary, its rules and its special tokens", "refused"),
        Rule("end_tokens", "the tokens that end a completion", "their ids", "refused"),
        Rule("data", "the training data", "every value of every column, and the tokens of every prompt: chat template, "
             "system prompt and response prefix are in them", "refused"),
        Rule("reward_funcs", "the names of the reward functions", "in their order", "refused"),
        Rule("reward_weights", "the weights of the reward functions", "in their order", "refused"),
        Rule("reward_sources", "the source of the reward functions", "the text of their file, and of the user's own "
             "modules that it imports, without comments; of a function in a script its text, closure and defaults",
             "refused"),
        Rule("engine_source", "the source of an engine outside estune", "the text of its file, and of the user's own "
             "modules that it imports, without comments", "refused"),
        Rule("held_out", "the held-out rows", "as the training data", "warned"),
        Rule("engine", "where and how completions are computed", "device, dtype, architecture, shared forward passes",
             "warned"),
        Rule("versions", "the versions of Python and of the packages", "as `estune env` shows them", "warned"),
        Rule("processor", "the processor", "its name", "warned"),
    )
}  # fmt: skip


HELD_OUT = (
    f"{RULES['held_out'].what} are not those that the run began with: do not compare evaluations before and after the "
    "resume"
)


HELD_OUT_CHOOSE = (
    f"{RULES['held_out'].what} are not those that the run began with: load_best_model_at_end and "
    "early_stopping_patience cannot compare evaluations of different rows"
)


class StoredFacts(TypedDict):
    """The facts of a run beside its options, in a journal's header or a baseline's `method.json`."""

    data: DataIdentity
    reward_funcs: NotRequired[list[str]]  # (F,)
    reward_weights: NotRequired[list[float]]  # (F,)
    identity: NotRequired[dict[str, Any]]  # by the names of `RULES`


@dataclass(frozen=True)
class Facts:
    """The present facts of a run beside its options."""

    data: DataIdentity
    reward_funcs: list[str]  # (F,)
    reward_weights: list[float]  # (F,)
    identity: dict[str, Any]  # by the names of `RULES`: of model, engine, rewards and held-out rows
    unversioned_data: Callable[[], tuple[str, list[str]]]  # an older run's fingerprint, and the columns not in it

    def stored(self) -> StoredFacts:
        """Return the facts that a journal's header, or a baseline's `method.json`, stores."""
        return {
            "data": self.data,
            "reward_funcs": self.reward_funcs,
            "reward_weights": self.reward_weights,
            "identity": self.identity,
        }


def are_facts(then: Any) -> bool:
    """Return whether a value read from a `method.json` holds the facts that `check_facts` compares."""
    if not isinstance(then, dict) or not isinstance(then.get("data"), dict):
        return False
    data, identity = then["data"], then.get("identity", {})
    if not is_count(data.get("rows")) or not isinstance(data.get("fingerprint"), str) or not isinstance(identity, dict):
        return False
    sources = identity.get("reward_sources", {})
    return isinstance(sources, dict) and all(isinstance(parts, dict) for parts in sources.values())


def check_facts(then: StoredFacts, now: Facts, *, rows_choose: bool = False) -> None:
    """Compare a run's stored facts, from its header or `method.json`, with the present facts.

    Args:
        then: the stored facts.
        now: the present facts.
        rows_choose: whether the held-out rows choose the run's model or its end; then a resume cannot change them.

    Raises:
        ExternalError: a fact differs that a resume cannot change; the message names it.
    """
    _check_data(then["data"], now)
    stored: Mapping[str, Any] = {**then}
    for name in ("reward_funcs", "reward_weights"):
        if name in stored and stored[name] != getattr(now, name):
            raise ExternalError(f"a resume cannot change {name} from {stored[name]} to {getattr(now, name)}")
    known = then.get("identity", {})
    for name, value in now.identity.items():
        if name in known and known[name] != value:
            _differs(RULES[name], known[name], value, rows_choose=rows_choose)


def _check_data(then: DataIdentity, now: Facts) -> None:
    found = now.data
    if "version" not in then:
        fingerprint, unseen = now.unversioned_data()
        found = DataIdentity(rows=now.data["rows"], fingerprint=fingerprint)
        if unseen and found == then:
            warn(
                f"the run was begun by an older estune, which recorded no values of {', '.join(unseen)}: make sure "
                "that they have not changed"
            )
    if found["rows"] != then["rows"]:
        raise ExternalError(
            f"a resume cannot change the training data: the run began with {then['rows']} rows, the data now has "
            f"{found['rows']}"
        )
    if found != then:
        raise ExternalError(
            "a resume cannot change the training data: since the run began, a value of a column or a prompt's tokens "
            f"changed (the fingerprint was {then['fingerprint']}, now it is {found['fingerprint']})"
        )


def _differs(rule: Rule, then: Any, now: Any, *, rows_choose: bool = False) -> None:
    if rule.outcome == "warned":
        if then is not None and now is not None:
            _report_held_out(rows_choose)
        return
    if rule.name == "end_tokens":
        raise ExternalError(f"a resume cannot change {rule.what} from {then} to {now}")
    if rule.name in ("reward_sources", "engine_source"):
        raise ExternalError(
            f"a resume cannot change {rule.what}: since the run began, {_changed_sources(then, now)}; undo the change, "
            "or start a new run from the run's weights with --model"
        )
    raise ExternalError(f"a resume cannot change {rule.what}: it has changed since the run began")


def _report_held_out(rows_choose: bool) -> None:
    """Warn that the held-out rows have changed; raise ExternalError if they choose a step."""
    if rows_choose:
        raise ExternalError(HELD_OUT_CHOOSE)
    warn(HELD_OUT)


def check_engine_files(then: Mapping[str, Any], name: str, now: Mapping[str, str]) -> bool:
    """Return whether a run's stored identity holds all files of an engine outside estune, before they are imported.

    Args:
        then: the identity in the run's header.
        name: the name of the engine's class.
        now: the hashes of the engine's present files, see `estune.rewards.sources.source_files`.

    Raises:
        ExternalError: a file has changed since the run began.
    """
    stored = then.get("engine_source", {}).get(name, {})
    known = {part: value for part, value in now.items() if part in stored}
    if any(stored[part] != value for part, value in known.items()):
        _differs(RULES["engine_source"], {name: {part: stored[part] for part in known}}, {name: known})
    return bool(now) and len(known) == len(now)


def warn_of_engine_source(then: Mapping[str, Any], now: Mapping[str, Mapping[str, str]]) -> None:
    """Warn if the source of an engine outside estune is not the one in a run's stored identity.

    Args:
        then: the identity in the run's header.
        now: the parts of the engine's source, by the name of its class.
    """
    stored = then.get("engine_source")
    if stored and now and stored != now:
        warn(
            f"{RULES['engine_source'].what} is not the one that the run began with: {_changed_sources(stored, now)}; "
            "the answers may differ from the run's"
        )


def _changed_sources(then: Mapping[str, Any], now: Mapping[str, Mapping[str, str]]) -> str:
    """Return the changed parts of all sources, as text."""
    return "; ".join(_changed_parts(name, then.get(name, {}), now[name]) for name in now if then.get(name) != now[name])


def _changed_parts(name: str, then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return the parts of a reward's or an engine's source that changed, as text."""
    changed = [part for part in {**then, **now} if then.get(part) != now.get(part)]
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return f"{', '.join(changed[:3])}{more} of {name} changed"


def warn_of_held_out(run_dir: Path, now: Facts, *, rows_choose: bool = False) -> None:
    """Warn if the held-out rows differ from the run's first evaluation; for runs that began without one.

    Raises:
        ExternalError: they differ, and with ``rows_choose`` they choose the run's model or its end.
    """
    origin, held_out = read_origin(run_dir), now.identity.get("held_out")
    if origin and origin["held_out"] and held_out and origin["held_out"] != held_out:
        _report_held_out(rows_choose)


def has_sources(header: StoredFacts) -> bool:
    """Return whether a journal's header, or a `method.json`, holds hashes of the reward functions' source."""
    return "reward_sources" in header.get("identity", {})


def adopt(args: Config, stored: Mapping[str, Any], given: ESConfig, has_sources: bool = True) -> Config:
    """Return ``args`` with the options that a resume must keep taken from the journal's header.

    A model, a dataset or a reward may have another name: its content is compared after loading.

    Raises:
        ExternalError: a given value differs from the run's.
    """
    taken: dict[str, Any] = {}
    for name, value in with_absent_options(stored).items():
        now = getattr(args, name)
        if now == value:
            continue
        if name == "model" and given.model == "auto":  # a module from Python: the run directory holds its base
            continue
        if getattr(given, name) not in (None, "auto"):
            if may_lead_to_the_same(name, value, now, has_sources):
                continue
            free = ", ".join(sorted(RESUMABLE - {"output_dir", "run_name", "resume", "overwrite", "dry_run"}))
            raise ExternalError(f"a resume cannot change {name} from {value!r} to {now!r}; it can change {free}")
        taken[name] = value
    return dataclasses.replace(args, **taken)


def warn_of_other_engine(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warn if device, dtype, architecture or shared forward passes changed. Journalled steps still replay exactly."""
    for name in ("device", "dtype", "architecture", "shared_forward"):
        if name in then and then[name] != now.get(name):
            warn(
                f"the run began with {name} {then[name]} and continues with {now.get(name)}: new rollouts may round "
                "differently"
            )


def warn_of_versions(then: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Warn if the version of a package that can change a rollout's rounding has changed since the run began."""
    changed = [f"{name} {then[name]} is {now.get(name, 'absent')}" for name in then if then[name] != now.get(name)]
    if changed:
        warn(
            f"since the run began, {', '.join(changed)} now: the journalled steps stay exact, but new rollouts may "
            "round differently"
        )


def warn_of_processor(then: str | None, now: str) -> None:
    """Warn if the processor is not the one that the run began on."""
    if then is not None and then != now:
        warn(
            f"the run began on {then} and continues on {now}: the journalled steps stay exact, but new rollouts may "
            "round differently"
        )


# --- the table --------------------------------------------------------------------------------------------------------


def table() -> str:
    """Return the tables of what a resume may change, as Markdown: facts from `RULES`, options from `ESConfig`."""
    lines = ["| fact of the run | compared by | a change is |", "|---|---|---|"]
    lines += [f"| {rule.what} | {rule.compared} | {rule.outcome} |" for rule in RULES.values()]
    lines += ["", "## Options", "", "| option | a resume |", "|---|---|"]
    for name in FIELDS:
        if name in RESUMABLE:
            outcome = "may change it"
        elif name in LOCATED:
            outcome = "may change the name: the content is compared"
        elif name in IN_ROWS:
            outcome = "may change it: the rows are compared"
        else:
            outcome = "refuses to change it"
        lines.append(f"| `{name}` | {outcome} |")
    return "\n".join(lines) + "\n"
