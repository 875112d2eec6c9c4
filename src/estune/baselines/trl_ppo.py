"""TRL 1.12, the last version with a PPO trainer, in a separate directory from the TRL of the other baselines.

    python -m pip install --no-deps --target DIR trl==1.12.0

DIR is the environment variable ESTUNE_PPO_TRL, by default `lib/estune-ppo` of the Python environment. DIR holds only
this package; torch, transformers and accelerate come from the environment. Within `in_place`, `import trl` imports TRL
1.12 and hides the other TRL. One process can use both versions, one after the other.
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

from estune.errors import UserError, install_command

VERSION = "1.12.0"
_imported: dict[str, ModuleType] = {}  # modules of TRL 1.12, while the other TRL is importable


def directory() -> Path:
    """Return the directory of TRL 1.12, which may not exist."""
    return Path(os.environ.get("ESTUNE_PPO_TRL") or Path(sys.prefix) / "lib" / "estune-ppo")


def check() -> Path:
    """Return the directory of TRL 1.12 after checking that it holds only this package.

    Raises:
        UserError: it does not; the message gives the command that installs TRL 1.12.
    """
    path = directory()
    packages = sorted(f"{package.name} {package.version}" for package in distributions(path=[str(path)]))
    if packages != [f"trl {VERSION}"]:
        pip = f"python -m pip install --no-deps --target {shlex.quote(str(path))} trl=={VERSION}"
        if path.exists():
            pip = f"delete {path}, which holds {', '.join(packages) or 'no package'}, then {pip}"
        raise UserError(f"method ppo needs trl {VERSION} in a directory without other packages: {pip}")
    return path


@contextmanager
def in_place() -> Iterator[None]:
    """Make `import trl` import TRL 1.12 within the context, and restore the other TRL afterwards."""
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
        UserError: TRL 1.12 or one of its dependencies is missing.
    """
    with in_place(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL warns that the trainer is experimental
        try:
            module = importlib.import_module("trl.experimental.ppo")
        except ImportError as error:
            needed = install_command(extra="baselines")
            raise UserError(f"method ppo needs the packages of {needed}: {error}") from None
    return module.PPOConfig, module.PPOTrainer


def _take_out() -> dict[str, ModuleType]:
    """Remove the modules of the imported TRL from `sys.modules` and return them."""
    names = [name for name in sys.modules if name == "trl" or name.startswith("trl.")]
    return {name: sys.modules.pop(name) for name in names}
