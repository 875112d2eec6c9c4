"""What a resume may change: the table `RULES`, and the comparison that follows it.

A run is compared by content, never by name: weights by fingerprint, rows by their values, rewards by their source. So a
model, a dataset or a reward may have another name or path when the run is resumed. `origin.json` records the path that
each name led to, so that a resume finds the files from any directory.

A run of an older estune, which recorded fewer facts, is compared by the facts that it recorded.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from estune.config import FIELDS, RESUMABLE
from estune.console import warn
from estune.errors import ExternalError
from estune.files import is_count, write_json
from estune.models.names import EMBEDDED_MODELS, local_directory

ORIGIN_FILE = "origin.json"
TOY = "toy"  # the model name of the toy engine, never a directory
LOCATED = ("model", "dataset_name", "reward_funcs")  # options that name a file, a directory, or a hub repository


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


@dataclass(frozen=True)
class Facts:
    """The present facts of a run beside its options."""

    data: dict[str, Any]  # number of rows, fingerprint, version of the fingerprint
    reward_funcs: list[str]  # (F,)
    reward_weights: list[float]  # (F,)
    identity: dict[str, Any]  # by the names of `RULES`: config, code, tokenizer, end_tokens, reward_sources, held_out
    unversioned_data: Callable[[], tuple[str, list[str]]]  # an older run's fingerprint, and the columns not in it

    def as_dict(self) -> dict[str, Any]:
        """Return the facts that a journal's header, or a baseline's `method.json`, stores."""
        names = ("data", "reward_funcs", "reward_weights", "identity")
        return {name: getattr(self, name) for name in names}


def are_facts(then: Any) -> bool:
    """Return whether a value read from a `method.json` holds the facts that `check_facts` compares."""
    if not isinstance(then, dict) or not isinstance(then.get("data"), dict):
        return False
    data, identity = then["data"], then.get("identity", {})
    if not is_count(data.get("rows")) or not isinstance(data.get("fingerprint"), str) or not isinstance(identity, dict):
        return False
    sources = identity.get("reward_sources", {})
    return isinstance(sources, dict) and all(isinstance(parts, dict) for parts in sources.values())


def check_facts(then: Mapping[str, Any], now: Facts) -> None:
    """Compare a run's stored facts, from its header or `method.json`, with the present facts.

    Raises:
        ExternalError: a fact differs that a resume cannot change; the message names it.
    """
    _check_data(then["data"], now)
    for name in ("reward_funcs", "reward_weights"):
        if name in then and then[name] != getattr(now, name):
            raise ExternalError(f"a resume cannot change {name} from {then[name]} to {getattr(now, name)}")
    known = then.get("identity", {})
    for name, value in now.identity.items():
        if name in known and known[name] != value:
            _differs(RULES[name], known[name], value)


def _check_data(then: Mapping[str, Any], now: Facts) -> None:
    found = dict(now.data)
    if "version" not in then:
        fingerprint, unseen = now.unversioned_data()
        found = {"rows": now.data["rows"], "fingerprint": fingerprint}
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


def _differs(rule: Rule, then: Any, now: Any) -> None:
    if rule.outcome == "warned":
        if then is not None and now is not None:
            warn(HELD_OUT)
        return
    if rule.name == "end_tokens":
        raise ExternalError(f"a resume cannot change {rule.what} from {then} to {now}")
    if rule.name == "reward_sources":
        changed = [_changed_parts(name, then.get(name, {}), now[name]) for name in now if then.get(name) != now[name]]
        raise ExternalError(
            f"a resume cannot change {rule.what}: since the run began, {'; '.join(changed)}; undo the change, or start "
            "a new run from the run's weights with --model"
        )
    raise ExternalError(f"a resume cannot change {rule.what}: it has changed since the run began")


def _changed_parts(name: str, then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return the parts of a reward's source that changed, as text."""
    changed = [part for part in {**then, **now} if then.get(part) != now.get(part)]
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return f"{', '.join(changed[:3])}{more} of {name} changed"


def warn_of_held_out(run_dir: Path, now: Facts) -> None:
    """Warn if the held-out rows differ from the run's first evaluation; for runs that began without one."""
    origin, held_out = read_origin(run_dir), now.identity.get("held_out")
    if origin and origin["held_out"] and held_out and origin["held_out"] != held_out:
        warn(HELD_OUT)


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


# --- the paths of names -----------------------------------------------------------------------------------------------


class Origin(TypedDict):
    """The directory of a run, the working directories of its commands, and the paths of the names in its options.

    All paths are absolute.
    """

    run_directory: str
    working_directories: list[str]
    paths: dict[str, str]  # name -> path
    held_out: dict[str, Any] | None  # identity of the rows of the first evaluation


def keep_origin(
    run_dir: Path,
    values: Mapping[str, Any],
    began: Mapping[str, Any] | None = None,
    held_out: dict[str, Any] | None = None,
) -> None:
    """Write the paths of the run's model, dataset and reward files; recorded paths of other names are kept.

    Args:
        run_dir: the run's directory.
        values: the run's options, as named now.
        began: the run's options, as named when the run began; these names get the paths of the present names.
        held_out: identity of the held-out rows.
    """
    known = read_origin(run_dir)
    paths = {name: str(_moved(path, run_dir, known) or path) for name, path in known["paths"].items()} if known else {}
    paths |= {name: path for name in _names(values) if (path := _path_of(name)) is not None}
    for then, now in zip(_names(began or {}), _names(values), strict=False):
        if now in paths:
            paths[then] = paths[now]
    places = [str(_moved(place, run_dir, known) or place) for place in known["working_directories"]] if known else []
    with suppress(FileNotFoundError):  # the working directory was deleted
        places = list(dict.fromkeys([*places, os.getcwd()]))
    origin = Origin(
        run_directory=os.path.abspath(run_dir),
        working_directories=places,
        paths=paths,
        held_out=(known["held_out"] if known else None) or held_out,
    )
    if origin != known:
        write_json(run_dir / ORIGIN_FILE, origin)


