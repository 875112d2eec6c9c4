"""Checkpoints in the Hugging Face layout: complete or absent, loadable by `from_pretrained`, resumable by estune.

`checkpoint-<step>/` holds theta in float32. The run directory's root holds theta cast once to the compute dtype. A
checkpoint is written under a hidden name, fsynced, and renamed. The root's files are moved into place one by one,
`es_state.json` last: if that file exists, the model beside it is complete.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from estune.errors import UserError
from estune.es.replica import Replica
from estune.es.theta import fingerprint
from estune.es.types import ParameterSpec
from estune.files import (
    file_digest,
    is_count,
    is_number,
    read_json_object,
    remove_path,
    sync_directory,
    sync_tree,
    write_json,
)
from estune.models.tensor_files import WEIGHTS_FILE, TensorFile

ES_STATE = "es_state.json"
TRAINER_STATE = "trainer_state.json"
BASE_DIRECTORY = "base"  # a copy of theta_0, for bases that no file holds
_PARTIAL = ".partial-"


class Best(TypedDict):
    """The choice of a run's model by its held-out evaluations (`estune.run.best`)."""

    step: int  # steps done at the best evaluation
    metric: str
    value: float
    greater_is_better: bool
    global_step: int  # steps of the run when the choice was made


class State(TypedDict):
    """The content of `es_state.json`."""

    step: int  # steps done
    fingerprint: str  # of theta
    checksum: str  # of theta
    files: NotRequired[dict[str, str]]  # path -> digest of every other file; older versions list fewer files, or none
    best: NotRequired[Best]  # of a finished model that the evaluations chose; ``step`` is its step
    asked: NotRequired[bool]  # of a checkpoint that a callback has asked for, which `prune` keeps as a scheduled one


class TrainerState(TypedDict):
    """The content of `trainer_state.json`, by the names of transformers."""

    global_step: int  # steps of the run
    max_steps: int
    log_history: list[dict[str, float]]
    best_metric: NotRequired[float]
    best_global_step: NotRequired[int]  # the model's step


def checkpoint_path(run_dir: Path, steps_done: int) -> Path:
    """Return the directory of the checkpoint after ``steps_done`` steps."""
    return run_dir / f"checkpoint-{steps_done}"


def directories(run_dir: Path) -> list[tuple[int, Path]]:
    """Return all directories named like checkpoints, damaged ones too, as (steps done, directory), oldest first."""
    named = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in run_dir.glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in named if match and path.is_dir())


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """Return the run's checkpoints as (steps done, directory), oldest first."""
    return [(step, path) for step, path in directories(run_dir) if (path / ES_STATE).exists()]


def remove(run_dir: Path, steps_done: int) -> None:
    """Rename a checkpoint and then delete it, so that a half-deleted one is never taken for a checkpoint.

    If the checkpoint is a link, only the link is deleted.
    """
    path = checkpoint_path(run_dir, steps_done)
    partial = run_dir / f"{_PARTIAL}{path.name}"
    remove_path(partial)
    path.rename(partial)
    remove_path(partial)


def damage(directory: Path, specs: Sequence[ParameterSpec], state: State) -> str | None:
    """Return how a directory differs from its `es_state.json` (float32 weights, files); None if it does not.

    If the state holds a hash of the weights' file, the hash is checked instead of the weights' fingerprint.
    """
    try:
        file = TensorFile(directory / WEIGHTS_FILE)
        for spec in specs:
            if spec.name not in file.entries or file.shape(spec.name) != tuple(spec.shape):
                return f"{WEIGHTS_FILE} holds no tensor {spec.name!r} of shape {tuple(spec.shape)}"
        if WEIGHTS_FILE not in state.get("files", {}):
            found = fingerprint(specs, {spec.name: file.read(spec.name).reshape(spec.shape) for spec in specs})
            if found != state.get("fingerprint"):
                return f"{WEIGHTS_FILE} does not have the fingerprint that {ES_STATE} says"
    except UserError as error:
        return str(error)
    return damaged_file(directory, state)


def damaged_file(directory: Path, state: State) -> str | None:
    """Return a message about the first missing or changed file; None if there is none.

    Runs of an older estune list no files, or all but the float32 weights.
    """
    for name, wanted in state.get("files", {}).items():
        if not (directory / name).is_file() or file_digest(directory / name) != wanted:
            return f"{name} is missing or damaged"
    return None


def is_whole_model(directory: Path, state: State, parameters: Sequence[Sequence[Any]] | None = None) -> bool:
    """Return whether all files of a finished model exist and can be read.

    Args:
        directory: the model's directory.
        state: its `es_state.json`. If it holds no hash of the weights' file, as in runs of an older estune, weights
            stored in float32 must have its fingerprint.
        parameters: (name, shape, kind) of each, as in a journal's header. Default: the tensors of the file.
    """
    try:
        file = TensorFile(directory / WEIGHTS_FILE)
    except UserError:
        return False
    if parameters is None:
        parameters = [(name, file.shape(name), True) for name in file.entries]
    specs = [ParameterSpec(name, tuple(shape), bool(kind)) for name, shape, kind in parameters]
    if not all(spec.name in file.entries and file.shape(spec.name) == spec.shape for spec in specs):
        return False
    if not (directory / "config.json").is_file():
        return False
    if all(file.entries[spec.name]["dtype"] == "F32" for spec in specs):
        return damage(directory, specs, state) is None
    return all(file.is_readable(spec.name) for spec in specs) and damaged_file(directory, state) is None


