"""The directory behind a model's name, and the model's public name and origin; imports no torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NotRequired, TypedDict, cast

EMBEDDED_MODELS = Path(__file__).parent
FETCHED_FILE = "fetched.json"  # written by `estune fetch` beside a model


class Source(TypedDict):
    """Where the files of a fetched model come from."""

    source: str  # "hub" or "registry"
    revision: NotRequired[str | None]  # of the hub repository
    packages: NotRequired[list[str]]  # of the registry, each with its version
    sha256: dict[str, str]  # by file


class Fetched(Source):
    """The content of `fetched.json`."""

    name: str  # for `estune fetch`
    model: str  # the hub id
    terms: str  # the licence


def local_directory(model: str) -> Path | None:
    """Return the directory of an embedded model (``tiny``) or of a local model; ``None`` for a hub id.

    The name of an embedded model always means that model; write ``./tiny`` for a local directory of the same name.
    """
    embedded = EMBEDDED_MODELS / model
    if model and "/" not in model and (embedded / "config.json").is_file():
        return embedded
    path = Path(os.path.expanduser(model))  # unlike Path.expanduser, does not raise for an unknown user
    return path if os.path.isdir(path) else None  # unlike Path.is_dir, false if a parent cannot be read


def public_name(model: str) -> str:
    """Return a model's public name: its hub id, the hub id that it was fetched from, or the directory's own name."""
    directory = local_directory(model)
    if directory is None or directory.parent == EMBEDDED_MODELS:
        return model
    fetched = _fetched(directory)
    return str(fetched["model"]) if fetched else directory.resolve().name


def fetched_name(model: str) -> str | None:
    """Return the name for `estune fetch` if the model was fetched from the registry; else None."""
    directory = local_directory(model)
    fetched = _fetched(directory) if directory else None
    return fetched["name"] if fetched and fetched.get("source") == "registry" else None


def origin(model: str) -> str:
    """Return how weights were fetched, in brackets, if they differ from the hub's; else an empty string."""
    directory = local_directory(model)
    fetched = _fetched(directory) if directory else None
    if not fetched or fetched.get("source") != "registry":
        return ""
    packages = ", ".join(fetched["packages"])
    return f" (from four-bit weights: `estune fetch {fetched['name']} --source registry`, {packages})"


def _fetched(directory: Path) -> Fetched | None:
    """Return the content of `fetched.json` beside a model; None if the file is missing or damaged."""
    try:
        record = json.loads((directory / FETCHED_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    fields: dict[str, type] = {"model": str}
    if isinstance(record, dict) and record.get("source") == "registry":
        fields |= {"name": str, "packages": list}
    is_whole = isinstance(record, dict) and all(isinstance(record.get(name), kind) for name, kind in fields.items())
    return cast("Fetched", record) if is_whole else None
