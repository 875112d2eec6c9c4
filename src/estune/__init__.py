"""estune: fine-tune all parameters of a language model with evolution strategies.

`ESTrainer` and `ESConfig` are the Python interface; importing the package loads neither torch nor transformers.
"""

from typing import TYPE_CHECKING, Any

__all__ = ["ESConfig", "ESTrainer", "UserError", "__version__"]

if TYPE_CHECKING:
    from estune.config import ESConfig
    from estune.environment import VERSION as __version__  # noqa: N811
    from estune.errors import UserError
    from estune.train.trainer import ESTrainer

_HOMES = {
    "ESConfig": ("estune.config", "ESConfig"),
    "ESTrainer": ("estune.train.trainer", "ESTrainer"),
    "UserError": ("estune.errors", "UserError"),
    "__version__": ("estune.environment", "VERSION"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        hint = "; estune has ESTrainer and ESConfig" if name.endswith(("Trainer", "Config", "Arguments")) else ""
        raise AttributeError(f"module 'estune' has no attribute {name!r}{hint}")
    from importlib import import_module

    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)
