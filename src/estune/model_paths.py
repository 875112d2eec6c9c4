"""Where a model's name leads on this machine, decided in one place and without torch."""

from __future__ import annotations

import json
from pathlib import Path

EMBEDDED_MODELS = Path(__file__).parent / "models"
FETCHED_FILE = "fetched.json"  # what `estune fetch` writes beside a model


def local_directory(model: str) -> Path | None:
    """Return the directory of an embedded model (``tiny``) or a local one; ``None`` for a hub id.

    The name of an embedded model always means that model; a directory of the same name is written ``./tiny``.
    """
    embedded = EMBEDDED_MODELS / model
    if model and "/" not in model and (embedded / "config.json").is_file():
        return embedded
    path = Path(model).expanduser()
    return path if path.is_dir() else None


def public_name(model: str) -> str:
    """Return how others know a model: the hub's id where it is one or was fetched, else without the way to it."""
    directory = local_directory(model)
    if directory is None or directory.parent == EMBEDDED_MODELS:
        return model
    fetched = directory / FETCHED_FILE
    if fetched.is_file():
        return str(json.loads(fetched.read_text(encoding="utf-8"))["model"])
    return directory.resolve().name
