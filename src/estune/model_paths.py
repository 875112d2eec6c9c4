"""Where a model's name leads on this machine, decided in one place and without torch."""

from __future__ import annotations

from pathlib import Path

EMBEDDED_MODELS = Path(__file__).parent / "models"


def local_directory(model: str) -> Path | None:
    """Return the directory of an embedded model (``tiny``) or a local one; ``None`` for a hub id.

    The name of an embedded model always means that model; a directory of the same name is written ``./tiny``.
    """
    embedded = EMBEDDED_MODELS / model
    if model and "/" not in model and (embedded / "config.json").is_file():
        return embedded
    path = Path(model).expanduser()
    return path if path.is_dir() else None
