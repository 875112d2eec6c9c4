"""Checkpoints in the Hugging Face layout: whole or absent, loadable by `from_pretrained`, resumable by estune.

`checkpoint-<step>/` holds the float32 master; the run directory's root holds theta cast once to the compute dtype.
A checkpoint is written under a hidden name, put on disk, and renamed; the root's files are moved into place one by
one with `es_state.json` last, so its presence says that the model beside it is whole.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from estune.errors import UserError
from estune.es.replica import Replica
from estune.es.theta import fingerprint
from estune.es.types import ParameterSpec
from estune.files import (
    file_digest,
    is_count,
    read_json_object,
    remove_path,
    sync_directory,
    sync_tree,
    write_json,
)
from estune.models.tensor_files import WEIGHTS_FILE, TensorFile

ES_STATE = "es_state.json"
TRAINER_STATE = "trainer_state.json"
BASE_DIRECTORY = "base"  # theta_0, kept in the run directory where no base files could be read again
_PARTIAL = ".partial-"


def checkpoint_path(run_dir: Path, steps_done: int) -> Path:
    """Return the directory of the checkpoint after ``steps_done`` steps."""
    return run_dir / f"checkpoint-{steps_done}"


def directories(run_dir: Path) -> list[tuple[int, Path]]:
    """Return the directories named as checkpoints, whole or not, as (steps done, directory), oldest first."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in run_dir.glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """Return the run's checkpoints as (steps done, directory), oldest first."""
    return [(step, path) for step, path in directories(run_dir) if (path / ES_STATE).exists()]


def remove(run_dir: Path, steps_done: int) -> None:
    """Delete a checkpoint, by a rename first, so that no half of it is ever taken for a whole one.

    Of a checkpoint that is a link the link goes, and what it leads to stays.
    """
    path = checkpoint_path(run_dir, steps_done)
    partial = run_dir / f"{_PARTIAL}{path.name}"
    remove_path(partial)
    path.rename(partial)
    remove_path(partial)


def damage(directory: Path, specs: Sequence[ParameterSpec], state: Mapping[str, Any]) -> str | None:
    """Return why a directory does not hold the float32 weights and files of its `es_state.json`; None where it does.

    Where the state holds a hash of the weights' file, that hash stands for the fingerprint of the weights in it.
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


def damaged_file(directory: Path, state: Mapping[str, Any]) -> str | None:
    """Return which file is not what it was when it was written; None where all are.

    Runs of an older estune note no files, or not that of float32 weights.
    """
    for name, wanted in state.get("files", {}).items():
        if not (directory / name).is_file() or file_digest(directory / name) != wanted:
            return f"{name} is missing or damaged"
    return None


def is_whole_model(
    directory: Path, state: Mapping[str, Any], parameters: Sequence[Sequence[Any]] | None = None
) -> bool:
    """Return whether a finished model's files are there and can be read.

    Args:
        directory: that holds them.
        state: its `es_state.json`. Where it holds no hash of the weights' file, as in runs of an older estune, weights
            that are all stored in float32 must have its fingerprint.
        parameters: (name, shape, kind) of each, as a journal's header lists them; without them, the tensors of the
            file are the parameters.
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


def save_checkpoint(
    run_dir: Path, steps_done: int, replica: Replica, state: Mapping[str, Any], trainer_state: Mapping[str, Any]
) -> Path:
    """Write ``checkpoint-<steps_done>`` with the float32 master; it appears whole or not at all.

    Raises:
        UserError: no space left; nothing that was there is touched.
    """
    target = checkpoint_path(run_dir, steps_done)
    partial = run_dir / f"{_PARTIAL}{target.name}"
    remove_path(partial)
    try:
        _write_whole(partial, replica, state, trainer_state, float32=True)
        remove_path(target)
        partial.rename(target)
        sync_directory(run_dir)
    finally:
        remove_path(partial)
    return target


def save_final(run_dir: Path, replica: Replica, state: Mapping[str, Any], trainer_state: Mapping[str, Any]) -> None:
    """Write the finished model to the run directory's root, theta cast once to the compute dtype."""
    partial = run_dir / f"{_PARTIAL}final"
    remove_path(partial)
    try:
        _write_whole(partial, replica, state, trainer_state, float32=False)
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
    directory: Path, replica: Replica, state: Mapping[str, Any], trainer_state: Mapping[str, Any], *, float32: bool
) -> None:
    replica.save(directory, float32=float32)
    write_json(directory / TRAINER_STATE, trainer_state)
    names = (path.relative_to(directory) for path in sorted(directory.rglob("*")) if path.is_file())
    files = {str(name): file_digest(directory / name) for name in names}
    write_json(directory / ES_STATE, {**state, "files": files})
    sync_tree(directory)


def read_state(directory: Path) -> dict[str, Any] | None:
    """Return a checkpoint's (or a finished run's) `es_state.json`; ``None`` where there is none, or it is damaged."""
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
    )
    return state if is_sound else None


def remove_partial(run_dir: Path) -> None:
    """Delete what a killed save left behind."""
    for path in leftovers(run_dir):
        remove_path(path)


def leftovers(run_dir: Path) -> list[Path]:
    """Return what a killed save left behind."""
    return [*run_dir.glob(f"{_PARTIAL}*"), *run_dir.glob(".*.partial")]


def prune(run_dir: Path, keep: int, scheduled: Collection[int]) -> None:
    """Delete all but the newest ``keep`` scheduled checkpoints (0: keep all), each by a rename first.

    A checkpoint that an interrupt saved out of turn, not among the ``scheduled`` steps, goes too.
    """
    ours = checkpoints(run_dir)
    in_turn = [step for step, _ in ours if step in scheduled]
    doomed = [step for step, _ in ours if step not in scheduled] + (in_turn[:-keep] if keep > 0 else [])
    for step in doomed:
        remove(run_dir, step)
