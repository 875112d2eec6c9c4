"""Where a model's name leads on this machine, decided in one place and without torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

EMBEDDED_MODELS = Path(__file__).parent
FETCHED_FILE = "fetched.json"  # what `estune fetch` writes beside a model


def local_directory(model: str) -> Path | None:
    """Return the directory of an embedded model (``tiny``) or a local one; ``None`` for a hub id.

    The name of an embedded model always means that model; a directory of the same name is written ``./tiny``.
    """
    embedded = EMBEDDED_MODELS / model
    if model and "/" not in model and (embedded / "config.json").is_file():
        return embedded
    path = Path(os.path.expanduser(model))  # which leaves the home of an unknown user as it is
    return path if os.path.isdir(path) else None  # unlike is_dir, false where a parent cannot be read


def public_name(model: str) -> str:
    """Return how others know a model: the hub's id where it is one or was fetched, else without the way to it."""
    directory = local_directory(model)
    if directory is None or directory.parent == EMBEDDED_MODELS:
        return model
    fetched = _fetched(directory)
    return str(fetched["model"]) if fetched else directory.resolve().name


def fetched_name(model: str) -> str | None:
    """Return the name under which `estune fetch` brings a model from the registry, if it came that way."""
    directory = local_directory(model)
    fetched = _fetched(directory) if directory else {}
    return fetched["name"] if fetched.get("source") == "registry" else None


def origin(model: str) -> str:
    """Return, in brackets, what others must know of weights that are not the hub's own; mostly nothing."""
    directory = local_directory(model)
    fetched = _fetched(directory) if directory else {}
    if fetched.get("source") != "registry":
        return ""
    packages = ", ".join(fetched["packages"])
    return f" (from four-bit weights: `estune fetch {fetched['name']} --source registry`, {packages})"


def _fetched(directory: Path) -> dict[str, Any]:
    """Return what `estune fetch` wrote beside a model; nothing where it did not, or where the file is damaged."""
    try:
        found = json.loads((directory / FETCHED_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    wanted: dict[str, type] = {"model": str}
    if isinstance(found, dict) and found.get("source") == "registry":
        wanted |= {"name": str, "packages": list}
    is_whole = isinstance(found, dict) and all(isinstance(found.get(name), kind) for name, kind in wanted.items())
    return found if is_whole else {}
