"""TRL 1.12, the last version with a PPO trainer, in a directory of its own beside the TRL of the other rivals.

    python -m pip install --no-deps --target DIR trl==1.12.0

DIR is the environment variable ESTUNE_PPO_TRL, by default `lib/estune-ppo` of the Python environment. It holds that one
package; torch, transformers and accelerate are the environment's. `in_place` puts it where `import trl` finds it, and
the other TRL out of sight, for as long as a method needs it: in one process both versions may be used in turn.
"""

from __future__ import annotations

import importlib
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType
from typing import Any

from estune.errors import UserError

VERSION = "1.12.0"
_imported: dict[str, ModuleType] = {}  # its modules, while the other TRL is in sight


def directory() -> Path:
    """Return where TRL 1.12 is, or belongs."""
    return Path(os.environ.get("ESTUNE_PPO_TRL") or Path(sys.prefix) / "lib" / "estune-ppo")


def check() -> Path:
    """Return the directory, which holds TRL 1.12 and nothing else.

    Raises:
        UserError: it does not; with the command that installs it.
    """
    path = directory()
    found = sorted(f"{one.name} {one.version}" for one in distributions(path=[str(path)]))
    if found != [f"trl {VERSION}"]:
        pip = f"python -m pip install --no-deps --target {shlex.quote(str(path))} trl=={VERSION}"
        if path.exists():
            pip = f"delete {path}, which holds {', '.join(found) or 'no package'}, then {pip}"
        raise UserError(f"method ppo needs trl {VERSION} alone in a directory of its own: {pip}")
    return path


@contextmanager
def in_place() -> Iterator[None]:
    """Let `import trl` mean TRL 1.12; afterwards what it meant before."""
    path = str(check())
    if path in sys.path:
        yield
        return
    others = _take_out()
    sys.modules.update(_imported)
    sys.path.insert(0, path)
    try:
        yield
    finally:
        sys.path.remove(path)
        _imported.update(_take_out())
        sys.modules.update(others)


def load() -> tuple[Any, Any]:
    """Return `PPOConfig` and `PPOTrainer`.

    Raises:
        UserError: TRL 1.12, or a package that it needs, is missing.
    """
    with in_place(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the trainer is experimental
        try:
            module = importlib.import_module("trl.experimental.ppo")
        except ImportError as error:
            needed = "python -m pip install 'estune[baselines]'"
            raise UserError(f"method ppo needs what comes with {needed}: {error}") from None
    return module.PPOConfig, module.PPOTrainer


def _take_out() -> dict[str, ModuleType]:
    """Remove whichever TRL is imported from the imported modules; return its modules."""
    names = [name for name in sys.modules if name == "trl" or name.startswith("trl.")]
    return {name: sys.modules.pop(name) for name in names}
