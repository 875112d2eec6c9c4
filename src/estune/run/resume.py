"""What a resume may change and what it may not: one table, `RULES`, and the comparison that follows it.

A run is compared by what things are, never by what they are called: weights by fingerprint, rows by their values,
rewards by their source. So a model, a dataset or a reward may have another name, or lie elsewhere, when the run is
resumed. `origin.json` remembers where each name led to when the run began, so that they are found from any directory.

Runs of an estune that wrote fewer facts down are compared by those that they have.
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
TOY = "toy"  # the toy engine's own vector, never a directory of that name
LOCATED = ("model", "dataset_name", "reward_funcs")  # options that name a file, a directory, or something on the hub


@dataclass(frozen=True)
class Rule:
    """What happens to a resume where one fact of the run has changed."""

    name: str
    what: str  # in words, for messages and the table of the docs
    compared: str  # how, for the docs
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
    f"{RULES['held_out'].what} are not those that the run began with: do not compare evaluations before and after"
)


@dataclass(frozen=True)
class Facts:
    """What a run is made of beside its options, as it is now."""

    data: dict[str, Any]  # rows, fingerprint, version of the fingerprint
    reward_funcs: list[str]  # (F,)
    reward_weights: list[float]  # (F,)
    identity: dict[str, Any]  # by the names of `RULES`: config, code, tokenizer, end_tokens, reward_sources, held_out
    unversioned_data: Callable[[], tuple[str, list[str]]]  # the fingerprint of older runs, and the columns it lacks

    def as_dict(self) -> dict[str, Any]:
        """Return what a journal's header, or a baseline's `method.json`, keeps."""
        names = ("data", "reward_funcs", "reward_weights", "identity")
        return {name: getattr(self, name) for name in names}


def are_facts(then: Any) -> bool:
    """Return whether a value read from a `method.json` holds what `check_facts` compares."""
    if not isinstance(then, dict) or not isinstance(then.get("data"), dict):
        return False
    data, identity = then["data"], then.get("identity", {})
    if not is_count(data.get("rows")) or not isinstance(data.get("fingerprint"), str) or not isinstance(identity, dict):
        return False
    sources = identity.get("reward_sources", {})
    return isinstance(sources, dict) and all(isinstance(parts, dict) for parts in sources.values())


def check_facts(then: Mapping[str, Any], now: Facts) -> None:
    """Compare what a run was begun with, as its header or `method.json` keeps it, with what it is resumed with.

    Raises:
        ExternalError: something differs that a resume cannot change; the sentence names it.
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
            warn(f"the run was begun by an older estune, which compares no values of {', '.join(unseen)}: whether they "
                 "are still the same is for you to know")  # fmt: skip
    if found["rows"] != then["rows"]:
        raise ExternalError(
            f"a resume cannot change the training data: the run began with {then['rows']} rows, now there are "
            f"{found['rows']}"
        )
    if found != then:
        raise ExternalError(
            "a resume cannot change the training data: a value of a column, or a prompt's tokens, is not what the run "
            f"began with (its fingerprint was {then['fingerprint']}, now it is {found['fingerprint']})"
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
        raise ExternalError(f"a resume cannot change {rule.what}: since the run began, {'; '.join(changed)}; take the "
                       "change back, or start a new run from the run's weights with --model")  # fmt: skip
    raise ExternalError(f"a resume cannot change {rule.what}: it is not as it was when the run began")


def _changed_parts(name: str, then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return which parts of a reward's source are others, in words."""
    changed = [part for part in {**then, **now} if then.get(part) != now.get(part)]
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return f"{', '.join(changed[:3])}{more} of {name} changed"


def warn_of_held_out(run_dir: Path, now: Facts) -> None:
    """Warn where a run that began without evaluations now has other held-out rows than at its first evaluation."""
    origin, found = read_origin(run_dir), now.identity.get("held_out")
    if origin and origin["held_out"] and found and origin["held_out"] != found:
        warn(HELD_OUT)


def warn_of_versions(then: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Warn where packages that can change a rollout's rounding have other versions than when the run began."""
    changed = [f"{name} {then[name]} is {now.get(name, 'absent')}" for name in then if then[name] != now.get(name)]
    if changed:
        warn(f"since the run began, {', '.join(changed)} now: the journalled steps stay exact, but new rollouts may "
             "round differently")  # fmt: skip


def warn_of_processor(then: str | None, now: str) -> None:
    """Warn where another processor computes the rollouts from here on."""
    if then is not None and then != now:
        warn(f"the run began on {then} and continues on {now}: the journalled steps stay exact, but new rollouts may "
             "round differently")  # fmt: skip


# --- where names lead -------------------------------------------------------------------------------------------------


class Origin(TypedDict):
    """Where a run lies, was started and resumed, and what the names in its options led to; all paths are absolute."""

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
    """Write where the run's model, dataset and reward files lie; what was known of other names is kept.

    Args:
        run_dir: the run.
        values: its options, as they are named now.
        began: its options as they were named when it began; these names lead where the present ones lead.
        held_out: identity of the held-out rows.
    """
    known = read_origin(run_dir)
    paths = {name: str(_moved(path, run_dir, known) or path) for name, path in known["paths"].items()} if known else {}
    paths |= {name: path for name in _names(values) if (path := _path_of(name)) is not None}
    for then, now in zip(_names(began or {}), _names(values), strict=False):
        if now in paths:
            paths[then] = paths[now]
    places = [str(_moved(place, run_dir, known) or place) for place in known["working_directories"]] if known else []
    with suppress(FileNotFoundError):  # the directory was deleted under the command
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
    """Return what `origin.json` holds; None where there is none that can be read: names are then taken as they are."""
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
    """Return a run's stored options with model, dataset and reward files where they lie as seen from here.

    A name that still leads to the same path stays as it is. Otherwise the path that it led to is taken, or, where the
    run was moved together with its files, the path that lies as it lay relative to the run.
    """
    found, origin = dict(values), read_origin(run_dir)
    if origin is None:
        return found
    for option in LOCATED:
        value = found.get(option)
        if isinstance(value, str):
            found[option] = _located(value, run_dir, origin)
        elif isinstance(value, list):
            found[option] = [_located(item, run_dir, origin) for item in value]
    return found


def refuse_lost(values: Mapping[str, Any], run_dir: Path, given: Container[str] = ()) -> None:
    """Refuse to look elsewhere for a file or directory of the run that is gone; ``given`` options are left out.

    Raises:
        ExternalError: names what is gone, where it was, and the option that says where it is now.
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
    """Return the directories in which the run's reward modules were looked for, as far as they are still there."""
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
    """Return a recorded path, or where it lies if it moved together with the run; None where neither exists."""
    beside = Path(os.path.abspath(run_dir / os.path.relpath(recorded, origin["run_directory"])))
    return next((place for place in (Path(recorded), beside) if place.exists()), None)


def _split(name: str) -> tuple[str, str]:
    """Return ``path/file.py:function`` as path and ``:function``; any other name whole."""
    path, colon, function = name.rpartition(":")
    return (path, f":{function}") if colon and path.endswith(".py") else (name, "")


def _names(values: Mapping[str, Any]) -> list[str]:
    given = [values.get("model"), values.get("dataset_name"), *(values.get("reward_funcs") or [])]
    return [_split(name)[0] for name in given if isinstance(name, str)]


def _path_of(name: str) -> str | None:
    """Return the absolute path that a name leads to from here; None for what is no file or directory."""
    if name == TOY:
        return None
    directory = local_directory(name)
    if directory is not None and directory.parent == EMBEDDED_MODELS:
        return None
    path = Path(name).expanduser()
    return os.path.abspath(path) if path.exists() else None


def may_lead_to_the_same(option: str, then: Any, now: Any, then_has_sources: bool) -> bool:
    """Return whether an option that names things may have changed: what it leads to is compared once it is loaded.

    Reward functions must have the names that they had; without a hash of their source also their file's name.
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
    """Return the table of what a resume may change, as Markdown: facts from `RULES`, options from `ESConfig`."""
    lines = ["| what a run is made of | compared by | another one is |", "|---|---|---|"]
    lines += [f"| {rule.what} | {rule.compared} | {rule.outcome} |" for rule in RULES.values()]
    lines += ["", "## Options", "", "| option | a resume |", "|---|---|"]
    for name in FIELDS:
        if name in RESUMABLE:
            outcome = "may change it"
        elif name in LOCATED:
            outcome = "may name it otherwise: what it leads to is compared"
        else:
            outcome = "refuses another value"
        lines.append(f"| `{name}` | {outcome} |")
    return "\n".join(lines) + "\n"


def same_names(stored: Mapping[str, Any], args: Any, names: Sequence[str] = LOCATED) -> bool:
    """Return whether the options that name things lead to the very paths that the stored ones lead to."""
    now = dataclasses.asdict(args)
    return all(stored.get(name) == now.get(name) or _paths(stored, name) == _paths(now, name) for name in names)


def _paths(values: Mapping[str, Any], option: str) -> list[Any]:
    value = values.get(option)
    listed = value if isinstance(value, list) else [value]
    return [(_path_of(_split(name)[0]) or name, _split(name)[1]) for name in listed if isinstance(name, str)]