def read_origin(run_dir: Path) -> Origin | None:
    """Return the content of `origin.json`; None if it is missing or damaged, and then names are used as they are."""
    try:
        found = json.loads((run_dir / ORIGIN_FILE).read_text(encoding="utf-8"))
        paths = {str(name): str(path) for name, path in found["paths"].items() if name and path}
        places = [str(place) for place in found["working_directories"] if place]
        directory, held_out = str(found["run_directory"]), found.get("held_out")
        if not directory or not isinstance(held_out, dict | None):
            return None
        return Origin(run_directory=directory, working_directories=places, paths=paths, held_out=held_out)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def located(values: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """Return a run's stored options with names of models, datasets and reward files that work in this directory.

    A name that still leads to the recorded path is kept. Otherwise it is replaced by the recorded path, or, if the run
    was moved together with its files, by the path at the same place relative to the run.
    """
    options, origin = dict(values), read_origin(run_dir)
    if origin is None:
        return options
    for option in LOCATED:
        value = options.get(option)
        if isinstance(value, str):
            options[option] = _located(value, run_dir, origin)
        elif isinstance(value, list):
            options[option] = [_located(item, run_dir, origin) for item in value]
    return options


def refuse_lost(values: Mapping[str, Any], run_dir: Path, given: Container[str] = ()) -> None:
    """Raise an error if a file or directory of the run is gone. Options in ``given`` are not checked.

    Raises:
        ExternalError: the message names the missing path and the option for its new place.
    """
    origin = read_origin(run_dir)
    if origin is None:
        return
    for option in LOCATED:
        value = values.get(option)
        for name in [] if option in given else value if isinstance(value, list) else [value]:
            path = _split(str(name))[0]
            recorded = origin["paths"].get(path)
            if recorded is not None and _moved(recorded, run_dir, origin) is None and _path_of(path) is None:
                raise ExternalError(
                    f"the {option} of {run_dir} was {recorded}, which is gone: if it moved, give --{option}"
                )


def module_directories(run_dir: Path) -> list[Path]:
    """Return the working directories of the run's commands that still exist; reward modules are searched there."""
    origin = read_origin(run_dir)
    places = [_moved(place, run_dir, origin) for place in origin["working_directories"]] if origin else []
    return [place for place in places if place is not None]


def _located(name: str, run_dir: Path, origin: Origin) -> str:
    path, function = _split(name)
    recorded = origin["paths"].get(path)
    if recorded is None or _path_of(path) == recorded:
        return name
    place = _moved(recorded, run_dir, origin)
    return name if place is None else f"{place}{function}"


def _moved(recorded: str, run_dir: Path, origin: Origin) -> Path | None:
    """Return a recorded path, or its new place if it moved together with the run; None if neither exists."""
    beside = Path(os.path.abspath(run_dir / os.path.relpath(recorded, origin["run_directory"])))
    return next((place for place in (Path(recorded), beside) if place.exists()), None)


def _split(name: str) -> tuple[str, str]:
    """Split ``path/file.py:function`` into path and ``:function``; any other name stays whole."""
    path, colon, function = name.rpartition(":")
    return (path, f":{function}") if colon and path.endswith(".py") else (name, "")


def _names(values: Mapping[str, Any]) -> list[str]:
    given = [values.get("model"), values.get("dataset_name"), *(values.get("reward_funcs") or [])]
    return [_split(name)[0] for name in given if isinstance(name, str)]


def _path_of(name: str) -> str | None:
    """Return the absolute path of a name; None if it is not an existing file or directory of the user's."""
    if name == TOY:
        return None
    directory = local_directory(name)
    if directory is not None and directory.parent == EMBEDDED_MODELS:
        return None
    path = Path(name).expanduser()
    return os.path.abspath(path) if path.exists() else None


def may_lead_to_the_same(option: str, then: Any, now: Any, then_has_sources: bool) -> bool:
    """Return whether an option may hold another name, because the content behind the name is compared after loading.

    Reward functions must keep their names. Without a stored hash of their source, their file must keep its name too.
    """
    if option not in LOCATED or then is None or now is None:
        return False
    if option != "reward_funcs":
        return True
    return [_comparable(name, then_has_sources) for name in then] == [
        _comparable(name, then_has_sources) for name in now
    ]


def _comparable(spec: str, has_sources: bool) -> str:
    where, _, function = spec.rpartition(":")
    return function if has_sources else f"{Path(where).name}:{function}"


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
        else:
            outcome = "refuses to change it"
        lines.append(f"| `{name}` | {outcome} |")
    return "\n".join(lines) + "\n"


def same_names(stored: Mapping[str, Any], args: Any, names: Sequence[str] = LOCATED) -> bool:
    """Return whether the options in ``names`` have the stored values, or lead to the same paths."""
    now = dataclasses.asdict(args)
    return all(stored.get(name) == now.get(name) or _paths(stored, name) == _paths(now, name) for name in names)


def _paths(values: Mapping[str, Any], option: str) -> list[Any]:
    value = values.get(option)
    listed = value if isinstance(value, list) else [value]
    return [(_path_of(_split(name)[0]) or name, _split(name)[1]) for name in listed if isinstance(name, str)]
