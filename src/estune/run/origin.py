"""`origin.json`: the paths of the names in a run's options, so that a resume finds the files from any directory."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from estune.errors import ExternalError, UserError
from estune.files import write_json
from estune.models.names import EMBEDDED_MODELS, local_directory

ORIGIN_FILE = "origin.json"
TOY = "toy"  # the model name of the toy engine, never a directory
LOCATED = ("model", "dataset_name", "engine", "reward_funcs")  # options that can name a file, directory or repository
IN_ROWS = ("column_mapping",)  # options whose whole effect is in the rows, whose values a resume compares


class DataIdentity(TypedDict):
    """The identity of rows: two runs with equal identities have the same rows."""

    rows: int
    fingerprint: str
    version: NotRequired[int]  # of the fingerprint; absent in runs of older versions


class Origin(TypedDict):
    """The directory of a run, the working directories of its commands, and the paths of the names in its options.

    All paths are absolute.
    """

    run_directory: str
    working_directories: list[str]
    paths: dict[str, str]  # name -> path
    held_out: DataIdentity | None  # identity of the rows of the first evaluation


def keep_origin(
    run_dir: Path,
    values: Mapping[str, Any],
    began: Mapping[str, Any] | None = None,
    held_out: DataIdentity | None = None,
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
    paths |= {name: path for name in _names(values) if name and (path := _path_of(name)) is not None}
    for then, now in zip(_names(began or {}), _names(values), strict=False):
        if then and now in paths:
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
        rows = cast("DataIdentity | None", held_out)
        return Origin(run_directory=directory, working_directories=places, paths=paths, held_out=rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def located(values: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """Return a run's stored options with names of models, datasets, and files of code that work in this directory.

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
    """Return the working directories of the run's commands that still exist, where its Python modules are searched."""
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
    """Return the names that can be paths: of the model, the engine's file, the dataset, and the reward functions.

    A name is empty if the option names no path; so the names of two configurations correspond.
    """
    model, engine = values.get("model"), str(values.get("engine") or "")
    engine_file, of_class = _split(engine)
    if is_engine_name(engine, model):
        model = ""
    given = [model, engine_file if of_class else "", values.get("dataset_name"), *(values.get("reward_funcs") or [])]
    return [_split(name)[0] for name in given if isinstance(name, str)]


def is_engine_name(engine: str, model: Any) -> bool:
    """Return whether a model is the name of an engine outside estune, which is never a path."""
    return ":" in engine and isinstance(model, str) and "/" not in model


def is_foreign_engine(engine: str) -> bool:
    """Return whether an engine's name leads to code outside estune: to a file, or to a module of another package."""
    where = engine.rpartition(":")[0]
    return where.endswith(".py") or (bool(where) and re.fullmatch(r"estune\.engines(\.\w+)+", where) is None)


def refuse_foreign_engine(engine: str, run_dir: Path) -> None:
    """Refuse an engine outside estune that a run names and the user does not: a run must not choose the code that runs.

    Raises:
        UserError: the engine is outside estune; the message names ``--engine``.
    """
    if is_foreign_engine(engine):
        raise UserError(
            f"{run_dir} names {engine}, an engine outside estune, and a run must not choose the code that runs: "
            f"read the engine's code, then give --engine {engine}"
        )


def _path_of(name: str) -> str | None:
    """Return the absolute path of a name; None if it is not an existing file or directory of the user's."""
    if name == TOY:
        return None
    directory = local_directory(name)
    if directory is not None and directory.parent == EMBEDDED_MODELS:
        return None
    path = Path(name).expanduser()
    return os.path.abspath(path) if path.exists() else None


def same_names(stored: Mapping[str, Any], args: Any, names: Sequence[str] = LOCATED) -> bool:
    """Return whether options have their stored values, or values that lead to the same paths.

    The options are those in ``names``, and those of `IN_ROWS`, whose default is empty if they are not stored.
    """
    now = dataclasses.asdict(args)
    if any((stored.get(name) or None) != (now[name] or None) for name in IN_ROWS):
        return False
    return all(stored.get(name) == now.get(name) or _paths(stored, name) == _paths(now, name) for name in names)


def _paths(values: Mapping[str, Any], option: str) -> list[Any]:
    value = values.get(option)
    listed = value if isinstance(value, list) else [value]
    return [(_path_of(_split(name)[0]) or name, _split(name)[1]) for name in listed if isinstance(name, str)]


def may_lead_to_the_same(option: str, then: Any, now: Any, then_has_sources: bool) -> bool:
    """Return whether an option may hold another value, because the content behind the value is compared after loading.

    Reward functions and an engine's class must keep their names. Without a stored hash of their source, their file must
    keep its name too.
    """
    if option in IN_ROWS:
        return True
    if option not in LOCATED or then is None or now is None:
        return False
    if option not in ("reward_funcs", "engine"):
        return True
    before, after = ([value] if isinstance(value, str) else value for value in (then, now))
    return [_comparable(name, then_has_sources) for name in before] == [
        _comparable(name, then_has_sources) for name in after
    ]


def _comparable(spec: str, has_sources: bool) -> str:
    where, _, function = spec.rpartition(":")
    if not where:  # a reward model
        return Path(spec).name
    return function if has_sources else f"{Path(where).name}:{function}"