def save_checkpoint(run_dir: Path, replica: Replica, steps_done: int, max_steps: int, *, asked: bool = False) -> Path:
    """Write ``checkpoint-<steps_done>`` with theta in float32; the checkpoint is complete or absent.

    ``asked``: whether a callback has asked for it.

    Raises:
        UserError: no space left; existing files are untouched.
    """
    target = checkpoint_path(run_dir, steps_done)
    partial = run_dir / f"{_PARTIAL}{target.name}"
    remove_path(partial)
    try:
        _write_whole(partial, replica, steps_done, max_steps, float32=True, asked=asked)
        remove_path(target)
        partial.rename(target)
        sync_directory(run_dir)
    finally:
        remove_path(partial)
    return target


def save_final(run_dir: Path, replica: Replica, steps_done: int, max_steps: int, best: Best | None = None) -> None:
    """Write the finished model to the run directory's root, theta cast once to the compute dtype.

    Args:
        run_dir: the run's directory.
        replica: holds the model's theta.
        steps_done: the model's step.
        max_steps: of the run.
        best: the choice of that step; None: it is the run's last.
    """
    partial = run_dir / f"{_PARTIAL}final"
    remove_path(partial)
    try:
        _write_whole(partial, replica, steps_done, max_steps, float32=False, best=best)
        (run_dir / ES_STATE).unlink(missing_ok=True)
        for path in sorted(partial.iterdir(), key=lambda path: (path.name == ES_STATE, path.name)):
            destination = run_dir / path.name
            if path.is_dir() or destination.is_dir():
                remove_path(destination)
            path.rename(destination)
        sync_directory(run_dir)
    finally:
        remove_path(partial)


def _write_whole(
    directory: Path,
    replica: Replica,
    steps_done: int,
    max_steps: int,
    *,
    float32: bool,
    best: Best | None = None,
    asked: bool = False,
) -> None:
    state: State = {"step": steps_done, "fingerprint": replica.fingerprint(), "checksum": replica.checksum()}
    if asked:
        state["asked"] = True
    trainer_state: TrainerState = {"global_step": steps_done, "max_steps": max_steps, "log_history": []}
    if best is not None:
        state["best"] = best
        trainer_state["global_step"] = best["global_step"]
        trainer_state |= {"best_metric": best["value"], "best_global_step": best["step"]}
    replica.save(directory, float32=float32)
    write_json(directory / TRAINER_STATE, trainer_state)
    names = (path.relative_to(directory) for path in sorted(directory.rglob("*")) if path.is_file())
    files = {str(name): file_digest(directory / name) for name in names}
    write_json(directory / ES_STATE, {**state, "files": files})
    sync_tree(directory)


def read_state(directory: Path) -> State | None:
    """Return the `es_state.json` of a checkpoint or a finished run; None if it is missing or damaged."""
    try:
        state = read_json_object(directory / ES_STATE)
    except (OSError, ValueError):
        return None
    files = state.get("files", {})
    is_sound = (
        is_count(state.get("step"))
        and all(isinstance(state.get(name), str) for name in ("fingerprint", "checksum"))
        and isinstance(files, dict)
        and all(isinstance(digest, str) for digest in files.values())
        and ("best" not in state or _is_best(state["best"], state["step"]))
    )
    return cast("State", state) if is_sound else None


def _is_best(value: Any, step: int) -> bool:
    """Return whether a value read from a file is a sound choice of this step."""
    return (
        isinstance(value, dict)
        and value.get("step") == step
        and is_count(value.get("global_step"))
        and step <= value["global_step"]
        and isinstance(value.get("metric"), str)
        and is_number(value.get("value"))
        and isinstance(value.get("greater_is_better"), bool)
    )


def remove_partial(run_dir: Path) -> None:
    """Delete the files of a killed save."""
    for path in leftovers(run_dir):
        remove_path(path)


def leftovers(run_dir: Path) -> list[Path]:
    """Return the files of a killed save."""
    return [*run_dir.glob(f"{_PARTIAL}*"), *run_dir.glob(".*.partial")]


def prune(run_dir: Path, keep: int, scheduled: Collection[int]) -> None:
    """Delete all but the newest ``keep`` scheduled checkpoints (0: keep all of them).

    A checkpoint that a callback has asked for counts as scheduled. Those at other steps, which an interrupt saved, are
    deleted too.
    """
    ours = [step for step, _ in checkpoints(run_dir)]
    on_schedule = [step for step in ours if step in scheduled or _is_asked(checkpoint_path(run_dir, step))]
    doomed = [step for step in ours if step not in on_schedule] + (on_schedule[:-keep] if keep > 0 else [])
    for step in doomed:
        remove(run_dir, step)


def _is_asked(directory: Path) -> bool:
    """Return whether a callback has asked for a checkpoint."""
    state = read_state(directory)
    return state is not None and bool(state.get("asked"))
